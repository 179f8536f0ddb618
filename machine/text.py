"""A row as text and as token ids: rendered by the chat template, tokenised, proven to be what was written.

**How a row becomes (prompt ids, response ids)**, for any chat template:

* The prompt is what the model will be given at inference: the template's text of the turns before the answer,
  with the generation prompt.
* The response is the answer as the user wrote it, with what the template puts around it, up to and including
  the first end token after it. An end token that is typed at the answer's end is taken for that end.
* Both are tokenised as one text. A token that reaches over the border belongs to the response.

`Text.encode` proves of each row that what the user wrote stands in the prompt and the answer in the response,
and that one end token closes it. Leaves out the shapes of rows (rows.py), and truncation (dataset.py).
"""

import contextlib
import json
import re
import unicodedata
from itertools import islice
from operator import attrgetter
from os.path import commonprefix
from string import printable

from tokenizers import AddedToken, Tokenizer

from buffer import common_prefix
from machine.files import BadInput, parse_json
from machine.rows import Row
from machine.template import compile_template, find_template

MARK = {"role": "assistant", "content": "\ue000"}     # an answer that stands in no text
HERE = "\ue001\ue002"       # what is put behind a turn, to find it
MAX_TEXT = 10_000_000       # characters of one rendered conversation
MANNERS = ("single_word", "lstrip", "rstrip", "normalized", "special")       # of a token that is added
manner = attrgetter(*MANNERS)
MEANING = {"tools", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "documents",
           "weight", "train"}           # keys without which a row says something else
THOUGHTS = {"reasoning_content", "reasoning", "thinking"}        # which templates drop of earlier answers
BREAKS = {      # how the text of a token ends that ends a sentence, or a line
    "sentence": r"""([.!?\u2026\u3002\uff01\uff1f\uff0e]['")*\]\u2019\u201d\u300d\u300f\uff09]*\s*"""
                r"|\n\s*)\Z",
    "line": r"\n[^\S\n]*\Z"}


