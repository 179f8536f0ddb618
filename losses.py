"""Losses: what one pair (chosen, rejected) is worth, as pure functions of tensors.

Holds the DPO, ORPO and SLiC losses and the token log-probs they are made of. Leaves out everything with a state: no model,
no batch, no reduction. Every function keeps the dtype it is given, except that nothing is computed below float32.

Axes: B pairs, T tokens, D hidden size, V vocabulary, N labelled tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100        # the label of a token that is not scored (Hugging Face's value)
LN2 = 0.6931471805599453
NEAREST = -1e-12     # log-probs are kept this far from 0, where the odds p / (1 - p) are infinite


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta [log pi/ref (y+) - log pi/ref (y-)]).

    chosen, rejected: (B,) log-probs *summed* over response tokens, of the policy; ref_*: the same of the reference.
    Returns (loss, chosen_rewards, rejected_rewards), each (B,); rewards are beta * log(pi / ref), in nats.
    The beginning that both responses share cancels, so both sums may leave it out. A common ending (C) does not: it
    stands after other tokens.
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def orpo_loss(nll, chosen, rejected, lam):
    """ORPO (arXiv 2403.07691, equations 6 and 7): NLL(y+) - lam log sigmoid(log odds(y+) - log odds(y-)).

    nll: (B,) mean negative log-prob of the chosen text; chosen, rejected: (B,) log-probs *averaged* over response
    tokens, all <= 0. Returns (loss, chosen_rewards, rejected_rewards), each (B,); rewards are lam * mean log-prob.
    With lam 0 this is supervised fine-tuning.
    """
    ratio = log_odds(chosen) - log_odds(rejected)
    return nll - lam * F.logsigmoid(ratio), lam * chosen, lam * rejected


def slic_loss(nll, chosen, rejected, delta, lam):
    """SLiC-HF (arXiv 2305.10425, equation 1): max(0, delta - log pi(y+) + log pi(y-)) + lam NLL(y+), without a reference.

    nll: (B,) negative log-prob of the chosen text; chosen, rejected: (B,) log-probs; all three *summed* over response
    tokens. Returns (loss, chosen_rewards, rejected_rewards), each (B,); rewards are the log-probs.
    """
    return F.relu(delta - chosen + rejected) + lam * nll, chosen, rejected


def log_odds(logp):
    """log(p / (1 - p)) of log p <= 0 (ORPO, equation 4); finite, with a finite gradient, from 0 to -1e4 and beyond."""
    return logp - log1mexp(logp)


def log1mexp(x):
    """log(1 - exp(x)) for x <= 0, exact on both sides of -ln 2 (Maechler 2012, "Accurately computing log(1 - exp)").

    `where` differentiates the branch it does not take as well, so each branch is given only arguments that suit it.
    """
    near = x > -LN2
    from_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0).clamp(max=NEAREST)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, from_expm1, from_log1p)


def token_logps(hidden, weight, labels, chunk=0, keep=0):
    """Log-prob of each label under softmax(hidden @ weight.T), 0 where the label is IGNORE.

    hidden (B, T, D), weight (V, D), labels (B, T) int64, already where they are predicted: hidden[:, t] predicts
    labels[:, t]. Returns (B, T), float32 or wider. The head runs on labelled tokens only. With chunk > 0 it runs on
    that many tokens at a time, so that logits and their gradients never exist for all at once; and where more than
    `keep` tokens have a label it runs again in the backward pass, which then needs no (N, V) log-softmax.
    """
    wanted = labels != IGNORE
    rows, targets = hidden[wanted], labels[wanted]                                     # (N, D), (N,)
    if chunk and len(rows) > chunk:
        again = partial(checkpoint, _label_logps, use_reentrant=False, preserve_rng_state=False)
        head = again if len(rows) > keep else _label_logps
        logps = torch.cat([head(r, weight, t) for r, t in zip(rows.split(chunk), targets.split(chunk))])
    else:
        logps = _label_logps(rows, weight, targets)
    return logps.new_zeros(labels.shape).masked_scatter(wanted, logps)


def _label_logps(rows, weight, targets):
    logits = F.linear(rows, weight)                                                    # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")                         # (N,)
