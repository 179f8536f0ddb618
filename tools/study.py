"""The study: SAPO, its relatives and its settings on the tiny world, over several seeds, tuned alike.

    python tools/study.py               everything; what is done already is not done again
    python tools/study.py --quick       four arms, two seeds, few steps: to try the script, not to learn anything
    python tools/study.py --relatives   the table of arms, as the README has it

Every arm is `python train.py` with the flags of its row below, from the same base (one a seed), for the same steps on
the same prompts. Each arm's learning rate is the best of its loss's four on the validation rows (mean of the judge's three
scores, the first seed); what is reported is measured on the test rows, as mean and 95 % t-interval over seeds. Writes
study.json, study.png, ablations.png and pairs.png into --figures, and the tables, as Markdown, to study.md and the screen.

Each run is a process of its own, on one thread, --jobs at a time; its folder is named after its flags. Left out: memory
by stage (tools/bench.py has it), real checkpoints.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train
from buffer import collate, pack, unpack
from losses import score
from machine.checkpoint import from_disk, to_disk
from machine.dataset import Data, Text, read_rows
from machine.flags import parse
from machine.folders import companions, load_pretrained, write_json
from machine.parallel import World
from machine.report import Held, evaluate
from model import generate
from sapo import State, make_pairs

BATCH = 16                          # pairs a step of the tiny preset; a buffer of so many is a buffer of one batch
RELATIVES = {       # arm: what it changes in the tiny preset (segment 12, alpha 0.5, EMA every 2, reference every epoch, buffer 256)
    "SAPO-DPO": "",
    "SAPO-ORPO": "--loss orpo",
    "SAPO-SLiC": "--loss slic",
    "EMA only": f"--buffer-size {BATCH}",
    "buffer only": "--alpha 0 --ema-every 1",
    "segment only": f"--alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "full response": "--segment 100%",
    "on-policy": f"--segment 100% --alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "full response ORPO": "--loss orpo --segment 100%",
    "on-policy ORPO": f"--loss orpo --segment 100% --alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "SPIN": f"--segment 100% --alpha 0 --ema-every epoch --ref-refresh epoch --buffer-size {BATCH}",
    "SPIN with EMA and buffer": "--segment 100% --ema-every epoch --ref-refresh epoch",
    "offline DPO": f"--rejected data --ref-refresh never --buffer-size {BATCH}",
    "offline ORPO": f"--loss orpo --rejected data --buffer-size {BATCH}",
    "SFT": f"--loss orpo --lam 0 --rejected data --buffer-size {BATCH}",
}
WORDS = {
    "SAPO-DPO": "the paper's", "SAPO-ORPO": "the paper's", "SAPO-SLiC": "SAPO's pairs, SLiC-HF's hinge", "EMA only": "SAPO without the buffer",
    "buffer only": "SAPO without the EMA: the policy writes", "segment only": "SAPO without either", "full response": "EMA and buffer, B is all of y+",
    "on-policy": "none of the three: the policy writes all of y-", "full response ORPO": "the same with ORPO, as in the paper's ablation",
    "on-policy ORPO": "the same with ORPO, as in the paper's ablation", "SPIN": "a copy of the policy, one epoch old at most, writes and is the reference",
    "SPIN with EMA and buffer": "the copy is an average, and old pairs come again", "offline DPO": "y- is the data's; the reference is the base",
    "offline ORPO": "y- is the data's", "SFT": "ORPO without its second term; y- is not looked at"}
RATES = {"dpo": (3e-5, 1e-4, 3e-4, 1e-3), "slic": (1e-4, 3e-4, 1e-3, 3e-3), "orpo": (1e-4, 3e-4, 1e-3, 3e-3)}     # around the best of a first trial
ABLATIONS = {       # of SAPO-DPO, at its learning rate: {what: {value: flags}}; no flags: SAPO-DPO itself
    "alpha": {"0": "--alpha 0", "0.5": "", "0.9": "--alpha 0.9", "0.99": "--alpha 0.99"},
    "EMA every ... steps": {"1": "--ema-every 1", "2": "", "8": "--ema-every 8"},
    "buffer, batches": {"1": "--buffer-size 16", "4": "--buffer-size 64", "16": "", "64": "--buffer-size 1024"},
    "segment": {"10 %": "--segment 10%", "12 tokens": "", "25 %": "--segment 25%", "50 %": "--segment 50%", "75 %": "--segment 75%", "100 %": "--segment 100%"},
    "end token inside B'": {"stop": "", "ban": "--eos-in-segment ban"},
    "tokens compared": {"response": "", "segment": "--score-on segment"},
    "reference": {"never": "--ref-refresh never", "epoch": "", "epoch, policy": "--ref-from policy"},
    "whole response with": {"nothing": "--segment 100% --alpha 0 --ema-every 1 --buffer-size 16", "EMA": "--segment 100% --buffer-size 16",
                            "buffer": "--segment 100% --alpha 0 --ema-every 1", "both": "--segment 100%"},
}
CLAIMS = {          # what the paper says: (better, than)
    "SAPO over SPIN": ("SAPO-DPO", "SPIN"), "SAPO over offline DPO": ("SAPO-DPO", "offline DPO"), "SAPO over offline ORPO": ("SAPO-ORPO", "offline ORPO"),
    "EMA and buffer over on-policy": ("full response", "on-policy"), "the same, ORPO": ("full response ORPO", "on-policy ORPO"),
    "a segment over the full response": ("SAPO-DPO", "full response"), "that too, ORPO": ("SAPO-ORPO", "full response ORPO"),
    "(ours) SAPO over SFT": ("SAPO-ORPO", "SFT"), "(ours) DPO's SAPO over SFT": ("SAPO-DPO", "SFT")}
JUDGE = ("judge, greedy", "judge, sampled", "judge, temperature 1")
COLUMNS = {         # of the table: (head, digits)
    **{k: (k.removeprefix("judge, "), 2) for k in JUDGE}, "accuracy": ("accuracy, segment", 2), "accuracy, whole": ("accuracy, whole", 2),
    "nll": ("NLL", 3), "distinct-2": ("distinct-2", 3), "repeated": ("repeated", 2), "length": ("tokens", 1)}
STAGES = {"writing": ("prefill", "decode"), "reference": ("reference",), "forward": ("forward",), "backward": ("backward",), "optimizer, EMA": ("optimizer", "ema")}
PAIRS = {           # panels of pairs.png: {title: {key of metrics.jsonl: line}}
    "y+ and y- that pass the judge": {"pairs/chosen_judge": ":", "pairs/rejected_judge": "-"}, "log p(B) less log p(B'), nats": {"pairs/segment_gap": "-"},
    "log p(C) after B less after B', nats": {"pairs/seam_gap": "-"}, "share of B' equal to B": {"pairs/identical": "-"},
    "share of y- ended early by B'": {"gen/eos_fraction": "-"}, "drawn pairs with y+ ahead": {"rewards/accuracies": "-"}}
IN_PAIRS = ("SAPO-DPO", "SAPO-ORPO", "full response", "SPIN", "on-policy")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # 97.5 % points of t with 1 ... 9 degrees of freedom
SECONDS = {"base": 40, "run": 33}   # of a process on one thread of a 2-core machine, both cores busy


# ------------------------------------------------------------------------------------------------ one run, in a process of its own

QUIET = "--preset tiny --device cpu --eval-every 0 --save-every 0 --keep 1 --eval-rows 1 --samples 0".split()


def base_flags(seed, sft_steps):
    """The warm-up, written as a model folder: one step at learning rate 0 moves nothing."""
    return [*QUIET, "--seed", str(seed), "--sft-steps", str(sft_steps), "--steps", "1", "--lr", "0"]


def arm_flags(flags, base, seed, steps, lr):
    return [*QUIET, "--model", str(base / "model"), "--no-from-scratch", "--sft-steps", "0", "--sft-data", "",
            "--seed", str(seed), "--steps", str(steps), "--lr", f"{lr:g}", *flags.split()]


def known(path, flags):
    """The JSON that a job with these flags left at `path`, or None."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if found["flags"] == flags else None


