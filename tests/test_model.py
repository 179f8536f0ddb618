"""The decoder: transformers' logits from transformers' folders, one-sentence refusals, and generation that a slow loop repeats."""

import contextlib
import errno
import json
import math
import os
import pickle
import shutil
import stat
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as code
from buffer import Pair, collate
from conftest import GEMMA, KINDS, NUMBERS, ROOT, THETA, fits, oracle, random_texts, small_hf_model, small_model
from fuzz import memory_limit
from losses import preference_loss, score, scored_tokens
from machine import folders
from machine.files import BadInput, new_folder
from machine.config import FAMILIES as READ
from machine.config import NO_ROPE
from machine.config import config_from_dict
from machine.folders import companions, load_pretrained, save_pretrained
from model import KVCache, ModelConfig, RMSNorm, Transformer, generate, sample, twin
from sapo import SAPOConfig

LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}        # of these five waves one is left alone, one blended, three slowed
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 5.0, "original_max_position_embeddings": 64, "beta_fast": 9.0, "beta_slow": 1.5}
GEMMA3 = dict(rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 61.0}}, num_hidden_layers=4,
              layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"], sliding_window=7, query_pre_attn_scalar=23)
SMOLLM3 = dict(num_hidden_layers=4, pad_token_id=0)      # the usual padding token lies beyond this vocabulary


def load_theirs(folder, **more):
    return oracle("transformers").AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **({"dtype": torch.float32} | more)).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, length=90, vocab=NUMBERS["vocab_size"]):
    ids = torch.tensor(random_texts([length, length], vocab))
    expected = theirs(ids).logits
    assert expected.std() > 0.5, "logits near 0 agree with anything"
    assert (ours(ids) - expected).abs().max() < 1e-4


# ---------------------------------------------------------------- the logits are transformers'

FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, a key-value head for each query head": ("llama", dict(num_key_value_heads=6)),
    "llama, one key-value head": ("llama", dict(num_key_value_heads=1)),
    "llama, head_dim null": ("llama", dict(head_dim=None)),
    "llama, attention bias": ("llama", dict(attention_bias=True)),
    "llama, mlp bias": ("llama", dict(mlp_bias=True)),
    "llama, linear rope beyond its length": ("llama", dict(rope_parameters=LINEAR, max_position_embeddings=16)),
    "llama, llama3 rope beyond its length": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=64)),
    "llama, llama3 rope beyond its length, tied": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=64, tie_word_embeddings=True)),
    "llama, yarn rope": ("llama", dict(rope_parameters=YARN)),
    "llama, yarn rope, not truncated, two mscales": ("llama", dict(rope_parameters=YARN | dict(truncate=False, mscale=1.3, mscale_all_dim=0.6))),
    "qwen3, yarn rope, attention_factor": ("qwen3", dict(rope_parameters=YARN | dict(attention_factor=0.7))),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "mistral, no window, head_dim null": ("mistral", dict(sliding_window=None, head_dim=None)),
    "mistral, beyond its window": ("mistral", dict(sliding_window=5)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, yarn rope": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2, beyond its window": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=0)),
    "qwen2, beyond the window of its second layer": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3, tied, attention bias": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "qwen3, beyond the window of its first layer": ("qwen3", dict(use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention", "full_attention"])),
    "smollm3": ("smollm3", SMOLLM3 | dict(tie_word_embeddings=True, no_rope_layer_interval=3)),
    "smollm3, its own head, biases, a window where there is no rope": ("smollm3", SMOLLM3 | dict(
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=6)),
    "gemma3_text": ("gemma3_text", GEMMA3 | dict(tie_word_embeddings=True)),
    "gemma3_text, its own head, attention bias": ("gemma3_text", GEMMA3 | dict(tie_word_embeddings=False, attention_bias=True)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_the_logits_are_those_of_transformers(tmp_path, case):
    family, numbers = FAMILIES[case]
    theirs = small_hf_model(family, **numbers)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_pretrained(tmp_path), theirs)


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_in_float64_the_logits_are_those_of_transformers_to_ten_digits(tmp_path, monkeypatch, case):
    """With its casts to float32 turned off: what is left of the difference above is rounding, and nothing else."""
    family, numbers = FAMILIES[case]
    theirs = small_hf_model(family, **numbers)
    theirs.save_pretrained(tmp_path)
    ours, theirs, ids = load_pretrained(tmp_path).double(), theirs.double(), torch.tensor(random_texts([90, 90]))
    if family == "gemma3_text":
        theirs.model.embed_tokens.embed_scale = torch.tensor(ours.config.embedding_scale, dtype=torch.float64)
    real_float, real_to, real_softmax = torch.Tensor.float, torch.Tensor.to, F.softmax
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype is torch.float64 else real_float(t))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to, **how: t if to[:1] == (torch.float32,) and t.dtype is torch.float64 else real_to(t, *to, **how))
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None: real_softmax(x, dim))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-10


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": THETA}, LINEAR, LLAMA3, YARN], ids=["default", "linear", "llama3", "yarn"])
def test_a_config_of_transformers_4_gives_the_same_logits(tmp_path, rope, key):
    theirs = small_hf_model(rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, **transformers_4(read(tmp_path), key))
    assert_same_logits(load_pretrained(tmp_path), theirs)
    assert_same_logits(load_pretrained(tmp_path), load_theirs(tmp_path))     # who reads the old dialect the same way


def test_gemmas_config_of_transformers_4_gives_the_same_logits(tmp_path):
    """Two keys for two thetas, a scaling that is for full attention alone, and a pattern in place of a list."""
    theirs = small_hf_model("gemma3_text", **GEMMA3)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, **transformers_4(read(tmp_path), "rope_type") | {"layer_types": None, "sliding_window_pattern": 3, "tie_word_embeddings": None})
    assert read(tmp_path)["rope_local_base_freq"] == 61.0 and read(tmp_path)["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert_same_logits(load_pretrained(tmp_path), theirs)
    assert_same_logits(load_pretrained(tmp_path), load_theirs(tmp_path))


def transformers_4(config, key):
    """What to change in a config.json of transformers 5 to make it one of transformers 4; None removes a key."""
    both = config["rope_parameters"]
    if "full_attention" in both:                         # Gemma's; there transformers overlooks a scaling whose kind is called "type"
        local = {"rope_local_base_freq": both["sliding_attention"]["rope_theta"]}
        return transformers_4({"rope_parameters": both["full_attention"]}, "rope_type") | local
    rope = dict(both)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {key: kind, **rope}
    return {"rope_parameters": None, "dtype": None, "rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}


@pytest.mark.parametrize("raw", [
    {"rope_theta": 7e4},
    {"rope_theta": 7e4, "rope_scaling": None},
    {"rope_theta": 7e4, "rope_parameters": {"rope_type": "default", "rope_theta": 9e5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 9e5}, "rope_scaling": {}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 9e5}, "rope_scaling": {"type": "linear", "factor": 2.5}},
    {"rope_theta": 7e4, "rope_parameters": {"rope_type": "default", "rope_theta": 9e5}, "rope_scaling": {"rope_type": "linear", "factor": 4.5}},
    {},
])
def test_rope_numbers_are_read_as_transformers_reads_them(raw):
    """Reading only one dialect gives theta 10000 without a word."""
    theirs = oracle("transformers").LlamaConfig.from_dict(NUMBERS | raw).rope_parameters
    theirs.pop("type", None)                             # the old name of rope_type, which stands beside it then
    ours = config_from_dict({"model_type": "llama"} | NUMBERS | raw)
    assert {"rope_theta": ours.rope_theta, **ours.rope} == theirs


def seen_by_layers(config):
    """[(theta, rope, window) of each layer] of our ModelConfig; theta None is no rope."""
    kinds = {kind: {"rope_theta": config.rope_theta, "rope": config.rope, "sliding_window": config.sliding_window} | own for kind, own in config.kinds.items()}
    layers = [kinds[kind] for kind in config.layer_types or ["all"] * config.num_hidden_layers]
    return [(None if c["rope"].get("factor") == math.inf else c["rope_theta"], c["rope"]["rope_type"], c["sliding_window"]) for c in layers]


@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True}, {"use_sliding_window": True, "sliding_window": 512},
                                  {"use_sliding_window": True, "sliding_window": None}], ids=["nothing", "window", "window of 512", "null"])
