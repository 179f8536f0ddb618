"""The machine around Algorithm 1: flags, data, processes, schedule, evaluation, logs, checkpoints, and the loop.

    python train.py                                              the tiny world, from nothing, on a laptop
    python train.py --model DIR_OR_HUB_NAME --data FILE.jsonl    SAPO on a real checkpoint
    torchrun --nproc_per_node=8 train.py ...                     the same on many GPUs
    python train.py --resume runs/NAME                           go on where it stopped

Leaves out the method, which is sapo.py's. Read this file from the bottom, `train`, or in its order.
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
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from buffer import Pair, ReplayBuffer, pack, unpack
from model import (BadInput, ModelConfig, Transformer, check_weights, companions, generate, load_pretrained, read_json,
                   replace_folder, save_pretrained, saved_dtype, twin, write_json)
from sapo import (Example, SAPOConfig, State, collate, copy_parameters, fold, make_pairs, sapo_step, score, setting,
                  token_scores)

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ 1. flags

@dataclasses.dataclass
class Config(SAPOConfig):
    """Every setting of a run: the method's (SAPOConfig) and the machine's. Each is a flag."""
    model: str = setting("", "folder or hub name of the checkpoint to train")
    data: str = setting("", "rows to train on, JSON lines: prompt and chosen, or messages")
    eval_data: str = setting("", "held-out rows; without it, some of --data are held out")
    sft_data: str = setting("", "rows of the supervised warm-up; without it, --data")
    out: str = setting("", "run folder; runs/<preset>-<time> without it")
    overwrite: bool = setting(False, "replace the run folder if it exists")
    chat_template: str = setting("", "a Jinja file to use in place of the checkpoint's chat template")
    steps: int | None = setting(None, "optimizer steps; 0 only evaluates; without it, --epochs decides", low=0)
    epochs: float = setting(4.0, "passes over the data", "paper", low=1e-9)
    lr: float = setting(5e-7, "peak learning rate", "authors' code", low=0)
    lr_scheduler: str = setting("linear", "decay after the warm-up", "authors' code",
                                choices=("linear", "cosine", "inverse_sqrt", "constant"))
    warmup: str = setting("10%", "warm-up: steps, or a share of them", "authors' code")
    optimizer: str = setting("rmsprop", "float32 optimizer", "authors' code", choices=("adamw", "rmsprop"))
    weight_decay: float = setting(0.0, "decoupled weight decay (adamw)", low=0)
    sft_steps: int = setting(0, "supervised warm-up steps before SAPO", low=0)
    sft_lr: float = setting(2e-5, "peak learning rate of the warm-up", low=0)
    sft_batch_size: int = setting(64, "rows a warm-up step, over all processes", low=1)
    max_prompt_length: int = setting(1792, "tokens; a longer prompt loses its left end, BOS kept", "paper", low=1)
    max_length: int | None = setting(None, "tokens of prompt and response; a longer response loses its right end; "
                                           "without it min(2048, the model's context)", "paper", low=2)
    seed: int = setting(42, "of everything drawn", "authors' code", low=0)
    device: str = setting("auto", "cpu, cuda, mps, or auto: cuda where there is one")
    dtype: str = setting("auto", "of autocast and of the writer; weights stay float32; auto: bfloat16 on cuda", "authors' code",
                         choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = setting(False, "recompute each block in the backward pass: less memory, more time")
    save_every: int = setting(0, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = setting(2, "checkpoints kept", low=1)
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after", low=0)
    eval_rows: int = setting(200, "held-out rows used at most", low=1)
    eval_tokens: int = setting(128, "tokens of an answer at most, for judge and samples", low=1)
    samples: int = setting(4, "held-out prompts answered before and after, for reading", low=0)
    show_every: int = setting(10, "steps between lines on the screen and pairs in pairs.jsonl", low=1)
    max_minutes: float = setting(0.0, "save and stop after so long; 0: no limit", low=0)
    max_bad_steps: int = setting(5, "steps in a row whose gradient is not finite before the run stops with exit code 3", low=1)
    vocab_size: int = setting(1024, "of a decoder made from nothing (only without --model), and its tokenizer", low=300)
    hidden_size: int = setting(128, "of a decoder made from nothing", low=2)
    intermediate_size: int = setting(352, "of a decoder made from nothing", low=1)
    num_hidden_layers: int = setting(2, "of a decoder made from nothing", low=1)
    num_attention_heads: int = setting(4, "of a decoder made from nothing", low=1)
    num_key_value_heads: int = setting(2, "of a decoder made from nothing", low=1)


PRESETS = {
    "paper-dpo": {},
    "paper-orpo": dict(loss="orpo", lr=5e-6, lr_scheduler="inverse_sqrt", warmup="100", optimizer="adamw"),
    "tiny": dict(data=str(HERE / "data/tiny_train.jsonl"), eval_data=str(HERE / "data/tiny_test.jsonl"),
                 sft_data=str(HERE / "data/tiny_base.jsonl"), sft_steps=500, sft_lr=4e-3, sft_batch_size=16, steps=120,
                 batch_size=16, micro_batch=16, segment="12", buffer_size=256, lr=3e-5, optimizer="adamw",
                 max_prompt_length=48, max_length=160, eval_tokens=80, eval_every=30, save_every=60),
}
MAY_CHANGE = {"out", "overwrite", "steps", "epochs", "save_every", "keep", "eval_every", "eval_rows", "samples", "show_every", "max_minutes",
              "max_bad_steps", "device", "micro_batch", "write_ahead", "gradient_checkpointing"}   # on --resume


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (python train.py --help lists every flag)")


def parse(argv):
    """(Config, preset name, resume folder or None). A flag beats --config, which beats the preset."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from; tiny if neither --model nor --data is given, else paper-dpo")
    parser.add_argument("--config", help="config.json of an earlier run, to start from its settings")
    parser.add_argument("--resume", help="run folder to go on with")
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), {"int | None": int}.get(f.type if isinstance(f.type, str) else str(f.type), f.type)
        text = f"{f.metadata['help']} [{f.default if f.default not in ('', None) else 'none'}; {f.metadata['source']}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata.get("choices"), default=argparse.SUPPRESS, help=text)
    flags = vars(parser.parse_args(argv))
    preset, config, resume = (flags.pop(k) for k in ("preset", "config", "resume"))
    if resume:
        if preset or config:
            raise BadInput("--resume takes its settings from the run itself; leave out --preset and --config")
        saved = read_json(Path(resume) / "config.json", "run folder")
        settings = known_settings(saved, Path(resume) / "config.json")
        wrong = [k for k, v in flags.items() if k not in MAY_CHANGE and v != settings.get(k)]
        if wrong:
            raise BadInput(f"--{wrong[0].replace('_', '-')} contradicts the saved run ({settings.get(wrong[0])!r}); "
                           f"on --resume these may change: {', '.join('--' + k.replace('_', '-') for k in sorted(MAY_CHANGE))}")
        return checked(Config(**settings | flags | {"out": str(resume)})), saved.get("preset"), Path(resume)
    settings = {}
    if config:
        saved = read_json(config, "run")
        settings = {k: v for k, v in known_settings(saved, config).items() if k not in ("out", "overwrite")}
        preset = preset or saved.get("preset")
    preset = preset or ("paper-dpo" if flags.get("model") or flags.get("data") else "tiny")
    return checked(Config(**PRESETS.get(preset, {}) | settings | flags)), preset, None


