"""Self-Augmented Preference Optimization (Yin et al., arXiv 2405.20830), its Algorithm 1 in nine numbers of our own.

    [1] draw a mini-batch of (x, y+) from D               [6] draw a mini-batch of triples from the buffer
    [2] cut y+ at a random place into A + B + C           [7] loss <- DPO or ORPO on (x, y+, y-)
    [3] the EMA model writes B' after (x, A)              [8] theta <- theta - lr * gradient
    [4] y- <- A + B' + C                                  [9] every k steps: theta_ema <- alpha theta_ema + (1 - alpha) theta
    [5] append (x, y+, y-) to the buffer, oldest leaves

    paper            here                        type and shape
    x, y+, y-        prompt, chosen, rejected    lists of token ids
    A, B, C          chosen[:start], chosen[start:stop], chosen[stop:]
    B'               rejected[start:rejected_stop]
    D                draw(n) -> n Examples       a function that somebody owns
    theta            State.policy                Transformer, float32
    theta_ema        State.ema                   Transformer, float32, never trained
    pi_ref           State.reference             Transformer (DPO only)
    alpha, k         SAPOConfig.alpha, .ema_every
    beta, lambda     SAPOConfig.beta, .lam
    buffer           State.buffer                ReplayBuffer of Pairs

y+ and y- begin with the same x + A. So a pair is scored as one row, [trunk | chosen | rejected]: the trunk x + A goes
through the model once and both endings look back at it. What makes the method cheap is the method's own idea, the segment.

Left out: files, flags, printing, processes, devices' quirks, the learning rate's schedule. All that is train.py's. With
random, model's load_pretrained and this file's names imported, a run is five lines. In a notebook:

    model = load_pretrained("folder")
    data = [Example(prompt=[1, 5, 7], chosen=[8, 9, 4, 2]), ...]
    cfg = SAPOConfig(batch_size=8)                       # data: at least 16 rows, as two batches are written at once
    state = State.start(model, cfg, eos=[2], lr=1e-6, steps_per_epoch=len(data) // 8)
    for _ in range(100): print(sapo_step(state, lambda n: random.sample(data, n), cfg)["loss"])

Axes: n pairs, R rows, T tokens, P trunk, S branch.
"""

import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from buffer import Pair, ReplayBuffer
from losses import IGNORE, dpo_loss, log_odds, orpo_loss, slic_loss, token_logps
from model import generate, twin

LOGITS = 2**25      # so many logits at a time (128 MiB in float32); where there are more, the head runs in chunks
KEPT = 2**28        # so many are kept for the backward pass (1 GiB); where there are more, it computes them again


def setting(default, help, source="ours", **more):
    """A dataclass field that knows what it means and where its default comes from."""
    return field(default=default, metadata={"help": help, "source": source, **more})