@pytest.mark.parametrize("family", READ)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(family, more):
    if family == "gemma3_text" and more.get("sliding_window", 0) is None:
        more = {"sliding_window": 512, "sliding_window_pattern": 2, "rope_theta": 7e4, "rope_local_base_freq": 5e3}   # null would be refused
    raw = {"model_type": family, "vocab_size": 61, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 30, "num_attention_heads": 6,
           "num_key_value_heads": 2} | more
    theirs, ours = oracle("transformers").AutoConfig.for_model(**raw), config_from_dict(raw)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings and ours.source == raw
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if family == "mistral" and theirs.sliding_window else "full_attention"] * 30
    turns = getattr(theirs, "no_rope_layers", [1] * 30)
    thetas = [theirs.rope_parameters.get(kind, theirs.rope_parameters)["rope_theta"] for kind in kinds]
    assert seen_by_layers(ours) == [(theta if turn else None, "default" if turn else "linear", theirs.sliding_window if kind == "sliding_attention" else None)
                                    for theta, turn, kind in zip(thetas, turns, kinds)]


@pytest.mark.parametrize("more", [{}, {"beta_fast": 9.0, "beta_slow": 1.5}, {"truncate": False}, {"truncate": None}, {"attention_factor": 0.6}, {"factor": 1.0},
                                  {"mscale": 1.3}, {"mscale": 1.3, "mscale_all_dim": 0.6}, {"rope_theta": 1e6, "original_max_position_embeddings": 32768},
                                  {"original_max_position_embeddings": 3}, {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
                                  {"rope_theta": 5.0, "original_max_position_embeddings": 32768}], ids=str)
def test_yarns_waves_are_those_of_transformers(more):
    raw = NUMBERS | {"model_type": "llama", "head_dim": 32, "rope_scaling": {"rope_theta": THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | more}
    theirs = oracle("transformers").LlamaConfig.from_dict(raw)
    waves, gain = oracle("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS["yarn"](theirs)
    ours = code.View(config_from_dict(raw))
    assert torch.allclose(ours.inv_freq, waves, rtol=1e-6, atol=0) and ours.gain == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize("change", [{"rope_theta": 10_000.0}, {"rms_norm_eps": 1e-6}, {"sliding_window": 5}, {"qk_norm": True},
                                    {"hidden_act": "gelu_pytorch_tanh"}, {"embedding_scale": 24 ** 0.5}, {"attention_scale": 23 ** -0.5}, {"gemma_norms": True}, KINDS,
                                    {"rope": {k: v for k, v in LINEAR.items() if k != "rope_theta"}},
                                    {"rope": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}], ids=lambda c: next(iter(c)))
def test_the_small_models_notice_each_number(change):
    """Else the comparisons above prove nothing."""
    right, wrong, ids = small_model(), small_model(), torch.tensor(random_texts([90]))
    wrong = Transformer(ModelConfig(**(NUMBERS | {"rope_theta": THETA} | change))).double()
    wrong.load_state_dict(right.state_dict(), strict=False)
    assert (right(ids) - wrong(ids)).abs().max() > 0.1


def test_the_logits_of_stories260k_are_those_of_transformers(shared):
    folder = shared / "models/stories260K"
    assert_same_logits(load_pretrained(folder), load_theirs(folder), length=400, vocab=512)


@pytest.mark.slow
def test_the_logits_of_smollm2_are_those_of_transformers():
    if not os.environ.get("SMOLLM2"):
        pytest.skip("SMOLLM2 does not say where SmolLM2 is")
    ours, theirs = load_pretrained(os.environ["SMOLLM2"]), load_theirs(os.environ["SMOLLM2"])
    assert_same_logits(ours, theirs, length=100, vocab=ours.config.vocab_size)


def test_one_token_alone_has_logits():
    model, ids = small_model(), torch.tensor([[7, 8, 9]])
    assert torch.allclose(model(ids[:, :1])[:, 0], model(ids)[:, 0], atol=1e-12)


def test_a_head_is_given_the_hidden_states_and_the_heads_weight():
    model, ids = small_model(), torch.tensor(random_texts([9]))
    assert torch.equal(model(ids, head=F.linear), model(ids))


def test_what_stands_after_a_token_does_not_reach_it():
    """So padding on the right needs no mask."""
    model, (text,) = small_model(), random_texts([9])
    assert torch.allclose(model(torch.tensor([text + [0] * 5]))[:, :9], model(torch.tensor([text])), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rmsnorm_is_that_of_transformers_to_the_bit(dtype):
    oracle("transformers")
    theirs = oracle("transformers.models.llama.modeling_llama").LlamaRMSNorm(24, 3e-3).to(dtype)
    ours, x = RMSNorm(ModelConfig(**NUMBERS), 24).to(dtype), 20 * torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.3, 1.7, 24))
        theirs.weight.copy_(ours.weight)
    assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemmas_norm_and_embedding_are_those_of_transformers_to_the_bit(dtype):
    oracle("transformers")
    gemma, generator = oracle("transformers.models.gemma3.modeling_gemma3"), torch.Generator().manual_seed(1)
    theirs, ours = gemma.Gemma3RMSNorm(24, 3e-3).to(dtype), RMSNorm(ModelConfig(**NUMBERS, gemma_norms=True), 24).to(dtype)
    assert torch.equal(ours.weight, theirs.weight), "which count from 1, hence begin at 0"
    x = 20 * torch.randn(7, 24, generator=generator)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(-0.7, 0.7, 24))
        theirs.weight.copy_(ours.weight)
    assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))
    model, ids, seen = small_model(dtype=dtype, **GEMMA), torch.tensor(random_texts([30])), []
    model.model.layers[0].register_forward_pre_hook(lambda block, given: seen.append(given[0]))
    model(ids)
    embedding = gemma.Gemma3TextScaledWordEmbedding(61, 24, None, embed_scale=24 ** 0.5).to(dtype)
    embedding.load_state_dict(model.model.embed_tokens.state_dict())
    assert torch.equal(seen[0], embedding(ids))


