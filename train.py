"""The machine around Algorithm 1: flags, data, processes, schedule, evaluation, logs, checkpoints, and the loop.

    python train.py                                              the tiny world, from nothing, on a laptop
    python train.py --model DIR_OR_HUB_NAME --data FILE.jsonl    SAPO on a real checkpoint
    torchrun --nproc_per_node=8 train.py ...                     the same on many GPUs
    python train.py --resume runs/NAME                           go on where it stopped

Leaves out the method, which is sapo.py's. Read it from the bottom (`main`, then `Run.train`), or in its order.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import zlib
from array import array
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from buffer import Pair, ReplayBuffer, pack, unpack
from model import (PROJECTIONS, BadInput, ModelConfig, Transformer, add_lora, blank, check_weights, companions, flush, generate,
                   load_pretrained, new_folder, plain_weights, read_json, read_weights, save_adapter, save_pretrained,
                   saved_dtype, twin, write_json)
from sapo import Example, SAPOConfig, State, collate, copy_parameters, make_pairs, period, sapo_step, score, setting, token_scores

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ 1. flags

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


# ------------------------------------------------------------------------------------------------ 2. data and chat templates

MAX_LINE = 10_000_000       # bytes of one data line
TEMPLATE_SECONDS = 5        # a template that takes longer for one conversation is stopped
TEMPLATE_BYTES = 2**29      # memory it may take for that, likewise


class Row:
    """One data row, checked: the turns before the answer (or a plain prompt), the answer, perhaps a worse one and a judge."""
    __slots__ = ("turns", "chosen", "rejected", "judge")

    def __init__(self, raw, where):
        def need(good, what):
            if not good:
                raise BadInput(f"{where}: {what}")

        need(isinstance(raw, dict), 'not a JSON object; each line must be one, such as {"prompt": ..., "chosen": ...}')
        conversation = raw.get("messages") if raw.get("chosen") is None else raw["chosen"]
        if isinstance(conversation, list):
            need(all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in conversation),
                 "each message needs a role and a content, both text")
            need(conversation and conversation[-1]["role"] == "assistant", "the last message must be the assistant's")
            need(len(conversation) > 1, "a conversation needs a message before the assistant's answer")
            self.turns, self.chosen = [{k: m[k] for k in ("role", "content")} for m in conversation[:-1]], conversation[-1]["content"]
        else:
            for key in ("prompt", "chosen"):
                need(isinstance(raw.get(key), str), f"{key} is missing or not text; a row needs prompt and chosen, or messages")
            self.turns, self.chosen = raw["prompt"], raw["chosen"]
        need(self.chosen.strip(), "the chosen response is empty")
        rejected = raw.get("rejected")
        if isinstance(rejected, list):
            rejected = rejected[-1].get("content", 0) if rejected and isinstance(rejected[-1], dict) else 0
        need(rejected is None or isinstance(rejected, str) and rejected.strip(), "rejected must be a text that is not empty, or be left out")
        self.rejected, self.judge = rejected, raw.get("judge")
        words = lambda value: isinstance(value, list) and all(isinstance(w, str) and w for w in value)
        need(self.judge is None or isinstance(self.judge, dict) and set(self.judge) <= {"must", "must_not"} and all(map(words, self.judge.values())),
             'judge must be {"must": [words], "must_not": [words]}')


def read_rows(path):
    """The Rows of a .jsonl, .jsonl.gz or .json file; BadInput with file and line for the first that is malformed."""
    path, rows, number = Path(path), [], 0
    if path.suffix == ".parquet":
        raise BadInput(f"{path}: convert parquet first: python -c \"import pandas; pandas.read_parquet('{path.name}')"
                       f".to_json('{path.stem}.jsonl', orient='records', lines=True)\"")
    try:
        if path.suffix == ".json":
            whole = read_json(path, "data set")
            if not isinstance(whole, list):
                raise BadInput(f"{path}: a .json data file must hold a list of rows; JSON lines go into .jsonl")
            rows = [Row(raw, f"{path}, row {i + 1}") for i, raw in enumerate(whole)]
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
                while line := f.readline(MAX_LINE + 1):
                    number += 1
                    where = f"{path}, line {number}"
                    if len(line) > MAX_LINE:
                        raise BadInput(f"{where}: longer than {MAX_LINE:,} bytes; is this a file of JSON lines?")
                    if line.strip():
                        rows.append(Row(read_line(line, where), where))
    except (OSError, EOFError, ValueError, zlib.error) as error:     # ValueError: a name no file can have
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


def read_line(line, where):
    try:
        raw = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():                      # half a surrogate pair is JSON, but it is not text
            json.dumps(raw, ensure_ascii=False).encode()
        return raw
    except UnicodeError:
        raise BadInput(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({str(error)[:80]})") from None


class Text:
    """Tokenizer and chat template of a checkpoint, from its companion files {name: bytes}."""

    def __init__(self, files, folder, config, template_file=""):
        if "tokenizer.json" not in files:
            raise BadInput(f"{folder}: no tokenizer.json; " + ("convert tokenizer.model with transformers' AutoTokenizer(...).save_pretrained"
                                                               if "tokenizer.model" in files else "copy it from where the model comes from"))
        try:
            self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.tokenizer.encode("Some words", add_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:                   # the library raises bare Exception, and where its Rust panics not even that
            raise BadInput(f"{folder}/tokenizer.json: not a tokenizer ({str(error)[:120]})") from None
        settings, generation = (json_or_nothing(files.get(n), f"{folder}/{n}") for n in ("tokenizer_config.json", "generation_config.json"))
        names = {k: settings.get(k) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        names = {k: v.get("content") if isinstance(v, dict) else v for k, v in names.items()}
        self.special = {k: v for k, v in names.items() if isinstance(v, str)}
        self.vocab = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if self.vocab > config.vocab_size:
            raise BadInput(f"{folder}: the tokenizer has {self.vocab} tokens, the model only {config.vocab_size}; "
                           "resizing the vocabulary is not implemented, resize and save the model first")
        self.bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.typed = re.compile("|".join(re.escape(t) for t in added.values() if len(t) > 1) or r"(?!)")

        source = files.get("chat_template.jinja", b"").decode("utf-8", "replace") or settings.get("chat_template") or ""
        if isinstance(source, list):                     # [{name, template}, ...]: take the default one
            source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), "")
        if template_file:
            try:
                source = Path(template_file).read_text("utf-8")
            except (OSError, ValueError) as error:
                raise BadInput(f"--chat-template {template_file}: cannot be read ({error})") from None
        self.template = compile_template(source) if source else None

        ends = [self.tokenizer.token_to_id(self.special.get("eos_token", ""))]         # the end of an answer is a set of ids
        for where in (generation, config.source):
            found = where.get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
        self.end = ends[0]
        if self.template:                                # what the template writes after an answer is in it
            ask = [{"role": "user", "content": "a"}]
            opening, whole = (self.tokenizer.encode(t, add_special_tokens=False).ids for t in (
                self.render(ask, True), self.render(ask + [{"role": "assistant", "content": "b"}])))
            closing = [i for i in whole[common(opening, whole):] if i in added]
            self.end = closing[-1] if closing else self.end
        self.eos = tuple(sorted({i for i in ends + [self.end] if type(i) is int and 0 <= i < self.vocab}))
        if not self.eos:
            raise BadInput(f"{folder}: no end token: neither generation_config.json, config.json nor the tokenizer names one")
        if self.end not in self.eos:
            self.end = self.eos[0]

    def render(self, messages, add_generation_prompt=False):
        """The chat text, exactly as transformers' apply_chat_template(tokenize=False) has it."""
        try:
            with time_limit(TEMPLATE_SECONDS), memory_limit(TEMPLATE_BYTES):
                text = self.template.render(messages=messages, tools=None, documents=None,
                                            add_generation_prompt=add_generation_prompt, **self.special)
                text.encode()                            # half a surrogate pair is a string, but it is not text
                return text
        except Exception as error:                       # a template can raise anything at all
            raise BadInput(f"the chat template refuses a conversation of roles {[m['role'][:20] for m in messages][:6]}: "
                           f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None

    def encode(self, rows):
        """[(prompt ids, chosen ids, rejected ids or None)] of Rows, before truncation; responses end in one end token."""
        texts = []
        for row in rows:
            answers = [row.chosen] + ([row.rejected] if row.rejected else [])
            if not self.template:
                if not isinstance(row.turns, str):
                    raise BadInput("the data are conversations, but the checkpoint has no chat template; give one with --chat-template FILE")
                texts.append((row.turns, *[row.turns + a for a in answers]))
            else:
                turns = [{"role": "user", "content": row.turns}] if isinstance(row.turns, str) else row.turns
                texts.append((self.render(turns, True), *[self.render(turns + [{"role": "assistant", "content": a}]) for a in answers]))
        ids = iter(e.ids for e in self.tokenizer.encode_batch([t for row in texts for t in row], add_special_tokens=not self.template))
        encoded = []
        for row in texts:
            opening, *wholes = [next(ids) for _ in row]
            if not self.template and opening and opening != [self.bos] and opening[-1] in self.eos:    # some tokenizers close every text
                opening = opening[:-1]
            if not opening and self.bos is not None:                                   # an empty text begins with BOS
                opening, wholes = [self.bos], [[self.bos] + w for w in wholes]
            cut = min(common(opening, whole) for whole in wholes)
            answers = [self.closed(whole[cut:]) for whole in wholes] + [None]
            encoded.append((opening[:cut], *answers[:2]))
        return encoded

    def closed(self, ids):
        """What follows the last end token is dropped; where there is none, one is added."""
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.eos), None)
        return ids + [self.end] if last is None else ids[:last + 1]

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)