def work(job):
    """In the child: train unless that was done, then measure on one split's rows. Leaves trained.json and <split>.json."""
    folder, base, flags = Path(job["folder"]), Path(job["base"]), job["flags"]
    if not known(folder / "trained.json", flags):
        began, train.draw_curves = time.perf_counter(), lambda folder: None
        code = train.main([*flags, "--out", str(folder), "--overwrite"])
        if code or not (folder / "model").is_dir():      # stopped, which is code 0, leaves no model
            return code or 1
        for spare in ("checkpoint", "ema"):
            shutil.rmtree(folder / spare)
        lines = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines()) if "loss" in r and "step" in r]
        stages = {name: sum(r.get(f"time/{part}", 0.0) for r in lines for part in parts) for name, parts in STAGES.items()}
        write_json(folder / "trained.json", {"flags": flags, "seconds": time.perf_counter() - began, "stages": stages, "memory": peak_memory()})
    if job["split"]:
        found = measure(folder / "model", base, job["split"], job["seed"], job["rows"])
        write_json(folder / f"{job['split']}.json", {"flags": flags, **found})
    return 0


def peak_memory():
    """MiB this process has held at most, all libraries included; None on Windows."""
    with suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(folder, base, split, seed, rows=None):
    """{metric: value} of a model folder on a split's rows, as train.py's evaluation has it, and what only answers show.

    accuracy: y- is a segment rewritten by the base, accuracy, whole: the base's whole answer; the same y- for all arms of a
    seed (made here if they are not there, so the base comes first). Of answers at temperature 1: distinct-2, two-word sequences that differ, of all; repeated, answers whose wording
    (facts blanked) another has as well; length, in tokens.
    """
    cfg = parse([*QUIET, "--seed", str(seed)])[0]
    model = load_pretrained(folder)
    text = Text(companions(folder), folder, model.config)
    data = Data(read_rows(ROOT / "data" / f"tiny_{split}.jsonl")[:rows], text, cfg, split)
    answers = {}

    def writer(model, pairs, temperature=0, top_k=0, top_p=1.0):
        generator, ids = torch.Generator().manual_seed(seed), []
        for i in range(0, len(pairs), 64):
            part = [p.prompt for p in pairs[i:i + 64]]
            ids += generate(model, part, [cfg.eval_tokens] * len(part), text.eos, temperature, top_k, top_p, generator, text.vocab)
        answers[temperature] = ids
        return ids

    segment, whole = (against(base, share, split, data, text, cfg) for share in (cfg.segment, "100%"))
    found = evaluate(model, Held(data, segment, []), writer, cfg, World("cpu"), text, nullcontext, lambda: None)
    del found["margin"]                                  # from the start, which here would be the model itself
    texts = [text.decode(ids, True) for ids in answers[1.0]]
    return found | {"accuracy, whole": ahead(model, whole), "distinct-2": distinct(texts), "repeated": repeated(texts, data.judges),
                    "length": statistics.mean(map(len, answers[1.0]))}


