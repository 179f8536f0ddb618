"""Every setting of a run, the presets, and the command line.

A field of `Config` is a flag; its default, its source and what it may be stand beside it. `checked` refuses
what does not fit together, and `resolved` decides what depends on the model.
"""

import argparse
import dataclasses
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from machine.files import BadInput, paths_of, read_json
from model import PROJECTIONS
from sapo import SAPOConfig, setting

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = "|".join(PROJECTIONS)
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("linear", "cosine", "inverse_sqrt", "constant")


@dataclasses.dataclass
class Config(SAPOConfig):
    """Every setting of a run: the method's (SAPOConfig) and the machine's. Each is a flag."""
    model: str = setting("", "folder or hub name[@revision] of the checkpoint to train")
    from_scratch: bool = setting(False, "random weights; --model then needs config.json and tokenizer only")
    chat_template: str = setting("", "a Jinja file to use in place of the checkpoint's chat template")
    lora: int = setting(0, "rank of LoRA adapters; 0 trains all weights", low=0, high=4096)
    lora_alpha: float = setting(32.0, "adapters are scaled by alpha / rank", low=1e-6)
    lora_projections: str = setting(
        ",".join(PROJECTIONS), "projections that get an adapter, comma-separated",
        pattern=f"({NAMES})(,({NAMES}))*", form=f"some of {','.join(PROJECTIONS)}")
    data: str = setting("", "rows to train on: files or folders of JSON lines or lists, comma-separated")
    eval_data: str = setting("", "rows to evaluate on; without it, some of --data are held out")
    sft_data: str = setting("", "rows of supervised fine-tuning (SFT); without it, --data")
    max_prompt_length: int | None = setting(
        None, "tokens; a longer prompt loses its left end, BOS kept; without it 7/8 of --max-length, "
        "the paper's 1792 of 2048", "paper", low=1)
    steps: int | None = setting(None, "optimizer steps; 0: evaluate alone; without it, see --epochs", low=0)
    epochs: float = setting(4.0, "passes over the data, if all steps draw rows", "paper", low=1e-9, high=1e6)
    lr: float = setting(5e-7, "peak learning rate", "authors' code", low=0)
    lr_scheduler: str = setting("linear", "decay after the warm-up", "authors' code", choices=SCHEDULES)
    warmup: str = setting(
        "10%", "steps in which the learning rate rises, or a share of them, rounded up", "authors' code",
        pattern=r"\d{1,9}|(100|\d{1,2})(\.\d+)?%", form="a number of steps, or a share such as 10%")
    optimizer: str = setting("rmsprop", "float32 optimizer", "authors' code", choices=("adamw", "rmsprop"))
    weight_decay: float = setting(0.0, "decoupled weight decay (adamw)", low=0)
    sft_steps: int = setting(0, "steps of SFT on chosen responses before SAPO", low=0)
    sft_lr: float = setting(2e-5, "peak learning rate of SFT", low=0)
    sft_batch_size: int = setting(64, "rows an SFT step, over all processes", low=1)
    out: str = setting("", "run folder; without it runs/<preset>-<time>-<six digits>")
    overwrite: bool = setting(False, "replace the run folder if it exists")
    save_dtype: str = setting(
        "float32", "of model/ and ema/: float32 is what was trained, bfloat16 takes most changes of a small "
        "learning rate back; auto: the dtype of --model",
        choices=("auto", "float32", "bfloat16", "float16"))
    save_every: int = setting(100, "steps between checkpoints; 0: only between stages and at the end", low=0)
    keep: int = setting(2, "checkpoints kept; 0: one while it trains, none once model/ is there", low=0)
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after", low=0)
    eval_rows: int = setting(200, "rows evaluated on at most", low=1)
    eval_tokens: int = setting(128, "tokens of an answer at most, for verifier and samples", low=1)
    samples: int = setting(4, "prompts of the evaluation answered before and after, for reading", low=0)
    show_every: int = setting(10, "steps between lines on the screen and pairs in pairs.jsonl", low=1)
    report_to: str = setting("none", "what the metrics go to beside metrics.jsonl", "TRL",
                             choices=("none", "tensorboard"))
    seed: int = setting(42, "of everything drawn", "authors' code", low=0, high=2**31)
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", choices=DEVICES)
    dtype: str = setting(
        "auto", "of autocast and of the generator; weights stay float32 (LoRA's frozen base does not); "
        "auto: bfloat16 on cuda", "authors' code", choices=("auto", "float32", "bfloat16"))
    shard: bool = setting(False, "FSDP2: weights, EMA, reference and optimizer are sharded over processes")
    gradient_checkpointing: bool = setting(False, "recompute blocks going backward: less memory, more time")
    max_minutes: float = setting(0.0, "save and stop after so long; 0: no limit", low=0)
    max_bad_steps: int = setting(5, "steps in a row not finite that end the run with exit code 3", low=1)

    def warmup_steps(self, steps):
        """--warmup as a number of steps; a share is rounded up, as transformers does."""
        share = self.warmup.endswith("%")
        return math.ceil(steps * float(self.warmup[:-1]) / 100) if share else int(self.warmup)


