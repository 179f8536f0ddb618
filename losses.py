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
LOGITS = 2**25      # so many logits at a time (128 MiB in float32); where there are more, the head runs in chunks
KEPT = 2**28        # so many are kept for the backward pass (1 GiB); where there are more, it computes them again



def preference_loss(policy, batch, cfg, reference=None):
    """[7]: (loss (n,), {metric: (n,)}) of a Batch. reference: the reference's (chosen, rejected), for DPO.

    DPO and SLiC take sums of log-probs, ORPO means; `scored_tokens` says of which tokens.
    Two metrics are this method's own: log p(C after A B) - log p(C after A B'), the seam, 0 where y- has no C, and the
    rest of the gap log p(y+) - log p(y-): B against B' (B and C against a B' that ended the answer).
    """
    logps = token_scores(policy, batch)
    chosen, rejected = fold(logps * batch.scored, batch)
    gap, seam = chosen - rejected, torch.sub(*fold(logps * batch.seam, batch))
    if cfg.loss == "dpo":
        loss, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference, cfg.beta)
        extra = {}
    elif cfg.loss == "orpo":
        nll = -fold(logps, batch)[0] / batch.lengths[:, 2]
        chosen, rejected = chosen / batch.lengths[:, 0], rejected / batch.lengths[:, 1]
        loss, chosen_rewards, rejected_rewards = orpo_loss(nll, chosen, rejected, cfg.lam)
        ratio = (log_odds(chosen) - log_odds(rejected)).detach()                       # TRL's log_odds_chosen
        extra = {"nll_loss": nll, "log_odds_ratio": torch.nn.functional.logsigmoid(ratio), "log_odds_chosen": ratio}
    elif cfg.loss == "slic":
        nll = -fold(logps, batch)[0]
        loss, chosen_rewards, rejected_rewards = slic_loss(nll, chosen, rejected, cfg.delta, cfg.lam)
        extra = {"nll_loss": nll / batch.lengths[:, 2]}
    else:
        raise ValueError(f"loss is {cfg.loss!r}; choose dpo, orpo or slic")
    margins = (chosen_rewards - rejected_rewards).detach()
    return loss, {"rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards, "rewards/margins": margins,
                  "rewards/accuracies": (margins > 0).to(loss.dtype), "logps/chosen": chosen, "logps/rejected": rejected,
                  "pairs/segment_gap": gap - seam, "pairs/seam_gap": seam} | extra



def scored_tokens(cfg):
    """What collate must label for a loss: sums may leave out the common beginning, which cancels; ORPO's means need all of y."""
    return {"score_on": cfg.score_on, "common": cfg.loss == "orpo", "nll_on": None if cfg.loss == "dpo" else cfg.nll_on}



def token_scores(model, batch):
    """Log-prob of every label of a Batch: (R, T), float32 or wider, 0 where there is no label."""
    head = lambda hidden, weight: token_logps(hidden, weight, batch.labels, *(max(1, n // weight.shape[0]) for n in (LOGITS, KEPT)))
    return model(batch.ids, positions=batch.positions, trunk=batch.trunk, head=head)



def fold(values, batch):
    """Sums of values (R, T) over each chosen and each rejected text: two (n,). The trunk counts in both."""
    if not batch.trunk:
        return values.sum(-1).chunk(2)
    common, branches = values[:, :batch.trunk].sum(-1), values[:, batch.trunk:].unflatten(1, (2, -1)).sum(-1)   # (n,), (n, 2)
    return common + branches[:, 0], common + branches[:, 1]



def score(model, batch):
    """Summed log-probs (chosen, rejected), each (n,), of the tokens a Batch scores. Policy, reference and evaluation alike."""
    return fold(token_scores(model, batch) * batch.scored, batch)