def against(base, segment, split, data, text, cfg):
    """The split's rows as Pairs: y- rewritten by the base, made once and kept in its folder."""
    path = base / f"held-{split}-{segment.strip('%')}-{len(data)}"
    if not path.with_suffix(".json").exists():
        cfg = dataclasses.replace(cfg, segment=segment)
        state = State.start(load_pretrained(base / "model"), cfg, text.eos, cfg.seed, vocab=text.vocab)
        to_disk(pack(make_pairs(state, [data[i] for i in range(len(data))], cfg)), path)
    return unpack(from_disk(path))


@torch.no_grad()
def ahead(model, pairs):
    """Share of pairs whose y+ has the higher mean log-prob."""
    right = 0
    for i in range(0, len(pairs), BATCH):
        batch = collate(pairs[i:i + BATCH])
        chosen, rejected = score(model, batch)
        right += int((chosen / batch.lengths[:, 0] > rejected / batch.lengths[:, 1]).sum())
    return right / len(pairs)


def distinct(texts):
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
    pairs = [pair for w in words for pair in zip(w, w[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def repeated(texts, judges):
    """Share of answers whose wording another answer has as well; every prompt has other facts, so those are blanked."""
    facts = {word for judge in judges.values() for words in judge.values() for word in words}
    blank = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(facts)))}|his|him)\b", re.IGNORECASE)
    worded = [blank.sub("_", text) for text in texts]
    return sum(worded.count(w) > 1 for w in worded) / max(1, len(worded))


