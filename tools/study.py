"""The study: SAPO and its relatives on tiny-steps, by the rules at the beginning of docs/study.md.

    python tools/study.py               the runs that are not done yet, then the tables and pictures
    python tools/study.py --report      the tables and pictures of the runs that are done
    python tools/study.py --quick       two variants, two seeds, few steps: to try the script, not to learn anything
    python tools/study.py --relatives   the table of variants, as the documents have it

A run is one variant with one learning rate and one seed, from its seed's base, on one thread, --jobs at a time. It
appends a line to study.jsonl in --figures, so a study that was stopped goes on where it was. Then study.md and the
pictures are written from these lines alone. Left out: memory by stage (tools/bench.py) and real checkpoints
(tools/real.py).
"""

import argparse
import difflib
import functools
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from measure import ROOT, Failed, Listening, base_model, markdown, opened, rows_of

import numpy as np
import torch

import train
from buffer import Pair, collate
from losses import score
from machine.dataset import Draw
from machine.parallel import World
from machine.rows import read_rows
from make_steps import EASY
from sapo import State, pair_of_data, sapo_step

BATCH = 16                                       # pairs a step; a buffer of so many is a buffer of one batch
WHOLE = "--segment 100% --after rewrite"         # all of y-, written to its own end
RELATIVES = {   # variant: (what it changes in the tiny preset, what it is)
    "SAPO-DPO": ("", "the paper's"),
    "SAPO-ORPO": ("--loss orpo", "the paper's"),
    "SAPO-SLiC": ("--loss slic", "SAPO's pairs, SLiC-HF's hinge"),
    "EMA only": (f"--buffer-size {BATCH}", "SAPO without the buffer"),
    "buffer only": ("--alpha 0 --ema-every 1", "SAPO without the EMA: the policy generates"),
    "segment only": (f"--alpha 0 --ema-every 1 --buffer-size {BATCH}", "SAPO without either"),
    "full response": (WHOLE, "EMA and buffer, B is all of y+"),
    "on-policy": (f"{WHOLE} --alpha 0 --ema-every 1 --buffer-size {BATCH}",
                  "none of the three: the policy generates all of y-"),
    "full response ORPO": (f"--loss orpo {WHOLE}", "the same with ORPO, as in the paper's ablation"),
    "on-policy ORPO": (f"--loss orpo {WHOLE} --alpha 0 --ema-every 1 --buffer-size {BATCH}",
                       "the same with ORPO, as in the paper's ablation"),
    "SPIN": (f"{WHOLE} --alpha 0 --ema-every epoch --ref-refresh epoch --buffer-size {BATCH}",
             "a copy of the policy, one epoch old at most, generates and is the reference"),
    "SPIN with EMA and buffer": (f"{WHOLE} --ema-every epoch --ref-refresh epoch",
                                 "the copy is an average, and old pairs come again"),
    "offline DPO": (f"--rejected data --ref-refresh never --buffer-size {BATCH}",
                    "y- is the data's; the reference is the base"),
    "offline ORPO": (f"--loss orpo --rejected data --buffer-size {BATCH}", "y- is the data's"),
    "SFT": (f"--loss orpo --lam 0 --rejected data --buffer-size {BATCH}",
            "ORPO without its second term; y- is not looked at"),
    "a sentence": ("--segment sentence", "B and B' are whole sentences, so y- is well formed"),
    "a line": ("--segment line", "the same with lines; in worked sums a line is a step"),
    "half": ("--segment 50%", "B is half of y+"),
    "without the seam": ("--score-on segment", "the loss compares B and B' alone, and not C after them"),
    "end rewritten": ("--after rewrite", "y- goes on after B' to the generator's own end; no seam"),
    "every 2nd": ("--generate-every 2", "pairs are generated on every second step"),
    "every 4th": ("--generate-every 4", "on every fourth"),
    "every 8th": ("--generate-every 8", "on every eighth"),
    "DPO and NLL": ("--nll 1", "dpo+sft: y+ itself is raised as well"),
    "IPO": ("--loss ipo", "the margin is drawn to 1 / (2 beta)"),
    "RPO": ("--loss rpo", "each y+ against every y- of the micro-batch"),
    "SimPO": ("--loss simpo --beta 2", "means, a margin, no reference"),
}
AS = {name: "SAPO-DPO" for name in ("every 2nd", "every 4th", "every 8th")}    # whose learning rate they take
CLAIMS = {      # claim: (better, than)
    "SAPO over SPIN": ("SAPO-DPO", "SPIN"),
    "SAPO over SFT for as long": ("SAPO-DPO", "SFT"),
    "the same, ORPO": ("SAPO-ORPO", "SFT"),
    "SAPO over offline pairs": ("SAPO-DPO", "offline DPO"),
    "EMA and buffer over on-policy": ("full response", "on-policy"),
    "a segment over the whole answer": ("SAPO-DPO", "full response"),
    "a line over a random segment": ("a line", "SAPO-DPO"),
    "kept C over a rewritten end": ("SAPO-DPO", "end rewritten"),
}
CONSTANT = "--lr-scheduler constant --warmup 12".split()             # so that each point of a run is a result
BINS = 16                                        # of a run's steps, for the curves of its pairs
PAIRS = {       # what is looked at in fresh pairs: head of the table
    "passes": "y- passes", "false": "a false step in y-", "similarity": "similarity to y+", "gen/eos_fraction": "B' ends it",
    "pairs/segment_gap": "B against B', nats", "pairs/seam_gap": "the seam, nats"}