class Text:
    """Tokenizer and chat template of a checkpoint, from its companion files {name: bytes}.

    `eos` is the sorted tuple of ids that end an answer, `end` the one added where an answer has none.
    """

    def __init__(self, files, folder, config, template_file=""):
        self.files, self.template_file = files, template_file
        self.tokenizer = read_tokenizer(files, folder)
        self.settings = self._file("tokenizer_config.json", folder)
        self.special = self._name_tokens(folder)
        self.vocab = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if self.vocab > config.vocab_size:
            raise BadInput(f"{folder}: the tokenizer's ids go up to {self.vocab - 1}, the model has only "
                           f"{config.vocab_size}; resizing the vocabulary is not implemented, resize and "
                           "save the model first")
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.added = {i: token.content for i, token in added if token.special}
        self.bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        self.typed = _any_of(word for word in self.added.values() if len(word) > 1)
        bare, whole = self.ids(["a"])[0], self.ids(["a"], True)[0]
        self.head = whole[:next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)]
        self.source = find_template(files, self.settings, template_file)
        self.template = compile_template(self.source) if self.source else None
        self.complete = set()            # shapes of conversations of which the template drops no turn
        self._find_ends(config, folder)

    def _file(self, name, folder, files=None):
        """The object in a companion file; an empty one where there is no such file."""
        value = parse_json((files or self.files).get(name) or b"{}", f"{folder}/{name}")
        if not isinstance(value, dict):
            raise BadInput(f"{folder}/{name}: not a JSON object; copy it from where the model comes from")
        return value

    def _name_tokens(self, folder):
        """{"eos_token": text, ...} as transformers finds them; what is named becomes a token of its own."""
        declared = self.settings.get("added_tokens_decoder")
        if not isinstance(declared, dict):               # two older files say it where the first does not
            self.settings |= self._file("special_tokens_map.json", folder)
            added = self._file("added_tokens.json", folder)
            declared = {str(i): {"content": word} for word, i in added.items()}
        special = {}
        for key, value in self.settings.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str) and value:
                special[key] = value
        known = {token.content: manner(token) for token in self.tokenizer.get_added_tokens_decoder().values()}
        sound = {int(i): token for i, token in declared.items() if re.fullmatch("[0-9]{1,9}", i)
                 and isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]}
        for i, token in sorted(sound.items()):
            word, kept = token["content"], {key: bool(token[key]) for key in MANNERS if key in token}
            added = AddedToken(word, **kept)
            if self.tokenizer.token_to_id(word) is None or kept and known.get(word) != manner(added):
                self.tokenizer.add_tokens([added])
            if self.tokenizer.token_to_id(word) != i:
                raise BadInput(f"{folder}: the token {word!r} has id {i} in one file and "
                               f"{self.tokenizer.token_to_id(word)} in tokenizer.json")
        words = [word for key, word in special.items()
                 if key in ("bos_token", "eos_token") or self.tokenizer.token_to_id(word) is not None]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            found = self.settings.get(key)
            found = list(found.values()) if isinstance(found, dict) else found
            for word in found if isinstance(found, list) else ():
                words.append(word.get("content") if isinstance(word, dict) else word)
        added = self.tokenizer.get_added_tokens_decoder().values()
        known = {token.content for token in added if token.special}
        words = [word for word in words if isinstance(word, str) and word and word not in known]
        self.tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words])
        return special

    def _find_ends(self, config, folder):
        """The ids that end an answer: those that the files name, and the one the template writes after it.

        An ordinary token that a file names is a stale number as long as there is any other.
        """
        named = [self.tokenizer.token_to_id(self.special.get("eos_token", ""))]
        for source in (self._file("generation_config.json", folder), config.source):
            found = source.get("eos_token_id")
            named += found if isinstance(found, list) else [found]
        named = [i for i in named if type(i) is int and 0 <= i < self.vocab]
        words = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        ends = [i for i in named if i in words]
        if self.template:
            after = self._after(Row({"prompt": "a", "chosen": "b"}, folder))
            ends = [i for i in self.ids([after])[0] if i in self.added or i in ends][:1] + ends
        ends = ends or named
        if not ends:
            raise BadInput(f"{folder}: no end token: neither generation_config.json, config.json nor the "
                           "tokenizer names one")
        self.end, self.eos = ends[0], tuple(sorted(set(ends)))
        self.ends = _any_of(words[i] for i in self.eos if i in words)
        self.typed_ends = re.compile(rf"(?:(?:{self.ends.pattern})\s*)+\Z")

    def ids(self, texts, add_special_tokens=False):
        """Token ids of each text, in one call."""
        try:
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:   # the library raises bare Exception, its Rust not even that
            raise BadInput(f"the tokenizer fails on the data ({str(error)[:120]})") from None
        return [e.ids for e in encoded]

    def render(self, messages, add_generation_prompt=False, **more):
        """The chat text as transformers' apply_chat_template(tokenize=False) has it on 26 July 2024."""
        try:
            text = self.template.render(**self.special | {"tools": None, "documents": None} | more,
                                        messages=messages, add_generation_prompt=add_generation_prompt)
            text.encode()                # half a surrogate pair is a string, but it is not text
        except Exception as error:       # a template can raise anything at all
            reason = " ".join(str(error).split())[:160]
            raise BadInput(f"the chat template refuses a conversation of roles {_roles(messages)}: "
                           f"{type(error).__name__}: {reason}") from None
        if len(text) > MAX_TEXT:
            raise BadInput(f"the chat template makes {len(text):,} characters of one conversation; "
                           f"{MAX_TEXT:,} are read at most")
        return text

    # -- a row
    def encode(self, rows, remarks=None):
        """[(prompt ids, chosen ids, rejected ids or None)] of Rows, before truncation; each response ends in
        one end token. BadInput names a row that is not proven. With `remarks`, a Remarks, such a row is None
        there instead, and is refused later with all of its kind."""
        kept = Remarks() if remarks is None else remarks
        texts = [kept.attempt(row, self._texts, row, kept) or [] for row in rows]
        parts = [self._split(row, kept, *ids) if ids else []
                 for row, ids in zip(rows, grouped(self.ids, texts))]
        encoded = []
        for row, ids, said in zip(rows, parts, grouped(self._decode_batch, parts)):
            good = ids and kept.attempt(row, self._prove, row, ids, said, kept)
            encoded.append((*ids, None)[:3] if good else None)
        if remarks is None:
            kept.refuse()
        return encoded

    def _turns(self, row):
        return [{"role": "user", "content": row.turns}] if isinstance(row.turns, str) else row.turns

    def _texts(self, row, remarks):
        """[the prompt, the prompt with the answer, and perhaps with the worse one] as text."""
        answers = [row.chosen] + ([row.rejected] if row.rejected else [])
        if not self.template:
            if not isinstance(row.turns, str) or row.more:
                raise BadInput("the data are conversations, but the checkpoint has no chat template; give "
                               "one with --chat-template FILE")
            return [row.turns] + [row.turns + self._open(answer)["content"] for answer in answers]
        texts, opening = [], self.render(self._turns(row), True, **row.more)
        for answer in map(self._open, answers):
            start, reply = self._reply(row, answer, opening)
            self._all_used(row, answer, remarks)
            texts.append(opening + reply)
            if start != opening:
                remarks.add("the prompt is rendered otherwise alone than in the whole conversation, and is "
                            "trained as it is at inference", row, f"{opening[-60:]!r} is not {start[-60:]!r}")
        return [opening, *texts]

    def _open(self, answer):
        """An answer without the end tokens that are typed at its end."""
        return answer | {"content": self.typed_ends.sub("", answer["content"])}

    def _reply(self, row, answer, opening):
        """(what the whole conversation has for `opening`, what follows it up to and with the first end token
        after the answer's text)."""
        whole = self.render(self._turns(row) + [answer], **row.more)
        start, text = len(opening), answer["content"].strip()
        if not whole.startswith(opening):
            start = self._border(row, answer, opening, whole)
        place = whole.find(text, start)
        after = place + len(text) if place >= 0 else start
        end = self.ends.search(whole, after)
        reply = whole[start:end.end() if end else len(whole)]
        if not _holds(reply, text):
            raise BadInput(f"the chat template changes the answer: {_short(text)} became {_short(reply)}")
        behind = whole[end.end():].strip() if end else ""
        if behind and not self._after(row).rstrip().endswith(end[0] + whole[end.end():].rstrip()):
            raise BadInput("the chat template writes more of the answer behind its end token, "
                           f"{_short(behind)}; give another by --chat-template FILE")
        return whole[:start], reply

    def _after(self, row):
        """What the template writes after the text of any answer."""
        return self.render(self._turns(row) + [MARK], **row.more).rpartition(MARK["content"])[2]

    def _border(self, row, answer, opening, whole):
        """Where the answer begins in a conversation that does not begin with the prompt as it is rendered
        alone: behind the last turn's text and as much of what follows it as both have."""
        *turns, last = self._turns(row)
        if self.render([*turns, last], True, **row.more) != opening:
            raise BadInput("the chat template draws at random: it renders one row in several ways")
        turns.append(last | {"content": last["content"] + HERE})
        tails = [self.render(turns, True, **row.more)]
        tails += [self.render([*turns, said], **row.more) for said in (answer, MARK)]
        lost = not all(HERE in tail for tail in tails)
        tails = [tail.rpartition(HERE)[2] for tail in tails]
        if lost or not whole.endswith(tails[1]):
            raise BadInput("the chat template loses the last turn before the answer, "
                           f"{_short(last['content'])}")
        same = len(commonprefix(tails))
        start, rest = len(whole) - len(tails[1]) + same, tails[0][same:]
        before = whole[start:max(start, whole.find(answer["content"].strip(), start))]
        closes = re.match(r"\s*</(\w+)>", before)       # what the prompt has opened
        if closes and tails[0][:same].rstrip().endswith(f"<{closes[1]}>"):
            before = before[closes.end():]
        for tag in re.findall(r"</?(\w+)>", rest):
            if rest.count(f"<{tag}>") != rest.count(f"</{tag}>"):
                how = "closes" if f"</{tag}>" in rest else "opens"
                raise BadInput(f"the chat template {how} <{tag}> for the model to go on from, and renders "
                               "answers without it; give another by --chat-template FILE")
        if any(re.sub(r"(?s)<(\w+)>.*?</\1>", "", part).strip() for part in (rest, before)):
            raise BadInput(f"the chat template has {_short(rest)} for the model to go on from, and "
                           f"{_short(before)} before an answer; give another by --chat-template FILE")
        return start

    def _all_used(self, row, answer, remarks):
        """BadInput if the template drops a turn, though its text may stand elsewhere in the prompt, or makes
        nothing of a key that changes what the row means; another such key is remarked. Rows with the same
        roles and keys are rendered alike, so the first of them is asked about its turns for all."""
        def both(messages, more=row.more):
            try:
                return self.render(messages[:-1], True, **more), self.render(messages, **more)
            except BadInput:             # of a template that reads what is written
                return None, None

        def without(key, value):
            return {k: v for k, v in value.items() if k != key}

        messages = self._turns(row) + [answer]
        shape = (*row.more, *((m["role"], not m["content"].strip(), *sorted(m)) for m in messages))
        asks = [m["role"] != "assistant" and m["content"].strip() for m in messages[:-1]]
        marked = [m | {"content": f"\ue000{i}\ue001"} if asks[i] else m for i, m in enumerate(messages[:-1])]
        text = None if shape in self.complete else both([*marked, answer])[0]
        for turn, other in zip(messages, marked if text is not None else ()):
            if other is not turn and other["content"] not in text:
                raise BadInput(f"the chat template drops the turn {_short(turn['content'])}, role "
                               f"{turn['role'][:20]}")
        self.complete.add(shape)
        tried = []
        for key in sorted({key for message in messages for key in message} - {"role", "content"}):
            tried.append((key, [without(key, message) for message in messages], row.more))
        for key, less, more in tried + [(key, messages, without(key, row.more)) for key in row.more]:
            if both(messages) != both(less, more):
                continue
            if key in MEANING and (key in answer or key not in THOUGHTS):
                raise BadInput(f"the chat template does not write {key!r}; take it out of the data, or "
                               "give a template that writes it by --chat-template FILE")
            remarks.add(f"the chat template does not write the key {key!r}", row, _roles(messages))

    def _split(self, row, remarks, opening, *wholes):
        """[prompt ids, response ids, ...], each response with its end token."""
        if not self.template:
            opening, wholes = self.head + opening, [self.head + whole for whole in wholes]
        if not opening and self.bos is not None:         # an empty text begins with BOS
            opening, wholes = [self.bos], [[self.bos] + whole for whole in wholes]
        cut = min(common_prefix(opening, whole) for whole in wholes)
        if cut < len(opening):
            remarks.add("one token holds the prompt's end and the response's beginning, and is the latter's",
                        row, f"the prompt would have ended in {self.decode(opening[cut:])!r}")
        answers = [whole[cut:] for whole in wholes]
        ends = [[] if ids and ids[-1] in self.eos else [self.end] for ids in answers]
        return [opening[:cut]] + [ids + end for ids, end in zip(answers, ends)]

    def _prove(self, row, ids, texts, remarks):
        """True if the tokens say what the row says; BadInput otherwise."""
        answers = map(self._open, [row.chosen] + ([row.rejected] if row.rejected else []))
        turns = [turn["content"] for turn in self._turns(row) if turn["role"] != "assistant"]
        border = self.decode(ids[0] + ids[1][:8])        # tokens that reach over it hold the prompt's end
        pairs = [(turn, texts[0] if turn.strip() in texts[0] else border) for turn in turns]
        for turn in self._turns(row):
            if turn["role"] == "assistant" and not _holds(texts[0], self._open(turn)["content"].strip()):
                remarks.add("the chat template shortens earlier answers, or drops them", row,
                            _short(turn["content"]))
        for said, text in [*pairs, *zip((answer["content"] for answer in answers), texts[1:])]:
            said = said.strip()          # blanks at the ends, which most templates trim, are no loss
            switched = re.sub(r"/(no_think|think|system_override)\b", "", said).strip()        # SmolLM3
            if not any(_holds(text, form) for form in (said, in_json(said), switched)):
                raise BadInput(f"{_short(said)} is lost on its way into tokens: it became {_short(text)}")
            if said not in text:
                remarks.add("the chat template or the tokenizer changes blanks or forms of letters", row,
                            f"{_short(said)} became {_short(text)}")
        for answer, text in zip([row.chosen, row.rejected], texts[1:]):
            for said in _beside(answer):
                plain = in_json(said).replace("\\", "")
                if not _holds(text, said.strip()) and not _holds(text.replace("\\", ""), plain):
                    raise BadInput(f"{_short(said)} is lost on its way into tokens: it became {_short(text)}")
        said_where = [(turn, texts[0]) for turn in self._turns(row)]
        for message, text in [*said_where, *zip([row.chosen, row.rejected], texts[1:])]:
            for said in [call["arguments"] for call in _calls(message) if "arguments" in call]:
                if isinstance(said, str) and in_json(said) in text and said not in text:
                    raise BadInput("the chat template writes a call's arguments as a text within JSON, "
                                   f"{_short(said)}; store them as an object (json.loads)")
        for part, text in zip(ids[1:], texts[1:]):
            if not set(self.eos).isdisjoint(part[:-1]):
                raise BadInput(f"an end token stands inside the answer {_short(text)}; take it out")
        return True

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def _decode_batch(self, parts):
        return self.tokenizer.decode_batch(parts, skip_special_tokens=False)

    def breaks(self, segment):
        """The ids of tokens that end a sentence or a line; none for a segment that is neither."""
        if segment not in BREAKS:
            return frozenset()
        words = self._decode_batch([[i] for i in range(self.vocab)])
        return frozenset(i for i, word in enumerate(words) if re.search(BREAKS[segment], word))

    def exported(self):
        """({name: bytes}, [what was changed]): the companion files as they must stand beside the trained
        model, so that it is asked as it was trained, and stops where its answers ended."""
        files, notes = dict(self.files), []
        word = self.tokenizer.id_to_token(self.end)
        generation = self._file("generation_config.json", "")
        told = generation.get("eos_token_id")
        if not all(i in (told if isinstance(told, list) else [told]) for i in self.eos):
            ends = [self.end] + [i for i in self.eos if i != self.end]
            self._change(files, "generation_config.json", eos_token_id=ends)
            notes.append(f"generation_config.json ends an answer at {word}")
        if self.special.get("eos_token") != word and "eos_token" not in self.source:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                if name == "tokenizer_config.json" or name in files:
                    self._change(files, name, eos_token=word)
            notes.append(f"tokenizer_config.json's eos_token is {word}")
        if self.template_file:
            files["chat_template.jinja"] = self.source.encode()
            if "chat_template" in self.settings:
                self._change(files, "tokenizer_config.json", chat_template=None)
            notes.append(f"chat_template.jinja is {self.template_file}")
        return files, notes

    def _change(self, files, name, **values):
        """Set values of a JSON file; None removes one."""
        changed = self._file(name, "source", files) | values
        changed = {key: value for key, value in changed.items() if key not in values or value is not None}
        files[name] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


