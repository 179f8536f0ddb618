"""Hugging Face folders in and out, the hub, and files that are whole or not there.

Leaves out the decoder, which is model.py's, and tokenizers, which are dataset.py's.
"""

import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import LoRA, ModelConfig, Transformer, blank, plain_weights

SHARD_BYTES = 5 * 10**9



class BadInput(ValueError):
    """Something handed to us cannot be used; the message is one sentence that says what to do."""
FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}



def config_from_dict(raw):
    """Read a config.json, completely or not at all: what the decoder does not implement raises BadInput."""
    if not isinstance(raw, dict):
        raise BadInput("config.json does not hold a JSON object; is this a Hugging Face model folder?")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(f"config.json: model_type {family!r} is not implemented; use one of {', '.join(sorted(FAMILIES))}")

    def number(key, kind=int, default=None, low=1, high=2**24):
        value = raw.get(key)
        value = default if value is None else value
        good = (int,) if kind is int else (int, float)
        if type(value) not in good or not low <= value <= high:
            raise BadInput(f"config.json: {key} is {value!r}; it must be {'a whole number' if kind is int else 'a number'} "
                           f"from {low} to {high}")
        return value

    def flag(key, default=False):
        value = raw.get(key)
        if value not in (None, True, False):
            raise BadInput(f"config.json: {key} is {value!r}; it must be true or false")
        return default if value is None else value

    hidden, heads = number("hidden_size"), number("num_attention_heads", high=2**14)
    bias = flag("attention_bias")
    config = ModelConfig(
        vocab_size=number("vocab_size"), hidden_size=hidden, intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers", high=10_000), num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=max(1, hidden // heads), high=2**14),
        max_position_embeddings=number("max_position_embeddings", default=2048, high=2**31),
        rms_norm_eps=number("rms_norm_eps", float, 1e-6, low=0, high=1), **_rope(raw),
        tie_word_embeddings=flag("tie_word_embeddings"), qkv_bias=bias or family == "qwen2", o_bias=bias and family != "qwen2",
        mlp_bias=flag("mlp_bias"), qk_norm=family == "qwen3", source=raw)

    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
        raise BadInput(f"config.json: layer_types is {str(layers)[:80]}; it must be a list of names")
    layers = set(layers)
    if raw.get("sliding_window") and (family == "mistral" or raw.get("use_sliding_window")):
        if family != "mistral" and layers != {"sliding_attention"}:
            raise BadInput("config.json: a sliding window on some layers only is not implemented; "
                           "set use_sliding_window to false for texts shorter than the window")
        config.sliding_window = number("sliding_window")
    refusals = {
        f"hidden_act {raw.get('hidden_act')!r} is not implemented, only silu": raw.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor other than 1 is not implemented": (raw.get("partial_rotary_factor") or 1) != 1,
        "quantised weights cannot be trained; use the unquantised checkpoint": raw.get("quantization_config"),
        "mixture-of-experts models are not implemented": any(raw.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")),
        f"layer_types {sorted(layers)} are not implemented": layers - {"full_attention", "sliding_attention"},
        f"{heads} query heads cannot share {config.num_key_value_heads} key-value heads evenly": heads % config.num_key_value_heads,
        f"head_dim {config.head_dim} is odd; rotary positions need an even one": config.head_dim % 2,
        f"hidden_size {hidden} is not a multiple of {heads} heads, and head_dim is not given": hidden % heads and not raw.get("head_dim"),
    }
    for sentence, broken in refusals.items():
        if broken:
            raise BadInput(f"config.json: {sentence}")
    return config


def config_to_dict(config, dtype):
    """config.json for a saved model: the source's with only the dtype changed, or a plain Llama one."""
    raw = dict(config.source) or {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": config.qkv_bias,
        "rope_parameters": {"rope_theta": config.rope_theta, **config.rope}, "rope_theta": config.rope_theta,
        **{k: getattr(config, k) for k in ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
           "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings mlp_bias").split()}}
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
    return raw


