"""The study: SAPO, its relatives and its settings on the tiny world, over several seeds, tuned alike.

    python tools/study.py               everything; what is done already is not done again
    python tools/study.py --quick       four variants, two seeds, few steps: to try the script, not to learn anything
    python tools/study.py --relatives   the table of variants, as the documents have it

Every variant is `python train.py` with the flags of its row below, from the same base (one a seed), for the same steps
on the same prompts. Each variant's learning rate is the best of its loss's four on the validation rows (mean of the
verifier's three scores, the first seed); what is reported is measured on the test rows, as mean and 95 % t-interval
over seeds. It writes study.json, study.png, ablations.png and pairs.png into --figures, and the tables, as Markdown, to
study.md and the screen.

Each run is a process of its own, on one thread, --jobs at a time; its folder is named after its flags. Left out: memory
by stage (tools/bench.py has it) and real checkpoints (tools/real.py).
"""

import argparse
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
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import sapo
import train
from buffer import collate, pack, unpack
from losses import score
from machine.checkpoint import from_disk, to_disk
from machine.dataset import Data
from machine.rows import read_rows
from machine.text import Text
from machine.files import write_json
from machine.flags import parse
from machine.folders import companions, load_pretrained
from machine.parallel import World
from machine.report import Evaluation

BATCH = 16      # pairs a step of the tiny preset; a buffer of so many is a buffer of one batch
WHOLE = "--segment 100% --after rewrite"         # all of y-, written to its own end
RELATIVES = {   # variant: what it changes in the tiny preset, which has segments of 12 tokens, alpha 0.5, an EMA that
                # moves every 2 steps, a reference that is refreshed every epoch, and a buffer of 256 pairs
    "SAPO-DPO": "",
    "SAPO-ORPO": "--loss orpo",
    "SAPO-SLiC": "--loss slic",
    "EMA only": f"--buffer-size {BATCH}",
    "buffer only": "--alpha 0 --ema-every 1",
    "segment only": f"--alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "full response": WHOLE,
    "on-policy": f"{WHOLE} --alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "full response ORPO": f"--loss orpo {WHOLE}",
    "on-policy ORPO": f"--loss orpo {WHOLE} --alpha 0 --ema-every 1 --buffer-size {BATCH}",
    "SPIN": f"{WHOLE} --alpha 0 --ema-every epoch --ref-refresh epoch --buffer-size {BATCH}",
    "SPIN with EMA and buffer": f"{WHOLE} --ema-every epoch --ref-refresh epoch",
    "offline DPO": f"--rejected data --ref-refresh never --buffer-size {BATCH}",
    "offline ORPO": f"--loss orpo --rejected data --buffer-size {BATCH}",
    "SFT": f"--loss orpo --lam 0 --rejected data --buffer-size {BATCH}",
}
WORDS = {
    "SAPO-DPO": "the paper's",
    "SAPO-ORPO": "the paper's",
    "SAPO-SLiC": "SAPO's pairs, SLiC-HF's hinge",
    "EMA only": "SAPO without the buffer",
    "buffer only": "SAPO without the EMA: the policy generates",
    "segment only": "SAPO without either",
    "full response": "EMA and buffer, B is all of y+",
    "on-policy": "none of the three: the policy generates all of y-",
    "full response ORPO": "the same with ORPO, as in the paper's ablation",
    "on-policy ORPO": "the same with ORPO, as in the paper's ablation",
    "SPIN": "a copy of the policy, one epoch old at most, generates and is the reference",
    "SPIN with EMA and buffer": "the copy is an average, and old pairs come again",
    "offline DPO": "y- is the data's; the reference is the base",
    "offline ORPO": "y- is the data's",
    "SFT": "ORPO without its second term; y- is not looked at",
}
KIN = {         # not variants of the study: (flags, what it is)
    "a sentence": ("--segment sentence", "B and B' are whole sentences, so y- is well formed"),
    "end rewritten": ("--after rewrite", "y- goes on after B' to the generator's own end; no seam"),
    "seldom generated": ("--generate-every 4", "a pair is drawn four times on average"),
    "DPO and NLL": ("--nll 1", "dpo+sft: y+ itself is raised as well"),
    "IPO": ("--loss ipo", "the margin is drawn to 1 / (2 beta)"),
    "RPO": ("--loss rpo", "each y+ against every y- of the micro-batch"),
    "SimPO": ("--loss simpo --beta 2", "means, a margin, no reference"),
}
RATES = {       # around the best of a first trial
    "dpo": (3e-5, 1e-4, 3e-4, 1e-3), "slic": (1e-4, 3e-4, 1e-3, 3e-3), "orpo": (1e-4, 3e-4, 1e-3, 3e-3)}