def known_settings(saved, path):
    settings = saved.get("settings") if isinstance(saved, dict) else None
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if not isinstance(settings, dict) or set(settings) - set(fields):
        raise BadInput(f"{path}: not the config.json of a run of this program")
    return settings


def checked(cfg):
    """The Config, or BadInput: types, ranges and choices, whatever the loss, then what must fit together."""
    for f in dataclasses.fields(Config):
        value, flag, meta = getattr(cfg, f.name), "--" + f.name.replace("_", "-"), f.metadata
        if value is None and f.default is None:
            continue
        kind = {"int | None": int}.get(str(f.type), f.type)
        if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
            raise BadInput(f"{flag} is {value!r}; it must be a {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{flag} is {value}; it must be finite")
        if "choices" in meta and value not in meta["choices"]:
            raise BadInput(f"{flag} is {value!r}; choose from {', '.join(meta['choices'])}")
        if not meta.get("low", -math.inf) <= value if kind in (int, float) else False:
            raise BadInput(f"{flag} is {value}; it must be at least {meta['low']:g}")
        if kind in (int, float) and value > meta.get("high", math.inf):
            raise BadInput(f"{flag} is {value}; it must be at most {meta['high']:g}")
    whole = r"[1-9]\d{0,8}"
    for name, pattern, what in (("segment", rf"{whole}|(100|[1-9]\d?)(\.0+)?%|\d{{1,2}}\.\d+%", "a number of tokens, or a share from 1% to 100%"),
                                ("ema_every", rf"{whole}|epoch", "a number of steps, or epoch"),
                                ("ref_refresh", rf"{whole}|epoch|never", "a number of steps, epoch or never"),
                                ("warmup", rf"\d{{1,9}}|(100|\d{{1,2}})(\.\d+)?%", "a number of steps, or a share such as 10%")):
        if not re.fullmatch(pattern, getattr(cfg, name)):
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(cfg, name)!r}; it must be {what}")
    if cfg.max_length is not None and cfg.max_prompt_length >= cfg.max_length:
        raise BadInput(f"--max-prompt-length {cfg.max_prompt_length} leaves no room for a response within --max-length {cfg.max_length}")
    if not cfg.data:
        raise BadInput("--data is missing: a file of JSON lines with prompt and chosen, or messages")
    if cfg.device not in ("auto", "cpu", "cuda", "mps"):
        raise BadInput(f"--device is {cfg.device!r}; choose cpu, cuda, mps or auto")
    if cfg.device == "cuda" and not torch.cuda.is_available() or cfg.device == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {cfg.device}: torch sees none here; use --device cpu")
    return cfg


# ------------------------------------------------------------------------------------------------ 2. data and chat templates

MAX_LINE = 10_000_000       # characters of one data line
TEMPLATE_SECONDS = 5        # a template that takes longer for one conversation is stopped


class Row:
    """One data row, checked: turns before the answer (or a plain prompt), the answer, perhaps a worse one and a judge."""
    __slots__ = ("turns", "chosen", "rejected", "judge")

    def __init__(self, raw, where):
        def refuse(what):
            raise BadInput(f"{where}: {what}")

        if not isinstance(raw, dict):
            refuse("not a JSON object; each line must be one, such as {\"prompt\": ..., \"chosen\": ...}")
        for name, value in raw.items():
            if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                refuse(f"{name} holds half a surrogate pair, which is not text")
        conversation = raw.get("messages") if raw.get("chosen") is None else raw["chosen"]
        if isinstance(conversation, list):
            messages = [m if isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) else
                        refuse("each message needs a role and a content, both text") for m in conversation]
            if not messages or messages[-1]["role"] != "assistant":
                refuse("the last message must be the assistant's")
            if len(messages) < 2:
                refuse("a conversation needs a message before the assistant's answer")
            self.turns = [{"role": m["role"], "content": m["content"]} for m in messages[:-1]]
            self.chosen = messages[-1]["content"]
        else:
            for key in ("prompt", "chosen"):
                if not isinstance(raw.get(key), str):
                    refuse(f"{key} is missing or not text; a row needs prompt and chosen, or messages")
            self.turns, self.chosen = raw["prompt"], raw["chosen"]
        if not self.chosen.strip():
            refuse("the chosen response is empty")
        rejected = raw.get("rejected")
        if isinstance(rejected, list):
            rejected = rejected[-1].get("content") if rejected and isinstance(rejected[-1], dict) else 0
        if rejected is not None and not (isinstance(rejected, str) and rejected.strip()):
            refuse("rejected must be a text that is not empty, or be left out")
        self.rejected = rejected
        self.judge = raw.get("judge")
        if self.judge is not None and not (isinstance(self.judge, dict) and all(
                isinstance(words, list) and all(isinstance(w, str) for w in words) for words in self.judge.values())
                and set(self.judge) <= {"must", "must_not"}):
            refuse("judge must be {\"must\": [words], \"must_not\": [words]}")


def read_rows(path):
    """The Rows of a .jsonl, .jsonl.gz or .json file; BadInput with file and line for the first that is malformed."""
    path = Path(path)
    if path.suffix == ".parquet":
        raise BadInput(f"{path}: convert parquet first: python -c \"import pandas; pandas.read_parquet('{path.name}')"
                       f".to_json('{path.stem}.jsonl', orient='records', lines=True)\"")
    rows, number = [], 0
    try:
        if path.suffix == ".json":
            whole = read_json(path, "data set")
            if not isinstance(whole, list):
                raise BadInput(f"{path}: a .json data file must hold a list of rows; JSON lines go into .jsonl")
            return [Row(raw, f"{path}, row {i + 1}") for i, raw in enumerate(whole)]
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            while line := f.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > MAX_LINE:
                    raise BadInput(f"{where}: longer than {MAX_LINE:,} bytes; is this a file of JSON lines?")
                if line.strip():
                    try:
                        raw = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except UnicodeDecodeError:
                        raise BadInput(f"{where}: not UTF-8 text") from None
                    except (ValueError, RecursionError) as error:
                        raise BadInput(f"{where}: not JSON ({str(error)[:80]})") from None
                    rows.append(Row(raw, where))
    except (OSError, EOFError) as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error if isinstance(error, OSError) else error})") from None
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


