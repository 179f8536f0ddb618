"""Every setting of a run, the presets, and the command line."""

import argparse
import dataclasses
import os
import re
from pathlib import Path

import torch

from machine.folders import BadInput, read_json
from model import PROJECTIONS
from sapo import SAPOConfig, setting

HERE = Path(__file__).resolve().parent.parent



@dataclasses.dataclass
class Config(SAPOConfig):
    """Every setting of a run: the method's (SAPOConfig) and the machine's. Each is a flag."""
    model: str = setting("", "folder or hub name[@revision] of the checkpoint to train")
    from_scratch: bool = setting(False, "start from random weights; the folder then needs only config.json and the tokenizer")
    data: str = setting("", "rows to train on, JSON lines: prompt and chosen, or messages")
    eval_data: str = setting("", "held-out rows; without it, some of --data are held out")
    sft_data: str = setting("", "rows of the supervised warm-up; without it, --data")
    out: str = setting("", "run folder; runs/<preset>-<time> without it")
    overwrite: bool = setting(False, "replace the run folder if it exists")
    chat_template: str = setting("", "a Jinja file to use in place of the checkpoint's chat template")
    steps: int | None = setting(None, "optimizer steps; 0 only evaluates; without it, --epochs decides", low=0)
    epochs: float = setting(4.0, "passes over the data", "paper", low=1e-9, high=1e6)
    lr: float = setting(5e-7, "peak learning rate", "authors' code", low=0)
    lr_scheduler: str = setting("linear", "decay after the warm-up", "authors' code",
                                choices=("linear", "cosine", "inverse_sqrt", "constant"))
    warmup: str = setting("10%", "warm-up: steps, or a share of them", "authors' code")
    optimizer: str = setting("rmsprop", "float32 optimizer", "authors' code", choices=("adamw", "rmsprop"))
    weight_decay: float = setting(0.0, "decoupled weight decay (adamw)", low=0)
    lora: int = setting(0, "rank of LoRA adapters; 0 trains all weights", low=0, high=4096)
    lora_alpha: float = setting(32.0, "adapters are scaled by alpha / rank", low=1e-6)
    lora_projections: str = setting(",".join(PROJECTIONS), "projections that get an adapter, comma-separated")
    sft_steps: int = setting(0, "supervised warm-up steps before SAPO", low=0)
    sft_lr: float = setting(2e-5, "peak learning rate of the warm-up", low=0)
    sft_batch_size: int = setting(64, "rows a warm-up step, over all processes", low=1)
    max_prompt_length: int | None = setting(None, "tokens; a longer prompt loses its left end, BOS kept; "
                                                  "without it 7/8 of --max-length, the paper's 1792 of 2048", "paper", low=1)
    max_length: int | None = setting(None, "tokens of prompt and response; a longer response loses its right end; "
                                           "without it min(2048, the model's context)", "paper", low=2)
    seed: int = setting(42, "of everything drawn", "authors' code", low=0, high=2**31)
    device: str = setting("auto", "cpu, cuda, mps, or auto: cuda where there is one", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting("auto", "of autocast and of the writer; weights stay float32 (LoRA's frozen base does not); auto: bfloat16 on cuda",
                         "authors' code", choices=("auto", "float32", "bfloat16"))
    shard: bool = setting(False, "FSDP2: weights, EMA, reference and optimizer state are divided among the processes")
    gradient_checkpointing: bool = setting(False, "recompute each block in the backward pass: less memory, more time")
    save_every: int = setting(100, "steps between checkpoints; 0: only between the stages and at the end", low=0)
    keep: int = setting(2, "checkpoints kept", low=1)
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after", low=0)
    eval_rows: int = setting(200, "held-out rows used at most", low=1)
    eval_tokens: int = setting(128, "tokens of an answer at most, for judge and samples", low=1)
    samples: int = setting(4, "held-out prompts answered before and after, for reading", low=0)
    show_every: int = setting(10, "steps between lines on the screen and pairs in pairs.jsonl", low=1)
    max_minutes: float = setting(0.0, "save and stop after so long; 0: no limit", low=0)
    max_bad_steps: int = setting(5, "steps in a row whose gradient is not finite before the run stops with exit code 3", low=1)
TINY = HERE / "data"
PRESETS = {
    "paper-dpo": {},
    "paper-orpo": dict(loss="orpo", lr=5e-6, lr_scheduler="inverse_sqrt", warmup="100", optimizer="adamw"),
    "tiny": dict(model=str(TINY / "tiny_model"), from_scratch=True, data=str(TINY / "tiny_train.jsonl"), eval_data=str(TINY / "tiny_test.jsonl"),
                 sft_data=str(TINY / "tiny_base.jsonl"), sft_steps=500, sft_lr=4e-3, sft_batch_size=16, steps=120,
                 batch_size=16, micro_batch=16, segment="12", buffer_size=256, lr=1e-4, optimizer="adamw",
                 max_prompt_length=48, max_length=160, eval_tokens=80, eval_every=30, save_every=60),
}
MAY_CHANGE = {"out", "overwrite", "steps", "epochs", "save_every", "keep", "eval_every", "show_every", "max_minutes", "max_bad_steps",
              "device", "micro_batch", "write_ahead", "write_rows", "gradient_checkpointing", "shard"}       # on --resume, like the number of processes



class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (python train.py --help lists every flag)")



def kind_of(f):
    return int if f.type == int | None else f.type



def flag_of(name):
    return "--" + name.replace("_", "-")



def parse(argv):
    """(Config, preset name, resume folder or None). A flag beats --config, which beats the preset."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from; tiny if neither --model nor --data is given, else paper-dpo")
    parser.add_argument("--config", help="config.json of an earlier run, to start from its settings")
    parser.add_argument("--resume", help="run folder to go on with")
    for f in dataclasses.fields(Config):
        default = "none" if f.default in ("", None) else f.default
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=kind_of(f), choices=f.metadata.get("choices"))
        parser.add_argument(flag_of(f.name), default=argparse.SUPPRESS, **how,
                            help=f"{f.metadata['help']} [{default}; {f.metadata['source']}]".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    preset, config, resume = (flags.pop(k) for k in ("preset", "config", "resume"))
    if resume:
        if preset or config:
            raise BadInput("--resume takes its settings from the run itself; leave out --preset and --config")
        path = Path(resume) / "config.json"
        saved = read_json(path, "run folder")
        settings = settings_of(saved, path)
        for k, v in flags.items():
            if k not in MAY_CHANGE and v != settings.get(k):
                raise BadInput(f"{flag_of(k)} {v} contradicts the saved run, which has {settings.get(k)!r}; "
                               f"on --resume these may change: {', '.join(map(flag_of, sorted(MAY_CHANGE)))}")
        return checked(Config(**settings | flags | {"out": str(resume)})), saved.get("preset"), Path(resume)
    settings = {}
    if config:
        saved = read_json(config, "run")
        settings = {k: v for k, v in settings_of(saved, config).items() if k not in ("out", "overwrite")}
        preset = preset or saved.get("preset")
    preset = preset or ("paper-dpo" if flags.get("model") or flags.get("data") else "tiny")
    return checked(Config(**PRESETS.get(preset, {}) | settings | flags)), preset, None



def settings_of(saved, path):
    settings = saved.get("settings") if isinstance(saved, dict) else None
    if not isinstance(settings, dict) or set(settings) - {f.name for f in dataclasses.fields(Config)}:
        raise BadInput(f"{path}: not the config.json of a run of this program")
    return settings



def checked(cfg):
    """The Config, or BadInput: types, choices and ranges, whatever the loss, then what must fit together."""
    for f in dataclasses.fields(Config):
        value, flag, meta, kind = getattr(cfg, f.name), flag_of(f.name), f.metadata, kind_of(f)
        if value is None and f.default is None:
            continue
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise BadInput(f"{flag} is {value!r}; it must be of type {kind.__name__}")
        if value not in meta.get("choices", (value,)) or value != value:
            raise BadInput(f"{flag} is {value!r}; choose {' or '.join(meta.get('choices', ('a number',)))}")
        low, high = meta.get("low", 0), meta.get("high", 10**12)
        if kind in (int, float) and not low <= value <= high:
            raise BadInput(f"{flag} is {value}; it must be at {f'least {low:g}' if value < low else f'most {high:g}'}")
    whole = r"[1-9]\d{0,8}"
    for name, pattern, what in (("segment", rf"{whole}|(100|[1-9]\d?)(\.0+)?%|\d{{1,2}}\.\d+%", "a number of tokens, or a share such as 50%"),
                                ("ema_every", rf"{whole}|epoch", "a number of steps, or epoch"),
                                ("ref_refresh", rf"{whole}|epoch|never", "a number of steps, epoch or never"),
                                ("warmup", r"\d{1,9}|(100|\d{1,2})(\.\d+)?%", "a number of steps, or a share such as 10%"),
                                ("lora_projections", rf"({'|'.join(PROJECTIONS)})(,({'|'.join(PROJECTIONS)}))*", f"some of {','.join(PROJECTIONS)}")):
        if not re.fullmatch(pattern, getattr(cfg, name)):
            raise BadInput(f"{flag_of(name)} is {getattr(cfg, name)!r}; it must be {what}")
    sees = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    refusals = {
        "--model is missing: a model folder or hub name (python train.py alone runs the tiny world)": not cfg.model,
        "--data is missing: a file of JSON lines with prompt and chosen, or messages": not cfg.data,
        f"--max-prompt-length {cfg.max_prompt_length} leaves no room for a response within --max-length {cfg.max_length}":
            cfg.max_length and cfg.max_prompt_length and cfg.max_prompt_length >= cfg.max_length,
        f"--buffer-size {cfg.buffer_size} is smaller than one batch of {cfg.batch_size} pairs": cfg.buffer_size < cfg.batch_size,
        f"--device {cfg.device}: torch sees none here; use --device cpu": cfg.device in sees and not sees[cfg.device](),
        "--from-scratch with --sft-steps 0: random weights write noise; give them a warm-up": cfg.from_scratch and not cfg.sft_steps,
        "--lora with --from-scratch: an adapter on random weights learns nothing of use": cfg.from_scratch and cfg.lora,
        "--lora with --shard is not implemented: adapters are small; use torchrun without --shard": cfg.lora and cfg.shard,
        "--shard divides the model among processes; start it with torchrun": cfg.shard and "RANK" not in os.environ,
    }
    for sentence, broken in refusals.items():
        if broken:
            raise BadInput(sentence)
    return cfg
