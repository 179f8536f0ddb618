"""Losses: what one pair (chosen, rejected) is worth, and [7] of Algorithm 1.

Holds the DPO, ORPO and SLiC losses as pure functions of tensors, the table `LOSSES`, the token
log-probs they are made of, and what joins them to a model and a Batch. Leaves out everything with
a state: no optimizer, no buffer, no reduction. Log-probs and losses are float32 or wider.

Axes: n pairs, R rows, T tokens, D hidden size, V vocabulary, N labelled tokens.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100        # the label of a token that is not scored (Hugging Face's value)
LN2 = 0.6931471805599453
NEAREST = -1e-12     # log-probs are kept this far from 0, where the odds p / (1 - p) are infinite
LOGITS = 2**25       # at most this many logits are computed at a time (128 MiB in float32)
KEPT = 2**28         # more than this (1 GiB) are not kept for the backward pass, but computed again


# ---------------------------------------------------------------- the equations
class Loss(NamedTuple):
    """What a pair costs, and the rewards that the loss implies: each (n,)."""
    value: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta [log pi/ref (y+) - log pi/ref (y-)]).

    chosen, rejected: (n,) log-probs *summed* over response tokens, of the policy; ref_*: the same
    of the reference. Returns a Loss; rewards are beta * log(pi / ref), in nats. The beginning
    that both responses share cancels, so both sums may leave it out. A common ending (C) does not
    cancel: it stands after other tokens.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    loss = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return Loss(loss, chosen_rewards, rejected_rewards)


def orpo_loss(nll, chosen, rejected, lam):
    """ORPO (arXiv 2403.07691, eq. 6, 7): NLL(y+) - lam log sigmoid(log odds(y+) - log odds(y-)).

    nll: (n,) mean negative log-prob of the chosen text; chosen, rejected: (n,) log-probs
    *averaged* over response tokens, all <= 0. Returns a Loss; rewards are lam * mean log-prob.
    With lam 0 this is supervised fine-tuning.
    """
    ratio = log_odds(chosen) - log_odds(rejected)
    return Loss(nll - lam * F.logsigmoid(ratio), lam * chosen, lam * rejected)


def slic_loss(nll, chosen, rejected, delta, lam):
    """SLiC-HF (arXiv 2305.10425, eq. 1): max(0, delta - log pi(y+) + log pi(y-)) + lam NLL(y+).

    nll: (n,) negative log-prob of the chosen text; chosen, rejected: (n,) log-probs; all three
    *summed* over response tokens. There is no reference. Returns a Loss; rewards are the log-probs.
    """
    return Loss(F.relu(delta - chosen + rejected) + lam * nll, chosen, rejected)


def log_odds(logp):
    """log(p / (1 - p)) of log p <= 0 (ORPO, eq. 4). Value and gradient are finite even at 0."""
    return logp - log1mexp(logp)


def log1mexp(x):
    """log(1 - exp(x)) for x <= 0, exact on both sides of -ln 2 (Maechler 2012).

    torch.where differentiates both of its branches, so each is given only arguments it can take.
    """
    near = x > -LN2
    from_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0).clamp(max=NEAREST)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, from_expm1, from_log1p)


# -------------------------------------------------------------------- log-probs
def token_logps(hidden, weight, labels, chunk=0, keep=0):
    """Log-prob of each label under softmax(hidden @ weight.T), 0 where the label is IGNORE.

    hidden (R, T, D), weight (V, D), labels (R, T) int64, shifted already: hidden[:, t] predicts
    labels[:, t]. Returns (R, T), float32 or wider. The head runs on labelled tokens only. chunk: on
    at most this many at a time (0: on all), so that their logits never exist all at once. keep: if
    there are more labels than this, the head runs again in the backward pass to save memory.
    """
    wanted = labels != IGNORE
    rows = hidden[wanted]                                                  # (N, D)
    targets = labels[wanted]                                               # (N,)
    if chunk and len(rows) > chunk:
        head = _label_logps
        if len(rows) > keep:
            head = partial(checkpoint, head, use_reentrant=False, preserve_rng_state=False)
        parts = zip(rows.split(chunk), targets.split(chunk))
        logps = torch.cat([head(some, weight, theirs) for some, theirs in parts])
    else:
        logps = _label_logps(rows, weight, targets)
    return logps.new_zeros(labels.shape).masked_scatter(wanted, logps)


def _label_logps(rows, weight, targets):
    logits = F.linear(rows, weight)                                        # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")             # (N,)


def batch_logps(model, batch):
    """Log-prob of every label of a Batch: (R, T), float32 or wider, 0 where there is no label."""
    def head(hidden, weight):
        chunk, keep = max(1, LOGITS // len(weight)), max(1, KEPT // len(weight))
        return token_logps(hidden, weight, batch.labels, chunk, keep)

    return model(batch.ids, positions=batch.positions, prefix=batch.prefix, head=head)


def by_side(values, batch):
    """Sums of values (R, T) over each chosen and each rejected text, prefix included: two (n,)."""
    if not batch.prefix:
        return values.sum(-1).chunk(2)
    prefix = values[:, :batch.prefix].sum(-1)                              # (n,)
    continuations = values[:, batch.prefix:].unflatten(1, (2, -1)).sum(-1)  # (n, 2)
    return prefix + continuations[:, 0], prefix + continuations[:, 1]


def score(model, batch):
    """Summed log-probs (chosen, rejected), each (n,), of the tokens that a Batch scores. Policy,
    reference and evaluation all come through here."""
    return by_side(batch_logps(model, batch) * batch.scored, batch)


# -------------------------------------------------------------------------- [7]
class Scores(NamedTuple):
    """What a loss is made from: log-probs summed over tokens, (n,) each."""
    chosen: torch.Tensor            # log p of the scored tokens of y+
    rejected: torch.Tensor          # ... and of y-
    nll: torch.Tensor               # negative log p of the chosen text, as `nll_on` says
    lengths: torch.Tensor           # (n, 3): the number of tokens in each of these sums
    reference: tuple | None         # (chosen, rejected) of the reference, for DPO


def _dpo(scores, cfg):
    loss = dpo_loss(scores.chosen, scores.rejected, *scores.reference, cfg.beta)
    return loss, {"logps/chosen": scores.chosen, "logps/rejected": scores.rejected}


def _orpo(scores, cfg):
    nll = scores.nll / scores.lengths[:, 2]
    chosen, rejected = scores.chosen / scores.lengths[:, 0], scores.rejected / scores.lengths[:, 1]
    ratio = (log_odds(chosen) - log_odds(rejected)).detach()               # TRL's log_odds_chosen
    return orpo_loss(nll, chosen, rejected, cfg.lam), {
        "logps/chosen": chosen, "logps/rejected": rejected, "nll_loss": nll,
        "log_odds_ratio": F.logsigmoid(ratio), "log_odds_chosen": ratio}


def _slic(scores, cfg):
    loss = slic_loss(scores.nll, scores.chosen, scores.rejected, cfg.delta, cfg.lam)
    return loss, {"logps/chosen": scores.chosen, "logps/rejected": scores.rejected,
                  "nll_loss": scores.nll / scores.lengths[:, 2]}


LOSSES = {"dpo": _dpo, "orpo": _orpo, "slic": _slic}    # Scores, settings -> (Loss, {metric: (n,)})


def scored_tokens(cfg):
    """What `collate` labels for a loss: sums may leave out the common beginning, means need it."""
    nll_on = None if cfg.loss == "dpo" else cfg.nll_on
    return {"score_on": cfg.score_on, "common": cfg.loss == "orpo", "nll_on": nll_on}


def preference_loss(policy, batch, cfg, reference=None):
    """[7]: (loss (n,), {metric: (n,)}) of a Batch. reference: its (chosen, rejected), for DPO.

    Two metrics are this method's own. pairs/seam_gap: log p(C after A B) - log p(C after A B'),
    0 where y- has no C. pairs/segment_gap: the rest of log p(y+) - log p(y-), which is B against
    B' (or B and C against a B' that ended the answer).
    """
    if cfg.loss not in LOSSES:
        raise ValueError(f"loss is {cfg.loss!r}; choose {', '.join(LOSSES)}")
    logps = batch_logps(policy, batch)                                     # (R, T)
    chosen, rejected = by_side(logps * batch.scored, batch)                # (n,), (n,)
    gap = chosen - rejected
    seam = torch.sub(*by_side(logps * batch.seam, batch))
    nll = -by_side(logps, batch)[0]
    scores = Scores(chosen, rejected, nll, batch.lengths, reference)
    loss, metrics = LOSSES[cfg.loss](scores, cfg)
    margins = (loss.chosen_rewards - loss.rejected_rewards).detach()
    return loss.value, metrics | {
        "rewards/chosen": loss.chosen_rewards, "rewards/rejected": loss.rejected_rewards,
        "rewards/margins": margins, "rewards/accuracies": (margins > 0).to(margins.dtype),
        "pairs/segment_gap": gap - seam, "pairs/seam_gap": seam}
