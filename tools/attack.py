"""Attacks on whole runs, each under a time budget: what is promised in docs/reliability.md, tried again by anyone.

    python tools/attack.py kills 40         kill a run of random settings up to five times by SIGKILL, go on each time
    python tools/attack.py signals 40       SIGTERM, SIGINT, SIGHUP or SIGUSR1 at a call of a named function, then go on
    python tools/attack.py corruption 150   damage one file of a stopped run: truncate, flip, zero, swap, delete, link, FIFO
    python tools/attack.py races 20         four runs at once in one folder: new, empty, to be replaced, or to go on with
    python tools/attack.py encodings 12     screens that cannot show what is printed, that nobody reads, or that are closed
    python tools/attack.py templates 50     hostile chat templates under a budget of processor time and memory
    python tools/attack.py cost             seconds and bytes of a checkpoint as the buffer grows, and for SmolLM2's shape

A run is a child of this process, forked after everything is imported. Its model has 40,000 random weights, its data are a
corner of the tiny world's. "Equal" means: weights, EMA, evaluation, samples and logs are those of the same run undisturbed, bit
for bit, times apart. An attack that ends in anything but equal or refused (exit code 2, one line) is printed and counted as
failed. Left out: several processes of one run (tests/test_ddp.py), full disks (tests/test_crash.py), and files that are damaged
before a run begins (tools/fuzz.py). Needs fork and /dev/full, so Linux.
"""

import argparse
import collections
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import sapo
import train
from buffer import Pair
from machine import checkpoint, process, report
from machine.parallel import World
from model import ModelConfig, Transformer

BUDGET = 120                # seconds of one run, on a machine that others use too
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
FIXED = "--from-scratch --device cpu --eval-tokens 6 --samples 2 --max-prompt-length 48 --max-length 160 --optimizer adamw --sft-batch-size 4".split()
RANDOM = {"--loss": ["dpo", "orpo", "ipo", "simpo"], "--segment": ["5", "50%", "sentence"], "--batch-size": [2, 4], "--micro-batch": [2, 3], "--sft-steps": [1, 3],
          "--steps": [4, 6], "--ema-every": [1, 2, 3, "epoch"], "--ref-refresh": [2, 3, "epoch", "never"], "--buffer-size": [5, 12], "--generate-ahead": [1, 3],
          "--generate-every": [1, 2], "--replay": ["uniform", "inverse-count"], "--save-every": [1, 2, 3], "--eval-every": [0, 2], "--keep": [1, 2], "--seed": [3, 44],
          "--lr": [1e-3], "--sft-lr": [1e-2], "--show-every": [2]}
PLACES = {      # a function, and at which of its calls at most: the first alone of what is called once
    "machine.inputs.read_data": 1, "train.starting_model": 1, "train.sft_step": 1, "train.eval_pairs": 1, "sapo.generate": 3, "train.sapo_step": 4, "sapo.preference_loss": 4,
    "machine.report.score": 4, "machine.checkpoint.to_disk": 9, "machine.checkpoint.flush": 3, "machine.files.flush": 30, "train.save_pretrained": 2, "train.print_profile": 1}
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SCREENS = ("ascii", "cp1252", "latin-1", "cp437", "shift_jis", "koi8-r", "utf-8", "a pipe that nobody reads", "a full device", "closed")
TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
REACHES = ["''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.system('touch ESCAPED')", "messages.append.__self__.__class__.__base__.__subclasses__()",
           "lipsum.__globals__['os'].system('touch ESCAPED')", "raise_exception.__globals__.__builtins__.open('ESCAPED', 'w')", "namespace.__init__.__globals__",
           "self._TemplateReference__context.environment.overlay(sandboxed=False)", "'{0.__class__.__init__.__globals__}'.format(cycler)",
           "(messages|map(attribute='__class__')|list)[0].__mro__", "joiner|attr('__init__')|attr('__globals__')", "strftime_now.__self__.__reduce_ex__(2)",
           "messages.clear()", "messages[0].update(role='x')", "tojson.__globals__"]
SPENDS = ["range(10**9)|list|length", "'x' * 10**10", "7**(7**99)", "('x' * 5000000)|wordwrap(1)|length", "('<b>' * 2000000)|striptags|length", "('http://a.b ' * 300000)|urlize|length",
          "range(99999)|map('center', 1000000)|map('length')|sum", "'%0999999999d' % 1", "'x'|center(10**9)|length", "(range(99999)|list) is sequence"]
