"""The picture of the method, docs/figures/method.png: how a pair is made, trained on, and scored as a part of one stream.

    python tools/draw_method.py [FILE]

Nothing in it is measured: it draws Algorithm 1, with the numbers [1] to [9] of sapo.py, and who attends to whom in a Batch.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INK = {"x": "#e8e8e8", "A": "#d5d5d5", "B": "#b7e1c0", "B'": "#f5b9b0", "C": "#bcd6f5"}


def box(axis, x, y, width, word, colour="white", height=0.5, **more):
    from matplotlib.patches import FancyBboxPatch
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, edgecolor="#444444", lw=1))
    axis.text(x + width / 2, y + height / 2, word, ha="center", va="center", **({"fontsize": 10} | more))


def arrow(axis, start, end, word="", at=None, **more):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color="#444444", lw=1.2, shrinkA=1, shrinkB=1))
    if word:
        axis.text(*at, word, **({"ha": "center", "va": "center", "fontsize": 9} | more))


def sequence(axis, x, y, parts):
    for word, width in parts:
        box(axis, x, y, width, word, INK[word])
        x += width


def algorithm(axis):
    """Algorithm 1 from the data at the top left to the EMA's update at the bottom right."""
    axis.set(xlim=(-0.35, 13), ylim=(0.1, 6.15))
    axis.set_axis_off()
    axis.text(0, 5.95, "making pairs", fontsize=11, weight="bold", va="center")
    axis.text(0.62, 5.2, "x, y+", fontsize=10, ha="right", va="center")
    sequence(axis, 0.7, 4.95, [("x", 1.3), ("A", 1.1), ("B", 1.3), ("C", 1.3)])
    axis.text(6.0, 5.2, "[1] a row of the data, [2] y+ cut at random", fontsize=9, va="center")
    box(axis, 1.5, 3.75, 2.9, "EMA of the policy", "#fff2cc")
    arrow(axis, (2.0, 4.93), (2.4, 4.27), "x, A", (1.75, 4.6))
    arrow(axis, (3.3, 3.73), (3.75, 3.05), "[3] generates B'", (3.3, 3.4), ha="right")
    axis.text(0.62, 2.75, "x, y-", fontsize=10, ha="right", va="center")
    sequence(axis, 0.7, 2.5, [("x", 1.3), ("A", 1.1), ("B'", 1.3), ("C", 1.3)])
    axis.text(6.0, 2.75, "[4] y- is A + B' + C", fontsize=9, va="center")
    arrow(axis, (5.05, 4.93), (5.05, 3.05), "C as it was", (5.2, 3.4), ha="left")
    axis.text(0, 1.75, "training", fontsize=11, weight="bold", va="center")
    arrow(axis, (2.6, 2.48), (2.6, 1.27), "[5] (x, y+, y-)", (3.6, 1.85))
    for i in range(7):
        box(axis, 0.7 + 0.55 * i, 0.72, 0.48, "", "#eeeeee")
    axis.text(2.6, 0.38, "queue of pairs; the oldest leaves", fontsize=9, ha="center", va="center")
    arrow(axis, (4.6, 0.97), (6.2, 0.97), "[6] draw", (5.4, 1.17))
    box(axis, 6.2, 0.72, 2.1, "DPO or ORPO", "#eadcf4")
    axis.text(7.25, 0.38, "[7] loss on (x, y+, y-)", fontsize=9, ha="center", va="center")
    arrow(axis, (8.3, 0.97), (10.5, 0.97), "[8] gradient", (9.4, 1.17))
    box(axis, 10.5, 0.72, 2.2, r"policy $\theta$", "#fff2cc")
    arrow(axis, (11.6, 1.24), (11.6, 3.73), "[9] every k steps", (11.45, 2.5), ha="right")
    box(axis, 9.0, 3.75, 3.9, r"$\theta_{EMA} \leftarrow \alpha\,\theta_{EMA} + (1-\alpha)\,\theta$", "#fff2cc", fontsize=9.5)
    arrow(axis, (9.0, 4.0), (4.4, 4.0), "generates from now on", (7.1, 4.2))


def mask(axis):
    """Who attends to whom in a pair's part of the stream: 4, 5 and 5 tokens."""
    from matplotlib.patches import Rectangle
    parts = [("x + A", 4, INK["A"]), ("B + C", 5, INK["B"]), ("B' + C", 5, INK["B'"])]
    starts, n = [0, 4, 9], 14
    for query in range(n):
        own = max(s for s in starts if s <= query)
        for key in range(query + 1):
            seen = key < 4 or key >= own
            colour = parts[starts.index(max(s for s in starts if s <= key))][2]
            axis.add_patch(Rectangle((key, query), 1, 1, facecolor=colour if seen else "white", edgecolor="#bbbbbb", lw=0.6))
    for (word, width, colour), start in zip(parts, starts):
        box(axis, start, -1.6, width, word, colour, 1.2, fontsize=9)
    for edge in (4, 9):
        axis.plot([edge, edge], [0, n], color="#444444", lw=1)
        axis.plot([0, n], [edge, edge], color="#444444", lw=1)
    axis.add_patch(Rectangle((0, 0), n, n, fill=False, edgecolor="#444444", lw=1))
    axis.text(6.5, 11.5, "never\nseen", fontsize=9, ha="center", va="center", color="#444444")
    axis.set(xlim=(-0.2, n + 0.2), ylim=(n + 2.4, -3.0), aspect="equal")
    axis.set_axis_off()
    axis.set_title("a pair in the stream of a batch", fontsize=11, weight="bold")
    axis.text(n / 2, -2.1, "shared prefix | chosen | rejected", fontsize=9, ha="center")
    axis.text(n / 2, n + 0.9, "a row: what that token attends to;\nA's last token opens both continuations", fontsize=8.5, ha="center", va="top")


def main(argv=None):
    from matplotlib.figure import Figure
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default=ROOT / "docs/figures/method.png", help="where the picture goes")
    args = parser.parse_args(argv)
    figure = Figure(figsize=(9, 3.4))
    algorithm(figure.add_axes((0.01, 0.01, 0.67, 0.98)))
    mask(figure.add_axes((0.69, 0.06, 0.30, 0.84)))
    figure.savefig(args.path, dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
