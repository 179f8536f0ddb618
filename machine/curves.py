"""The curves of a run, or of several runs together, as a picture. Leaves out triples (tools/show.py)."""

import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from machine.files import BadInput, parse_json

PANELS = (      # title, unit of y, {key of metrics.jsonl: its name, where a panel has several}
    ("Training loss", "", {"loss": ""}),
    ("Reward margin of drawn pairs", "nats", {"rewards/margins": ""}),
    ("Log-probs of drawn pairs", "nats", {"logps/chosen": "chosen y+", "logps/rejected": "rejected y-"}),
    ("Reward accuracy of drawn pairs", "share of pairs", {"rewards/accuracies": ""}),
    ("Verifier on new pairs", "share that passes", {
        "pairs/chosen_verified": "chosen y+", "pairs/rejected_verified": "rejected y-"}),
    ("Where y- loses: y+ minus y-", "nats", {
        "pairs/segment_gap": "segment (B and B')", "pairs/seam_gap": "seam (C after them)"}),
    ("Staleness of drawn pairs", "steps", {"buffer/staleness": ""}),
    ("Held-out rows", "share of {rows} rows", {
        "eval/policy/ranking_accuracy": "ranking accuracy", "eval/ema/verifier/greedy": "verifier, EMA",
        "eval/policy/verifier/greedy": "verifier, policy"}),
)


def read_metrics(folder):
    """The lines of metrics.jsonl that can be read: not one that is being written just now."""
    rows, path = [], Path(folder, "metrics.jsonl")
    for line in path.read_bytes().splitlines():
        with suppress(BadInput):
            rows.append(parse_json(line, path))
    return [row for row in rows if isinstance(row, dict)]


def read_curves(folder):
    """{panel's title: {key: (steps, values)}, "rows": how many are held out}. Policy and EMA begin as the
    starting model, and so do their curves."""
    lines = [row for row in read_metrics(folder) if "step" in row]
    panels = {"rows": next((row["eval/rows"] for row in lines if "eval/rows" in row), "the")}
    for title, _, keys in PANELS:
        for key in keys:
            start = re.sub("policy|ema", "start", key) if "eval" in key else None
            points = [(row["step"], row[k]) for row in lines for k in (key, start) if k in row]
            if points:
                panels.setdefault(title, {})[key] = np.array(points, float).T
    return panels


def draw_curves(folder):
    """curves.png of a run: what went on, at a glance. Where it cannot be drawn, a line says why."""
    try:
        draw_runs([folder], folder / "curves.png")
    except Exception as error:                           # a picture never costs a run its end
        print(f"no curves.png: {' '.join(str(error).split())[:200]}")


def draw_runs(folders, path):
    """The curves of run folders at `path`, whole or not there. Raises whatever hinders it."""
    os.environ["MPLBACKEND"] = "agg"                     # whatever a notebook has set for itself
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    names = [Path(folder).resolve().name for folder in folders]
    names = names if len({*names}) == len(folders) else map(str, folders)
    runs = {name: read_curves(folder) for name, folder in zip(names, folders)}
    panels = [panel for panel in PANELS if any(panel[0] in curves for curves in runs.values())]
    rows, columns = max(1, -(-len(panels) // 4)), max(1, min(4, len(panels)))
    figure = Figure(figsize=(max(5, 3.3 * columns), 2.8 * rows + 0.4), layout="constrained")
    figure.suptitle("SAPO: " + " and ".join(runs), fontsize=11, parse_math=False)
    if len(runs) > 1:
        colours = [Line2D([], [], color=f"C{i}", label=run.replace("$", r"\$")) for i, run in enumerate(runs)]
        figure.legend(handles=colours, loc="outside lower center", ncols=6, frameon=False)
    for i, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(rows, columns, i), *panel, runs)
    figure.savefig(path.with_name(f".{path.name}.tmp"), dpi=100, format="png")
    path.with_name(f".{path.name}.tmp").replace(path)


def draw_panel(axis, title, unit, names, runs):
    """One panel. A colour is a key, or of several runs it is a run, and the dashes tell keys apart."""
    for i, panels in enumerate(runs.values()):
        for j, (key, (x, y)) in enumerate(panels.get(title, {}).items()):
            label, how = names[key], dict(color=f"C{j}")
            if len(runs) > 1:
                how = dict(color=f"C{i}", linestyle=("-", "--", ":")[j])
                label = "" if i else label
            if len(y) > 20:                              # the line is a running mean, the points are faint
                n = max(3, len(y) // 20)
                axis.plot(x, y, ".", markersize=2, alpha=0.35, color=how["color"])
                y = np.convolve(np.pad(y, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
            else:
                how["marker"] = "."
                label += f", {y[-1]:.2f} in the end" if label and len(runs) == 1 else ""
            axis.plot(x, y, label=label, **how)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    rows = dict.fromkeys(str(panels["rows"]) for panels in runs.values())
    axis.set_ylabel(unit.format(rows=" and ".join(rows)), fontsize=9)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    if any(names.values()):
        axis.legend(fontsize=8, frameon=False)