ABLATIONS = {   # of SAPO-DPO, at its learning rate: {what: {value: flags}}; no flags: SAPO-DPO itself
    "alpha": {"0": "--alpha 0", "0.5": "", "0.9": "--alpha 0.9", "0.99": "--alpha 0.99"},
    "EMA every ... steps": {"1": "--ema-every 1", "2": "", "8": "--ema-every 8"},
    "buffer, batches": {"1": "--buffer-size 16", "4": "--buffer-size 64", "16": "", "64": "--buffer-size 1024"},
    "segment": {"10 %": "--segment 10%", "12 tokens": "", "25 %": "--segment 25%", "50 %": "--segment 50%",
                "75 %": "--segment 75%", "100 %": "--segment 100%"},
    "end token inside B'": {"stop": "", "ban": "--eos-in-segment ban"},
    "tokens compared": {"response": "", "segment": "--score-on segment"},
    "reference": {"never": "--ref-refresh never", "epoch": "", "epoch, policy": "--ref-from policy"},
    "whole response with": {"nothing": f"{WHOLE} --alpha 0 --ema-every 1 --buffer-size 16",
                            "EMA": f"{WHOLE} --buffer-size 16",
                            "buffer": f"{WHOLE} --alpha 0 --ema-every 1", "both": WHOLE},
}
CLAIMS = {      # what the paper says: (better, than)
    "SAPO over SPIN": ("SAPO-DPO", "SPIN"),
    "SAPO over offline DPO": ("SAPO-DPO", "offline DPO"),
    "SAPO over offline ORPO": ("SAPO-ORPO", "offline ORPO"),
    "EMA and buffer over on-policy": ("full response", "on-policy"),
    "the same, ORPO": ("full response ORPO", "on-policy ORPO"),
    "a segment over the full response": ("SAPO-DPO", "full response"),
    "that too, ORPO": ("SAPO-ORPO", "full response ORPO"),
    "(ours) SAPO over SFT": ("SAPO-ORPO", "SFT"),
    "(ours) DPO's SAPO over SFT": ("SAPO-DPO", "SFT"),
}
VERIFIER = ("verifier/greedy", "verifier/sampled", "verifier/temperature_1")
COLUMNS = {     # of the table: (head, digits)
    "verifier/greedy": ("greedy", 2), "verifier/sampled": ("sampled", 2),
    "verifier/temperature_1": ("temperature 1", 2), "ranking_accuracy": ("ranking accuracy, segment", 2),
    "ranking_accuracy/whole": ("ranking accuracy, whole", 2), "nll": ("NLL", 3), "distinct-2": ("distinct-2", 3),
    "repeated": ("repeated", 2), "length": ("tokens", 1)}
STAGES = {
    "generating": ("prefill", "decode"), "reference": ("reference",), "forward": ("forward",),
    "backward": ("backward",), "optimizer, EMA": ("optimizer", "ema")}
PAIRS = {       # panels of pairs.png: {title: {key of metrics.jsonl: line}}
    "y+ and y- that pass the verifier": {"pairs/chosen_verified": ":", "pairs/rejected_verified": "-"},
    "log p(B) less log p(B'), nats": {"pairs/segment_gap": "-"},
    "log p(C) after B less after B', nats": {"pairs/seam_gap": "-"},
    "share of B' equal to B": {"pairs/identical": "-"},
    "share of y- ended early by B'": {"gen/eos_fraction": "-"},
    "drawn pairs with y+ ahead": {"rewards/accuracies": "-"}}