@dataclass
class SAPOConfig:
    """Every choice of the method, each a field with its source. Defaults are SAPO-DPO's: the paper's, else the authors' code's, else ours."""
    loss: str = setting("dpo", "preference loss; slic: SLiC-HF, to show that the pairs serve any pairwise loss", "paper; slic: ours",
                        choices=("dpo", "orpo", "slic"))
    beta: float = setting(0.1, "DPO: strength of the pull to the reference", "authors' code", low=1e-12)
    lam: float = setting(0.05, "ORPO: weight of the odds-ratio term; SLiC: weight of the NLL", "authors' code", low=0)
    delta: float = setting(1.0, "SLiC: the margin, in nats, beyond which a pair costs nothing", "SLiC-HF", low=0)
    batch_size: int = setting(64, "pairs a step, over all processes", "authors' code", low=1)
    micro_batch: int = setting(8, "pairs in one forward pass, a process; changes memory, not the result", low=1)
    segment: str = setting("256", "length of B: tokens, or a share of the response such as 50%", "paper")
    alpha: float = setting(0.5, "weight of the old EMA in its update", "paper", low=0, high=1)
    ema_every: str = setting("2", "optimizer steps between EMA updates, or 'epoch'", "paper")
    buffer_size: int = setting(2000, "pairs in the replay buffer, over all processes", "paper", low=1)
    replay: str = setting("uniform", "how pairs are drawn; inverse-count weighs by 1/(uses+1)", "paper; inverse-count: authors' code",
                          choices=("uniform", "inverse-count"))
    ref_refresh: str = setting("epoch", "steps between refreshes of the DPO reference, 'epoch' or 'never'", "authors' code")
    ref_from: str = setting("ema", "what a refreshed reference copies", "authors' code", choices=("ema", "policy"))
    rejected: str = setting("sapo", "who writes y-: SAPO, or the data's own 'rejected'", "paper", choices=("sapo", "data"))
    score_on: str = setting("response", "tokens the loss compares", "paper", choices=("response", "segment"))
    nll_on: str = setting("response", "tokens of ORPO's NLL term", "paper", choices=("response", "prompt+response"))
    eos_in_segment: str = setting("stop", "an end token inside B' ends y- (C is dropped), or is never sampled", "authors' code",
                                  choices=("stop", "ban"))
    temperature: float = setting(0.7, "of sampling B'; 0 is greedy", "authors' code", low=0)
    top_k: int = setting(50, "of sampling B'; 0 keeps all", "authors' code", low=0)
    top_p: float = setting(0.95, "of sampling B'; 1 keeps all", "authors' code", low=1e-6, high=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 does not clip", low=0)
    write_ahead: int = setting(8, "at most so many batches of B' are written ahead; changes speed, not the result", low=1)
    write_rows: int = setting(64, "at most so many texts are written at once, a process; changes memory and speed, not the result", low=1)


class Example(NamedTuple):
    """One row of D in token ids. `rejected` is used only with SAPOConfig.rejected "data"."""
    prompt: list
    chosen: list
    rejected: list | None = None
    row: int = -1


@dataclass
class State:
    """Everything Algorithm 1 changes, which is everything a checkpoint must hold."""
    policy: torch.nn.Module                 # theta, perhaps wrapped by DDP
    ema: torch.nn.Module                    # theta_ema, float32, on a plain module
    writer: torch.nn.Module                 # what writes B': the EMA itself, or a copy of it in another dtype
    reference: torch.nn.Module | None       # DPO's pi_ref
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer
    cuts: np.random.Generator               # where y+ is cut
    sampler: torch.Generator                # what B' says
    eos: tuple                              # ids that end an answer
    vocab: int | None = None                # ids from here on are never sampled
    steps_per_epoch: int = 0                # for 'epoch' in ema_every and ref_refresh; 0: unknown, and the reference stays
    keep_ref: bool = True                   # store the reference's log-probs with the pair
    written: deque = field(default_factory=deque)   # pairs written ahead, not yet in the buffer
    step: int = 0
    ema_version: int = 0
    ref_version: int = 0
    times: dict = field(default_factory=dict)       # seconds by stage since sapo_step began

    @classmethod
    def start(cls, policy, cfg, eos, seed=0, lr=1e-6, optimizer=None, **more):
        """Before the first step: theta_ema = pi_ref = theta, an empty buffer, generators seeded with `seed`."""
        if cfg.ema_every == "epoch" and not more.get("steps_per_epoch"):
            raise ValueError("ema_every 'epoch' needs steps_per_epoch")
        ema = twin(policy)
        return cls(policy, ema, ema, twin(policy) if cfg.loss == "dpo" else None,
                   optimizer or torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0),
                   ReplayBuffer(cfg.buffer_size, seed, cfg.replay), np.random.default_rng(seed),
                   torch.Generator().manual_seed(seed), tuple(eos), **more)

    @contextmanager
    def timed(self, stage):
        clock(self.policy)
        start = time.perf_counter()
        yield
        clock(self.policy)
        self.times[stage] = self.times.get(stage, 0.0) + time.perf_counter() - start


