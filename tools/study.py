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
import itertools
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

from measure import ROOT, Listening, base_model, markdown, opened, rows_of

import numpy as np
import torch

import train
from buffer import Pair, collate
from losses import score
from machine.dataset import Draw
from machine.parallel import World
from machine.report import passes
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
    "end rewritten": ("--after rewrite", "y- goes on after B' to the generator's own end; no seam"),
    "every 2nd": ("--generate-every 2", "pairs are generated on every second step"),
    "every 4th": ("--generate-every 4", "on every fourth"),
    "every 8th": ("--generate-every 8", "on every eighth"),
    "DPO and NLL": ("--nll 1", "dpo+sft: y+ itself is raised as well"),
    "IPO": ("--loss ipo", "the margin is drawn to 1 / (2 beta)"),
    "RPO": ("--loss rpo", "each y+ against every y- of the micro-batch"),
    "SimPO": ("--loss simpo --beta 2", "means, a margin, no reference"),
}
STUDIED = ("SAPO-DPO", "SFT", "SPIN", "offline DPO", "SAPO-ORPO", "a line", "end rewritten", "full response", "on-policy",
           "half", "every 2nd", "every 4th", "every 8th", "DPO and NLL")
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
BASES = {"base": 1, "half the SFT": 0.5, "twice the SFT": 2}        # and what its steps of SFT are multiplied by
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = {"dpo": (3e-5, 1e-4, 3e-4), "orpo": (3e-4, 1e-3, 3e-3)}     # tried at once; then outward while the best is the last
TRIED = 5                                        # rates of a variant at most
ROWS = {"data": "train", "eval_data": "test", "sft_data": "base"}
WORLD = ["--model", str(ROOT / "data/steps_model"), "--max-prompt-length", "64", "--eval-tokens", "96", "--generate-rows", "240",
         *(word for flag, split in ROWS.items()
           for word in ("--" + flag.replace("_", "-"), str(ROOT / f"data/steps_{split}.jsonl")))]
SFT_FLAGS = "--sft-steps {} --sft-lr 3e-3 --sft-batch-size 16"       # of the base
CONSTANT = "--lr-scheduler constant --warmup 12".split()             # so that each point of a run is a result
STEPS, TOKENS, SFT_STEPS = 96, 220_000, 1000
LEARNED = 0.1                                    # a base below this on validation prompts has learned no sums
BINS = 16                                        # of a run's steps, for the curves of its pairs
PAIRS = {       # what is looked at in fresh pairs: head of the table
    "passes": "y- passes", "false": "a false sum in y-", "similarity": "equal tokens", "gen/eos_fraction": "ended early",
    "pairs/segment_gap": "B against B', nats", "pairs/seam_gap": "the seam, nats"}
SUM = re.compile(r"(\d+)([+-])(\d+)=(\d+)")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # 97.5 % points of t, 1 ... 9 degrees