def compile_template(source):
    """A chat template in jinja2's immutable sandbox, with transformers' settings, filters and globals; the date is frozen."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's tokens for others; here it only renders what it holds."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=datetime.datetime(2024, 7, 26).strftime)
    try:
        with time_limit(TEMPLATE_SECONDS), memory_limit(TEMPLATE_BYTES):
            return environment.from_string(source)
    except Exception as error:                           # constants are folded here, so this can raise anything as well
        raise BadInput(f"the chat template is not valid Jinja: {' '.join(str(error).split())[:160]}") from None


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError inside after `seconds`, where the system has alarms (not on Windows)."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(more):
    """MemoryError inside beyond `more` bytes of address space above what the process has, where there is a /proc (Linux)."""
    try:
        import resource
        with open("/proc/self/statm", "rb") as f:
            limit = int(f.read().split()[0]) * resource.getpagesize() + more
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def common(a, b):
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def json_or_nothing(content, name):
    """An object from JSON bytes; of a broken file nothing, and a warning."""
    try:
        value = json.loads(content) if content else {}
        json.dumps(value, ensure_ascii=False).encode()   # half a surrogate pair is JSON, but it is not text
        return value if isinstance(value, dict) else {}
    except (ValueError, RecursionError):
        print(f"warning: {name} is not valid JSON and is ignored", file=sys.stderr)
        return {}


class Data:
    """Rows as token ids in two integer arrays, truncated; data[i] is an Example. judges: {i: judge}."""

    def __init__(self, rows, text, cfg, name, show=False):
        tokens, ends, self.judges = array("i"), array("q"), {}
        cut_prompts = cut_responses = dropped = typed = 0
        for start in tqdm(range(0, len(rows), 1000), desc=f"tokenising {name}", disable=not show or len(rows) < 5000, leave=False):
            part = rows[start:start + 1000]
            for row, (prompt, chosen, rejected) in zip(part, text.encode(part)):
                words = [row.turns] if isinstance(row.turns, str) else [m["content"] for m in row.turns]
                typed += any(map(text.typed.search, [*words, row.chosen]))
                if len(prompt) > cfg.max_prompt_length:
                    head = prompt[:1] if prompt[0] == text.bos else []
                    prompt = head + prompt[len(prompt) - cfg.max_prompt_length + len(head):]
                    cut_prompts += 1
                room = cfg.max_length - len(prompt)
                chosen, rejected = chosen[:room], rejected and rejected[:room]
                cut_responses += 0 < len(chosen) == room and chosen[-1] not in text.eos
                if not prompt or not chosen or chosen[0] in text.eos:
                    dropped += 1                         # nothing to learn from, or nothing before the response
                    continue
                if row.judge is not None:
                    self.judges[len(ends) // 3] = row.judge
                for ids in (prompt, chosen, rejected or ()):
                    tokens.extend(ids)
                    ends.append(len(tokens))
        self.tokens, self.ends = np.array(tokens, np.int32), np.array(ends, np.int64).reshape(-1, 3)
        self.note = (f"{name}: {len(self):,} rows, {len(self.tokens):,} tokens; {cut_prompts} prompts cut on the left, "
                     f"{cut_responses} responses cut on the right, {dropped} rows dropped as nothing of the response was left"
                     + (f"; warning: {typed} rows have special tokens typed inside their text, and the model reads them as real" if typed else ""))
        if dropped > len(rows) / 2:
            raise BadInput(f"{self.note}; raise --max-length or lower --max-prompt-length")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1, 2] if i else 0
        prompt, chosen, rejected = (x.tolist() for x in np.split(self.tokens[start:self.ends[i, 2]], self.ends[i, :2] - start))
        return Example(prompt, chosen, rejected or None, int(i))

    def fingerprint(self):
        judges = json.dumps(self.judges, sort_keys=True).encode()
        return hashlib.sha256(self.tokens.tobytes() + self.ends.tobytes() + judges).hexdigest()[:16]


class Draw:
    """[1]: mini-batches of a Data without end, each epoch in a new order; of each batch a process gets its own part.

    Batch b of all processes together is places b * batch_size ... of the endless sequence of epochs, so the position is
    one number, and no row is left out or seen twice within an epoch, whatever the number of processes.
    """

    def __init__(self, data, batch_size, seed, world):
        self.data, self.batch_size, self.seed, self.world, self.batch = data, batch_size, seed, world, 0

    def __call__(self, n):
        """The next n rows of this process, whole batches."""
        mine = self.batch_size // self.world.size
        places = [(self.batch + b) * self.batch_size + self.world.rank * mine + i for b in range(n // mine) for i in range(mine)]
        self.batch += n // mine
        return [self.data[self._order(p // len(self.data))[p % len(self.data)]] for p in places]

    @functools.lru_cache(maxsize=2)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.data))


def find_model(name, world):
    """(folder, commit or None) of --model: a local folder, else a hub name[@revision], fetched by each node's first process."""
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    repo, _, revision = name.partition("@")
    patterns = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
                "*.jinja", "LICENSE*"]                   # not every *.safetensors: Mistral's come twice

    def fetch():
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
        except HFValidationError:
            raise BadInput(f"--model {name}: no such folder, and not a hub name either") from None
        except GatedRepoError:
            raise BadInput(f"--model {name}: the repository is gated; accept its terms on the hub, then run: hf auth login") from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise BadInput(f"--model {name}: no such folder, and the hub knows no such repository or revision") from None
        except Exception as error:                       # offline, timed out, proxy: the hub's client raises many kinds
            raise BadInput(f"--model {name}: no such folder, and the hub cannot be reached ({type(error).__name__}); "
                           "download the repository elsewhere and give its folder") from None

    world.together(lambda: world.local == 0 and fetch())
    folder = world.together(fetch)
    return folder, folder.name


def refuse_links(folder):
    """A model folder is read, and partly copied into the run's, so its files must be its own, or blobs of the hub's cache."""
    home = folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir() and not any(path.resolve().is_relative_to(p) for p in (home, home.parent.parent / "blobs")):
            raise BadInput(f"{path}: a link out of the model folder; put the file itself there")


# ------------------------------------------------------------------------------------------------ 3. processes