def clock(model):
    """Wait for the GPU, so that a stage's time is its own."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ Algorithm 1

def sapo_step(state, draw, cfg, autocast=nullcontext):
    """One step of Algorithm 1. draw(n) returns the next n Examples of D; autocast() surrounds forward passes.

    Returns metrics: floats under TRL's names, means over this process's pairs, and `bad_rows`, the data rows whose loss
    is not finite. A gradient that is not finite moves neither policy nor EMA.
    """
    state.times = {}

    # Sampling: the EMA model rewrites a segment of each chosen response.
    # It stands still until its next update, so the segments of all steps until then may be written together: rows, cuts,
    # texts and draws from the buffer have a generator each, texts take its numbers row after row, and so each comes out,
    # rounding aside, as it would one batch at a time.
    if not state.written:
        batches = min(steps_until(cfg.ema_every, state), cfg.write_ahead)
        with state.timed("data"):
            examples = draw(batches * cfg.batch_size)                                  # [1]
        state.written.extend(make_pairs(state, examples, cfg))                         # [2] [3] [4]
    fresh = [state.written.popleft() for _ in range(cfg.batch_size)]
    for pair in fresh:
        pair.step = state.step
        state.buffer.add(pair)                                                         # [5]

    # Training: the policy learns from pairs drawn anew from the buffer, most of them written some steps ago.
    pairs = state.buffer.sample(cfg.batch_size)                                        # [6]
    state.optimizer.zero_grad(set_to_none=True)
    metrics = accumulate_gradient(state, pairs, cfg, autocast)                         # [7]
    with state.timed("optimizer"):
        norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), cfg.max_grad_norm or torch.inf)
        norm = getattr(norm, "full_tensor", lambda: norm)()        # the same on all processes, hence so is `sound`
        sound = bool(norm.isfinite())
        if sound:
            state.optimizer.step()                                                     # [8]
    state.step += 1
    if sound and state.step % period(cfg.ema_every, state) == 0:
        with state.timed("ema"):
            metrics["ema/distance"] = ema_update(state.ema, state.policy, cfg.alpha)   # [9]
        state.ema_version += 1

    # DPO only, and none of the nine: now and then the reference becomes the EMA
    if state.reference is not None and period(cfg.ref_refresh, state) and state.step % period(cfg.ref_refresh, state) == 0:
        copy_parameters(state.reference, state.ema if cfg.ref_from == "ema" else state.policy)
        state.ref_version += 1
    return metrics | pair_metrics(state, fresh, pairs) | {"grad_norm": norm.item()}


def split(chosen, segment, eos, cuts):
    """[2]: (start, stop) of B in y+, uniform over all legal cuts. The end token, if y+ has one, is never in B."""
    n = len(chosen) - (chosen[-1] in eos)
    length = segment_length(segment, n)
    start = int(cuts.integers(0, n - length + 1))
    return start, start + length


def segment_length(segment, n):
    """Tokens in B for n tokens to choose from: "256" is tokens, "50%" a share; at least 1, at most n."""
    share = round(n * float(segment[:-1]) / 100) if segment.endswith("%") else int(segment)
    return max(1, min(share, n))


def make_pairs(state, examples, cfg):
    """[2] [3] [4]: Pairs for the Examples. The writer sees x and A only, never B or C."""
    if cfg.rejected == "data":
        return [Pair(list(e.prompt), list(e.chosen), list(e.rejected), row=e.row) for e in examples]
    cuts = [split(e.chosen, cfg.segment, state.eos, state.cuts) for e in examples]                         # [2]
    prefixes = [list(e.prompt) + list(e.chosen[:start]) for e, (start, _) in zip(examples, cuts)]
    segments = write_segments(state, prefixes, [stop - start for start, stop in cuts], cfg)                # [3]
    pairs = []
    for e, (start, stop), new in zip(examples, cuts, segments):
        ended = new[-1] in state.eos
        rejected = list(e.chosen[:start]) + new + ([] if ended else list(e.chosen[stop:]))                 # [4]
        pairs.append(Pair(list(e.prompt), list(e.chosen), rejected, start, stop, start + len(new), e.row))
    return pairs


def write_segments(state, prefixes, budgets, cfg):
    """[3]: B' after each x + A, at most its budget of tokens long. How many are written at once changes none, rounding aside."""
    eos, banned = (state.eos, ()) if cfg.eos_in_segment == "stop" else ((), state.eos)
    segments = []
    for i in range(0, len(prefixes), cfg.write_rows):
        some = slice(i, i + cfg.write_rows)
        segments += generate(state.writer, prefixes[some], budgets[some], eos, cfg.temperature, cfg.top_k, cfg.top_p,
                             state.sampler, state.vocab, banned, state.timed)
    return segments