GROUPS = {"loss": "method", "model": "model", "data": "data", "steps": "optimisation", "out": "output",
          "seed": "machine"}        # of --help: the first flag of each
PAPER = dict(       # the paper's numbers; from `batch_size` on, the authors' code's
    max_prompt_length=1792, max_length=2048, segment="256", buffer_size=2000, epochs=4.0, alpha=0.5,
    ema_every="2", after="keep", rejected="sapo", score_on="response", nll_on="response", replay="uniform",
    batch_size=64, generate_every=1, temperature=0.7, top_k=50, top_p=0.95, eos_in_segment="stop", seed=42,
    dtype="auto")
PRESETS = {
    "paper-dpo": PAPER | dict(loss="dpo", beta=0.1, ref_refresh="epoch", ref_from="ema", optimizer="rmsprop",
                              lr=5e-7, lr_scheduler="linear", warmup="10%"),
    "paper-orpo": PAPER | dict(loss="orpo", lam=0.05, optimizer="adamw",
                               lr=5e-6, lr_scheduler="inverse_sqrt", warmup="100"),
    "tiny": dict(
        model=str(DATA / "tiny_model"), from_scratch=True, data=str(DATA / "tiny_train.jsonl"),
        eval_data=str(DATA / "tiny_test.jsonl"), sft_data=str(DATA / "tiny_base.jsonl"), sft_steps=500,
        sft_lr=4e-3, sft_batch_size=16, steps=120, batch_size=16, micro_batch=16, segment="12", lr=1e-4,
        buffer_size=256, optimizer="adamw", max_prompt_length=48, max_length=160, eval_tokens=80,
        eval_every=30, save_every=60)}
PATHS = ("model", "data", "eval_data", "sft_data", "chat_template")
LAYOUT = 2          # of a run folder, and of how its random streams are seeded: a run goes on in its own only
MAY_CHANGE = {      # on --resume, like the number of processes; what is in moved data must be what it was
    "data", "eval_data", "sft_data",
    "steps", "epochs", "save_every", "keep", "eval_every", "show_every", "report_to", "max_minutes",
    "max_bad_steps", "save_dtype", "device", "shard", "micro_batch", "generate_ahead", "generate_rows",
    "gradient_checkpointing"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (python train.py --help lists every flag)")


def flag_of(name):
    return "--" + name.replace("_", "-")


def kind_of(f):
    return int if f.type == int | None else f.type


def command_line(doc):
    """The parser: --preset, --config, --resume, and a flag for each setting, in groups."""
    parser = Parser(
        prog="train.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="In brackets: the default with --model or --data, and its source.",
        usage="python train.py [flags]\n       torchrun --nproc_per_node=8 train.py [flags]\n       "
              "python train.py --resume RUN [flags that may change]")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from; tiny without "
                        "--model and --data, else paper-dpo as far as the model's context goes")
    parser.add_argument("--config", help="config.json of an earlier run, to start from its settings")
    parser.add_argument("--resume", help="run folder to go on with")
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = "none" if f.default in ("", None) else f.default
        how = dict(type=kind_of(f), choices=f.metadata.get("choices"))
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        text = f"{f.metadata['help']} [{default}; {f.metadata['source']}]".replace("%", "%%")
        group.add_argument(flag_of(f.name), default=argparse.SUPPRESS, help=text, **how)
    return parser


