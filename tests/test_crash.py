"""Killed, told to stop, out of disk, out of numbers, or handed broken files: no run is lost, and none differs in silence.

    python tests/test_crash.py --kills 40       kill 40 runs by SIGKILL, a third of them inside a checkpoint write, and resume each to its end
    python tests/test_crash.py --signals 20     SIGTERM and SIGINT in each stage
    python tests/test_crash.py --soak 5000      so many steps at a stretch: memory, speed, buffer

A run is one of test_run.py's, and "equal" is its `differences`: weights, EMA, optimizer, buffer, generators, logs, samples, bit for bit.
"""

import argparse
import errno
import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_run import (  # noqa: F401
    at_call,
    checkpoints,
    copy,
    differences,
    everything,
    lines,
    make_world,
    metrics,
    resume,
    run,
    send,
    start,
    stop_at,
    whole,
    world,
)

import sapo
import train
from buffer import unpack
from machine import checkpoint, folders
from machine.checkpoint import from_disk, newest_checkpoint, write_checkpoint
from machine.parallel import World

SIGKILL = getattr(signal, "SIGKILL", None)


# ---------------------------------------------------------------- every write of a run, counted

def at_write(number, where, action, note=None):
    """A hook: `action(path)` at the number-th operation that changes something at a path containing `where`.

    Python tells its audit hooks of every open, rename, truncation and removal before it happens; safetensors writes from
    Rust, so its save is counted here, and the action finds the file half written. With `note`, each is a line there.
    """
    events, count = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}, itertools.count(1)
    handle = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if note else None

    def happened(event, path):
        if where in path:
            if handle:
                os.write(handle, f"{event} {path}\n".encode())
            if next(count) == number:
                action(path)

    def audit(event, arguments):
        if event in events and isinstance(arguments[0], (str, bytes, os.PathLike)):
            if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                happened(event, os.fsdecode(arguments[0]))

    def save(original, tensors, path, *more, **named):
        nonlocal action
        act = action

        def half(path):
            original(tensors, path, *more, **named)
            os.truncate(path, os.path.getsize(path) // 2)
            act(path)

        action = half
        happened("save", str(path))
        action = act
        original(tensors, path, *more, **named)

    for module in (checkpoint, folders, safetensors.torch):     # the last is what huggingface_hub takes
        module.save_file = functools.partial(save, module.save_file)
    sys.addaudithook(audit)
    train.draw_curves = lambda folder: None


def die(path):
    os.kill(os.getpid(), SIGKILL)


def killed_at(number, where):
    return functools.partial(at_write, number, where, die)


def fail(path):
    raise OSError(errno.ENOSPC, "No space left on device", path) if Path(path).suffix != ".safetensors" else SafetensorError("Error while serializing: No space left")


def writes(world, folder):
    """What an undisturbed run writes: [(operation, path)]."""
    run(folder / "counted", *world, hook=functools.partial(at_write, 0, str(folder / "counted"), die, str(folder / "writes")))
    return [tuple(line.split(" ", 1)) for line in (folder / "writes").read_text().splitlines()]


def go_on(out, world, **more):
    """What a person does after a crash: resume, or begin where there is nothing to resume."""
    return resume(out, **more) if (out / "config.json").exists() else run(out, *world, **more)


def end(process, limit=120):
    process.join(limit)
    return process.exitcode


# ---------------------------------------------------------------- SIGKILL

def kill_runs(count, world, whole, folder, seed=0):
    """Kill `count` runs, every third while a checkpoint is written, half of them once more on the way; returns what went wrong."""
    rng, wrong, inside = random.Random(seed), [], 0
    log = writes(world, folder)
    spots = {"/checkpoint/": sum("/checkpoint/" in path for _, path in log), "/": len(log)}
    began = time.monotonic()
    run(folder / "timed", *world)
    seconds = time.monotonic() - began
    for i in range(count):
        out, deaths = folder / f"run-{i}", []
        for attempt in range(1 + rng.randrange(2)):
            argv = ["--resume", out] if (out / "config.json").exists() else [*world, "--out", out]
            while True:
                place = ("/checkpoint/", "/", "clock")[(i + attempt) % 3]
                hook = None if place == "clock" else killed_at(rng.randrange(1, spots[place] // (1 + attempt)), str(out) if place == "/" else f"{out}{place}")
                process = start(argv, folder / f"run-{i}.log", hook)
                if place == "clock":
                    process.join(rng.uniform(0, seconds))
                    process.kill()
                code = end(process)
                if code == -SIGKILL or attempt:
                    break
                shutil.rmtree(out, ignore_errors=True)   # it was faster than the clock: again
            deaths += [place] * (code == -SIGKILL)
        go_on(out, world)
        inside += "/checkpoint/" in deaths
        bad = differences(whole, out) + [str(p) for p in out.rglob(".*")]
        wrong += [f"run {i}, killed at {deaths}: {bad}"] if bad else []
        print(f"run {i}: killed at {', '.join(deaths)}: {'equal' if not bad else bad}", flush=True)
        if not bad:
            shutil.rmtree(out)
    print(f"{count - len(wrong)} of {count} killed runs end equal to the one that nothing disturbed; {inside} were killed inside a checkpoint write")
    return wrong


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(world, whole, tmp_path):
    assert not kill_runs(4, world, whole, tmp_path)


@pytest.mark.parametrize("word, number", [("/checkpoint/.step-00000006.tmp", 3), ("/checkpoint/step-00000006", 1)], ids=["half a file", "before it has its name"])
def test_a_death_inside_a_checkpoint_write_leaves_the_one_before(world, whole, tmp_path, word, number):
    out = tmp_path / "run"
    log = writes(world, tmp_path) if "step-00000006" == word[-13:] else None
    number = next(i for i, (event, path) in enumerate(log, 1) if event == "os.rename" and "/.step-00000006.tmp" in path) if log else number
    hook = killed_at(number, str(out)) if log else killed_at(number, f"{out}{word}")
    assert end(start([*world, "--out", out], tmp_path / "log", hook)) == -SIGKILL
    assert [p.name for p in checkpoints(out)] == ["step-00000002", "step-00000004"] and list(out.glob("checkpoint/.*"))
    resume(out)
    assert not differences(whole, out) and not list(out.rglob(".*"))


# ---------------------------------------------------------------- a power cut: what a checkpoint counts on was flushed before it got its name

def watch_the_disk(out, note):
    """A hook: complain in `note` where a checkpoint gets its name before its files and the logs are on the disk, or an old one goes too early."""
    flushed, fsync, rename, rmtree = {}, os.fsync, Path.rename, shutil.rmtree
    key = lambda path: (os.stat(path).st_ino, os.stat(path).st_size if os.path.isfile(path) else 0)

    def say(words):
        with open(note, "a") as f:
            f.write(words + "\n")

    def recorded(handle):
        stat = os.fstat(handle)
        flushed[stat.st_ino, stat.st_size if os.path.isfile(f"/dev/fd/{handle}") else 0] = True
        fsync(handle)

    def renamed(source, target):
        if "step-" in Path(target).name and source.suffix == ".tmp":
            needed = [source, *source.iterdir(), out / "metrics.jsonl", out / "pairs.jsonl"]
            for path in needed:
                if key(path) not in flushed:
                    say(f"{path} was not flushed when {target} got its name")
            flushed.clear()
            say("named")
        return rename(source, target)

    def removed(path, *more, **named):
        if Path(path).name.startswith("step-") and key(out / "checkpoint") not in flushed:
            say(f"{path} was removed before the new one's name was flushed")
        return rmtree(path, *more, **named)

    os.fsync, Path.rename, shutil.rmtree, train.draw_curves = recorded, renamed, removed, lambda folder: None


def test_a_checkpoint_gets_its_name_only_when_the_disk_holds_it_and_the_logs(world, tmp_path):
    run(tmp_path / "run", *world, hook=functools.partial(watch_the_disk, tmp_path / "run", str(tmp_path / "note")))
    assert (tmp_path / "note").read_text().splitlines() == ["named"] * 6


def test_pruning_never_takes_the_checkpoint_just_written(tmp_path):
    """A later one lies there torn, after a resume from before it: it does not count among those kept."""
    alone = World("cpu")
    for n in (2, 4, 6):
        write_checkpoint(tmp_path / f"checkpoint/step-{n:08d}", {"shared": {"n": n}, "own": {}}, 9, alone)
    (checkpoints(tmp_path)[-1] / "shared.json").write_text("torn")
    assert newest_checkpoint(tmp_path).name == "step-00000004"
    write_checkpoint(tmp_path / "checkpoint/step-00000005", {"shared": {"n": 5}, "own": {}}, 1, alone)
    assert newest_checkpoint(tmp_path).name == "step-00000005"
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


def test_processes_wait_for_the_disk_after_each_part(tmp_path, monkeypatch):
    """Else they would be at the next part's gathers while the first process writes, and NCCL gives them half an hour."""
    done, world = [], World("cpu")
    monkeypatch.setattr(checkpoint, "to_disk", lambda value, name, folder: done.append(name))
    monkeypatch.setattr(world, "all", lambda value: done.append("all") or [value])
    write_checkpoint(tmp_path / "checkpoint/step-00000001", {"policy": {}, "shared": {}, "own": {}}, 1, world)
    assert [name for name in done if name != "all"] == ["policy", "shared", "rank-0"]
    assert all(done[i + 1] == "all" for i, name in enumerate(done) if name != "all")


# ---------------------------------------------------------------- signals

def count_steps(name, number, signum, note):
    """A hook: the signal at a call, and in `note` a mark for each step that begins after it."""
    sent = []
    at_call(name, number, lambda: (sent.append(1), send(signum)))
    for step in ("sft_step", "sapo_step"):
        def marked(*arguments, original=getattr(train, step)):
            if sent:
                with open(note, "a") as f:
                    f.write("x")
            return original(*arguments)
        setattr(train, step, marked)


STAGES = {"SFT": ("sft_step", 1, 3), "generation": ("sapo.generate", 2, 4), "training": ("sapo.preference_loss", 2, 9),
          "evaluation": ("machine.report.score", 2, 8), "saving": ("machine.checkpoint.to_disk", 5, 29)}
SIGNALS = [(stage, name, number, signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) for i in (0, 1)
           for stage, (name, *numbers) in STAGES.items() for number in numbers[i:i + 1]]


def stop_and_go_on(world, whole, out, name, number, signum):
    """What went wrong when a run got a signal at a call of `name` and was resumed: a list."""
    note = out.with_suffix(".steps")
    printed = run(out, *world, hook=functools.partial(count_steps, name, number, signum, str(note)))      # exit code 0
    bad = [] if f"go on with: python train.py --resume {out}" in printed else ["does not say how to go on"]
    bad += ["more than a step began after the signal"] if note.exists() and len(note.read_text()) > 1 else []
    resume(out)
    return bad + differences(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("stage, name, number, signum", [s for i, s in enumerate(SIGNALS) if i in (1, 7, 14, 22, 38)], ids=lambda x: str(x) if isinstance(x, str) else "")
def test_a_signal_saves_within_a_step_and_says_how_to_go_on(world, whole, tmp_path, stage, name, number, signum):
    assert not stop_and_go_on(world, whole, tmp_path / "run", name, number, signum)


def test_the_line_to_go_on_with_quotes_a_path_with_a_blank(world, tmp_path):
    out = tmp_path / "a run"
    printed = run(out, *world, hook=stop_at("sapo_step", 2))
    assert f"go on with: python train.py --resume {shlex.quote(str(out))}" in printed and "'" in shlex.quote(str(out))


def twice():
    send(signal.SIGINT)
    send(signal.SIGINT)


@pytest.mark.parametrize("name, number", [("sapo_step", 4), ("machine.checkpoint.to_disk", 20)], ids=["training", "saving"])
def test_a_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(world, whole, tmp_path, name, number):
    out = tmp_path / "run"
    assert "stopped at once; the last checkpoint stands" in run(out, *world, hook=functools.partial(at_call, name, number, twice), code=130)
    assert not list(out.glob("checkpoint/.*"))
    resume(out)
    assert not differences(whole, out)


# ---------------------------------------------------------------- damage

def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE = {"cut short": lambda p: os.truncate(p, p.stat().st_size - 2), "cut in half": lambda p: os.truncate(p, p.stat().st_size // 2),
          "emptied": lambda p: os.truncate(p, 0), "deleted": lambda p: p.unlink(), "first bit flipped": lambda p: flip(p, 0), "last bit flipped": lambda p: flip(p, -1),
          **{f"bit {b} flipped": functools.partial(lambda p, b: flip(p, b % (8 * p.stat().st_size)), b=b) for b in (7919, 104729, 15485863, 179424673)}}


def test_every_damage_to_every_file_of_a_checkpoint_is_seen(copy, capsys):
    newest, before = checkpoints(copy)[-1], checkpoints(copy)[-2]
    files, cases = sorted(newest.iterdir()), 0
    assert {p.stem for p in files} == {"policy", "ema", "reference", "optimizer", "shared", "rank-0", "manifest"} and len(files) == 13
    stale = {"that of another step": lambda p: p.write_bytes((before / p.name).read_bytes())}
    for path in files:
        content = path.read_bytes()
        for what, damage in (DAMAGE | stale).items():
            damage(path)
            if path.exists() and path.read_bytes() == content:
                continue                                 # both steps have the same
            assert newest_checkpoint(copy) == before, f"{path.name} {what}"
            assert f"passing over {newest}" in capsys.readouterr().err
            path.write_bytes(content)
            cases += 1
    assert cases > 130 and newest_checkpoint(copy) == newest and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["policy.safetensors", pytest.param("rank-0.json", marks=pytest.mark.slow), pytest.param("manifest.json", marks=pytest.mark.slow)])
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_run_ends_the_same(whole, copy, name):
    flip(checkpoints(copy)[-1] / name, 8 * 40)
    printed = resume(copy)
    assert f"passing over {checkpoints(copy)[-1]}" in printed and "6 SAPO steps done" in printed
    assert not differences(whole, copy)


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_where_no_checkpoint_is_whole_the_run_stops_and_touches_nothing(copy):
    for folder in checkpoints(copy):
        flip(folder / "policy.safetensors", 8 * 99)
    before = tree(copy)
    assert "no checkpoint is whole" in resume(copy, code=2)
    assert tree(copy) == before


BESIDE = ["config.json", "source/config.json", "source/tokenizer.json", "source/tokenizer_config.json", "source/generation_config.json", "source/chat_template.jinja"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("config.json", "source/config.json") else pytest.mark.slow) for n in BESIDE])
def test_damage_beside_the_checkpoints_stops_the_run_in_one_line(copy, name):
    path, content = copy / name, (copy / name).read_bytes()
    digits = [8 * m.start() for m in re.finditer(rb"(?<=\d)\d|(?<=[\w ])[a-z](?=[a-z])", content)][3::len(content) // 5]    # another number, another word
    changes = DAMAGE | {f"another value at {b // 8}": functools.partial(flip, bit=b) for b in digits}
    for what, damage in changes.items():
        damage(path)
        before = tree(copy / "checkpoint")
        printed = resume(copy, code=2)
        assert len(re.findall("^error: ", printed, re.M)) == 1, f"{what}: {printed}"
        assert tree(copy / "checkpoint") == before
        path.write_bytes(content)


LOSSES = {"deleted": lambda p: p.unlink(), "emptied": lambda p: os.truncate(p, 0), "cut within a line": lambda p: os.truncate(p, p.stat().st_size // 2)}


@pytest.mark.parametrize("name", ["metrics.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_log_does_not_lose_the_run(whole, world, tmp_path, name, loss):
    out = tmp_path / "run"
    run(out, *world, hook=stop_at("sapo_step", 5))
    written = (out / name).read_text().count("\n")
    LOSSES[loss](out / name)
    left = (out / name).read_text().count("\n") if (out / name).exists() else 0
    assert left < written and (loss != "cut within a line" or left > 0)
    assert f"warning: {out / name} is shorter than it was; its lost lines stay lost" in resume(out, hook=stop_at("sapo_step", 2))
    assert "warning" not in resume(out, hook=everything)
    undisturbed = (whole / name).read_text().splitlines()
    assert len(lines(out / name)) == len(undisturbed) - written + left
    assert set(differences(whole, out)) <= {name}
    (out / name).write_text("\n".join([*undisturbed[:written], *(out / name).read_text().splitlines()[left:]]) + "\n")
    assert not differences(whole, out)


def test_a_scrambled_log_does_not_lose_the_run(whole, world, tmp_path):
    """Its lines are nobody's any more, but the run ends as it would have, with the curves of what can be read."""
    out, log = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    run(out, *world, hook=stop_at("sapo_step", 5))
    size = log.stat().st_size
    log.write_text("scrambled\n" * (size // 10) + "x" * (size % 10))
    resume(out, hook=everything)
    assert (out / "curves.png").exists() == (whole / "curves.png").exists()
    log.write_bytes((whole / "metrics.jsonl").read_bytes())
    assert not differences(whole, out)


# ---------------------------------------------------------------- no room

def small_files(limit):
    """A hook: no file may grow beyond `limit` bytes."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train.draw_curves = lambda folder: None


def one_line_of_failure(printed):
    found = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and ("too large" in found[0] or "space" in found[0] or "read-only" in found[0].lower()), printed[-2000:]
    return found[0]


ROOM = {"source": 15_000, "policy": 100_000, "optimizer": 200_000}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no file-size limits here")
@pytest.mark.parametrize("what", ROOM)
def test_a_full_disk_at_the_start_or_in_a_checkpoint_is_one_line_and_no_harm(world, whole, tmp_path, what):
    out = tmp_path / "run"
    line = one_line_of_failure(run(out, *world, hook=functools.partial(small_files, ROOM[what]), code=1))
    assert ("nothing was written" in line) == (not out.exists()) == (what == "source")
    assert not list(out.glob("checkpoint/*")) and not list(tmp_path.glob(".run*"))
    go_on(out, world)
    assert not differences(whole, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no file-size limits here")
def test_a_log_that_cannot_grow_is_one_line_and_no_harm(world, whole, tmp_path):
    out = tmp_path / "run"
    run(out, *world, hook=stop_at("sapo_step", 3))
    size, before = (out / "metrics.jsonl").stat().st_size, tree(out / "checkpoint")
    one_line_of_failure(resume(out, hook=functools.partial(small_files, size + 700), code=1))
    assert (out / "metrics.jsonl").stat().st_size > size and tree(out / "checkpoint") == before
    resume(out)
    assert not differences(whole, out)


def full_from(number, out):
    return functools.partial(at_write, number, str(out), fail)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["source", "checkpoint/.step-00000002.tmp/policy.s", "checkpoint/.step-00000004.tmp/shared.j", "manifest.json.tmp", "step-00000006", ".model.", ".ema.",
                                  "samples.jsonl.tmp", "results.json.tmp"])
def test_no_room_for_any_kind_of_write_is_one_line_and_no_harm(world, whole, tmp_path, kind):
    """At the first write of that kind the disk is full, whatever it is."""
    out = tmp_path / "run"
    hook = functools.partial(at_write, 1, f"{out}/{kind}" if kind[0] != "." and "/" in kind else kind, fail)
    one_line_of_failure(run(out, *world, hook=hook, code=1))
    go_on(out, world)
    assert not differences(whole, out) and not list(out.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """mount(options): a tmpfs of our own, where the system lets us."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return folder

    if not shutil.which("mount"):
        pytest.skip("no mount here")
    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [60, 500, 1500, 2200, 2400])
def test_a_small_disk_fills_up_and_the_run_goes_on_where_there_is_more_room(world, whole, small_disk, tmp_path, kilobytes):
    out = small_disk(f"size={kilobytes}k") / "run"
    line = one_line_of_failure(run(out, *world, code=1, log=tmp_path / "log"))
    if checkpoints(out):
        assert newest_checkpoint(out) == checkpoints(out)[-1]
    assert ("nothing was written" in line) == (not out.exists())
    subprocess.run(["mount", "-o", "remount,size=9m", out.parent], check=True)
    go_on(out, world, log=tmp_path / "log")
    assert not differences(whole, out)


@pytest.mark.slow
def test_a_read_only_disk_is_one_line_and_no_harm(world, whole, small_disk, tmp_path):
    out, log = small_disk("size=9m") / "run", tmp_path / "log"
    run(out, *world, hook=stop_at("sapo_step", 3), log=log)
    subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
    one_line_of_failure(resume(out, code=1, log=log))
    assert "nothing can be written there" in run(out.with_name("other"), *world, code=2, log=log)
    subprocess.run(["mount", "-o", "remount,rw", out.parent], check=True)
    resume(out, log=log)
    assert not differences(whole, out)


# ---------------------------------------------------------------- numbers that are none

def plant(what, steps, note):
    """A hook: NaN in the weights, the batch or the gradient at these SAPO steps; `note` gets what moved in each, by step."""
    original, losses, current = train.sapo_step, sapo.preference_loss, [0]

    def everything(state):
        moments = [v for m in state.optimizer.state_dict()["state"].values() for v in m.values()]
        return {"policy": list(state.policy.parameters()), "ema": list(state.ema.parameters()), "optimizer": moments}

    def same(a, b):
        return len(a) == len(b) and all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b))

    def step(state, *more):
        current[0] = state.step + 1
        if what == "weights" and current[0] == steps[0]:
            state.policy.model.norm.weight.data[3] = float("nan")
        if what == "gradient" and current[0] in steps:
            handle = state.policy.model.norm.weight.register_hook(lambda g: g * float("nan"))
        before = {k: [t.clone() for t in v] for k, v in everything(state).items()}
        metrics = original(state, *more)
        if what == "gradient" and current[0] in steps:
            handle.remove()
        after, rows = everything(state), [p.row for p in state.buffer.pairs]
        with open(note, "a") as f:
            f.write(json.dumps({"step": state.step, "moved": [k for k in before if not same(before[k], after[k])], "bad": metrics["bad_rows"], "rows": rows}) + "\n")
        return metrics

    def loss(policy, batch, *more):
        value, parts = losses(policy, batch, *more)
        if what == "batch" and current[0] in steps:
            value = value * torch.tensor([float("nan")] + [1.0] * (len(value) - 1))
        return value, parts

    train.sapo_step, sapo.preference_loss, train.draw_curves = step, loss, lambda folder: None


def signal_in_a_bad_step(note):
    plant("batch", [5], note)
    stop_at("sapo_step", 5)()


@pytest.mark.parametrize("what", ["weights", "batch", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_too_many_stop_the_run(world, whole, tmp_path, what):
    out, note = tmp_path / "run", tmp_path / "note"
    printed = run(out, *world, "--max-bad-steps", 3, hook=functools.partial(plant, what, [5, 6, 7], str(note)), code=3)
    assert "3 steps in a row had a gradient that is not finite" in printed
    moved = {row["step"]: row for row in lines(note)}
    assert sorted(moved) == [1, 2, 3, 4, 5, 6, 7] and moved[3]["moved"] == ["policy", "ema", "optimizer"] and moved[4]["moved"] == ["policy", "optimizer"]
    for step in (5, 6, 7):
        assert moved[step]["moved"] == [] and f"SAPO step {step}: the gradient is not finite and changed nothing" in printed
        assert bool(moved[step]["bad"]) == (what != "gradient") and set(moved[step]["bad"]) <= set(moved[step]["rows"])
        bad = "; ".join(f"{world[3]}, line {row + 1}" for row in sorted(set(moved[step]["bad"])))
        assert f"loss not finite for {bad or 'no row'}\n" in printed
    newest = checkpoints(out)[-1]
    assert newest.name == "step-00000008" and newest_checkpoint(out) == newest         # from before the first of them
    assert all(t.isfinite().all() for f in newest.glob("*.safetensors") for t in load_file(f).values() if t.is_floating_point())
    resume(out, "--max-bad-steps", 5)                                                        # and without the NaN all is well
    assert not differences(whole, out)


def test_a_single_bad_step_is_reported_and_the_run_goes_on(world, tmp_path):
    note = tmp_path / "note"
    printed = run(tmp_path / "run", *world, hook=functools.partial(plant, "batch", [6], str(note)))
    assert printed.count("is not finite and changed nothing") == 1 and "SAPO step 6: " in printed
    moved = {row["step"]: row["moved"] for row in lines(note)}
    assert moved[6] == [] and moved[5] == moved[7] == ["policy", "optimizer"] and (tmp_path / "run/model").exists()
    rows = [row for row in lines(tmp_path / "run/metrics.jsonl") if row.get("step") == 6 and "loss" in row]
    assert rows[0]["loss"] is None and [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000008", "step-00000012"]


def test_a_signal_after_a_bad_step_does_not_claim_to_have_saved(world, whole, tmp_path):
    out = tmp_path / "run"
    printed = run(out, *world, hook=functools.partial(signal_in_a_bad_step, str(tmp_path / "note")))
    assert "stopped after SAPO step 5, whose gradient was not finite; go on from the checkpoint before with: python train.py --resume" in printed
    assert checkpoints(out)[-1].name == "step-00000008"
    resume(out)
    assert not differences(whole, out)


def bad_sft(steps):
    original, calls = train.batch_logps, [0]

    def scores(*arguments):
        calls[0] += 1                                    # two micro-batches a step
        return original(*arguments) * (float("nan") if (calls[0] + 1) // 2 in steps else 1.0)

    train.batch_logps, train.draw_curves = scores, lambda folder: None


def test_sft_stops_for_bad_steps_too(world, whole, tmp_path):
    printed = run(tmp_path / "run", *world, "--max-bad-steps", 2, hook=functools.partial(bad_sft, (3, 4)), code=3)
    assert f"SFT step 3: the gradient is not finite and changed nothing; loss not finite for {world[5]}, line " in printed
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000002"]
    resume(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")


# ---------------------------------------------------------------- by hand

def soak(steps, world, folder):
    """One run of so many steps: its memory, its speed and its buffer at the beginning and at the end."""
    out, capacity, batch = folder / "soak", 64, 4
    flags = [*world, "--steps", steps, "--buffer-size", capacity, "--eval-every", 0, "--save-every", max(100, steps // 10), "--show-every", 1000, "--lr", 1e-4]
    process, began, seen = start([*flags, "--out", out], folder / "soak.log"), time.monotonic(), []
    page = os.sysconf("SC_PAGE_SIZE")
    while process.is_alive():
        process.join(1)
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
            done = sum(b'"buffer/size"' in line for line in open(out / "metrics.jsonl", "rb"))
            seen.append((done, resident))
        except (OSError, IndexError):
            continue
    assert process.exitcode == 0, (folder / "soak.log").read_text()[-2000:]
    rows = [row for row in lines(out / "metrics.jsonl") if "buffer/size" in row]
    tenth = max(1, steps // 10)
    during = [m for n, m in seen if n < steps]           # the end of a run evaluates and writes its models
    early = next(m for n, m in seen if n >= tenth)
    speed = [tenth / sum(r["time/generate"] + r["time/train"] for r in part) for part in (rows[:tenth], rows[-tenth:])]
    print(f"{steps} steps in {time.monotonic() - began:.0f} s\nmemory {early / 2**20:.1f} MB at 10 %, {during[-1] / 2**20:.1f} MB at the end, ratio {during[-1] / early:.3f}\n"
          f"steps per second {speed[0]:.1f} in the first tenth, {speed[1]:.1f} in the last, ratio {speed[1] / speed[0]:.3f}")
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert [r["buffer/size"] for r in rows] == [min(batch * n, capacity) for n in range(1, steps + 1)]
    pairs = unpack(from_disk(checkpoints(out)[-1], "rank-0")["buffer"]["pairs"])
    assert [p.step for p in pairs] == [n for n in range(steps - capacity // batch, steps) for _ in range(batch)]
    assert abs(sum(p.uses for p in pairs) / len(pairs) - 0.5) < 0.5      # a pair of staleness a was drawn a / 16 times, on average
    print("buffer counts right")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, wrong = Path(folder), []
        (folder / "world").mkdir()
        world = make_world(folder / "world")
        if options.kills or options.signals:
            run(folder / "whole", *world)
        if options.kills:
            (folder / "kills").mkdir()
            wrong += kill_runs(options.kills, world, folder / "whole", folder / "kills", options.seed)
        for i, (stage, name, number, signum) in enumerate(itertools.islice(itertools.cycle(SIGNALS), options.signals)):
            bad = stop_and_go_on(world, folder / "whole", folder / f"signal-{i}", name, number, signum)
            wrong += [f"{signal.Signals(signum).name} in {stage}: {bad}"] if bad else []
            print(f"{signal.Signals(signum).name} in {stage}, call {number} of {name}: {bad or 'exit 0, equal'}", flush=True)
        if options.signals:
            print(f"{options.signals - len([w for w in wrong if w.startswith('SIG')])} of {options.signals} signalled runs stopped within a step and end equal")
        if options.soak:
            soak(options.soak, world, folder)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
