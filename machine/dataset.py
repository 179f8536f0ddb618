"""A row of data on its way to token ids: chat text, truncation, and the order of [1]."""

import contextlib
import datetime
import functools
import gzip
import hashlib
import json
import re
import signal
import zlib
from array import array
from pathlib import Path

import jinja2
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from machine.folders import BadInput, json_or_nothing, read_json
from sapo import Example

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