KINDS = ("none", "all in the variants' rows", "some not in them")       # where the sums above 30 of a test prompt are
SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # 97.5 % points of t, 1 ... 9 degrees
ROWS = {"data": "train", "eval_data": "test", "sft_data": "base"}


class Study:
    """What is studied, and the rules for it: here the worked sums of tiny-steps. tools/real.py has others.

    A run's line has the keys variant, lr and seed; found maps these three to the line.
    """
    name, command, words = "study", "tools/study.py", []     # of the files; what makes them, and its first words
    steps_are = "sums"                               # what steps_of looks at
    batch, relatives, alike = BATCH, RELATIVES, AS   # alike: variants that take another's learning rate
    studied = ("SAPO-DPO", "SFT", "SPIN", "offline DPO", "SAPO-ORPO", "a line", "end rewritten", "full response",
               "on-policy", "every 2nd", "every 4th", "every 8th", "half", "DPO and NLL", "without the seam")
    claims = CLAIMS
    bases = {"base": 1, "half the SFT": 0.5, "twice the SFT": 2}     # and what its steps of SFT are multiplied by
    grid = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    first = {"dpo": (3e-6, 1e-5, 3e-5), "orpo": (3e-5, 1e-4, 3e-4)}  # tried at once; then outward while the best is the last
    tried = 5                                        # rates of a variant at most
    first_seed, seeds = 1, 5                         # the first one chooses the rates; how many
    steps, tokens, sft_steps = 96, 185_000, 1000
    token_parts = (0.5, 1)                           # of the tokens, where a run is measured
    sampled = True                                   # whether answers are sampled as well
    computed = ("SAPO-DPO", "every 2nd", "every 4th", "every 8th", "SPIN", "on-policy", "SFT", "SAPO-ORPO")     # in the picture of tokens
    in_pairs = ("SAPO-DPO", "a line", "end rewritten", "full response", "SPIN", "on-policy")     # in that of pairs
    flags = ["--model", str(ROOT / "data/steps_model"), "--max-prompt-length", "64", "--eval-tokens", "80",
             "--generate-rows", "240", *(word for flag, split in ROWS.items() for word in (
                 "--" + flag.replace("_", "-"), str(ROOT / f"data/steps_{split}.jsonl")))]

    def base(self, job):
        """The model folder that a job's runs start from, made if it is not there."""
        sft = f"--sft-steps {job['sft_steps']} --sft-lr 3e-3 --sft-batch-size 16"
        return base_model(job["seed"], [*self.flags, *sft.split()], job["bases"])

    def opened(self, folder, job, flags):
        """(model, Text, Config)."""
        return opened(folder, job["seed"], [*self.flags, *flags])

    def rows(self, split, text, cfg, n):
        """The first n rows of a split, or all, as Data; checks: for each row whether an answer is right."""
        data = rows_of(split, text, cfg, n, "steps")
        data.checks = [functools.partial(right, data.verifiers[i]["must"]) for i in range(len(data))]
        return data

    def steps_of(self, answer):
        """Whether each step of an answer is right, in order."""
        return [int(a) + int(f"{op}{b}") == int(c) for a, op, b, c in SUM.findall(answer)]

    def kinds(self):
        """For each test prompt one of KINDS, or none at all where there are no such kinds."""
        rows = {split: [{*SUM.findall(row.chosen["content"])} for row in read_rows(ROOT / f"data/steps_{split}.jsonl")]
                for split in ("train", "test")}
        taught, names = set().union(*rows["train"]), []
        for sums in rows["test"]:
            above = {found for found in sums if max(int(found[0]), int(found[3])) > EASY}
            names.append(KINDS[0 if not above else 1 if above <= taught else 2])
        return names

    def chosen_rate(self, variant, found):
        """(the learning rate of a variant or None, the runs that choosing it still needs): the best of its loss's first
        on the validation rows of the first seed, of equals the largest; while it is the last on its side, the next one
        outward is tried."""
        variant = self.alike.get(variant, variant)
        words = self.relatives[variant][0].split()
        rates = list(self.first["orpo" if "orpo" in words else "dpo"])
        while True:
            missing = [(variant, lr, self.first_seed) for lr in rates if (variant, lr, self.first_seed) not in found]
            if missing:
                return None, missing
            scores = [at(found[variant, lr, self.first_seed], "steps 1")["validation"] for lr in rates]
            best = max(range(len(rates)), key=lambda i: (scores[i], i))
            place = self.grid.index(rates[best]) + (1 if best else -1)
            if 0 < best < len(rates) - 1 or len(rates) == self.tried or not 0 <= place < len(self.grid):
                return rates[best], []
            rates = sorted([*rates, self.grid[place]])

    def all_seeds(self):
        return range(self.first_seed, self.first_seed + self.seeds)

    def todo(self, found, variants):
        """The runs that can be started now, the most important first."""
        seeds = self.all_seeds()
        runs = [("base", None, seed) for seed in seeds]
        if not found.keys() >= {*runs}:                  # a variant's line names the base it begins from
            variants = ()
        for variant in variants:
            lr, missing = self.chosen_rate(variant, found)
            runs += missing or [(variant, lr, seed) for seed in seeds]
        runs += [(base, None, seed) for base in self.bases for seed in seeds]
        return [key for key in dict.fromkeys(runs) if key not in found]