# ------------------------------------------------------------------------------------------------ all runs

class Failed(Exception):
    """A run ended badly; the message says which, and shows the end of its log."""


class Study:
    """The runs of one study: `do` starts those that are not done yet, `found` reads what they left."""

    def __init__(self, args):
        self.args, self.out, self.done, self.began, self.spent = args, Path(args.out), 0, time.monotonic(), []
        self.seeds = range(1, args.seeds + 1)

    def base(self, seed):
        return self.out / f"base-{self.args.sft_steps}-seed-{seed}"

    def job(self, flags, lr, seed, split):
        """One run and the rows it is measured on; lr None: the base."""
        base = self.base(seed)
        if lr is None:
            folder, given = base, base_flags(seed, self.args.sft_steps)
        else:
            name = re.sub(r"[^\w.]+", "-", flags.replace("%", "pc")).strip("-") or "sapo"
            folder, given = self.out / f"{name}-lr-{lr:g}-steps-{self.args.steps}-seed-{seed}", arm_flags(flags, base, seed, self.args.steps, lr)
        return {"folder": str(folder), "base": str(base), "flags": given, "split": split, "seed": seed, "rows": self.args.rows}

    def found(self, flags, lr, seed, split="test"):
        job = self.job(flags, lr, seed, split)
        return known(Path(job["folder"]) / f"{split or 'trained'}.json", job["flags"])

    def do(self, what, jobs):
        """All jobs that have left no result, --jobs at a time; the first that fails ends the study when those begun are over."""
        jobs = list({(j["folder"], j["split"]): j for j in jobs}.values())
        left = [j for j in jobs if not known(Path(j["folder"]) / f"{j['split'] or 'trained'}.json", j["flags"])]
        print(f"{what}: {len(jobs)} runs, {len(jobs) - len(left)} of them done before", flush=True)

        def one(numbered):
            number, job = numbered
            began = time.monotonic()
            log = Path(job["folder"] + ".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as file:
                code = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                      env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}).returncode
            if code:
                raise Failed(f"{job['folder']} ended with code {code}:\n{log.read_text('utf-8')[-1500:]}")
            print(f"  {number}/{len(left)}  {Path(job['folder']).name}  {time.monotonic() - began:.0f} s", flush=True)

        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(one, numbered) for numbered in enumerate(left, 1)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def tune(self, arms):
        """{arm: (best learning rate, {rate: validation score})}."""
        rates = {arm: self.args.rates or RATES[loss_of(flags)] for arm, flags in arms.items()}
        if all(len(r) == 1 for r in rates.values()):
            return {arm: (r[0], {}) for arm, r in rates.items()}
        seed = self.seeds[0]
        self.do("base on validation rows", [self.job("", None, seed, "validation")])         # leaves the y- that all others use
        self.do("tuning", [self.job(arms[arm], lr, seed, "validation") for arm, tried in rates.items() for lr in tried])
        scores = {arm: {lr: judged(self.found(arms[arm], lr, seed, "validation")) for lr in tried} for arm, tried in rates.items()}
        return {arm: (max(s, key=s.get), s) for arm, s in scores.items()}


def loss_of(flags):
    words = flags.split()
    return words[words.index("--loss") + 1] if "--loss" in words else "dpo"


def judged(row):
    return statistics.mean(row[k] for k in JUDGE)


