"""The study: that its variants are what their names say, its statistics right, and its runs not done twice.

Oracles: scipy's t, a plain loop of supervised steps, the order of the rows.
"""

import dataclasses
import itertools
import json
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import make_steps
import measure
import real
import sapo
import study
import train
from conftest import ROOT, oracle, small_model
from machine.flags import DATA, parse
from machine.config import read_config
from machine.folders import companions, save_pretrained
from machine.report import passes
from model import Transformer, generate
from sapo import Example, State, sapo_step

EOS, ROWS, BATCH = 2, 12, 4


def variant(name):
    """The Config of a variant, its batches cut to BATCH so that a small model has an epoch of three steps."""
    cfg = parse(["--preset", "tiny", *study.RELATIVES[name][0].split()]).cfg
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


@pytest.mark.parametrize("name", study.RELATIVES)
def test_flags_of_a_variant_are_flags_of_train_and_change_something(name):
    flags, plain = study.RELATIVES[name][0], parse(["--preset", "tiny"]).cfg
    cfg = parse(["--preset", "tiny", *flags.split()]).cfg
    words = flags.replace("--ref-refresh epoch", "").split()             # said, though the preset's
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert given == {k for k in vars(cfg) if getattr(cfg, k) != getattr(plain, k)}


def test_the_preset_is_what_the_documents_say_of_it():
    plain = parse(["--preset", "tiny"]).cfg
    assert (plain.alpha, plain.ema_every, plain.segment) == (0.5, "2", "12")
    assert (plain.ref_refresh, plain.ref_from, plain.score_on) == ("epoch", "ema", "response")
    assert (plain.buffer_size, plain.batch_size) == (16 * study.BATCH, study.BATCH)


@pytest.mark.parametrize("plan", [study.Study(), real.Arithmetic(), real.Again(), real.Constraints()], ids=lambda plan: plan.name)
def test_a_claim_is_about_variants_that_are_studied(plan):
    assert {name for pair in plan.claims.values() for name in pair} <= set(plan.studied) <= set(plan.relatives)
    assert {*plan.alike, *plan.alike.values(), *plan.computed, *plan.in_pairs} <= set(plan.studied)


def documents():
    """What the README and the documents that it names say, one after another."""
    return "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def test_the_documents_have_the_table_of_variants():
    assert study.relatives(study.Study()) in documents(), "paste what this prints: python tools/study.py --relatives"


@pytest.mark.parametrize("plan", [study.Study(), real.Constraints(), real.Arithmetic(), real.Again()],
                         ids=["tiny", "constraints", "arithmetic", "again"])
def test_the_tables_are_those_of_the_numbers_beside_them(plan):
    found = study.read(ROOT / f"docs/figures/{plan.name}.jsonl")
    tables = study.page(study.report(study.Results(found, plan)), plan)
    assert (ROOT / f"docs/figures/{plan.name}.md").read_text("utf-8") == tables
    assert all(row["flags"] == plan.relatives[name][0] for (name, lr, _), row in found.items() if lr)
    base = {seed: row["base"] for (name, _, seed), row in found.items() if name == "base"}
    assert all(row["base"] == base[seed] for (_, lr, seed), row in found.items() if lr), "each from its seed's base"


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


@pytest.mark.parametrize("n", range(2, 11))
def test_p_values_are_scipys(n):
    stats = oracle("scipy.stats")
    for mean in (0.0, 0.3, -2.0, 9.0):
        values = np.random.default_rng(n).normal(mean, 1, n).tolist()
        assert study.p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-12)
    assert study.p_value([0.0] * n) == 1 and study.p_value([0.1]) == 1 and study.p_value([0.5] * n) == 0


def test_holms_correction_by_hand():
    assert study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study.holm([0.9, 0.5]) == [1.0, 1.0] and study.holm([]) == []


