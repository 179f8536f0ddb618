"""What docs/workshop.ipynb stands on: a base, short runs, bugs that are planted in memory, and pictures.

    base = make_base("runs/base")           trained by train.py, if it is not there
    bug = plant(3)                          station 3's bug, in copies of the method's files; your own stay as they are
    clean, bent = run(base), run(base, bug)
    draw_curves({"clean": clean, "station 3": bent}, "loss", "buffer/staleness")

Left out: the hunt by terminal (tools/mutants.py has it) and the exercises (tools/exercises.py).
"""

import dataclasses
import difflib
import inspect
import linecache
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import numpy as np
import torch

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
    """The Base in a run folder, trained by `python train.py --steps 1 --lr 0` if it is not there (under a minute): one
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
    """A bug in copies of the method's files: `bug.sapo`, `bug.buffer`, `bug.losses` are modules like your own."""

    def __init__(self, mutant):
        self.mutant, self.text = mutant, mutants.mutated(mutant, ROOT)
        modules = load({mutant.file: self.text})
        self.losses, self.buffer, self.sapo = (modules[name] for name in METHOD)


def load(changed):
    """{name: module} of METHOD, made anew, with {file: text} in place of what stands there."""
    kept, made = {name: sys.modules.get(name) for name in METHOD}, {}
    try:
        for name in METHOD:
            text, place = changed.get(f"{name}.py") or mutants.read(ROOT, f"{name}.py"), f"<{name}.py of the station>"
            linecache.cache[place] = (len(text), None, text.splitlines(True), place)        # so that `inspect` finds the source
            module = sys.modules[name] = made[name] = ModuleType(name)
            exec(compile(text, place, "exec"), vars(module))
    finally:
        sys.modules.update({name: module for name, module in kept.items() if module})
    return made


def plant(station):
    """The Bug of a station of the workshop, 1 to 6, or of a bug's number in the table, such as "#51"."""
    if isinstance(station, str):
        return Bug(mutants.numbered(station.lstrip("#"))[0])
    return Bug(next(m for m in mutants.MUTANTS if m.station == mutants.STATIONS[station - 1]))
