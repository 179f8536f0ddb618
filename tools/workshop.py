"""What docs/workshop.ipynb stands on: a base, short runs, bugs that are planted in memory, and pictures.

    base = make_base("runs/base")           trained by train.py, if it is not there
    bug = plant(3)                          station 3's bug, in copies of the method's files; your own stay as they are
    clean, bent = run(base), run(base, bug)
    draw_curves({"clean": clean, "station 3": bent}, "loss", "buffer/staleness")

Left out: the hunt by terminal (tools/mutants.py has it) and the exercises (tools/exercises.py).
"""

import dataclasses
import html
import inspect
import linecache
import random
import re
import shutil
import subprocess
import sys
import tempfile
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import matplotlib.pyplot as plt
import numpy as np

import mutants
import sapo
from machine.dataset import Data
from machine.flags import PRESETS, parse
from machine.folders import companions, load_pretrained
from machine.report import passes
from machine.rows import read_rows
from machine.text import Text

METHOD = ("losses", "buffer", "sapo")       # in the order in which they import each other
TINY = {f.name: PRESETS["tiny"][f.name] for f in dataclasses.fields(sapo.SAPOConfig) if f.name in PRESETS["tiny"]}
SETTINGS = TINY | {"buffer_size": 64}
COLOURS = {"x": "#e8e8e8", "y+": "#b7e1c0", "A": "#d5d9e0", "B": "#b7e1c0", "B'": "#f5b7b1", "C": "#bcd4f5"}
SLOW = {"segment": "100%", "alpha": 0.99}   # whole responses of a generator that hardly moves; with a learning rate of 3e-4


class Base(NamedTuple):
    """The model that all short runs start from, with the rows they learn from."""
    folder: Path
    text: Text
    data: Data

    def draw(self, seed=0):
        """[1]: draw(n) is the next n Examples, each epoch in a new order."""
        rng, waiting = random.Random(seed), []

        def draw(n):
            while len(waiting) < n:
                waiting.extend(rng.sample(range(len(self.data)), len(self.data)))
            return [self.data[waiting.pop(0)] for _ in range(n)]
        return draw


def make_base(folder="runs/base", seed=42):
    """The Base in a run folder, trained by `python train.py --steps 1 --lr 0` if it is not there (about a minute): one
    step at learning rate 0 moves nothing, so it is what supervised fine-tuning left."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--steps", "1", "--lr", "0", "--eval-rows", "8", "--seed", str(seed),
                        "--out", str(folder), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    cfg, model = parse(["--preset", "tiny"]).cfg, load_pretrained(folder / "model")
    text = Text(companions(folder / "model"), folder / "model", model.config)
    return Base(folder / "model", text, Data(read_rows(cfg.data), text, cfg, "train"))


class Run(NamedTuple):
    lines: list                 # the metrics of each step
    state: sapo.State           # as it was after the last step
    pairs: list                 # all pairs that were ever in the buffer after a step

    def last(self, metric, n=10):
        """The mean of a metric over the last n steps that have it."""
        return float(np.mean([line[metric] for line in self.lines if metric in line][-n:]))


def run(base, bug=None, steps=60, lr=1e-4, seed=0, **settings):
    """A Run of Algorithm 1 from the base, with SETTINGS but for those given, perhaps with a bug in it."""
    code = bug.sapo if bug else sapo
    cfg = code.SAPOConfig(**SETTINGS | settings)
    state = code.State.start(load_pretrained(base.folder), cfg, base.text.eos, seed, lr, vocab=base.text.vocab,
                             steps_per_epoch=len(base.data) // cfg.batch_size)
    draw, lines, seen = base.draw(seed), [], {}
    for _ in range(steps):
        metrics = code.sapo_step(state, draw, cfg)
        fresh = [p for p in state.buffer.pairs if id(p) not in seen]
        seen |= {id(p): p for p in fresh}
        metrics["pairs/rejected_verified"] = float(np.mean([verified(base, p) for p in fresh]))
        lines.append(metrics)
    return Run(lines, state, list(seen.values()))


def verified(base, pair):
    """Whether a pair's y- passes the verifier of its row: then nothing in it is wrong."""
    return passes(base.text.decode(pair.rejected, True), base.data.verifiers[pair.row])


