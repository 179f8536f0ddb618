"""A row of data on its way into the loss: checked, rendered as chat text, tokenised, truncated, drawn ([1]).

Holds `Row`, `Text` (tokenizer and chat template), `Data` (rows as token ids) and `Draw`. Leaves out batches.
"""

import datetime
import functools
import gzip
import hashlib
import json
import re
import zlib
from array import array
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tqdm import tqdm

from buffer import common_prefix
from machine.files import BadInput, json_or_nothing, parse_json, read_json
from sapo import Example

MAX_LINE = 10_000_000       # bytes of one data line
MAX_TEXT = 10_000_000       # characters of one rendered conversation


# ----------------------------------------------------------------------------------- rows
class Row:
    """One data row, checked: the turns before the answer (or a plain prompt), the answer, perhaps a worse
    one, and perhaps a verifier of answers, {"must": [words], "must_not": [words]}."""
    __slots__ = ("turns", "chosen", "rejected", "verifier")

    def __init__(self, raw, where):
        def need(good, what):
            if not good:
                raise BadInput(f"{where}: {what}")

        need(isinstance(raw, dict),
             'not a JSON object; each line must be one, such as {"prompt": ..., "chosen": ...}')
        conversation = raw.get("messages") if raw.get("chosen") is None else raw["chosen"]
        if isinstance(conversation, list):
            need(all(map(_is_message, conversation)), "each message needs a role and a content, both text")
            need(conversation and conversation[-1]["role"] == "assistant",
                 "the last message must be the assistant's")
            need(len(conversation) > 1, "a conversation needs a message before the assistant's answer")
            self.turns = [{key: message[key] for key in ("role", "content")} for message in conversation[:-1]]
            self.chosen = conversation[-1]["content"]
        else:
            for key in ("prompt", "chosen"):
                need(isinstance(raw.get(key), str),
                     f"{key} is missing or not text; a row needs prompt and chosen, or messages")
            self.turns, self.chosen = raw["prompt"], raw["chosen"]
        need(self.chosen.strip(), "the chosen response is empty")
        self.rejected = raw.get("rejected")
        if isinstance(self.rejected, list):
            last = self.rejected[-1] if self.rejected else None
            self.rejected = last.get("content", 0) if isinstance(last, dict) else 0
        need(self.rejected is None or isinstance(self.rejected, str) and self.rejected.strip(),
             "rejected must be a text that is not empty, or be left out")
        self.verifier = raw.get("verifier", raw.get("judge"))              # `judge` is an older name
        need(self.verifier is None or _is_verifier(self.verifier),
             'verifier must be {"must": [words], "must_not": [words]}')


def _is_message(m):
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)


def _is_verifier(value):
    if not isinstance(value, dict) or set(value) - {"must", "must_not"}:
        return False
    if not all(isinstance(words, list) for words in value.values()):
        return False
    return all(isinstance(word, str) and word for words in value.values() for word in words)