WORSE = {       # columns of the table of pairs: {head: key of metrics.jsonl}
    "y- passes": "pairs/rejected_verified", "segment": "pairs/segment_gap", "seam": "pairs/seam_gap",
    "identical": "pairs/identical", "ended early": "gen/eos_fraction"}
IN_PAIRS = ("SAPO-DPO", "SAPO-ORPO", "full response", "SPIN", "on-policy")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # 97.5 % points of t, 1 ... 9 degrees
SECONDS = {"base": 40, "run": 33}   # of a process on one thread of a 2-core machine, both cores busy


# ----------------------------------------------------------------------------- one run, in a process of its own
QUIET = "--preset tiny --device cpu --eval-every 0 --save-every 0 --keep 1 --eval-rows 1 --samples 0".split()


def base_flags(seed, sft_steps):
    """SFT alone, written as a model folder: the one step at learning rate 0 moves nothing."""
    return [*QUIET, "--seed", str(seed), "--sft-steps", str(sft_steps), "--steps", "1", "--lr", "0"]


def variant_flags(flags, base, seed, steps, lr):
    return [*QUIET, "--model", str(base / "model"), "--no-from-scratch", "--sft-steps", "0", "--sft-data", "",
            "--seed", str(seed), "--steps", str(steps), "--lr", f"{lr:g}", *flags.split()]


def known(path, flags):
    """The JSON that a job with these flags left at `path`, or None."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if found["flags"] == flags else None


def steps_of(folder):
    """The lines of a run's metrics.jsonl that are steps of SAPO."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if "loss" in line and "step" in line]


def work(job):
    """In the child: train unless that was done, then measure on one split's rows. Leaves trained.json and
    <split>.json."""
    folder, base, flags = Path(job["folder"]), Path(job["base"]), job["flags"]
    if not known(folder / "trained.json", flags):
        began, train.draw_curves = time.perf_counter(), lambda folder: None
        code = train.main([*flags, "--out", str(folder), "--overwrite"])
        if code or not (folder / "model").is_dir():      # stopped, which is code 0, leaves no model
            return code or 1
        for spare in ("checkpoint", "ema"):
            shutil.rmtree(folder / spare)
        steps, stages = steps_of(folder), {}
        for name, parts in STAGES.items():
            stages[name] = sum(step.get(f"time/{part}", 0.0) for step in steps for part in parts)
        seconds = time.perf_counter() - began
        trained = {"flags": flags, "seconds": seconds, "stages": stages, "memory": peak_memory()}
        write_json(folder / "trained.json", trained)
    if job["split"]:
        found = measure(folder / "model", base, job["split"], job["seed"], job["rows"])
        write_json(folder / f"{job['split']}.json", {"flags": flags, **found})
    return 0


def base_model(seed, sft_steps=500, out=ROOT / "runs/study"):
    """The model folder of a seed's base where the study has it, made if it is not there."""
    folder = out / f"base-{sft_steps}-seed-{seed}"
    if work({"folder": folder, "base": folder, "flags": base_flags(seed, sft_steps), "split": None}):
        raise Failed(f"{folder} was not made")
    return folder / "model"


def peak_memory():
    """MiB this process has held at most, all libraries included; None on Windows."""
    with suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Listening(Evaluation):
    """An Evaluation outside of a run, on the CPU, that remembers the answers at each temperature."""

    def __init__(self, data, pairs, cfg, text):
        inputs = SimpleNamespace(cfg=cfg, text=text, data=[None, data])      # what it looks at in a run's Inputs
        super().__init__(inputs, World("cpu"), nullcontext, lambda: None, pairs)
        self.heard = {}

    def answers(self, model, pairs, temperature=0, top_k=0, top_p=1.0):
        self.heard[temperature] = super().answers(model, pairs, temperature, top_k, top_p)
        return self.heard[temperature]