# ----------------------------------------------------------------------------- one run
def run(job):
    """A line of study.jsonl: train as the job says, and measure at its marks, in steps and in tokens."""
    flags = job["flags"].split()
    folder = base_model(job["seed"], [*WORLD, *SFT_FLAGS.format(job["sft_steps"]).split()], job["bases"])
    model, text, cfg = opened(folder, job["seed"], [*WORLD, *CONSTANT, *flags, "--lr", f"{job['lr'] or 0:g}"])
    data, validation, test = (rows_of(split, text, cfg, job["rows"], "steps") for split in ("train", "validation", "test"))
    marks = [("steps", job["steps"]), *(("tokens", share * job["tokens"]) for share in (0.5, 1))]
    counts, points, fresh = {"steps": 0, "generated": 0, "trained": 0, "tokens": 0}, [], []
    step, state = stepper(model, data, text, cfg)
    if not job["lr"]:                                    # the base itself
        start = {**counts, "mark": ["start"], **measured(model, test, text, cfg)}
        points, marks = [start | further(model, validation, test, text, cfg)], []
    seconds, began = 0.0, time.perf_counter()
    while marks:
        lr = train.learning_rate(counts["steps"], 10**9, cfg, cfg.lr)
        metrics = step(lr)
        counts["steps"] += 1
        for kind, key in (("generated", "gen/tokens"), ("trained", "train/tokens")):
            counts[kind] += int(metrics[key])
        counts["tokens"] = counts["generated"] + counts["trained"]
        fresh.append(looked_at(state, metrics, data, text))
        reached = [mark for mark in marks if counts[mark[0]] >= mark[1]]
        if reached:
            seconds += time.perf_counter() - began
            marks = [mark for mark in marks if mark not in reached]
            names = [f"{kind} {value / job[kind]:g}" for kind, value in reached]
            points.append({**counts, "seconds": round(seconds, 1), "mark": names,
                           **measured(model, test, text, cfg)})
            if "steps 1" in names:
                points[-1] |= further(model, validation, test, text, cfg)
            began = time.perf_counter()
    return {key: job[key] for key in ("variant", "flags", "lr", "seed")} | {
        "points": points, "pairs": binned(fresh[:job["steps"]]), "memory": peak_memory(), "torch": torch.__version__}


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
            return sapo_step(state, draw, cfg)
        rows = draw(cfg.batch_size)
        return train.sft_step(model, optimizer, rows, cfg, nullcontext) | {
            "gen/tokens": 0, "train/tokens": sum(len(e.prompt) + len(e.chosen) for e in rows)}

    return step, state


def measured(model, data, text, cfg):
    """Of a model's greedy answers to held-out rows: passed, "1" or "0" for each; sums, the share of right ones."""
    answers, good = heard(model, data, text, cfg)
    right = [true for answer in answers for true in sums(answer)]
    return {"passed": "".join("01"[ok] for ok in good), "sums": round(statistics.mean(right or [0]), 4)}


def further(model, validation, test, text, cfg):
    """What is measured at equal steps alone. The verifier's share, greedy on validation rows and sampled on test rows;
    chosen and rejected, the mean log-probs of the test rows' y+ and of their y-, which are the same for all."""
    pairs = [pair_of_data(test[i]) for i in range(len(test))]
    with torch.no_grad():
        logps = [torch.stack(score(model, collate(pairs[i:i + 60])), 1) for i in range(0, len(pairs), 60)]
    chosen, rejected = torch.cat(logps).mean(0).tolist()
    sampled = heard(model, test, text, cfg, cfg.temperature, cfg.top_k, cfg.top_p)[1]
    return {"validation": statistics.mean(heard(model, validation, text, cfg)[1]), "sampled": statistics.mean(sampled),
            "chosen": round(chosen, 3), "rejected": round(rejected, 3)}


def heard(model, data, text, cfg, *how):
    """([a model's answer to each row], [whether it passes])."""
    model.eval()
    pairs = [Pair(data[i].prompt, data[i].chosen, [], row=i) for i in range(len(data))]
    answers = [text.decode(ids, True) for ids in Listening(data, pairs, cfg, text).answers(model, pairs, *how)]
    model.train()
    return answers, [passes(answer, data.verifiers[i]) for i, answer in enumerate(answers)]


def sums(answer):
    """Whether each sum of an answer is right, in order."""
    return [int(a) + int(f"{op}{b}") == int(c) for a, op, b, c in SUM.findall(answer)]


