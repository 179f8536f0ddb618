"""Triples of a run, to be read: A, B, B', C in colour, and the log-prob of each token. Of several runs: their metrics together.

    python tools/show.py runs/NAME [--n 5] [--no-color] [--no-model] [--png FILE]
    python tools/show.py runs/ONE runs/OTHER ... [--png FILE]       their metrics side by side, and with --png their curves in one picture
    python tools/show.py --data FILE --model FOLDER [--chat-template FILE] [--n 5]      the rows, as a run's losses see them

Reads pairs.jsonl, evenly over the run. Where the run has written its model/, each token of B, B' and C carries a number:
its log-prob under the trained policy, minus that under the starting model where that is a folder here (not so for a run from
scratch). Sums below say where y- loses: in the segment (B against B') or at the seam (C after B against C after B').
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from buffer import Pair, collate
from losses import batch_logps, by_text
from machine.curves import draw_runs, read_metrics
from machine.dataset import Data
from machine.files import BadInput, parse_json, read_json
from machine.config import config_from_dict, read_config
from machine.flags import Config, resolved, settings_of
from machine.folders import companions, load_pretrained
from machine.process import one_line, printable
from machine.report import show_rows
from machine.rows import read_rows
from machine.text import Text

INK = {"A": "\033[2m", "B": "\033[32m", "B'": "\033[31m", "C": "\033[36m"}      # dim, green, red, cyan
PAPER = {"A": "#777777", "B": "#1a7f37", "B'": "#c0392b", "C": "#1f6feb"}
BEFORE = 60         # characters of A that are shown


class Token(NamedTuple):
    text: str
    part: str                   # A, B, B' or C
    value: float | None         # nats


def read_pairs(run, n):
    """n rows of pairs.jsonl, evenly from first to last."""
    path = run / "pairs.jsonl"
    if not path.is_file():
        raise BadInput(f"{path} is not there; a run writes it during SAPO steps, see --show-every")
    rows = [parse_json(line, path) for line in path.read_bytes().splitlines()]
    if not rows or not all(isinstance(r, dict) and {"step", "row", "ids", "cuts"} <= set(r) for r in rows):
        raise BadInput(f"{path} holds no triples with their ids")
    n = min(n, len(rows))
    return [rows[round(i * (len(rows) - 1) / max(1, n - 1))] for i in range(n)]


def models(run):
    """(policy, start) of a run, each None where its weights are not here."""
    path = run / "config.json"
    settings = settings_of(read_json(path, "run folder"), path)
    start = Path(settings["model"])
    return [load_pretrained(folder).eval() if there else None for folder, there in (
        (run / "model", (run / "model").is_dir()), (start, start.is_dir() and not settings["from_scratch"]))]


@torch.no_grad()
def numbers(pair, policy, start):
    """Two lists, one number for each token of y+ and of y-: log-probs under the policy, minus those under the start."""
    batch = collate([pair])
    logps = by_text(batch_logps(policy, batch) - (batch_logps(start, batch) if start else 0.0), batch)       # (2, T)
    first = len(pair.prompt) - 1                         # where the first token of the response is predicted
    return [logps[i, first:first + len(y)].tolist() for i, y in enumerate((pair.chosen, pair.rejected))]


def sides(pair, text, policy=None, start=None):
    """y+ and y- as lists of Tokens; of A one token, its last characters."""
    values = numbers(pair, policy, start) if policy else [None, None]
    out = []
    for y, stop, name, value in ((pair.chosen, pair.stop, "B", values[0]), (pair.rejected, pair.rejected_stop, "B'", values[1])):
        ends = [len(text.decode(y[:i])) for i in range(len(y) + 1)]
        whole = printable(text.decode(y).replace("\n", "⏎").replace("\t", " "))
        A = whole[:ends[pair.start]]
        tokens = [Token(A if len(A) <= BEFORE else "… " + A[-BEFORE:], "A", None)] if A else []
        for i in range(pair.start, len(y)):
            tokens.append(Token(whole[ends[i]:ends[i + 1]], name if i < stop else "C", value[i] if value else None))
        out.append(tokens)
    return out


def sums(pair, values):
    """What of the gap is the segment's, and what the seam's; with C in both."""
    part = lambda i, start, stop: sum(values[i][start:stop])
    B, new = part(0, pair.start, pair.stop), part(1, pair.start, pair.rejected_stop)
    line = f"B {B:+.1f}, B' {new:+.1f}: segment {B - new:+.1f}"
    if pair.keeps_C:
        C, after = part(0, pair.stop, None), part(1, pair.rejected_stop, None)
        line += f"; C {C:+.1f} after B, {after:+.1f} after B': seam {C - after:+.1f}"
    return line + " nats"


def show(number, value):
    if value is None or abs(value) < 0.05:
        return "" if value is None else "·"                # there, but too small to print
    return f"{value:+.1f}" if number == "change" else f"{value:.1f}"


def wrapped(tokens, width, kind):
    """Rows of (token, number, columns) that fit into `width`."""
    rows, used = [[]], 0
    for token in tokens:
        shown = show(kind, token.value)
        columns = max(len(token.text), len(shown) + 1 if shown else 0)
        if used + columns > width and rows[-1]:
            rows, used = rows + [[]], 0
        rows[-1].append((token, shown, columns))
        used += columns
    return rows


def prints(row, pair, text, policy, start, width, colour):
    """One triple as lines."""
    kind, paint = "change" if start else "log-prob", lambda s, part: f"{INK[part]}{s}\033[0m" if colour and s.strip() else s
    lines = [f"step {row['step'] + 1}, data row {row['row']}", "x    " + one_line(text.decode(pair.prompt), 2 * width)]
    for name, tokens in zip(("y+", "y-"), sides(pair, text, policy, start)):
        inner = "B" if name == "y+" else "B'"
        at = [i for i, t in enumerate(tokens) if t.part == inner]
        tokens = [t._replace(text="[" * (i == at[0]) + t.text + "]" * (i == at[-1])) if at and at[0] <= i <= at[-1] else t for i, t in enumerate(tokens)]
        for cells in wrapped(tokens, width - 5, kind):
            lines.append(f"{name:5}" + "".join(paint(t.text, t.part) + " " * (columns - len(t.text)) for t, _, columns in cells).rstrip())
            if any(shown for _, shown, _ in cells):
                lines.append(" " * 5 + "".join(shown.ljust(columns) for _, shown, columns in cells).rstrip())
            name = ""
    if policy:
        lines.append("     " + sums(pair, numbers(pair, policy, start)))
    return lines


def legend(policy, start):
    if not policy:
        return "A is the data's, then [B] or [B'], then C"
    if start:
        return "number: log p(token) of the trained policy minus that of the starting model, in nats; above 0, training made it likelier"
    return "number: log p(token) of the trained policy, in nats; 0 is certain, -3 is one in twenty"


def draw(rows, pairs, text, policy, start, path):
    """The same as a picture, 900 pixels wide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    size, columns, kind = 9.5, 108, "change" if start else "log-prob"
    lines = []                                           # (x in characters, text, colour, background, font size), one list a line
    plain = lambda s, colour="black": lines.append([(0, s, colour, None, size)])
    for row, pair in zip(rows, pairs):
        plain(f"step {row['step'] + 1}   " + one_line(text.decode(pair.prompt), columns - 12))
        for name, tokens in zip(("y+", "y-"), sides(pair, text, policy, start)):
            for cells in wrapped(tokens, columns - 4, kind):
                upper, lower, x = [(0, name, "black", None, size)], [], 4
                for token, shown, wide in cells:
                    strength = 0 if token.value is None else min(1.0, abs(token.value) / 4)
                    tint = None if not shown else (1, 1 - 0.5 * strength, 1 - 0.6 * strength) if token.value < 0 else (1 - 0.5 * strength, 1 - 0.2 * strength, 1)
                    upper.append((x, token.text.ljust(wide) if tint else token.text, PAPER[token.part], tint, size))
                    lower.append((x + (token.text[:1] == " "), shown, "#444444", None, size - 2.5))
                    x, name = x + wide, ""
                lines.append(upper)
                lines += [lower] if any(cell[1] for cell in lower) else []
        if policy:
            plain("    " + sums(pair, numbers(pair, policy, start)), "#444444")
        plain("")
    parts = [(0, "A", PAPER["A"], None, size), (3, "B", PAPER["B"], None, size), (6, "B'", PAPER["B'"], None, size), (10, "C", PAPER["C"], None, size)]
    lines += [parts, [(0, legend(policy, start), "#444444", None, size - 1.5)]]
    height = 0.185 * len(lines) + 0.2
    figure = plt.figure(figsize=(9, height))
    wide = 0.602 * size / 72 / 9                         # of a character of DejaVu Sans Mono, in figure widths
    for i, line in enumerate(lines):
        y = 1 - (0.1 + 0.185 * (i + 0.7)) / height
        for x, s, colour, tint, points in line:
            if tint:
                figure.add_artist(plt.Rectangle((0.012 + x * wide, y - 0.04 / height), len(s) * wide, 0.17 / height, color=tint, lw=0))
            figure.text(0.012 + x * wide, y, s, color=colour, fontsize=points, family="DejaVu Sans Mono", parse_math=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def side_by_side(runs):
    """The metrics of several runs as a table: at their first step of SAPO, and the mean of the last ten."""
    columns, names = [], [run.resolve().name for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise BadInput(f"{run}/metrics.jsonl is not there; is this a run folder?")
        lines = [row for row in read_metrics(run) if "loss" in row and "step" in row]
        columns += [lines[:1], lines[-10:]]
    keys = dict.fromkeys(key for lines in columns for row in lines for key, value in row.items() if isinstance(value, float))
    wide = max(12, *map(len, names))
    rows = [" " * 24 + "".join(f"  {name:>{2 * wide + 2}}" for name in names),
            " " * 24 + f"  {'first step':>{wide}}  {'last ten':>{wide}}" * len(runs)]
    for key in keys:
        values = [[row[key] for row in lines if key in row] for lines in columns]
        shown = [f"{mean(v):.5g}" if v else "-" for v in values]
        rows.append(f"{key:<24}" + "".join(f"  {value:>{wide}}" for value in shown))
    return "\n".join(rows)


def encoded(args):
    """The first rows of a data file as text, end tokens marked, and as ids; no weight is read."""
    config = read_config(args.model)
    text = Text(companions(args.model), args.model, config, args.chat_template)
    cfg = resolved(Config(), config.max_position_embeddings, 1)
    data = Data(read_rows(args.data)[:args.n], text, cfg, args.data)
    print(data.note, file=sys.stderr)
    return show_rows(data, text, args.n)


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):               # not where a test stands in for it
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="*", metavar="run", help="run folder; several are compared")
    parser.add_argument("--data", help="show rows of this file instead")
    parser.add_argument("--model", help="folder whose tokenizer and chat template they get")
    parser.add_argument("--chat-template", default="", help="in place of the model's, as in train.py")
    parser.add_argument("--n", type=int, default=5, help="triples or rows shown")
    parser.add_argument("--no-color", action="store_true", help="no colour; without a terminal there is none either")
    parser.add_argument("--no-model", action="store_true", help="text only")
    parser.add_argument("--png", help="draw them there as well")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.data or args.model) or bool(args.data) != bool(args.model):
        parser.error("give a run folder, or --data and --model")
    try:
        if args.data:
            print(encoded(args))
            return 0
        if len(args.runs) > 1:
            print(side_by_side(args.runs))
            if args.png:
                draw_runs(args.runs, Path(args.png))
                print(f"\ntheir curves are in {args.png}")
            return 0
        run = args.runs[0]
        rows = read_pairs(run, max(1, args.n))
        source = run / "source"
        config = config_from_dict(read_json(source / "config.json", "run folder"))
        text = Text(companions(source), source, config)
        policy, start = (None, None) if args.no_model else models(run)
        start = start if policy else None
        pairs = [Pair(*row["ids"], *row["cuts"], row=row["row"], step=row["step"]) for row in rows]
        colour = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
        width = max(40, min(160, shutil.get_terminal_size((110, 24)).columns))
        for row, pair in zip(rows, pairs):
            print("\n".join(prints(row, pair, text, policy, start, width, colour)) + "\n")
        print(legend(policy, start))
        if args.png:
            draw(rows, pairs, text, policy, start, args.png)
        return 0
    except (BadInput, OSError, ImportError, ValueError) as error:        # no matplotlib; a picture of no kind it knows
        print(f"show: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
