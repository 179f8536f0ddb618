"""What a run reads before the first weight is loaded. Whatever can be refused is refused here."""

import dataclasses
import math
from pathlib import Path

import torch

from machine import checkpoint
from machine.config import config_to_dict, read_config
from machine.dataset import read_data
from machine.files import BadInput
from machine.flags import Config, flag_of, resolved
from machine.folders import check_weights, companions, find_model, refuse_links, saved_dtype
from machine.rows import read_rows
from machine.text import Text
from model import ModelConfig

FILES = ("data", "eval_data", "sft_data")


@dataclasses.dataclass
class Inputs:
    """A run's settings, resolved, and all that they name, read and checked."""
    cfg: Config
    preset: str
    base: Path | None           # the model folder; None on resume, where a checkpoint holds the weights
    commit: str | None          # of the hub's repository
    config: ModelConfig
    files: dict                 # {name: bytes} of what stands beside the weights
    dtype: torch.dtype          # in which the models will be written: the source's
    text: Text
    data: list                  # Data to train on, to evaluate on, for SFT
    steps: int                  # of SAPO
    processes: int

    def fingerprints(self):
        return {name: data.fingerprint() for name, data in zip(FILES, self.data)}

    def new_run(self):
        """The run folder, with what was asked for and what it is made from."""
        run = {"settings": dataclasses.asdict(self.cfg), "preset": self.preset, "steps": self.steps,
               "world_size": self.processes, "model_commit": self.commit, "data": [d.note for d in self.data],
               "dtype": str(self.dtype).removeprefix("torch."), "eos_token_ids": list(self.text.eos)}
        checkpoint.new_run(Path(self.cfg.out), self.files, config_to_dict(self.config, self.dtype), run)


def read_inputs(command, world):
    """The Inputs of a command line. What one process refuses, or sees otherwise, all refuse."""
    base = commit = None
    if not command.resume or command.cfg.lora:   # a checkpoint holds all weights, but not an adapter's base
        base, commit = find_model(command.cfg.model, world)
    inputs = world.together(lambda: _read(command, base, commit, world))
    seen = world.all([inputs.fingerprints(), dataclasses.asdict(inputs.cfg)])
    if any(other != seen[0] for other in seen):  # they would take unequal numbers of steps, and wait
        raise BadInput("not all processes have the same settings and data; start every node with the same "
                       "command and the same files")
    return inputs


def _read(command, base, commit, world):
    cfg, resume = command.cfg, command.resume
    rows = {name: read_rows(getattr(cfg, name)) for name in FILES if getattr(cfg, name)}
    source = resume / "source" if resume else base
    config = read_config(source)
    refuse_links(source)
    files, dtype = companions(source), torch.float32
    if resume:
        dtype = checkpoint.dtype_of(resume)
    elif not cfg.from_scratch:
        check_weights(base, config)
        dtype = saved_dtype(base)
    cfg = resolved(cfg, config.max_position_embeddings, world.size)
    text = Text(files, source, config, cfg.chat_template)
    data = read_data(rows, text, cfg, world.first)
    steps = max(1, math.ceil(cfg.epochs * len(data[0]) / cfg.batch_size)) if cfg.steps is None else cfg.steps
    if not resume and world.first:
        read = {flag_of(name): getattr(cfg, name) for name in ("model", "chat_template", *FILES)}
        checkpoint.may_write(Path(cfg.out), cfg.overwrite, read)
    return Inputs(cfg, command.preset, base, commit, config, files, dtype, text, data, steps, world.size)