# ------------------------------------------------------------------------------------------------ bugs
class Bug:
    """A station's bug in copies of the method's files: `bug.sapo`, `bug.buffer` and `bug.losses` are modules like your
    own, which stay as they are."""

    def __init__(self, mutant):
        self.mutant, self.text = mutant, mutants.mutated(mutant, ROOT)
        modules = load({mutant.file: self.text})
        self.losses, self.buffer, self.sapo = (modules[name] for name in METHOD)

    def show(self, function):
        """Print a function as it is here: show("sapo.split"), or show("buffer.ReplayBuffer.add")."""
        module, _, name = function.partition(".")
        found = attrgetter(name)(getattr(self, module))
        print(inspect.getsource(found.fget if isinstance(found, property) else found))

    def guess(self, function):
        """Whether the bug is in this function, such as "sapo.split"."""
        if function:
            print(mutants.guessed(self.mutant.file, mutants.where(self.mutant, ROOT), function))
        else:
            print("no guess yet")

    def test(self):
        """Run the bug's own test in a copy of the project that has it; print what it says, and return whether it is red."""
        with tempfile.TemporaryDirectory(prefix="workshop-") as folder:
            copy = Path(folder, "project")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*mutants.NOT_COPIED, "figures"))
            mutants.write(copy, self.mutant.file, self.text)
            code, output = mutants.run_tests(copy, self.mutant.test)
        said = re.findall(r"^E\s+(.*)", output, re.M)
        print(f"{'red' if code == 1 else 'not red'}: {self.mutant.test.split('::')[1]}\n{said[0] if said else output[-300:]}")
        return code == 1

    def reveal(self):
        print(mutants.revealed(self.mutant, ROOT))


def load(changed):
    """{name: module} of METHOD, made anew, with {file: text} in place of what stands there."""
    kept, made = {name: sys.modules.get(name) for name in METHOD}, {}
    try:
        for name in METHOD:
            text, place = changed.get(f"{name}.py") or mutants.read(ROOT, f"{name}.py"), f"<{name}.py of the station>"
            linecache.cache[place] = (len(text), None, text.splitlines(True), place)        # so that `inspect` finds the source
            made[name] = sys.modules[name] = ModuleType(name)
            exec(compile(text, place, "exec"), vars(made[name]))
    finally:
        sys.modules.update({name: module for name, module in kept.items() if module})
    return made


def plant(station):
    """The Bug of a station of the workshop: 1 to 6, or "2b"."""
    return Bug(mutants.of_station(str(station)))


# ------------------------------------------------------------------------------------------------ pictures
def draw_strips(rows, names=(), width=7.0):
    """A picture of texts as strips: each row is [(part, number of tokens), ...], with a part such as A, B, B', C or x."""
    figure, axes = plt.subplots(figsize=(width, 0.32 * len(rows) + 0.5))
    for i, row in enumerate(rows):
        left = 0
        for part, tokens in row:
            axes.barh(i, tokens, left=left, color=COLOURS.get(part, "#dddddd"), edgecolor="white")
            if tokens > 1:
                axes.text(left + tokens / 2, i, f"{part} {tokens}", ha="center", va="center", fontsize=8)
            left += tokens
    axes.set_yticks(range(len(rows)), names or [str(i) for i in range(len(rows))])
    axes.invert_yaxis()
    axes.set_xlabel("tokens")
    axes.spines[["top", "right", "left"]].set_visible(False)
    plt.show()


def draw_curves(runs, *metrics):
    """A picture of metrics of Runs, {name: Run}, one panel a metric."""
    figure, panels = plt.subplots(1, len(metrics), figsize=(3.4 * len(metrics), 2.3), squeeze=False, layout="constrained")
    for panel, metric in zip(panels[0], metrics):
        for name, run in runs.items():
            points = [(i, line[metric]) for i, line in enumerate(run.lines, 1) if metric in line]
            panel.plot(*zip(*points), label=name, linewidth=1.3)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8)
    plt.show()


def show_pair(pair, text):
    """A Pair as text in colours: x, y+ with A, B and C, and y- with A, B' and C."""
    from IPython.display import HTML, display

    def painted(y, cuts, names):
        pieces = []
        for start, stop, name in zip((0, *cuts), (*cuts, len(y)), names):
            piece = html.escape(text.decode(y[:stop])[len(text.decode(y[:start])):])
            pieces.append(f'<span style="background:{COLOURS[name]};color:#111" title="{html.escape(name)}">{piece}</span>')
        return "".join(pieces)

    rows = [("x", html.escape(text.decode(pair.prompt, True))), ("y+", painted(pair.chosen, (pair.start, pair.stop), ("A", "B", "C"))),
            ("y-", painted(pair.rejected, (pair.start, pair.rejected_stop), ("A", "B'", "C")))]
    display(HTML("".join(f'<div style="font-family:monospace;margin:2px"><b>{name}</b> {shown}</div>' for name, shown in rows)))
