"""Rows as token ids: truncated, counted, held out, and drawn in mini-batches ([1]). Leaves out text."""

import functools
import hashlib
import json
from array import array

import numpy as np
from tqdm import tqdm

from machine.files import BadInput
from machine.text import Remarks
from sapo import Example, stream


class Data:
    """Rows as token ids in two integer arrays, truncated; data[i] is an Example. verifiers: {i: verifier};
    places: file and line of each."""

    def __init__(self, rows, text, cfg, name, show=False):
        self.text, self.cfg = text, cfg
        self.flat, self.stops = array("i"), array("q")
        self.verifiers, self.places = {}, []
        self.counts = dict.fromkeys(("prompts", "responses", "dropped"), 0)
        remarks, quiet = Remarks(), not show or len(rows) < 5000
        for start in tqdm(range(0, len(rows), 1000), desc=f"tokenising {name}", disable=quiet, leave=False):
            part = rows[start:start + 1000]
            encoded = text.encode(part, remarks)
            if not start and text.encode(part[:20], Remarks()) != encoded[:20]:
                raise BadInput(f"{name}: the chat template draws at random: rows give other tokens each time")
            for row, ids in zip(part, encoded):
                if ids:
                    self._add(remarks, row, *ids)
        remarks.refuse()
        self.tokens = np.array(self.flat, np.int32)
        self.ends = np.array(self.stops, np.int64).reshape(-1, 3)
        del self.flat, self.stops
        n = self.counts
        self.note = (f"{name}: {len(self):,} rows, {len(self.tokens):,} tokens; {n['prompts']} prompts cut "
                     f"on the left, {n['responses']} responses cut on the right, {n['dropped']} rows dropped "
                     "as nothing of the response was left" + remarks.note())
        if n["dropped"] > len(rows) / 2:
            raise BadInput(f"{self.note}; raise --max-length or lower --max-prompt-length")

    def _add(self, remarks, row, prompt, chosen, rejected):
        """Truncate a row: the prompt loses its left end (BOS stays), then the response its right end."""
        text, cfg = self.text, self.cfg
        words = [row.turns] if isinstance(row.turns, str) else [m["content"] for m in row.turns]
        words += [answer["content"] for answer in (row.chosen, row.rejected) if answer]
        for typed in filter(None, map(text.typed.search, words)):
            remarks.add("special tokens are typed in the text, and the model reads them as real", row,
                        repr(typed[0]))
        if len(prompt) > cfg.max_prompt_length:
            head = prompt[:1] if prompt[0] == text.bos else []
            prompt = head + prompt[len(prompt) - cfg.max_prompt_length + len(head):]
            self.counts["prompts"] += 1
        room = cfg.max_length - len(prompt)
        chosen, rejected = chosen[:room], rejected and rejected[:room]
        self.counts["responses"] += 0 < len(chosen) == room and chosen[-1] not in text.eos
        if rejected and len(rejected) == room and rejected[-1] not in text.eos:
            remarks.add("the rejected response is cut on the right", row, f"to {room} tokens")
        if not prompt or not chosen or chosen[0] in text.eos:
            self.counts["dropped"] += 1       # nothing to learn from, or nothing before the response
            return
        if row.verifier is not None:
            self.verifiers[len(self.stops) // 3] = row.verifier
        self.places.append(row.place)
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
    return data


class Draw:
    """[1]: mini-batches of a Data without end, each epoch in a new order; a process gets its part of each.

    Batch b of all processes together is places b * batch_size ... of the endless sequence of epochs, so the
    position is one number, and no row is left out or seen twice within an epoch, however many processes.
    """

    def __init__(self, data, batch_size, seed, world, purpose="order"):
        self.data, self.batch_size = data, batch_size
        self.world, self.stream = world, functools.partial(stream, seed, purpose)
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
        return np.random.default_rng(self.stream(epoch)).permutation(len(self.data))
