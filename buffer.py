"""The replay buffer: pairs wait here, first in, first out, and are drawn at random ([5] and [6] of Algorithm 1).

Holds `Pair` and `ReplayBuffer`. Leaves out tensors, models and files: everything here is plain data, and the whole
state goes through JSON and integer arrays.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from losses import IGNORE


@dataclass(slots=True)
class Pair:
    """One triple (x, y+, y-) in token ids. B = chosen[start:stop], B' = rejected[start:rejected_stop].

    A = chosen[:start]; C = chosen[stop:], and it stands in y- too unless B' ended the answer. A pair that comes from
    the data (offline DPO, evaluation) has start = stop = 0 and rejected_stop = 0.
    """
    prompt: list            # x
    chosen: list            # y+ = A + B + C
    rejected: list          # y- = A + B' + C
    start: int = 0
    stop: int = 0
    rejected_stop: int = 0
    row: int = -1           # which row of the data x came from
    step: int = 0           # the step for which y- was written
    uses: int = 0           # how often the pair was drawn
    ref_chosen: float = 0.0     # the reference's summed log-probs of y+ and y- ...
    ref_rejected: float = 0.0
    ref_version: int = -1       # ... and which reference that was; -1: none yet
TOKENS = ("prompt", "chosen", "rejected")
COUNTS = ("start", "stop", "rejected_stop", "row", "step", "uses", "ref_version")
FLOATS = ("ref_chosen", "ref_rejected")



def pack(pairs):
    """Pairs as four arrays: tokens (all of them in a row, int32), lengths (n, 3), counts (n, 7), floats (n, 2)."""
    pairs = list(pairs)
    table = lambda names, dtype: np.array([[getattr(p, k) for k in names] for p in pairs], dtype).reshape(-1, len(names))
    lists = [getattr(p, k) for p in pairs for k in TOKENS]
    return {"tokens": np.fromiter((t for x in lists for t in x), np.int32, sum(map(len, lists))),
            "lengths": np.array([len(x) for x in lists], np.int64).reshape(-1, len(TOKENS)),
            "counts": table(COUNTS, np.int64), "floats": table(FLOATS, np.float64)}



def unpack(arrays):
    """The pairs that `pack` took apart."""
    ends = np.cumsum(arrays["lengths"].reshape(-1))
    lists = [x.tolist() for x in np.split(arrays["tokens"], ends[:-1])] if len(ends) else []
    rows = zip(arrays["counts"].tolist(), arrays["floats"].tolist())
    return [Pair(*lists[3 * i:3 * i + 3], **dict(zip(COUNTS, counts)), **dict(zip(FLOATS, floats)))
            for i, (counts, floats) in enumerate(rows)]



class ReplayBuffer:
    """A queue of at most `capacity` pairs; the oldest leaves. Draws come from its own generator, seeded by `seed`.

    replay "uniform": every pair is as likely; "inverse-count": with weight 1 / (uses + 1), as the authors' code has it.
    Either way no pair comes twice in one draw.
    """

    def __init__(self, capacity, seed=0, replay="uniform"):
        if capacity < 1:
            raise ValueError(f"the buffer's capacity is {capacity}; it must be at least 1")
        if replay not in ("uniform", "inverse-count"):
            raise ValueError(f"replay is {replay!r}; choose uniform or inverse-count")
        self.pairs, self.replay, self.rng = deque(maxlen=capacity), replay, np.random.default_rng(seed)

    def __len__(self):
        return len(self.pairs)

    def add(self, pair):
        """Append one pair; when the buffer is full the oldest pair leaves."""
        self.pairs.append(pair)

    def sample(self, n):
        """n different pairs, and one more use noted on each. ValueError if there are fewer."""
        if n > len(self):
            raise ValueError(f"{n} pairs asked of a buffer that holds {len(self)}")
        weights = None
        if self.replay == "inverse-count":
            weights = 1.0 / (1.0 + np.fromiter((p.uses for p in self.pairs), float, len(self)))
            weights /= weights.sum()
        drawn = [self.pairs[i] for i in self.rng.choice(len(self), n, replace=False, p=weights)]
        for pair in drawn:
            pair.uses += 1
        return drawn

    def state_dict(self):
        """Capacity, generator and pairs; `load_state_dict` continues the same draws."""
        return {"capacity": self.pairs.maxlen, "rng": self.rng.bit_generator.state, "pairs": pack(self.pairs)}

    def load_state_dict(self, state):
        self.pairs = deque(unpack(state["pairs"]), maxlen=state["capacity"])
        self.rng.bit_generator.state = state["rng"]



class Batch(NamedTuple):
    """n pairs as rows. Labels are shifted here, once in the project: labels[:, t] is the token after ids[:, t]."""
    ids: torch.Tensor           # (R, T) int64; R = n and T = P + 2S, or R = 2n where the trunk is not shared
    positions: torch.Tensor     # (R, T) int64, each token's place in its own text
    labels: torch.Tensor        # (R, T) int64, IGNORE where nothing is scored
    scored: torch.Tensor        # (R, T) bool, the labels that the preference compares; the others are for the NLL
    seam: torch.Tensor          # (R, T) bool, those of the scored labels that are C, where both texts have it
    trunk: int                  # P, 0 where it is not shared
    lengths: torch.Tensor       # (n, 3) int64: scored tokens of chosen, of rejected; tokens of the NLL

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) if isinstance(t, torch.Tensor) else t for t in self))



def collate(pairs, share=True, score_on="response", common=True, nll_on=None, sides=2):
    """Pairs as one Batch.

    share: one row a pair, [trunk | chosen | rejected], the trunk being all that both texts have in common except the
    last common token, which opens both branches, so that each label is a plain shift. Without it, two plain rows a
    pair (first all chosen, then all rejected), or with sides=1 the chosen texts alone (supervised fine-tuning).
    score_on: "response" or "segment" (B and B' only); common: count tokens of the trunk too; nll_on: further labels
    for the chosen text, "response" or "prompt+response".
    """
    texts, trunks = [], []
    for p in pairs:
        x = len(p.prompt)
        chosen, rejected = (np.array(p.prompt + y, np.int64) for y in (p.chosen, p.rejected))
        both = min(len(chosen), len(rejected))
        differ = np.flatnonzero(chosen[:both] != rejected[:both])
        trunks.append(min(differ[0] if len(differ) else both, both - 1) - 1)     # each branch keeps a token and a label
        whole = score_on == "response"
        spans = [(x, len(chosen)), (x, len(rejected))] if whole else [(x + p.start, x + p.stop), (x + p.start, x + p.rejected_stop)]
        followed = 0 < p.rejected_stop < len(p.rejected)                         # C stands in both
        for text, (start, stop), C in zip((chosen, rejected), spans, (p.stop, p.rejected_stop)):
            counted = np.zeros(len(text), bool)          # tokens the preference compares
            counted[max(start, 0 if common else trunks[-1] + 1):stop] = True
            labelled = counted.copy()                    # and those of the NLL
            if text is chosen and nll_on:
                labelled[{"response": x, "prompt+response": 1}[nll_on]:] = True
            after = counted & followed & (np.arange(len(text)) >= x + C)
            texts.append((text, counted, labelled, after))

    lengths = np.array([[c[1].sum(), r[1].sum(), c[2].sum()] for c, r in zip(texts[::2], texts[1::2])])
    P = max(1, *trunks) if share else 0                  # at least one column, so that all processes make the same calls
    if share:
        S = max(len(text) - 1 - trunks[i // 2] for i, (text, *_) in enumerate(texts))
        blocks = [[(texts[2 * i], 0, t, 0), (texts[2 * i], t, None, P), (texts[2 * i + 1], t, None, P + S)] for i, t in enumerate(trunks)]
        width = P + 2 * S
    else:
        blocks = [[(text, 0, None, 0)] for text in texts[::2] + (texts[1::2] if sides == 2 else [])]
        width = max(len(block[0][0][0]) for block in blocks) - 1
    ids, labels = np.zeros((len(blocks), width), np.int64), np.full((len(blocks), width), IGNORE)
    positions, (scored, seam) = np.tile(np.arange(width), (len(blocks), 1)), np.zeros((2, len(blocks), width), bool)
    for row, pieces in enumerate(blocks):
        if share:                                        # padding counts on from the trunk's length as well
            positions[row, P:] = trunks[row] + np.tile(np.arange(S), 2)
        for (text, counted, labelled, after), start, stop, column in pieces:
            stop = len(text) - 1 if stop is None else stop
            at, following = slice(column, column + stop - start), slice(start + 1, stop + 1)
            ids[row, at], scored[row, at], seam[row, at] = text[start:stop], counted[following], after[following]
            labels[row, at] = np.where(labelled[following], text[following], IGNORE)
    return Batch(*map(torch.from_numpy, (ids, positions, labels, scored, seam)), int(P), torch.from_numpy(lengths))