class Command(NamedTuple):
    """What a command line asks for."""
    cfg: Config
    preset: str
    resume: Path | None         # the run folder to go on with


def parse(argv, doc=None):
    """The Command of a command line. A flag beats --config, which beats the preset."""
    flags = vars(command_line(doc).parse_args(argv))
    given = [flag_of(name) for name in ("resume", "config", "preset") if flags[name]]
    preset, config = flags.pop("preset"), flags.pop("config")
    resume = flags.pop("resume")
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)}: each brings all settings; give one of them")
    flags |= {name: absolute(flags[name]) for name in PATHS if name in flags}
    settings, saved = {}, {}
    if resume or config:
        path = Path(resume, "config.json") if resume else config
        saved = read_json(path, "run folder" if resume else "run")
        settings = settings_of(saved, path)
    if resume and os.path.realpath(flags.pop("out", resume)) != os.path.realpath(resume):
        raise BadInput("--resume goes on in the run's own folder; leave out --out, or copy the folder and "
                       "resume the copy")
    if resume:
        if saved.get("layout") != LAYOUT:
            raise BadInput(f"{path}: a run of another version, which alone can go on with it; begin again "
                           f"with --config {path}")
        for name, value in flags.items():
            fixed = name not in MAY_CHANGE or name == "micro_batch" and settings.get("loss") == "rpo"
            fixed &= name != "model" or not settings.get("lora")         # whose weights' checksums are kept
            if fixed and value != settings.get(name):
                others = ", ".join(map(flag_of, sorted(MAY_CHANGE)))
                raise BadInput(f"{flag_of(name)} {value} contradicts the saved run, which has "
                               f"{settings.get(name)!r}; on --resume these may change: {others}")
        cfg = checked(Config(**settings | flags | {"out": str(resume)}))
        return Command(cfg, saved.get("preset"), Path(resume))
    settings = {k: v for k, v in settings.items() if k not in ("out", "overwrite")}
    bare = not (flags.get("model") or flags.get("data"))
    preset = preset or saved.get("preset") or ("tiny" if bare else "")     # else the defaults: paper-dpo's
    none = {"eval_data": "", "sft_data": ""} if "data" in flags else {}        # a preset's fit its own rows
    begin = PRESETS.get(preset, {}) | none
    cfg = checked(Config(**begin | settings | flags))
    if flags.get("sft_data") and not (cfg.sft_steps or "sft_steps" in flags):
        raise BadInput("--sft-data without --sft-steps: there would be no SFT; give --sft-steps N")
    return Command(cfg, preset or "paper-dpo", None)


def absolute(value):
    """A path, or several with commas between them, as it is from any folder, where it exists."""
    return ",".join(os.path.abspath(part) if os.path.exists(part) else part for part in paths_of(value))


def settings_of(saved, path):
    settings = saved.get("settings") if isinstance(saved, dict) else None
    if not isinstance(settings, dict):
        raise BadInput(f"{path}: not the config.json of a run of this program")
    unknown = settings.keys() - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise BadInput(f"{path}: not the config.json of a run of this version (it has {min(unknown)})")
    return settings