def test_a_verdict_needs_a_corrected_p_below_5_percent():
    assert [study.verdict(*x) for x in ((0.1, 0.04), (-0.1, 0.04), (0.1, 0.05), (-0.1, 1.0))] == [
        "holds", "does not hold", "cannot be told", "cannot be told"]


def test_diversity_by_hand():
    assert measure.distinct(["a b a b", "a b"]) == 2 / 4 and measure.distinct(["a b.", "b c."]) == 4 / 4
    assert measure.distinct([""]) == 0
    verifiers = {0: {"must": ["Leo", "red"], "must_not": ["Mia", "blue"]}, 1: {"must": ["Mia", "blue"]}}
    assert measure.repeated(["Leo had a red hat.", "Mia had a blue hat.", "Leo saw a hat."], verifiers) == 2 / 3


def test_the_sums_of_an_answer_are_judged_one_by_one():
    said = "Count 59 - 2 = 57 pens.\nDrops 8: 57 - 8 = 50.\nThen 50 + 2 = 52.\nAnswer: 52 pens."
    assert study.Study().steps_of(said) == [True, False, True] and study.Study().steps_of("Nothing is counted.") == []


@pytest.mark.parametrize("said, right", [
    ("First 9 + 2 = 11.\nThen 11 - 1 = 10.\nAnswer: 10 pens.", True),
    ("Finds 2: 9 + 2 = 11.\nCount 11 - 1 = 10 pens.\nMia keeps 10 pens. ", True),
    ("First 9 + 2 = 12.\nThen 11 - 1 = 10.\nAnswer: 10 pens.", False),                    # a slip
    ("Then 11 - 1 = 10.\nFirst 9 + 2 = 11.\nAnswer: 10 pens.", False),                    # another order
    ("First 9 + 2 = 11.\nNow 2 + 2 = 4.\nThen 11 - 1 = 10.\nAnswer: 10 pens.", False),    # a sum that was not asked
    ("First 9 + 2 = 11.\nCount 11 - 1 = 10 pens.\nAnswer: 11 pens.", False),              # another end
    ("First 9 + 2 = 11.\nCount 11 - 1 = 10 pens.", False),                                 # none
    ("First 9 + 2 = 11.\nThen 11 - 1 = 10.\nCount 8 + 2 = 10 pens.", False),              # a sum for an end
    ("First 9 + 2 = 11.\nThen 11 - 1 = 10.\nAnswer: 110 pens.", False),
    ("First 19 + 2 = 11.\nThen 11 - 1 = 10.\nAnswer: 10 pens.", False)])
def test_an_answer_is_right_if_it_holds_the_sums_in_order_no_others_and_the_end(said, right):
    assert study.right(["9 + 2 = 11", "11 - 1 = 10", "10 pens"], said) is right


# ------------------------------------------------------------------------------------------------ the world

def steps_rows(split):
    return [json.loads(line) for line in (ROOT / f"data/steps_{split}.jsonl").read_text("utf-8").splitlines()]


def test_the_world_is_what_its_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_steps.py", "--out", str(tmp_path)])
    make_steps.main()
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(made) == 9 and all((ROOT / "data" / name).read_bytes() == held for name, held in made.items())


def test_its_rows_are_clean_a_rejected_has_one_slip_and_no_problem_occurs_twice():
    splits = {split: steps_rows(split) for split in ("base", "train", "validation", "test")}
    for row in [row for rows in splits.values() for row in rows]:
        assert study.Study().steps_of(row["chosen"]) == [True] * make_steps.STEPS
    for row in splits["train"] + splits["test"] + splits["validation"]:
        must = row["verifier"]["must"]
        assert study.right(must, row["chosen"]) and passes(row["chosen"], row["verifier"])
        assert not study.right(must, row["rejected"]) and study.Study().steps_of(row["rejected"]).count(False) == 1
    sums = [tuple(study.SUM.findall(row["chosen"])) for rows in splits.values() for row in rows]
    assert len(set(sums)) == len(sums), "no problem occurs twice"