class Remarks:
    """What Text.encode found in rows: what it changed, by kind with an example, and what it had to refuse."""

    def __init__(self):
        self.seen, self.refused = {}, []                 # {sentence: [rows, the last row, example]}

    def add(self, sentence, row, example):
        entry = self.seen.setdefault(sentence, [0, None, f"{row.place}: {example}"])
        entry[0] += entry[1] is not row
        entry[1] = row

    def attempt(self, row, step, *args):
        """What a step makes of a row, or None if it refuses it."""
        try:
            return step(*args)
        except (BadInput, RecursionError) as error:
            self.refused.append(f"{row.place}: {error}")
            return None

    def refuse(self):
        if self.refused:
            others = len(self.refused) - 1
            more = f" ({others:,} other rows are refused as well)" if others else ""
            raise BadInput(self.refused[0] + more)

    def note(self):
        return "".join(f"; {n:,} rows: {what} ({example})" for what, (n, _, example) in self.seen.items())


def grouped(step, groups):
    """What `step`, a function of a list, makes of the items of all groups in one call, in groups again."""
    made = iter(step([item for group in groups for item in group]))
    return [list(islice(made, len(group))) for group in groups]


def _roles(messages):
    return [message["role"][:20] for message in messages][:6]


def _beside(answer):
    """The texts that an answer says beside its content: its thoughts, its calls' names and arguments."""
    texts = [answer[key] for key in sorted(MEANING & answer.keys()) if isinstance(answer[key], str)]
    for call in _calls(answer):
        texts += _strings([call.get("name"), call.get("arguments")])
    return texts


def _calls(message):
    """The calls of functions in a message, as objects."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [call for call in (call.get("function", call) for call in calls) if isinstance(call, dict)]


def in_json(text):
    """A text as it stands within JSON, where line ends and quotes are escaped."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _strings(value):
    """All texts within a JSON value, and within one that is a text of JSON, as arguments may be."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _any_of(words):
    """A pattern that finds any of the words, the longest first, and nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _holds(text, said):
    """Whether a text holds what was said, whatever its blanks and forms of letters."""
    if said in text:
        return True
    plain = ["".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in (text, said)]
    return plain[1] in plain[0]


def _short(text):
    return repr(text if len(text) <= 80 else f"{text[:40]} ... {text[-40:]}")


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
        grown = tokenizer.normalizer.normalize_str(printable) if tokenizer.normalizer else ""
        if len(grown) > 100 * len(printable):
            raise ValueError(f"its normalizer makes {len(grown):,} characters of {len(printable)}")
        if getattr(tokenizer.model, "dropout", None):
            raise ValueError("it has dropout: a text gets other tokens each time; set dropout to null")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:       # the library raises bare Exception, its Rust not even that
        raise BadInput(f"{folder}/tokenizer.json: not a tokenizer ({str(error)[:120]})") from None