def looked_at(state, metrics, data, text):
    """PAIRS of a step's fresh pairs; {} where none were generated."""
    if "gen/eos_fraction" not in metrics:
        return {}
    fresh = [state.buffer.pairs[-i] for i in range(1, BATCH + 1)]
    texts = [text.decode(p.rejected, True) for p in fresh]
    own = {"passes": [passes(said, data.verifiers[p.row]) for said, p in zip(texts, fresh)],
           "false": [not all(sums(said)) for said in texts],
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


def chosen_rate(variant, found, seeds):
    """(the learning rate of a variant or None, the runs that choosing it still needs): the best of its loss's three on
    the validation rows of the first seed; while the best is the last on its side, the next one outward is tried."""
    variant = AS.get(variant, variant)
    words = RELATIVES[variant][0].split()
    rates = list(FIRST["orpo" if "orpo" in words else "dpo"])
    while True:
        missing = [(variant, lr, seeds[0]) for lr in rates if (variant, lr, seeds[0]) not in found]
        if missing:
            return None, missing
        scores = [at(found[variant, lr, seeds[0]], "steps 1")["validation"] for lr in rates]
        best = scores.index(max(scores))
        place = GRID.index(rates[best]) + (1 if best else -1)
        if 0 < best < len(rates) - 1 or len(rates) == TRIED or not 0 <= place < len(GRID):
            return rates[best], []
        rates = sorted([*rates, GRID[place]])


def learned(found, n, least=LEARNED):
    """(the first n seeds whose base passes at least this share of validation prompts, the seeds to try next)."""
    seeds = []
    for seed in itertools.count(1):
        row = found.get(("base", None, seed))
        if row is None:
            return seeds, list(range(seed, seed + n - len(seeds)))
        if at(row, "start")["validation"] >= least:
            seeds.append(seed)
        if len(seeds) == n:
            return seeds, []


def todo(found, variants, n, least=LEARNED):
    """The runs that can be started now, the most important first: n seeds of each variant."""
    seeds, more = learned(found, n, least)
    runs = [("base", None, seed) for seed in more]
    if runs:
        return [key for key in runs if key not in found]
    for variant in variants:
        lr, missing = chosen_rate(variant, found, seeds)
        runs += missing or [(variant, lr, seed) for seed in seeds]
    runs += [(base, None, seed) for base in BASES for seed in seeds]
    return [key for key in dict.fromkeys(runs) if key not in found]


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


def go(args, variants, path):
    """All runs that no other process is at, one after another, until there are none or the time is over. Each appends
    its line as it ends."""
    end = time.monotonic() + 60 * (args.minutes or math.inf)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end:
        left = todo(read(path), variants, args.seeds, args.learned)
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
            began, row = time.monotonic(), run(job_of(args, key))
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(row) + "\n")
        print(f"{' '.join(map(str, key))}: {time.monotonic() - began:.0f} s, at least {len(left) - 1} more", flush=True)


def job_of(args, key):
    """What `run` must know."""
    variant, lr, seed = key
    sft_steps = round(args.sft_steps * BASES.get(variant, 1))
    return {"variant": variant, "flags": RELATIVES[variant][0] if lr else "", "lr": lr, "seed": seed, "steps": args.steps,
            "tokens": args.tokens, "sft_steps": sft_steps, "rows": args.rows,
            "bases": str(Path(args.out, f"base-{sft_steps}"))}


def side_by_side(argv, jobs):
    """The same command in several processes at once, which share the runs; the worst exit code."""
    command = [sys.executable, __file__, *argv, "--worker"]
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

    def __init__(self, found, n=5, least=LEARNED):
        self.found = found
        self.seeds, _ = learned(found, n, least)
        self.runs, self.rates = {}, {}
        for variant in [*BASES, *RELATIVES]:
            lr = None if variant in BASES else chosen_rate(variant, found, self.seeds)[0]
            runs = [found.get((variant, lr, seed)) for seed in self.seeds]
            if all(runs):                                # a variant with runs missing is not shown
                self.runs[variant], self.rates[variant] = runs, lr
        self.trained = [variant for variant in self.runs if variant not in BASES]

    def points(self, variant, mark):
        return [at(run, "start" if variant in BASES else mark) for run in self.runs[variant]]

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
             f"± 95 % t-interval over {n} seeds: {', '.join(map(str, r.seeds))}.{unlearned(r)}\n", "At equal steps:\n",
             steps_table(r), "\nAt equal tokens, generated and trained on together:\n", tokens_table(r)]
    for mark, name in (("steps 1", "equal steps"), ("tokens 1", "equal tokens")):
        rows = claims(r, mark)
        if rows and n > 1:
            lines += [f"\nThe claims at {name}: differences seed by seed, p of a paired t-test, and Holm's correction over "
                      f"{len(CLAIMS)} claims:\n",
                      markdown(["claim", "difference", "mean", "won, lost prompts", "p", "Holm's p", "here"], rows)]
    lines += ["\nIs y- worse, and where? Fresh pairs, first and last quarter of a run, all seeds:\n",
              markdown(["variant", *PAIRS.values()], [[v, *ends(runs)] for v, runs in r.runs.items() if runs[0]["pairs"]]),
              "\nLearning rates tried: greedy share on validation rows, first seed:\n", tuning_table(r)]
    return "\n".join(lines)


