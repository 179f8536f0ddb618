"""The memory plan against what is there: standing bytes against live tensors, activations against what autograd keeps.

The file is its own worker: `torchrun tests/test_plan.py FOLDER OUT.json` counts on two processes.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GEMMA, ROOT, make_pairs, random_texts, small_model

import losses
import plan
import sapo
import train
from buffer import Pair, collate
from losses import LOGITS, preference_loss, scored_tokens
from machine.files import BadInput
from machine.flags import Command, Config, checked
from machine.config import config_from_dict
from machine.folders import companions, save_pretrained
from machine.parallel import World, starting_model
from model import add_lora, generate
from plan import MODELS, STANDING, Job
from sapo import Example, SAPOConfig, State, sapo_step

SIZES = {"small": dict(vocab_size=1024, hidden_size=26, num_hidden_layers=2, max_position_embeddings=256),
         "large": dict(vocab_size=1031, hidden_size=48, intermediate_size=75, num_hidden_layers=3, max_position_embeddings=256, tie_word_embeddings=True, qk_norm=True,
                       source={"model_type": "qwen3", "vocab_size": 1031, "hidden_size": 48, "intermediate_size": 75, "num_hidden_layers": 3, "num_attention_heads": 6,
                               "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 256, "tie_word_embeddings": True})}
RANK = 3


def write_models(folder):
    for i, (name, sizes) in enumerate(SIZES.items()):
        save_pretrained(small_model(i, torch.float32, **sizes), folder / name, torch.float32, companions(ROOT / "data/tiny_model"))
    return folder


def bytes_of(tensors, seen):
    """Bytes of the storages behind tensors (a sharded tensor's own shard), each storage once, none that was `seen` before."""
    total = 0
    for t in tensors:
        storage = getattr(t, "to_local", lambda: t)().untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def live(folder, mode, loss, optimizer, dtype, out, world):
    """{item: bytes} of a real Run after one step of Algorithm 1."""
    rows = str(ROOT / "data/tiny_validation.jsonl")
    cfg = checked(Config(model=str(folder), data=rows, eval_data=rows, out=str(out), loss=loss, optimizer=optimizer, dtype=dtype, batch_size=4,
                         micro_batch=1, segment="4", lora=RANK if mode == "lora" else 0, shard=mode == "shard", device="cpu", max_length=64))
    run = train.Run(Command(cfg, None, None), world)
    run.model = starting_model(run.cfg, run.inputs.config, run.inputs.base, world, run.half)
    run.begin_sapo()
    sapo_step(run.state, run.draw, run.cfg, run.autocast)
    state, seen, parameters = run.state, set(), list(run.model.parameters())
    moments = [v for group in state.optimizer.state.values() for v in group.values()]
    kinds = {"weights": parameters, "gradients": [p.grad for p in parameters if p.grad is not None], "moments": moments, "EMA": state.ema.parameters(),
             "generator": state.generator.parameters(), "reference": state.reference.parameters() if state.reference else []}
    return {kind: bytes_of(tensors, seen) for kind, tensors in kinds.items()}


WAYS = [("dpo", "rmsprop", "bfloat16"), ("orpo", "adamw", "float32"), ("dpo", "adamw", "float32")]


@pytest.mark.parametrize("loss, optimizer, dtype", WAYS)
@pytest.mark.parametrize("mode", ["ddp", "lora"])
@pytest.mark.parametrize("size", SIZES)
def test_standing_bytes_are_those_of_the_live_tensors(tmp_path, size, mode, loss, optimizer, dtype):
    folder = write_models(tmp_path) / size
    planned = plan.standing(plan.read(folder), mode, Job(1, loss, optimizer, RANK, dtype == "bfloat16"))
    assert tuple(planned) == STANDING and planned == live(folder, mode, loss, optimizer, dtype, tmp_path / "out", World("cpu"))


@pytest.mark.slow
def test_standing_bytes_are_those_of_the_live_tensors_of_two_processes(tmp_path):
    from test_ddp import torchrun
    write_models(tmp_path)
    torchrun(2, __file__, tmp_path, tmp_path / "live.json")
    found = json.loads((tmp_path / "live.json").read_text())
    assert len(found) == len(SIZES) * 3 * len(WAYS)
    for size, mode, loss, optimizer, dtype, counted in found:
        assert plan.standing(plan.read(tmp_path / size), mode, Job(2, loss, optimizer, RANK, dtype == "bfloat16")) == counted, (size, mode, loss, dtype)


MORE = {"Gemma-3-1B": dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
                           num_key_value_heads=1, head_dim=256, sliding_window=512, sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=10000),
        "SmolLM3-3B": dict(model_type="smollm3", vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                           num_key_value_heads=4, no_rope_layer_interval=4, rope_theta=5e6)}