class Text:
    """Tokenizer and chat template of a checkpoint, from its companion files {name: bytes}."""

    def __init__(self, files, folder, config, template_file=""):
        from tokenizers import Tokenizer
        load = lambda name: _json_or_none(files.get(name), f"{folder}/{name}")
        if "tokenizer.json" not in files:
            hint = "; convert tokenizer.model with transformers' AutoTokenizer(...).save_pretrained" if "tokenizer.model" in files else ""
            raise BadInput(f"{folder}: no tokenizer.json{hint}")
        try:
            self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        except Exception as error:                       # the library raises bare Exception
            raise BadInput(f"{folder}/tokenizer.json: not a tokenizer ({str(error)[:120]})") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        settings = load("tokenizer_config.json") or {}
        name = lambda key: (v := settings.get(key)) and (v.get("content") if isinstance(v, dict) else v)
        self.special = {key: name(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token") if isinstance(name(key), str)}
        self.vocab = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if self.vocab > config.vocab_size:
            raise BadInput(f"{folder}: the tokenizer has {self.vocab} tokens, the model only {config.vocab_size}; "
                           "resizing the vocabulary is not implemented, resize and save the model first")
        self.bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        self.added = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

        source = Path(template_file).read_text("utf-8") if template_file else files.get("chat_template.jinja", b"").decode("utf-8", "replace")
        if not source:
            source = settings.get("chat_template") or ""
            if isinstance(source, list):                 # [{name, template}, ...]: take the default one
                source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), "")
        self.template = compile_template(source) if source else None

        eos = []                                         # the end of an answer is a set of ids
        for name, where in (("generation_config.json", load("generation_config.json")), ("config.json", config.source)):
            found = (where or {}).get("eos_token_id")
            eos += found if isinstance(found, list) else [found]
        eos.append(self.tokenizer.token_to_id(self.special.get("eos_token", "")))
        self.end = eos[-1]
        if self.template:                                # and what the template writes after an answer is in it
            probe = self.tokenizer.encode(self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), add_special_tokens=False).ids
            opening = self.tokenizer.encode(self.render([{"role": "user", "content": "a"}], True), add_special_tokens=False).ids
            closing = [i for i in probe[_common(probe, opening):] if i in self.added]
            self.end = closing[-1] if closing else self.end
        self.eos = tuple(sorted({i for i in eos + [self.end] if type(i) is int and 0 <= i < self.vocab}))
        if not self.eos:
            raise BadInput(f"{folder}: no end token: neither generation_config.json, config.json nor the tokenizer names one")
        if self.end is None:
            self.end = self.eos[0]

    def render(self, messages, add_generation_prompt=False):
        """The chat text, exactly as transformers' apply_chat_template(tokenize=False) has it."""
        import jinja2
        try:
            with time_limit(TEMPLATE_SECONDS):
                return self.template.render(messages=messages, tools=None, documents=None,
                                            add_generation_prompt=add_generation_prompt, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError,
                MemoryError, ArithmeticError, TimeoutError, LookupError) as error:
            raise BadInput(f"the chat template refuses a conversation of roles {[m['role'] for m in messages][:6]}: "
                           f"{' '.join(str(error).split())[:160]}") from None

    def encode(self, rows, bar=None):
        """[(prompt ids, chosen ids, rejected ids or None)] of Rows, before truncation; responses end in one end token."""
        texts = []
        for row in rows:
            answers = [row.chosen] + ([row.rejected] if row.rejected else [])
            if isinstance(row.turns, str) and not self.template:
                texts.append((row.turns, [row.turns + a for a in answers], True))
            else:
                turns = [{"role": "user", "content": row.turns}] if isinstance(row.turns, str) else row.turns
                if not self.template:
                    raise BadInput("the data are conversations, but the checkpoint has no chat template; give one with --chat-template FILE")
                texts.append((self.render(turns, True), [self.render(turns + [{"role": "assistant", "content": a}]) for a in answers], False))
        plain = bool(texts) and texts[0][2]
        flat = [t for prompt, answers, _ in texts for t in (prompt, *answers)]
        ids = iter(e.ids for e in self.tokenizer.encode_batch(flat, add_special_tokens=not self.template))
        encoded = []
        for prompt, answers, plain in texts:
            opening, *wholes = [next(ids) for _ in range(1 + len(answers))]
            if plain and opening and opening[-1] in self.eos and len(opening) > 1:      # some tokenizers close every text
                opening = opening[:-1]
            if not opening and self.bos is not None:                                    # an empty text begins with BOS
                opening, wholes = [self.bos], [[self.bos] + w for w in wholes]
            cut = min(_common(opening, whole) for whole in wholes)
            encoded.append((opening[:cut], *[self._answer(whole[cut:]) for whole in wholes], *([None] if len(wholes) == 1 else [])))
        return encoded

    def _answer(self, ids):
        """What follows the end token is dropped; where there is none, one is added."""
        for place in range(len(ids) - 1, -1, -1):
            if ids[place] == self.end or ids[place] in self.eos:
                return ids[:place + 1]
        return ids + [self.end]

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)


def compile_template(source):
    """A chat template in jinja2's immutable sandbox, with transformers' settings, filters and globals; the date is frozen."""
    import jinja2
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
        with time_limit(TEMPLATE_SECONDS):
            return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, TimeoutError, ValueError, OverflowError, MemoryError, TypeError) as error:
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


def _common(a, b):
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _json_or_none(content, name):
    try:
        value = json.loads(content) if content else None
        return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        print(f"warning: {name} is not valid JSON and is ignored", file=sys.stderr)


class Data:
    """Rows as token ids in two integer arrays, truncated; data[i] is an Example. judges: {i: judge}."""

    def __init__(self, rows, text, cfg, name, show=False):
        from array import array
        tokens, ends, self.judges, self.prompts = array("i"), array("q"), {}, []
        cut_prompts = cut_responses = dropped = 0
        for start in tqdm(range(0, len(rows), 1000), desc=f"tokenising {name}", disable=not show or len(rows) < 5000, leave=False):
            for row, (prompt, *answers) in zip(rows[start:start + 1000], text.encode(rows[start:start + 1000])):
                if len(prompt) > cfg.max_prompt_length:
                    head = prompt[:1] if prompt[0] == text.bos else []
                    prompt = head + prompt[len(prompt) - cfg.max_prompt_length + len(head):]
                    cut_prompts += 1
                room = cfg.max_length - len(prompt)
                answers = [a and a[:room] for a in answers]
                cut_responses += len(answers[0]) == room and answers[0][-1] not in text.eos
                if not prompt or not answers[0] or answers[0][0] in text.eos or (answers[1] is not None and not answers[1]):
                    dropped += 1                         # nothing to learn from, or nothing before the response
                    continue
                if row.judge is not None:
                    self.judges[len(ends) // 3] = row.judge
                for ids in (prompt, *answers):
                    tokens.extend(ids or ())
                    ends.append(len(tokens))
        self.tokens = np.frombuffer(tokens, np.int32) if len(tokens) else np.zeros(0, np.int32)
        self.ends = np.frombuffer(ends, np.int64).reshape(-1, 3) if len(ends) else np.zeros((0, 3), np.int64)
        self.note = (f"{name}: {len(self):,} rows, {len(self.tokens):,} tokens; {cut_prompts} prompts cut on the left, "
                     f"{cut_responses} responses cut on the right, {dropped} rows dropped as nothing of the response was left")
        if dropped > len(rows) / 2:
            raise BadInput(f"{self.note}; raise --max-length or lower --max-prompt-length")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1, 2] if i else 0
        prompt, chosen, rejected = (x.tolist() for x in np.split(self.tokens[start:self.ends[i, 2]], self.ends[i, :2] - start))
        return Example(prompt, chosen, rejected or None, int(i))

    def fingerprint(self):
        return hashlib.sha256(self.tokens.tobytes() + self.ends.tobytes()).hexdigest()[:16]