def read_rows(path):
    """The Rows of a .jsonl, .jsonl.gz or .json file; BadInput names file and line of a bad one."""
    path = Path(path)
    if path.suffix == ".parquet":
        raise BadInput(f"{path}: convert parquet first: python -c \"import pandas; pandas.read_parquet("
                       f"'{path.name}').to_json('{path.stem}.jsonl', orient='records', lines=True)\"")
    try:
        rows = _rows_of_list(path) if path.suffix == ".json" else _rows_of_lines(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:     # ValueError: a name no file can have
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


def _rows_of_list(path):
    whole = read_json(path, "data set")
    if not isinstance(whole, list):
        raise BadInput(f"{path}: a .json data file must hold a list of rows; JSON lines go into .jsonl")
    return [Row(raw, f"{path}, row {number}") for number, raw in enumerate(whole, 1)]


def _rows_of_lines(path):
    rows, number = [], 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        while line := f.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise BadInput(f"{where}: longer than {MAX_LINE:,} bytes; is this a file of JSON lines?")
            if line.strip():
                rows.append(Row(parse_json(line, where), where))
    return rows


# ----------------------------------------------------------------------------------- text
class Text:
    """Tokenizer and chat template of a checkpoint, from its companion files {name: bytes}.

    `eos` is the set of ids that end an answer, `end` the one that is added where an answer has none.
    """

    def __init__(self, files, folder, config, template_file=""):
        self.tokenizer = read_tokenizer(files, folder)
        settings = json_or_nothing(files.get("tokenizer_config.json"), f"{folder}/tokenizer_config.json")
        generation = json_or_nothing(files.get("generation_config.json"), f"{folder}/generation_config.json")
        self.special = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                self.special[key] = value
        self.vocab = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if self.vocab > config.vocab_size:
            raise BadInput(f"{folder}: the tokenizer has {self.vocab} tokens, the model only "
                           f"{config.vocab_size}; resizing the vocabulary is not implemented, resize and "
                           "save the model first")
        self.bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.added = {i: token.content for i, token in added if token.special}
        words = [re.escape(word) for word in self.added.values() if len(word) > 1]
        self.typed = re.compile("|".join(words) or r"(?!)")        # finds special tokens typed in a text
        source = find_template(files, settings, template_file)
        self.template = compile_template(source) if source else None
        self._find_ends(generation, config, folder)

    def _find_ends(self, generation, config, folder):
        """The ids that end an answer: those that the files name, and what the template writes after one."""
        ends = [self.tokenizer.token_to_id(self.special.get("eos_token", ""))]
        for where in (generation, config.source):
            found = where.get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
        self.end = ends[0]
        if self.template:
            question = [{"role": "user", "content": "a"}]
            opening = self._ids(self.render(question, True))
            whole = self._ids(self.render(question + [{"role": "assistant", "content": "b"}]))
            closing = [i for i in whole[common_prefix(opening, whole):] if i in self.added]
            self.end = closing[-1] if closing else self.end
        known = {i for i in [*ends, self.end] if type(i) is int and 0 <= i < self.vocab}
        self.eos = tuple(sorted(known))
        if not self.eos:
            raise BadInput(f"{folder}: no end token: neither generation_config.json, config.json nor the "
                           "tokenizer names one")
        if self.end not in self.eos:
            self.end = self.eos[0]

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def render(self, messages, add_generation_prompt=False):
        """The chat text, exactly as transformers' apply_chat_template(tokenize=False) has it."""
        try:
            text = self.template.render(messages=messages, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt, **self.special)
            text.encode()                # half a surrogate pair is a string, but it is not text
        except Exception as error:       # a template can raise anything at all
            roles, reason = [m["role"][:20] for m in messages][:6], " ".join(str(error).split())[:160]
            raise BadInput(f"the chat template refuses a conversation of roles {roles}: "
                           f"{type(error).__name__}: {reason}") from None
        if len(text) > MAX_TEXT:
            raise BadInput(f"the chat template makes {len(text):,} characters of one conversation; "
                           f"{MAX_TEXT:,} are read at most")
        return text

    def encode(self, rows):
        """[(prompt ids, chosen ids, rejected ids or None)] of Rows, before truncation; each response ends in
        one end token. A text is tokenised once, with its answer, and split where the prompt alone ends."""
        texts = [self._texts(row) for row in rows]
        flat = [text for row in texts for text in row]
        ids = iter(e.ids for e in self.tokenizer.encode_batch(flat, add_special_tokens=not self.template))
        encoded = []
        for row in texts:
            opening, wholes = next(ids), [next(ids) for _ in row[1:]]
            closed = opening and opening != [self.bos] and opening[-1] in self.eos
            if not self.template and closed:             # some tokenizers close every text
                opening = opening[:-1]
            if not opening and self.bos is not None:     # an empty text begins with BOS
                opening, wholes = [self.bos], [[self.bos] + whole for whole in wholes]
            cut = min(common_prefix(opening, whole) for whole in wholes)
            answers = [self.closed(whole[cut:]) for whole in wholes] + [None]
            encoded.append((opening[:cut], *answers[:2]))
        return encoded

    def _texts(self, row):
        """[the prompt, the prompt with the answer, and perhaps with the worse one] as text."""
        answers = [row.chosen] + ([row.rejected] if row.rejected else [])
        plain = isinstance(row.turns, str)
        if not self.template and plain:
            return [row.turns] + [row.turns + answer for answer in answers]
        if not self.template:
            raise BadInput("the data are conversations, but the checkpoint has no chat template; give one "
                           "with --chat-template FILE")
        turns = [{"role": "user", "content": row.turns}] if plain else row.turns
        ends = [self.render(turns + [{"role": "assistant", "content": answer}]) for answer in answers]
        return [self.render(turns, True)] + ends

    def closed(self, ids):
        """What follows the last end token is dropped; where there is none, one is added."""
        ends = [place for place, i in enumerate(ids) if i in self.eos]
        return ids[:ends[-1] + 1] if ends else ids + [self.end]

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)