def right(must, answer):
    """Whether an answer holds these sums in this order and no others, and then a line that ends with the last of `must`.
    A verifier's own judge (machine/report.py) asks neither for the order nor for the place of the end."""
    worked, _, end = answer.strip().rpartition("\n")
    sums = ["{} {} {} = {}".format(*found) for found in SUM.findall(worked)]
    return sums == must[:-1] and "=" not in end and end.endswith(f" {must[-1]}.")


# ----------------------------------------------------------------------------- one run
def run(study, job):
    """A line of study.jsonl: train as the job says, and measure at its marks, in steps and in tokens."""
    flags = [*CONSTANT, *job["flags"].split(), "--lr", f"{job['lr'] or 0:g}"]
    folder = study.base(job)
    made, began_from = fingerprint(folder), job.get("fingerprint")
    if began_from not in (None, made):
        raise Failed(f"{folder} is not the base that the runs of seed {job['seed']} began from, which another machine makes "
                     "in other digits: bring that folder, or begin a study in another folder of --figures")
    model, text, cfg = study.opened(folder, job, flags)
    data, validation, test = (study.rows(split, text, cfg, job["rows"]) for split in ("train", "validation", "test"))
    marks = [("steps", job["steps"]), *(("tokens", part * job["tokens"]) for part in study.token_parts)]
    counts, points, fresh = {"steps": 0, "generated": 0, "trained": 0, "tokens": 0}, [], []
    step, state = stepper(model, data, text, cfg)
    if not job["lr"]:                                    # the base itself
        start = {**counts, "mark": ["start"], **measured(study, model, test, text, cfg)}
        points, marks = [start | further(study, model, validation, test, text, cfg)], []
    seconds, began = 0.0, time.perf_counter()
    while marks:
        lr = train.learning_rate(counts["steps"], 10**9, cfg, cfg.lr)
        metrics = step(lr)
        counts["steps"] += 1
        for kind, key in (("generated", "gen/tokens"), ("trained", "train/tokens")):
            counts[kind] += int(metrics[key])
        counts["tokens"] = counts["generated"] + counts["trained"]
        fresh.append(looked_at(study, state, metrics, data, text))
        reached = [mark for mark in marks if counts[mark[0]] >= mark[1]]
        if reached:
            seconds += time.perf_counter() - began
            marks = [mark for mark in marks if mark not in reached]
            names = [f"{kind} {value / job[kind]:g}" for kind, value in reached]
            points.append({**counts, "seconds": round(seconds, 1), "mark": names,
                           **measured(study, model, test, text, cfg)})
            if "steps 1" in names:
                points[-1] |= further(study, model, validation, test, text, cfg)
            began = time.perf_counter()
    return {key: job[key] for key in ("variant", "flags", "lr", "seed")} | {
        "base": made, "points": points, "pairs": binned(fresh[:job["steps"]]), "memory": peak_memory(),
        "torch": torch.__version__}