def test_a_test_prompt_is_of_the_kind_that_its_sums_above_30_make_it():
    kinds, rows = study.Study().kinds(), {split: steps_rows(split) for split in ("train", "test")}
    taught = " ".join(row["chosen"] for row in rows["train"])
    for kind, row in zip(kinds, rows["test"], strict=True):
        sums = [line for line in row["verifier"]["must"][:-1] if max(map(int, line.split()[::2])) > 30]
        assert kind == study.KINDS[0 if not sums else 1 if all(f" {line}" in taught for line in sums) else 2], row
    r = SimpleNamespace(runs=["a"], points=lambda *_: [{"passed": "1101"}, {"passed": "0111"}])
    assert study.kinds_table(r, [study.KINDS[i] for i in (1, 0, 0, 1)]).splitlines()[2] == "| a | 0.750 ± 3.176 | 0.750 ± 3.176 |"


def test_a_number_of_the_world_is_one_token():
    tokenizer = Tokenizer.from_file(str(ROOT / "data/steps_model/tokenizer.json"))
    assert all(len(tokenizer.encode(f" {n}").ids) == 1 for n in range(1, make_steps.MOST + 1))


# ------------------------------------------------------------------------------------------------ runs

def line(variant, lr, seed, validation=0.5, right=5):
    """A line of study.jsonl with made-up numbers, `right` of 10 prompts answered right."""
    point = {"steps": 2, "generated": 10, "trained": 20, "tokens": 30, "seconds": 1.0, "passed": "1" * right + "0" * (10 - right),
             "sums": 0.5, "chosen": -1.0, "rejected": -2.0, "validation": validation, "sampled": 0.5}
    marks = ["steps 1", "tokens 0.5", "tokens 1"] if lr else ["start"]
    return (variant, lr, seed), {"variant": variant, "lr": lr, "seed": seed, "points": [point | {"mark": marks}],
                                 "pairs": {"passes": [0.5] * study.BINS} if lr else {}, "memory": 1}


def test_the_bases_come_first_then_the_rates_and_then_the_seeds(monkeypatch):
    seeds, found, plan = (1, 2), {}, study.Study()
    plan.seeds = 2
    longer = [(base, None, seed) for base in ("half the SFT", "twice the SFT") for seed in seeds]
    assert plan.todo(found, ["SAPO-DPO"]) == [("base", None, 1), ("base", None, 2), *longer]
    found |= dict([line("base", None, 2)])
    assert plan.todo(found, ["SAPO-DPO"]) == [("base", None, 1), *longer], "a variant begins from a base that is measured"
    found |= dict([line("base", None, 1)])
    assert plan.todo(found, ["SAPO-DPO"]) == [*(("SAPO-DPO", lr, 1) for lr in (3e-6, 1e-5, 3e-5)), *longer]
    found |= dict(line("SAPO-DPO", lr, 1, score) for lr, score in ((3e-6, 0.6), (1e-5, 0.6), (3e-5, 0.1)))
    plan.bases = {"base": 1}
    assert plan.todo(found, ["SAPO-DPO", "every 4th"]) == [
        ("SAPO-DPO", 1e-5, 2), ("every 4th", 1e-5, 1), ("every 4th", 1e-5, 2)], "of equals the largest; no rates of its own"


def test_a_second_look_has_fresh_seeds_and_a_rate_that_is_given():
    plan, found = real.Again(), {}
    both, seeds = ["SFT", "SAPO-ORPO"], (4, 5, 6)
    assert plan.todo(found, both) == [("base", None, seed) for seed in seeds]
    found |= dict(line("base", None, seed) for seed in seeds)
    assert plan.todo(found, both) == [("SFT", 3e-5, 4), ("SAPO-ORPO", 3e-5, 4)], "no rate is tried"
    for name, right in (("SFT", (5, 5, 6)), ("SAPO-ORPO", (7, 6, 7))):
        found |= dict(line(name, 3e-5, seed, 0.5, r) for seed, r in zip(seeds, right))
    found |= dict(line("SAPO-ORPO", 3e-5, seed, 0.5, 0) for seed in (1, 2, 3))
    (row,) = study.claims(study.Results(found, plan), "steps 1")
    assert row[1:4] == ["SAPO-ORPO - SFT", "+0.133 ± 0.143", "4, 0"] and row[4] == row[5], "the first seeds do not count"


