"""config.json to a ModelConfig and back: read completely or refused, before a weight is looked at."""

import math
from pathlib import Path

from machine.files import BadInput, read_json
from model import ModelConfig

LAYERS = ("full_attention", "sliding_attention")
FAMILIES = {    # what a key that is missing means, where that is not the same in all families
    "llama": {}, "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "smollm3": {"rope_theta": 2e6, "tie_word_embeddings": True},
    "gemma3_text": {"rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 4096, "head_dim": 256}}
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
             "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")}
YARN_KEYS = ("attention_factor", "mscale", "mscale_all_dim")         # may be missing
NO_ROPE = {"rope": {"rope_type": "linear", "factor": math.inf}}      # waves so slow that none of them turns
NUMBERS = {     # key: (default, lowest, highest); a default that is a string is another key's value
    "vocab_size": (None, 1, 2**24), "hidden_size": (None, 1, 2**24),
    "intermediate_size": (None, 1, 2**24), "num_hidden_layers": (None, 1, 10_000),
    "num_attention_heads": (None, 1, 2**14), "num_key_value_heads": ("num_attention_heads", 1, 2**24),
    "max_position_embeddings": (2048, 1, 2**31), "rms_norm_eps": (1e-6, 0, 1)}
EXPERTS = "mixture-of-experts models are not implemented"
REFUSED = (     # key, what makes it impossible, what is said of it
    ("model_type", lambda v: v == "gemma3", "model_type {!r} takes images, gemma3_text does not"),
    ("hidden_act", lambda v: v not in ("silu", None), "hidden_act {!r} is not implemented, only silu"),
    ("hidden_activation", lambda v: v not in ("gelu_pytorch_tanh", None),
     "hidden_activation {!r} is not implemented, only gelu_pytorch_tanh"),
    ("attn_logit_softcapping", lambda v: v is not None, "attn_logit_softcapping {} is not implemented"),
    ("final_logit_softcapping", lambda v: v is not None, "final_logit_softcapping {} is not implemented"),
    ("use_bidirectional_attention", bool, "use_bidirectional_attention is not implemented"),
    ("quantization_config", bool, "quantised weights cannot be trained; use the unquantised checkpoint"),
    ("num_experts", bool, EXPERTS), ("num_local_experts", bool, EXPERTS), ("n_routed_experts", bool, EXPERTS))


def read_config(folder):
    """The ModelConfig of a model folder."""
    return config_from_dict(read_json(Path(folder) / "config.json", "model folder"))


