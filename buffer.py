"""A pair's life: it waits in the replay buffer, is drawn, and becomes a part of a batch.

Holds `Pair`, `ReplayBuffer` ([5] and [6] of Algorithm 1) and `collate`, which lays pairs out as a
`Batch`. Leaves out models and files: a pair is plain data, the buffer's state is JSON and arrays.

Axes: n pairs, N tokens of a batch, R texts, L tokens of a text.
"""

from collections import deque
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from losses import IGNORE


@dataclass(slots=True)
class Pair:
    """One triple (x, y+, y-) in token ids.

    A = chosen[:start], B = chosen[start:stop], B' = rejected[start:rejected_stop]. C, which is
    chosen[stop:], stands in y- too unless B' ended the answer. A pair whose y- comes
    from the data (offline DPO) has start = stop = rejected_stop = 0.
    """
    prompt: list            # x
    chosen: list            # y+ = A + B + C
    rejected: list          # y- = A + B' + C, or A + B' where B' ended the answer
    start: int = 0
    stop: int = 0
    rejected_stop: int = 0  # where B' stops in y-
    row: int = -1           # which row of the data x came from
    step: int = 0           # the step for which y- was generated
    uses: int = 0           # how often the pair was drawn
    ref_chosen: float = 0.0     # the reference's summed log-probs of y+ and y- ...
    ref_rejected: float = 0.0
    ref_version: int = -1       # ... and which reference that was; -1: none yet

    @property
    def keeps_C(self):
        """Whether y- goes on with C after B'."""
        return 0 < self.rejected_stop < len(self.rejected)


# ------------------------------------------------------------------- the buffer
class ReplayBuffer:
    """A queue of at most `capacity` pairs; the oldest leaves. It owns the random numbers of draws.

    replay "uniform": all pairs are equally likely; "inverse-count": with weight 1 / (uses + 1), as
    the authors' code has it. Either way no pair comes twice in one draw.
    """

    def __init__(self, capacity, seed=0, replay="uniform"):
        if capacity < 1 or replay not in ("uniform", "inverse-count"):
            raise ValueError(f"capacity {capacity}, replay {replay!r}: choose at least 1 pair, and "
                             "uniform or inverse-count")
        self.pairs = deque(maxlen=capacity)
        self.replay, self.rng = replay, np.random.default_rng(seed)

    def __len__(self):
        return len(self.pairs)

    def add(self, pair):
        """Append one pair; when the buffer is full the oldest pair leaves."""
        self.pairs.append(pair)

    def sample(self, n):
        """n different pairs, whose `uses` go up by one. ValueError if the buffer holds fewer."""
        if n > len(self):
            raise ValueError(f"{n} pairs asked of a buffer that holds {len(self)}")
        weights = None
        if self.replay == "inverse-count":
            weights = 1.0 / (1.0 + np.array([p.uses for p in self.pairs], float))
            weights /= weights.sum()
        drawn = [self.pairs[i] for i in self.rng.choice(len(self), n, replace=False, p=weights)]
        for pair in drawn:
            pair.uses += 1
        return drawn

    def state_dict(self):
        """Capacity, generator and pairs; `load_state_dict` continues the same draws."""
        return {"capacity": self.pairs.maxlen, "rng": self.rng.bit_generator.state,
                "pairs": pack(self.pairs)}

    def load_state_dict(self, state):
        self.pairs = deque(unpack(state["pairs"]), maxlen=state["capacity"])
        self.rng.bit_generator.state = state["rng"]


TOKENS = ("prompt", "chosen", "rejected")
COUNTS = ("start", "stop", "rejected_stop", "row", "step", "uses", "ref_version")
FLOATS = ("ref_chosen", "ref_rejected")


def pack(pairs):
    """Pairs as arrays: tokens one by one (int32), lengths (n, 3), counts (n, 7), floats (n, 2)."""
    pairs = list(pairs)
    lists = [getattr(p, name) for p in pairs for name in TOKENS]

    def table(rows, names, dtype):
        return np.array(list(rows), dtype).reshape(-1, len(names))

    tokens = np.fromiter(chain.from_iterable(lists), np.int32, sum(map(len, lists)))
    return {"tokens": tokens,
            "lengths": table(map(len, lists), TOKENS, np.int64),
            "counts": table(map(attrgetter(*COUNTS), pairs), COUNTS, np.int64),
            "floats": table(map(attrgetter(*FLOATS), pairs), FLOATS, np.float64)}


def unpack(arrays):
    """The pairs that `pack` took apart."""
    pairs, at = [], 0
    for lengths, counts, floats in zip(arrays["lengths"], arrays["counts"], arrays["floats"]):
        tokens = np.split(arrays["tokens"][at:at + lengths.sum()], np.cumsum(lengths)[:-1])
        at += lengths.sum()
        pairs.append(Pair(*[t.tolist() for t in tokens], **dict(zip(COUNTS, counts.tolist())),
                          **dict(zip(FLOATS, floats.tolist()))))
    return pairs