def test_the_next_rate_outward_is_tried_while_the_best_is_the_last_and_five_at_most():
    tried = dict(line("SFT", lr, 1, score) for lr, score in ((3e-5, 0.3), (1e-4, 0.2), (3e-4, 0.1)))
    assert study.Study().chosen_rate("SFT", tried) == (None, [("SFT", 1e-5, 1)])
    tried |= [line("SFT", 1e-5, 1, 0.4)]
    assert study.Study().chosen_rate("SFT", tried) == (None, [("SFT", 3e-6, 1)])
    assert study.Study().chosen_rate("SFT", tried | dict([line("SFT", 3e-6, 1, 0.2)])) == (1e-5, [])
    assert study.Study().chosen_rate("SFT", tried | dict([line("SFT", 3e-6, 1, 0.5)])) == (3e-6, []), "five"


def test_a_claims_row_by_hand_and_a_variant_with_a_run_missing_is_not_shown(monkeypatch):
    found = dict(line("base", None, seed) for seed in (1, 2, 3))
    for name, right in (("SAPO-DPO", (7, 8, 8)), ("SPIN", (5, 6, 5)), ("SFT", (5, 5))):
        found |= dict(line(name, lr, seed, 0.6 if lr == study.Study.first["orpo" if name == "SFT" else "dpo"][1] else 0.5, r)
                      for lr in study.Study.first["orpo" if name == "SFT" else "dpo"] for seed, r in enumerate(right, 1))
    plan = study.Study()
    plan.seeds = 3
    r = study.Results(found, plan)
    assert list(r.runs) == ["base", "SAPO-DPO", "SPIN"] and r.rates["SPIN"] == 1e-5
    (row,) = study.claims(r, "steps 1")
    assert row[:4] == ["SAPO over SPIN", "SAPO-DPO - SPIN", "+0.233 ± 0.143", "7, 0"]
    assert row[4:] == ["0.020", "0.158", "cannot be told"], "eight claims, though seven have no runs yet"
    plan.claims = {"SAPO over SPIN": ("SAPO-DPO", "SPIN")}
    assert study.claims(r, "steps 1")[0][4:] == ["0.020", "0.020", "holds"]


def test_where_no_variant_has_all_its_runs_there_is_nothing_to_show(tmp_path, capsys):
    for lines in ("", json.dumps(line("base", None, 1)[1]) + "\n"):
        (tmp_path / "study.jsonl").write_text(lines, "utf-8")
        assert study.main(["--report", "--figures", str(tmp_path)]) == 0
        assert "nothing to show" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["study.jsonl"]


def test_a_torn_last_line_is_run_again_and_another_process_is_left_alone(tmp_path, monkeypatch):
    path, made, plan = tmp_path / "study.jsonl", [], study.Study()
    path.write_text(json.dumps(line("base", None, 1)[1]) + '\n{"variant": "base", "lr"', "utf-8")
    monkeypatch.setattr(study, "run", lambda plan, job: line(*made[-1])[1])
    monkeypatch.setattr(study, "job_of", lambda plan, args, key, found: made.append(key))
    args, plan.bases, plan.seeds = SimpleNamespace(out=tmp_path, minutes=None), {"base": 1}, 2
    study.go(plan, args, ["SFT"], path)
    rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)               # all are equally good, so the largest is taken, and one beyond it
    assert sorted(made, key=str) == sorted([("base", None, 2), *(("SFT", lr, 1) for lr in rates), ("SFT", 3e-3, 2)], key=str)
    assert len(study.read(path)) == 1 + len(made) == len(path.read_text("utf-8").splitlines()) - 1

    path.unlink()
    with study.held(tmp_path, ("base", None, 1)):
        args.minutes, plan.seeds = 0.01, 1
        assert study.held(tmp_path, ("base", None, 1)) is None
        study.go(plan, args, ["SFT"], path)
    assert not path.exists() and study.held(tmp_path, ("base", None, 1)) is not None