def fingerprint(folder):
    """Of a model's weights, in twelve digits."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def stepper(model, data, text, cfg):
    """(a function that takes one step at a learning rate and returns its metrics, its State): of Algorithm 1, or of SFT
    where the loss looks at y+ alone: the same step (tests/test_study.py), without the half of it that counts for nothing."""
    optimizer, draw = train.make_optimizer(model, cfg), Draw(data, cfg.batch_size, cfg.seed, World("cpu"))
    state = State.start(model, cfg, text.eos, cfg.seed, vocab=text.vocab, breaks=text.breaks(cfg.segment),
                        optimizer=optimizer, steps_per_epoch=max(1, round(len(data) / cfg.batch_size)))

    def step(lr):
        for group in optimizer.param_groups:
            group["lr"] = lr
        if cfg.loss != "orpo" or cfg.lam:
            return sapo_step(state, draw, cfg, nullcontext)
        rows = draw(cfg.batch_size)
        return train.sft_step(model, optimizer, rows, cfg, nullcontext) | {
            "gen/tokens": 0, "train/tokens": sum(len(e.prompt) + len(e.chosen) for e in rows)}

    return step, state


def measured(study, model, data, text, cfg):
    """Of a model's greedy answers to held-out rows: passed, "1" or "0" for each; sums, the share of steps that are right."""
    answers, good = heard(model, data, text, cfg)
    right = [true for answer in answers for true in study.steps_of(answer)]
    return {"passed": "".join("01"[ok] for ok in good), "sums": round(statistics.mean(right or [0]), 4)}


def further(study, model, validation, test, text, cfg):
    """What is measured at equal steps alone. The verifier's share, greedy on validation rows and perhaps sampled on test
    rows; chosen and rejected, the mean log-probs of the test rows' y+ and of their y-, which are the same for all."""
    pairs = [pair_of_data(test[i]) for i in range(len(test))]
    with torch.no_grad():
        logps = [torch.stack(score(model, collate(pairs[i:i + 60])), 1) for i in range(0, len(pairs), 60)]
    chosen, rejected = torch.cat(logps).mean(0).tolist()
    shares = {"validation": statistics.mean(heard(model, validation, text, cfg)[1])}
    if study.sampled:
        shares["sampled"] = statistics.mean(heard(model, test, text, cfg, cfg.temperature, cfg.top_k, cfg.top_p)[1])
    return shares | {"chosen": round(chosen, 3), "rejected": round(rejected, 3)}


def heard(model, data, text, cfg, *how):
    """([a model's answer to each row], [whether it passes])."""
    model.eval()
    pairs = [Pair(data[i].prompt, data[i].chosen, [], row=i) for i in range(len(data))]
    answers = [text.decode(ids, True) for ids in Listening(data, pairs, cfg, text).answers(model, pairs, *how)]
    model.train()
    return answers, [check(answer) for check, answer in zip(data.checks, answers)]


def looked_at(study, state, metrics, data, text):
    """PAIRS of a step's fresh pairs; {} where none were generated."""
    if "gen/eos_fraction" not in metrics:
        return {}
    fresh = [state.buffer.pairs[-i] for i in range(1, study.batch + 1)]
    texts = [text.decode(p.rejected, True) for p in fresh]
    own = {"passes": [data.checks[p.row](said) for said, p in zip(texts, fresh)],
           "false": [not all(study.steps_of(said)) for said in texts],
           "similarity": [difflib.SequenceMatcher(None, p.chosen, p.rejected, False).ratio() for p in fresh]}
    return {key: statistics.mean(own[key]) if key in own else metrics[key] for key in PAIRS}


def binned(steps):
    """{key: its mean in each of BINS equal parts of the run}, None where a part has none."""
    parts = np.array_split(np.arange(len(steps)), BINS)
    values = {key: [[steps[i][key] for i in part if key in steps[i]] for part in parts] for key in PAIRS}
    return {key: [round(statistics.mean(v), 3) if v else None for v in row] for key, row in values.items() if any(row)}


