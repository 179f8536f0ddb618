"""The edges of a run: two that want one folder, streams of random numbers, screens, pipes, links, names, tokenizers, numbers beyond all sense.

Each test is a fault that was found by trying it. Runs are test_run.py's. Left out: deaths and full disks (test_crash.py).
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, oracle
from safetensors.torch import load_file, save_file
from test_crash import plant
from test_refusals import build
from test_refusals import call as call_main
from test_run import (  # noqa: F401
    at_call,
    checkpoints,
    copy,
    differences,
    lines,
    make_world,
    resume,
    run,
    send,
    start,
    stop_at,
    tuned,
    whole,
    world,
)

import sapo
import train
from buffer import Pair, ReplayBuffer
from machine import checkpoint, curves, report
from machine.dataset import Draw
from machine.files import BadInput
from machine.flags import Config, resolved
from machine.parallel import World
from machine.text import read_tokenizer
from sapo import SAPOConfig, State
from train import learning_rate

LIMIT = 60                  # seconds that nothing here takes, unless it waits for ever


class ForEver(BaseException):
    """Something waits, or works, without end. No `except OSError` hides it."""


@contextlib.contextmanager
def soon():
    """ForEver for what would never end."""
    if not hasattr(signal, "SIGALRM"):
        pytest.skip("no alarms here")

    def ring(*_):
        raise ForEver

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ended(process, log):
    """(exit code, what it printed) of a process that must end."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
    return process.exitcode, Path(log).read_text(errors="replace")


def one_error(printed):
    found = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in printed, printed[-2000:]
    return found[0]


# ---------------------------------------------------------------- the run folder's name

def all_have_looked(folder, count, more=None):
    """A hook: each of `count` runs waits, after it has looked at its --out, until all have."""
    original = checkpoint.may_write

    def look(*arguments):
        original(*arguments)
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < count:
            time.sleep(0.01)

    checkpoint.may_write, train.draw_curves = look, lambda folder: None


@pytest.mark.parametrize("what", ["new", "an empty folder", "replaced"])
def test_of_runs_that_start_together_under_one_name_one_has_it_and_the_others_are_told(world, whole, tmp_path, what):
    out, count, more = tmp_path / "here/run", 4, ["--overwrite"] if what == "replaced" else []
    (tmp_path / "looked").mkdir()
    if what == "an empty folder":
        out.mkdir(parents=True)
    if what == "replaced":
        shutil.copytree(whole, out)
    hook = functools.partial(all_have_looked, tmp_path / "looked", count)
    runs = [start([*world, "--out", out, *more], tmp_path / f"{i}.log", hook) for i in range(count)]
    ends = [ended(process, tmp_path / f"{i}.log") for i, process in enumerate(runs)]
    assert sorted(code for code, _ in ends) == [0] + [2] * (count - 1), ends
    for code, printed in ends:
        if code:
            assert "another process" in one_error(printed)
    assert [p.name for p in out.parent.iterdir()] == ["run"] and not differences(whole, out)


def taken(out):
    """A hook: the name is taken by another process in the moment when the old run has made way."""
    original = Path.rename

    def rename(path, target):
        made = original(path, target)
        if Path(path) == out:
            out.mkdir()
            (out / "other").touch()
        return made

    Path.rename, train.draw_curves = rename, lambda folder: None


def full_disk(out):
    """A hook: the disk is full in that moment."""
    original = Path.rename

    def rename(path, target):
        if Path(target) == out and path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return original(path, target)

    Path.rename, train.draw_curves = rename, lambda folder: None


def test_a_run_that_made_way_is_put_back_where_nothing_took_its_place(world, whole, copy):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    one_error(run(copy, *world, "--overwrite", hook=functools.partial(full_disk, copy), code=1))
    assert before == {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file() and p.suffix != ".log"}


def test_a_run_that_made_way_for_another_process_leaves_nothing_hidden(world, copy):
    assert "another process" in one_error(run(copy, *world, "--overwrite", hook=functools.partial(taken, copy), code=2))
    assert [p.name for p in copy.parent.iterdir() if p.suffix != ".log"] == ["copy"] and [p.name for p in copy.iterdir()] == ["other"]


def in_the_same_second(folder):
    train.time.strftime = lambda form: "20261130-120000"
    os.chdir(folder)
    train.draw_curves = lambda folder: None


