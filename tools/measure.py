"""What the tools that train small models share: the tiny world's bases and rows, measures of answers, Markdown."""

import json
import re
import statistics
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from buffer import collate
from losses import score
from machine.dataset import Data
from machine.files import write_json
from machine.flags import parse
from machine.folders import companions, load_pretrained
from machine.parallel import World
from machine.report import Evaluation
from machine.rows import read_rows
from machine.text import Text

QUIET = "--preset tiny --device cpu --eval-every 0 --save-every 0 --keep 1 --eval-rows 1 --samples 0".split()


class Failed(Exception):
    """A run ended badly; the message says which."""


def base_model(seed, flags=(), out=ROOT / "runs/tiny-base", preset=QUIET):
    """The model folder of a seed's base, made by SFT alone if it is not there: the one step at learning rate 0
    moves nothing. flags: what differs from the preset. A process of its own, as train.py minds signals in its own way."""
    folder = Path(f"{out}-seed-{seed}")
    wanted = [*preset, *flags, "--seed", str(seed), "--steps", "1", "--lr", "0"]
    if known(folder / "made.json") != wanted:
        command = [sys.executable, str(ROOT / "train.py"), *wanted, "--out", str(folder), "--overwrite"]
        if subprocess.run(command).returncode or not (folder / "model").is_dir():
            raise Failed(f"{folder} was not made")       # stopped, which is code 0, leaves no model
        write_json(folder / "made.json", wanted)
    return folder / "model"


def known(path):
    """What a JSON file holds, or None where it is missing or torn."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text("utf-8"))


def opened(folder, seed, flags=()):
    """(model, Text, Config) of a model folder and a seed."""
    model = load_pretrained(folder)
    return model, Text(companions(folder), folder, model.config), parse([*QUIET, *flags, "--seed", str(seed)]).cfg


def rows_of(split, text, cfg, rows=None, world="tiny"):
    """The first rows of a world's split, or all, as Data."""
    return Data(read_rows(ROOT / "data" / f"{world}_{split}.jsonl")[:rows], text, cfg, split)


class Listening(Evaluation):
    """An Evaluation outside of a run, on the CPU, that remembers the answers at each temperature."""

    def __init__(self, data, pairs, cfg, text):
        inputs = SimpleNamespace(cfg=cfg, text=text, data=[None, data])      # what it looks at in a run's Inputs
        super().__init__(inputs, World("cpu"), nullcontext, lambda: None, pairs)
        self.heard = {}

    def answers(self, model, pairs, temperature=0, top_k=0, top_p=1.0):
        self.heard[temperature] = super().answers(model, pairs, temperature, top_k, top_p)
        return self.heard[temperature]


def judged(model, data, pairs, cfg, text):
    """{metric: value} of a model in memory, on the rows of `data` as Pairs: those of train.py's evaluation, and what
    only answers show. Of those at temperature 1: distinct-2, two-word sequences that differ, of all; repeated, answers
    whose wording (facts blanked) another has as well; length, in tokens."""
    evaluation = Listening(data, pairs, cfg, text)
    found = evaluation.measure(model)
    del found["gap_change"]                              # since the start, which here would be the model itself
    answers = evaluation.heard[1.0]
    texts = [text.decode(ids, True) for ids in answers]
    return found | {"distinct-2": distinct(texts), "repeated": repeated(texts, data.verifiers),
                    "length": statistics.mean(map(len, answers))}


@torch.no_grad()
def ahead(model, pairs):
    """Share of pairs whose y+ has the higher mean log-prob."""
    right = 0
    for i in range(0, len(pairs), 16):
        batch = collate(pairs[i:i + 16])
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


def markdown(heads, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