def accumulate_gradient(state, pairs, cfg, autocast=nullcontext):
    """[7]: the gradient of the mean loss over `pairs`, in micro-batches formed by length. Returns metrics.

    Each micro-batch is weighed by its number of pairs, so the number of micro-batches does not change the result.
    """
    order = sorted(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))
    micro = [order[i:i + cfg.micro_batch] for i in range(0, len(order), cfg.micro_batch)]
    device, values, bad_rows = next(state.policy.parameters()).device, [], []
    for i, part in enumerate(micro):
        batch = collate(part, **scored_tokens(cfg)).to(device)
        with state.timed("reference"), torch.no_grad(), autocast():
            reference = reference_scores(state, part, device, cfg) if state.reference is not None else None
        # DDP exchanges gradients once, in the last backward pass
        alone = getattr(state.policy, "no_sync", nullcontext) if i < len(micro) - 1 else nullcontext
        with alone():
            with state.timed("forward"), autocast():
                loss, parts = preference_loss(state.policy, batch, cfg, reference)
            with state.timed("backward"):
                (loss.sum() / len(pairs)).backward()
        values.append(torch.stack([loss, *parts.values()]).detach())                   # (metrics, pairs)
        bad_rows += [p.row for p, ok in zip(part, loss.isfinite().tolist()) if not ok]
    means = torch.cat(values, 1).mean(1).tolist()
    return dict(zip(["loss", *parts], means)) | {"bad_rows": bad_rows}


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


def reference_scores(state, pairs, device, cfg):
    """The reference's (chosen, rejected), each (n,): from the pairs that hold this reference's, computed for the others."""
    missing = [p for p in pairs if not state.keep_ref or p.ref_version != state.ref_version]
    if missing:
        scores = score(state.reference, collate(missing, **scored_tokens(cfg)).to(device))
        for pair, chosen, rejected in zip(missing, *(s.tolist() for s in scores)):
            pair.ref_chosen, pair.ref_rejected, pair.ref_version = chosen, rejected, state.ref_version
    dtype = torch.promote_types(next(state.reference.parameters()).dtype, torch.float32)
    return tuple(torch.tensor([getattr(p, k) for p in pairs], dtype=dtype, device=device) for k in ("ref_chosen", "ref_rejected"))


@torch.no_grad()
def ema_update(ema, policy, alpha):
    """[9]: theta_ema <- alpha theta_ema + (1 - alpha) theta, in the EMA's own float32. alpha weighs the OLD EMA.

    Returns how far the two are apart afterwards: |theta - theta_ema| / |theta|.
    """
    apart = size = 0.0
    for old, new in zip(ema.parameters(), policy.parameters()):
        if new.requires_grad:
            old.lerp_(new, 1 - alpha)
            apart, size = apart + (new - old).square().sum(), size + new.square().sum()
    distance = (apart / size).sqrt()
    return float(getattr(distance, "full_tensor", lambda: distance)())                 # of divided parameters, the whole


@torch.no_grad()
def copy_parameters(target, source):
    for old, new in zip(target.parameters(), source.parameters()):
        old.copy_(new)


def period(every, state):
    """'epoch', 'never' or a number, as a number of steps; 0 is never."""
    return state.steps_per_epoch if every == "epoch" else 0 if every == "never" else int(every)


def steps_until(every, state):
    """Steps from now to the next multiple of `every`, at least 1."""
    return period(every, state) - state.step % period(every, state)


def pair_metrics(state, fresh, pairs):
    """What this method adds to the usual metrics: the fresh pairs, the drawn pairs, the buffer and the stages' seconds."""
    mean = lambda values: float(np.mean(list(values)))
    times = state.times
    writing = times.get("prefill", 0.0) + times.get("decode", 0.0)
    metrics = {"gen/eos_fraction": mean(p.rejected_stop == len(p.rejected) and p.rejected[-1] in state.eos for p in fresh),
               "pairs/identical": mean(p.chosen == p.rejected for p in fresh),
               "pairs/whole": mean(p.start == 0 and p.stop >= len(p.chosen) - (p.chosen[-1] in state.eos) for p in fresh),
               "buffer/size": len(state.buffer), "buffer/age": mean(state.step - 1 - p.step for p in pairs),
               "buffer/uses": mean(p.uses for p in pairs),
               "time/generate": writing, "time/train": sum(times.values()) - writing - times.get("data", 0.0)}
    if writing:
        metrics["gen/tokens_per_second"] = sum(p.rejected_stop - p.start for p in [*fresh, *state.written]) / writing
    return metrics | {f"time/{stage}": seconds for stage, seconds in times.items()}


# ------------------------------------------------------------------------------------------------ how a pair is scored

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


def scored_tokens(cfg):
    """What collate must label for a loss: sums may leave out the common beginning, which cancels; ORPO's means need all of y."""
    return {"score_on": cfg.score_on, "common": cfg.loss == "orpo", "nll_on": None if cfg.loss == "dpo" else cfg.nll_on}


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