def test_runs_without_a_name_that_start_in_the_same_second_get_folders_of_their_own(world, tmp_path):
    hook = functools.partial(in_the_same_second, tmp_path)
    runs = [start([*world, "--steps", 0], tmp_path / f"{i}.log", hook) for i in range(3)]
    assert [ended(process, tmp_path / f"{i}.log")[0] for i, process in enumerate(runs)] == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 3


# ---------------------------------------------------------------- streams of random numbers

class Bare(list):
    """Examples without verifiers, as a Data has them."""
    verifiers = {}


def all_streams(monkeypatch, seeds=(41, 42, 43, 44), ranks=range(8), n=4000):
    """{(purpose, rank or epoch, seed): n numbers in [0, 1)} as the classes that draw them have them."""
    drawn, rngs = {}, {}
    policy, data = torch.nn.Linear(1, 1), SimpleNamespace(verifiers={})

    def catch(name):
        return lambda *arguments, **named: rngs.update({name: next(a for a in (*arguments, *named.values()) if isinstance(a, torch.Generator))}) or []

    monkeypatch.setattr(report, "generate", catch("answers"))
    monkeypatch.setattr(report, "generate_segments", catch("held-out sampler"))
    monkeypatch.setattr(report, "split", lambda chosen, segment, eos, rng, *more: rngs.update({"held-out cuts": rng}) or (0, 1))
    for seed in seeds:
        for epoch in range(3):
            for purpose in ("order", "SFT order"):
                draw = Draw(range(n), 4, seed, SimpleNamespace(rank=0, size=1), purpose)
                drawn[purpose, epoch, seed] = draw._order(epoch) / n
        for rank in ranks:
            state = State.start(policy, SAPOConfig(loss="orpo"), [1], seed, copy=lambda model: model, rank=rank, processes=8)
            rngs |= {"cuts": state.cut_rng, "draws": state.buffer.rng, "sampler": state.sample_rng}
            cfg, alone = Config(seed=seed, max_length=9), SimpleNamespace(rank=rank, size=1)
            text = SimpleNamespace(breaks=lambda segment: (), eos=(1,), vocab=None)
            one = sapo.Example([1], [2, 3])
            report.eval_pairs([one], policy, cfg, text, alone, lambda: None)
            report.Evaluation(SimpleNamespace(cfg=cfg, text=text, data=[data, Bare([one])]), alone, None, lambda: None, []).answers(policy, [one])
            dealt = checkpoint.redistribute([{"buffer": {"capacity": 8, "pairs": checkpoint.pack([])}, "ahead": checkpoint.pack([]), "gaps": [],
                                              "eval_pairs": checkpoint.pack([])}] * 9, 9, seed, 3, SimpleNamespace(rank=rank, size=8))
            again = State.start(policy, SAPOConfig(loss="orpo"), [1], seed, copy=lambda model: model)
            again.load_state_dict({"shared": {"step": 3, "ref_version": 0}, "own": dealt})
            rngs |= {"cuts dealt out again": again.cut_rng, "draws dealt out again": again.buffer.rng, "sampler dealt out again": again.sample_rng}
            for purpose, rng in rngs.items():
                numbers = torch.rand(n, generator=rng, dtype=torch.float64).numpy() if isinstance(rng, torch.Generator) else rng.random(n)
                drawn[purpose, rank, seed] = numbers
    return drawn


def test_no_two_streams_of_random_numbers_are_equal_or_correlated(monkeypatch):
    """Of any purpose, on any process, for any seed: an epoch's order, cuts, draws, texts, evaluation."""
    drawn = all_streams(monkeypatch)
    names, n = list(drawn), 4000
    table = np.stack([drawn[name] for name in names])
    assert len(names) == 4 * (2 * 3 + 8 * 9) and len(np.unique(table[:, :8], axis=0)) == len(names)
    for lag in (0, 1):                                   # and none is another, shifted
        related = np.abs(np.corrcoef(table[:, :n - 1], table[:, lag:n - 1 + lag])[:len(names), len(names):])
        related[np.diag_indices(len(names))] = 0
        worst = np.unravel_index(related.argmax(), related.shape)
        assert related.max() < 6 / n ** 0.5, (names[worst[0]], names[worst[1]])      # 97,000 pairs: chance gives 4.6 at most


