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

from buffer import Pair, ReplayBuffer, collate
from losses import preference_loss, score, scored_tokens
from model import generate, twin


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
