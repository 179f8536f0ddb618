"""What a run shows: its introduction, a line's speed and time left, curves as points, TensorBoard, and what --keep 0 leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import show
import train
from conftest import oracle
from machine import curves, report
from machine.flags import Config

FLAGS = "--sft-steps 2 --steps 3 --eval-rows 2 --samples 1 --eval-tokens 3 --batch-size 4 --sft-batch-size 4 --buffer-size 8 --device cpu".split()


def run(out, *flags, code=0):
    assert train.main([*FLAGS, *map(str, flags), "--out", str(out)]) == code
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps, evaluated after each."""
    return run(tmp_path_factory.mktemp("runs") / "first", "--eval-every", 1, "--keep", 0)


# ---------------------------------------------------------------- the introduction

def introduced(lengths, segment="256", **more):
    ends = np.cumsum(np.array([[3, n, 0] for n in lengths])).reshape(-1, 3)
    inputs = SimpleNamespace(cfg=Config(segment=segment, **more), steps=25, data=[SimpleNamespace(ends=ends)])
    world = SimpleNamespace(size=1, device=torch.device("cpu"))
    return "\n".join(report.introduction(torch.nn.Linear(1000, 500, bias=False), inputs, world))


def test_short_responses_are_pointed_at_the_flag_to_use():
    warning = "are no longer than --segment 256, so they are replaced whole; give --segment 50%"
    said = introduced([257, 10, 300, 40, 2])             # an end token is no part of B
    assert f"warning: 80% of the responses (median 39 tokens) {warning}" in said
    assert "warning" not in introduced([258, 300, 10, 9]) and "warning" not in introduced([9, 9], "50%")
    assert "warning" not in introduced([9, 9], rejected="data") and "warning" not in introduced([9, 9], "sentence")


def test_it_says_how_many_steps_are_warm_up_and_what_a_checkpoint_will_weigh():
    said = introduced([400])
    assert "25 SAPO steps of 64 pairs, 3 of them warm-up" in said and "0 of them warm-up" in introduced([400], warmup="0")
    assert "a checkpoint will take 8 MB; there will be one every 100 steps, and 2 kept" in said       # policy, EMA, reference, one moment
    assert "10 MB" in introduced([400], optimizer="adamw") and "6 MB" in introduced([400], loss="orpo")


def test_a_checkpoint_weighs_what_was_said(tmp_path, capsys):
    out = run(tmp_path / "run", "--keep", 1)
    files = list((out / "checkpoint").glob("*/*.safetensors"))
    weigh = sum(p.stat().st_size for p in files if p.name.split(".")[0] in ("policy", "ema", "reference", "optimizer")) / 1e6
    said = float(capsys.readouterr().out.partition("a checkpoint will take ")[2].split()[0])
    assert abs(weigh - said) < 0.6 and len(files) == 6


# ---------------------------------------------------------------- a step's line

def test_lines_are_due_at_first_each_so_many_steps_and_once_a_minute(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    pace, said = report.Pace(0, 40, 10), {}
    for step in range(1, 41):
        clock[0] += 25.0 if step > 30 else 2.0           # it becomes slow
        said[step] = pace(step)
    assert [step for step, line in said.items() if line] == [1, 2, 5, 10, 20, 30, 33, 36, 39, 40]
    assert said[10] == "2 s/step, 01:00 left" and said[36] == f"{(60 + 150) / 36:.2g} s/step, 00:23 left"
    resumed = report.Pace(100, 1000, 10)
    clock[0] += 3
    assert resumed(101) == "" and resumed(110) == "0.3 s/step, 04:27 left"


def test_without_a_terminal_each_line_has_rate_speed_and_time_left_and_each_figure_its_n(tmp_path, capsys):
    run(tmp_path / "run", "--eval-every", 2)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("SFT step", "SAPO step"))]
    assert [line.split()[:3] for line in lines] == [[name, "step", f"{i}/{n}"] for name, n in (("SFT", 2), ("SAPO", 3)) for i in range(1, n + 1)]
    assert all("  lr " in line and " s/step, 00:0" in line and line.endswith(" left") for line in lines)
    assert "reward margin " in lines[-1] and "reward accuracy " in lines[-1] and "staleness " in lines[-1]
    assert "\nstep 2: 2 held-out rows, 2 of them with a verifier\neval " in said and "\n\n2 held-out rows, 2 of them with a verifier\neval " in said
    assert "prompt  <s><|user|>Write a short story" in said, "roles are seen"


# ---------------------------------------------------------------- --keep 0