def test_a_run_from_another_base_than_its_seeds_is_refused(tmp_path, monkeypatch):
    plan, args = study.Study(), SimpleNamespace(out=tmp_path, rows=None)
    small_base(tmp_path / "base")
    monkeypatch.setattr(plan, "base", lambda job: tmp_path / "base")
    found = {("base", None, 1): {"base": "0123456789ab"}}
    assert study.job_of(plan, args, ("base", None, 1), found)["fingerprint"] is None
    with pytest.raises(measure.Failed, match="seed 1 .* another machine"):
        study.run(plan, study.job_of(plan, args, ("SFT", 1e-3, 1), found))


@pytest.mark.slow
def test_a_quick_study_runs_and_goes_on_without_repeating(tmp_path, monkeypatch):
    where = "--quick --jobs 2 --figures".split() + [str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    assert study.main(where) == 0
    first = (tmp_path / "study.jsonl").read_text("utf-8")
    assert {p.name for p in tmp_path.glob("*.*")} == {"study.jsonl", "study.md", "study.png", "compute.png", "pairs.png"}
    found = study.read(tmp_path / "study.jsonl")
    assert {key[0] for key in found} == {*study.Study.bases, "SAPO-DPO", "SFT"} and len(found) >= 6 + 2 * (3 + 1)
    for (variant, lr, seed), row in found.items():
        marks = [mark for point in row["points"] for mark in point["mark"]]
        assert sorted(marks) == (sorted(["steps 1", "tokens 0.5", "tokens 1"]) if lr else ["start"])
        last = row["points"][-1]
        assert (last["generated"] > 0) == (variant == "SAPO-DPO") and set(last["passed"]) <= {"0", "1"}
        assert not lr or last["tokens"] >= 10_000 and last["steps"] >= 8 and row["points"] != found["base", None, seed]["points"]
    lines = first.splitlines(keepends=True)
    (tmp_path / "study.jsonl").write_text("".join(lines[:-1]), "utf-8")
    assert study.main(where) == 0
    again = (tmp_path / "study.jsonl").read_text("utf-8").splitlines(keepends=True)
    strip = lambda text: {k: v for k, v in json.loads(text).items() if k != "memory"} | {"points": [
        {k: v for k, v in point.items() if k != "seconds"} for point in json.loads(text)["points"]]}
    assert again[:-1] == lines[:-1] and strip(again[-1]) == strip(lines[-1]), "the one run that was missing, to the digit"


# ------------------------------------------------------------------------------------------------ a real checkpoint

ANSWERS = ("The sky is blue.", "It rains. Take an umbrella!", "Paris", "Why not? Because.", "\"Hi\" means hello, he said.")


@pytest.mark.parametrize("demand", range(len(real.DEMANDS)), ids=[words for words, *_ in real.DEMANDS])
def test_an_edited_answer_meets_its_demand_and_few_others_do(demand):
    edited = [real.DEMANDS[demand][1](answer) for answer in ANSWERS]
    assert sum(real.meets(demand, answer) for answer in edited) >= 4, "an answer that cannot be edited so is put another"
    assert sum(real.meets(demand, answer) for answer in ANSWERS) <= 2 and not real.meets(demand, "")
    others = [edit(answer) for i, (_, edit, _) in enumerate(real.DEMANDS) if i != demand for answer in ANSWERS]
    assert sum(real.meets(demand, answer) for answer in others) < len(others) / 2


@pytest.mark.parametrize("asked, said, right", [
    ("3*4", "12", True), ("3*4", "13", False), ("10/3", "3.33", True), ("80*25*.01", "20", True), ("(8+2)/10", "1", True),
    ("9**9", "387420489", False), ("1/0", "0", False), ("3 4", "12", False), ("__import__", "1", False), ("2+2", "4x", False),
    ("08+1", "9", False), (".", "0", False)])
def test_an_annotation_is_right_where_both_sides_are_equal_numbers(asked, said, right):
    assert real.right_step(asked, said) is right


def test_worked_arithmetic_passes_with_right_steps_and_the_form_of_its_end():
    passes_, good = real.Arithmetic().passes, "He has 3*4 = <<3*4=12>>12 eggs.\nThen <<12-2=10>>10.\n#### 10"
    assert passes_(good) and not passes_(good.replace("=10>>", "=11>>")) and not passes_(good + " eggs")
    assert not passes_("#### 10") and not passes_(good.split("\n####")[0])
    with warnings.catch_warnings(record=True) as warned:                 # Python warns of what looks like a call
        assert not real.right_step("3(4)", "12") and not real.right_step("(1+2) (4)", "12") and real.right_step("3*(4)", "12")
    assert not warned


def rows_file(path, prompts, answer):
    path.write_text("".join(json.dumps({"prompt": p, "chosen": answer(i)}) + "\n" for i, p in enumerate(prompts)), "utf-8")
    return str(path)


@pytest.mark.parametrize("task", [real.Arithmetic, real.Constraints])
def test_the_splits_share_no_row_and_each_right_answer_passes_where_its_fault_does_not(task, tmp_path):
    plan = task()
    plan.files = [rows_file(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(n)], lambda i:
                            f"Take <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}" if task is real.Arithmetic else f"It is {i}.")
                  for name, n in (("train", 600), ("test", 130))]
    splits = plan.splits()
    assert {split: len(rows) for split, rows in splits.items()} == plan.sizes
    prompts = [prompt for rows in splits.values() for prompt, *_ in rows]
    assert len(set(prompts)) == len(prompts)
    assert all(check(chosen) and not check(fault) for rows in splits.values() for _, chosen, fault, check in rows)