class World:
    """This process among all: rank, size, device. Without torchrun it is alone and every call returns at once."""

    def __init__(self, device="auto"):
        self.rank, self.size, self.local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.first, self.many, self.group = self.rank == 0, "RANK" in os.environ, None
        if self.many:            # before the flags are read, so that what one process refuses (a folder its node lacks), all refuse
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=30))
            self.group = dist.new_group(backend="gloo")  # for plain values: works the same beside NCCL
        if device:
            self.place(device)

    def place(self, device):
        """Take a device: cpu, cuda, mps, or auto."""
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(f"cuda:{self.local}" if kind == "cuda" else kind)
        if self.many and kind == "cuda":
            torch.cuda.set_device(self.device)

    def all(self, value):
        """Every process's value, as a list, on every process."""
        values = [value]
        if self.many:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values):
        """Sums of a list of numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.many:
            dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def mean(self, metrics):
        """Metrics with each float replaced by its mean over processes; each has as many pairs, so means of means are means."""
        keys = sorted(k for k, v in metrics.items() if isinstance(v, float))
        return metrics | {k: v / self.size for k, v in zip(keys, self.sum([metrics[k] for k in keys]))}

    def together(self, function):
        """function() on every process; what one refuses, all refuse, so that none waits for another for ever."""
        result = refusal = None
        try:
            result = function()
        except BadInput as error:
            refusal = str(error)
        for rank, sentence in enumerate(self.all(refusal)):
            if sentence:
                raise BadInput(sentence + (f" (process {rank} of {self.size}: every node must see what is read)" if rank else ""))
        return result

    def close(self):
        if self.many and dist.is_initialized():
            dist.destroy_process_group()


def divide(model, world, half):
    """FSDP2: each block's parameters are divided among the processes, float32 shards, bfloat16 compute if `half`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    how = dict(mesh=init_device_mesh(world.device.type, (world.size,)), mp_policy=MixedPrecisionPolicy(
        **(dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else {})))
    for block in model.model.layers:
        fully_shard(block, **how)
    # left to itself, the root stays whole after a forward pass until the backward pass, which a reference never has
    return fully_shard(model, reshard_after_forward=True, **how)


def whole(tensor):
    """A tensor that may be divided, in one piece (all processes together), on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def like(tensor, parameter):
    """A whole tensor divided and placed as `parameter` is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def fill(model, weights):
    """Copy (name, whole tensor) pairs into a model that may be divided."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        if name in parameters:
            parameters[name].copy_(like(tensor, parameters[name]))
    return model


# ------------------------------------------------------------------------------------------------ 4. schedule and optimizer

def learning_rate(step, steps, cfg, peak):
    """Linear warm-up to `peak`, then the decay. step counts from 0; the last step of linear is the last above 0."""
    warmup = round(steps * float(cfg.warmup[:-1]) / 100) if cfg.warmup.endswith("%") else int(cfg.warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
                   "inverse_sqrt": math.sqrt(max(1, warmup) / max(1, step)), "constant": 1.0}[cfg.lr_scheduler]


def make_optimizer(model, cfg):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=cfg.lr)
    return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def warm_up_step(policy, optimizer, examples, micro, cfg, autocast):
    """One step of supervised fine-tuning on chosen responses: the mean over rows of the mean NLL. Returns metrics."""
    optimizer.zero_grad(set_to_none=True)
    total, bad_rows = 0.0, []
    for i in range(0, len(examples), micro):
        part = examples[i:i + micro]
        batch = collate([Pair(e.prompt, e.chosen, []) for e in part], share=False, sides=1).to(next(policy.parameters()).device)
        alone = getattr(policy, "no_sync", contextlib.nullcontext) if i + micro < len(examples) else contextlib.nullcontext
        with alone():
            with autocast():
                nll = -token_scores(policy, batch).sum(-1) / batch.lengths[:, 0]       # (n,)
            (nll.sum() / len(examples)).backward()
        bad_rows += [e.row for e, x in zip(part, nll.tolist()) if not math.isfinite(x)]
        total += nll.detach().sum().item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm or torch.inf)
    norm = whole(norm)
    if norm.isfinite():
        optimizer.step()
    return {"loss": total / len(examples), "grad_norm": norm.item(), "bad_rows": bad_rows}


# ------------------------------------------------------------------------------------------------ 5. evaluation

@dataclasses.dataclass
class Held:
    """Held-out rows: pairs whose y- stays the same all run long, and the starting model's log-prob gaps on them."""
    data: Data
    pairs: list             # this process's: every size-th, so that shares differ by one at most
    gaps: list              # log p(y+) - log p(y-) of the starting model, in nats; empty until it was measured


def passes(answer, judge):
    """True if every word (or phrase) of judge["must"] stands in the answer and none of judge["must_not"]; case aside."""
    has = lambda phrase: re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", answer, re.IGNORECASE) is not None
    return all(map(has, judge.get("must", ()))) and not any(map(has, judge.get("must_not", ())))