@pytest.mark.parametrize("name, parameters", [("Mistral-7B", 7_241_732_096), ("Llama-3-8B", 8_030_261_248), ("Gemma-3-1B", 999_885_952),
                                              ("SmolLM3-3B", 3_075_098_624)])
def test_public_sizes_come_out_right(name, parameters):
    config = config_from_dict((MODELS | MORE)[name])
    assert sum(np.prod(shape) for shape, _ in plan.shapes(config, 0).values()) == parameters
    items = plan.standing(config, "ddp", Job(optimizer="adamw"))
    assert sum(items.values()) // parameters == 26, "float32 AdamW, DPO and a bfloat16 generator: 26 bytes a parameter"


# ---------------------------------------------------------------- activations

def kept_bytes(model, batch, cfg, autocast):
    """Bytes of the storages that autograd holds between forward and backward pass, without parameters and the batch."""
    mine = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *batch] if isinstance(t, torch.Tensor)}
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in mine:
            held[t.untyped_storage().data_ptr()] = t        # kept, so that no address is used twice
        return t

    reference = [torch.zeros(len(batch.lengths))] * 2 if cfg.loss == "dpo" else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        preference_loss(model, batch, cfg, reference)
    return sum(t.untyped_storage().nbytes() for t in held.values())


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_the_head_is_reckoned_with_the_labels_that_a_loss_has(loss, monkeypatch):
    P, S, taken = 90, 40, []
    pair = Pair([3], [4] * (P - 1) + [1] * S, [4] * (P - 1) + [2] * S)                          # all but x and A are labels, or those too
    wanted = (collate([pair], **scored_tokens(SAPOConfig(loss=loss))).labels != losses.IGNORE).sum().item()
    monkeypatch.setattr(plan, "kept", lambda config, mode, job, pairs, P, S, labels: taken.append(labels) or 0)
    plan.passing(small_model().config, "ddp", Job(loss=loss, max_length=P + S + 1, continuation=S))
    assert taken[0] == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("mode, times", [("ddp", 1), ("lora", 2), ("shard", 2)])
def test_ddp_evaluates_with_caches_in_float32(mode, times):
    caches = [plan.passing(small_model().config, mode, Job(half=half, lora=2))["KV cache"] for half in (True, False)]
    assert caches[0] * times == caches[1]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
@pytest.mark.parametrize("mode, half", [("ddp", False), ("ddp", True), ("lora", True), ("shard", True)])
@pytest.mark.parametrize("heads, changes", [(2, {}), (6, {}), (2, GEMMA | dict(layer_types=["near", "near", "far", "near"] * 2))], ids=["2", "6", "Gemma's norms"])
def test_activations_are_within_15_percent_of_what_autograd_keeps(monkeypatch, mode, half, loss, checkpointing, heads, changes):
    if loss == "orpo":                                      # ... and with the head in chunks, computed again
        for module in (plan, losses):
            for limit in ("LOGITS", "KEPT"):
                monkeypatch.setattr(module, limit, 61 * 50)
    P, S, pairs, layers = 90, 40, 3, 8
    model = small_model(0, torch.float32, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, head_dim=16, num_attention_heads=6, num_key_value_heads=heads,
                        max_position_embeddings=512, **changes)
    if mode == "lora":
        add_lora(model.bfloat16(), RANK, 8.0, torch.Generator())
    elif mode == "shard":                                   # FSDP2 computes with parameters that are bfloat16
        model.bfloat16()
    model.gradient_checkpointing = checkpointing
    model.train()
    prompt, chosen, rejected = random_texts([P], seed=1)[0], random_texts([S] * pairs, seed=2), random_texts([S] * pairs, seed=3)
    rows = [Pair(prompt, [1] + c, [2] + r) for c, r in zip(chosen, rejected)]
    cfg = SAPOConfig(loss=loss)
    batch = collate(rows, **scored_tokens(cfg))
    assert batch.rows.shape == (2 * pairs, P + S) and len(batch.ids) == pairs * (P - 1 + 2 * (S + 1))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    measured = kept_bytes(model, batch, cfg, autocast)
    if mode == "ddp" and half:                              # what autocast casts is the plan's `copies`
        measured -= 2 * sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and (not checkpointing or "lm_head" in n))
    elif mode == "lora" and not checkpointing:
        measured -= 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    labels = int((batch.labels != -100).sum()) // pairs
    planned = plan.kept(model.config, mode, Job(lora=RANK, half=half, gradient_checkpointing=checkpointing), pairs, P - 1, S + 1, labels)
    assert 0.85 < planned / measured < 1.15, (planned, measured)