LOOPS = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
         "{% set n = namespace(x='xx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}"]


# ---------------------------------------------------------------- a run

class Job:
    """train.main in a child; what it prints goes to a file. `before` changes things in the child first."""

    def __init__(self, argv, log, before=None):
        self.log, self.began = Path(log), time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                with open(log, "ab", buffering=0) as f:
                    os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
                sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w", closefd=False), write_through=True) for i in (1, 2))
                train.draw_curves = lambda folder: None
                if before:
                    before()
                code = train.main(list(map(str, argv)))
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def end(self, seconds=BUDGET):
        """(exit code, what it printed); the code is minus a signal's number, or None where the budget was not enough."""
        code = None
        while code is None and time.monotonic() - self.began < seconds:
            time.sleep(0.005)
            code = self.poll()
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return code, self.log.read_text("utf-8", "replace")

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def refused(printed):
    """Whether exactly one line says why, and no traceback stands beside it."""
    return printed.count("error: ") == 1 and "Traceback" not in printed


def differences(a, b, logs=True):
    """What two finished runs do not have in common, times apart."""
    found = []
    for name in ("model/model.safetensors", "ema/model.safetensors", "samples.jsonl", "results.json", *(("pairs.jsonl",) if logs else ())):
        if not all((x / name).is_file() for x in (a, b)) or (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    rows = []
    for out in (a, b) if logs else ():
        text = (out / "metrics.jsonl").read_text()
        rows.append([{k: v for k, v in json.loads(line).items() if not k.startswith("time/") and k != "gen/tokens_per_second"} for line in text.splitlines()])
    return found + (["metrics.jsonl"] if logs and rows[0] != rows[1] else []) + [str(p) for p in b.rglob(".*")]


class Bench:
    """A small world in a folder, undisturbed runs to compare with, and copies to attack."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        shutil.copytree(ROOT / "data/tiny_model", folder / "base")
        config = json.loads((folder / "base/config.json").read_text())
        (folder / "base/config.json").write_text(json.dumps(config | SMALL))
        for name, n in (("train", 26), ("base", 22), ("test", 6)):
            rows = [json.loads(row) for row in (ROOT / f"data/tiny_{name}.jsonl").read_text("utf-8").splitlines()[:n]]
            for row in rows if name == "train" else ():      # what few screens can show
                row["prompt"] += " \U0001f600 \u2026 \u6f22\u5b57"
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        self.world = ["--model", folder / "base", "--data", folder / "train.jsonl", "--sft-data", folder / "base.jsonl", "--eval-data", folder / "test.jsonl", *FIXED]

    def place(self):
        self.count += 1
        return self.folder / f"run-{self.count}"

    def flags(self, rng):
        chosen = {flag: rng.choice(values) for flag, values in RANDOM.items()}
        return [*self.world, *(x for pair in chosen.items() for x in pair)]

    def start(self, out, flags, before=None):
        """A run in `out`, or going on there where there is one."""
        there = (out / "config.json").exists()
        return Job(["--resume", out] if there else [*flags, "--out", out], out.with_suffix(".log"), before)

    @functools.cache
    def whole(self, flags):
        """(folder, seconds) of a run that nothing disturbs."""
        out, began = self.place(), time.monotonic()
        code, printed = self.start(out, flags).end()
        assert code == 0, printed[-2000:]
        return out, time.monotonic() - began

    @functools.cache
    def stopped(self, flags):
        """A run stopped in its middle, for copies."""
        out = self.place()
        self.start(out, flags, functools.partial(signal_at, "train.sapo_step", 3, signal.SIGTERM)).end()
        return out


def signal_at(place, number, signum):
    """Send this process a signal at the number-th call of a function."""
    owner, _, name = place.rpartition(".")
    owner, calls = sys.modules[owner], [0]
    original = getattr(owner, name)

    @functools.wraps(original)
    def counted(*arguments, **named):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signum)
        return original(*arguments, **named)

    setattr(owner, name, counted)


def finished(bench, flags, out, logs=True):
    """"equal" once the run in `out` has gone on to its end, else what is wrong."""
    code, printed = bench.start(out, flags).end()
    if code == 2 and refused(printed[printed.rfind("error: "):]):
        return "refused"
    found = differences(bench.whole(flags)[0], out, logs) if code == 0 else [f"exit code {code}: {printed[-1500:]}"]
    return "equal" if not found else f"failed: {found}"


# ---------------------------------------------------------------- the attacks: each returns (what came of it, what was done)

def kills(bench, number, rng):
    flags, out = tuple(bench.flags(rng)), bench.place()
    _, seconds = bench.whole(flags)
    deep, deaths = rng.randint(1, 5), 0
    for _ in range(deep):
        job = bench.start(out, flags)
        time.sleep(rng.uniform(0.05, 0.9) * seconds)
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
            os.waitpid(job.pid, 0)
            deaths += 1
    return finished(bench, flags, out), f"{deaths} deep"


def signals(bench, number, rng):
    name, place = SIGNALS[number % len(SIGNALS)], list(PLACES)[number % len(PLACES)]
    flags, out = tuple(bench.flags(random.Random(number % 3))), bench.place()
    code, printed = bench.start(out, flags, functools.partial(signal_at, place, rng.randint(1, PLACES[place]), getattr(signal, name))).end()
    if code != 0 or "error" in printed or "Traceback" in printed:
        return f"failed: exit code {code}: {printed[-1500:]}", f"{name} at {place}"
    went_on = "everything is in" not in printed
    if went_on and ("go on with: " in printed) != (out / "config.json").exists():
        return f"failed: {printed[-500:]}", f"{name} at {place}"
    return finished(bench, flags, out), f"{name} at {place}, {'stopped' if went_on else 'was done before'}"


DAMAGE = ("truncate", "flip", "zero", "swap", "delete", "link", "FIFO")


def damage(path, way, rng, files):
    size = path.stat().st_size
    content = bytearray(path.read_bytes())
    if way == "flip" and size:
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif way == "zero" and size:
        at = rng.randrange(size)
        content[at:at + 512] = bytes(len(content[at:at + 512]))
    elif way == "swap":
        content = rng.choice([f for f in files if f != path]).read_bytes()
    elif way == "truncate":
        content = content[:rng.randrange(size or 1)]
    path.unlink()
    if way == "FIFO":
        os.mkfifo(path)
    elif way == "link":
        path.symlink_to(rng.choice(["/dev/zero", "/nowhere", str(rng.choice([f for f in files if f != path]))]))
    elif way != "delete":
        path.write_bytes(content)


def corruption(bench, number, rng):
    flags = tuple(bench.flags(random.Random(number % 3)))
    out = bench.place()
    shutil.copytree(bench.stopped(flags), out)
    files = sorted(p for p in out.rglob("*") if p.is_file())
    path, way = files[number // len(DAMAGE) % len(files)], DAMAGE[number % len(DAMAGE)]
    damage(path, way, rng, files)
    log = path.name in ("metrics.jsonl", "pairs.jsonl")
    if not (out / "config.json").exists():               # else the run would begin anew
        code, printed = Job(["--resume", out], out.with_suffix(".log")).end()
        return "refused" if code == 2 and refused(printed) else f"failed: exit code {code}: {printed[-1500:]}", f"{way} {path.relative_to(out)}"
    return finished(bench, flags, out, not log), f"{way} {path.relative_to(out)}"


def races(bench, number, rng):
    flags, kind = tuple(bench.flags(random.Random(number % 3))), ("new", "empty", "to be replaced", "to go on with")[number % 4]
    out, more, whole = bench.place(), [], bench.whole(flags)[0]
    if kind == "empty":
        out.mkdir()
    elif kind == "to be replaced":
        shutil.copytree(whole, out)
        more = ["--overwrite"]
    elif kind == "to go on with":
        shutil.copytree(bench.stopped(flags), out)
    argv = ["--resume", out] if kind == "to go on with" else [*flags, "--out", out, *more]
    gun = time.monotonic() + 0.3
    jobs = [Job(argv, out.with_suffix(f".{i}"), lambda: time.sleep(max(0, gun - time.monotonic()))) for i in range(4)]
    ends = [job.end() for job in jobs]
    codes = sorted(code if code is not None else 99 for code, _ in ends)
    wrong = [printed for code, printed in ends if code != 0 and not refused(printed)]
    found = differences(whole, out) + [str(p) for p in out.parent.glob(f".{out.name}.*")]
    one = codes == [0, 2, 2, 2] or kind in ("to be replaced", "to go on with") and set(codes) <= {0, 2} and codes[0] == 0      # one after the other
    return "equal" if one and not wrong and not found else f"failed: {codes}, {found}, {wrong}", f"{kind}: exit codes {codes}"


def screen(kind):
    """What this process prints goes to a screen of that kind, as if it had been started so."""
    if kind == "a pipe that nobody reads":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    if kind == "a full device":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    encoding = "utf-8" if kind in SCREENS[-3:] else kind
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w", closefd=False), encoding, write_through=True) for i in (1, 2))
    sys.stdout = None if kind == "closed" else sys.stdout
    process.begin()


def encodings(bench, number, rng):
    kind = SCREENS[number % len(SCREENS)]
    flags, out = tuple(bench.flags(random.Random(number % 3))), bench.place()
    code, printed = bench.start(out, flags, functools.partial(screen, kind)).end()
    found = differences(bench.whole(flags)[0], out) if code == 0 and "Traceback" not in printed else [f"exit code {code}: {printed[-1500:]}"]
    return "equal" if not found else f"failed: {found}", kind


def limited():
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (8, 9))
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)


def templates(bench, number, rng):
    part = [f"{{{{ {rng.choice(REACHES)} }}}}", f"{{{{ {rng.choice(SPENDS)} }}}}", rng.choice(LOOPS), f"{{% if {rng.choice(REACHES)} %}}x{{% endif %}}"][number % 4]
    (bench.folder / "hostile.jinja").write_text(part + TURNS if rng.random() < 0.5 else TURNS + part)
    out, here = bench.place(), os.getcwd()
    os.chdir(bench.folder)
    code, printed = Job([*bench.flags(rng), "--chat-template", "hostile.jinja", "--steps", 1, "--out", out], out.with_suffix(".log"), limited).end()
    os.chdir(here)
    outcome = "equal" if code == 0 else "refused" if code == 2 and refused(printed) else f"failed: exit code {code}: {printed[-800:]}"
    if code in (None, -signal.SIGKILL, -signal.SIGXCPU) or "MemoryError" in printed and code != 2:
        outcome = "ended by the budget"
    if (bench.folder / "ESCAPED").exists():
        outcome = "failed: it reached the file system"
    return outcome, part[:100]


def cost(folder):
    """Seconds and bytes of checkpoints: a tiny model with a growing buffer of 2,048-token pairs, then SmolLM2-135M's shape."""
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                 max_position_embeddings=8192)
    tiny = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
                max_position_embeddings=64)
    alone, rng = World("cpu"), random.Random(0)
    print("| weights | pairs in the buffer | GB | write, s | check before resuming, s |\n|---|---|---|---|---|")
    for shape, counts in ((tiny, (0, 500, 1000, 2000)), (sizes | {"tie_word_embeddings": True}, (0, 2000))):
        policy = Transformer(ModelConfig(**shape)).init_weights(torch.Generator().manual_seed(0))
        state = sapo.State.start(policy, sapo.SAPOConfig(), (1,), lr=1e-6)
        for p in policy.parameters():
            p.grad = torch.zeros_like(p)
        state.optimizer.step()
        for count in counts:
            while len(state.buffer) < count:
                chosen = [rng.randrange(49152) for _ in range(1024)]
                state.buffer.add(Pair([rng.randrange(49152) for _ in range(1024)], chosen, chosen[:500] + [7] * 256 + chosen[756:]))
            out, size = folder / "run", sum(p.numel() for p in policy.parameters())
            began = time.monotonic()
            checkpoint.write_checkpoint(out / "checkpoint/step-00000001", state.state_dict(), 2, alone)
            written, stored = time.monotonic(), sum(p.stat().st_size for p in (out / "checkpoint/step-00000001").iterdir())
            checkpoint.newest_checkpoint(out)
            print(f"| {size:,} | {count} | {stored / 1e9:.3f} | {written - began:.2f} | {time.monotonic() - written:.2f} |", flush=True)
            shutil.rmtree(out)


ATTACKS = {f.__name__: f for f in (kills, signals, corruption, races, encodings, templates)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*ATTACKS, "cost"])
    parser.add_argument("count", type=int, nargs="?", default=10)
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first attack")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train.tqdm.set_lock(threading.RLock())               # its own would be a semaphore that a killed child leaves behind
    with tempfile.TemporaryDirectory() as folder:
        if args.kind == "cost":
            return cost(Path(folder))
        bench, counts, began = Bench(Path(folder)), collections.Counter(), time.monotonic()
        for number in range(args.first, args.first + args.count):
            outcome, what = ATTACKS[args.kind](bench, number, random.Random(f"{args.kind} {number}"))
            counts[outcome.partition(":")[0]] += 1
            print(f"{args.kind} {number}: {what}: {outcome}", flush=True)
        held = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
        print(f"{args.count} {args.kind} in {time.monotonic() - began:.0f} s: {held}")
        return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
