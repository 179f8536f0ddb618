"""Held-out measures, the log, and the curves."""

import dataclasses
import json
import math
import os
import re

import numpy as np
import torch
from tqdm import tqdm

from buffer import collate
from losses import score
from machine.checkpoint import checksum
from machine.dataset import Data
from machine.folders import BadInput


@dataclasses.dataclass
class Held:
    """Held-out rows: pairs whose y- stays the same all run long, and the starting model's log-prob gaps on them."""
    data: Data
    pairs: list             # this process's: every size-th, so that shares differ by one at most
    gaps: list              # log p(y+) - log p(y-) of the starting model, in nats; empty until it was measured



def passes(answer, judge):
    """True if every word (or phrase) of judge["must"] stands in the answer and none of judge["must_not"]; case aside."""
    has = lambda phrase: re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", answer, re.IGNORECASE) is not None
    return all(map(has, judge.get("must", ()))) and not any(map(has, judge.get("must_not", ())))



@torch.no_grad()
def evaluate(model, held, writer, cfg, world, text, autocast, poll, full=True):
    """{metric: value} of one model on the held-out rows, over all processes. `writer(pairs, temperature, top_k, top_p)` answers.

    nll: per token of y+. accuracy: share of rows whose mean log-prob is higher for y+ than for y-; no reference.
    margin: log p(y+) - log p(y-), less the starting model's. judge: share of answers that pass, greedy, and with `full` also
    at the run's own sampling settings and at temperature 1.
    """
    model.eval()
    sums, gaps = np.zeros(5), []                         # nll, tokens, right, margins, rows
    for i in range(0, -(-len(held.data) // world.size), cfg.micro_batch):
        poll()
        part = held.pairs[i:i + cfg.micro_batch]
        if part:
            batch = collate(part).to(world.device)
            with autocast():
                chosen, rejected = score(model, batch)
            gap, lengths = chosen - rejected, batch.lengths
            right = (chosen / lengths[:, 0] > rejected / lengths[:, 1]).sum()
            start = held.gaps[i:i + cfg.micro_batch] or gap.tolist()
            gaps += gap.tolist()
            sums += [-chosen.sum().item(), lengths[:, 0].sum().item(), right.item(), math.fsum(gap.tolist()) - math.fsum(start), len(gap)]
    held.gaps = held.gaps or gaps
    nll, tokens, right, margins, rows = world.sum(sums.tolist())
    table = {"nll": nll / tokens, "accuracy": right / rows, "margin": margins / rows}
    judged = [p for p in held.pairs if p.row in held.data.judges]
    ways = {"greedy": (0, 0, 1.0), "sampled": (cfg.temperature, cfg.top_k, cfg.top_p), "temperature 1": (1.0, 0, 1.0)}
    for way, settings in ways.items() if held.data.judges else ():
        if way == "greedy" or full:
            answers = writer(model, judged, *settings)
            good = sum(passes(text.decode(a, True), held.data.judges[p.row]) for p, a in zip(judged, answers))
            table[f"judge, {way}"] = world.sum([good])[0] / len(held.data.judges)
    model.train()
    return table



def print_table(table):
    """{model: {metric: value}} as aligned text."""
    columns = list(next(iter(table.values())))
    print("\nheld out  " + "  ".join(c.rjust(max(8, len(c))) for c in columns))
    for name, row in table.items():
        print(f"{name:<8}  " + "  ".join(f"{row[c]:.3f}".rjust(max(8, len(c))) for c in columns))
    print()



class Log:
    """metrics.jsonl, pairs.jsonl and the screen; only rank 0 writes. `sizes` and `cut` make a resumed log seamless."""

    def __init__(self, folder, first):
        self.first, paths = first, {name: folder / f"{name}.jsonl" for name in ("metrics", "pairs") if first}
        self.new = {name for name, path in paths.items() if not path.exists()}
        self.files = {name: open(path, "a", encoding="utf-8") for name, path in paths.items()}

    def write(self, name, row):
        if self.first:
            rounded = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in row.items()}
            self.files[name].write(json.dumps(rounded, ensure_ascii=False) + "\n")
            self.files[name].flush()

    def say(self, line):
        if self.first:
            tqdm.write(line)

    def sizes(self):
        """{name: (bytes, checksum)} of what was written so far, which the disk holds from now on."""
        for f in self.files.values():
            os.fsync(f.fileno())
        return {name: (os.path.getsize(f.name), checksum(f.name)) for name, f in self.files.items()}

    def cut(self, sizes):
        """Take back what was written after a checkpoint: no line twice, none missing. A log that was deleted begins anew."""
        for name in [name for name in self.files if name in self.new and sizes[name][0]]:
            self.say(f"warning: {self.files[name].name} is gone; its lines from before are lost, and the run goes on without them")
            sizes = sizes | {name: (0, None)}
        for name, f in self.files.items():
            size, known = sizes[name]
            if size and checksum(f.name, size) != known:
                raise BadInput(f"{f.name} does not begin as it did when the checkpoint was written; put it back, or delete it to go on without those lines")
        for name, f in self.files.items():
            f.truncate(sizes[name][0])



def pair_text(pair, text):
    """A triple as text, in its parts, and in ids. Each part is what it adds to the text before it: Llama's tokenizers strip a first space."""
    def part(ids, start=0, stop=None):
        return text.decode(ids[:stop])[len(text.decode(ids[:start])):]

    return {"step": pair.step, "row": pair.row, "prompt": part(pair.prompt), "A": part(pair.chosen, 0, pair.start),
            "B": part(pair.chosen, pair.start, pair.stop), "B'": part(pair.rejected, pair.start, pair.rejected_stop),
            "C": part(pair.chosen, pair.stop), "C kept": pair.rejected_stop < len(pair.rejected) or pair.stop == len(pair.chosen),
            "ids": [pair.prompt, pair.chosen, pair.rejected], "cuts": [pair.start, pair.stop, pair.rejected_stop]}



def one_line(s, width):
    s = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(s.split()))       # what a file says must not steer the screen
    return s if len(s) <= width else s[:width // 2 - 1] + " … " + s[-(width // 2 - 2):]



def show_pair(parts):
    A, B, new, C = (one_line(parts[k], width) for k, width in (("A", 40), ("B", 60), ("B'", 60), ("C", 40)))
    return f"    y+  {A} [{B}] {C}\n    y-  {A} [{new}] {C if parts['C kept'] else ''}"
PANELS = {      # title: keys of metrics.jsonl
    "loss": ["loss"], "reward margin (nats)": ["rewards/margins"], "log-probs of the drawn pairs (nats)": ["logps/chosen", "logps/rejected"],
    "share of drawn pairs with y+ ahead": ["rewards/accuracies"], "judge: y+ and y- that pass": ["pairs/chosen_judge", "pairs/rejected_judge"],
    "where y- loses (nats)": ["pairs/segment_gap", "pairs/seam_gap"], "age of a drawn pair (steps)": ["buffer/age"],
    "held out": ["eval/policy/accuracy", "eval/policy/judge, greedy", "eval/ema/judge, greedy"],
}



def draw_curves(folder):
    """curves.png from metrics.jsonl: what went on, at a glance. Says so where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no curves.png: matplotlib is not installed")
    with open(folder / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    panels = {title: {k: [(r["step"], r[k]) for r in lines if k in r and "step" in r] for k in keys} for title, keys in PANELS.items()}
    panels = {title: {k: np.array(v, float).T for k, v in curves.items() if v} for title, curves in panels.items() if any(curves.values())}
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for key, (x, y) in curves.items():
            label = key.rpartition("/")[2] if not key.startswith("eval/") else key.removeprefix("eval/").replace("/", ": ")
            if len(y) > 20:                              # the line is a running mean, the points are faint
                n = max(3, len(y) // 20)
                points = axis.plot(x, y, ".", markersize=2, alpha=0.35)[0]
                smooth = np.convolve(np.pad(y, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
                axis.plot(x, smooth, color=points.get_color(), label=label)
            else:
                axis.plot(x, y, "o-", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    figure.savefig(folder / ".curves.png", dpi=100, format="png")
    (folder / ".curves.png").replace(folder / "curves.png")
    plt.close(figure)