def test_keep_0_leaves_no_checkpoint_and_a_resume_never_begins_again(folder, capsys):
    assert not (folder / "checkpoint").exists() and (folder / "model").is_dir()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"no checkpoint is left to go on from (--keep 0 has none); start anew from --model {folder / 'model'}" in said and said.count("\n") == 1
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_with_keep_0_there_is_one_checkpoint_while_it_trains(tmp_path, monkeypatch):
    seen, finish = [], train.Run.finish

    def watched(run):
        seen.extend(sorted(p.name for p in (run.out / "checkpoint").iterdir()))
        finish(run)

    monkeypatch.setattr(train.Run, "finish", watched)
    run(tmp_path / "run", "--keep", 0, "--save-every", 1)
    assert seen == ["step-00000005"] and not list((tmp_path / "run").glob("*checkpoint*"))


# ---------------------------------------------------------------- pictures

def test_the_curves_begin_with_the_starting_model(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    panels = curves.read_curves(folder)
    assert panels["rows"] == 2
    for key, (steps, values) in panels["Held-out rows"].items():
        assert steps.tolist() == [0, 1, 2, 3]
        start = next(row for row in rows if "eval/start/nll" in row)["eval/start/" + key.split("/", 2)[2]]
        assert values.tolist() == [start] + [row[key] for row in rows if key in row]
    assert panels["Training loss"]["loss"][0].tolist() == [1, 2, 3], "the starting model has no training loss"


def figure_of(monkeypatch, folders, path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    curves.draw_runs(folders, path)
    return kept[0]


def test_a_picture_has_a_title_plain_labels_units_and_n(folder, tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, [folder], tmp_path / "a.png")
    assert figure.get_suptitle() == "SAPO: first" and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(axes) == [title for title, _, _ in curves.PANELS]
    assert {axis.get_xlabel() for axis in axes.values()} == {"step"} and axes["Held-out rows"].get_ylabel() == "share of 2 rows"
    words = [line.get_label() for axis in axes.values() if axis.get_legend() for line in axis.lines]
    assert len(words) == 9 and not [word for word in words if "/" in word or word.startswith("_")]


def test_a_run_of_no_steps_has_its_starting_model_drawn(tmp_path, monkeypatch):
    out = run(tmp_path / "run", "--steps", 0)
    figure = figure_of(monkeypatch, [out], tmp_path / "b.png")
    assert [axis.get_title() for axis in figure.axes] == ["Held-out rows"] and all(len(line.get_xdata()) == 1 for line in figure.axes[0].lines)


def test_runs_are_drawn_together_each_in_its_colour(folder, tmp_path, monkeypatch, capsys):
    other = run(tmp_path / "second", "--lr", 1e-3)
    figure = figure_of(monkeypatch, [folder, other], tmp_path / "c.png")
    lines = figure.axes[0].lines
    assert [word.get_text() for word in figure.legends[0].get_texts()] == ["first", "second"]
    assert [line.get_color() for line in lines] == [line.get_color() for line in figure.legends[0].get_lines()] == ["C0", "C1"]
    capsys.readouterr()
    assert show.main([str(folder), str(other), "--png", str(tmp_path / "d.png")]) == 0
    assert (tmp_path / "d.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and str(tmp_path / "d.png") in capsys.readouterr().out
    assert show.main([str(folder), str(tmp_path / "nowhere"), "--png", str(tmp_path / "e.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "e.png").exists()


# ---------------------------------------------------------------- TensorBoard

def scalars(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_gets_every_metric_and_a_resume_leaves_no_step_twice(tmp_path, monkeypatch):
    oracle("tensorboard")
    flags = ["--report-to", "tensorboard", "--save-every", 2]
    step, calls = train.sapo_step, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the machine fails")
        return step(*arguments)

    monkeypatch.setattr(train, "sapo_step", dies)
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", *flags, "--steps", 5)      # steps 1 to 3 are reported, and step 2 is the last that was saved
    assert [s for s, _ in scalars(tmp_path / "run")["loss"]] == [3, 4, 5]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = scalars(tmp_path / "run")
    assert seen["loss"] == [(2 + r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in rows if "loss" in r and "step" in r]
    assert seen["SFT/loss"] == [(r["sft_step"], pytest.approx(r["loss"], rel=1e-6)) for r in rows if "sft_step" in r]
    assert seen["eval/start/nll"][0][0] == 2 and "rewards/margins" in seen and "step" not in seen


def test_without_the_flag_nothing_of_it_is_imported_or_written(folder):
    assert not (folder / "tensorboard").exists()