def read_tokenizer(files, folder):
    """The Tokenizer of a model folder's files, without padding or truncation."""
    if "tokenizer.json" not in files:
        cure = "copy it from where the model comes from"
        if "tokenizer.model" in files:
            cure = "convert tokenizer.model with transformers' AutoTokenizer(...).save_pretrained"
        raise BadInput(f"{folder}: no tokenizer.json; {cure}")
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("Some words", add_special_tokens=True)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:       # the library raises bare Exception, its Rust not even that
        raise BadInput(f"{folder}/tokenizer.json: not a tokenizer ({str(error)[:120]})") from None


def find_template(files, settings, template_file):
    """The chat template's source, or "": --chat-template's, chat_template.jinja, or the tokenizer's."""
    if template_file:
        try:
            return Path(template_file).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"--chat-template {template_file}: cannot be read ({error})") from None
    source = files.get("chat_template.jinja", b"").decode("utf-8", "replace")
    source = source or settings.get("chat_template") or ""
    if isinstance(source, list):         # [{name, template}, ...]: take the default one
        named = [t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0] if named else ""
    return source


class Generation(Extension):
    """{% generation %} marks the assistant's tokens for others; here it only renders what it holds."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        held = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(held, lineno=line)


def compile_template(source):
    """A chat template in jinja2's immutable sandbox, with transformers' filters and globals; its date stands.

    The sandbox keeps a template from reaching anything. It does not keep it from taking long.
    """
    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": datetime.datetime(2024, 7, 26).strftime}
    try:
        return environment.from_string(source)
    except Exception as error:           # constants are folded here, so this can raise anything as well
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"the chat template is not valid Jinja: {reason}") from None


# ------------------------------------------------------------------------------------ ids
class Data:
    """Rows as token ids in two integer arrays, truncated; data[i] is an Example. verifiers: {i: verifier}."""

    def __init__(self, rows, text, cfg, name, show=False):
        self.text, self.cfg = text, cfg
        self.flat, self.stops = array("i"), array("q")
        self.verifiers = {}
        self.counts = dict.fromkeys(("prompts", "responses", "dropped", "typed"), 0)
        quiet = not show or len(rows) < 5000
        for start in tqdm(range(0, len(rows), 1000), desc=f"tokenising {name}", disable=quiet, leave=False):
            part = rows[start:start + 1000]
            for row, ids in zip(part, text.encode(part)):
                self._add(row, *ids)
        self.tokens = np.array(self.flat, np.int32)
        self.ends = np.array(self.stops, np.int64).reshape(-1, 3)
        del self.flat, self.stops
        n = self.counts
        self.note = (f"{name}: {len(self):,} rows, {len(self.tokens):,} tokens; {n['prompts']} prompts cut "
                     f"on the left, {n['responses']} responses cut on the right, {n['dropped']} rows dropped "
                     "as nothing of the response was left")
        if n["typed"]:
            self.note += (f"; warning: {n['typed']} rows have special tokens typed inside their text, and "
                          "the model reads them as real")
        if n["dropped"] > len(rows) / 2:
            raise BadInput(f"{self.note}; raise --max-length or lower --max-prompt-length")

    def _add(self, row, prompt, chosen, rejected):
        """Truncate a row: the prompt loses its left end (BOS stays), then the response its right end."""
        text, cfg = self.text, self.cfg
        counts = self.counts
        words = [row.turns] if isinstance(row.turns, str) else [m["content"] for m in row.turns]
        counts["typed"] += any(map(text.typed.search, [*words, row.chosen]))
        if len(prompt) > cfg.max_prompt_length:
            head = prompt[:1] if prompt[0] == text.bos else []
            prompt = head + prompt[len(prompt) - cfg.max_prompt_length + len(head):]
            counts["prompts"] += 1
        room = cfg.max_length - len(prompt)
        chosen, rejected = chosen[:room], rejected and rejected[:room]
        counts["responses"] += 0 < len(chosen) == room and chosen[-1] not in text.eos
        if not prompt or not chosen or chosen[0] in text.eos:
            counts["dropped"] += 1       # nothing to learn from, or nothing before the response
            return
        if row.verifier is not None:
            self.verifiers[len(self.stops) // 3] = row.verifier
        for ids in (prompt, chosen, rejected or ()):
            self.flat.extend(ids)
            self.stops.append(len(self.flat))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1, 2] if i else 0
        parts = np.split(self.tokens[start:self.ends[i, 2]], self.ends[i, :2] - start)
        prompt, chosen = parts[0].tolist(), parts[1].tolist()
        return Example(prompt, chosen, parts[2].tolist() or None, int(i))

    def fingerprint(self):
        verifiers = json.dumps(self.verifiers, sort_keys=True).encode()
        return hashlib.sha256(self.tokens.tobytes() + self.ends.tobytes() + verifiers).hexdigest()[:16]


def read_data(rows, text, cfg, show):
    """[train, eval, SFT] as Data, from {setting: Rows}; without rows to evaluate on, every k-th of the
    training rows is held back, so that both look alike, and without SFT rows the training rows serve."""
    train = rows["data"]
    held = rows.get("eval_data")
    if held is None:
        count = min(100, max(1, len(train) // 20))
        held = train[::len(train) // count][:count]
        back = set(map(id, held))
        train = [row for row in train if id(row) not in back]
    if not train:
        raise BadInput(f"{cfg.data}: one row is not enough, as some are held out; give --eval-data")
    bare = sum(row.rejected is None for row in train)
    if cfg.rejected == "data" and bare:
        raise BadInput(f"{cfg.data}: --rejected data, but {bare} rows have no rejected")
    data = [Data(train, text, cfg, "train", show), Data(held[:cfg.eval_rows], text, cfg, "eval", show)]
    data.append(Data(rows["sft_data"], text, cfg, "SFT", show) if "sft_data" in rows else data[0])
    if not min(map(len, data)):
        raise BadInput(f"{data[0].note}; {data[1].note}; nothing is left to use")
    return data


class Draw:
    """[1]: mini-batches of a Data without end, each epoch in a new order; a process gets its part of each.

    Batch b of all processes together is places b * batch_size ... of the endless sequence of epochs, so the
    position is one number, and no row is left out or seen twice within an epoch, however many processes.
    """

    def __init__(self, data, batch_size, seed, world):
        self.data, self.batch_size = data, batch_size
        self.seed, self.world = seed, world
        self.batch = 0

    def __call__(self, n):
        """The next n rows of this process, whole batches."""
        mine, rows = self.batch_size // self.world.size, []
        for _ in range(n // mine):
            first = self.batch * self.batch_size + self.world.rank * mine
            for place in range(first, first + mine):
                epoch, place = divmod(place, len(self.data))
                rows.append(self.data[self._order(epoch)[place]])
            self.batch += 1
        return rows

    @functools.lru_cache(maxsize=2)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
