"""A pair's life: it waits in the replay buffer, is drawn, and becomes a row of a batch.

Holds `Pair`, `ReplayBuffer` ([5] and [6] of Algorithm 1) and `collate`, which lays pairs out as a
`Batch`. Leaves out models and files: a pair is plain data, the buffer's state is JSON and arrays.

Axes: n pairs, R rows, T tokens of a row, P shared prefix, S continuation, L tokens of one text.
"""

from collections import deque
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from losses import IGNORE


@dataclass(slots=True)
class Pair:
    """One triple (x, y+, y-) in token ids.

    A = chosen[:start], B = chosen[start:stop], B' = rejected[start:rejected_stop]. C, which is
    chosen[stop:], stands in y- too unless B' ended the answer. A pair that comes from the data
    (offline DPO, evaluation) has start = stop = rejected_stop = 0.
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
    """n pairs as rows. labels[:, t] is the token after ids[:, t], so that nobody else shifts."""
    ids: torch.Tensor           # (R, T) int64; R = n and T = P + 2S; not shared: R = sides * n
    positions: torch.Tensor     # (R, T) int64, each token's place in its own text
    labels: torch.Tensor        # (R, T) int64, IGNORE where nothing is scored
    scored: torch.Tensor        # (R, T) bool, labels that the preference compares, not NLL's alone
    seam: torch.Tensor          # (R, T) bool, scored labels in C, where both texts have C
    lengths: torch.Tensor       # (n, 3) int64: scored tokens of chosen, of rejected; NLL's tokens
    prefix: int                 # P, 0 where it is not shared
    texts: list                 # what it was laid out from

    def to(self, device):
        tensors = [t.to(device, non_blocking=True) for t in self[:6]]
        return Batch(*tensors, *self[6:])

    def some(self, rows):
        """The Batch of some of its pairs, for one with shared prefixes, without others' padding."""
        return lay_out([self.texts[i] for i in rows]).to(self.ids.device)


class Side(NamedTuple):
    """One text of a pair, prompt and response: its tokens and what each counts for, (L,) each."""
    ids: np.ndarray             # int64
    scored: np.ndarray          # bool: the preference compares it
    labelled: np.ndarray        # bool: that, or it is in the NLL
    seam: np.ndarray            # bool: scored, and C of both texts


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
        place, C = np.arange(len(ids)), x + stop                           # C: where it would begin
        scored = place >= (x if common else max(x, prefix + 1))
        if score_on == "segment":
            scored &= (place >= x + pair.start) & (place < C)
        labelled = scored.copy()
        if ids is chosen and nll_on:
            labelled[{"response": x, "prompt+response": 1}[nll_on]:] = True
        sides.append(Side(ids, scored, labelled, scored & pair.keeps_C & (place >= C)))
    return Texts(prefix, *sides)


def collate(pairs, share=True, score_on="response", common=True, nll_on=None, sides=2):
    """Pairs as one Batch.

    share: one row a pair, [prefix | chosen | rejected]. Without it, two plain rows a pair (first
    all chosen, then all rejected), or with sides=1 the chosen texts alone (fine-tuning).
    score_on: "response" or "segment" (B and B' only); common: whether tokens that both texts begin
    with are scored; nll_on: more labels for the chosen text, "response" or "prompt+response".
    """
    texts = [label(p, score_on, common, nll_on) for p in pairs]
    if share:
        return lay_out(texts)
    rows = [t.chosen for t in texts] + [t.rejected for t in texts if sides == 2]
    batch = _padding(texts, len(rows), max(len(row.ids) for row in rows) - 1, 0)
    for i, row in enumerate(rows):
        _place(batch, i, 0, row, 0, len(row.ids) - 1)
    return batch


def lay_out(texts):
    """One row for each pair's Texts: [P prefix | S chosen | S rejected], padded on the right."""
    P = max(1, *[t.prefix for t in texts])       # 1 column at least: all processes call alike
    S = max(max(len(t.chosen.ids), len(t.rejected.ids)) - 1 - t.prefix for t in texts)
    batch = _padding(texts, len(texts), P + 2 * S, P)
    for i, (p, chosen, rejected) in enumerate(texts):
        batch.positions[i, P:] = p + torch.arange(S).repeat(2)             # of padding as well
        _place(batch, i, 0, chosen, 0, p)
        _place(batch, i, P, chosen, p, len(chosen.ids) - 1)
        _place(batch, i, P + S, rejected, p, len(rejected.ids) - 1)
    return batch


def _padding(texts, rows, width, prefix):
    """A Batch of padding alone, to be written into."""
    ids, positions = torch.zeros(rows, width, dtype=torch.int64), torch.arange(width)
    nothing = torch.zeros(rows, width, dtype=torch.bool)
    lengths = []
    for t in texts:
        lengths.append([t.chosen.scored.sum(), t.rejected.scored.sum(), t.chosen.labelled.sum()])
    return Batch(ids, positions.repeat(rows, 1), torch.full_like(ids, IGNORE), nothing,
                 nothing.clone(), torch.tensor(np.array(lengths)), prefix, texts)


def _place(batch, row, column, text, start, stop):
    """Write tokens start:stop of a Side into a row from `column` on, each with its label."""
    here, after = slice(column, column + stop - start), slice(start + 1, stop + 1)
    labels = np.where(text.labelled[after], text.ids[after], IGNORE)
    for into, values in ((batch.ids, text.ids[start:stop]), (batch.labels, labels),
                         (batch.scored, text.scored[after]), (batch.seam, text.seam[after])):
        into[row, here] = torch.from_numpy(values)