def test_rotary_frequencies_stay_float32_when_the_model_is_cast():
    assert torch.equal(small_model().bfloat16().views["all"].inv_freq, small_model().views["all"].inv_freq)


@pytest.mark.parametrize("changes", [dict(sliding_window=6), KINDS, GEMMA], ids=["a window", "two kinds of layers", "Gemma"])
def test_gradient_checkpointing_gives_the_same_gradients_and_runs_blocks_twice(changes):
    cfg, calls = SAPOConfig(loss="orpo", lam=0.3), []
    batch, model = collate(some_pairs(), **scored_tokens(cfg)), small_model(**changes)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(model.gradient_checkpointing))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        preference_loss(model, batch, cfg)[0].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert calls == [False, True, True] and all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*gradients))


def test_fresh_weights_come_from_the_generator_and_keep_the_size_of_what_they_multiply():
    """One over the root of a matrix's columns, and less where two layers write twice each to the residual stream."""
    fresh = lambda seed: Transformer(small_model().config).init_weights(torch.Generator().manual_seed(seed)).state_dict()
    weights = fresh(3)
    assert all(torch.equal(w, fresh(3)[name]) for name, w in weights.items())
    assert not torch.equal(weights["lm_head.weight"], fresh(4)["lm_head.weight"])
    assert weights["model.layers.1.self_attn.q_proj.weight"].std() == pytest.approx(24 ** -0.5, rel=0.1)
    assert weights["model.layers.1.self_attn.o_proj.weight"].std() == pytest.approx((60 * 4) ** -0.5, rel=0.1)


# ---------------------------------------------------------------- folders out and in

@pytest.mark.parametrize("case", FAMILIES)
def test_a_saved_model_is_the_same_model_to_transformers(tmp_path, case):
    family, numbers = FAMILIES[case]
    before = small_hf_model(family, **numbers)
    before.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", torch.float32)
    after = load_theirs(tmp_path / "ours").state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.state_dict().items())
    assert read(tmp_path / "ours") == read(tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.parametrize("name, dialect, shards, dtype", [("Llama 3.2", 4, True, torch.bfloat16), ("Mistral v0.1", 4, False, torch.float16), ("Qwen2", 5, True, torch.float16),
                                                          ("Qwen3, tied", 4, True, torch.float32), ("Mistral Nemo", 5, False, torch.bfloat16)])
def test_a_family_is_itself_in_either_dialect_in_shards_and_in_each_dtype(tmp_path, name, dialect, shards, dtype):
    import families                                      # it imports this file
    assert max(families.differences(name, dialect, shards, dtype, tmp_path)) < families.BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3.1", "Qwen3, tied"])
def test_sapo_runs_on_a_family_and_its_models_load_in_transformers(tmp_path, monkeypatch, name):
    import families
    monkeypatch.delenv("SAPO_TOKENIZERS", raising=False)
    which, losses, difference = families.three_steps(name, tmp_path)
    assert which == "tiny" and len(losses) == 3 and difference < families.BOUND
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[2] < losses[0] - 1e-3


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(rope={k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
                                     dict(qkv_bias=True, o_bias=True, mlp_bias=True)], ids=["plain", "tied", "llama3", "biases"])
def test_a_model_built_by_hand_saves_as_a_llama(tmp_path, changes):
    model = small_model(dtype=torch.float32, **changes)
    save_pretrained(model, tmp_path / "out", torch.float32)
    assert_same_logits(model, load_theirs(tmp_path / "out"))
    assert_same_logits(load_pretrained(tmp_path / "out"), load_theirs(tmp_path / "out"))


def test_a_model_in_shards_loads_here_and_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 9000)
    model = small_model(dtype=torch.float32)
    save_pretrained(model, tmp_path / "out", torch.float32)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "out/model.safetensors").exists()
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 9000 or len(load_file(f)) == 1 for f in files)
    assert_same_logits(load_pretrained(tmp_path / "out"), load_theirs(tmp_path / "out"))
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in load_pretrained(tmp_path / "out").state_dict().items())


def test_the_shards_of_transformers_load_here(tmp_path):
    theirs = small_hf_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load_pretrained(tmp_path), theirs)