def test_cuts_and_draws_are_not_the_order_of_an_epoch(world):
    """Integers below one bound, as an order and cuts are drawn: they came from one stream once."""
    state = State.start(torch.nn.Linear(1, 1), SAPOConfig(loss="orpo"), [1], 42, copy=lambda model: model)
    order = Draw(range(50), 2, 42, SimpleNamespace(rank=0, size=1))._order(0)
    assert not np.array_equal(state.cut_rng.permutation(50), order) and not np.array_equal(state.buffer.rng.permutation(50), order)


# ---------------------------------------------------------------- the learning rate

@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
@pytest.mark.parametrize("kind, theirs", [("linear", "get_linear_schedule_with_warmup"), ("cosine", "get_cosine_schedule_with_warmup"),
                                          ("inverse_sqrt", "get_inverse_sqrt_schedule"), ("constant", "get_constant_schedule_with_warmup")])
def test_the_learning_rate_is_transformers_but_a_step_ahead_in_the_warm_up(kind, theirs, warmup):
    oracle("transformers")
    from transformers import optimization
    optimizer, steps = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 3e-4), 120
    more = {"num_training_steps": steps} if kind in ("linear", "cosine") else {}
    rate, = getattr(optimization, theirs)(optimizer, num_warmup_steps=warmup, **more).lr_lambdas
    for step in range(steps):
        ours = learning_rate(step, steps, Config(lr_scheduler=kind, warmup=str(warmup)), 3e-4)
        assert ours == pytest.approx(3e-4 * rate(step + (step < warmup)), rel=1e-12), step


# ---------------------------------------------------------------- tokenizers and templates

def damaged(change):
    raw = json.loads((ROOT / "data/tiny_model/tokenizer.json").read_text())
    change(raw)
    return {"tokenizer.json": json.dumps(raw).encode()}


@pytest.mark.parametrize("change, words", [
    (lambda t: t["model"].update(dropout=0.3), "dropout"),
    (lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 100_000}), "normalizer"),
    (lambda t: t.update(normalizer={"type": "Prepend", "prepend": "x" * 100_000}), "normalizer")], ids=["dropout", "one letter grows", "every text grows"])
def test_a_tokenizer_that_draws_at_random_or_lets_texts_grow_is_refused(change, words):
    with pytest.raises(BadInput, match=words):
        read_tokenizer(damaged(change), "model")


@pytest.mark.parametrize("name, words", [("t_word", "fails on the data"), ("t_uni", "fails on the data"), ("t_bpe", "fails on the data"), ("t_high", "ids go up to"),
                                         ("t_huge", "ids go up to"), ("t_drop", "dropout"), ("j_rand", "error: ")])
def test_hostile_folders_are_refused_in_one_line(shared, tmp_path, name, words):
    subprocess.run([sys.executable, shared / "cases/make_hostile.py", shared / "models/stories260K", tmp_path], check=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Tell of {n} dogs zq.", "chosen": f"{n} dogs \u00df."}) + "\n" for n in range(8)))
    with soon():
        code, err = call_main(tmp_path, f"--model {name} --data rows.jsonl --out out --steps 1 --batch-size 2 --buffer-size 4 --device cpu".split())
    assert code == 2 and words in one_error(err)


@pytest.mark.parametrize("where", ["before the conversation", "before the end of an answer"])
def test_a_template_that_draws_at_random_is_refused_for_what_it_does(tmp_path, where):
    build(tmp_path)
    template = tmp_path / "model/chat_template.jinja"
    text, draw = template.read_text(), "range(1000)|random|string if messages[0].content != 'a' else ''"
    inside = text.replace("+ '<|end|>'", f"+ ({draw} if m.role == 'assistant' else '') + '<|end|>'")
    template.write_text(f"{{{{ {draw} }}}}{text}" if where == "before the conversation" else inside)
    assert template.read_text() != text
    code, err = call_main(tmp_path, "--model model --data rows.jsonl --out out --steps 1 --batch-size 2 --buffer-size 4 --device cpu".split())
    assert code == 2 and "the chat template draws at random" in one_error(err)


# ---------------------------------------------------------------- files that are none

KINDS = {"a pipe": lambda path, kept: os.mkfifo(path), "a device": lambda path, kept: path.symlink_to("/dev/zero"), "a folder": lambda path, kept: path.mkdir(),
         "a link": lambda path, kept: path.symlink_to(kept), "a link to nowhere": lambda path, kept: path.symlink_to(kept.with_name("nothing"))}


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_files_are_read_in_a_checkpoint(copy, tmp_path, kind):
    newest, before = checkpoints(copy)[-1], checkpoints(copy)[-2]
    for path in sorted(newest.iterdir()):
        kept = path.rename(tmp_path / "kept")
        KINDS[kind](path, kept)
        with soon():
            assert checkpoint.newest_checkpoint(copy) == before, path.name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)
    assert checkpoint.newest_checkpoint(copy) == newest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "pairs.jsonl", "config.json", "source/config.json", "source/tokenizer.json"])