def interval(values):
    """(mean, half of the 95 % t-interval) of a few values; of one, (it, nan)."""
    n = len(values)
    return statistics.mean(values), STUDENT[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def cell(values, digits, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def verdict(values):
    """Of paired differences: does the interval leave 0 out, and on which side?"""
    mean, half = interval(values)
    return "cannot be told" if not abs(mean) > half else "holds" if mean > 0 else "does not hold"


# ------------------------------------------------------------------------------------------------ tables and figures

def markdown(heads, rows):
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def relatives():
    """The table of arms, for the README."""
    return markdown(["arm", "flags beside `--preset tiny`", "what it is"],
                    [[arm, f"`{flags}`" if flags else "none", WORDS[arm]] for arm, flags in RELATIVES.items()])


def report(results, out):
    """The tables as Markdown, from the dict that study.json holds."""
    arms, ablations, seeds, few = results["arms"], results["ablations"], results["seeds"], results["ablation_seeds"]
    n = len(seeds)
    lines = [f"Test rows, {results['steps']} steps of {BATCH} pairs, mean ± 95 % t-interval over {n} seed{'s' * (n > 1)}; "
             f"lr {'chosen on validation rows' if any(a['tuning'] for a in arms.values()) else 'not chosen, but given'}.\n",
             markdown(["arm", "lr", *(head for head, _ in COLUMNS.values())],
                      [[arm, f"{a['lr']:g}" if a["lr"] else "-", *(cell([r[k] for r in a["test"]], digits) for k, (_, digits) in COLUMNS.items())]
                       for arm, a in arms.items()])]
    claims = [[claim, f"{a} - {b}", *(cell([x - y for x, y in zip(*(map(f, arms[k]["test"]) for k in (a, b)))], 2, "+") for f in
               (judged, *(lambda r, k=k: r[k] for k in JUDGE))), verdict([judged(x) - judged(y) for x, y in zip(arms[a]["test"], arms[b]["test"])])]
              for claim, (a, b) in CLAIMS.items() if a in arms and b in arms]
    if claims and n > 1:
        lines += ["\nDifferences of the judge's scores, seed by seed (the same base and prompts). Holds, does not hold: the mean's interval leaves 0 out; "
                  "it is one of several looked at, none corrected for that:\n",
                  markdown(["claim", "difference", "mean", *(COLUMNS[k][0] for k in JUDGE), "here"], claims)]
    if ablations:
        lines += [f"\nSAPO-DPO with one thing changed, lr {arms['SAPO-DPO']['lr']:g}, {few} seeds:\n",
                  markdown(["what", "value", *(COLUMNS[k][0] for k in COLUMNS)],
                           [[what, value, *(cell([r[k] for r in rows], COLUMNS[k][1]) for k in COLUMNS)]
                            for what, values in ablations.items() for value, rows in values.items()])]
    lines += ["\nIs y- worse? Share of y- that the judge passes, log p(B) - log p(B') and log p(C) after B less after B' (nats), B' equal to B, "
              "y- ended early: first and last fifth of the run, all seeds:\n",
              markdown(["arm", "y- passes", "segment", "seam", "identical", "ended early"],
                       [[arm, *(f"{a['pairs'][k][0]:.2f} → {a['pairs'][k][1]:.2f}" for k in
                                ("pairs/rejected_judge", "pairs/segment_gap", "pairs/seam_gap", "pairs/identical", "gen/eos_fraction"))]
                        for arm, a in arms.items() if a.get("pairs")]),
              "\nSeconds of a run's steps by stage, and MiB held at most (one thread, two runs at a time):\n",
              markdown(["arm", *STAGES, "all steps", "MiB"],
                       [[arm, *(f"{s:.1f}" for s in a["stages"].values()), f"{sum(a['stages'].values()):.1f}", f"{a['memory'] or 0:.0f}"]
                        for arm, a in arms.items() if a.get("stages")])]
    if any(a["tuning"] for a in arms.values()):
        lines += ["\nTuning: mean of the judge's scores on validation rows, one seed:\n",
                  markdown(["arm", "lr: score"], [[arm, ", ".join(f"{lr}: {s:.2f}" for lr, s in a["tuning"].items())] for arm, a in arms.items() if a["tuning"]])]
    return "\n".join(lines)


def curves(folder):
    """{key: values by step} of a run's metrics.jsonl."""
    rows = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines()) if "loss" in r and "step" in r]
    return {k: np.array([r[k] for r in rows]) for panel in PAIRS.values() for k in panel if k in rows[0]}