def peak_memory():
    """MiB this process has held at most, all libraries included; None on Windows."""
    with suppress(ImportError):
        import resource
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


# ----------------------------------------------------------------------------- all runs
def read(path):
    """{(variant, lr, seed): line} of study.jsonl; a line that was torn is none."""
    found = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            row = json.loads(line)
            found[row["variant"], row["lr"], row["seed"]] = row
    return found


def held(folder, key):
    """A file that is locked while a process works on a run, or None where another does. Where there are no locks
    (Windows), one process should work alone."""
    file = open(folder / ("-".join(map(str, key)) + ".lock"), "w")
    with suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    return file


def go(study, args, variants, path):
    """All runs that no other process is at, one after another, until there are none or the time is over. Each appends
    its line as it ends."""
    end = time.monotonic() + 60 * (args.minutes or math.inf)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end:
        left = study.todo(read(path), variants)
        if not left:
            return
        for key in left:
            lock = held(Path(args.out), key)
            if lock and key not in read(path):
                break
        else:                                            # others are at all of them: their results may open more
            time.sleep(2)
            continue
        with lock:
            began, row = time.monotonic(), run(study, job_of(study, args, key, read(path)))
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(row) + "\n")
        print(f"{' '.join(map(str, key))}: {time.monotonic() - began:.0f} s, at least {len(left) - 1} more", flush=True)


def job_of(study, args, key, found):
    """What `run` must know; fingerprint: of the base that the seed's runs begin from, once it is measured."""
    variant, lr, seed = key
    sft_steps = round(study.sft_steps * study.bases.get(variant, 1))
    base = found.get(("base", None, seed), {})
    return {"variant": variant, "flags": study.relatives[variant][0] if lr else "", "lr": lr, "seed": seed,
            "fingerprint": base.get("base") if lr else None, "steps": study.steps, "tokens": study.tokens,
            "sft_steps": sft_steps, "rows": args.rows, "bases": str(Path(args.out, f"base-{sft_steps}"))}