@torch.no_grad()
def evaluate(model, held, writer, cfg, world, text, autocast, poll, full=True):
    """{metric: value} of one model on the held-out rows, over all processes. `writer(pairs, temperature, top_k, top_p)` answers.

    nll: per token of y+. accuracy: share of rows whose mean log-prob is higher for y+ than for y-; no reference.
    margin: log p(y+) - log p(y-), less the starting model's. judge: share of answers that pass, greedy, and with `full` also
    at the run's own sampling settings and at temperature 1.
    """
    model.eval()
    sums, gaps = np.zeros(5), []                         # nll, tokens, right, margins, rows
    for i in range(0, -(-len(held.data) // world.size), cfg.micro_batch):
        poll()
        part = held.pairs[i:i + cfg.micro_batch]
        if part:
            batch = collate(part).to(world.device)
            with autocast():
                chosen, rejected = score(model, batch)
            gap, lengths = chosen - rejected, batch.lengths
            right = (chosen / lengths[:, 0] > rejected / lengths[:, 1]).sum()
            start = held.gaps[i:i + cfg.micro_batch] or gap.tolist()
            gaps += gap.tolist()
            sums += [-chosen.sum().item(), lengths[:, 0].sum().item(), right.item(), math.fsum(gap.tolist()) - math.fsum(start), len(gap)]
    held.gaps = held.gaps or gaps
    nll, tokens, right, margins, rows = world.sum(sums.tolist())
    table = {"nll": nll / tokens, "accuracy": right / rows, "margin": margins / rows}
    judged = [p for p in held.pairs if p.row in held.data.judges]
    ways = {"greedy": (0, 0, 1.0), "sampled": (cfg.temperature, cfg.top_k, cfg.top_p), "temperature 1": (1.0, 0, 1.0)}
    for way, settings in ways.items() if held.data.judges else ():
        if way == "greedy" or full:
            answers = writer(model, judged, *settings)
            good = sum(passes(text.decode(a, True), held.data.judges[p.row]) for p, a in zip(judged, answers))
            table[f"judge, {way}"] = world.sum([good])[0] / len(held.data.judges)
    model.train()
    return table


def print_table(table):
    """{model: {metric: value}} as aligned text."""
    columns = list(next(iter(table.values())))
    print("\nheld out  " + "  ".join(c.rjust(max(8, len(c))) for c in columns))
    for name, row in table.items():
        print(f"{name:<8}  " + "  ".join(f"{row[c]:.3f}".rjust(max(8, len(c))) for c in columns))
    print()


# ------------------------------------------------------------------------------------------------ 6. log and plots

class Log:
    """metrics.jsonl, pairs.jsonl and the screen; only rank 0 writes. `sizes` and `cut` make a resumed log seamless."""

    def __init__(self, folder, first):
        self.first, paths = first, {name: folder / f"{name}.jsonl" for name in ("metrics", "pairs") if first}
        self.new = {name for name, path in paths.items() if not path.exists()}
        self.files = {name: open(path, "a", encoding="utf-8") for name, path in paths.items()}

    def write(self, name, row):
        if self.first:
            rounded = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in row.items()}
            self.files[name].write(json.dumps(rounded, ensure_ascii=False) + "\n")
            self.files[name].flush()

    def say(self, line):
        if self.first:
            tqdm.write(line)

    def sizes(self):
        """{name: (bytes, checksum)} of what was written so far, which the disk holds from now on."""
        for f in self.files.values():
            os.fsync(f.fileno())
        return {name: (os.path.getsize(f.name), checksum(f.name)) for name, f in self.files.items()}

    def cut(self, sizes):
        """Take back what was written after a checkpoint: no line twice, none missing. A log that was deleted begins anew."""
        for name in [name for name in self.files if name in self.new and sizes[name][0]]:
            self.say(f"warning: {self.files[name].name} is gone; its lines from before are lost, and the run goes on without them")
            sizes = sizes | {name: (0, None)}
        for name, f in self.files.items():
            size, known = sizes[name]
            if size and checksum(f.name, size) != known:
                raise BadInput(f"{f.name} does not begin as it did when the checkpoint was written; put it back, or delete it to go on without those lines")
        for name, f in self.files.items():
            f.truncate(sizes[name][0])


def pair_text(pair, text):
    """A triple as text, in its parts, and in ids. Each part is what it adds to the text before it: Llama's tokenizers strip a first space."""
    def part(ids, start=0, stop=None):
        return text.decode(ids[:stop])[len(text.decode(ids[:start])):]

    return {"step": pair.step, "row": pair.row, "prompt": part(pair.prompt), "A": part(pair.chosen, 0, pair.start),
            "B": part(pair.chosen, pair.start, pair.stop), "B'": part(pair.rejected, pair.start, pair.rejected_stop),
            "C": part(pair.chosen, pair.stop), "C kept": pair.rejected_stop < len(pair.rejected) or pair.stop == len(pair.chosen),
            "ids": [pair.prompt, pair.chosen, pair.rejected], "cuts": [pair.start, pair.stop, pair.rejected_stop]}


def one_line(s, width):
    s = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(s.split()))       # what a file says must not steer the screen
    return s if len(s) <= width else s[:width // 2 - 1] + " … " + s[-(width // 2 - 2):]


def show_pair(parts):
    A, B, new, C = (one_line(parts[k], width) for k, width in (("A", 40), ("B", 60), ("B'", 60), ("C", 40)))
    return f"    y+  {A} [{B}] {C}\n    y-  {A} [{new}] {C if parts['C kept'] else ''}"


PANELS = {      # title: keys of metrics.jsonl
    "loss": ["loss"], "reward margin (nats)": ["rewards/margins"], "log-probs of the drawn pairs (nats)": ["logps/chosen", "logps/rejected"],
    "share of drawn pairs with y+ ahead": ["rewards/accuracies"], "judge: y+ and y- that pass": ["pairs/chosen_judge", "pairs/rejected_judge"],
    "where y- loses (nats)": ["pairs/segment_gap", "pairs/seam_gap"], "age of a drawn pair (steps)": ["buffer/age"],
    "held out": ["eval/policy/accuracy", "eval/policy/judge, greedy", "eval/ema/judge, greedy"],
}


def draw_curves(folder):
    """curves.png from metrics.jsonl: what went on, at a glance. Says so where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no curves.png: matplotlib is not installed")
    with open(folder / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    panels = {title: {k: [(r["step"], r[k]) for r in lines if k in r and "step" in r] for k in keys} for title, keys in PANELS.items()}
    panels = {title: {k: np.array(v, float).T for k, v in curves.items() if v} for title, curves in panels.items() if any(curves.values())}
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for key, (x, y) in curves.items():
            label = key.rpartition("/")[2] if not key.startswith("eval/") else key.removeprefix("eval/").replace("/", ": ")
            if len(y) > 20:                              # the line is a running mean, the points are faint
                n = max(3, len(y) // 20)
                points = axis.plot(x, y, ".", markersize=2, alpha=0.35)[0]
                smooth = np.convolve(np.pad(y, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
                axis.plot(x, smooth, color=points.get_color(), label=label)
            else:
                axis.plot(x, y, "o-", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    figure.savefig(folder / ".curves.png", dpi=100, format="png")
    (folder / ".curves.png").replace(folder / "curves.png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ 7. checkpoint and resume

def to_disk(value, path):
    """Write nested dicts and lists of tensors, arrays and plain values as path.json and path.safetensors. No pickle."""
    tensors = {}

    def walk(v, name):
        if isinstance(v, (torch.Tensor, np.ndarray)):
            tensors[name] = torch.from_numpy(v) if isinstance(v, np.ndarray) else v.detach().cpu().contiguous()
            return {"#array" if isinstance(v, np.ndarray) else "#tensor": name}
        if isinstance(v, dict):
            return {k: walk(x, f"{name}.{k}") for k, x in v.items()}
        return [walk(x, f"{name}.{i}") for i, x in enumerate(v)] if isinstance(v, (list, tuple)) else v

    plain = walk(value, path.name)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(plain), "utf-8")


def from_disk(path):
    """What `to_disk` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def walk(v):
        if isinstance(v, dict):
            if "#tensor" in v:
                return tensors[v["#tensor"]]
            return tensors[v["#array"]].numpy() if "#array" in v else {k: walk(x) for k, x in v.items()}
        return [walk(x) for x in v] if isinstance(v, list) else v

    return walk(json.loads(path.with_suffix(".json").read_text("utf-8")))


def write_checkpoint(folder, parts, keep, world):
    """folder (checkpoint/step-N) from (name, value) parts and a manifest: written beside, flushed to disk, then renamed.

    All processes walk through `parts`, as divided tensors are gathered on the way; rank 0 writes.
    """
    with new_folder(folder) if world.first else contextlib.nullcontext() as temporary:
        for name, value in parts:
            if world.first:
                to_disk(value, temporary / name)
        if world.first:
            write_json(temporary / "manifest.json", {p.name: [p.stat().st_size, checksum(p)] for p in sorted(temporary.iterdir())})
    if world.first:
        flush(folder.parent.parent)
        for old in sorted(p for p in folder.parent.glob("step-*") if p.name <= folder.name)[:-keep]:         # a later one is torn, and does not count
            shutil.rmtree(old, ignore_errors=True)
    world.all(None)


def checksum(path, size=None):
    """SHA-256 of a file, or of its first `size` bytes."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read(size)).hexdigest() if size else hashlib.file_digest(f, "sha256").hexdigest()


def newest_checkpoint(out):
    """The newest sound checkpoint folder of a run, or None if there is none at all; a torn one is named and passed over."""
    folders = sorted((out / "checkpoint").glob("step-*"), reverse=True)
    for folder in folders:
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            for name in {*manifest, "shared.json", "shared.safetensors", "rank-0.json", "rank-0.safetensors"}:
                if [(folder / name).stat().st_size, checksum(folder / name)] != manifest.get(name):
                    raise ValueError(f"{name} is not what was written")
            return folder
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(f"warning: passing over {folder}: {error}", file=sys.stderr)
    if folders:
        raise BadInput(f"{out / 'checkpoint'}: none of the checkpoints is whole; put one back, or delete this folder to begin again")


def lock(out):
    """Take a run folder for this process, until the file that this returns is closed; refused while another process has it."""
    with contextlib.suppress(ImportError):               # not on Windows
        import fcntl
        file = open(out / "config.json", "rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BadInput(f"{out}: another process is writing this run; wait for it, or stop it first") from None
        except OSError:                                  # a file system without locks
            pass
        return file


def clear_up(out):
    """Delete what a killed process was about to write in a run folder."""
    for path in [path for pattern in ("*.tmp", ".*.old", "checkpoint/*.tmp", "checkpoint/.*.old") for path in out.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def deal(parts, batch_size, world):
    """One process's part of a run saved by len(parts) processes, dealt out again if that was another number.

    Buffer: all pairs, oldest first, one to each process in turn. Written ahead: batch by batch, likewise. Held out: by
    row. No pair is lost or doubled. Generators are new then; with as many processes as before they go on bit for bit.
    """
    if len(parts) == world.size:
        return parts[world.rank]
    mine, own = slice(world.rank, None, world.size), {}
    buffers = [unpack(p["buffer"]["pairs"]) for p in parts]
    pairs = sorted((pair for b in buffers for pair in b), key=lambda pair: pair.step)[mine]
    own["buffer"] = {"capacity": sum(p["buffer"]["capacity"] for p in parts) // world.size, "pairs": pack(pairs), "rng": None}
    written, each = [unpack(p["written"]) for p in parts], batch_size // len(parts)
    batches = range(0, len(written[0]), each)
    own["written"] = pack([pair for i in batches for pair in [pair for w in written for pair in w[i:i + each]][mine]])
    gaps = [p["gaps"] or [None] * len(unpack(p["held"])) for p in parts]
    held = sorted(((q, gap) for p, g in zip(parts, gaps) for q, gap in zip(unpack(p["held"]), g)), key=lambda x: x[0].row)[mine]
    own |= {"held": pack([q for q, _ in held]), "gaps": [gap for _, gap in held if gap is not None], "cuts": None, "sampler": None}
    return own


# ------------------------------------------------------------------------------------------------ 8. the loop

class Run:
    """One training run in one process: everything prepared and checked once, then `train`."""

    def __init__(self, cfg, preset, resume, world):
        self.cfg, self.preset, self.resume, self.world, self.out = cfg, preset, resume, world, Path(cfg.out)
        self.began, self.asked, self.bad, self.sft_step, self.state = time.monotonic(), None, 0, 0, None
        self.table, self.before, self.after, self.evaluated, self.spent, self.saved = {}, [], {}, None, {}, None
        self.again, self.lock = f"python train.py --resume {self.out}", None
        for name in ("batch_size", "sft_batch_size"):
            if getattr(cfg, name) % world.size:
                raise BadInput(f"{flag_of(name)} {getattr(cfg, name)} cannot be shared evenly by {world.size} processes")
        half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and world.device.type == "cuda"
        self.autocast = functools.partial(torch.autocast, world.device.type, torch.bfloat16) if half else contextlib.nullcontext
        self.half = torch.bfloat16 if half else torch.float32
        self.source = resume / "source" if resume else None
        if not resume or cfg.lora:                       # a whole model's checkpoint holds all weights, an adapter's only its own
            self.base, self.commit = find_model(cfg.model, world)
            self.source = self.source or self.base
        world.together(self.prepare)
        seen = world.all([self.fingerprint(), dataclasses.asdict(cfg)])
        if any(other != seen[0] for other in seen):      # they would take unequal numbers of steps, and wait for each other
            raise BadInput("not all processes have the same settings and data; start every node with the same command and the same files")

    # -- before the first weight is loaded: what can be refused is refused here

    def prepare(self):
        cfg, world = self.cfg, self.world
        rows = {name: read_rows(getattr(cfg, name)) for name in ("data", "sft_data", "eval_data") if getattr(cfg, name)}
        self.config = ModelConfig.from_dict(read_json(self.source / "config.json", "model folder"))
        refuse_links(self.source)
        self.files = companions(self.source)
        if self.resume:
            name = read_json(self.resume / "config.json").get("dtype")
            if name not in ("float32", "bfloat16", "float16"):
                raise BadInput(f"{self.resume / 'config.json'}: dtype is {name!r}; put the file back as the run wrote it")
            self.dtype = getattr(torch, name)
        elif cfg.from_scratch:
            self.dtype = torch.float32
        else:
            check_weights(self.base, self.config)
            self.dtype = saved_dtype(self.base)
        context = self.config.max_position_embeddings
        cfg.max_length = cfg.max_length or min(2048, context)
        if cfg.max_length > context:
            raise BadInput(f"--max-length {cfg.max_length} is more than the model's context of {context}")
        cfg.max_prompt_length = cfg.max_prompt_length or cfg.max_length * 7 // 8
        if cfg.max_prompt_length >= cfg.max_length:
            raise BadInput(f"--max-prompt-length {cfg.max_prompt_length} leaves no room for a response within {cfg.max_length} tokens")
        self.text = Text(self.files, self.source, self.config, cfg.chat_template)

        train_rows, held_rows = rows["data"], rows.get("eval_data")
        if held_rows is None:                            # hold some back: every k-th row, so that both look alike
            held = min(100, max(1, len(train_rows) // 20))
            back = set(range(0, len(train_rows), len(train_rows) // held)[:held])
            held_rows, train_rows = [[r for i, r in enumerate(train_rows) if (i in back) == side] for side in (True, False)]
            if not train_rows:
                raise BadInput(f"{cfg.data}: one row is not enough, as some are held out; give --eval-data")
        if cfg.rejected == "data" and (without := sum(r.rejected is None for r in train_rows)):
            raise BadInput(f"{cfg.data}: --rejected data, but {without} rows have no rejected")
        make = lambda rows, name: Data(rows, self.text, cfg, name, world.first)
        self.data, self.held_data = make(train_rows, "train"), make(held_rows[:cfg.eval_rows], "held out")
        self.sft_data = make(rows["sft_data"], "warm-up") if "sft_data" in rows else self.data
        if not min(map(len, (self.data, self.held_data, self.sft_data))):
            raise BadInput(f"{self.data.note}; {self.held_data.note}; nothing is left to use")
        self.steps = cfg.steps if cfg.steps is not None else max(1, math.ceil(cfg.epochs * len(self.data) / cfg.batch_size))
        self.local = dataclasses.replace(cfg, batch_size=cfg.batch_size // world.size, buffer_size=cfg.buffer_size // world.size)
        if not self.resume:
            self.claim()

    def claim(self):
        """Refuse to write over anything, and to begin what the disk cannot hold."""
        out = self.out
        try:
            with contextlib.suppress(FileNotFoundError):
                out.with_name(f".{out.name}.tmp").lstat()                # where `record` begins to write
            parent = next(p for p in out.resolve().parents if p.exists())
        except (OSError, ValueError) as error:           # too long, with a NUL, below a file, no name at all
            raise BadInput(f"--out {out}: no folder can be made there ({getattr(error, 'strerror', None) or error}); choose another name") from None
        if self.world.first and (out.is_symlink() or out.exists()) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
            if out.is_symlink() or not out.is_dir() or not {"config.json", "source"} <= {p.name for p in out.iterdir()}:
                raise BadInput(f"--out {out} exists and is not a run folder; it is not replaced even with --overwrite; choose another name")
            if not self.cfg.overwrite:
                raise BadInput(f"--out {out} exists; choose another name, go on with --resume {out}, or replace it with --overwrite")
            if held := lock(out):
                held.close()
            for name in ("model", "data", "eval_data", "sft_data", "chat_template"):
                path = getattr(self.cfg, name)
                if path and Path(path).resolve().is_relative_to(out.resolve()):
                    raise BadInput(f"--out {out} would be replaced, and with it {flag_of(name)} {path}; choose another name")
        with torch.device("meta"):
            size = sum(p.numel() for p in Transformer(self.config).parameters())
        copies = (2 + 2 * (self.cfg.optimizer == "adamw") + (self.cfg.loss == "dpo")) * 4 * (self.cfg.keep + 1)
        need, free = 2 * self.dtype.itemsize * size + (0 if self.cfg.lora else copies * size), shutil.disk_usage(parent).free
        if self.world.first and need > free:
            raise BadInput(f"--out {out}: the checkpoints and models of this run take up to {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                           "free some, lower --keep, or choose another place")

    def take(self):
        """Make the run folder, or clear up an old one, and hold it."""
        if not self.resume:
            self.record()
        self.lock = lock(self.out)
        clear_up(self.out)

    def record(self):
        """The run folder with config.json (every setting, resolved, and what it was run with) and source/, whole or not there."""
        import importlib.metadata as metadata
        libraries = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm")
        with new_folder(self.out) as temporary:
            (temporary / "source").mkdir()
            for name, content in self.files.items():
                (temporary / "source" / name).write_bytes(content)
            write_json(temporary / "source" / "config.json", self.config.to_dict(self.dtype))
            write_json(temporary / "config.json", {
                "settings": dataclasses.asdict(self.cfg), "preset": self.preset, "steps": self.steps, "world_size": self.world.size,
                "model_commit": self.commit, "dtype": str(self.dtype).removeprefix("torch."), "eos_token_ids": list(self.text.eos),
                "data": [d.note for d in (self.data, self.held_data, self.sft_data)],
                "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in libraries}}})

    # -- models

    def starting_model(self):
        cfg, device = self.cfg, self.world.device
        if cfg.shard:
            model = divide(blank(self.config), self.world, self.half is torch.bfloat16)
            if cfg.from_scratch and not self.resume:
                fill(model, Transformer(self.config).init_weights(torch.Generator().manual_seed(cfg.seed)).named_parameters())
            return model if self.resume or cfg.from_scratch else fill(model, read_weights(self.base))
        if cfg.lora:
            base = load_pretrained(self.base, self.half, device)
            return add_lora(base, cfg.lora, cfg.lora_alpha, torch.Generator().manual_seed(cfg.seed), cfg.lora_projections.split(","))
        if self.resume:
            return blank(self.config).to(device)
        if cfg.from_scratch:
            return Transformer(self.config).init_weights(torch.Generator().manual_seed(cfg.seed)).to(device)
        return load_pretrained(self.base, device=device)

    def twin(self):
        """A copy of the policy that does not train, divided if the policy is."""
        if not self.cfg.shard:
            return twin(self.model)
        model = divide(blank(self.config), self.world, self.half is torch.bfloat16).requires_grad_(False)
        copy_parameters(model, self.model)
        return model

    def wrapped(self):
        """The policy as it is trained: under torchrun wrapped by DDP, unless it is divided."""
        if not self.world.many or self.cfg.shard:
            return self.model
        return torch.nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True,      # there are no buffers to broadcast
                                                         device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None)

    def plain(self, model):
        """`model` itself, or where it is divided a whole copy of it in the writer's place, until `refresh_writer`."""
        if self.cfg.shard:
            fill(self.state.writer, plain_weights(model))
            self.written_by, model = None, self.state.writer
        return model

    def refresh_writer(self):
        """The writer is the EMA itself, or a whole copy in the writer's dtype that follows whenever the EMA has moved."""
        state = self.state
        if state.writer is not state.ema and self.written_by != state.ema_version:
            fill(state.writer, plain_weights(state.ema))
        self.written_by = state.ema_version

    def begin_warm_up(self):
        self.policy = self.wrapped()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.cfg.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.draw = Draw(self.sft_data, self.cfg.sft_batch_size, self.cfg.seed, self.world)

    def begin_sapo(self):
        cfg, rank, seed = self.local, self.world.rank, self.cfg.seed
        ema, reference = self.twin(), self.twin() if cfg.loss == "dpo" else None
        separate = cfg.shard or self.half is torch.bfloat16 and not cfg.lora
        writer = blank(self.config, self.half).to(self.world.device).requires_grad_(False) if separate else ema
        self.policy, self.optimizer = self.wrapped(), make_optimizer(self.model, cfg)
        self.draw = Draw(self.data, self.cfg.batch_size, seed, self.world)
        self.state = State(self.policy, ema, writer, reference, self.optimizer, ReplayBuffer(cfg.buffer_size, seed + rank, cfg.replay),
                           np.random.default_rng(seed + rank), torch.Generator().manual_seed(seed + rank), self.text.eos, self.text.vocab,
                           max(1, round(len(self.data) / self.cfg.batch_size)), keep_ref=not cfg.shard)   # divided, all must make the same calls
        self.written_by = None

    # -- state in and out

    def trained(self, model):
        """(name, parameter) of what a checkpoint must hold: all, or the adapters alone."""
        return [(k, p) for k, p in model.named_parameters() if not self.cfg.lora or "lora_" in k]

    def parts(self):
        """(name, value) of a checkpoint's files, one model at a time in memory."""
        state, names = self.state, [k for k, p in self.model.named_parameters() if p.requires_grad]
        yield "policy", {k: whole(p) for k, p in self.trained(self.model)}
        moments = self.optimizer.state_dict()["state"]
        yield "optimizer", {names[i]: {k: whole(v) for k, v in m.items()} for i, m in moments.items()}
        for name in ("ema", "reference") if state else ():
            model = getattr(state, name)
            yield name, {k: whole(p) for k, p in self.trained(model)} if model is not None else {}
        yield "shared", {"sft_step": self.sft_step, "draw": self.draw.batch, "bad": self.bad, "sizes": self.log.sizes(), "stands_on": self.stands_on,
                         "table": self.table, "before": self.before, "evaluated": self.evaluated, "world_size": self.world.size, "sapo": bool(state),
                         **({k: getattr(state, k) for k in ("step", "ema_version", "ref_version")} if state else {})}
        own = {"buffer": state.buffer.state_dict(), "written": pack(state.written), "cuts": state.cuts.bit_generator.state,
               "sampler": state.sampler.get_state(), "held": pack(self.held.pairs), "gaps": self.held.gaps} if state else {}
        for rank, part in enumerate(self.world.all(own)):
            yield f"rank-{rank}", part

    def fingerprint(self):
        return {"data": self.data.fingerprint(), "eval_data": self.held_data.fingerprint(), "sft_data": self.sft_data.fingerprint()}

    def foundations(self):
        """{name: checksum} of what a run stands on and never writes. Were one of these another on resume, so were the run."""
        names = ["config.json", *sorted(f"source/{p.name}" for p in (self.out / "source").iterdir())] if self.world.first else []
        base = sorted(self.base.glob("*.safetensors")) if self.cfg.lora else []        # a checkpoint of adapters does not hold it
        return self.world.all({name: checksum(self.out / name) for name in names})[0] | self.fingerprint() | ({
            "model": [[path.name, path.stat().st_size, checksum(path, 2**24)] for path in base]} if base else {})

    def save(self):
        began = time.monotonic()
        folder = self.out / "checkpoint" / f"step-{self.sft_step + (self.state.step if self.state else 0):08d}"
        if folder != self.saved:                         # a whole checkpoint is never replaced: for a moment there would be none
            write_checkpoint(folder, self.parts(), self.cfg.keep, self.world)
            self.saved = folder
        self.spend("save", began)

    def load(self, folder):
        """Go on from a checkpoint: everything `parts` wrote."""
        shared = from_disk(folder / "shared")
        saved = shared["stands_on"]
        for name in self.stands_on | saved:
            if saved.get(name) != self.stands_on.get(name):
                where = getattr(self.cfg, name, None) or self.out / name
                raise BadInput(f"{where}: not what it was when the checkpoint was written; put the same files back")
        if self.steps < shared.get("step", 0):
            raise BadInput(f"--steps {self.steps}: this run has done {shared['step']} already")
        self.saved = folder
        weights = from_disk(folder / "policy")
        if weights.keys() != dict(self.trained(self.model)).keys():
            raise BadInput(f"{folder}: holds other weights than {self.out / 'source' / 'config.json'} asks for")
        fill(self.model, weights.items())
        self.sft_step, self.bad, self.table, self.before, self.evaluated = (shared[k] for k in ("sft_step", "bad", "table", "before", "evaluated"))
        if not shared["sapo"]:
            self.begin_warm_up()
        else:
            self.begin_sapo()
            state, world = self.state, self.world
            for name in ("ema", "reference"):
                if getattr(state, name) is not None:
                    fill(getattr(state, name), from_disk(folder / name).items())
            for k in ("step", "ema_version", "ref_version"):
                setattr(state, k, shared[k])
            own = deal([from_disk(folder / f"rank-{i}") for i in range(shared["world_size"])], self.cfg.batch_size, world)
            if own["cuts"] is None:                      # another number of processes: new generators
                seed = [self.cfg.seed, state.step, world.rank]
                own["cuts"] = own["buffer"]["rng"] = np.random.default_rng(seed).bit_generator.state
                own["sampler"] = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62))).get_state()
            state.buffer.load_state_dict(own["buffer"])
            state.written.extend(unpack(own["written"]))
            state.cuts.bit_generator.state = own["cuts"]
            state.sampler.set_state(own["sampler"])
            self.held = Held(self.held_data, unpack(own["held"]), own["gaps"])
        self.draw.batch = shared["draw"]
        named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        moments, saved = self.optimizer.state_dict(), from_disk(folder / "optimizer")
        moments["state"] = {i: {k: like(v, p) if v.dim() else v for k, v in saved[name].items()} for i, (name, p) in enumerate(named.items()) if name in saved}
        self.optimizer.load_state_dict(moments)
        self.world.together(lambda: self.log.cut(shared["sizes"]))
        self.log.say(f"resuming from {folder}: {self.sft_step} warm-up steps, {self.state.step if self.state else 0} SAPO steps done")

    # -- asked to stop, and time

    def poll(self):
        """True on all processes once one of them has got a signal or time is up. Called equally often by all."""
        late = self.cfg.max_minutes and time.monotonic() - self.began > 60 * self.cfg.max_minutes
        return self.world.sum([bool(self.asked or late)])[0] > 0

    def poll_or_stop(self):
        if self.poll():
            self.save()
            raise Stopped(f"stopped and saved; go on with: {self.again}")

    def spend(self, stage, began):
        self.spent[stage] = self.spent.get(stage, 0.0) + time.monotonic() - began

    # -- stages

    def stage(self, name, done, steps, peak, step, after):
        """Steps `done` ... `steps` of the warm-up or of SAPO: learning rate, one step, a line in metrics.jsonl, then `after`."""
        show = self.world.first and sys.stderr.isatty()
        with tqdm(total=steps, initial=done, desc=name, disable=not show, unit="step", leave=False) as bar:
            for number in range(done + 1, steps + 1):
                lr = learning_rate(number - 1, steps, self.cfg, peak)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                metrics = self.world.mean(step())
                bad_rows = metrics.pop("bad_rows")
                line = after(number, metrics | {"learning_rate": lr})
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                if math.isfinite(metrics["grad_norm"]):  # the same on all processes
                    self.bad = 0
                else:
                    self.bad += 1
                    rows = sorted({row for part in self.world.all(bad_rows) for row in part})
                    self.log.say(f"{name} step {number}: the gradient is not finite and changed nothing; loss not finite for data rows {rows[:16]}")
                    if self.bad >= self.cfg.max_bad_steps:
                        raise Diverged(f"{self.bad} steps in a row had a gradient that is not finite; what {self.out} holds is from before; "
                                       "look at the rows named above, or lower --lr")
                stop = self.poll()
                if (stop or number == steps or self.cfg.save_every and number % self.cfg.save_every == 0) and not self.bad:
                    self.save()
                if stop:
                    how = "and saved; go on" if not self.bad else "whose gradient was not finite; go on from the checkpoint before"
                    raise Stopped(f"stopped after {name} step {number}{', ' if self.bad else ' '}{how} with: {self.again}")

    def warm_up(self):
        cfg, log = self.cfg, self.log
        rows, micro = cfg.sft_batch_size // self.world.size, cfg.micro_batch

        def step():
            began = time.monotonic()
            metrics = warm_up_step(self.policy, self.optimizer, self.draw(rows), micro, cfg, self.autocast)
            self.spend("warm-up", began)
            return metrics

        def after(number, metrics):
            self.sft_step = number
            log.write("metrics", {"sft_step": number, **metrics})
            if number % (10 * cfg.show_every) == 0:
                log.say(f"warm-up step {number}/{cfg.sft_steps}  loss {metrics['loss']:.3f}")
            return f"loss {metrics['loss']:.3f}"

        self.stage("warm-up", self.sft_step, cfg.sft_steps, cfg.sft_lr, step, after)

    def sapo(self):
        cfg, state, log, judges = self.local, self.state, self.log, self.data.judges

        def step():
            self.refresh_writer()
            metrics = sapo_step(state, self.draw, cfg, self.autocast)
            for stage, seconds in state.times.items():
                self.spent[stage] = self.spent.get(stage, 0.0) + seconds
            for k in metrics.keys() & {"buffer/size", "gen/tokens_per_second"}:      # of all processes together
                metrics[k] *= float(self.world.size)
            if len(judges) == len(self.data):            # is y- really worse? the fresh pairs stand last in the buffer
                fresh = [state.buffer.pairs[-i] for i in range(1, cfg.batch_size + 1)]
                for side in ("chosen", "rejected"):
                    good = [passes(self.text.decode(getattr(p, side), True), judges[p.row]) for p in fresh]
                    metrics[f"pairs/{side}_judge"] = float(np.mean(good))
            return metrics

        def after(number, metrics):
            log.write("metrics", {"step": number, "epoch": number * self.cfg.batch_size / len(self.data), **metrics})
            line = f"loss {metrics['loss']:.3f}  margin {metrics['rewards/margins']:+.3f}  accuracy {metrics['rewards/accuracies']:.2f}"
            if number % cfg.show_every == 0 or number == 1:
                parts = pair_text(state.buffer.pairs[-1], self.text)
                log.write("pairs", parts)
                log.say(f"step {number}/{self.steps}  {line}  age {metrics['buffer/age']:.1f}\n{show_pair(parts)}")
            if metrics.get("ema/distance") == 0 and metrics["learning_rate"] > 0 and state.ema_version == 1:
                log.say("warning: no parameter moved; is the learning rate below what float32 can add?")
            if number < self.steps and cfg.eval_every and number % cfg.eval_every == 0:
                self.evaluate()
            return line

        self.stage("SAPO", state.step, self.steps, cfg.lr, step, after)

    def evaluate(self):
        """Policy and EMA (before the first step: the starting model, which both are) on the held-out rows, once a step."""
        state, began = self.state, time.monotonic()
        if self.evaluated == state.step:
            return
        full = state.step in (0, self.steps)
        models = {"start": self.model} if state.step == 0 else {"policy": self.model, "ema": state.ema}
        for name, model in models.items():
            model = self.plain(model)
            row = evaluate(model, self.held, self.answer, self.local, self.world, self.text, self.autocast, self.poll_or_stop, full)
            self.table[name] = row
            if full:
                texts = self.answer(model, self.shown())
                self.after[name] = [self.text.decode(ids, True) for ids in texts] if self.world.first else []
        if state.step == 0:
            self.before = self.after["start"]
        self.evaluated = state.step
        self.log.write("metrics", {"step": state.step, **{f"eval/{m}/{k}": v for m in models for k, v in self.table[m].items()}})
        self.spend("evaluate", began)

    def answer(self, model, pairs, temperature=0, top_k=0, top_p=1.0):
        """Each prompt's answer, in ids, with a generator of its own, so that evaluating changes nothing in the run."""
        generator, answers, state, cfg = torch.Generator().manual_seed(self.cfg.seed + self.world.rank), [], self.state, self.cfg
        for i in range(0, max(len(pairs), -(-len(self.held.data) // self.world.size)), cfg.write_rows):      # as often on every process
            self.poll_or_stop()
            part = pairs[i:i + cfg.write_rows]
            room = [max(1, min(cfg.eval_tokens, cfg.max_length - len(p.prompt))) for p in part]
            answers += generate(model, [p.prompt for p in part], room, state.eos, temperature, top_k, top_p, generator, state.vocab)
        return answers

    def shown(self):
        """The held-out rows answered for reading: the first, whatever the number of processes, which may change on resume."""
        return [self.held_data[i] for i in range(min(self.cfg.samples, len(self.held_data)))]

    def hold_out(self):
        """This process's share of held-out pairs: y- is the data's, or is rewritten once, now, by the starting model."""
        world, data, cfg = self.world, self.held_data, self.local
        examples, pairs = [data[i] for i in range(world.rank, len(data), world.size)], []
        scratch = dataclasses.replace(self.state, cuts=np.random.default_rng([cfg.seed, 1, world.rank]),
                                      sampler=torch.Generator().manual_seed(cfg.seed + world.rank), times={})
        for rejected in ("sapo", "data"):
            some = [e for e in examples if (e.rejected is None) == (rejected == "sapo")]
            for i in range(0, len(some), 64):
                pairs += make_pairs(scratch, some[i:i + 64], dataclasses.replace(cfg, rejected=rejected))
        return Held(data, sorted(pairs, key=lambda p: p.row), [])

    def train(self):
        cfg, world = self.cfg, self.world
        world.together(lambda: world.first and self.take())
        self.log = Log(self.out, world.first)
        for note in dict.fromkeys(d.note for d in (self.sft_data, self.data, self.held_data)):
            self.log.say(note)
        self.stands_on = self.foundations()
        checkpoint = world.all(world.together(lambda: newest_checkpoint(self.out) if self.resume and world.first else None))[0]
        if checkpoint:                                   # rank 0 writes, all read
            seen = checkpoint / "manifest.json"
            if len(set(world.all(seen.read_text("utf-8") if seen.is_file() else None))) > 1:
                raise BadInput(f"--resume {self.resume}: not all processes see {checkpoint}; on several nodes copy the run folder to each, or share it")
        if self.resume and not checkpoint:               # stopped before the first checkpoint: begin again
            self.resume = None
            if not cfg.lora and not hasattr(self, "base"):
                self.base, self.commit = find_model(cfg.model, world)
        self.model = self.starting_model()
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        sizes = [sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only) for only in (False, True)]
        self.log.say(f"{sizes[0]:,} parameters, {sizes[1]:,} of them trained, {world.size} process(es) on {world.device.type}, "
                     f"{cfg.sft_steps} warm-up steps, {self.steps} SAPO steps of {cfg.batch_size} pairs")
        if checkpoint:
            self.load(checkpoint)
        else:
            self.log.cut({"metrics": (0, None), "pairs": (0, None)})
            self.begin_warm_up()
        if self.state is None:
            self.warm_up()
            self.begin_sapo()
            self.refresh_writer()
            self.held = self.hold_out()
        if self.state.step == 0 or cfg.eval_every and self.state.step % cfg.eval_every == 0:     # perhaps stopped while evaluating
            self.evaluate()
        self.sapo()
        self.evaluate()
        self.finish()

    def finish(self):
        """The samples, both models as Hugging Face folders, the curves, and the table."""
        out, world = self.out, self.world
        base = self.cfg.model + (f" at {self.commit}" if getattr(self, "commit", None) else "")
        for name, model in (("model", self.model), ("ema", self.state.ema)) if self.steps else ():
            weights = {}
            for k, tensor in plain_weights(model):       # all processes gather, the first keeps
                if world.first:
                    weights[k] = tensor.to("cpu", self.dtype)
            if world.first:
                save_pretrained(model, out / name, self.dtype, self.files | {"README.md": self.card(name, base).encode()}, weights)
                if self.cfg.lora:
                    save_adapter(model, out / f"{name}_adapter", self.base)
        if world.first:
            prompts = [self.text.decode(e.prompt, True) for e in self.shown()]
            columns = {"prompt": prompts, "chosen": [self.text.decode(e.chosen, True) for e in self.shown()], "start": self.before, **self.after}
            lines = [json.dumps(dict(zip(columns, values)), ensure_ascii=False) + "\n" for values in zip(*columns.values())]
            (out / ".samples.tmp").write_text("".join(lines), "utf-8")
            (out / ".samples.tmp").replace(out / "samples.jsonl")
            write_json(out / "results.json", self.table)
            draw_curves(out)
            print_table(self.table)
            for i, prompt in enumerate(prompts[:1]):
                print(f"prompt  {one_line(prompt, 200)}\nbefore  {one_line(self.before[i], 400)}")
                if "policy" in self.after:
                    print(f"after   {one_line(self.after['policy'][i], 400)}")
            self.profile()
        world.all(None)

    def profile(self):
        """Where the time went, and the memory."""
        total = time.monotonic() - self.began
        shares = sorted((self.spent | {"other": total - sum(self.spent.values())}).items(), key=lambda x: -x[1])
        print(f"\n{total:.0f} s: " + ", ".join(f"{k} {v / total:.0%}" for k, v in shares if v / total >= 0.005))
        if self.world.device.type == "cuda":
            print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        else:
            with contextlib.suppress(ImportError):       # not on Windows
                import resource
                print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == 'darwin' else 1024) / 2**10:.2f} GB")
        print(f"everything is in {self.out}")

    def card(self, name, base):
        """README.md of a written model."""
        rows = [f"| {m} | " + " | ".join(f"{v:.4f}" for v in row.values()) + " |" for m, row in self.table.items()]
        heads = list(next(iter(self.table.values())))
        kept = {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(SAPOConfig)} | {k: getattr(self.cfg, k) for k in ("lr", "optimizer", "epochs", "seed", "lora")}
        settings = "\n".join(f"    {flag_of(k)} {v}" for k, v in kept.items())
        what = "the trained policy" if name == "model" else "the exponential moving average that wrote the rejected responses"
        return (f"# {what[0].upper() + what[1:]} of a SAPO run\n\nFine-tuned from `{base}` on `{self.cfg.data}` by Self-Augmented Preference Optimization "
                f"(arXiv 2405.20830), loss {self.cfg.loss}, {self.state.step} steps.\n\nOn {len(self.held_data)} held-out rows:\n\n| | {' | '.join(heads)} |\n"
                f"|{'---|' * (len(heads) + 1)}\n" + "\n".join(rows) + f"\n\nSettings:\n\n{settings}\n")


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class Diverged(Exception):
    """Too many steps in a row were not finite."""


