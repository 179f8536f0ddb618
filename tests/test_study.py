"""The study: that its variants are what their names say, its statistics right, and its runs not done twice.

Oracles: scipy's t, a plain loop of supervised steps, the order of the rows.
"""

import dataclasses
import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import real
import sapo
import study
import train
from conftest import ROOT, oracle, small_model
from machine.flags import DATA, parse
from machine.config import read_config
from machine.folders import companions, save_pretrained
from model import Transformer, generate
from sapo import Example, State, sapo_step

EOS, ROWS, BATCH = 2, 12, 4


def variant(name):
    """The Config of a variant, its batches cut to BATCH so that a small model has an epoch of three steps."""
    cfg = parse(["--preset", "tiny", *study.RELATIVES[name].split()]).cfg
    assert cfg.batch_size == study.BATCH and cfg.buffer_size in (study.BATCH, 256)
    cfg.buffer_size = BATCH * cfg.buffer_size // cfg.batch_size
    cfg.batch_size, cfg.micro_batch, cfg.max_grad_norm = BATCH, BATCH, 0.0
    return cfg


def examples():
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(3, 60, n).tolist()
    return [Example(ids(4), ids(6 + i % 5) + [EOS], ids(7) + [EOS], i) for i in range(ROWS)]


def start(cfg):
    return State.start(small_model(0), cfg, [EOS], lr=0.01, steps_per_epoch=ROWS // BATCH)


def run(cfg, steps, seen, monkeypatch):
    """`steps` steps of a small model; seen(state, who, prefixes) for each batch of texts: `who` generates it."""
    state, rows = start(cfg), itertools.cycle(examples())

    def generating(who, prefixes, budgets, *more):
        seen(state, who, prefixes)
        return generate(who, prefixes, budgets, *more)

    monkeypatch.setattr(sapo, "generate", generating)
    pasts = [weights(state.policy)]
    for _ in range(steps):
        sapo_step(state, lambda n: list(itertools.islice(rows, n)), cfg)
        pasts.append(weights(state.policy))
    return state, pasts


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def all_flags():
    ablations = ((what, value, flags) for what, values in study.ABLATIONS.items() for value, flags in values.items())
    return study.RELATIVES | {f"{what} {value}": flags for what, value, flags in ablations}


@pytest.mark.parametrize("name", all_flags())
def test_flags_of_a_variant_are_flags_of_train_and_change_something(name):
    flags, plain = all_flags()[name], parse(["--preset", "tiny"]).cfg
    cfg = parse(["--preset", "tiny", *flags.split()]).cfg
    words = flags.replace("--ref-refresh epoch", "").split()             # said, though the preset's
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert given == {k for k in vars(cfg) if getattr(cfg, k) != getattr(plain, k)}


def test_values_without_flags_are_the_presets():
    plain = parse(["--preset", "tiny"]).cfg
    assert (plain.alpha, plain.ema_every, plain.segment) == (0.5, "2", "12")
    assert (plain.score_on, plain.eos_in_segment) == ("response", "stop")
    assert (plain.ref_refresh, plain.ref_from) == ("epoch", "ema")
    assert (plain.buffer_size, plain.batch_size) == (16 * study.BATCH, study.BATCH)
    defaults = {what: [v for v, flags in values.items() if not flags] for what, values in study.ABLATIONS.items()}
    assert defaults == {"alpha": ["0.5"], "EMA every ... steps": ["2"], "buffer, batches": ["16"],
                        "segment": ["12 tokens"], "end token inside B'": ["stop"], "tokens compared": ["response"],
                        "reference": ["epoch"], "whole response with": []}


def test_every_variant_has_its_words_and_its_rates():
    assert set(study.WORDS) == set(study.RELATIVES)
    assert {name for pair in study.CLAIMS.values() for name in pair} <= set(study.RELATIVES)
    assert all(len(study.RATES[study.loss_of(flags)]) == 4 for flags in study.RELATIVES.values())


def documents():
    """What the README and the documents that it names say, one after another."""
    return "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def test_the_documents_have_the_table_of_variants():
    assert study.relatives() in documents(), "paste what this prints: python tools/study.py --relatives"


def test_the_tables_are_those_of_the_numbers_beside_them():
    results = json.loads((ROOT / "docs/figures/study.json").read_text("utf-8"))
    assert (ROOT / "docs/figures/study.md").read_text("utf-8") == study.page(study.report(results))
    assert list(results["variants"]) == ["untouched base", *study.RELATIVES]
    assert {what: list(values) for what, values in results["ablations"].items()} == {
        what: list(values) for what, values in study.ABLATIONS.items()}
    for name, flags in study.RELATIVES.items():          # these results are older than --after rewrite, as docs/study.md says
        assert results["variants"][name]["flags"] in (flags, flags.replace(" --after rewrite", ""))


# ------------------------------------------------------------------------------------------------ the relatives

def test_spin_generates_all_of_y_from_a_copy_frozen_for_an_epoch_and_refreshes_the_reference_with_it(monkeypatch):
    epoch, generators, references = ROWS // BATCH, [], []

    def seen(state, who, prefixes):
        generators.append((state.step, weights(who)))
        references.append(weights(state.reference))
        assert who is not state.policy
        assert {tuple(p) for p in prefixes} <= {tuple(e.prompt) for e in examples()}, "A is empty"

    state, pasts = run(variant("SPIN"), 3 * epoch, seen, monkeypatch)
    assert {step for step, _ in generators} == {0, epoch, 2 * epoch}, "an epoch is generated at once"
    for (step, generator), reference in zip(generators, references):
        assert torch.equal(generator, pasts[step]) and torch.equal(reference, pasts[step])
    assert not torch.equal(pasts[epoch], pasts[2 * epoch]) and len(state.buffer) == BATCH
    assert {p.step for p in state.buffer.pairs} == {3 * epoch - 1}, "no pair is used twice"


def test_on_policy_the_policy_of_each_step_generates_all_of_y(monkeypatch):
    seen, cfg = [], variant("on-policy")
    _, pasts = run(cfg, 5, lambda state, who, prefixes: seen.append((weights(who), prefixes)), monkeypatch)
    assert len(seen) == 5 and all(torch.equal(generator, past) for (generator, _), past in zip(seen, pasts))
    assert {tuple(p) for _, prefixes in seen for p in prefixes} <= {tuple(e.prompt) for e in examples()}


def test_segment_only_the_policy_of_each_step_generates_after_a(monkeypatch):
    seen, cfg = [], variant("segment only")
    cfg.segment = "3"                                    # the rows here are shorter than 12 tokens
    _, pasts = run(cfg, 5, lambda state, who, prefixes: seen.append((weights(who), prefixes)), monkeypatch)
    assert len(seen) == 5 and all(torch.equal(generator, past) for (generator, _), past in zip(seen, pasts))
    assert max(len(p) for _, prefixes in seen for p in prefixes) > 4


def test_ema_only_learns_from_fresh_pairs_that_the_average_generated(monkeypatch):
    generators = []
    state, pasts = run(variant("EMA only"), 4, lambda state, who, _: generators.append(weights(who)), monkeypatch)
    assert {p.step for p in state.buffer.pairs} == {3}
    average = 0.5 * pasts[0] + 0.5 * pasts[2]
    assert torch.allclose(generators[1], average, atol=1e-12), "the average of the start and of step 2"


def test_buffer_only_learns_from_old_pairs_that_the_policy_generated(monkeypatch):
    generators = []
    state, pasts = run(variant("buffer only"), 4, lambda state, who, _: generators.append(weights(who)), monkeypatch)
    assert {p.step for p in state.buffer.pairs} == {0, 1, 2, 3} and torch.equal(generators[3], pasts[3])


def test_spin_with_ema_and_buffer_averages_once_an_epoch(monkeypatch):
    epoch, generators = ROWS // BATCH, []
    seen = lambda state, who, prefixes: generators.append(weights(who))
    state, pasts = run(variant("SPIN with EMA and buffer"), 2 * epoch, seen, monkeypatch)
    assert len(generators) == 2 and torch.allclose(generators[1], 0.5 * pasts[0] + 0.5 * pasts[epoch], atol=1e-12)
    assert len({p.step for p in state.buffer.pairs}) == 2 * epoch


def test_sft_takes_the_steps_of_plain_supervised_fine_tuning(monkeypatch):
    """Step for step in weights: lambda 0, one batch in the buffer, against sft_step on the same rows."""
    cfg, plain, rows = variant("SFT"), small_model(0), itertools.cycle(examples())
    cfg.max_grad_norm = 0.7                              # clipping sees the same gradient
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    state, stream = start(cfg), itertools.cycle(examples())
    halves, before = dataclasses.replace(cfg, micro_batch=2), weights(plain)
    for _ in range(2 * ROWS // BATCH):
        sapo_step(state, lambda n: list(itertools.islice(stream, n)), cfg)
        train.sft_step(plain, optimizer, list(itertools.islice(rows, BATCH)), halves, nullcontext)
        assert torch.allclose(weights(state.policy), weights(plain), rtol=0, atol=1e-9)
    assert (weights(plain) - before).abs().max() > 0.01


@pytest.mark.parametrize("name", ["offline DPO", "offline ORPO", "SFT"])
def test_offline_the_pairs_are_the_datas_and_nobody_generates(name, monkeypatch):
    def seen(*_):
        raise AssertionError("something was generated")

    state, _ = run(variant(name), ROWS // BATCH, seen, monkeypatch)
    data = examples()
    assert all((p.chosen, p.rejected) == (data[p.row].chosen, data[p.row].rejected) for p in state.buffer.pairs)
    assert len(state.buffer) == BATCH
    if name == "offline DPO":
        assert torch.equal(weights(state.reference), weights(small_model(0))), "the reference stays the start"


# ------------------------------------------------------------------------------------------------ numbers

@pytest.mark.parametrize("n", range(2, 11))
def test_intervals_are_scipys(n):
    stats = oracle("scipy.stats")
    values = np.random.default_rng(n).normal(3, 2, n).tolist()
    mean, half = study.interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx((low + high) / 2) and half == pytest.approx((high - low) / 2, rel=2e-4)


def test_one_value_has_no_interval_and_is_printed_without():
    assert study.cell([0.5], 2) == "0.50" and study.cell([0.5, 0.7], 2) == "0.60 ± 1.27"


def test_a_verdict_needs_an_interval_without_0():
    assert study.verdict([0.1, 0.11, 0.12]) == "holds" and study.verdict([-0.1, -0.11, -0.12]) == "does not hold"
    assert study.verdict([0.1, -0.1, 0.12]) == study.verdict([0.3]) == study.verdict([0.0, 0.0]) == "cannot be told"


def test_diversity_by_hand():
    assert study.distinct(["a b a b", "a b"]) == 2 / 4 and study.distinct(["a b.", "b c."]) == 4 / 4
    assert study.distinct([""]) == 0
    verifiers = {0: {"must": ["Leo", "red"], "must_not": ["Mia", "blue"]}, 1: {"must": ["Mia", "blue"]}}
    assert study.repeated(["Leo had a red hat.", "Mia had a blue hat.", "Leo saw a hat."], verifiers) == 2 / 3


# ------------------------------------------------------------------------------------------------ runs

def test_a_result_of_other_flags_is_not_taken(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps({"flags": ["--lr", "1"], "nll": 3}), "utf-8")
    assert study.known(tmp_path / "test.json", ["--lr", "1"])["nll"] == 3
    assert study.known(tmp_path / "test.json", ["--lr", "2"]) is study.known(tmp_path / "none.json", []) is None
    (tmp_path / "test.json").write_text('{"flags', "utf-8")
    assert study.known(tmp_path / "test.json", ["--lr", "1"]) is None, "torn"


def test_the_best_rate_on_validation_rows_is_taken(monkeypatch):
    args = SimpleNamespace(out="nowhere", seeds=2, rates=[], sft_steps=5, steps=2, rows=None, jobs=1)
    chosen, asked = study.Study(args), []
    monkeypatch.setattr(chosen, "do", lambda what, jobs: asked.extend(jobs))
    scores = {3e-5: 0.1, 1e-4: 0.2, 3e-4: 0.6, 1e-3: 0.4, 3e-3: 0.9}
    monkeypatch.setattr(chosen, "found", lambda flags, lr, seed, split: dict.fromkeys(study.VERIFIER, scores[lr]))
    best = chosen.tune({"SAPO-DPO": "", "SFT": "--loss orpo --lam 0"})
    assert {name: lr for name, (lr, _) in best.items()} == {"SAPO-DPO": 3e-4, "SFT": 3e-3}
    assert {j["split"] for j in asked} == {"validation"} and {j["seed"] for j in asked} == {1} and len(asked) == 1 + 8


MICRO = ("--variants SAPO-DPO,SFT --seeds 1 --ablation-seeds 0 --rates 1e-4 --steps 2 --sft-steps 2 --rows 4 "
         "--jobs 1").split()


@pytest.mark.slow
def test_a_micro_study_runs_and_goes_on_without_repeating(tmp_path, capsys):
    where = ["--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    assert study.main([*MICRO, *where]) == 0
    printed, first = capsys.readouterr().out, json.loads((tmp_path / "figures/study.json").read_text("utf-8"))
    assert printed.count("0 of them done before") == 2
    assert "| untouched base | - |" in printed and "| SFT | 0.0001 |" in printed
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"study.json", "study.md", "study.png", "pairs.png"}
    assert (tmp_path / "figures/study.md").read_text("utf-8") == study.page(study.report(first))
    for row in [v["test"][0] for v in first["variants"].values()]:
        assert set(study.COLUMNS) == set(row) and all(np.isfinite(value) for value in row.values())
    generating = {name: v["stages"]["generating"] for name, v in first["variants"].items() if "stages" in v}
    assert generating["SAPO-DPO"] > 0 == generating["SFT"]
    assert set(first["variants"]["SAPO-DPO"]["pairs"]) == {key for panel in study.PAIRS.values() for key in panel}

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    next((tmp_path / "runs").glob("loss-orpo*/test.json")).unlink()
    assert study.main([*MICRO, *where]) == 0
    again = capsys.readouterr().out
    assert "1 runs, 1 of them done before" in again and "2 runs, 1 of them done before" in again
    changed = {p.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    logs = {p.name for p in (tmp_path / "runs").glob("loss-orpo*.log")}
    assert changed == {"test.json"} | logs, "it was measured again, not trained again"
    assert json.loads((tmp_path / "figures/study.json").read_text("utf-8")) == first


@pytest.mark.slow
def test_a_run_that_fails_ends_the_study_with_its_log(tmp_path, capsys):
    assert study.main([*MICRO, "--out", str(tmp_path / "runs"), "--figures", str(tmp_path), "--sft-steps", "0"]) == 1
    said = capsys.readouterr()
    assert "base-0-seed-1 ended with code 2" in said.err and "give them some SFT" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False], ids=["with rejected", "without"])
def test_the_relatives_run_on_a_checkpoint(tmp_path, capsys, paired):
    config = read_config(DATA / "tiny_model")
    files = companions(DATA / "tiny_model")
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    save_pretrained(model, tmp_path / "model", torch.float32, files)
    keys = {"prompt", "chosen", "rejected"} if paired else {"prompt", "chosen"}
    for name, source, rows in (("train", "train", 20), ("eval", "test", 5)):
        lines = [json.loads(line) for line in (DATA / f"tiny_{source}.jsonl").read_text("utf-8").splitlines()[:rows]]
        kept = [{k: v for k, v in line.items() if k in keys} for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    where = ["--model", tmp_path / "model", "--data", tmp_path / "train.jsonl",
             "--eval-data", tmp_path / "eval.jsonl", "--out", tmp_path / "out"]
    argv = [*map(str, where), *"--steps 1 --max-length 128 --dtype float32 --tokens 4 --samples 1".split()]
    assert real.main([*argv, "--variants", "SFT,SAPO-DPO"] if paired else argv) == 0
    printed = capsys.readouterr().out
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    names = ["SFT", "SAPO-DPO"] if paired else [name for name in real.VARIANTS if "offline" not in name]
    assert [row[0].removeprefix("| ") for row in table] == ["start", *names] and "y+ " in printed
    assert len({row[2] for row in table}) > 1, "something was learnt"
    assert all(float(row[5]) <= 4 for row in table)
