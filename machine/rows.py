"""Data files and their rows: what people have becomes a `Row`, or one line says how to make it one.

A Row is a conversation or a plain prompt, with its answer, as the user wrote it. Leaves out tokens (text.py).
"""

import gzip
import json
import re
import zlib
from contextlib import suppress
from pathlib import Path

from machine.files import BadInput, parse_json, paths_of

MAX_LINE = 10_000_000       # bytes of one data line
NEED = "a row needs prompt and chosen (or completion), or messages"
RECIPE = ("convert it once: python -c \"from datasets import load_dataset; "
          "load_dataset({source}, split='train'){steps}.to_json({to})\"")
KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".zst": "json", ".xz": "json"}
SHAPES = (      # the columns of what is not read, its name, and how the datasets library makes rows of it
    ({"conversations"}, "ShareGPT", ".map(lambda r: {'messages': [{'role': {'human': 'user', 'gpt': "
     "'assistant'}.get(m.get('from'), m.get('role', m.get('from'))), 'content': m.get('value', "
     "m.get('content'))} for m in r['conversations']]}).select_columns(['messages'])"),
    ({"instruction", "output"}, "Alpaca", ".map(lambda r: {'prompt': '\\n\\n'.join(filter(None, "
     "[r['instruction'], r.get('input')])), 'chosen': r['output']}).select_columns(['prompt', 'chosen'])"),
    ({"prompt", "completion", "label"}, "KTO",
     ".filter(lambda r: r['label']).select_columns(['prompt', 'completion'])"),
    ({"chosen", "rejected"}, "hh-rlhf", ".map(lambda r: {'messages': [{'role': ('user', 'assistant')[i % 2], "
     "'content': t} for i, t in enumerate(__import__('re').split('\\n\\n(?:Human|Assistant): ', "
     "r['chosen'])[1:])]}).select_columns(['messages'])"))
ELSEWHERE = {   # columns that change what a row means, and where that belongs
    "system": "put it into the messages, as a first one of role system",
    "weight": "rows are not weighed; repeat or remove them",
    "function_call": "put it into a message", "tool_calls": "put it into a message",
    "reasoning_content": "put it into a message"}
ROLE_WORDS = r"\W|_|user|assistant|system|human|im_start|im_end|inst"


class Row:
    """One data row, checked. turns: the messages before the answer, or a plain prompt; chosen, rejected: the
    answer and perhaps a worse one, each a message, {"role": "assistant", "content": str, ...}; more: what
    else the chat template is given, such as tools; verifier: {"must": [words], "must_not": [words]} or None;
    place: file and line."""
    __slots__ = ("turns", "chosen", "rejected", "more", "verifier", "place")

    def __init__(self, raw, place):
        self.place = place
        self.need(isinstance(raw, dict),
                  'not a JSON object; each line must be one, such as {"prompt": ..., "chosen": ...}')
        raw = {key: value for key, value in raw.items() if value is not None}
        for key, cure in ELSEWHERE.items():
            self.need(raw.get(key) in (None, "", []), f"the column {key} would be lost; {cure}")
        for columns, name, steps in SHAPES:
            if columns <= set(raw) and (name != "hh-rlhf" or str(raw["chosen"]).startswith("\n\nHuman:")):
                file = re.sub(r", (line|row) \d+$", "", str(place))
                recipe = recipe_for(file, "json", steps)
                lost = {"rejected", "tools", "history", "verifier", "judge", "chat_template_kwargs"}
                lost = sorted(lost & set(raw))
                lost = f", which drops {', '.join(lost)}" if lost else ""
                raise BadInput(f"{place}: columns {str(sorted(raw))[:80]} are {name}'s{lost}; {recipe}")
        self.more = {"tools": raw["tools"]} if raw.get("tools") else {}
        self.need(isinstance(raw.get("tools", []), list), "tools must be a list, not a text that holds one")
        kwargs = raw.get("chat_template_kwargs", {})
        self.need(isinstance(kwargs, dict), "chat_template_kwargs must be an object")
        for key in ("messages", "tools", "add_generation_prompt", "self"):
            self.need(key not in kwargs, f"chat_template_kwargs cannot hold {key}")
        self.more |= {key: value for key, value in kwargs.items() if value is not None}
        self.turns, self.chosen = self._conversation(raw)
        self.rejected = self._answer(raw["rejected"], "rejected") if "rejected" in raw else None
        self.verifier = raw.get("verifier", raw.get("judge"))              # `judge` is an older name
        if isinstance(self.verifier, dict):              # datasets fills in null
            self.verifier = {key: words for key, words in self.verifier.items() if words is not None}
        self.need(self.verifier is None or _is_verifier(self.verifier),
                  'verifier must be {"must": [words], "must_not": [words]}')

    def need(self, good, what):
        if not good:
            raise BadInput(f"{self.place}: {what}")

    def _conversation(self, raw):
        """(turns, the chosen answer). As TRL has it, a conversation is whole in `messages` or `chosen`, or
        begins in `prompt` and ends in `chosen` or `completion`."""
        key = next((key for key in ("chosen", "completion", "messages") if key in raw), None)
        prompt, answer = raw.get("prompt"), raw.get(key)
        self.need(key, f"columns {str(sorted(raw))[:80]}: {NEED}; datasets' rename_column renames one")
        for text in (prompt, answer):
            self.need(type(text) is not str or not _is_packed(text),
                      "a list of messages is stored as a text; decode it once with json.loads")
        if type(prompt) not in (str, type(None)):
            prompt = self._messages(prompt, "prompt")
            self.need(prompt[-1]["role"] != "assistant",
                      "prompt ends in an assistant's message, which would be closed; put it into the answer")
        if type(answer) is str and key != "messages":
            self.need("prompt" in raw, f"prompt is missing; {NEED}")
            return prompt, self._answer(answer, key)
        whole = self._messages(answer, key)
        if type(prompt) is list and whole[:len(prompt)] != prompt:
            self.need(whole[0]["role"] == "assistant",
                      f"{key} begins neither with prompt nor with an answer to it")
            self.need(len(whole) == 1 or "rejected" not in raw,
                      f"{key} has several messages; with a rejected one, put all but the last into prompt")
            whole = prompt + whole
        elif type(prompt) is str and whole[0]["role"] == "assistant":
            whole = [{"role": "user", "content": prompt}] + whole
        elif type(prompt) is str:
            self._nothing_more(prompt, whole)
        self.need(len(whole) > 1, "a conversation needs a message before the assistant's answer")
        return whole[:-1], self._last(whole, key)

    def _nothing_more(self, prompt, messages):
        """A prompt beside a whole conversation may repeat turns of it, and say nothing else."""
        for message in sorted(messages, key=lambda m: -len(m.get("content", ""))):
            prompt = prompt.replace(message.get("content", "").strip() or "\0", "")
        self.need(not re.sub(ROLE_WORDS, "", prompt.lower()),
                  "prompt says what the conversation beside it does not; put it there, or drop it")

    def _messages(self, value, key):
        """A list of messages, each without what is null."""
        self.need(type(value) is list and value, f"{key} must be a text or a list of messages; {NEED}")
        messages = []
        for message in value:
            self.need(isinstance(message, dict) and type(message.get("role")) is str,
                      f"each message in {key} needs a role and a content, both text")
            message = {name: part for name, part in message.items() if part is not None and part != []}
            self.need(type(message.get("content", "")) is str and ("content" in message or len(message) > 1),
                      f"each message in {key} needs a role and a content, both text")
            message.setdefault("content", "")
            messages.append(message)
        return messages

    def _answer(self, value, key):
        """The answer as a message, of a text or of a list whose beginning is the conversation's."""
        if type(value) is str:
            value = [{"role": "assistant", "content": value}]
        messages = self._messages(value, key)
        if len(messages) > 1:
            self.need(messages[:-1] == self.turns, f"{key} has another history than chosen")
        return self._last(messages, key)

    def _last(self, messages, key):
        """The last of some messages, which must be an answer."""
        self.need(messages[-1]["role"] == "assistant", f"the last message in {key} must be the assistant's")
        self.need(messages[-1]["content"].strip() or len(messages[-1]) > 2, f"the {key} response is empty")
        return messages[-1]