def unlearned(r):
    """What is said of the bases that were passed over."""
    tried = [key[2] for key in r.found if key[0] == "base" and key[2] < max(r.seeds) and key[2] not in r.seeds]
    scores = [f"{share(at(r.found['base', None, seed], 'start')):.3f} (seed {seed})" for seed in sorted(tried)]
    return f" Bases that had not learned: {', '.join(scores)}." if scores else ""


def steps_table(r):
    rows = []
    for variant, runs in r.runs.items():
        points = r.points(variant, "steps 1")
        few = [cell([point[key] for point in points], 2) for key in ("sampled", "sums")]
        moved = [cell([point[key] for point in points], 1) for key in ("chosen", "rejected")]
        cost = [f"{statistics.mean(point[key] for point in points) / 1e3:.0f}k" for key in ("generated", "trained")]
        time = [f"{statistics.mean(p.get('seconds', 0) for p in points):.0f}", max(run["memory"] or 0 for run in runs)]
        rows.append([variant, r.rates[variant] or "-", cell(r.shares(variant, "steps 1"), 3), cell(r.gains(variant, "steps 1"), 3, "+"), *few, *moved,
                     *(["-"] * 4 if variant in BASES else [*cost, *time])])
    return markdown(["variant", "lr", "greedy", "over the base", "sampled", "right sums", "log p(y+)", "log p(y-)",
                     "generated", "trained on", "seconds", "MiB"], rows)


def tokens_table(r):
    rows = []
    for variant in r.trained:
        steps = statistics.mean(point["steps"] for point in r.points(variant, "tokens 1"))
        rows.append([variant, f"{steps:.0f}", *(cell(r.gains(variant, f"tokens {part}"), 3, "+") for part in ("0.5", "1"))])
    return markdown(["variant", "steps", "over the base at half of the tokens", "at all"], rows)


def claims(r, mark):
    """A row for each claim whose variants are there."""
    told = {claim: pair for claim, pair in CLAIMS.items() if set(pair) <= set(r.runs)}
    values = [r.differences(*pair, mark) for pair in told.values()]
    ps = [p_value(v) for v in values]
    rows = []
    adjusted_ps = holm(ps + [1.0] * (len(CLAIMS) - len(ps)))             # a claim that has no runs yet counts all the same
    for (claim, pair), v, p, adjusted in zip(told.items(), values, ps, adjusted_ps):
        won = ", ".join(map(str, r.flipped(*pair, mark)))
        rows.append([claim, " - ".join(pair), cell(v, 3, "+"), won, f"{p:.3f}", f"{adjusted:.3f}",
                     verdict(statistics.mean(v), adjusted)])
    return rows


