"""The replay buffer: pairs wait here, first in, first out, and are drawn at random ([5] and [6] of Algorithm 1).

Holds `Pair` and `ReplayBuffer`. Leaves out tensors, models and files: everything here is plain data, and the whole
state goes through JSON and integer arrays.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np


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