def checked(cfg):
    """The Config, or BadInput: types, choices and ranges, whatever the loss, then what must fit together."""
    for f in dataclasses.fields(Config):
        check_setting(f, getattr(cfg, f.name))
    for broken, sentence in (
            (not cfg.model,
             "--model is missing: a model folder or hub name (python train.py alone runs the tiny world)"),
            (not cfg.data, "--data is missing: a file of JSON lines with prompt and chosen, or messages"),
            (cfg.buffer_size < cfg.batch_size and cfg.steps != 0,
             f"--buffer-size {cfg.buffer_size} is smaller than one batch of {cfg.batch_size} pairs"),
            (cfg.device == "cuda" and not torch.cuda.is_available(),
             "--device cuda: torch sees none here; use --device cpu"),
            (cfg.from_scratch and not cfg.sft_steps,
             "--from-scratch with --sft-steps 0: random weights generate noise; give them some SFT"),
            (cfg.from_scratch and cfg.lora,
             "--lora with --from-scratch: an adapter on random weights learns nothing of use"),
            (cfg.after == "rewrite" and cfg.eos_in_segment == "ban",
             "--after rewrite with --eos-in-segment ban: what the generator writes would never end"),
            (cfg.rejected == "data" and cfg.score_on == "segment",
             "--rejected data with --score-on segment: a pair of the data has no segment B"),
            (cfg.weight_decay and cfg.optimizer != "adamw",
             f"--weight-decay {cfg.weight_decay} is adamw's; give --optimizer adamw, or leave it out"),
            (0 < cfg.temperature < 1e-6, f"--temperature {cfg.temperature}: give 0 to decode greedily"),
            (cfg.loss == "rpo" and cfg.micro_batch < 2,
             "--loss rpo compares the pairs of a micro-batch, and --micro-batch 1 leaves none; raise it"),
            (cfg.lora and cfg.shard,
             "--lora with --shard is not implemented: adapters are small; use torchrun without --shard"),
            (cfg.report_to == "tensorboard" and not find_spec("tensorboard"),
             "--report-to tensorboard: it is not installed; run: pip install tensorboard"),
            (cfg.shard and "RANK" not in os.environ,
             "--shard divides the model among processes; start it with torchrun")):
        if broken:
            raise BadInput(sentence)
    return cfg


def check_setting(f, value):
    """Type, choices, range and pattern of one setting; BadInput says what it may be."""
    meta, kind = f.metadata, kind_of(f)
    if value is None and f.default is None:
        return
    low, high = meta.get("low", 0), meta.get("high", 10**12)
    wanted, fits = "", (int, float) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, fits):
        wanted = f"it must be of type {kind.__name__}"
    elif value != value:
        wanted = "choose a number"
    elif kind is str and re.search("[\ud800-\udfff]", value):
        wanted = "it must be UTF-8 text; rename it"
    elif value not in meta.get("choices", (value,)):
        wanted = f"choose {' or '.join(meta['choices'])}"
    elif "pattern" in meta and not re.fullmatch(meta["pattern"], value):
        wanted = f"it must be {meta['form']}"
    elif kind in (int, float) and not low <= value <= high:
        wanted = f"it must be at least {low:g}" if value < low else f"it must be at most {high:g}"
    if wanted:
        raise BadInput(f"{flag_of(f.name)} is {value!r}; {wanted}")


def batches(cfg):
    """{setting: rows of a batch} of the stages that a run has."""
    sizes = {"batch_size": cfg.batch_size} if cfg.steps != 0 else {}
    return sizes | ({"sft_batch_size": cfg.sft_batch_size} if cfg.sft_steps else {})


def resolved(cfg, context, processes):
    """The Config with what was left open decided by the model's context, and checked against it."""
    length = cfg.max_length or min(2048, context)
    prompt = cfg.max_prompt_length or length * 7 // 8
    if length > context:
        raise BadInput(f"--max-length {length} is more than the model's context of {context}; give "
                       f"--max-length {context} --max-prompt-length {context * 7 // 8}, or less")
    if prompt >= length:
        raise BadInput(f"--max-prompt-length {prompt} leaves no room for a response within {length} tokens; "
                       f"give {length * 7 // 8}, or less")
    for name, rows in batches(cfg).items():
        if rows % processes:
            raise BadInput(f"{flag_of(name)} {rows} cannot be shared evenly by {processes} processes")
    return dataclasses.replace(cfg, max_length=length, max_prompt_length=prompt)