def draw(results, lines, folder):
    """study.png, ablations.png, pairs.png, 900 pixels wide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    colours, markers = ("#0072b2", "#d55e00", "#009e73"), "osD"
    arms = results["arms"]

    def dots(axis, rows, keys, along="x", scale=0.24):
        """One row (or column) of dots with intervals for each of `rows`, lists of results."""
        for key, colour, marker, i in zip(keys, colours, markers, range(3)):
            means, halves = zip(*(interval([r[key] for r in row]) for row in rows))
            places = np.arange(len(rows)) + scale * (i - (len(keys) - 1) / 2)
            halves, x, y = np.nan_to_num(halves), *((means, places) if along == "x" else (places, means))
            axis.errorbar(x, y, fmt=marker, color=colour, markersize=4.5, elinewidth=1.2, label=COLUMNS[key][0], **{f"{along}err": halves})

    figure, axes = plt.subplots(1, 3, figsize=(9, 0.36 * len(arms) + 1.5), layout="constrained", width_ratios=(2.2, 1, 1), sharey=True)
    rows = [a["test"] for a in arms.values()]
    for axis, keys, title in ((axes[0], JUDGE, "share of stories without a slip"), (axes[1], ("nll",), "NLL per token of y+"),
                              (axes[2], ("distinct-2",), "distinct-2")):
        dots(axis, rows, keys)
        axis.set_title(title)
        axis.locator_params(axis="x", nbins=6 if axis is axes[0] else 4)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    axes[0].set_xlim(-0.02, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(folder / "study.png", dpi=100)

    if results["ablations"]:
        figure, axes = plt.subplots(2, 4, figsize=(9, 5.2), layout="constrained", sharey=True)
        for axis, (what, values) in zip(axes.flat, results["ablations"].items()):
            dots(axis, list(values.values()), JUDGE, "y", 0.2)
            axis.set_xticks(range(len(values)), [v.replace(" %", "%").replace(" ", "\n", 1) for v in values], fontsize=8)
            axis.set_xlim(-0.5, len(values) - 0.5)
            axis.set_title(what)
            axis.set_ylim(-0.02, 1.02)
        for axis in axes[:, 0]:
            axis.set_ylabel("stories without a slip")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(folder / "ablations.png", dpi=100)

    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PAIRS.items()):
        for arm, runs in lines.items():
            for key, style in keys.items():
                if key == "pairs/chosen_judge" and arm != next(iter(lines)):
                    continue                             # y+ is everybody's
                mean = np.mean([run[key] for run in runs], 0)
                n = max(1, len(mean) // 12)              # a running mean
                smooth = np.convolve(np.pad(mean, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
                axis.plot(np.arange(1, len(mean) + 1), smooth, style, color="black" if style == ":" else f"C{list(lines).index(arm)}",
                          label="y+ (all arms)" if style == ":" else arm)
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(folder / "pairs.png", dpi=100)
    plt.close("all")


# ------------------------------------------------------------------------------------------------ the command

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", help="folder of the runs (default runs/study; with --quick runs/study-quick)")
    parser.add_argument("--figures", help="folder of study.json and the pictures (default figures; with --quick the runs' own)")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: four arms, two seeds, 30 steps, no tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--arms", help="only these, comma-separated")
    parser.add_argument("--seeds", type=int, help="of the arms (default 5; 10 at most)")
    parser.add_argument("--ablation-seeds", type=int, help="of the ablations (default 3); 0 leaves them out")
    parser.add_argument("--rates", help="learning rates to choose from, for all arms; one: no tuning")
    parser.add_argument("--steps", type=int, help="of every run (default 120)")
    parser.add_argument("--sft-steps", type=int, help="warm-up of the base (default 500)")
    parser.add_argument("--rows", type=int, help="validation and test rows used (default all)")
    parser.add_argument("--relatives", action="store_true", help="print the table of arms and stop")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        return work(json.loads(args.job))
    if args.relatives:
        print(relatives())
        return 0
    usual = dict(out="runs/study", figures="figures", arms=",".join(RELATIVES), seeds=5, ablation_seeds=3, rates="", steps=120, sft_steps=500)
    if args.quick:
        usual |= dict(out="runs/study-quick", arms="SAPO-DPO,SPIN,offline DPO,SFT", seeds=2, ablation_seeds=0, rates="1e-4", steps=30, rows=100)
        usual["figures"] = args.out or usual["out"]
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    arms = {arm: RELATIVES.get(arm) for arm in args.arms.split(",")}
    if None in arms.values():
        parser.error(f"--arms: choose from {', '.join(RELATIVES)}")
    if not 0 <= args.ablation_seeds <= args.seeds <= 10 or args.seeds < 1:
        parser.error("--seeds must be from 1 to 10, and --ablation-seeds not more")
    if args.ablation_seeds and "SAPO-DPO" not in arms:
        parser.error("the ablations are SAPO-DPO's; name it in --arms, or give --ablation-seeds 0")
    args.rates = [float(lr) for lr in args.rates.split(",") if lr]

    study = Study(args)
    try:
        results, lines = go(study, arms)
    except Failed as failure:
        print(f"study: {failure}", file=sys.stderr)
        return 1
    figures = Path(args.figures)
    figures.mkdir(parents=True, exist_ok=True)
    write_json(figures / "study.json", results)
    draw(results, lines, figures)
    tables = report(results, study.out)
    (figures / "study.md").write_text(f"What `python tools/study.py` prints.\n\n{tables}\n", "utf-8")
    print(f"\n{tables}\n\n{(time.monotonic() - study.began) / 60:.0f} minutes; study.md, study.json and the pictures are in {figures}")
    return 0


def go(study, arms):
    """All runs, then (what study.json holds, {arm: curves of its runs})."""
    args, seeds = study.args, list(study.seeds)
    few, ablations = seeds[:args.ablation_seeds], ABLATIONS if args.ablation_seeds else {}
    tried = sum(len(args.rates or RATES[loss_of(flags)]) for flags in arms.values())
    tuning = tried if tried > len(arms) else 0
    changed = {flags for values in ablations.values() for flags in values.values() if flags}
    runs = tuning + len(arms) * (len(seeds) - (tuning > 0)) + len(changed) * len(few)
    cost = (len(seeds) * SECONDS["base"] * args.sft_steps / 500 + runs * (8 + (SECONDS["run"] - 8) * args.steps / 120)) / min(args.jobs, os.cpu_count() or 1)
    print(f"{len(seeds)} bases, {tuning} runs to choose learning rates, {runs - tuning} more; {args.steps} steps each, {args.jobs} at a time: "
          f"about {cost / 60:.0f} minutes on a laptop, less what {study.out} holds already", flush=True)

    study.do("bases", [study.job("", None, seed, "test") for seed in seeds])
    chosen = study.tune(arms)
    jobs = [study.job(flags, chosen[arm][0], seed, "test") for arm, flags in arms.items() for seed in seeds]
    jobs += [study.job(flags, chosen["SAPO-DPO"][0], seed, "test") for values in ablations.values() for flags in values.values() for seed in few]
    study.do("arms and ablations", jobs)

    results = {"steps": args.steps, "seeds": seeds, "ablation_seeds": len(few), "torch": torch.__version__,
               "arms": {"untouched base": {"lr": None, "flags": "", "tuning": {}, "test": [study.found("", None, s) for s in seeds]}}}
    lines = {}
    for arm, flags in arms.items():
        lr, tuning = chosen[arm]
        trained = [study.found(flags, lr, s, None) for s in seeds]
        runs = [curves(Path(study.job(flags, lr, s, "test")["folder"])) for s in seeds]
        fifth = max(1, args.steps // 5)
        pairs = {} if "--rejected data" in flags else {
            k: [float(np.mean([part(run[k]) for run in runs])) for part in (lambda x: x[:fifth], lambda x: x[-fifth:])] for k in runs[0]}
        results["arms"][arm] = {"lr": lr, "flags": flags, "tuning": {f"{k:g}": v for k, v in tuning.items()}, "test": [study.found(flags, lr, s) for s in seeds],
                                "stages": {k: statistics.mean(t["stages"][k] for t in trained) for k in STAGES},
                                "memory": max((t["memory"] or 0) for t in trained), "pairs": pairs}
        if pairs and (arm in IN_PAIRS or len(arms) < 5):
            lines[arm] = runs
    results["ablations"] = {what: {value: [study.found(flags, chosen["SAPO-DPO"][0], s) for s in few] for value, flags in values.items()}
                            for what, values in ablations.items()}
    for rows in [a["test"] for a in results["arms"].values()] + [r for values in results["ablations"].values() for r in values.values()]:
        for row in rows:
            row.pop("flags", None)                       # they name folders of this machine
    return results, lines


if __name__ == "__main__":
    sys.exit(main())
