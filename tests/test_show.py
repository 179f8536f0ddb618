"""The pair viewer: its texts are the run's, its numbers the model's, its colours only where somebody sees them."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import show
import train
from buffer import Pair, collate
from losses import score
from machine.text import Text
from machine.folders import load_pretrained
from machine.report import pair_text

ESCAPE = "\033["


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with its pairs.jsonl and model/."""
    out, kept = tmp_path_factory.mktemp("runs") / "tiny", train.draw_curves
    train.draw_curves = lambda folder: None
    assert train.main(["--sft-steps", "3", "--steps", "2", "--show-every", "1", "--eval-rows", "1", "--samples", "0", "--device", "cpu", "--out", str(out)]) == 0
    train.draw_curves = kept
    return out


def triple(run):
    row = show.read_pairs(run, 1)[0]
    return row, Pair(*row["ids"], *row["cuts"])


def text_of(run):
    return Text(show.companions(run / "source"), run / "source", load_pretrained(run / "model").config)


def test_a_folder_without_triples_gets_one_line_and_code_2(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert show.main([str(folder)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "pairs.jsonl is not there" in said.err and not said.out
    (tmp_path / "pairs.jsonl").write_text('{"step": 1}\n', "utf-8")
    assert show.main([str(tmp_path)]) == 2 and "no triples" in capsys.readouterr().err


def test_several_runs_stand_side_by_side_at_their_first_step_and_in_their_last_ten(tmp_path, capsys):
    for name, shift in (("one", 0.0), ("other", 100.0)):
        (tmp_path / name).mkdir()
        rows = [{"sft_step": 1, "loss": 9.0}, {"step": 0, "eval/rows": 4}, *({"step": i, "loss": shift + i} for i in range(1, 21))]
        rows[-1]["ema/distance"] = 0.5
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert show.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["one", "other"] and ["loss", "1", "15.5", "101", "115.5"] in lines
    assert ["ema/distance", "-", "0.5", "-", "0.5"] in lines
    assert show.main([str(tmp_path / "one"), str(tmp_path / "none")]) == 2
    assert "metrics.jsonl is not there" in capsys.readouterr().err


def test_what_is_broken_in_a_run_or_cannot_be_drawn_gets_one_line(run, tmp_path, capsys):
    copy = tmp_path / "cost $\\frac$"
    shutil.copytree(run, copy)
    assert show.main([str(run), str(copy), "--png", str(tmp_path / "both.png")]) == 0, "a $ in a name is a $"
    capsys.readouterr()
    for argv in ([run, "--png", tmp_path / "none/x.png"], [run, "--png", tmp_path / "x.foo"]):
        assert show.main(list(map(str, [*argv, "--n", "1", "--no-model"]))) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (copy / "config.json").write_text("{}")
    assert show.main([str(copy)]) == 2 and "not the config.json of a run" in capsys.readouterr().err
    (copy / "pairs.jsonl").write_text('{"step": 1, "ids": [[1], [2], [3]], "cuts": [0, 1, 1]}\n', "utf-8")
    assert show.main([str(copy)]) == 2 and "no triples" in capsys.readouterr().err


def test_colour_needs_a_terminal_and_is_not_forbidden(run, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen = {}
    for name, terminal, more in (("file", False, []), ("terminal", True, []), ("forbidden", True, ["--no-color"])):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        assert show.main([str(run), "--n", "2", *more]) == 0
        seen[name] = capsys.readouterr().out
    assert ESCAPE not in seen["file"] and seen["file"] == seen["forbidden"]
    assert all(ink in seen["terminal"] for ink in show.INK.values())
    assert re.sub(r"\033\[\d+m", "", seen["terminal"]) == seen["file"]


def test_what_is_shown_is_the_triple(run, capsys):
    (row, pair), text = triple(run), text_of(run)
    for tokens, parts in zip(show.sides(pair, text), (("A", "B", "C"), ("A", "B'", "C"))):
        assert "".join(t.text for t in tokens if t.part == parts[1]) == row[parts[1]]
        assert "".join(t.text for t in tokens if t.part == "C") == (row["C"] if parts[1] == "B" or row["C kept"] else "")
        assert all(row["A"].endswith(t.text.removeprefix("… ")) for t in tokens if t.part == "A")
    assert show.main([str(run), "--n", "1", "--no-model"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"[{row['B'].strip()}]" in shown.replace("[ ", "[") and f"[{row[chr(66) + chr(39)].strip()}]" in shown.replace("[ ", "[")
    assert "nats" not in shown


def test_numbers_are_the_log_probs_of_the_model(run):
    _, pair = triple(run)
    model = load_pretrained(run / "model")
    for y, values in zip((pair.chosen, pair.rejected), show.numbers(pair, model, None)):
        logits = model(torch.tensor([pair.prompt + y]))[0].log_softmax(-1)
        expected = [logits[len(pair.prompt) + i - 1, t].item() for i, t in enumerate(y)]
        assert values == pytest.approx(expected, abs=1e-4) and min(values) < -0.1
    assert not any(v for values in show.numbers(pair, model, model) for v in values), "nothing changed between a model and itself"


def test_the_sums_are_the_two_parts_of_the_gap(run):
    pair, model = Pair([0, 7, 9], [11, 12, 13, 14, 15, 1], [11, 22, 23, 14, 15, 1], 1, 3, 3), load_pretrained(run / "model")
    values = show.numbers(pair, model, None)
    segment, seam = (float(x) for x in re.findall(r"(?:segment|seam) ([-+][\d.]+)", show.sums(pair, values)))
    with torch.no_grad():
        chosen, rejected = score(model, collate([pair]))
    assert segment + seam == pytest.approx((chosen - rejected).item(), abs=0.11)
    ended = Pair([0, 7, 9], [11, 12, 13, 14, 15, 1], [11, 22, 1], 1, 3, 3)
    assert "seam" not in show.sums(ended, show.numbers(ended, model, None)), "y- ended, there is no C in it"


def test_a_picture_is_drawn(run, tmp_path):
    from PIL import Image
    assert show.main([str(run), "--n", "2", "--png", str(tmp_path / "pairs.png")]) == 0
    assert Image.open(tmp_path / "pairs.png").width == 900


def test_parts_of_a_triple_join_to_the_text_where_a_tokenizer_strips_a_first_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = "▁once ▁a ▁small ▁red ▁fox ▁ran ▁home ▁slept".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert tokenizer.decode([1, 2]) == "a small", "the tokenizer strips"
    text = SimpleNamespace(decode=lambda ids, skip=False: tokenizer.decode(ids))
    parts = pair_text(Pair([0], [1, 2, 3, 4, 5, 6], [1, 2, 7, 5, 6], 2, 4, 3), text)
    assert parts["A"] + parts["B"] + parts["C"] == "a small red fox ran home" and parts["A"] + parts["B'"] + parts["C"] == "a small slept ran home"
    assert parts["ids"] == [[0], [1, 2, 3, 4, 5, 6], [1, 2, 7, 5, 6]] and parts["cuts"] == [2, 4, 3]


def test_a_text_does_not_steer_the_screen():
    words = ["x", "one\n", "\033[2J", "a\tb", "two"]
    text = SimpleNamespace(decode=lambda ids, skip=False: "".join(words[i] for i in ids))
    pair = Pair([0], [1, 2, 4], [1, 3, 4], 1, 2, 2)
    lines = show.prints({"step": 0, "row": 0}, pair, text, None, None, 80, False)
    assert lines[2:] == ["y+   one⏎[\ufffd[2J]two", "y-   one⏎[a b]two"]


def test_triples_are_taken_evenly_over_the_run(tmp_path):
    rows = [{"step": i, "row": i, "ids": [], "cuts": []} for i in range(13)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    steps = lambda n: [r["step"] for r in show.read_pairs(tmp_path, n)]
    assert steps(3) == [0, 6, 12] and steps(1) == [0] and steps(99) == list(range(13))