def main(argv=None):
    """Run the command line `argv`; returns the exit code: 0 done or stopped, 1 the disk failed, 2 bad input, 3 diverged."""
    world = run = None
    say = lambda kind, text, here=int(os.environ.get("RANK", 0)) == 0: print(kind + one_line(str(text), 700), file=sys.stderr) if here else None
    shared = True                    # all processes end here, and for the same reason
    try:
        world = World(None)
        cfg, preset, resume = world.together(lambda: parse(sys.argv[1:] if argv is None else argv))
        world.place(cfg.device)
        cfg.out = world.all(cfg.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")[0]
        run = Run(cfg, preset, resume, world)
        if resume:                   # with what was changed
            run.again = "python train.py " + shlex.join(sys.argv[1:] if argv is None else argv)

        def ask(signum, frame):
            if run.asked == signal.SIGINT == signum:
                raise KeyboardInterrupt
            run.asked = signum
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, ask)
        run.train()
        return 0
    except BadInput as error:
        say("error: ", error)
        return 2
    except Stopped as stopped:
        say("", stopped)
        return 0
    except Diverged as error:
        say("error: ", error)
        return 3
    except (OSError, SafetensorError) as error:
        shared = False
        say("error: ", f"{error}; " + (f"what was saved before is whole: {run.again}" if run and run.out.exists() else "nothing was written"), True)
        return 1
    except KeyboardInterrupt:
        shared = False
        say("error: ", "stopped at once; the last checkpoint stands")
        return 130
    except Exception:
        shared = False
        raise
    finally:
        if run and run.lock:
            run.lock.close()
        if world and shared:         # NCCL's farewell waits for all; torchrun ends the others when one has left
            world.close()


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if "RANK" in os.environ:         # gloo's threads may still hold tensors, and the interpreter's end would abort on them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