class Draw:
    """[1]: mini-batches of a Data without end, each epoch in a new order; of each batch a process gets its own part.

    Batch b of all processes together is places b * batch_size ... of the endless sequence of epochs, so the position is
    one number and no row is left out or seen twice within an epoch, whatever the number of processes.
    """

    def __init__(self, data, batch_size, seed, rank=0, size=1):
        self.data, self.batch_size, self.seed, self.rank, self.size, self.batch = data, batch_size, seed, rank, size, 0

    def __call__(self, n):
        mine = self.batch_size // self.size
        assert n % mine == 0, "draw whole batches"
        places = [(self.batch + b) * self.batch_size + self.rank * mine + i for b in range(n // mine) for i in range(mine)]
        self.batch += n // mine
        return [self.data[self._order(p // len(self.data))[p % len(self.data)]] for p in places]

    @functools.lru_cache(maxsize=2)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.data))


TINY_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer(rows, cfg):
    """Companion files {name: bytes} of a small byte-level BPE with a chat template, trained on the rows' text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    turns = lambda row: [row.turns] if isinstance(row.turns, str) else [m["content"] for m in row.turns]
    tokenizer.train_from_iterator((t for row in rows for t in [*turns(row), row.chosen]), trainer)
    return {"tokenizer.json": tokenizer.to_str().encode(), "chat_template.jinja": TINY_TEMPLATE.encode(),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>",
                                                 "model_max_length": cfg.max_length, "clean_up_tokenization_spaces": False}).encode(),
            "generation_config.json": json.dumps({"bos_token_id": 0, "eos_token_id": 1}).encode()}


def find_model(name, world):
    """(folder, commit or None) of --model: a local folder, else a hub name[@revision], fetched by each node's first process."""
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    repo, _, revision = name.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja", "LICENSE*"]
    fetch = lambda: snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    try:
        if world.local == 0:
            fetch()
        world.meet()
        folder = Path(fetch())
    except HFValidationError:
        raise BadInput(f"--model {name}: no such folder, and not a hub name either") from None
    except GatedRepoError:
        raise BadInput(f"--model {name}: the repository is gated; accept its terms on the hub, then run: hf auth login") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise BadInput(f"--model {name}: no such folder, and the hub knows no such repository or revision") from None
    except Exception as error:                           # offline, timed out, proxy: the hub's client raises many kinds
        raise BadInput(f"--model {name}: no such folder, and the hub cannot be reached ({type(error).__name__}); "
                       "download the repository elsewhere and give its folder") from None
    return folder, folder.name


# ------------------------------------------------------------------------------------------------ 3. processes

class World:
    """This process among all: rank, size, device. Without torchrun it is alone and every call returns at once."""

    def __init__(self, cfg):
        self.rank, self.size, self.local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(f"cuda:{self.local}" if kind == "cuda" else kind)
        self.group = None
        if self.size > 1:
            if kind == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
            self.group = dist.new_group(backend="gloo")  # for plain values: works the same beside NCCL

    @property
    def first(self):
        return self.rank == 0

    def sum(self, values):
        """Sums of a list of numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def gather(self, value):
        """Every process's value, as a list, on rank 0; None elsewhere."""
        values = [None] * self.size if self.first else None
        if self.size == 1:
            return [value]
        dist.gather_object(value, values, group=self.group)
        return values

    def share(self, value):
        """Rank 0's value on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, group=self.group)
        return box[0]

    def meet(self):
        if self.size > 1:
            dist.barrier(group=self.group)

    def close(self):
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ 4. schedule and optimizer

def learning_rate(step, steps, cfg, peak):
    """Linear warm-up to `peak`, then the decay. step counts from 0; the last step of linear is the last above 0."""
    warmup = round(steps * float(cfg.warmup[:-1]) / 100) if cfg.warmup.endswith("%") else int(cfg.warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
                   "inverse_sqrt": math.sqrt(max(1, warmup) / max(1, step)), "constant": 1.0}[cfg.lr_scheduler]


def make_optimizer(model, cfg, lr):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=cfg.weight_decay)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def warm_up_step(policy, optimizer, examples, cfg, autocast):
    """One step of supervised fine-tuning on chosen responses: the mean over rows of the mean NLL. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    total, micro = 0.0, cfg.micro_batch
    for i in range(0, len(examples), micro):
        part = [Pair(e.prompt, e.chosen, []) for e in examples[i:i + micro]]
        batch = collate(part, share=False, sides=1).to(next(policy.parameters()).device)
        alone = getattr(policy, "no_sync", contextlib.nullcontext) if i + micro < len(examples) else contextlib.nullcontext
        with alone():
            with autocast():
                nll = -token_scores(policy, batch).sum(-1) / batch.lengths[:, 0]       # (n,)
            (nll.sum() / len(examples)).backward()
        total += nll.detach().sum().item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm or torch.inf)
    if norm.isfinite():
        optimizer.step()
    return {"loss": total / len(examples), "grad_norm": norm.item()}


# ------------------------------------------------------------------------------------------------ 5. evaluation

@dataclasses.dataclass
class Held:
    """Held-out rows: pairs whose y- stays the same all run long, and the starting model's log-prob gaps on them."""
    data: Data
    pairs: list             # this process's share
    gaps: list = None       # log p(y+) - log p(y-) of the starting model, in nats

    @property
    def judged(self):
        return [p for p in self.pairs if p.row in self.data.judges]


def passes(answer, judge):
    """True if every word (or phrase) of judge["must"] stands in the answer and none of judge["must_not"]; case aside."""
    has = lambda phrase: re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", answer, re.IGNORECASE) is not None
    return all(map(has, judge.get("must", ()))) and not any(map(has, judge.get("must_not", ())))


@torch.no_grad()
def evaluate(model, held, state, cfg, world, text, autocast, full=True):
    """{metric: value} of one model on the held-out rows, over all processes.

    nll: per token of y+. accuracy: share of rows whose mean log-prob is higher for y+ than for y-; no reference.
    margin: log p(y+) - log p(y-), less the starting model's. judge: share of answers that pass, greedy, and with `full` also
    at the run's own sampling settings and at temperature 1.
    """
    model.eval()
    sums, gaps = np.zeros(5), []                         # nll, tokens, right, margins, rows
    for i in range(0, len(held.pairs), cfg.micro_batch):
        batch = collate(held.pairs[i:i + cfg.micro_batch]).to(world.device)
        with autocast():
            chosen, rejected = score(model, batch)
        gap, lengths = chosen - rejected, batch.lengths
        right = (chosen / lengths[:, 0] > rejected / lengths[:, 1]).sum()
        start = held.gaps[i:i + cfg.micro_batch] if held.gaps else gap.tolist()
        gaps += gap.tolist()
        sums += [-chosen.sum().item(), lengths[:, 0].sum().item(), right.item(), gap.sum().item() - math.fsum(start), len(gap)]
    if held.gaps is None:
        held.gaps = gaps
    nll, tokens, right, margins, rows = world.sum(sums.tolist())
    table = {"nll": nll / tokens, "accuracy": right / rows, "margin": margins / rows}
    count = world.sum([len(held.judged)])[0]
    ways = {"greedy": (0, 0, 1.0), "sampled": (cfg.temperature, cfg.top_k, cfg.top_p), "at temperature 1": (1.0, 0, 1.0)}
    for way, settings in ways.items() if count else ():
        if way == "greedy" or full:
            answers = write_answers(model, held.judged, settings, state, cfg, world)
            good = sum(passes(text.decode(a, True), held.data.judges[p.row]) for p, a in zip(held.judged, answers))
            table[f"judge, {way}"] = world.sum([good])[0] / count
    model.train()
    return table


def write_answers(model, pairs, settings, state, cfg, world):
    """Each prompt's answer, in ids, with a generator of its own, so that evaluating changes nothing in the run."""
    temperature, top_k, top_p = settings
    generator, answers = torch.Generator().manual_seed(cfg.seed + world.rank), []
    for i in range(0, len(pairs), 64):
        prompts = [p.prompt for p in pairs[i:i + 64]]
        room = [max(1, min(cfg.eval_tokens, cfg.max_length - len(p))) for p in prompts]
        answers += generate(model, prompts, room, state.eos, temperature, top_k, top_p, generator, state.vocab)
    return answers


def held_out_pairs(data, state, cfg, world):
    """This process's share of held-out pairs: y- is the data's, or is rewritten once, now, by the starting model."""
    examples = [data[i] for i in range(world.rank, min(len(data), cfg.eval_rows), world.size)]
    scratch = dataclasses.replace(state, cuts=np.random.default_rng([cfg.seed, 1, world.rank]),
                                  sampler=torch.Generator().manual_seed(cfg.seed + world.rank))
    pairs = []
    for rewritten in (False, True):
        some = [e for e in examples if (e.rejected is None) == rewritten]
        way = dataclasses.replace(cfg, rejected="sapo" if rewritten else "data")
        for i in range(0, len(some), 64):
            pairs += make_pairs(scratch, some[i:i + 64], way)
    return sorted(pairs, key=lambda p: p.row)


def print_table(table):
    """{model: {metric: value}} as aligned text."""
    columns = list(next(iter(table.values())))
    width = [max(8, len(c)) for c in columns]
    print("\nheld-out rows   " + "  ".join(c.rjust(w) for c, w in zip(columns, width)))
    for name, row in table.items():
        print(f"{name:<14}  " + "  ".join(f"{row[c]:.3f}".rjust(w) for c, w in zip(columns, width)))
    print()


# ------------------------------------------------------------------------------------------------ 6. log and plots

class Log:
    """metrics.jsonl, pairs.jsonl and the screen; only rank 0 writes. `sizes` and `cut` make a resumed log seamless."""

    def __init__(self, folder, world):
        self.folder, self.first = folder, world.first
        self.files = {name: open(folder / f"{name}.jsonl", "a", encoding="utf-8") for name in ("metrics", "pairs")} if self.first else {}

    def write(self, name, row):
        if self.first:
            rounded = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in row.items()}
            self.files[name].write(json.dumps(rounded, ensure_ascii=False) + "\n")
            self.files[name].flush()

    def say(self, line):
        if self.first:
            tqdm.write(line)

    def sizes(self):
        return {name: f.tell() for name, f in self.files.items()}

    def cut(self, sizes):
        """Take back what was written after a checkpoint: no line twice, none missing."""
        for name, f in self.files.items():
            f.truncate(sizes[name])
            f.seek(sizes[name])


def pair_text(pair, text):
    """A triple as text, in its parts."""
    decode = text.decode
    return {"step": pair.step, "row": pair.row, "prompt": decode(pair.prompt), "A": decode(pair.chosen[:pair.start]),
            "B": decode(pair.chosen[pair.start:pair.stop]), "B'": decode(pair.rejected[pair.start:pair.rejected_stop]),
            "C": decode(pair.chosen[pair.stop:]), "C kept": pair.rejected_stop < len(pair.rejected) or pair.stop == len(pair.chosen)}


def one_line(s, width):
    s = " ".join(s.split())
    return s if len(s) <= width else s[:width // 2 - 1] + " … " + s[-(width // 2 - 2):]


def show_pair(parts):
    return (f"    y+  {one_line(parts['A'], 40)} [{one_line(parts['B'], 60)}] {one_line(parts['C'], 40)}\n"
            f"    y-  {one_line(parts['A'], 40)} [{one_line(parts[chr(66) + chr(39)], 60)}] {one_line(parts['C'], 40) if parts['C kept'] else ''}")


def draw_curves(folder):
    """curves.png from metrics.jsonl: what went on, at a glance. Says so where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no curves.png: matplotlib is not installed")
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    steps = [r for r in lines if "rewards/margins" in r]
    evals = [r for r in lines if "eval/policy/nll" in r]
    panels = {"loss": ["loss"], "reward margin (nats)": ["rewards/margins"], "log-probs (nats)": ["logps/chosen", "logps/rejected"],
              "accuracy on drawn pairs": ["rewards/accuracies"], "buffer: age of a drawn pair (steps)": ["buffer/age"],
              "held out": [k for k in ("eval/policy/accuracy", "eval/policy/judge, greedy", "eval/ema/judge, greedy") if evals and k in evals[-1]]}
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            rows = evals if key.startswith("eval/") else steps
            x, y = [r["step"] for r in rows], np.array([r[key] for r in rows], float)
            label = key.removeprefix("eval/").replace("logps/", "").replace("rewards/", "")
            if len(y) > 20 and rows is steps:            # the line is a running mean, the points are faint
                n = max(3, len(y) // 20)
                points = axis.plot(x, y, ".", markersize=2, alpha=0.35)[0]
                smooth = np.convolve(np.pad(y, (n // 2, n - 1 - n // 2), "edge"), np.ones(n) / n, "valid")
                axis.plot(x, smooth, color=points.get_color(), label=label)
            else:
                axis.plot(x, y, "o-", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if len(keys) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ 7. checkpoint and resume

def to_disk(value, path):
    """Write nested dicts and lists of tensors, arrays and plain values as path.json and path.safetensors. No pickle."""
    from safetensors.torch import save_file
    tensors = {}

    def walk(v, name):
        if isinstance(v, (torch.Tensor, np.ndarray)):
            tensors[name] = (torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v.detach()).cpu().contiguous()
            return {"#array" if isinstance(v, np.ndarray) else "#tensor": name}
        if isinstance(v, dict):
            if all(isinstance(k, str) for k in v):
                return {k: walk(x, f"{name}.{k}") for k, x in v.items()}
            return {"#items": [[k, walk(x, f"{name}.{k}")] for k, x in v.items()]}
        return [walk(x, f"{name}.{i}") for i, x in enumerate(v)] if isinstance(v, (list, tuple)) else v

    plain = walk(value, path.name)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(plain), "utf-8")


def from_disk(path):
    """What `to_disk` wrote."""
    from safetensors.torch import load_file
    tensors = load_file(path.with_suffix(".safetensors"))

    def walk(v):
        if isinstance(v, dict):
            if "#tensor" in v:
                return tensors[v["#tensor"]]
            if "#array" in v:
                return tensors[v["#array"]].numpy()
            return {k: walk(x) for k, x in v["#items"]} if "#items" in v else {k: walk(x) for k, x in v.items()}
        return [walk(x) for x in v] if isinstance(v, list) else v

    return walk(json.loads(path.with_suffix(".json").read_text("utf-8")))


def save_checkpoint(run):
    """checkpoint/step-N: what all share, a part for each process, and a manifest; written beside, flushed, then renamed."""
    parts = run.world.gather(run.own_state())
    if run.world.first:
        folder = run.out / "checkpoint" / f"step-{run.progress:08d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        to_disk(run.shared_state(), temporary / "shared")
        for rank, part in enumerate(parts):
            to_disk(part, temporary / f"rank-{rank}")
        sums = {p.name: [p.stat().st_size, checksum(p)] for p in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", sums)
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        replace_folder(temporary, folder)
        flush(folder.parent)
        for old in sorted(folder.parent.glob("step-*"))[:-run.cfg.keep]:
            shutil.rmtree(old, ignore_errors=True)
    run.world.meet()


def flush(path):
    """Have the disk hold what was written (a folder too, where the system allows it)."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def newest_checkpoint(out):
    """The newest sound checkpoint folder of a run, or None; a torn one is named and passed over."""
    for folder in sorted((out / "checkpoint").glob("step-*"), reverse=True):
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            for name, (size, digest) in manifest.items():
                if (folder / name).stat().st_size != size or checksum(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            if not {"shared.json", "shared.safetensors", "rank-0.json", "rank-0.safetensors"} <= set(manifest):
                raise ValueError("the manifest lacks a part")
            return folder
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(f"warning: passing over {folder}: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ 8. the loop

class Run:
    """One training run in one process: everything prepared once, then `train`."""

    def __init__(self, cfg, preset, resume, world):
        self.cfg, self.preset, self.world, self.out = cfg, preset, world, Path(cfg.out)
        self.began, self.stop, self.bad, self.sft_step = time.monotonic(), None, 0, 0
        for name in ("batch_size", "sft_batch_size"):
            if getattr(cfg, name) % world.size:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be shared evenly by {world.size} processes")
        if cfg.buffer_size < cfg.batch_size:
            raise BadInput(f"--buffer-size {cfg.buffer_size} is smaller than one batch of {cfg.batch_size} pairs")
        self.local = dataclasses.replace(cfg, batch_size=cfg.batch_size // world.size, buffer_size=cfg.buffer_size // world.size)
        bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and world.device.type == "cuda"
        self.autocast = functools.partial(torch.autocast, world.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext
        self.writer_dtype = torch.bfloat16 if bf16 else torch.float32
        self.prepare(resume)

    # -- before the first weight is loaded: everything that can be refused is refused here

    def prepare(self, resume):
        cfg, world, folder = self.cfg, self.world, None
        files = {name: read_rows(getattr(cfg, name)) for name in ("data", "sft_data", "eval_data") if getattr(cfg, name)}
        rows = lambda name: files.get(name)
        self.commit = None
        if resume:
            folder = self.out / "source"
        elif cfg.model:
            folder, self.commit = find_model(cfg.model, world)
        elif self.preset != "tiny":
            raise BadInput("--model is missing: a model folder or hub name (only --preset tiny makes a model from nothing)")
        if folder:
            self.config = ModelConfig.from_dict(read_json(folder / "config.json", "model folder"))
            if not resume:
                check_weights(folder, self.config)
                self.dtype = saved_dtype(folder)
            self.files = companions(folder)
        else:
            if cfg.max_length is None:
                cfg.max_length = 512
            self.files = world.share(make_tokenizer((rows("sft_data") or []) + rows("data"), cfg) if world.first else None)
            self.config = ModelConfig.from_dict(dict(
                architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
                max_position_embeddings=cfg.max_length, bos_token_id=0, eos_token_id=1, torch_dtype="float32", **{k: getattr(cfg, k) for k in (
                    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}))
            self.dtype = torch.float32
        self.source = folder
        context = self.config.max_position_embeddings
        cfg.max_length = self.local.max_length = cfg.max_length or min(2048, context)
        if cfg.max_length > context:
            raise BadInput(f"--max-length {cfg.max_length} is more than the model's context of {context}")
        if cfg.max_prompt_length >= cfg.max_length:
            cfg.max_prompt_length = self.local.max_prompt_length = cfg.max_length * 7 // 8   # the paper's share, 1792 of 2048
        self.text = Text(self.files, folder or "the new tokenizer", self.config, cfg.chat_template)

        train_rows, held_rows = rows("data"), rows("eval_data")
        if held_rows is None:                            # hold some back: every k-th row, so that both look alike
            held = min(100, max(1, len(train_rows) // 20))
            every = len(train_rows) // held
            held_rows, train_rows = train_rows[::every][:held], [r for i, r in enumerate(train_rows) if i % every or i // every >= held]
            if not train_rows:
                raise BadInput(f"{cfg.data}: one row is not enough, as some are held out; give --eval-data")
        if cfg.rejected == "data" and (without := sum(r.rejected is None for r in train_rows)):
            raise BadInput(f"{cfg.data}: --rejected data, but {without} rows have no rejected")
        make = lambda rows, name: Data(rows, self.text, cfg, name, world.first)
        self.data, self.held_data = make(train_rows, "train"), make(held_rows[:cfg.eval_rows], "held out")
        self.sft_data = make(files["sft_data"], "warm-up") if "sft_data" in files else self.data
        if not len(self.data) or not len(self.held_data):
            raise BadInput(f"{self.data.note}; {self.held_data.note}; nothing is left to use")
        if cfg.sft_steps == 0 and not cfg.model and not resume:
            raise BadInput("--sft-steps 0 without --model: a model made from nothing writes noise; give it a warm-up")
        per_epoch = max(1, round(len(self.data) / cfg.batch_size))
        self.steps = cfg.steps if cfg.steps is not None else max(1, math.ceil(cfg.epochs * len(self.data) / cfg.batch_size))
        self.steps_per_epoch = per_epoch

    def record(self):
        """config.json: every setting, resolved, and what it was run with."""
        import importlib.metadata as metadata
        libraries = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm")
        write_json(self.out / "config.json", {
            "settings": dataclasses.asdict(self.cfg), "preset": self.preset, "steps": self.steps, "world_size": self.world.size,
            "model_commit": self.commit, "dtype": str(self.dtype).removeprefix("torch."), "eos_token_ids": list(self.text.eos),
            "data": [d.note for d in (self.data, self.held_data, self.sft_data)], "fingerprint": self.data.fingerprint(),
            "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in libraries}}})

    # -- state in and out

    @property
    def progress(self):
        return self.sft_step + (self.state.step if self.state else 0)

    def shared_state(self):
        named = lambda model: {k: p for k, p in model.named_parameters()}
        state, shared = self.state, {"sft_step": self.sft_step, "world_size": self.world.size, "policy": named(self.model),
                                     "optimizer": self.optimizer.state_dict(), "sizes": self.log.sizes(), "fingerprint": self.data.fingerprint()}
        if state:
            shared |= {"ema": named(state.ema), "reference": named(state.reference) if state.reference is not None else None, "table": self.table,
                       **{k: getattr(state, k) for k in ("step", "ema_version", "ref_version")}}
        return shared

    def own_state(self):
        state, own = self.state, {"draw": self.draw.batch, "bad": self.bad}
        if state:
            own |= {"buffer": state.buffer.state_dict(), "written": pack(state.written), "cuts": state.cuts.bit_generator.state,
                    "sampler": state.sampler.get_state(), "held": pack(self.held.pairs), "gaps": self.held.gaps, "before": self.before}
        return own

    def load(self, folder):
        shared, own = from_disk(folder / "shared"), None
        if shared["fingerprint"] != self.data.fingerprint():
            raise BadInput(f"{self.cfg.data}: the data are not those of the saved run; put the same file back")
        if shared["world_size"] != self.world.size:
            raise BadInput(f"{folder}: saved by {shared['world_size']} processes; resume it with as many")
        own = from_disk(folder / f"rank-{self.world.rank}")

        def fill(model, values):
            for name, p in model.named_parameters():
                p.data.copy_(values[name])
        fill(self.model, shared["policy"])
        self.sft_step, self.bad = shared["sft_step"], own["bad"]
        if "step" in shared:
            self.begin_sapo()
            state = self.state
            fill(state.ema, shared["ema"])
            if state.reference is not None:
                fill(state.reference, shared["reference"])
            self.refresh_writer(always=True)
            for k in ("step", "ema_version", "ref_version"):
                setattr(state, k, shared[k])
            state.buffer.load_state_dict(own["buffer"])
            state.written.extend(unpack(own["written"]))
            state.cuts.bit_generator.state = own["cuts"]
            state.sampler.set_state(own["sampler"])
            self.held, self.table, self.before = Held(self.held_data, unpack(own["held"]), own["gaps"]), shared["table"], own["before"]
        else:
            self.begin_warm_up()
        self.draw.batch = own["draw"]
        self.optimizer.load_state_dict(shared["optimizer"])
        self.log.cut(shared["sizes"])
        self.log.say(f"resuming from {folder}: {self.sft_step} warm-up steps, {self.state.step if self.state else 0} SAPO steps done")

    # -- stages

    def wrapped(self):
        if self.world.size == 1:
            return self.model
        cuda = self.world.device.type == "cuda"
        return torch.nn.parallel.DistributedDataParallel(self.model, device_ids=[self.world.device.index] if cuda else None,
                                                         broadcast_buffers=False, gradient_as_bucket_view=True)

    def begin_warm_up(self):
        self.policy, self.optimizer = self.wrapped(), torch.optim.AdamW(self.model.parameters(), lr=self.cfg.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.draw = Draw(self.sft_data, self.cfg.sft_batch_size, self.cfg.seed, self.world.rank, self.world.size)

    def begin_sapo(self):
        cfg, world = self.local, self.world
        self.policy, self.optimizer = self.wrapped(), make_optimizer(self.model, cfg, cfg.lr)
        self.draw = Draw(self.data, self.cfg.batch_size, cfg.seed, world.rank, world.size)
        ema = twin(self.model)
        writer = ema if self.writer_dtype == torch.float32 else twin(self.model).to(self.writer_dtype)
        self.state = State(self.policy, ema, writer, twin(self.model) if cfg.loss == "dpo" else None, self.optimizer,
                           ReplayBuffer(cfg.buffer_size, cfg.seed + world.rank, cfg.replay), np.random.default_rng(cfg.seed + world.rank),
                           torch.Generator().manual_seed(cfg.seed + world.rank), self.text.eos, self.text.vocab, self.steps_per_epoch)
        self.written_by = 0

    def refresh_writer(self, always=False):
        """The bf16 writer follows the EMA; the float32 writer is the EMA."""
        state = self.state
        if state.writer is not state.ema and (always or self.written_by != state.ema_version):
            copy_parameters(state.writer, state.ema)
        self.written_by = state.ema_version

    def measure(self, full):
        """{model: metrics}; the policy and the EMA as they are now."""
        models = {"policy": self.model, "ema": self.state.ema}
        return {name: evaluate(m, self.held, self.state, self.local, self.world, self.text, self.autocast, full) for name, m in models.items()}

    def answers(self, model):
        pairs = [p for p in self.held.pairs[:self.cfg.samples]] if self.world.first else []
        return [self.text.decode(a, True) for a in write_answers(model, pairs, (0, 0, 1.0), self.state, self.local, self.world)]

    def warm_up(self):
        cfg, log = self.cfg, self.log
        local = dataclasses.replace(cfg, micro_batch=max(1, min(cfg.micro_batch, cfg.sft_batch_size)))
        with self.bar("warm-up", cfg.sft_steps, self.sft_step) as bar:
            while self.sft_step < cfg.sft_steps:
                lr = learning_rate(self.sft_step, cfg.sft_steps, cfg, cfg.sft_lr)
                set_lr(self.optimizer, lr)
                metrics = warm_up_step(self.policy, self.optimizer, self.draw(cfg.sft_batch_size // self.world.size), local, self.autocast)
                self.sft_step += 1
                metrics = self.reduced(metrics)
                log.write("metrics", {"sft_step": self.sft_step, **metrics, "learning_rate": lr})
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update()
                if self.sft_step % cfg.show_every == 0 and not sys.stderr.isatty() and self.sft_step % (10 * cfg.show_every) == 0:
                    log.say(f"warm-up step {self.sft_step}: loss {metrics['loss']:.3f}")
                self.between_steps(self.sft_step, metrics)

    def reduced(self, metrics):
        """Means over processes; each has as many pairs, so the mean of means is the mean."""
        keys = sorted(k for k, v in metrics.items() if isinstance(v, float))
        sums = self.world.sum([metrics[k] for k in keys])
        return metrics | {k: v / self.world.size for k, v in zip(keys, sums)}

    def between_steps(self, step, metrics):
        """After every step of either stage: stop on non-finite gradients, save, and stop when asked to. All ranks alike."""
        cfg = self.cfg
        if not math.isfinite(metrics["grad_norm"]):
            self.bad += 1
            self.log.say(f"step {step}: the gradient is not finite, nothing was changed; rows {metrics.get('bad_rows', [])[:8]}")
            if self.bad >= cfg.max_bad_steps:
                raise Diverged(f"{self.bad} steps in a row had a gradient that is not finite; the last checkpoint in {self.out} is from before; "
                               "look at the rows named above, or lower --lr")
        else:
            self.bad = 0
        late = cfg.max_minutes and time.monotonic() - self.began > 60 * cfg.max_minutes
        asked = self.world.sum([bool(self.stop or late)])[0] > 0
        if asked or cfg.save_every and step % cfg.save_every == 0 and not self.bad:
            save_checkpoint(self)
        if asked:
            raise Stopped(f"stopped after step {step} and saved; go on with: python train.py --resume {self.out}")

    def bar(self, name, total, initial):
        return tqdm(total=total, initial=initial, desc=name, disable=not self.world.first or not sys.stderr.isatty(), unit="step", leave=False)

    def sapo(self):
        cfg, state, log, world = self.local, self.state, self.log, self.world
        with self.bar("SAPO", self.steps, state.step) as bar:
            while state.step < self.steps:
                self.refresh_writer()
                lr = learning_rate(state.step, self.steps, cfg, cfg.lr)
                set_lr(self.optimizer, lr)
                metrics = self.reduced(sapo_step(state, self.draw, cfg, self.autocast))
                if "gen/tokens_per_second" in metrics:
                    metrics["gen/tokens_per_second"] *= world.size
                step = state.step
                row = {"step": step, "epoch": step * self.cfg.batch_size / len(self.data), "learning_rate": lr, **metrics}
                if not row["bad_rows"]:
                    del row["bad_rows"]
                if cfg.eval_every and step % cfg.eval_every == 0 and step < self.steps:
                    row |= {f"eval/{m}/{k}": v for m, t in self.measure(False).items() for k, v in t.items()}
                log.write("metrics", row)
                line = f"loss {metrics['loss']:.3f}  margin {metrics['rewards/margins']:+.3f}  accuracy {metrics['rewards/accuracies']:.2f}"
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                if step % cfg.show_every == 0 or step == 1:
                    parts = pair_text(state.buffer.pairs[-1], self.text)
                    log.write("pairs", parts)
                    log.say(f"step {step:>4}/{self.steps}  {line}  age {metrics['buffer/age']:.1f}\n{show_pair(parts)}")
                if metrics.get("ema/distance") == 0 and lr > 0 and step <= 2 * int(cfg.ema_every if cfg.ema_every.isdigit() else 1):
                    log.say("warning: no parameter moved; is the learning rate below what float32 can add?")
                self.between_steps(step, metrics)

    def train(self, resume):
        cfg, world = self.cfg, self.world
        self.log, self.state, self.table, self.before = Log(self.out, world), None, {}, []
        for data in (self.data, self.held_data):
            self.log.say(data.note)
        checkpoint = newest_checkpoint(self.out) if resume else None
        self.model = self.starting_model(bool(checkpoint))
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.log.say(f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {world.size} process(es) on {world.device.type}, "
                     f"{cfg.sft_steps} warm-up steps, {self.steps} SAPO steps of {cfg.batch_size} pairs")
        if checkpoint:
            self.load(checkpoint)
        else:
            self.begin_warm_up()
            self.log.cut({"metrics": 0, "pairs": 0})
        if self.state is None:
            self.warm_up()
            self.begin_sapo()
            self.held = Held(self.held_data, held_out_pairs(self.held_data, self.state, self.local, world))
            self.table = {"start": evaluate(self.model, self.held, self.state, self.local, world, self.text, self.autocast)}
            self.before = self.answers(self.model)
        self.sapo()
        self.finish()

    def starting_model(self, resumed):
        if resumed or not self.cfg.model:
            model = Transformer(self.config).init_weights(torch.Generator().manual_seed(self.cfg.seed))
        else:
            model = load_pretrained(self.source if self.source != self.out / "source" else find_model(self.cfg.model, self.world)[0])
        return model.to(self.world.device)

    def finish(self):
        """The table, the samples, both models as Hugging Face folders, the curves and a last checkpoint."""
        cfg, log = self.cfg, self.log
        if self.steps:
            final = self.measure(True)
            self.table |= final
            log.write("metrics", {"step": self.state.step, **{f"eval/{m}/{k}": v for m, t in self.table.items() for k, v in t.items()}})
            after = {"policy": self.answers(self.model), "ema": self.answers(self.state.ema)}
        else:
            after = {}
        save_checkpoint(self)
        if self.world.first:
            with open(self.out / "samples.jsonl", "w", encoding="utf-8") as f:
                for i, pair in enumerate(self.held.pairs[:cfg.samples]):
                    f.write(json.dumps({"prompt": self.text.decode(pair.prompt), "chosen": self.text.decode(pair.chosen, True),
                                        "start": self.before[i], **{k: v[i] for k, v in after.items()}}, ensure_ascii=False) + "\n")
            write_json(self.out / "results.json", self.table)
            for name, model in (("model", self.model), ("ema", self.state.ema)) if self.steps else ():
                save_pretrained(model, self.out / name, self.dtype, self.files)
            draw_curves(self.out)
            print_table(self.table)
            for i in range(min(1, len(self.before))):
                print(f"prompt  {one_line(self.text.decode(self.held.pairs[i].prompt, True), 200)}\nbefore  {one_line(self.before[i], 400)}")
                if after:
                    print(f"after   {one_line(after['policy'][i], 400)}")
            print(f"\n{time.monotonic() - self.began:.0f} s. Everything is in {self.out}")
        self.world.meet()


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class Diverged(Exception):
    """Too many steps in a row were not finite."""


def claim(cfg, preset, world):
    """Decide on the run folder and refuse to write over another run."""
    name = world.share(cfg.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    cfg.out, out = name, Path(name)
    if world.first and out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not cfg.overwrite:
            raise BadInput(f"--out {out} exists; choose another name, go on with --resume {out}, or replace it with --overwrite")
        if not (out / "config.json").exists() or not (out / "metrics.jsonl").exists():
            raise BadInput(f"--out {out} exists and is not a run folder; it is not replaced even with --overwrite")


def main(argv=None):
    world = None
    try:
        cfg, preset, resume = parse(sys.argv[1:] if argv is None else argv)
        world = World(cfg)
        if not resume:
            claim(cfg, preset, world)
        run = Run(cfg, preset, resume, world)
        if world.first and not resume:
            if run.out.exists() and cfg.overwrite:
                shutil.rmtree(run.out)
            (run.out / "source").mkdir(parents=True, exist_ok=True)
            for name, content in run.files.items():
                (run.out / "source" / name).write_bytes(content)
            write_json(run.out / "source" / "config.json", run.config.to_dict(run.dtype))
            run.record()
        elif resume:
            run.dtype = getattr(torch, read_json(resume / "config.json")["dtype"])
        world.meet()

        def ask(signum, frame):
            if run.stop and signum == signal.SIGINT:
                raise KeyboardInterrupt
            run.stop = signum
        for name in ("SIGTERM", "SIGINT"):
            signal.signal(getattr(signal, name), ask)
        run.train(resume)
        return 0
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if world.first:
            print(stopped)
        return 0
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    finally:
        if world:
            world.close()


if __name__ == "__main__":
    sys.exit(main())