def _rope(raw):
    """rope_theta and the scaling, from both dialects: transformers 4 (rope_theta, rope_scaling), 5 (rope_parameters)."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise BadInput(f"config.json: rope_scaling is {scaling!r}; it must be an object or null")
    theta = next((t for t in (scaling.get("rope_theta"), raw.get("rope_theta")) if t is not None), 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise BadInput(f"config.json: rope type {kind!r} is not implemented; default, linear and llama3 are")
    if (scaling.get("partial_rotary_factor") or 1) != 1:
        raise BadInput("config.json: partial_rotary_factor other than 1 is not implemented")
    values = {"rope_theta": theta, **{k: scaling.get(k) for k in ROPE_KEYS[kind]}}
    if kind == "llama3" and values["original_max_position_embeddings"] is None:
        values["original_max_position_embeddings"] = raw.get("original_max_position_embeddings")
    for key, value in values.items():
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise BadInput(f"config.json: {key} of the {kind} rope is {value!r}; it must be a positive number")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise BadInput("config.json: high_freq_factor of the llama3 rope must be larger than low_freq_factor")
    return {"rope_theta": values.pop("rope_theta"), "rope": {"rope_type": kind, **values}}



def read_config(folder):
    """config.json of a model folder as (ModelConfig)."""
    return config_from_dict(read_json(Path(folder) / "config.json", "model folder"))



def read_json(path, what="file"):
    """A JSON file, or BadInput with one sentence."""
    try:
        text = Path(path).read_text("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():                       # half a surrogate pair is JSON, but it is not text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; a {what} needs it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None



def weight_files(folder):
    """{tensor name: (file, shape, dtype)} from the safetensors headers of a model folder; reads no weights."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        where = {single: None}
    elif index.exists():
        table = read_json(index)
        table = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(table, dict) or not table:
            raise BadInput(f"{index}: no weight_map in it")
        where = {}
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise BadInput(f"{index}: {name} points to {file!r}, which is not a file name in this folder")
            where.setdefault(folder / file, set()).add(name)
    else:
        raise BadInput(f"{folder}: no model.safetensors; convert pickled weights to safetensors first")
    found = {}
    for path, expected in where.items():
        try:
            with safe_open(path, "pt") as f:
                names = set(f.keys())
                for name in names:
                    part = f.get_slice(name)
                    found[name] = (path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: not a sound safetensors file ({error})") from None
        if expected is not None and expected - names:
            raise BadInput(f"{path}: {sorted(expected - names)[0]} is missing, though the index says it is here")
    return {name: value for name, value in found.items() if not name.endswith("rotary_emb.inv_freq")}



def check_weights(folder, config):
    """Compare names and shapes in the files with what the config asks for; BadInput if they differ. Returns weight_files."""
    files = weight_files(folder)
    layers = {int(n.split(".")[2]) for n in files if n.startswith("model.layers.") and n.split(".")[2].isdigit()}
    if len(layers) != config.num_hidden_layers:          # before building anything of that size
        raise BadInput(f"{folder}: config.json says {config.num_hidden_layers} layers, the weights hold {len(layers)}")
    if config.source.get("model_type") in ("llama", "mistral"):     # the Qwen families' biases and norms are not optional
        has = lambda part: any(n.endswith(part) for n in files)
        stated = config.source.get("attention_bias")
        if stated is not None and stated != has("q_proj.bias"):
            raise BadInput(f"{folder}: config.json says attention_bias {stated}, the weights say {has('q_proj.bias')}")
        config.qkv_bias, config.o_bias = has("q_proj.bias"), has("o_proj.bias")
        if stated is None and config.qkv_bias and config.o_bias:     # transformers, and a run that is resumed, have only the config to go by
            config.source = config.source | {"attention_bias": True}
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    extra = set(files) - set(wanted) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for names, what in ((set(wanted) - set(files), "missing from the weights"), (extra, "in the weights but not in the model")):
        if names:
            raise BadInput(f"{folder}: {sorted(names)[0]} and {len(names) - 1} others are {what}" if len(names) > 1
                           else f"{folder}: {names.pop()} is {what}")
    for name, shape in wanted.items():
        if files[name][1] != shape:
            raise BadInput(f"{folder}: {name} has shape {files[name][1]}, the config asks for {shape}")
        if files[name][2] not in ("F32", "BF16", "F16", "F64"):
            raise BadInput(f"{folder}: {name} is stored as {files[name][2]}; float32, bfloat16 or float16 is needed")
    if extra := set(files) - set(wanted):                # a tied head that is stored as well
        head, embedding = (safe_open(files[n][0], "pt").get_tensor(n) for n in (*extra, "model.embed_tokens.weight"))
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise BadInput(f"{folder}: config.json ties lm_head to the embedding, but the file holds a different lm_head; set tie_word_embeddings to false")
    return files



def load_pretrained(folder, dtype=torch.float32, device="cpu"):
    """A Transformer from a Hugging Face folder (config.json, safetensors), strictly: BadInput before any weight is read.

    Tensor by tensor, so that memory holds one copy of the model and one tensor more.
    """
    config = read_config(folder)
    return blank(config, dtype, device, read_weights(folder, check_weights(folder, config)))



def read_weights(folder, files=None):
    """(name, tensor as stored) of each weight in a folder, one at a time."""
    files = files or check_weights(folder, read_config(folder))
    for path in sorted({path for path, *_ in files.values()}):
        with safe_open(path, "pt") as f:
            for name in [n for n in f.keys() if n in files]:
                yield name, f.get_tensor(name)



def saved_dtype(folder):
    """The dtype most weights of a folder are stored in."""
    kinds = [dtype for _, _, dtype in weight_files(folder).values()]
    return {"F32": torch.float32, "F16": torch.float16, "F64": torch.float32}.get(max(kinds, key=kinds.count), torch.bfloat16)



def companions(folder):
    """{name: bytes} of what stands beside the weights of a model folder: tokenizer, templates, licence. No config.json."""
    keep = lambda p: p.is_file() and p.name != "config.json" and not p.name.startswith(".") and not p.name.endswith(".index.json") \
        and p.suffix in ("", ".json", ".jinja", ".txt", ".model", ".md") and p.stat().st_size < 2**28
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if keep(p)}