@pytest.mark.slow
def test_a_quick_study_of_a_checkpoint_runs(tmp_path, monkeypatch):
    model, files = small_base(tmp_path / "model"), []
    for name, n in (("train", 560), ("test", 110)):
        files.append(rows_file(tmp_path / f"{name}.jsonl", [f"What is {i}?" for i in range(n)], lambda i: f"It is {i}."))
    monkeypatch.chdir(tmp_path)
    argv = ["constraints", "--model", model, "--data", files[0], "--eval-data", files[1],
            *"--steps 2 --tokens 900 --sft-steps 1 --rows 16 --seeds 2 --variants SFT,SAPO-DPO,offline --out out".split()]
    with pytest.raises(SystemExit):
        real.main(argv)
    argv[argv.index("SFT,SAPO-DPO,offline")] = "SFT,SAPO-DPO,offline DPO"
    assert real.main([*argv, "--figures", str(tmp_path)]) == 0
    found = study.read(tmp_path / "constraints.jsonl")
    assert {key[0] for key in found} == {"start", "base", "SFT", "SAPO-DPO", "offline DPO"}
    base, start = (study.at(found[name, None, 1], "start") for name in ("base", "start"))
    assert base["chosen"] != start["chosen"], "the base was trained"
    own = [json.loads(line)["rejected"] for line in (tmp_path / "out/base-1-seed-1-train.jsonl").read_text().splitlines()]
    assert len(set(own)) > 20 and "It is 330." not in own, "the base's own answers"
    assert study.at(found["offline DPO", 1e-5, 1], "steps 1")["generated"] == 0
    assert "| offline DPO |" in (tmp_path / "constraints.md").read_text("utf-8")


def small_base(folder):
    config, files = read_config(DATA / "tiny_model"), companions(DATA / "tiny_model")
    save_pretrained(Transformer(config).init_weights(torch.Generator().manual_seed(0)), folder, torch.float32, files)
    return str(folder)
