"""Losses: what one pair (chosen, rejected) costs, and [7] of Algorithm 1.

Holds the losses as pure functions of tensors, one cited equation each; the table `LOSSES`, which
says what each is given; the token log-probs they use; and what applies them to a model and a Batch.
A new loss is one function, one row of the table, its name in the tuples below it, and one test.
Leaves out anything with a state, and the mean over pairs. Log-probs are float32 or wider.

Axes: n pairs, N tokens of a stream, R texts, L tokens of a text, D hidden size, V vocabulary.
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


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """IPO (arXiv 2310.12036, eq. 17): (log pi/ref (y+) - log pi/ref (y-) - 1 / (2 beta))^2.

    Like dpo_loss, but with log-probs *averaged* over response tokens, as its authors and TRL have
    it; beta is the paper's tau. The gap is pulled to a finite value; DPO's grows without bound.
    """
    chosen_rewards, rejected_rewards = chosen - ref_chosen, rejected - ref_rejected
    loss = (chosen_rewards - rejected_rewards - 1 / (2 * beta)).square()
    return Loss(loss, beta * chosen_rewards, beta * rejected_rewards)


def rpo_loss(chosen, rejected, ref_chosen, ref_rejected, prompts, beta, tau):
    """Relative Preference Optimization (arXiv 2402.10958): each y+ against the y- of all pairs, the
    mean over j of -log sigmoid(w_ij [reward(y+_i) - reward(y-_j)]), with w_ij = softmax over j of
    (cos(x_i, x_j) - 1) / tau.

    Takes *sums*, like dpo_loss, but over all response tokens, as the beginnings of different pairs
    do not cancel. prompts: (n, D), one vector per prompt. With n = 1 it is DPO.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    directions = F.normalize(prompts, dim=-1)                              # (n, D)
    cosines = (directions[:, None] * directions).sum(-1)           # (n, n); @ would be autocast
    weights = ((cosines - 1) / tau).softmax(-1)                            # (n, n)
    gaps = chosen_rewards[:, None] - rejected_rewards                      # (n, n)
    return Loss(-F.logsigmoid(weights * gaps).mean(1), chosen_rewards, rejected_rewards)


def simpo_loss(chosen, rejected, beta, gamma):
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta log pi(y+) - beta log pi(y-) - gamma).

    chosen, rejected: (n,) log-probs *averaged* over response tokens; there is no reference. Its
    authors take beta from 2 to 10. Returns a Loss; rewards are beta * mean log-prob.
    """
    loss = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return Loss(loss, beta * chosen, beta * rejected)


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

    Its y_ref is y+ here. nll: (n,) negative log-prob of y+; chosen, rejected: (n,) log-probs, all
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

    hidden (N, D), weight (V, D), labels (N,) int64, shifted already: hidden[i] predicts labels[i].
    Returns (N,), float32 or wider. The head runs on labelled tokens only, at most `chunk` at a time
    (0: all). keep: if there are more, it runs again in the backward pass to save memory.
    """
    wanted = labels != IGNORE
    rows = hidden[wanted]                                                  # (labels, D)
    targets = labels[wanted]                                               # (labels,)
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
    kind = rows.device.type
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        logits = F.linear(rows, weight)   # a cast that chunks share adds its gradients in bfloat16
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")             # (labels,)


