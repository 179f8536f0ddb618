"""Seven pieces of SAPO to write yourself. Each docstring is a promise, and every way to keep it is right.

    python tools/exercises.py           copies this file to runs/exercises.py; from then on it marks what you write there

Tokens are ids, that is whole numbers; texts are lists of them. Add imports and functions of your own as you like.
"""

import torch


def split(chosen, length, eos, rng):
    """[2], (start, stop) of B = chosen[start:stop] in y+.

    B has `length` tokens; where y+ has no more than that, it is rewritten whole. A token of `eos` that closes y+ is never
    in B, but a truncated y+ has none. All legal cuts are equally likely. rng: a numpy Generator, the only source of
    chance. `chosen` is left as it is.
    """
    raise NotImplementedError


def splice(chosen, start, stop, new, eos):
    """[4], y- = A + B' + C, where B = chosen[start:stop] and B' = new. Where B' ends with a token of `eos` the answer is
    over, and y- is A + B'. `chosen` and `new` are left as they are."""
    raise NotImplementedError


class Queue:
    """[5] and [6], the buffer: at most `capacity` pairs, of which the oldest leaves when one more is added."""

    def __init__(self, capacity):
        raise NotImplementedError

    def __len__(self):
        raise NotImplementedError

    def add(self, pair):
        raise NotImplementedError

    def sample(self, n, rng):
        """n of the pairs, each from another place of the queue, all equally likely; they stay in it. rng: a numpy
        Generator, the only source of chance. ValueError if the queue holds fewer than n."""
        raise NotImplementedError


def log_odds(logp):
    """log(p / (1 - p)) of each log p, a float32 tensor; -80 <= log p <= -1e-8. Value and gradient are right to three
    digits at both ends."""
    raise NotImplementedError


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO's loss of each pair, (n,), from summed log-probs, (n,) each, of the policy and of the reference (ref_*):
    -log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected)]). Finite for gaps of thousands of nats."""
    raise NotImplementedError


def ema_update(ema, policy, alpha):
    """[9], theta_ema <- alpha theta_ema + (1 - alpha) theta, for all parameters of two torch Modules of one architecture.

    The EMA changes in place, in its own float32, and gets no gradient; the policy stays as it is. What is returned does
    not matter.
    """
    raise NotImplementedError


def labels(prompt, response, width):
    """What each token of the row [prompt, response, padding] must predict: `width` numbers. That is the token after it
    where that token belongs to the response, its end token included, and -100 (score nothing) everywhere else."""
    raise NotImplementedError