def config_from_dict(raw):
    """The ModelConfig of a config.json. What the decoder does not implement is BadInput."""
    if not isinstance(raw, dict):
        raise BadInput("config.json does not hold a JSON object; is this a Hugging Face model folder?")
    for key, impossible, sentence in REFUSED:
        if impossible(raw.get(key)):
            raise BadInput(f"config.json: {sentence.format(raw[key])}")
    source, family = raw, raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(f"config.json: model_type {family!r} is not implemented; {', '.join(FAMILIES)} are")
    raw, gemma = FAMILIES[family] | raw, family == "gemma3_text"
    numbers = {}
    for key, (default, low, high) in NUMBERS.items():
        numbers[key] = _number(raw, key, numbers.get(default, default), low, high)
    hidden, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    numbers["head_dim"] = _number(raw, "head_dim", max(1, hidden // heads), 1, 2**14)
    bias, scalar = bool(raw.get("attention_bias")), _number(raw, "query_pre_attn_scalar", 256.0, 1e-6, 2**24)
    config = ModelConfig(
        **numbers, **_layers(raw, family, numbers["num_hidden_layers"]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=bias or family == "qwen2", o_bias=bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias")), qk_norm=gemma or family == "qwen3", source=source)
    if gemma:
        config.gemma_norms, config.hidden_act = True, "gelu_pytorch_tanh"
        config.embedding_scale, config.attention_scale = hidden ** 0.5, scalar ** -0.5
    if heads % config.num_key_value_heads:
        keys = config.num_key_value_heads
        raise BadInput(f"config.json: {heads} query heads cannot share {keys} key-value heads evenly")
    if config.head_dim % 2:
        raise BadInput(f"config.json: head_dim {config.head_dim} is odd; rotary positions need an even one")
    return config


def _number(raw, key, default, low, high):
    value = default if raw.get(key) is None else raw[key]
    kinds = (int, float) if isinstance(default, float) else (int,)
    if type(value) not in kinds or not low <= value <= high:
        kind = "a whole number" if kinds == (int,) else "a number"
        raise BadInput(f"config.json: {key} is {value!r}; it must be {kind} from {low} to {high}")
    return value


def _layers(raw, family, count):
    """Rope and window of a ModelConfig: one for all layers, or `kinds` and the kind of each layer."""
    slides, turns = [True] * count, [1] * count
    ropes = dict.fromkeys(LAYERS, raw)
    if family == "smollm3":
        every = _number(raw, "no_rope_layer_interval", 4, 1, 2**24)
        turns = _list(raw, "no_rope_layers", (0, 1), [int(i % every > 0) for i in range(1, count + 1)])
        slides = [not turning for turning in turns]
    elif family == "gemma3_text":
        every = _number(raw, "sliding_window_pattern", 6, 1, 2**24)
        slides, ropes = [i % every > 0 for i in range(1, count + 1)], _gemma_ropes(raw)
    elif family != "mistral":
        first = _number(raw, "max_window_layers", 0, 0, 2**24)
        slides = [i >= first for i in range(count)]
    used = family in ("mistral", "gemma3_text") or family != "llama" and raw.get("use_sliding_window")
    window = _number(raw, "sliding_window", 0, 1, 2**24) if used and raw.get("sliding_window") else None
    default = [LAYERS[bool(sliding and (window or family == "gemma3_text"))] for sliding in slides]
    types = _list(raw, "layer_types", LAYERS, default)
    if LAYERS[1] in types and not window or family == "mistral" and types != default:
        raise BadInput("config.json: layer_types does not fit the sliding window that the other keys set, "
                       f"{window}; correct layer_types, sliding_window or use_sliding_window")
    kinds, names = {}, []
    for layer, turning in zip(types, turns):
        names.append(layer if turning else f"{layer} without rope")
        rope = _rope(ropes[layer]) if turning else NO_ROPE
        kinds[names[-1]] = rope | {"sliding_window": window if layer == LAYERS[1] else None}
    return kinds[names[0]] if len(kinds) == 1 else {"layer_types": names, "kinds": kinds}


def _list(raw, key, allowed, default):
    """The list under a key, which has an entry for each layer, or the default."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, list) or len(value) != len(default) or any(v not in allowed for v in value):
        raise BadInput(f"config.json: {key} is {str(value)[:80]}; it must list one of {allowed} a layer")
    return value


def _gemma_ropes(raw):
    """{kind of layer: what _rope reads}, as the two kinds have each a rope of their own."""
    both = raw.get("rope_parameters") or {}
    if not isinstance(both, dict) or both.keys() - set(LAYERS) or both and raw.get("rope_scaling"):
        raise BadInput(f"config.json: rope_parameters of gemma3_text must hold {' and '.join(LAYERS)} alone")
    local = {"rope_theta": raw.get("rope_local_base_freq", 10000.0), "rope_parameters": both.get(LAYERS[1])}
    return {LAYERS[0]: raw | {"rope_parameters": both.get(LAYERS[0])}, LAYERS[1]: local}


def _rope(raw):
    """rope_theta and scaling, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) has it."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise BadInput(f"config.json: rope_scaling is {str(scaling)[:80]}; it must be one object or null")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise BadInput(f"config.json: rope type {kind!r} is not implemented; {', '.join(ROPE_KEYS)} are")
    if (scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise BadInput("config.json: partial_rotary_factor other than 1 is not implemented")
    scaling = {"rope_theta": raw.get("rope_theta", 10000.0), "beta_fast": 32.0, "beta_slow": 1.0} | scaling
    values = {key: scaling.get(key) for key in ("rope_theta", *ROPE_KEYS[kind])}
    if kind == "yarn":
        values |= {key: scaling[key] for key in YARN_KEYS if scaling.get(key) is not None}
    for key, value in values.items():
        low = 1 if key == "rope_theta" else 1e-9
        if type(value) not in (int, float) or not low < value < 1e15:
            raise BadInput(f"config.json: {key} of the {kind} rope is {value!r}; it must be above {low}")
    if kind == "yarn":
        of, by = values.pop("mscale", None), values.pop("mscale_all_dim", None)
        log = 0.1 * math.log(max(values["factor"], 1))
        usual = (1 + of * log) / (1 + by * log) if of and by else 1 + log
        values = {"attention_factor": usual, "truncate": bool(scaling.get("truncate", True))} | values
    return {"rope_theta": values.pop("rope_theta"), "rope": {"rope_type": kind, **values}}


def config_to_dict(config, dtype):
    """config.json for a saved model: the source's with only the dtype changed, or a plain Llama one."""
    same = ("tie_word_embeddings", "mlp_bias", "head_dim", *NUMBERS)
    rope = {"rope_theta": config.rope_theta, **config.rope}
    raw = dict(config.source) or {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": config.qkv_bias, "rope_parameters": rope, "rope_theta": config.rope_theta,
        **{key: getattr(config, key) for key in same}}
    for key in [key for key in ("torch_dtype", "dtype") if raw.get(key)] or ["dtype"]:
        raw[key] = str(dtype).removeprefix("torch.")
    return raw
