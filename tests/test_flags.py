"""The command line: presets hold the paper's numbers in full, --help is in groups, and what contradicts itself is refused."""

import contextlib
import dataclasses
import json
import math

import pytest

from machine.flags import GROUPS, LAYOUT, PRESETS, BadInput, Config, command_line, parse, resolved

MODEL = ["--model", "folder", "--data", "rows.jsonl"]


def changed(cfg, other):
    return {f.name: (getattr(cfg, f.name), getattr(other, f.name)) for f in dataclasses.fields(Config) if getattr(cfg, f.name) != getattr(other, f.name)}


def test_paper_dpo_is_what_runs_without_a_preset():
    """Lengths are left open without a preset, for a model with a short context; with the paper's context they are the paper's."""
    plain, paper = parse(MODEL), parse([*MODEL, "--preset", "paper-dpo"])
    assert plain.preset == paper.preset == "paper-dpo"
    assert changed(plain.cfg, paper.cfg) == {"max_length": (None, 2048), "max_prompt_length": (None, 1792)}
    assert resolved(plain.cfg, 32768, 8) == resolved(paper.cfg, 32768, 8)
    assert resolved(plain.cfg, 512, 1).max_length == 512
    with pytest.raises(BadInput, match="more than the model's context of 512; give --max-length 512 --max-prompt-length 448"):
        resolved(paper.cfg, 512, 1)


def test_the_papers_numbers():
    """As the notes of the paper and of the authors' code have them."""
    dpo, orpo = PRESETS["paper-dpo"], PRESETS["paper-orpo"]
    both = dict(max_prompt_length=1792, max_length=2048, segment="256", buffer_size=2000, epochs=4, alpha=0.5, ema_every="2", batch_size=64,
                temperature=0.7, top_k=50, top_p=0.95, seed=42)
    assert both.items() <= dpo.items() and both.items() <= orpo.items()
    assert dict(loss="dpo", beta=0.1, lr=5e-7, lr_scheduler="linear", warmup="10%", optimizer="rmsprop").items() <= dpo.items()
    assert dict(loss="orpo", lam=0.05, lr=5e-6, lr_scheduler="inverse_sqrt", warmup="100", optimizer="adamw").items() <= orpo.items()


def test_nothing_of_the_papers_is_left_to_a_default():
    for preset, others in (("paper-dpo", {"lam"}), ("paper-orpo", {"beta", "ref_refresh", "ref_from"})):
        stated = {f.name for f in dataclasses.fields(Config) if f.metadata["source"].startswith(("paper", "authors"))}
        assert stated - others <= PRESETS[preset].keys() <= {f.name for f in dataclasses.fields(Config)}


def test_help_is_in_groups_with_a_usage_of_three_lines():
    parser = command_line("What it does.")
    assert len(parser.format_usage().strip().splitlines()) == 3
    groups = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups if group.title in GROUPS.values()}
    assert list(groups) == ["method", "model", "data", "optimisation", "output", "machine"]
    assert sorted(name for names in groups.values() for name in names) == sorted(f.name for f in dataclasses.fields(Config))
    wanted = dict(method="alpha segment", model="lora chat_template", data="eval_data max_prompt_length", optimisation="lr warmup optimizer steps",
                  output="keep save_every report_to", machine="device shard seed")
    assert all(name in groups[title] for title, names in wanted.items() for name in names.split())


def test_a_run_goes_on_in_its_own_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"layout": LAYOUT, "settings": dataclasses.asdict(parse(MODEL).cfg), "preset": "paper-dpo"}))
    with pytest.raises(BadInput, match="--resume goes on in the run's own folder; leave out --out"):
        parse(["--resume", str(run), "--out", str(tmp_path / "other")])
    for same in ([], ["--out", str(run)], ["--out", f"{run}/../run/"]):
        assert parse(["--resume", str(run), *same]).cfg.out == str(run)


def test_the_base_of_adapters_may_have_moved(tmp_path):
    for lora in (0, 4):
        settings = dataclasses.asdict(parse([*MODEL, "--lora", str(lora)]).cfg)
        (tmp_path / "config.json").write_text(json.dumps({"layout": LAYOUT, "settings": settings, "preset": "paper-dpo"}))
        with contextlib.nullcontext() if lora else pytest.raises(BadInput, match="--model .* contradicts"):
            assert parse(["--resume", str(tmp_path), "--model", "elsewhere"]).cfg.model == "elsewhere"


@pytest.mark.parametrize("warmup, steps", [("10%", 3), ("10%", 4), ("0%", 9), ("2.5%", 120), ("33%", 100), ("10%", 0), ("7", 3)])
def test_a_share_of_warm_up_is_rounded_up(warmup, steps):
    plain = int(warmup) if "%" not in warmup else math.ceil(steps * float(warmup.strip("%")) / 100)
    assert Config(warmup=warmup).warmup_steps(steps) == plain


def test_tensorboard_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("machine.flags.find_spec", lambda name: None)
    assert parse(MODEL).cfg.report_to == "none"
    with pytest.raises(BadInput, match="pip install tensorboard"):
        parse([*MODEL, "--report-to", "tensorboard"])