def side_by_side(study, argv, jobs):
    """The same command in several processes at once, which share the runs; the worst exit code."""
    command = [sys.executable, str(ROOT / study.command), *study.words, *argv, "--worker"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return max(process.wait() for process in [subprocess.Popen(command, env=env) for _ in range(jobs)])


# ----------------------------------------------------------------------------- numbers
def at(row, mark):
    """A run's point at a mark."""
    return next(point for point in row["points"] if mark in point["mark"])


def share(point):
    """The primary metric: of the greedy answers to the test prompts, those that pass."""
    return point["passed"].count("1") / len(point["passed"])


def interval(values):
    """(mean, half of the 95 % t-interval) of a few values; of one, (it, nan)."""
    n = len(values)
    half = STUDENT[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def cell(values, digits, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def p_value(values):
    """Of paired differences whose true mean is 0: two-sided, by Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    n, mean = len(values), statistics.mean(values)
    spread = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    if n < 2 or not spread:
        return float(n < 2 or not mean)
    angle = math.atan(abs(mean) / spread / math.sqrt(n - 1))
    odd, term = (n - 1) % 2, math.cos(angle) if (n - 1) % 2 else 1.0
    inside = 0.0
    for k in range(1 + odd, n - 1, 2):                   # 1, cos^2 / 2, ... or cos, 2 cos^3 / 3, ...
        inside += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    within = 2 / math.pi * (angle + math.sin(angle) * inside) if odd else math.sin(angle) * inside
    return max(0.0, 1 - within)


def holm(values):
    """Holm's adjusted p-values, in the order given."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = worst
    return adjusted


def verdict(mean, p):
    return "cannot be told" if p >= 0.05 else "holds" if mean > 0 else "does not hold"


# ----------------------------------------------------------------------------- tables
class Results:
    """What study.jsonl holds, as the tables need it: the finished runs of each variant at its chosen rate."""

    def __init__(self, found, study=Study()):
        self.found, self.study = found, study
        self.seeds = study.all_seeds()
        self.runs, self.rates = {}, {}
        for variant in [*study.bases, *study.relatives]:
            lr = None if variant in study.bases else study.chosen_rate(variant, found)[0]
            runs = [found.get((variant, lr, seed)) for seed in self.seeds]
            if all(runs):                                # a variant with runs missing is not shown
                self.runs[variant], self.rates[variant] = runs, lr
        self.trained = [variant for variant in self.runs if variant not in study.bases]
        self.looks = {key: head for key, head in PAIRS.items() if study.steps_are or key != "false"}     # at pairs

    def points(self, variant, mark):
        return [at(run, "start" if variant in self.study.bases else mark) for run in self.runs[variant]]

    def shares(self, variant, mark):
        return [share(point) for point in self.points(variant, mark)]

    def gains(self, variant, mark):
        """Over the base, seed by seed."""
        return self.differences(variant, "base", mark)

    def differences(self, ours, theirs, mark):
        return [a - b for a, b in zip(self.shares(ours, mark), self.shares(theirs, mark))]

    def flipped(self, ours, theirs, mark):
        """(prompts that only ours passes, that only theirs passes), over all seeds."""
        both = [zip(a["passed"], b["passed"]) for a, b in zip(self.points(ours, mark), self.points(theirs, mark))]
        pairs = [pair for seed in both for pair in seed]
        return pairs.count(("1", "0")), pairs.count(("0", "1"))


def report(r):
    """The tables as Markdown."""
    n = len(r.seeds)
    lines = [f"Share of {len(r.points('base', '')[0]['passed'])} test prompts whose greedy answer passes the verifier, mean "
             f"± 95 % t-interval over {n} seeds: {', '.join(map(str, r.seeds))}.\n", "At equal steps:\n",
             steps_table(r), "\nAt equal tokens, generated and trained on together:\n", tokens_table(r)]
    for mark, name in (("steps 1", "equal steps"), ("tokens 1", "equal tokens")):
        rows = claims(r, mark)
        if rows and n > 1:
            lines += [f"\nThe claims at {name}: differences seed by seed, p of a paired t-test, and Holm's correction over "
                      f"{len(r.study.claims)} claim{'s' * (len(r.study.claims) > 1)}:\n",
                      markdown(["claim", "difference", "mean", "won, lost prompts", "p", "Holm's p", "here"], rows)]
    lines += ["\nIs y- worse, and where? Fresh pairs, first and last quarter of a run, all seeds:\n",
              markdown(["variant", *r.looks.values()], [[v, *ends(runs, r.looks)] for v, runs in r.runs.items() if runs[0]["pairs"]]),
              "\nLearning rates tried: greedy share on validation rows, first seed:\n", tuning_table(r)]
    kinds = r.study.kinds()[:len(r.points("base", "")[0]["passed"])]
    if kinds:
        lines += ["\nAt equal steps, by a prompt's sums above 30 (in brackets how many prompts):\n", kinds_table(r, kinds)]
    return "\n".join(lines)


def kinds_table(r, kinds):
    """The greedy share among the prompts of each kind."""
    rows, names = [], [name for name in KINDS if name in kinds]
    for variant in r.runs:
        shares = {name: [statistics.mean(c == "1" for c, kind in zip(point["passed"], kinds) if kind == name)
                         for point in r.points(variant, "steps 1")] for name in names}
        rows.append([variant, *(cell(shares[name], 3) for name in names)])
    return markdown(["variant", *(f"{name} ({kinds.count(name)})" for name in names)], rows)


def steps_table(r):
    heads, rows = {"sampled": "sampled" * r.study.sampled, "sums": r.study.steps_are and f"right {r.study.steps_are}"}, []
    for variant, runs in r.runs.items():
        points = r.points(variant, "steps 1")
        few = [cell([point[key] for point in points], 2) for key in ("sampled", "sums") if heads[key]]
        moved = [cell([point[key] for point in points], 1) for key in ("chosen", "rejected")]
        cost = [f"{statistics.mean(point[key] for point in points) / 1e3:.0f}k" for key in ("generated", "trained")]
        time = [f"{statistics.mean(p.get('seconds', 0) for p in points):.0f}", max(run["memory"] or 0 for run in runs)]
        rows.append([variant, r.rates[variant] or "-", cell(r.shares(variant, "steps 1"), 3), cell(r.gains(variant, "steps 1"), 3, "+"), *few, *moved,
                     *(["-"] * 4 if variant in r.study.bases else [*cost, *time])])
    return markdown(["variant", "lr", "greedy", "over the base", *filter(None, heads.values()), "log p(y+)", "log p(y-)", "generated",
                     "trained on", "seconds", "MiB"], rows)


def tokens_table(r):
    rows = []
    for variant in r.trained:
        steps = statistics.mean(point["steps"] for point in r.points(variant, "tokens 1"))
        rows.append([variant, f"{steps:.0f}", *(cell(r.gains(variant, f"tokens {part:g}"), 3, "+") for part in r.study.token_parts)])
    heads = ["over the base at half of the tokens", "over the base at all"][-len(r.study.token_parts):]
    return markdown(["variant", "steps", *heads], rows)


def claims(r, mark):
    """A row for each claim whose variants are there."""
    told = {claim: pair for claim, pair in r.study.claims.items() if set(pair) <= set(r.runs)}
    values = [r.differences(*pair, mark) for pair in told.values()]
    ps = [p_value(v) for v in values]
    rows = []
    adjusted_ps = holm(ps + [1.0] * (len(r.study.claims) - len(ps)))             # a claim that has no runs yet counts all the same
    for (claim, pair), v, p, adjusted in zip(told.items(), values, ps, adjusted_ps):
        won = ", ".join(map(str, r.flipped(*pair, mark)))
        rows.append([claim, " - ".join(pair), cell(v, 3, "+"), won, f"{p:.3f}", f"{adjusted:.3f}",
                     verdict(statistics.mean(v), adjusted)])
    return rows


def ends(runs, looks):
    """Cells of some of PAIRS: the mean of the first and of the last quarter."""
    cells = []
    for key in looks:
        rows = [run["pairs"].get(key) or [None] for run in runs]
        parts = [[v for row in rows for v in row[part] if v is not None]
                 for part in (slice(BINS // 4), slice(-BINS // 4, None))]
        cells.append(" → ".join(f"{statistics.mean(part):.2f}" if part else "-" for part in parts))
    return cells


def tuning_table(r):
    tried = {}
    for (variant, lr, seed), row in sorted(r.found.items(), key=str):
        if lr and seed == r.study.first_seed:
            tried.setdefault(variant, {})[lr] = at(row, "steps 1")["validation"]
    return markdown(["variant", "lr: score"], [
        [variant, ", ".join(f"{lr:g}: {tried[variant][lr]:.3f}" for lr in sorted(tried[variant]))]
        for variant in r.study.relatives if variant in tried])


def relatives(study):
    """The table of variants, for the documents."""
    return markdown(["variant", "flags beside `--preset tiny`", "what it is"],
                    [[variant, f"`{flags}`" if flags else "none", words] for variant, (flags, words) in study.relatives.items()])


def page(tables, study):
    """The file of tables."""
    return f"What `python {' '.join([study.command, *study.words[:1]])}` prints.\n\n{tables}\n"


# ----------------------------------------------------------------------------- pictures
def draw(r, folder):
    """study.png, compute.png, pairs.png; another study's have its name."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25})
    own = "" if r.study.name == "study" else f"{r.study.name}_"
    for name, drawing, size in ((r.study.name, draw_shares, (8, 0.34 * len(r.trained) + 1.2)),
                                (f"{own}compute", draw_compute, (7, 4)), (f"{own}pairs", draw_pairs, (9, 5.4))):
        figure = plt.figure(figsize=size, layout="constrained")
        drawing(r, figure)
        figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close("all")


def draw_shares(r, figure):
    """What each variant gains over its base, at equal steps and at equal tokens."""
    axis, shown = figure.subplots(), r.trained
    for mark, label, shift, look in (("steps 1", "equal steps", -0.14, dict(fmt="o", color="#0072b2")),
                                     ("tokens 1", "equal tokens", 0.14, dict(fmt="s", color="#d55e00"))):
        cells = [interval(r.gains(variant, mark)) for variant in shown]
        means, halves = np.nan_to_num(np.array(cells)).T
        axis.errorbar(means, np.arange(len(cells)) + shift, xerr=halves, markersize=4.5, label=label, **look)
        for place, variant in enumerate(shown):
            gains = r.gains(variant, mark)
            axis.plot(gains, [place + shift] * len(gains), ".", color=look["color"], markersize=3, alpha=0.35)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(shown)), shown)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("share of test prompts answered right, over the base (points: seeds)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def draw_compute(r, figure):
    """What is gained over the base, over the tokens generated and trained on."""
    axis = figure.subplots()
    for i, variant in enumerate(v for v in r.study.computed if v in r.runs):
        marks = sorted((statistics.mean(p["tokens"] for p in r.points(variant, mark)), *interval(r.gains(variant, mark)))
                       for mark in (*(f"tokens {part:g}" for part in r.study.token_parts), "steps 1"))
        x, y, half = np.array([(0, 0, 0), *marks]).T
        axis.errorbar(x / 1e3, y, np.nan_to_num(half), marker="os^vDP*X"[i], markersize=4, capsize=2, linewidth=1.2, label=variant)
    axis.set_xlabel("thousand tokens generated and trained on")
    axis.set_ylabel("share answered right, greedy, over the base")
    axis.legend(frameon=False, fontsize=8)


def draw_pairs(r, figure):
    """What fresh pairs are like over the run, and beside it the held-out log-probs."""
    axes = figure.subplots(2, 3)
    for i, variant in enumerate(v for v in r.study.in_pairs if v in r.runs):
        runs = r.runs[variant]
        for axis, key in zip(axes.flat, [key for key in r.looks if key != "gen/eos_fraction" or not r.study.steps_are]):
            rows = np.array([run["pairs"].get(key) or [np.nan] * BINS for run in runs], float)
            axis.plot((np.arange(BINS) + 0.5) / BINS, rows.mean(0), color=f"C{i}", label=variant)
            axis.set_title(PAIRS[key])
        moved = {key: statistics.mean(a[key] - b[key] for a, b in zip(r.points(variant, "steps 1"), r.points("base", "")))
                 for key in ("chosen", "rejected")}
        axes[1, 2].barh([2 * i, 2 * i + 0.8], [moved["chosen"], moved["rejected"]], 0.8, color=f"C{i}", alpha=0.9)
        axes[1, 2].barh([2 * i + 0.8], [moved["rejected"]], 0.8, color="white", alpha=0.5)
    axes[1, 2].set_title("change of log p: y+, pale: y-")
    axes[1, 2].set_yticks([])
    axes[1, 2].invert_yaxis()
    for axis in axes.flat[:5]:
        axis.set_xlabel("part of the run")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8)


# ----------------------------------------------------------------------------- the command
def options(doc, study):
    """The parser of what a study can be told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", help=f"folder of the bases (default runs/{study.name}; with --quick another)")
    parser.add_argument("--figures", help=f"folder of {study.name}.jsonl, tables and pictures (default docs/figures; with "
                        "--quick the bases' own)")
    parser.add_argument("--report", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--quick", action="store_true", help="two variants, two seeds, few steps")
    parser.add_argument("--relatives", action="store_true", help="print the table of variants and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no run after so long")
    parser.add_argument("--variants", default=",".join(study.studied), help="these, comma-separated, in this order")
    parser.add_argument("--seeds", type=int, default=study.seeds, help="of each variant, 1 to 10")
    parser.add_argument("--steps", type=int, default=study.steps, help="where runs are compared at equal steps")
    parser.add_argument("--tokens", type=int, default=study.tokens, help="where they are compared at equal tokens")
    parser.add_argument("--sft-steps", type=int, default=study.sft_steps, help="steps of SFT that make the base")
    parser.add_argument("--rows", type=int, help="rows of each split used (default all)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv=None, study=None, doc=__doc__):
    study = study or Study()
    parser = options(doc, study)
    args = parser.parse_args(argv)
    if args.relatives:
        print(relatives(study))
        return 0
    args.out = args.out or f"runs/{study.name}" + "-quick" * args.quick
    if args.quick:
        args.variants, args.seeds, args.rows = "SAPO-DPO,SFT", 2, 64
        args.steps, args.tokens, args.sft_steps = 8, 10_000, 100
    variants = args.variants.split(",")
    if not set(variants) <= set(study.relatives):
        parser.error(f"--variants: choose from {', '.join(study.relatives)}")
    if not 1 <= args.seeds <= 10:
        parser.error("--seeds must be from 1 to 10")
    for name in ("seeds", "steps", "tokens", "sft_steps"):
        setattr(study, name, getattr(args, name))
    figures = Path(args.figures or (args.out if args.quick else ROOT / "docs/figures"))
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / f"{study.name}.jsonl"
    if args.worker:
        try:
            go(study, args, variants, path)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    code = 0 if args.report else side_by_side(study, sys.argv[1:] if argv is None else argv, args.jobs)
    if code:
        return code
    results = Results(read(path), study)
    if not results.trained:
        print("no variant has all of its runs yet, so there is nothing to show")
        return 0
    tables = report(results)
    (figures / f"{study.name}.md").write_text(page(tables, study), "utf-8")
    draw(results, figures)
    print(f"\n{tables}\n\n{study.name}.md, {study.name}.jsonl and the pictures are in {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