def ends(runs):
    """Cells of PAIRS: the mean of the first and of the last quarter."""
    cells = []
    for key in PAIRS:
        rows = [run["pairs"].get(key) or [None] for run in runs]
        parts = [[v for row in rows for v in row[part] if v is not None]
                 for part in (slice(BINS // 4), slice(-BINS // 4, None))]
        cells.append(" → ".join(f"{statistics.mean(part):.2f}" if part else "-" for part in parts))
    return cells


def tuning_table(r):
    tried = {}
    for (variant, lr, seed), row in sorted(r.found.items(), key=str):
        if lr and seed == r.seeds[0]:
            tried.setdefault(variant, {})[lr] = at(row, "steps 1")["validation"]
    return markdown(["variant", "lr: score"], [
        [variant, ", ".join(f"{lr:g}: {tried[variant][lr]:.3f}" for lr in sorted(tried[variant]))]
        for variant in RELATIVES if variant in tried])


def relatives():
    """The table of variants, for the documents."""
    return markdown(["variant", "flags beside `--preset tiny`", "what it is"],
                    [[variant, f"`{flags}`" if flags else "none", words] for variant, (flags, words) in RELATIVES.items()])


def page(tables):
    """study.md."""
    return f"What `python tools/study.py` prints.\n\n{tables}\n"


# ----------------------------------------------------------------------------- pictures
COMPUTED = ("SAPO-DPO", "every 2nd", "every 4th", "every 8th", "SPIN", "on-policy", "SFT")
IN_PAIRS = ("SAPO-DPO", "a line", "end rewritten", "full response", "SPIN", "on-policy")


def draw(r, folder):
    """study.png, compute.png, pairs.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25})
    for name, drawing, size in (("study", draw_shares, (8, 0.34 * len(r.runs) + 1.2)), ("compute", draw_compute, (7, 4)),
                                ("pairs", draw_pairs, (9, 5.4))):
        figure = plt.figure(figsize=size, layout="constrained")
        drawing(r, figure)
        figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close("all")


def draw_shares(r, figure):
    """What each variant gains over its base, at equal steps and at equal tokens."""
    axis, shown = figure.subplots(), [variant for variant in r.runs if variant != "base"]
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
    for i, variant in enumerate(v for v in COMPUTED if v in r.runs):
        marks = sorted((statistics.mean(p["tokens"] for p in r.points(variant, mark)), *interval(r.gains(variant, mark)))
                       for mark in ("tokens 0.5", "tokens 1", "steps 1"))
        x, y, half = np.array([(0, 0, 0), *marks]).T
        axis.errorbar(x / 1e3, y, np.nan_to_num(half), marker="os^vDP*"[i], markersize=4, capsize=2, linewidth=1.2, label=variant)
    axis.set_xlabel("thousand tokens generated and trained on")
    axis.set_ylabel("share answered right, greedy, over the base")
    axis.legend(frameon=False, fontsize=8)


def draw_pairs(r, figure):
    """What fresh pairs are like over the run, and beside it the held-out log-probs."""
    axes = figure.subplots(2, 3)
    for i, variant in enumerate(v for v in IN_PAIRS if v in r.runs):
        runs = r.runs[variant]
        for axis, key in zip(axes.flat, [key for key in PAIRS if key != "gen/eos_fraction"]):
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
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", default="runs/study", help="folder of the bases")
    parser.add_argument("--figures", help="folder of study.jsonl, tables and pictures (default docs/figures; with --quick "
                        "the bases' own)")
    parser.add_argument("--report", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--quick", action="store_true", help="two variants, two seeds, few steps")
    parser.add_argument("--relatives", action="store_true", help="print the table of variants and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no run after so long")
    parser.add_argument("--variants", default=",".join(STUDIED), help="these, comma-separated, in this order")
    parser.add_argument("--seeds", type=int, default=5, help="of each variant, 1 to 10")
    parser.add_argument("--learned", type=float, default=LEARNED, help="share of validation prompts that a seed's base must "
                        "pass, or the next seed is taken")
    parser.add_argument("--steps", type=int, default=STEPS, help="where runs are compared at equal steps")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="where they are compared at equal tokens")
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS, help="steps of SFT that make the base")
    parser.add_argument("--rows", type=int, help="rows of each split used (default all)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.relatives:
        print(relatives())
        return 0
    if args.quick:
        args.out, args.variants, args.seeds, args.rows = "runs/study-quick", "SAPO-DPO,SFT", 2, 64
        args.steps, args.tokens, args.sft_steps, args.learned = 8, 10_000, 100, 0.0
    variants = args.variants.split(",")
    if not set(variants) <= set(RELATIVES):
        parser.error(f"--variants: choose from {', '.join(RELATIVES)}")
    if not 1 <= args.seeds <= 10:
        parser.error("--seeds must be from 1 to 10")
    figures = Path(args.figures or (args.out if args.quick else ROOT / "docs/figures"))
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / "study.jsonl"
    if args.worker:
        go(args, variants, path)
        return 0
    code = 0 if args.report else side_by_side(sys.argv[1:] if argv is None else argv, args.jobs)
    if code:
        return code
    results = Results(read(path), args.seeds, args.learned)
    tables = report(results)
    (figures / "study.md").write_text(page(tables), "utf-8")
    draw(results, figures)
    print(f"\n{tables}\n\nstudy.md, study.jsonl and the pictures are in {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
