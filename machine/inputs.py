"""What a run reads before the first weight is loaded. Whatever can be refused is refused here."""

import dataclasses
import math
from pathlib import Path

import torch

from machine import checkpoint
from machine.config import read_config
from machine.dataset import read_data
from machine.files import BadInput, read_json
from machine.flags import PATHS, Config, batches, flag_of, resolved
from machine.folders import BESIDE, WEIGHTS, check_weights, companions, find_model
from machine.rows import read_rows
from machine.text import Text
from model import ModelConfig

FILES = ("data", "eval_data", "sft_data")
MOST = 100                      # times the data is a batch at most


@dataclasses.dataclass
class Inputs:
    """A run's settings, resolved, and all that they name, read and checked."""
    cfg: Config
    preset: str
    base: Path | None           # the model folder; None on resume, where a checkpoint holds the weights
    commit: str | None          # of the hub's repository
    config: ModelConfig
    files: dict                 # {name: bytes} of what will stand beside the weights
    notes: list                 # what was changed in them, in sentences
    text: Text
    data: list                  # Data to train on, to evaluate on, for SFT
    steps: int                  # of SAPO

    def fingerprints(self):
        return {name: data.fingerprint() for name, data in zip(FILES, self.data)}

    def written(self):
        """The dtype in which the models will be written; auto is what config.json of --model says."""
        stated = self.config.source.get("torch_dtype") or self.config.source.get("dtype")
        name = stated if self.cfg.save_dtype == "auto" else self.cfg.save_dtype
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)

    def origin(self):
        """(hub name, commit) of the base, or (its folder, None)."""
        return self.cfg.model.partition("@")[0] if self.commit else self.cfg.model, self.commit

    def find_weights(self, world):
        """The base, complete: from the hub only when nothing else is left that could be refused."""
        if not self.cfg.from_scratch:
            self.base, _ = find_model(self.cfg.model, world, BESIDE + WEIGHTS)
            world.together(lambda: check_weights(self.base, self.config))


def read_inputs(command, world):
    """The Inputs of a command line. What one process refuses, or sees otherwise, all refuse."""
    base = commit = None
    if not command.resume or command.cfg.lora:   # a checkpoint holds all weights, but not an adapter's base
        base, commit = find_model(command.cfg.model, world)
    inputs = world.together(lambda: _read(command, base, commit, world))
    settings = {name: value for name, value in dataclasses.asdict(inputs.cfg).items() if name not in PATHS}
    seen = world.all([inputs.fingerprints(), settings])
    if any(other != seen[0] for other in seen):  # they would take unequal numbers of steps, and wait
        raise BadInput("not all processes have the same settings and data; start every node with the same "
                       "command and the same files")
    if base:
        inputs.find_weights(world)
    return inputs


def _read(command, base, commit, world):
    cfg, resume = command.cfg, command.resume
    rows = {name: read_rows(getattr(cfg, name)) for name in FILES if getattr(cfg, name)}
    source = resume / "source" if resume else base
    config = read_config(source)
    if resume:
        commit = read_json(resume / "config.json").get("model_commit")
    elif commit:                                 # the branch may move, the run's model does not
        cfg = dataclasses.replace(cfg, model=f"{cfg.model.partition('@')[0]}@{commit}")
    cfg = resolved(cfg, config.max_position_embeddings, world.size)
    text = Text(companions(source), source, config, "" if resume else cfg.chat_template)
    data = read_data(rows, text, cfg, world.first)
    for name, size in batches(cfg).items():
        rows = len(data[0] if name == "batch_size" else data[2])
        if size > MOST * rows:
            raise BadInput(f"{flag_of(name)} {size} is more than {MOST} times the {rows} rows; lower it")
    steps = max(1, math.ceil(cfg.epochs * len(data[0]) / cfg.batch_size)) if cfg.steps is None else cfg.steps
    if not resume and world.first:
        checkpoint.may_write(cfg)
    return Inputs(cfg, command.preset, base, commit, config, *text.exported(), text, data, steps)