def test_the_highest_moment_grows_with_the_micro_batch_and_the_largest_that_fits_does_fit():
    config = config_from_dict(MODELS["Mistral-7B"])
    for mode in plan.MODES:
        peaks = [plan.peak(config, mode, Job(micro_batch=m, generate_rows=1))[0]["peak"] for m in (1, 2, 4, 8)]
        assert peaks == sorted(peaks) and plan.fit(config, mode, Job(), peaks[0] - 1)[0] is None
        best, size = plan.fit(config, mode, Job(), peaks[1])
        assert best.micro_batch >= 2 and size <= peaks[1]
    assert plan.fit(config, "ddp", Job(), 80e9)[0] is None and plan.fit(config, "shard", Job(gradient_checkpointing=True), 80e9)[0]


def test_a_chunk_of_the_head_bounds_the_logits():
    config = config_from_dict(MODELS["Llama-3-8B"])
    items = [plan.passing(config, "lora", Job(micro_batch=m))["logits"] for m in (1, 8)]
    assert items[0] == items[1] == 16 * LOGITS


# ---------------------------------------------------------------- the command

def test_the_plan_prints_each_item_and_what_fits(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Mistral-7B"]))
    assert not plan.main([str(path), "--world", "8", "--gpu-memory", "80", "--gradient-checkpointing"])
    text = capsys.readouterr().out
    assert "7,241,732,096 parameters" in text and all(f"\n{item} " in text for item in (*STANDING, "activations", "logits", "KV cache", "peak"))
    assert "ddp   does not fit" in text and "\nlora  fits with --micro-batch" in text and "\nshard fits with --micro-batch" in text
    assert not plan.main([str(tmp_path), "--json", "--loss", "orpo"])
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["optimizer"] == "adamw" and result["shard"]["fits"] and not result["ddp"]["fits"] and result["ddp"]["reference"] == 0


def test_the_table_has_a_line_for_each_model_loss_and_machine(capsys):
    plan.main(["--table", "--gradient-checkpointing"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 12 and all(line.count("|") == 7 for line in lines)


@pytest.mark.parametrize("raw, words", [(None, "no such file"), ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented"),
                                        (MODELS["Mistral-7B"] | {"hidden_act": "gelu"}, "hidden_act 'gelu'")])
def test_a_config_that_cannot_be_planned_is_one_line_and_exit_code_2(tmp_path, capsys, raw, words):
    path = tmp_path / "config.json"
    if raw:
        path.write_text(json.dumps(raw))
    assert plan.main([str(path)]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and words in printed.err
    with pytest.raises(BadInput):
        plan.read(path)


def test_generating_few_rows_at_once_changes_nothing(monkeypatch):
    """What --generate-rows saves in memory costs no bit of the result."""
    rows, texts, most = [Example(p, c) for p, c in zip(random_texts(range(3, 14)), random_texts([9] * 11, seed=1))], [], []
    real = generate
    monkeypatch.setattr(sapo, "generate", lambda model, prompts, *more: most.append(len(prompts)) or real(model, prompts, *more))
    for at_once in (64, 4, 1):
        cfg = SAPOConfig(batch_size=4, buffer_size=4, segment="5", generate_rows=at_once)
        texts.append([p.rejected for p in make_pairs(State.start(small_model(), cfg, (2,)), rows, cfg)])
    assert texts[0] == texts[1] == texts[2] and most == [11, 4, 4, 3] + [1] * 11


@pytest.mark.parametrize("memory", ["nan", "0", "-3", "inf"])
def test_a_gpu_has_a_number_of_gigabytes(memory, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--table", "--gpu-memory", memory])
    assert "--gpu-memory must be a number of gigabytes" in capsys.readouterr().err


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    world, found = World("cpu"), []
    for size in SIZES:
        for mode in plan.MODES:
            for way in WAYS:
                found.append([size, mode, *way, live(folder / size, mode, *way, folder / "out", world)])
    if world.first:
        out.write_text(json.dumps(found))
    world.close()
    os._exit(0)