def recipe_for(name, kind="", steps=""):
    """The command that converts a file of a kind, or a data set of the hub, into a file of another name."""
    source, to = map(_in_command, (name, f"{Path(name).name.partition('.')[0]}.converted.jsonl"))
    source = f"'{kind}', data_files={source}" if kind else source
    return RECIPE.format(source=source, steps=steps, to=to)


def _in_command(name):
    """A name as Python text within a shell's double quotes, where neither reads anything else into it."""
    return "'" + re.sub(r"(?=[\0-\x7f])[^\w ./:@-]", lambda m: f"\\x{ord(m[0]):02x}", str(name)) + "'"


def _is_packed(text):
    """Whether a text is a list of messages in JSON."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text) if text.lstrip().startswith("[") else []
        return bool(value) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    return False


def _is_verifier(value):
    lists = isinstance(value, dict) and all(isinstance(words, list) for words in value.values())
    return (lists and set(value) <= {"must", "must_not"}
            and all(isinstance(word, str) and word for words in value.values() for word in words))


# ---------------------------------------------------------------------------------- files
def read_rows(where):
    """The Rows of a file of JSON lines or of a JSON list, perhaps in gzip; of a folder of such files; or of
    several, separated by commas. BadInput names file and line of a bad row."""
    rows = []
    for path in map(Path, paths_of(str(where))):
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if re.search(r"\.jsonl?(\.gz)?$", p.name))
            files = files or sorted(p for p in path.iterdir() if p.suffix in KINDS)
            if not files:
                raise BadInput(f"{path}: no .jsonl or .json file in it")
        for file in files:
            rows += _rows_of(file)
    return rows


def _rows_of(path):
    if path.suffix in KINDS:
        raise BadInput(f"{path}: only JSON lines are read; {recipe_for(path, KINDS[path.suffix])}")
    if not path.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix
        recipe = f"; if it is a data set of the hub, {recipe_for(path)}" if hub else ""
        raise BadInput(f"{path}: no such file{recipe}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            rows = [Row(raw, place) for raw, place in _values(file, path)]
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


def _values(file, path):
    """(value, its place) for each JSON line of a file, or for each row of the JSON list that it is."""
    number = rows = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        place = f"{path}, line {number}"
        if not rows and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            for row, raw in enumerate(parse_json(line + file.read(), path, _object), 1):
                yield raw, f"{path}, row {row}"
            return
        if len(line) > MAX_LINE:
            raise BadInput(f"{place}: longer than {MAX_LINE:,} bytes; is this a file of JSON lines?")
        if line.strip():
            rows += 1
            yield parse_json(line, place, _object), place


def _object(pairs):
    """A JSON object in which no key stands twice: of two values one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in {str(found)[:80]}")
    return found