def test_a_run_folder_with_something_else_in_a_files_place_is_refused_in_one_line(copy, tmp_path, name, kind):
    if kind == "a link" and name == "config.json":
        return                                           # which is read, and is what it was
    kept = (copy / name).rename(tmp_path / "kept")
    KINDS[kind](copy / name, kept)
    process = start(["--resume", copy], tmp_path / "log")
    code, printed = ended(process, tmp_path / "log")
    assert code == 2 and Path(name).name in one_error(printed)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_is_refused_and_not_waited_for(tmp_path, name):
    build(tmp_path)
    (tmp_path / "model" / name).unlink()
    os.mkfifo(tmp_path / "model" / name)
    with soon():
        code, err = call_main(tmp_path, "--model model --data rows.jsonl --out out --steps 1 --batch-size 2 --buffer-size 4 --device cpu".split())
    assert code == 2 and name in one_error(err)


def test_a_folder_beside_the_checkpoints_is_nobodys_business(whole, copy):
    shutil.copytree(checkpoints(copy)[0], copy / "checkpoint/step-00000099.bak")
    shutil.copytree(checkpoints(copy)[0], copy / "checkpoint/step-old")
    assert checkpoint.newest_checkpoint(copy).name == "step-00000012"
    resume(copy, "--steps", 10, "--keep", 1)
    assert sorted(p.name for p in (copy / "checkpoint").iterdir()) == ["step-00000014", "step-00000099.bak", "step-old"]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("step-99999998", "step-100000000", "step-99999999"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-99999998", "step-99999999", "step-100000000"]


def test_a_change_anywhere_in_the_base_of_an_adapter_is_seen(tmp_path):
    (tmp_path / "out/source").mkdir(parents=True)
    (tmp_path / "out/config.json").write_text("{}")
    base, seen = tmp_path / "model.safetensors", []
    for last in (b"a", b"b"):
        with open(base, "wb") as f:
            f.seek(2**24 + 7)
            f.write(last)
        seen.append(checkpoint.foundations(tmp_path / "out", tmp_path, {}, World("cpu")))
    assert seen[0] != seen[1]


# ---------------------------------------------------------------- names and places

def in_folder(folder, then=None):
    os.chdir(folder)
    then() if then else None
    train.draw_curves = lambda folder: None


def test_a_run_on_relative_paths_goes_on_from_any_folder_and_with_moved_data(whole, world, tmp_path):
    home, moved = tmp_path / "home", tmp_path / "moved"
    home.mkdir()
    flags = make_world(home)
    relative = [os.path.relpath(f, home) if isinstance(f, Path) else f for f in flags]
    run(tmp_path / "run", *relative, hook=functools.partial(in_folder, home, stop_at("sapo_step", 3)))
    resume(tmp_path / "run", hook=functools.partial(in_folder, tmp_path, stop_at("sapo_step", 2)))
    home.rename(moved)
    assert f"{home / 'train.jsonl'}: " in one_error(resume(tmp_path / "run", code=2))
    there = [flag for name in ("train", "base", "test") for flag in ({"train": "--data", "base": "--sft-data", "test": "--eval-data"}[name], moved / f"{name}.jsonl")]
    resume(tmp_path / "run", *there)
    assert [d for d in differences(whole, tmp_path / "run") if d not in ("model/README.md", "policy.json", "ema.json")] == []


@pytest.mark.parametrize("flag", ["--out", "--data", "--model", "--resume"])
def test_a_name_that_is_not_utf8_is_refused_in_one_line(world, tmp_path, flag):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    if flag == "--data":
        shutil.copy(world[3], name)
    if flag == "--model":
        shutil.copytree(world[1], name)
    process = start([*world, "--out", tmp_path / "run", flag, name], tmp_path / "log")
    code, printed = ended(process, tmp_path / "log")
    assert code == 2 and one_error(printed) and not (tmp_path / "run").exists()


def test_a_run_folder_of_another_version_is_refused_in_one_line(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["layout"]
    (copy / "config.json").write_text(json.dumps(config))
    assert f"begin again with --config {copy / 'config.json'}" in one_error(resume(copy, code=2))


@pytest.mark.parametrize("environment, line", [
    ({}, "python train.py --resume 'a run'"), ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "torchrun --nproc_per_node=4 train.py --resume 'a run'"),
    ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "torchrun --nnodes=2 --nproc_per_node=8 train.py --resume 'a run'")], ids=["one", "four", "nodes"])