def stored(folder):
    """The dtypes of the tensors in a folder."""
    return {tensor.dtype for path in folder.glob("*.safetensors") for tensor in load_file(path).values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_load_as_float32(tmp_path, dtype):
    small_hf_model().to(dtype).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert stored(tmp_path) == {dtype} and {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, load_theirs(tmp_path))


def test_a_model_loads_in_the_dtype_asked_for(tmp_path):
    save_pretrained(small_model(), tmp_path / "out", torch.float32)
    assert {p.dtype for p in load_pretrained(tmp_path / "out", torch.bfloat16).parameters()} == {torch.bfloat16}


def test_everything_loaded_trains(tmp_path):
    save_pretrained(small_model(tie_word_embeddings=True), tmp_path / "out", torch.float32)
    model = load_pretrained(tmp_path / "out")
    model(torch.tensor(random_texts([8]))).logsumexp(-1).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_bfloat16_is_what_is_written_unless_told_otherwise(tmp_path):
    save_pretrained(small_model(), tmp_path / "out")
    assert stored(tmp_path / "out") == {torch.bfloat16} and read(tmp_path / "out")["dtype"] == "bfloat16"


def test_only_the_dtype_changes_in_config_json(tmp_path):
    base = good_folder(tmp_path / "in", use_cache=True, some_future_key=[1, {"a": None}], torch_dtype="float16", dtype=None)
    save_pretrained(load_pretrained(base), tmp_path / "out", torch.bfloat16)
    assert read(tmp_path / "out") == read(base) | {"torch_dtype": "bfloat16"}
    both = good_folder(tmp_path / "both", torch_dtype="float16", dtype="float16")
    save_pretrained(load_pretrained(both), tmp_path / "out", torch.bfloat16)
    assert read(tmp_path / "out") == read(both) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_saved_weights_say_their_format(tmp_path):
    """transformers refuses a file whose metadata lacks it."""
    with safe_open(good_folder(tmp_path / "in") / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_other_files_are_copied_byte_for_byte_and_weights_are_not(tmp_path):
    base = good_folder(tmp_path / "in")
    wanted = {"generation_config.json": b"{not json, \xff", "tokenizer.json": b"{ }\r\n", "chat_template.jinja": b"{{ x }}\n\n", "LICENSE": b"free"}
    unwanted = {"pytorch_model.bin": b"1", "model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b"2", "optimizer.pt": b"3"}
    for name, content in (wanted | unwanted).items():
        (base / name).write_bytes(content)
    save_pretrained(load_pretrained(base), tmp_path / "out", files=companions(base))
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*wanted, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in wanted.items())


def test_a_save_that_fails_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    base = good_folder(tmp_path / "model")
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    monkeypatch.setattr(folders, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(small_model(seed=9), base)
    assert {f.name: f.read_bytes() for f in base.iterdir()} == before


@pytest.mark.parametrize("number, fine", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_is_good_enough_and_a_failing_disk_is_not(tmp_path, monkeypatch, number, fine):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if fine else pytest.raises(OSError):
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("x", "utf-8")
    assert (tmp_path / "new" / "file").exists() == fine


def test_a_parent_that_is_a_link_to_nowhere_is_not_taken_for_another_process(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        with new_folder(tmp_path / "link" / "new", replace=False):
            pass


def test_saving_again_replaces_the_folder_whole(tmp_path):
    base = good_folder(tmp_path / "model")
    (base / "stale.txt").write_text("old")
    save_pretrained(small_model(seed=9, dtype=torch.float32), base, torch.float32)
    assert {f.name for f in base.iterdir()} == {"config.json", "model.safetensors"} and list(tmp_path.iterdir()) == [base]
    assert torch.equal(load_pretrained(base).lm_head.weight, small_model(seed=9, dtype=torch.float32).lm_head.weight)


def test_a_folder_may_be_saved_onto_itself(tmp_path):
    base = good_folder(tmp_path / "model")
    (base / "tokenizer.json").write_text("{}")
    save_pretrained(load_pretrained(base), base, torch.float32, files=companions(base))
    assert (base / "tokenizer.json").read_text() == "{}" and load_pretrained(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_a_tied_head_that_is_stored_as_well_loads_wherever_it_lies(tmp_path, first, dtype):
    base = good_folder(tmp_path, tied=True)
    in_two_files(base, {"lm_head.weight": load_file(base / "model.safetensors")["model.embed_tokens.weight"]}, first)
    model = load_pretrained(base, dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def in_two_files(base, more, first):
    """Turn a folder into one with an index, `more` tensors in a file of their own, named first or last in the index."""
    (base / "model.safetensors").rename(base / "b.safetensors")
    save_file(more, base / "a.safetensors", {"format": "pt"})
    a, b = dict.fromkeys(more, "a.safetensors"), dict.fromkeys(load_file(base / "b.safetensors"), "b.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": a | b if first else b | a}))


def test_stored_rotary_frequencies_are_ignored(tmp_path):
    base = good_folder(tmp_path)
    before = load_pretrained(base)
    change_weights(lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(5)}))(base)
    ids = torch.tensor(random_texts([9]))
    assert torch.equal(load_pretrained(base)(ids), before(ids))


# ---------------------------------------------------------------- what is refused, and in how many words

def read(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    """Change keys of config.json; None removes a key, unless it stands there as a default."""
    config = {k: v for k, v in (read(folder) | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def good_folder(folder, tied=False, **changes):
    save_pretrained(small_model(tie_word_embeddings=tied), folder / "x", torch.float32)      # saved inside, as folder may exist
    for file in (folder / "x").iterdir():
        file.rename(folder / file.name)
    (folder / "x").rmdir()
    edit(folder, **changes)
    return folder


def config(**changes):
    return lambda folder: edit(folder, **changes)


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return damage


def bytes_of(change, file="model.safetensors"):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def index(table, whole=False):
    """An index in place of the one file, with the entries `table` in its map; or, if whole, `table` is all that it says."""
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        names = dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
        value = table if whole else {"weight_map": names | table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    return damage


def with_null(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(read(folder) | changes))


SLIDING = ["full_attention", "sliding_attention"]


def rope(**numbers):
    return config(rope_parameters={"rope_theta": THETA} | numbers)


def layer(name):
    return f"model.layers.1.{name}.weight"


REFUSED = {     # what is wrong: (how to make it so, a word that the sentence must say)
    "an unknown family": (config(model_type="gpt2"), "gpt2"),
    "no family": (config(model_type=None), "model_type"),
    "a family that is a list": (config(model_type=["llama"]), "model_type"),
    "rope longrope": (rope(rope_type="longrope", factor=4.0), "longrope"),
    "rope longrope, old dialect": (config(rope_scaling={"type": "longrope", "factor": 4.0}), "longrope"),
    "yarn rope without its length": (rope(rope_type="yarn", factor=4.0), "original_max_position_embeddings of the yarn rope"),
    "yarn rope with an attention_factor as text": (rope(**YARN | {"attention_factor": "0.7"}), "attention_factor of the yarn rope"),
    "yarn rope with an mscale below 0": (rope(**YARN | {"mscale": -1.0}), "mscale of the yarn rope"),
    "yarn rope with a beta of next to nothing": (rope(**YARN | {"beta_slow": 5e-324}), "beta_slow of the yarn rope"),
    "a rope for each kind of layer, but one kind": (rope(full_attention=YARN, sliding_attention=YARN), "one object"),
    "theta of 1": (rope(rope_theta=1), "rope_theta of the default rope is 1; it must be above 1"),
    "rope dynamic": (config(rope_scaling={"type": "dynamic", "factor": 4.0}), "dynamic"),
    "a rope type that is a list": (config(rope_scaling={"type": ["linear"]}), "rope type"),
    "rope that is a string": (config(rope_scaling="linear"), "rope_scaling"),
    "linear rope without a factor": (rope(rope_type="linear"), "factor"),
    "llama3 rope without its length": (rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), "original_max_position_embeddings"),
    "theta of 0": (rope(rope_theta=0), "rope_theta"),
    "theta below 0": (rope(rope_theta=-1.0), "rope_theta"),
    "theta infinite": (rope(rope_theta=float("inf")), "rope_theta"),
    "theta as text": (rope(rope_theta="1e6"), "rope_theta"),
    "rotary positions on a part of the head": (config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "partial rotary inside rope_parameters": (rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "gelu": (config(hidden_act="gelu"), "gelu"),
    "quantised weights": (config(quantization_config={"quant_method": "awq"}), "quantised"),
    "a mixture of experts": (config(num_local_experts=8), "experts"),
    "a mixture of experts, qwen's key": (config(num_experts=8), "experts"),
    "an odd head_dim": (config(head_dim=9), "head_dim"),
    "heads that do not share evenly": (config(num_key_value_heads=4), "key-value heads"),
    "hidden_size not a multiple of the heads": (config(hidden_size=25, head_dim=None), "has shape"),
    "Gemma 3 with images": (config(model_type="gemma3"), "gemma3_text does not"),
    "scores with a soft cap": (config(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
    "logits with a soft cap": (config(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
    "attention in both directions": (config(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "another activation than Gemma's": (config(hidden_activation="gelu"), "hidden_activation 'gelu'"),
    "Gemma with one rope": (config(model_type="gemma3_text", rope_parameters=LINEAR), "full_attention and sliding_attention"),
    "Gemma with ropes in both dialects": (config(model_type="gemma3_text", rope_parameters=GEMMA3["rope_parameters"], rope_scaling=LINEAR), "rope_parameters"),
    "Gemma with ropes that are a list": (config(model_type="gemma3_text", rope_parameters=[LINEAR]), "rope_parameters"),
    "Gemma with a scale of 0": (config(model_type="gemma3_text", query_pre_attn_scalar=0), "query_pre_attn_scalar"),
    "Gemma with a pattern of 0": (config(model_type="gemma3_text", sliding_window_pattern=0), "sliding_window_pattern"),
    "Gemma without a window": (with_null(model_type="gemma3_text", rope_parameters={}, sliding_window=None), "layer_types"),
    "Gemma without its norms": (config(model_type="gemma3_text", rope_parameters={}, tie_word_embeddings=False), "feedforward_layernorm"),
    "sliding layers, but no window, llama": (config(layer_types=SLIDING), "layer_types"),
    "sliding layers, but no window, qwen2": (config(model_type="qwen2", layer_types=SLIDING, sliding_window=8), "layer_types"),
    "sliding layers, but no window, qwen3": (config(model_type="qwen3", layer_types=SLIDING, sliding_window=8, use_sliding_window=False), "layer_types"),
    "sliding layers, but no window, smollm3": (config(model_type="smollm3", layer_types=SLIDING, sliding_window=8), "layer_types"),
    "sliding layers, but no window, mistral": (with_null(model_type="mistral", layer_types=SLIDING, sliding_window=None), "layer_types"),
    "a window on some layers of mistral": (config(model_type="mistral", layer_types=SLIDING, sliding_window=8), "layer_types"),
    "fewer layer_types than layers": (config(layer_types=["full_attention"]), "layer_types"),
    "a window on so many layers": (config(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=-1), "max_window_layers"),
    "no rope on fewer layers than there are": (config(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers"),
    "no rope as numbers of layers": (config(model_type="smollm3", no_rope_layers=[0, 3]), "no_rope_layers"),
    "no rope on every 0th layer": (config(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval"),
    "unknown layers": (config(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
    "layer_types that is a number": (config(layer_types=3), "layer_types"),
    "layer_types that is nested": (config(layer_types=[["full_attention"]]), "layer_types"),
    "a size as text": (config(hidden_size="24"), "hidden_size"),
    "a size that is true": (config(vocab_size=True), "vocab_size"),
    "a size of 0": (config(num_attention_heads=0), "num_attention_heads"),
    "a size below 0": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "a size with a fraction": (config(intermediate_size=28.5), "intermediate_size"),
    "a size that is missing": (config(vocab_size=None), "vocab_size"),
    "eps that is not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "hidden_size 10^9": (config(hidden_size=10**9), "0000000"),
    "hidden_size 10^9, head_dim from it": (config(hidden_size=12 * 10**8, head_dim=None), "0000000"),
    "head_dim 10^9": (config(head_dim=10**9), "0000000"),
    "hidden_size 2^31": (config(hidden_size=2**31), "2147483648"),
    "everything 2^31": (config(hidden_size=2**31, intermediate_size=2**31, num_attention_heads=2**31, num_key_value_heads=2**31, head_dim=2**31), "2147483648"),
    "a number of 400 digits": (config(intermediate_size=10**400), "intermediate_size"),
    "layers 10^9": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "vocabulary 10^9": (config(vocab_size=10**9), "vocab_size"),
    "more layers than there are": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight and 8 others are missing"),
    "fewer layers than there are": (config(num_hidden_layers=1), "model.layers.1.input_layernorm.weight and 8 others are in the weights"),
    "the wrong number of heads": (config(num_attention_heads=4), "q_proj"),
    "the wrong vocabulary": (config(vocab_size=62), "embed_tokens"),
    "biases that the config denies": (change_weights(lambda w: w.update({f"model.layers.{i}.self_attn.{p}_proj.bias": torch.zeros(n)
                                      for i in (0, 1) for p, n in (("q", 60), ("k", 20), ("v", 20), ("o", 24))})), "_proj.bias and 7 others"),
    "biases that the config promises": (config(attention_bias=True), "_proj.bias and 7 others"),
    "biases on the mlp only in the config": (config(mlp_bias=True), "missing"),
    "qwen3 without its norms": (config(model_type="qwen3"), "_norm"),
    "norms that llama does not have": (change_weights(lambda w: w.update({f"model.layers.{i}.self_attn.{p}_norm.weight": torch.ones(10)
                                       for i in (0, 1) for p in "qk"})), "_norm"),
    "qwen2 without its biases": (config(model_type="qwen2", attention_bias=None), "_proj.bias"),
    "a missing tensor": (change_weights(lambda w: w.pop(layer("mlp.up_proj"))), "missing"),
    "a missing head": (change_weights(lambda w: w.pop("lm_head.weight")), "lm_head"),
    "an extra tensor": (change_weights(lambda w: w.update(extra=torch.ones(2))), "extra"),
    "an extra tensor in a layer": (change_weights(lambda w: w.update({layer("mlp.fourth_proj"): torch.ones(2)})), "fourth_proj"),
    "a wrong shape": (change_weights(lambda w: w.update({layer("mlp.up_proj"): torch.ones(24, 28)})), "shape"),
    "a shape with the same number of numbers": (change_weights(lambda w: w.update({"model.norm.weight": torch.ones(24, 1)})), "shape"),
    "whole numbers for weights": (change_weights(lambda w: w.update({"model.norm.weight": torch.ones(24, dtype=torch.int64)})), "I64"),
    "a head that differs though tied": (config(tie_word_embeddings=True), "lm_head"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a config.json that is not JSON": (bytes_of(lambda b: b[:-5], "config.json"), "JSON"),
    "a config.json of bytes": (bytes_of(lambda b: b"\xff\xfe\x00", "config.json"), "UTF-8"),
    "a config.json of brackets": (bytes_of(lambda b: b"[" * 100_000, "config.json"), "JSON"),
    "a config.json that is a list": (bytes_of(lambda b: b"[]", "config.json"), "object"),
    "no folder at all": (shutil.rmtree, "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "weights in a pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors"),
    "a pickle that calls itself safetensors": (bytes_of(lambda b: pickle.dumps({"lm_head.weight": b"x" * 99})), "safetensors"),
    "weights cut at their end": (bytes_of(lambda b: b[:-100]), "safetensors"),
    "weights cut in their header": (bytes_of(lambda b: b[:60]), "safetensors"),
    "an empty file of weights": (bytes_of(lambda b: b""), "safetensors"),
    "a folder in place of the weights": (lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()), "safetensors"),
    "an index that leaves the folder": (index({"lm_head.weight": "../part.safetensors"}), "not a file in this folder"),
    "an index with an absolute path": (index({"lm_head.weight": "/etc/passwd"}), "not a file in this folder"),
    "an index of numbers": (index({"lm_head.weight": 7}), "not a file in this folder"),
    "an index to a file that is not there": (index({"lm_head.weight": "none.safetensors"}), "none.safetensors"),
    "an index that is a list": (index([], whole=True), "weight_map"),
    "an index whose map is a list": (index({"weight_map": ["lm_head.weight"]}, whole=True), "weight_map"),
    "an index without a map": (index({"metadata": {}}, whole=True), "weight_map"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_one_sentence(tmp_path, what):
    damage, word = REFUSED[what]
    folder = good_folder(tmp_path)
    load_pretrained(folder)                              # sound so far
    damage(folder)
    with pytest.raises(BadInput) as refusal, memory_limit(2**30):
        load_pretrained(folder)
    sentence = str(refusal.value)
    assert word in sentence and "\n" not in sentence and len(sentence) < 1000


def test_cudnns_attention_is_off_wherever_the_model_is_used():
    """It makes a plan for each shape, and the five lines of sapo.py know no World that could say so."""
    said = "import sapo, torch; print(torch.backends.cuda.cudnn_sdp_enabled())"
    assert subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------- sampling one token

def some_logits(rows, vocab, seed=0):
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SETTINGS = [(1.0, 0, 1.0), (0.7, 50, 0.95), (0.7, 5, 1.0), (1.6, 0, 0.8), (0.3, 7, 0.5), (1.0, 1, 1.0), (2.5, 0, 1e-6), (1.3, 1000, 0.99)]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_the_filtered_distribution_is_that_of_transformers(temperature, top_k, top_p):
    oracle("transformers")
    warpers, logits = oracle("transformers.generation.logits_process"), some_logits(20, 61)
    expected = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    expected = warpers.TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = warpers.TopPLogitsWarper(top_p)(None, expected).softmax(-1)
    probs, tokens = code._filtered(logits, temperature, top_k, top_p)
    ours = torch.zeros_like(logits).scatter(-1, tokens, probs / probs.sum(-1, keepdim=True))
    assert torch.equal(ours > 0, expected > 0) and torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS[:4])
def test_samples_are_as_frequent_as_they_are_probable(temperature, top_k, top_p):
    n, logits = 20_000, some_logits(1, 12, seed=3)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts = sample(logits.expand(n, -1), uniform, temperature, top_k, top_p).bincount(minlength=12)
    probs, tokens = code._filtered(logits, temperature, top_k, top_p)
    expected = torch.zeros(12, dtype=torch.float64).scatter(0, tokens[0], probs[0] / probs.sum()) * n
    often = expected > 5
    assert not counts[expected == 0].any() and often.sum() > 1
    assert fits(counts[often].tolist(), expected[often].tolist())


def test_temperature_0_takes_the_most_probable():
    logits = some_logits(50, 13)
    assert torch.equal(sample(logits, torch.rand(50), 0, 3, 0.1), logits.argmax(-1))


def test_the_ends_of_the_unit_interval_give_tokens_that_were_kept():
    """0 the most probable one, and just below 1 the least probable of those kept."""
    logits = torch.tensor([[0.5, 3.0, 1.0, 2.0]] * 2).log()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, ends, 1.0, 0, 0.9).tolist() == [1, 2] and sample(logits, ends, 1.0, 2, 1.0).tolist() == [1, 3]


def test_a_draw_depends_on_its_own_row_only():
    logits, uniform = some_logits(9, 30), torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = sample(logits, uniform, 0.8, 9, 0.9)
    assert together.tolist() == [sample(logits[i:i + 1], uniform[i:i + 1], 0.8, 9, 0.9).item() for i in range(9)]


# ---------------------------------------------------------------- generation

DECODERS = {"groups": {}, "no groups": dict(num_key_value_heads=6), "one key-value head": dict(num_key_value_heads=1),
            "a window": dict(sliding_window=4), "a window of one": dict(sliding_window=1), "norms and biases": dict(qk_norm=True, qkv_bias=True),
            "two kinds of layers": KINDS, "Gemma": GEMMA, "no rope on a layer": dict(layer_types=["a", "b"], kinds={"a": NO_ROPE, "b": {}}),
            "yarn": dict(rope=YARN | dict(attention_factor=1.2, truncate=True)),
            "tied, llama3 rope": dict(tie_word_embeddings=True, rope={k: v for k, v in LLAMA3.items() if k != "rope_theta"})}
PROMPTS, BUDGETS = random_texts([5, 2, 11, 3, 7], seed=1), [9, 14, 4, 0, 11]
NUCLEUS = dict(temperature=0.9, top_k=20, top_p=0.9)
GREEDY = dict(temperature=0)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def slowly(model, prompts, budgets, eos=(), temperature=1.0, top_k=0, top_p=1.0, rng=None, vocab=None, ban=()):
    """What `generate` promises, the plain way: row by row, no cache, the whole text through the model for every token."""
    texts = []
    for prompt, budget in zip(prompts, budgets):
        text = []
        for u in torch.rand(budget, generator=rng, dtype=torch.float64):
            logits = model(torch.tensor([prompt + text]))[:, -1, :vocab]
            logits[:, list(ban)] = -torch.inf
            text.append(sample(logits, u[None], temperature, top_k, top_p).item())
            if text[-1] in eos:
                break
        texts.append(text)
    return texts


@pytest.mark.parametrize("how", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_is_written_as_a_loop_without_a_cache_writes_it(decoder, how):
    """Unequal prompts and budgets, ends on the way, and texts longer than the window."""
    model = small_model(**DECODERS[decoder])
    written = generate(model, PROMPTS, BUDGETS, eos=(3, 4, 5), rng=seeded(), **how)
    assert written == slowly(model, PROMPTS, BUDGETS, eos=(3, 4, 5), rng=seeded(), **how)
    assert len({len(w) for w in written}) > 2


@pytest.mark.parametrize("how", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
def test_many_rows_are_written_as_one_row_at_a_time(how):
    model, one, many = small_model(), seeded(), seeded()
    together = generate(model, PROMPTS, BUDGETS, eos=(3, 4), rng=many, **how)
    assert together == [generate(model, [p], [n], eos=(3, 4), rng=one, **how)[0] for p, n in zip(PROMPTS, BUDGETS)]


def test_prompts_of_one_token_are_continued():
    model, prompts = small_model(), [[5], [9], [7]]
    together = generate(model, prompts, [4, 6, 2], rng=seeded(), **NUCLEUS)
    assert together == slowly(model, prompts, [4, 6, 2], rng=seeded(), **NUCLEUS)


def test_a_prompt_of_one_token_may_stand_beside_a_longer_one():
    model, one, many = small_model(), seeded(), seeded()
    together = generate(model, [[5], PROMPTS[0]], [6, 6], rng=many, **NUCLEUS)
    assert together == [generate(model, [p], [6], rng=one, **NUCLEUS)[0] for p in ([5], PROMPTS[0])]


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dtype, apart", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["exact", "as large models in float32"])
def test_prefill_and_decoding_give_the_logits_of_the_whole_text(decoder, dtype, apart, monkeypatch):
    """Rows of unequal length: row 0 begins with 4 tokens, row 1 with 7, and each goes on at its own place."""
    model, texts, begun = small_model(dtype=dtype, **DECODERS[decoder]), random_texts([15, 15], seed=2), [4, 7]
    whole = model(torch.tensor(texts))
    cache = KVCache(model.config, 2, 15, dtype, "cpu")
    monkeypatch.setattr(code, "LARGE", 0)
    rows = torch.tensor([[0, 1, 2, 3, -1, -1, -1], [4, 5, 6, 7, 8, 9, 10]])
    prefill = model(torch.tensor(texts[0][:4] + texts[1][:7]), rows, cache=cache)
    assert all(torch.allclose(prefill[rows[row, :n]], whole[row, :n], atol=apart) for row, n in enumerate(begun))
    for step in range(8):
        at = [n + step for n in begun]
        cache.width = max(at) + 1
        logits = model(torch.tensor([[texts[row][p]] for row, p in enumerate(at)]), positions=torch.tensor(at)[:, None], cache=cache)
        assert all(torch.allclose(logits[row, 0], whole[row, p], atol=apart) for row, p in enumerate(at))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (32, 1, 256), (2, 3, 5, 256)])
def test_a_large_matrix_times_few_tokens_is_the_usual_product(shape, bias, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(size, generator=generator) for size in (shape, (528, 256), (528,)))
    expected = F.linear(x.double(), weight.double(), shift.double() if bias else None)
    monkeypatch.setattr(F, "linear", None)                   # it is not called
    got = code.linear(x, weight, shift if bias else None)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("x, weight", [(torch.ones(33, 8), torch.ones(16, 8)), (torch.ones(2, 8), torch.ones(24, 8)), (torch.ones(2, 8).double(), torch.ones(16, 8).double()),
                                       (torch.ones(2, 8, requires_grad=True), torch.ones(16, 8))],
                         ids=["many tokens", "rows that do not divide", "another dtype", "something trains"])
def test_any_other_product_is_the_usual_one(x, weight, monkeypatch):
    monkeypatch.setattr(code, "LARGE", 0)
    monkeypatch.setattr(F, "linear", lambda *arguments: "the usual one")
    with torch.set_grad_enabled(x.requires_grad):
        assert code.linear(x, weight) == "the usual one"
        assert x.requires_grad or not isinstance(code.linear(torch.ones(2, 8), torch.ones(16, 8)), str)


def test_the_end_token_is_written_and_nothing_after_it():
    model, prompt = small_model(), PROMPTS[0]
    (free,) = generate(model, [prompt], [20], **GREEDY)
    end = next(i for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    assert generate(model, [prompt], [20], eos=(free[end],), **GREEDY) == [free[:end + 1]]


def test_a_budget_is_kept_and_a_budget_of_0_writes_nothing():
    written = generate(small_model(), PROMPTS, BUDGETS, rng=seeded(), **NUCLEUS)
    assert [len(w) for w in written] == BUDGETS
    assert generate(small_model(), PROMPTS, [0] * 5, rng=seeded(), **NUCLEUS) == [[]] * 5


def test_rows_that_are_finished_do_not_disturb_the_others():
    model = small_model()
    (alone,) = generate(model, [PROMPTS[2]], [25], **GREEDY)
    assert generate(model, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], [1, 25, 2], **GREEDY)[1] == alone


def test_a_banned_token_is_never_written():
    """The ten most probable first tokens are banned, so all rows would write one of them."""
    model, prompts = small_model(), [PROMPTS[0]] * 40
    ban = model(torch.tensor([PROMPTS[0]]))[0, -1].topk(10).indices.tolist()
    free, banned = (generate(model, prompts, [6] * 40, rng=seeded(), ban=b, **NUCLEUS) for b in ((), ban))
    assert set(sum(free, [])) & set(ban) and not set(sum(banned, [])) & set(ban)
    assert banned == slowly(model, prompts, [6] * 40, rng=seeded(), ban=ban, **NUCLEUS)


def test_ids_beyond_the_vocabulary_are_never_written():
    model, prompts = small_model(), [PROMPTS[0]] * 40
    free, limited = (generate(model, prompts, [6] * 40, rng=seeded(), vocab=v, **NUCLEUS) for v in (None, 33))
    assert max(sum(free, [])) > 33 and max(sum(limited, [])) < 33
    assert limited == slowly(model, prompts, [6] * 40, rng=seeded(), vocab=33, **NUCLEUS)


def test_a_banned_token_may_lie_beyond_the_vocabulary():
    """An end token of config.json that the tokenizer lacks, say."""
    assert len(generate(small_model(), [PROMPTS[0]], [3], vocab=33, ban=(5, 60), **GREEDY)[0]) == 3


def test_the_generator_decides_what_is_sampled_and_greedy_draws_nothing():
    model, rng = small_model(), seeded()
    first, second = (generate(model, PROMPTS, BUDGETS, rng=rng, **NUCLEUS) for _ in range(2))
    assert first != second and first == generate(model, PROMPTS, BUDGETS, rng=seeded(), **NUCLEUS)
    before = rng.get_state()
    generate(model, PROMPTS, BUDGETS, rng=rng, **GREEDY)
    assert torch.equal(rng.get_state(), before)


def test_nothing_is_written_for_no_prompts_and_an_empty_prompt_is_refused():
    assert generate(small_model(), [], []) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(small_model(), [[1, 2], []], [3, 3])


def test_generation_leaves_the_model_able_to_train():
    model = small_model()
    generate(model, PROMPTS, BUDGETS, **GREEDY)
    model(torch.tensor([PROMPTS[0]])).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("case", ["llama", "llama, tied", "llama, llama3 rope beyond its length", "llama, yarn rope", "mistral, beyond its window", "qwen3",
                                  "qwen2, beyond the window of its second layer", "smollm3", "smollm3, its own head, biases, a window where there is no rope",
                                  "gemma3_text"])
def test_greedy_writes_what_transformers_writes(tmp_path, case):
    family, numbers = FAMILIES[case]
    theirs = small_hf_model(family, **numbers)
    theirs.save_pretrained(tmp_path)
    written = generate(load_pretrained(tmp_path), PROMPTS, [30] * 5, **GREEDY)
    for prompt, ours in zip(PROMPTS, written):
        full = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None)
        assert ours == full[0, len(prompt):].tolist()


def test_stories260k_tells_of_lily(shared):
    folder = shared / "models/stories260K"
    (story,) = generate(load_pretrained(folder), [[1]], [60], eos=(2,), **GREEDY)
    text = oracle("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json")).decode(story)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


# ---------------------------------------------------------------- two texts with a common prefix

def some_pairs():
    """Pairs of SAPO's form: ragged, with A or C empty, with y- ended early, with y- = y+, and one that starts to differ at once."""
    shapes = [(5, 3, 4, 4, 2), (2, 0, 3, 3, 4), (9, 2, 2, 2, 0), (3, 6, 5, 2, 0), (4, 1, 1, 1, 7), (7, 0, 6, 1, 0)]
    pairs = []
    for i, (x, a, b, new, c) in enumerate(shapes):
        prompt, start, segment, other, end = random_texts([x, a, b, new, c], seed=10 + i)
        pairs.append(Pair(prompt, start + segment + end, start + other + (end if new == b else []), a, a + b, a + new))
    same = random_texts([4, 5], seed=30)
    return pairs + [Pair(same[0], same[1], list(same[1]), 1, 3, 3)]


WINDOWS = pytest.mark.parametrize("seen", [{}, dict(sliding_window=4), dict(sliding_window=1), KINDS, GEMMA], ids=["all", "4", "1", "two kinds of layers", "Gemma"])


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("share", [True, False])
def test_both_texts_of_a_stream_have_the_logits_of_a_text_alone(seen, share):
    model, pairs = small_model(**seen), some_pairs()
    batch = collate(pairs, share)
    logits = model(batch.ids, batch.rows)
    for i, pair in enumerate(pairs):
        for row, answer in zip((batch.rows[i], batch.rows[i + len(pairs)]), (pair.chosen, pair.rejected)):
            text = (pair.prompt + answer)[:-1]
            assert torch.allclose(logits[row[:len(text)]], model(torch.tensor([text]))[0], atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_texts_may_share_their_beginnings(decoder):
    """A stream in no order, of texts that branch off each other, one of them the beginning of another."""
    model, stream = small_model(**DECODERS[decoder]), random_texts([11], seed=4)[0]
    texts = [[7, 2, 9, 0], [7, 2, 5, 6, 8], [7, 2, 5, 1, 10, 4], [3], [7, 2]]
    rows = torch.tensor([text + [-1] * (6 - len(text)) for text in texts])
    logits = model(torch.tensor(stream), rows)
    for text in texts:
        assert torch.allclose(logits[text], model(torch.tensor([[stream[i] for i in text]]))[0], atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_not_finite_stays_with_its_pair(order):
    """Though a shorter text's row is padded: with what, is not the same."""
    model = small_model()
    model.model.embed_tokens.weight[50] = torch.nan
    pairs = [Pair([1, 2], [3, 4, 5, 6], [3, 7, 5, 6]), Pair([1, 2, 9], [3, 4, 5, 6, 7, 8], [3, 7, 5, 6, 8, 8]), Pair([1, 2], [3, 4, 5], [3, 50, 5])]
    for chosen in (score(model, collate(pairs[::order]))[0], score(model, collate(pairs[::order], share=False))[0]):
        assert chosen.isfinite().all()


def test_padding_takes_the_texts_own_tokens_in_turn():
    """A GPU adds the gradients of one token's places one after another, and padding can be most of a row."""
    model, rows = small_model(), torch.tensor([[0, 1, 2, -1, -1, -1, -1, -1], [0, 3, 4, 5, 6, 7, 8, 9], [10, -1, -1, -1, -1, -1, -1, -1]])
    taken = []
    model.model.layers[0].register_forward_pre_hook(lambda module, arguments: taken.append(arguments[3][0].tolist()))
    model(torch.arange(11), rows)
    assert taken == [[[0, 1, 2, 0, 1, 2, 0, 1], [0, 3, 4, 5, 6, 7, 8, 9], [10] * 8]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoding_takes_what_attention_returns_in_any_memory_layout(decoder, monkeypatch):
    """CUDA's kernels return (batch, queries, heads, size) transposed, of which there is no view of another shape."""
    model, real = small_model(**DECODERS[decoder]), F.scaled_dot_product_attention
    expected = generate(model, PROMPTS, [5] * 5, **GREEDY)
    laid_out = lambda *arguments, **how: real(*arguments, **how).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out)
    assert generate(model, PROMPTS, [5] * 5, **GREEDY) == expected


def test_a_stream_is_multiplied_once_and_without_padding():
    """Every linear layer gets as many tokens as there are: the purpose of it all."""
    model, pairs, seen = small_model(), some_pairs(), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            module.register_forward_hook(lambda module, arguments, output: seen.add(arguments[0].numel() // module.in_features))
    score(model, collate(pairs))
    whole = [2 * len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs]             # both texts, but for their last tokens
    common = [next((i for i, (a, b) in enumerate(zip(p.chosen, p.rejected)) if a != b), min(len(p.chosen), len(p.rejected)) - 1) for p in pairs]
    assert seen == {sum(whole) - sum(len(p.prompt) + n - 1 for p, n in zip(pairs, common))}
    seen.clear()
    generate(model, PROMPTS, [1] * 5, **GREEDY)
    assert seen == {sum(map(len, PROMPTS))}


@WINDOWS
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_the_prefix_changes_neither_scores_nor_gradients(loss, seen):
    cfg, results = SAPOConfig(loss=loss, beta=0.3, lam=0.4), []
    for share in (True, False):
        model, batch = small_model(**seen), collate(some_pairs(), share, **scored_tokens(cfg))
        value, _ = preference_loss(model, batch, cfg, tuple(score(small_model(1, **seen), batch)))
        value.sum().backward()
        results.append([torch.stack(score(model, batch)), value, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-10) for a, b in zip(*results))


def test_the_prefix_may_be_one_token():
    """The prompt is a lone BOS and the segment starts at once."""
    model, pairs = small_model(), [Pair([1], [5, 6, 7, 2], [8, 9, 2]), Pair([1], [5, 6, 2], [5, 8, 2])]
    shared, plain = (torch.stack(score(model, collate(pairs, share))) for share in (True, False))
    assert torch.allclose(shared, plain, atol=1e-12)


def test_answers_may_be_one_token():
    model, pairs = small_model(), [Pair([1, 4, 3], [5], [8])]
    shared, plain = (torch.stack(score(model, collate(pairs, share))) for share in (True, False))
    assert torch.allclose(shared, plain, atol=1e-12)


# ---------------------------------------------------------------- twins

def test_a_twin_shares_what_is_frozen_and_copies_the_rest():
    model = small_model()
    for name, p in model.named_parameters():
        p.requires_grad_("self_attn" in name)
    other = dict(twin(model).named_parameters())
    for name, p in model.named_parameters():
        assert (other[name] is p) != p.requires_grad and torch.equal(other[name], p)


def test_a_twin_does_not_train_and_its_model_goes_on_training():
    model = small_model()
    other = twin(model)
    assert not any(p.requires_grad for p in other.parameters()) and all(p.requires_grad for p in model.parameters())


def test_changes_to_the_policy_do_not_reach_its_twin():
    model, ids = small_model(), torch.tensor(random_texts([9]))
    before, other = model(ids), twin(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(other(ids), before) and not torch.equal(model(ids), before)


def test_a_tied_head_stays_tied_in_a_twin():
    model = small_model(tie_word_embeddings=True)
    other = twin(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight and other.lm_head.weight is not model.lm_head.weight