def measure(folder, base, split, seed, rows=None):
    """{metric: value} of a model folder on a split's rows: those of train.py's evaluation, and what only answers show.

    ranking_accuracy: y- is y+ with a segment generated by the base; ranking_accuracy/whole: the base's whole answer, to its own end.
    Both are the same for all variants of a seed (made here if they are not there, so the base comes first). Of answers
    at temperature 1: distinct-2, two-word sequences that differ, of all; repeated, answers whose wording (facts
    blanked) another has as well; length, in tokens.
    """
    model, text, cfg = opened(folder, seed)
    data = rows_of(split, text, cfg, rows)
    segment = against(base, cfg, split, data, text)
    whole = against(base, parse([*QUIET, "--seed", str(seed), *WHOLE.split()]).cfg, split, data, text)
    return judged(model, data, segment, cfg, text) | {"ranking_accuracy/whole": ahead(model, whole)}


def opened(folder, seed):
    """(model, Text, Config) of a model folder and a seed."""
    model = load_pretrained(folder)
    return model, Text(companions(folder), folder, model.config), parse([*QUIET, "--seed", str(seed)]).cfg


def rows_of(split, text, cfg, rows=None):
    """The first rows of the tiny world's split, or all, as Data."""
    return Data(read_rows(ROOT / "data" / f"tiny_{split}.jsonl")[:rows], text, cfg, split)


def judged(model, data, pairs, cfg, text):
    """`measure` of a model in memory, on the rows of `data` as Pairs, but for the rank of whole answers."""
    evaluation = Listening(data, pairs, cfg, text)
    found = evaluation.measure(model)
    del found["gap_change"]                              # since the start, which here would be the model itself
    answers = evaluation.heard[1.0]
    texts = [text.decode(ids, True) for ids in answers]
    return found | {"distinct-2": distinct(texts), "repeated": repeated(texts, data.verifiers),
                    "length": statistics.mean(map(len, answers))}


def against(base, cfg, split, data, text):
    """The rows of a split as Pairs: y- generated by the base, made once and kept in its folder."""
    name = f"eval-{split}-{cfg.segment.strip('%')}-{cfg.after}-{len(data)}"
    if not (base / f"{name}.json").exists():
        cut_rng, sample_rng = np.random.default_rng(cfg.seed), torch.Generator().manual_seed(cfg.seed)
        examples, model = [data[i] for i in range(len(data))], load_pretrained(base / "model")
        breaks = text.breaks(cfg.segment)
        cuts = [sapo.split(e.chosen, cfg.segment, text.eos, cut_rng, breaks, cfg.after) for e in examples]
        segments = sapo.generate_segments(model, examples, cuts, cfg, text.eos, sample_rng, text.vocab, breaks=breaks)
        to_disk(pack(map(sapo.splice, examples, cuts, segments, repeat(text.eos))), name, base)
    return unpack(from_disk(base, name))


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


def repeated(texts, verifiers):
    """Share of answers whose wording another answer has as well; every prompt has other facts, so those are blanked."""
    facts = {word for verifier in verifiers.values() for words in verifier.values() for word in words}
    blank = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(facts)))}|his|him)\b", re.IGNORECASE)
    worded = [blank.sub("_", text) for text in texts]
    return sum(worded.count(w) > 1 for w in worded) / max(1, len(worded))


# ----------------------------------------------------------------------------- all runs
class Failed(Exception):
    """A run ended badly; the message says which, and shows the end of its log."""