def test_the_line_to_go_on_with_starts_as_many_processes(environment, line, monkeypatch):
    from machine import process
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process.command("--resume", Path("a run")) == line


def test_a_schedulers_world_size_alone_makes_no_second_process(monkeypatch):
    """It halved the batch, the loss and the held-out rows in silence."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    world = World("cpu")
    assert (world.size, world.rank, world.local, world.many) == (1, 0, 0, False)


# ---------------------------------------------------------------- numbers beyond all sense

@pytest.mark.parametrize("flags", ["--batch-size 1000000000 --buffer-size 1000000000", "--sft-batch-size 1000000000000 --sft-steps 1", "--generate-ahead 1000000000000"])
def test_a_number_far_beyond_the_data_is_refused(tmp_path, flags):
    build(tmp_path)
    with soon():
        code, err = call_main(tmp_path, f"--model model --data rows.jsonl --out out --steps 1 --batch-size 2 --buffer-size 4 --device cpu {flags}".split())
    assert code == 2 and flags.split()[0] in one_error(err)


@pytest.mark.parametrize("flags", [["--steps", 0, "--batch-size", 10**9], ["--steps", 1, "--sft-batch-size", 10**9], ["--steps", 0, "--buffer-size", 1]])
def test_a_batch_size_of_a_stage_that_is_left_out_refuses_nothing(whole, world, tmp_path, flags):
    run(tmp_path / "run", *tuned(world, whole / "model", *flags))


def test_what_a_left_out_stage_would_share_need_not_be_shared_evenly():
    resolved(Config(batch_size=64, steps=0), 512, processes=3)
    with pytest.raises(BadInput, match="--batch-size 64 cannot be shared evenly by 3"):
        resolved(Config(batch_size=64, steps=1), 512, processes=3)


def test_a_buffer_that_does_not_divide_keeps_every_place(tmp_path):
    cfg = SAPOConfig(loss="orpo", buffer_size=5, batch_size=2)
    states = [State.start(torch.nn.Linear(1, 1), cfg, [1], copy=lambda model: model, rank=rank, processes=2) for rank in (0, 1)]
    assert sorted(state.buffer.pairs.maxlen for state in states) == [2, 3]
    for before, after in itertools.product((1, 2, 3, 5), repeat=2):
        parts = []
        for rank in range(before):
            buffer = ReplayBuffer(len(range(rank, 5, before)))
            for i in range(rank, 5, before):
                buffer.add(Pair([1], [2], [3], row=i, step=i))
            parts.append({"buffer": buffer.state_dict(), "ahead": checkpoint.pack([]), "eval_pairs": checkpoint.pack([]), "gaps": []})
        dealt = [checkpoint.redistribute(parts, 30, 42, 3, SimpleNamespace(rank=rank, size=after))["buffer"] for rank in range(after)]
        assert sum(part["capacity"] for part in dealt) == 5
        assert sorted(pair.row for part in dealt for pair in checkpoint.unpack(part["pairs"])) == [0, 1, 2, 3, 4]
        assert all(len(checkpoint.unpack(part["pairs"])) == part["capacity"] for part in dealt)


# ---------------------------------------------------------------- numbers that are none

def test_a_model_whose_answers_have_no_finite_likelihood_is_refused_before_it_trains(whole, world, tmp_path):
    base = shutil.copytree(whole / "model", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    printed = run(tmp_path / "run", *tuned(world, base, "--steps", 3), code=2)
    assert "the NLL of the held-out rows is not finite before the first step" in one_error(printed)
    assert not (tmp_path / "run/model").exists() and not [row for row in lines(tmp_path / "run/metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_without_a_sound_step_ends_with_code_3_and_no_model(world, tmp_path, steps):
    hook = functools.partial(plant, "batch", list(range(1, steps + 1)), str(tmp_path / "note"))
    printed = run(tmp_path / "run", *world, "--steps", steps, hook=hook, code=3)
    assert f"{steps} steps in a row" in one_error(printed) and not (tmp_path / "run/model").exists()


def test_every_line_of_metrics_jsonl_is_json_whatever_the_numbers(world, tmp_path):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    run(tmp_path / "run", *world, hook=functools.partial(plant, "batch", [6], str(tmp_path / "note")))
    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row.get("step") == 6 and "loss" in row] == [None]
    loss = curves.read_curves(tmp_path / "run")["Training loss"]["loss"][1]
    assert np.isnan(loss[5]) and np.isfinite(np.delete(loss, 5)).all()


# ---------------------------------------------------------------- signals and the screen

def count_segments(note):
    """A hook: SIGTERM when the first held-out y- are generated, and a mark in `note` for each call of generate."""
    original = sapo.generate

    def marked(*arguments, **named):
        with open(note, "a") as f:
            f.write("x")
        send(signal.SIGTERM)
        return original(*arguments, **named)

    sapo.generate, train.draw_curves = marked, lambda folder: None


def test_a_run_that_is_stopped_while_held_out_answers_are_made_does_not_make_them_all(world, whole, tmp_path):
    out, note = tmp_path / "run", tmp_path / "note"
    printed = run(out, *world, "--generate-rows", 1, hook=functools.partial(count_segments, str(note)))
    assert len(note.read_text()) == 1 and f"go on with: python train.py --resume {out}" in printed
    resume(out, "--generate-rows", 64)
    assert not differences(whole, out)


def program(folder, *arguments, **how):
    """train.py as a person starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=folder, env=environment, **how)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells what a process has loaded")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1"])