def save_pretrained(model, folder, dtype=torch.bfloat16, files=None, weights=None):
    """Write a Hugging Face folder: weights as `dtype` in shards under 5 GB, config.json, and `files`, {name: bytes}, as
    `companions` read them. Written beside, then renamed, so the folder is whole or not there.

    weights: {name: tensor} of plain_weights(model), where they were gathered already.
    """
    weights = dict(weights or plain_weights(model))
    shards, size = [[]], 0
    for name, tensor in weights.items():
        size += tensor.numel() * dtype.itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.numel() * dtype.itemsize
        shards[-1].append(name)
    weight_map = {}
    with new_folder(folder) as temporary:
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            part = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
            save_file(part, temporary / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(w.numel() for w in weights.values()) * dtype.itemsize
            write_json(temporary / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(temporary / "config.json", config_to_dict(model.config, dtype))
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)



def save_adapter(model, folder, base):
    """Write the LoRA factors as a folder that `peft` loads onto `base`, a folder or hub name."""
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    factors = {f"base_model.model.{name}.{leaf}.weight": getattr(m, leaf).detach().float().cpu().contiguous()
               for name, m in adapters.items() for leaf in ("lora_A", "lora_B")}
    rank, scale = next((m.lora_A.shape[0], m.scale) for m in adapters.values())
    with new_folder(folder) as temporary:
        save_file(factors, temporary / "adapter_model.safetensors", {"format": "pt"})
        write_json(temporary / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": scale * rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in adapters}), "lora_dropout": 0.0, "bias": "none", "inference_mode": True})



@contextmanager
def new_folder(folder):
    """A temporary folder to write into, which gets the name `folder` at the end, once the disk holds it: whole or not there.

    What had that name is moved aside just before, and deleted after. What fails on the way is deleted: a full disk needs the room.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise



def flush(path):
    """Have the disk hold what was written (a folder too, where the system allows it)."""
    with suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)      # Windows flushes only what it may write
        try:
            os.fsync(handle)
        finally:
            os.close(handle)



def write_json(path, value):
    """Pretty JSON, through a temporary name."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)



def json_or_nothing(content, name):
    """An object from JSON bytes; of a broken file nothing, and a warning."""
    try:
        value = json.loads(content) if content else {}
        json.dumps(value, ensure_ascii=False).encode()   # half a surrogate pair is JSON, but it is not text
        return value if isinstance(value, dict) else {}
    except (ValueError, RecursionError):
        print(f"warning: {name} is not valid JSON and is ignored", file=sys.stderr)
        return {}



def find_model(name, world):
    """(folder, commit or None) of --model: a local folder, else a hub name[@revision], fetched by each node's first process."""
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    repo, _, revision = name.partition("@")
    patterns = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
                "*.jinja", "LICENSE*"]                   # not every *.safetensors: Mistral's come twice

    def fetch():
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
        except HFValidationError:
            raise BadInput(f"--model {name}: no such folder, and not a hub name either") from None
        except GatedRepoError:
            raise BadInput(f"--model {name}: the repository is gated; accept its terms on the hub, then run: hf auth login") from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise BadInput(f"--model {name}: no such folder, and the hub knows no such repository or revision") from None
        except Exception as error:                       # offline, timed out, proxy: the hub's client raises many kinds
            raise BadInput(f"--model {name}: no such folder, and the hub cannot be reached ({type(error).__name__}); "
                           "download the repository elsewhere and give its folder") from None

    world.together(lambda: world.local == 0 and fetch())
    folder = world.together(fetch)
    return folder, folder.name



def refuse_links(folder):
    """A model folder is read, and partly copied into the run's, so its files must be its own, or blobs of the hub's cache."""
    home = folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir() and not any(path.resolve().is_relative_to(p) for p in (home, home.parent.parent / "blobs")):
            raise BadInput(f"{path}: a link out of the model folder; put the file itself there")