class Study:
    """The runs of one study: `do` starts those that are not done yet, `found` reads what they left."""

    def __init__(self, args):
        self.args, self.out, self.began = args, Path(args.out), time.monotonic()
        self.seeds = range(1, args.seeds + 1)

    def base(self, seed):
        return self.out / f"base-{self.args.sft_steps}-seed-{seed}"

    def job(self, flags, lr, seed, split):
        """One run and the rows it is measured on; lr None: the base."""
        base, steps = self.base(seed), self.args.steps
        if lr is None:
            folder, given = base, base_flags(seed, self.args.sft_steps)
        else:
            name = re.sub(r"[^\w.]+", "-", flags.replace("%", "pc")).strip("-") or "sapo"
            folder = self.out / f"{name}-lr-{lr:g}-steps-{steps}-seed-{seed}"
            given = variant_flags(flags, base, seed, steps, lr)
        return {"folder": str(folder), "base": str(base), "flags": given, "split": split, "seed": seed,
                "rows": self.args.rows}

    def result(self, job):
        """What a job has left, or None."""
        return known(Path(job["folder"]) / f"{job['split'] or 'trained'}.json", job["flags"])

    def found(self, flags, lr, seed, split="test"):
        return self.result(self.job(flags, lr, seed, split))

    def do(self, what, jobs):
        """All jobs that have left no result, --jobs at a time; the first that fails ends the study when those begun
        are over."""
        jobs = list({(j["folder"], j["split"]): j for j in jobs}.values())
        left = [j for j in jobs if not self.result(j)]
        print(f"{what}: {len(jobs)} runs, {len(jobs) - len(left)} of them done before", flush=True)

        def one(numbered):
            number, job = numbered
            began = time.monotonic()
            log = Path(job["folder"] + ".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as file:
                command = [sys.executable, __file__, "--job", json.dumps(job)]
                code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
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

    def tune(self, variants):
        """{variant: (best learning rate, {rate: validation score})}."""
        rates = {variant: self.args.rates or RATES[loss_of(flags)] for variant, flags in variants.items()}
        if all(len(r) == 1 for r in rates.values()):
            return {variant: (r[0], {}) for variant, r in rates.items()}
        seed = self.seeds[0]
        self.do("base on validation rows", [self.job("", None, seed, "validation")])     # leaves the y- of all others
        self.do("tuning", [self.job(variants[variant], lr, seed, "validation")
                           for variant, tried in rates.items() for lr in tried])
        scores = {variant: {lr: verified(self.found(variants[variant], lr, seed, "validation")) for lr in tried}
                  for variant, tried in rates.items()}
        return {variant: (max(s, key=s.get), s) for variant, s in scores.items()}


def loss_of(flags):
    words = flags.split()
    return words[words.index("--loss") + 1] if "--loss" in words else "dpo"


def verified(row):
    """The mean of the verifier's three scores."""
    return statistics.mean(row[k] for k in VERIFIER)


def interval(values):
    """(mean, half of the 95 % t-interval) of a few values; of one, (it, nan)."""
    n = len(values)
    half = STUDENT[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def cell(values, digits, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def verdict(values):
    """Of paired differences: does the interval leave 0 out, and on which side?"""
    mean, half = interval(values)
    return "cannot be told" if not abs(mean) > half else "holds" if mean > 0 else "does not hold"


# ----------------------------------------------------------------------------- tables and figures
def markdown(heads, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def relatives():
    """The table of variants, for the documents."""
    return markdown(["variant", "flags beside `--preset tiny`", "what it is"],
                    [[variant, f"`{flags}`" if flags else "none", words] for variant, (flags, words) in
                     [*((name, (flags, WORDS[name])) for name, flags in RELATIVES.items()), *KIN.items()]])


def report(results):
    """The tables as Markdown, from the dict that study.json holds."""
    variants, ablations = results["variants"], results["ablations"]
    n, heads = len(results["seeds"]), [head for head, _ in COLUMNS.values()]
    tuned = {variant: v["tuning"] for variant, v in variants.items() if v["tuning"]}
    lines = [f"Test rows, {results['steps']} steps of {BATCH} pairs, mean ± 95 % t-interval over {n} "
             f"seed{'s' * (n > 1)}; lr {'chosen on validation rows' if tuned else 'not chosen, but given'}.\n",
             markdown(["variant", "lr", *heads],
                      [[variant, f"{v['lr']:g}" if v["lr"] else "-", *cells(v["test"])]
                       for variant, v in variants.items()])]
    claims = [[claim, f"{a} - {b}", *differences(variants[a]["test"], variants[b]["test"])]
              for claim, (a, b) in CLAIMS.items() if a in variants and b in variants]
    if claims and n > 1:
        lines += ["\nDifferences of the verifier's scores, seed by seed (the same base and prompts). Holds, does not "
                  "hold: the mean's interval leaves 0 out; it is one of several looked at, none corrected for that:\n",
                  markdown(["claim", "difference", "mean", *(COLUMNS[k][0] for k in VERIFIER), "here"], claims)]
    if ablations:
        lines += [f"\nSAPO-DPO with one thing changed, lr {variants['SAPO-DPO']['lr']:g}, "
                  f"{results['ablation_seeds']} seeds:\n",
                  markdown(["what", "value", *heads],
                           [[what, value, *cells(rows)]
                            for what, values in ablations.items() for value, rows in values.items()])]
    lines += ["\nIs y- worse? Share of y- that the verifier passes, log p(B) - log p(B') and log p(C) after B less "
              "after B' (nats), B' equal to B, y- ended early: first and last fifth of the run, all seeds:\n",
              markdown(["variant", *WORSE],
                       [[variant, *("{:.2f} → {:.2f}".format(*v["pairs"][k]) for k in WORSE.values())]
                        for variant, v in variants.items() if v.get("pairs")]),
              "\nSeconds of a run's steps by stage, and MiB held at most (one thread, two runs at a time):\n",
              markdown(["variant", *STAGES, "all steps", "MiB"],
                       [[variant, *(f"{v['stages'][k]:.1f}" for k in STAGES), f"{sum(v['stages'].values()):.1f}",
                         f"{v['memory'] or 0:.0f}"] for variant, v in variants.items() if v.get("stages")])]
    if tuned:
        lines += ["\nTuning: mean of the verifier's scores on validation rows, one seed:\n",
                  markdown(["variant", "lr: score"],
                           [[variant, ", ".join(f"{lr}: {s:.2f}" for lr, s in scores.items())]
                            for variant, scores in tuned.items()])]
    return "\n".join(lines)


def cells(rows):
    """COLUMNS of one variant's results, a row a seed."""
    return [cell([row[k] for row in rows], digits) for k, (_, digits) in COLUMNS.items()]


def differences(ours, theirs):
    """Mean and single scores of the verifier, ours less theirs, seed by seed, and the verdict on the mean."""
    means = [verified(x) - verified(y) for x, y in zip(ours, theirs)]
    single = [[x[k] - y[k] for x, y in zip(ours, theirs)] for k in VERIFIER]
    return [*(cell(values, 2, "+") for values in (means, *single)), verdict(means)]


def curves(folder):
    """{key: values by step} of a run's metrics.jsonl."""
    rows = steps_of(folder)
    return {k: np.array([r[k] for r in rows]) for panel in PAIRS.values() for k in panel if k in rows[0]}


def draw(results, lines, folder):
    """study.png, ablations.png, pairs.png, 900 pixels wide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25})
    colours, markers = ("#0072b2", "#d55e00", "#009e73"), "osD"
    variants = results["variants"]

    def dots(axis, rows, keys, along="x", scale=0.24):
        """One row (or column) of dots with intervals for each of `rows`, lists of results."""
        for key, colour, marker, i in zip(keys, colours, markers, range(3)):
            means, halves = zip(*(interval([r[key] for r in row]) for row in rows))
            places = np.arange(len(rows)) + scale * (i - (len(keys) - 1) / 2)
            halves, x, y = np.nan_to_num(halves), *((means, places) if along == "x" else (places, means))
            axis.errorbar(x, y, fmt=marker, color=colour, markersize=4.5, elinewidth=1.2, label=COLUMNS[key][0],
                          **{f"{along}err": halves})

    figure, axes = plt.subplots(1, 3, figsize=(9, 0.36 * len(variants) + 1.5), layout="constrained",
                                width_ratios=(2.2, 1, 1), sharey=True)
    rows = [v["test"] for v in variants.values()]
    for axis, keys, title in ((axes[0], VERIFIER, "share of stories without a slip"),
                              (axes[1], ("nll",), "NLL per token of y+"), (axes[2], ("distinct-2",), "distinct-2")):
        dots(axis, rows, keys)
        axis.set_title(title)
        axis.locator_params(axis="x", nbins=6 if axis is axes[0] else 4)
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    axes[0].set_xlim(-0.02, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(folder / "study.png", dpi=100)

    if results["ablations"]:
        figure, axes = plt.subplots(2, 4, figsize=(9, 5.2), layout="constrained", sharey=True)
        for axis, (what, values) in zip(axes.flat, results["ablations"].items()):
            dots(axis, list(values.values()), VERIFIER, "y", 0.2)
            names = [v.replace(" %", "%").replace(" ", "\n", 1) for v in values]
            axis.set_xticks(range(len(values)), names, fontsize=8)
            axis.set_xlim(-0.5, len(values) - 0.5)
            axis.set_title(what)
            axis.set_ylim(-0.02, 1.02)
        for axis in axes[:, 0]:
            axis.set_ylabel("stories without a slip")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(folder / "ablations.png", dpi=100)

    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PAIRS.items()):
        for i, (variant, runs) in enumerate(lines.items()):
            for key, style in keys.items():
                if style == ":" and i:
                    continue                             # y+ is everybody's
                mean = np.mean([run[key] for run in runs], 0)
                n = max(1, len(mean) // 12)              # a running mean
                smooth = np.convolve(np.pad(mean, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
                colour, label = ("black", "y+ (all variants)") if style == ":" else (f"C{i}", variant)
                axis.plot(np.arange(1, len(mean) + 1), smooth, style, color=colour, label=label)
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False,
                  fontsize=8)
    figure.savefig(folder / "pairs.png", dpi=100)
    plt.close("all")


# ----------------------------------------------------------------------------- the command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", help="folder of the runs (default runs/study; with --quick runs/study-quick)")
    parser.add_argument("--figures", help="folder of study.json and the pictures (default docs/figures; with --quick "
                        "the runs' own)")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: four variants, two seeds, 30 steps, no "
                        "tuning")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--variants", help="only these, comma-separated")
    parser.add_argument("--seeds", type=int, help="of the variants (default 5; 10 at most)")
    parser.add_argument("--ablation-seeds", type=int, help="of the ablations (default 3); 0 leaves them out")
    parser.add_argument("--rates", help="learning rates to choose from, for all variants; one: no tuning")
    parser.add_argument("--steps", type=int, help="of every run (default 120)")
    parser.add_argument("--sft-steps", type=int, help="steps of SFT that make the base (default 500)")
    parser.add_argument("--rows", type=int, help="validation and test rows used (default all)")
    parser.add_argument("--relatives", action="store_true", help="print the table of variants and stop")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        return work(json.loads(args.job))
    if args.relatives:
        print(relatives())
        return 0
    usual = dict(out="runs/study", figures="docs/figures", variants=",".join(RELATIVES), seeds=5, ablation_seeds=3,
                 rates="", steps=120, sft_steps=500)
    if args.quick:
        usual |= dict(out="runs/study-quick", variants="SAPO-DPO,SPIN,offline DPO,SFT", seeds=2, ablation_seeds=0,
                      rates="1e-4", steps=30, rows=100)
        usual["figures"] = args.out or usual["out"]
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    variants = {variant: RELATIVES.get(variant) for variant in args.variants.split(",")}
    if None in variants.values():
        parser.error(f"--variants: choose from {', '.join(RELATIVES)}")
    if not 0 <= args.ablation_seeds <= args.seeds <= 10 or args.seeds < 1:
        parser.error("--seeds must be from 1 to 10, and --ablation-seeds not more")
    if args.ablation_seeds and "SAPO-DPO" not in variants:
        parser.error("the ablations are SAPO-DPO's; name it in --variants, or give --ablation-seeds 0")
    args.rates = [float(lr) for lr in args.rates.split(",") if lr]

    study = Study(args)
    try:
        results, lines = go(study, variants)
    except Failed as failure:
        print(f"study: {failure}", file=sys.stderr)
        return 1
    figures = Path(args.figures)
    figures.mkdir(parents=True, exist_ok=True)
    write_json(figures / "study.json", results)
    draw(results, lines, figures)
    tables = report(results)
    (figures / "study.md").write_text(page(tables), "utf-8")
    minutes = (time.monotonic() - study.began) / 60
    print(f"\n{tables}\n\n{minutes:.0f} minutes; study.md, study.json and the pictures are in {figures}")
    return 0


def page(tables):
    """study.md."""
    return f"What `python tools/study.py` prints.\n\n{tables}\n"


def go(study, variants):
    """All runs, then (what study.json holds, {variant: curves of its runs})."""
    args, seeds = study.args, list(study.seeds)
    few, ablations = seeds[:args.ablation_seeds], ABLATIONS if args.ablation_seeds else {}
    tried = sum(len(args.rates or RATES[loss_of(flags)]) for flags in variants.values())
    tuning = tried if tried > len(variants) else 0
    changed = {flags for values in ablations.values() for flags in values.values() if flags}
    runs = tuning + len(variants) * (len(seeds) - (tuning > 0)) + len(changed) * len(few)
    cost = len(seeds) * SECONDS["base"] * args.sft_steps / 500 + runs * (8 + (SECONDS["run"] - 8) * args.steps / 120)
    cost /= min(args.jobs, os.cpu_count() or 1)
    print(f"{len(seeds)} bases, {tuning} runs to choose learning rates, {runs - tuning} more; {args.steps} steps each, "
          f"{args.jobs} at a time: about {cost / 60:.0f} minutes on a laptop, less what {study.out} holds already",
          flush=True)

    study.do("bases", [study.job("", None, seed, "test") for seed in seeds])
    chosen = study.tune(variants)
    jobs = [study.job(flags, chosen[variant][0], seed, "test")
            for variant, flags in variants.items() for seed in seeds]
    jobs += [study.job(flags, chosen["SAPO-DPO"][0], seed, "test")
             for values in ablations.values() for flags in values.values() for seed in few]
    study.do("variants and ablations", jobs)

    base = {"lr": None, "flags": "", "tuning": {}, "test": [study.found("", None, s) for s in seeds]}
    results = {"steps": args.steps, "seeds": seeds, "ablation_seeds": len(few), "torch": torch.__version__,
               "variants": {"untouched base": base}}
    lines = {}
    for variant, flags in variants.items():
        lr, scores = chosen[variant]
        trained = [study.found(flags, lr, s, None) for s in seeds]
        runs = [curves(Path(study.job(flags, lr, s, "test")["folder"])) for s in seeds]
        pairs = {} if "--rejected data" in flags else ends(runs, max(1, args.steps // 5))
        results["variants"][variant] = {
            "lr": lr, "flags": flags, "tuning": {f"{k:g}": v for k, v in scores.items()},
            "test": [study.found(flags, lr, s) for s in seeds],
            "stages": {k: statistics.mean(t["stages"][k] for t in trained) for k in STAGES},
            "memory": max((t["memory"] or 0) for t in trained), "pairs": pairs}
        if pairs and (variant in IN_PAIRS or len(variants) < 5):
            lines[variant] = runs
    results["ablations"] = {
        what: {value: [study.found(flags, chosen["SAPO-DPO"][0], s) for s in few] for value, flags in values.items()}
        for what, values in ablations.items()}
    tested = [v["test"] for v in results["variants"].values()]
    for rows in tested + [rows for values in results["ablations"].values() for rows in values.values()]:
        for row in rows:
            row.pop("flags", None)                       # they name folders of this machine
    return results, lines


def ends(runs, n):
    """{key: [mean of the first n steps, of the last n]} over all runs."""
    return {k: [float(np.mean([run[k][:n] for run in runs])), float(np.mean([run[k][-n:] for run in runs]))]
            for k in runs[0]}


if __name__ == "__main__":
    sys.exit(main())