def batch_logps(model, batch):
    """Log-prob of every label of a Batch: (N,), float32 or wider, 0 where there is no label."""
    def head(hidden, weight):
        chunk, keep = max(1, LOGITS // len(weight)), max(1, KEPT // len(weight))
        return token_logps(hidden, weight, batch.labels, chunk, keep)

    return model(batch.ids, batch.rows, head=head)


def by_text(values, batch):
    """Values (N,) of a stream as rows of its texts: (R, L), 0 behind a text's end."""
    return F.pad(values, (0, 1))[batch.rows]                               # rows have -1 there


def by_side(values, batch):
    """Sums of values (N,) over each chosen and each rejected text: two (n,)."""
    return by_text(values, batch).sum(-1).chunk(2)


def score(model, batch):
    """Summed log-probs (chosen, rejected), each (n,), of the tokens that a Batch scores, for the
    reference and for evaluation. The policy's sums are taken the same way (preference_loss)."""
    return by_side(batch_logps(model, batch) * batch.scored, batch)


# -------------------------------------------------------------------------- [7]
class Scores(NamedTuple):
    """What a loss is made from: log-probs summed over tokens, (n,) each, and their means."""
    chosen: torch.Tensor            # log p of the scored tokens of y+
    rejected: torch.Tensor          # ... and of y-
    nll: torch.Tensor               # negative log p of the chosen text, as `nll_on` says
    lengths: torch.Tensor           # (n, 3): the number of tokens in each of these sums
    reference: tuple = ()           # (chosen, rejected) of the reference
    prompts: torch.Tensor | None = None     # (n, D), a vector of each prompt

    @property
    def sums(self):
        return self.chosen, self.rejected, *self.reference

    @property
    def means(self):
        return tuple(value / self.lengths[:, i % 2] for i, value in enumerate(self.sums))

    @property
    def mean_nll(self):
        return self.nll / self.lengths[:, 2]


LOSSES = {          # name: the Loss of Scores s under settings c
    "dpo": lambda s, c: dpo_loss(*s.sums, c.beta),
    "ipo": lambda s, c: ipo_loss(*s.means, c.beta),
    "rpo": lambda s, c: rpo_loss(*s.sums, s.prompts, c.beta, c.tau),
    "simpo": lambda s, c: simpo_loss(*s.means, c.beta, c.gamma),
    "orpo": lambda s, c: orpo_loss(s.mean_nll, *s.means, c.lam),
    "slic": lambda s, c: slic_loss(s.nll, *s.sums, c.delta, c.lam)}
WITH_REFERENCE = ("dpo", "ipo", "rpo")
OF_MEANS = ("ipo", "simpo", "orpo")
WITH_NLL = ("orpo", "slic")         # by definition; SAPOConfig.nll adds one to any loss


def scored_tokens(cfg):
    """What `collate` labels for a loss. DPO's and SLiC's differences may leave out the common
    beginning; means need it, and so does RPO, whose pairs have different beginnings."""
    nll_on = cfg.nll_on if cfg.nll or cfg.loss in WITH_NLL else None
    return {"score_on": cfg.score_on, "common": cfg.loss in (*OF_MEANS, "rpo"), "nll_on": nll_on}


def preference_loss(policy, batch, cfg, reference=None, prompts=None):
    """[7]: (loss (n,), {metric: (n,)}) of a Batch. reference: that model's (chosen, rejected), for
    losses WITH_REFERENCE; prompts: (n, D), for RPO. ValueError for a loss that is not in LOSSES.

    Two metrics are this method's own. pairs/seam_gap: log p(C after A B) - log p(C after A B'),
    0 where y- has no C. pairs/segment_gap: the rest of log p(y+) - log p(y-), which is B against
    B' (or B and C against a B' that ended the answer).
    """
    if cfg.loss not in LOSSES:
        raise ValueError(f"loss is {cfg.loss!r}; choose {', '.join(LOSSES)}")
    logps = batch_logps(policy, batch)                                     # (N,)
    chosen, rejected = by_side(logps * batch.scored, batch)                # (n,), (n,)
    seam = torch.sub(*by_side(logps * batch.seam, batch))
    scores = Scores(chosen, rejected, -by_side(logps, batch)[0], batch.lengths,
                    reference if cfg.loss in WITH_REFERENCE else (), prompts)
    loss = LOSSES[cfg.loss](scores, cfg)
    logged = scores.means if cfg.loss in OF_MEANS else scores.sums
    metrics = {"logps/chosen": logged[0], "logps/rejected": logged[1]}
    if cfg.nll or cfg.loss in WITH_NLL:
        metrics["nll_loss"] = scores.mean_nll
    if cfg.loss == "orpo":
        ratio = torch.sub(*map(log_odds, scores.means)).detach()           # TRL's log_odds_chosen
        metrics |= {"log_odds_ratio": F.logsigmoid(ratio), "log_odds_chosen": ratio}
    margins = (loss.chosen_rewards - loss.rejected_rewards).detach()
    value = loss.value + cfg.nll * scores.mean_nll if cfg.nll else loss.value
    return value, metrics | {
        "rewards/chosen": loss.chosen_rewards, "rewards/rejected": loss.rejected_rewards,
        "rewards/margins": margins, "rewards/accuracies": (margins > 0).to(margins.dtype),
        "pairs/segment_gap": chosen - rejected - seam, "pairs/seam_gap": seam}