def test_a_signal_while_the_program_is_loaded_ends_it_in_one_line(world, tmp_path, number):
    process = program(tmp_path, *world, "--out", tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():        # it is importing torch
        time.sleep(0.01)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and "stopped before the first step; nothing was written" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["read_data", "read_weights", "starting_model"])
def test_a_signal_while_a_run_prepares_ends_it_at_once(whole, world, tmp_path, name):
    places = {"read_data": "machine.inputs.read_data", "read_weights": "machine.parallel.read_weights", "starting_model": "starting_model"}
    out = tmp_path / "run"
    flags = tuned(world, whole / "model")
    printed = run(out, *flags, hook=stop_at(places[name], 1))
    how = "nothing was written" if name == "read_data" else f"go on with: python train.py --resume {out}"
    assert f"stopped before the first step; {how}" in printed and not (out / "checkpoint").exists()
    if out.exists():
        resume(out)
        assert (out / "model").exists()


def hung_up():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)         # what nohup does
    at_call("sapo_step", 2, functools.partial(send, signal.SIGHUP))


def test_a_signal_that_whoever_started_the_run_has_ignored_stops_nothing(world, whole, tmp_path):
    assert "everything is in" in run(tmp_path / "run", *world, hook=hung_up)
    assert not differences(whole, tmp_path / "run")


@pytest.mark.parametrize("how", ["closed at the start", "a pipe that nobody reads", "a full device"])
def test_a_run_goes_on_without_its_screen(world, whole, tmp_path, how):
    log = open(tmp_path / "log", "wb")
    if how == "a full device" and not os.path.exists("/dev/full"):
        pytest.skip("no such device here")
    if how == "a pipe that nobody reads":
        reader, writer = os.pipe()
        os.close(reader)
        process = program(tmp_path, *world, "--out", tmp_path / "run", stdout=writer, stderr=log)
        os.close(writer)
    elif how == "a full device":
        process = program(tmp_path, *world, "--out", tmp_path / "run", stdout=open("/dev/full", "wb"), stderr=log)
    else:
        process = program(tmp_path, *world, "--out", tmp_path / "run", stdout=subprocess.PIPE, stderr=log, preexec_fn=functools.partial(os.close, 1))
    assert process.wait(4 * LIMIT) == 0, (tmp_path / "log").read_text()
    assert not (tmp_path / "log").read_text() and not differences(whole, tmp_path / "run")