# ---------------------------------------------------------------------- a batch
class Batch(NamedTuple):
    """n pairs as one stream of tokens: for each, y+ and then the part of y- that is not shared.

        place     0  1  2  3  4  5  6  7  8  9
        ids       x  x  A  B  B  C  A  B' B' C
        labels    .  A  B  B  C  C  B' B' C  C      the next token: shifted here, nowhere else
        rows      0  1  2  3  4  5                  y+
                  0  1              6  7  8  9      y-

    The last token of a text is only a label. The token before the first difference is there
    twice, since two tokens come after it.
    """
    ids: torch.Tensor           # (N,) int64
    labels: torch.Tensor        # (N,) int64, IGNORE where nothing is scored
    scored: torch.Tensor        # (N,) bool, labels that the preference compares, not NLL's alone
    seam: torch.Tensor          # (N,) bool, scored labels in C, where both texts have C
    rows: torch.Tensor          # (R, L) int64: all y+, then all y-; -1 behind the end of a text
    lengths: torch.Tensor       # (n, 3) int64: scored tokens of chosen, of rejected; NLL's tokens
    texts: list                 # what it was laid out from

    def to(self, device):
        return Batch(*[t.to(device, non_blocking=True) for t in self[:-1]], self.texts)

    def some(self, pairs):
        """The Batch of some of its pairs, for one with shared prefixes."""
        return lay_out([self.texts[i] for i in pairs]).to(self.ids.device)


class Side(NamedTuple):
    """One text of a pair, prompt and response, as a Batch has it: (L,) each."""
    ids: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    seam: np.ndarray


class Texts(NamedTuple):
    """Both texts of a pair, and the length of the prefix they share: their common beginning without
    the token that opens both continuations, each of which must keep a token and a label."""
    prefix: int
    chosen: Side
    rejected: Side


def common_prefix(a, b):
    """Length of the longest common prefix of two sequences of ids."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if len(differ) else n


def label(pair, score_on, common, nll_on):
    """The Texts of a Pair; the options are those of `collate`."""
    x = len(pair.prompt)
    chosen = np.array(pair.prompt + pair.chosen, np.int64)                 # (L,)
    rejected = np.array(pair.prompt + pair.rejected, np.int64)             # (L,)
    prefix = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1) - 1
    sides = []
    for ids, stop in ((chosen, pair.stop), (rejected, pair.rejected_stop)):
        place, C = np.arange(1, len(ids)), x + stop       # of each label; where C would begin
        scored = place >= (x if common else max(x, prefix + 1))
        if score_on == "segment":
            scored &= (place >= x + pair.start) & (place < C)
        wanted = scored
        if ids is chosen and nll_on:
            wanted = scored | (place >= {"response": x, "prompt+response": 1}[nll_on])
        seam = scored & pair.keeps_C & (place >= C)
        sides.append(Side(ids[:-1], np.where(wanted, ids[1:], IGNORE), scored, seam))
    return Texts(prefix, *sides)


def collate(pairs, share=True, score_on="response", common=True, nll_on=None, sides=2):
    """Pairs as one Batch.

    share: the common beginning of a pair's texts stands in the stream once. Without it both texts
    are there in full, or with sides=1 only the chosen ones (fine-tuning).
    score_on: "response" or "segment" (B and B' only); common: whether tokens that both texts begin
    with are scored; nll_on: more labels for the chosen text, "response" or "prompt+response".
    """
    if not all(p.prompt for p in pairs):
        raise ValueError("a pair needs at least one token of prompt (BOS for an empty text)")
    return lay_out([label(p, score_on, common, nll_on) for p in pairs], share, sides)


def lay_out(texts, share=True, sides=2):
    """The Batch of pairs' Texts."""
    stream, n = [], 0                            # what each text adds to it; tokens so far
    rows, lengths = ([], []), []
    for prefix, chosen, rejected in texts:
        row = torch.arange(0)
        for side, text in enumerate((chosen, rejected)[:sides]):
            shared = row[:prefix if share else 0]                          # nothing yet for y+
            own = [part[len(shared):] for part in text]
            row = torch.cat((shared, torch.arange(n, n + len(own[0]))))    # (L,)
            rows[side].append(row)
            stream.append(own)
            n += len(own[0])
        labels = chosen.labels != IGNORE
        lengths.append([chosen.scored.sum(), rejected.scored.sum(), labels.sum()])
    ids_to_seam = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*stream)]
    return Batch(*ids_to_seam, pad_sequence([*rows[0], *rows[1]], True, -1),
                 torch.tensor(np.array(lengths)), texts)
