"""Self-Augmented Preference Optimization (Yin et al., arXiv 2405.20830): its Algorithm 1.

    [1] draw a mini-batch of (x, y+) from D
    [2] cut y+ at a random place into A + B + C
    [3] the EMA model generates B' after (x, A)
    [4] y- <- A + B' + C
    [5] append (x, y+, y-) to the buffer, oldest leaves
    [6] draw a mini-batch of triples from the buffer
    [7] loss <- DPO or ORPO on (x, y+, y-)
    [8] theta <- theta - lr * gradient
    [9] every k steps: theta_ema <- alpha theta_ema + (1 - alpha) theta

    paper            here                                       type and shape
    x, y+, y-        prompt, chosen, rejected                   lists of token ids
    A, B, C          chosen[:start], [start:stop], [stop:]
    B'               rejected[start:rejected_stop]
    D                draw(n) -> n Examples                      a function of the caller's
    theta            State.policy                               Transformer, float32
    theta_ema        State.ema                                  Transformer, float32, never trained
    pi_ref           State.reference                            Transformer (DPO, IPO, RPO)
    alpha, k         SAPOConfig.alpha, .ema_every
    beta, lambda     SAPOConfig.beta, .lam
    buffer           State.buffer                               ReplayBuffer of Pairs

y+ and y- begin with the same x + A, and a batch is one stream of tokens in which both share it,
its last token aside (buffer.Batch). No padding goes through matrices; only attention uses rows.

Left out: files, the command line, printing, processes, the learning rate's schedule. With what
this file defines, `random`, and load_pretrained of machine/folders.py, a run is five lines:

    model = load_pretrained("folder")
    data = [Example(prompt=[1, 5, 7], chosen=[8, 9, 4, 2]), ...]     # 16 or more
    cfg = SAPOConfig(batch_size=8)
    state = State.start(model, cfg, eos=[2], lr=1e-6, steps_per_epoch=len(data) // 8)
    for _ in range(100): print(sapo_step(state, lambda n: random.sample(data, n), cfg)["loss"])
"""

import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from buffer import Pair, ReplayBuffer, collate, pack, unpack
from losses import LOSSES, WITH_REFERENCE, preference_loss, score, scored_tokens
from model import generate, ignore, own_parameters, twin, unshard


def sapo_step(state, draw, cfg, autocast=nullcontext):
    """One step of Algorithm 1. draw(n) returns the next n Examples of D; autocast() surrounds
    forward passes.

    Returns metrics, under TRL's names where TRL has them: means over this process's pairs, and
    `bad_rows`, the data rows whose loss is not finite. A gradient that is not finite moves neither
    policy nor EMA, but the step counts.
    """
    n = cfg.batch_size // state.processes
    state.clock.start()

    # Sampling: the EMA model rewrites a segment of each chosen response. It stays fixed until
    # its next update, so the pairs for all steps until then are made at once and wait in `ahead`.
    wanted = 0 if state.step % cfg.generate_every else n
    if wanted and not state.ahead and cfg.rejected == "data":
        state.ahead.extend(map(pair_of_data, draw(n)))                     # an offline baseline
    elif wanted and not state.ahead:
        examples = draw(n * steps_ahead(state, cfg))                                           # [1]
        cuts = [split(e.chosen, cfg.segment, state.eos, state.cut_rng, state.breaks, cfg.after)
                for e in examples]                                                             # [2]
        state.clock.lap("data")
        segments = generate_segments(
            state.generator, examples, cuts, cfg, state.eos, state.sample_rng, state.vocab,
            state.clock.lap, state.breaks)                                                     # [3]
        state.ahead.extend(map(splice, examples, cuts, segments, repeat(state.eos)))           # [4]
    fresh = [state.ahead.popleft() for _ in range(wanted)]
    for pair in fresh:
        pair.step = state.step
        state.buffer.add(pair)                                                                 # [5]

    # Training: the policy learns from pairs drawn from the buffer, most of them some steps old.
    pairs = state.buffer.sample(n)                                                             # [6]
    clear_gradients(state.optimizer, state.policy)
    state.clock.lap("data")
    metrics = accumulate_gradient(state, pairs, cfg, autocast)                                 # [7]
    norm = optimizer_step(state.optimizer, state.policy, cfg.max_grad_norm)                    # [8]
    state.clock.lap("optimizer")
    state.step += 1
    if math.isfinite(norm) and is_due(cfg.ema_every, state):
        metrics["ema/distance"] = ema_update(state.ema, state.policy, cfg.alpha)               # [9]
        copy_parameters(state.generator, state.ema)
    if state.reference is not None and is_due(cfg.ref_refresh, state):     # DPO and its kin
        copy_parameters(state.reference, state.ema if cfg.ref_from == "ema" else state.policy)
        state.ref_version += 1
    state.clock.lap("ema")
    return metrics | pair_metrics(state, fresh, pairs) | {"grad_norm": norm}


# --------------------------------------------------------------------- sampling
class Example(NamedTuple):
    """One row of D in token ids. `rejected` is used only with SAPOConfig.rejected "data"."""
    prompt: list
    chosen: list
    rejected: list | None = None
    row: int = -1


def split(chosen, segment, eos, rng, breaks=(), after="keep"):
    """[2]: (start, stop) of B in y+, uniform over all legal cuts. B never holds the end token,
    except with after "rewrite", where B is the whole rest of y+. breaks: the ids that end a
    sentence or a line, if B is one."""
    if not chosen[1:] and set(chosen) <= set(eos):
        raise ValueError("there is nothing to rewrite in an empty response")
    n = len(chosen) - (chosen[-1] in eos)
    if segment in UNITS:
        found = units(chosen[:n], breaks)
        start, stop = found[int(rng.integers(0, len(found)))]
    else:
        length = segment_length(segment, n)
        start = int(rng.integers(0, n - length + 1))
        stop = start + length
    return start, len(chosen) if after == "rewrite" else stop


def segment_length(segment, n):
    """The length of B, from 1 to n, in a text of n tokens: "256" is tokens, "50%" a share."""
    if segment.endswith("%"):
        return max(1, min(round(n * float(segment[:-1]) / 100), n))
    return max(1, min(int(segment), n))


def units(ids, breaks):
    """(start, stop) of each sentence or line of a text; the first token in `breaks` ends it.
    Further ones, such as an empty line's, belong to no unit. A text without any is one unit."""
    found, start = [], None
    for place, token in enumerate(ids):
        if start is None and token not in breaks:
            start = place
        if start is not None and (token in breaks or place == len(ids) - 1):
            found.append((start, place + 1))
            start = None
    return found or [(0, len(ids))]


def generate_segments(model, examples, cuts, cfg, eos, rng, vocab=None, lap=ignore, breaks=()):
    """[3]: B' for each example. The model sees x and A only, never B or C.

    B' is at most as long as B (a sentence or line: or LONGEST_UNIT tokens, if that is more). With
    cfg.after "rewrite" it runs to its own end token. x and y- stay within cfg.max_length;
    ValueError if that leaves no room. At most cfg.generate_rows texts are generated at once, which
    changes rounding alone. rng: a torch.Generator. eos, vocab, lap: those of `model.generate`.
    """
    ends, banned = (eos, ()) if cfg.eos_in_segment == "stop" else ((), eos)
    length = cfg.max_length or min(2048, model.config.max_position_embeddings)
    budgets, unit = [], cfg.segment in UNITS and cfg.after == "keep"
    for e, (start, stop) in zip(examples, cuts):
        room = length - len(e.prompt) - len(e.chosen) + stop - start
        longest = max(stop - start, LONGEST_UNIT) if unit else stop - start
        budgets.append(room if cfg.after == "rewrite" else min(room, longest))
    if min(budgets, default=1) < 1:
        raise ValueError(f"max_length {length} leaves no room for B' after a prompt")
    if unit:
        ends = (*ends, *breaks)
    prefixes = [list(e.prompt) + list(e.chosen[:start]) for e, (start, _) in zip(examples, cuts)]
    segments = []
    for i in range(0, len(prefixes), cfg.generate_rows):
        some = slice(i, i + cfg.generate_rows)
        segments += generate(
            model, prefixes[some], budgets[some], ends, cfg.temperature, cfg.top_k, cfg.top_p, rng,
            vocab, banned, lap)
    return segments


def splice(example, cut, segment, eos):
    """[4]: the Pair with y- = A + B' + C, without C where B' ended the answer."""
    start, stop = cut
    C = [] if segment[-1] in eos else list(example.chosen[stop:])
    rejected = list(example.chosen[:start]) + segment + C
    return Pair(list(example.prompt), list(example.chosen), rejected, start, stop,
                start + len(segment), example.row)


def pair_of_data(example):
    """The Pair of an example that brings its own y-."""
    return Pair(list(example.prompt), list(example.chosen), list(example.rejected), row=example.row)


def steps_ahead(state, cfg):
    """Batches needed until the EMA moves, to be made at once: cfg.generate_ahead at most.

    Cuts, texts and the buffer's draws have separate random numbers, and no text's depend on another
    text, so pairs come out as they would one step at a time, rounding aside.
    """
    steps = period(cfg.ema_every, state)
    return min(-(-(steps - state.step % steps) // cfg.generate_every), cfg.generate_ahead)


# --------------------------------------------------------------------- training
def accumulate_gradient(state, pairs, cfg, autocast=nullcontext):
    """[7]: the gradient of the mean loss over `pairs`, in micro-batches formed by length. Returns
    metrics. The mean is over all pairs, so micro-batches do not change it, RPO's aside."""
    order = sorted(pairs, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
    parts = [order[i:i + cfg.micro_batch] for i in range(0, len(order), cfg.micro_batch)]
    device = next(state.policy.parameters()).device
    values, bad_rows = [], []
    reference = prompts = None
    for part in parts:
        batch = collate(part, **scored_tokens(cfg)).to(device)
        state.clock.lap("data")
        if state.reference is not None:
            with torch.no_grad(), autocast():
                reference = reference_scores(state, part, batch)
            if cfg.loss == "rpo":
                prompts = prompt_vectors(state.reference, part)
            state.clock.lap("reference")
        with exchange_gradients(state.policy, last=part is parts[-1]):
            with autocast():
                loss, metrics = preference_loss(state.policy, batch, cfg, reference, prompts)
            state.clock.lap("forward")
            (loss.sum() / len(pairs)).backward()
        values.append(torch.stack([loss, *metrics.values()]).detach())     # (metrics, pairs)
        own = values[-1][1:] if cfg.loss == "rpo" else values[-1][:1]      # RPO's losses mix pairs
        bad_rows += [p.row for p, ok in zip(part, own.isfinite().all(0).tolist()) if not ok]
        state.clock.lap("backward")
    means = torch.cat(values, 1).mean(1).tolist()
    return dict(zip(["loss", *metrics], means)) | {"bad_rows": bad_rows}


def clear_gradients(optimizer, policy):
    """Forget the last gradients. DDP has buckets: beside them, new ones would be held twice."""
    optimizer.zero_grad(set_to_none=not hasattr(policy, "no_sync"))


def exchange_gradients(policy, last):
    """A context for one of several backward passes: DDP exchanges gradients in the last of them."""
    return nullcontext() if last or not hasattr(policy, "no_sync") else policy.no_sync()


def reference_scores(state, pairs, batch):
    """The reference's (chosen, rejected), each (n,), for a Batch of pairs. A pair keeps its scores
    until the reference changes; only pairs without scores of this reference are scored now."""
    missing = [i for i, p in enumerate(pairs)
               if not state.keep_ref or p.ref_version != state.ref_version]
    if missing:
        some = batch if len(missing) == len(pairs) else batch.some(missing)
        scores = score(state.reference, some)
        for i, both in zip(missing, torch.stack(scores, 1).tolist()):
            pairs[i].ref_chosen, pairs[i].ref_rejected = both
            pairs[i].ref_version = state.ref_version
    dtype = torch.promote_types(next(state.reference.parameters()).dtype, torch.float32)
    kept = [(p.ref_chosen, p.ref_rejected) for p in pairs]
    return torch.tensor(kept, dtype=dtype, device=batch.ids.device).unbind(1)


@torch.no_grad()
def prompt_vectors(model, pairs):
    """(n, D): the mean of the token embeddings of each pair's prompt, which RPO compares."""
    embedding = unshard(model.model.embed_tokens.weight)
    wide = torch.promote_types(embedding.dtype, torch.float32)
    return torch.stack([embedding[p.prompt].to(wide).mean(0) for p in pairs])


def optimizer_step(optimizer, policy, max_grad_norm):
    """[8], unless a gradient is not finite. Gradients are clipped to max_grad_norm (0: no
    clipping). Returns their norm before clipping, the same on all processes."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm or torch.inf)
    norm = unshard(norm).item()
    if math.isfinite(norm):
        optimizer.step()
    return norm


@torch.no_grad()
def ema_update(ema, policy, alpha):
    """[9]: theta_ema <- alpha theta_ema + (1 - alpha) theta, in place and in the EMA's own float32.

    alpha weighs the OLD EMA. Returns how far the two are apart afterwards,
    |theta - theta_ema| / |theta|. Frozen parameters, which the two may share, stay out of it.
    """
    apart, size = 0.0, 0.0
    for old, new in zip(ema.parameters(), policy.parameters()):
        if new.requires_grad:
            old.lerp_(new, 1 - alpha)
            apart = apart + (new - old).square().sum()
            size = size + new.square().sum()
    return float(unshard((apart / size).sqrt()))


@torch.no_grad()
def copy_parameters(target, source):
    """Give `target` the parameters of `source`, gathered where only the source is sharded."""
    if target is source:
        return
    for old, new in zip(target.parameters(), source.parameters()):
        old.copy_(new if hasattr(old, "full_tensor") else unshard(new))


def period(every, state):
    """'epoch', 'never' or a number, as a number of steps; 0 is never."""
    if every == "epoch":
        return state.steps_per_epoch
    return 0 if every == "never" else int(every)


def is_due(every, state):
    """Whether something that happens every so many steps is due at this one."""
    steps = period(every, state)
    return steps > 0 and state.step % steps == 0


# ---------------------------------------------------------------------- metrics
def pair_metrics(state, fresh, pairs):
    """The metrics this method adds to the usual ones: on fresh and drawn pairs, buffer and time."""
    times, eos = state.clock.seconds, state.eos
    generating = times.get("prefill", 0.0) + times.get("decode", 0.0)
    ended = [p.rejected_stop == len(p.rejected) and p.rejected[-1] in eos for p in fresh]
    whole = [p.start == 0 and p.stop + (p.chosen[-1] in eos) >= len(p.chosen) for p in fresh]
    shares = {
        "gen/eos_fraction": ended, "pairs/whole": whole,
        "pairs/identical": [p.chosen == p.rejected for p in fresh],
        "buffer/staleness": [state.step - 1 - p.step for p in pairs],
        "buffer/uses": [p.uses for p in pairs]}
    metrics = {name: float(np.mean(values)) for name, values in shares.items() if values}
    trained = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - p.start for p in pairs)
    metrics |= {"buffer/size": float(len(state.buffer)), "train/tokens": float(trained),
                "gen/tokens": float(sum(p.rejected_stop - p.start for p in fresh)),
                "time/generate": generating,
                "time/train": sum(times.values()) - generating - times["data"]}
    if generating:
        tokens = sum(p.rejected_stop - p.start for p in [*fresh, *state.ahead])
        metrics["gen/tokens_per_second"] = tokens / generating
    return metrics | {f"time/{stage}": seconds for stage, seconds in times.items()}


class Clock:
    """Seconds by stage since `start`: a lap ends one stage and begins the next."""

    def __init__(self):
        self.seconds, self.last = {}, self.now()

    start = __init__

    def lap(self, stage):
        now = self.now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def now(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()       # so that a stage's time is its own
        return time.perf_counter()


# --------------------------------------------------------------------- settings
def setting(default, help, source="ours", **more):
    """A dataclass field that knows what it means, where its default comes from, and its range."""
    return field(default=default, metadata={"help": help, "source": source, **more})


STEPS = r"[1-9]\d{0,8}"
UNITS = ("sentence", "line")        # segments that are not a number of tokens
LONGEST_UNIT = 64                   # most tokens in such a B', unless B is longer


@dataclass
class SAPOConfig:
    """Every choice of the method, each a field with its source. Defaults are SAPO-DPO's: from the
    paper, else from the authors' code, else ours."""
    loss: str = setting("dpo", "preference loss", "paper: dpo, orpo; ours", choices=tuple(LOSSES))
    beta: float = setting(0.1, "DPO, IPO, RPO: pull to the reference; SimPO: scale of the margin",
                          "authors' code", low=1e-12)
    lam: float = setting(0.05, "weight of ORPO's odds-ratio term or of SLiC's NLL", "authors' code")
    delta: float = setting(1.0, "SLiC: a pair with a larger margin (nats) costs nothing", "SLiC-HF")
    gamma: float = setting(0.5, "SimPO: the reward margin that a pair should have", "TRL")
    tau: float = setting(0.5, "RPO: temperature of the prompts' weights", "RPO", low=1e-6)
    nll: float = setting(0.0, "weight of y+'s mean NLL per token, added to any loss (dpo: DPO+SFT)")
    batch_size: int = setting(64, "pairs a step, over all processes", "authors' code", low=1)
    micro_batch: int = setting(8, "pairs per forward pass; only RPO's result depends on it", low=1)
    segment: str = setting(
        "256", "B: tokens, a share of the response (50%), or one whole sentence or line", "paper",
        pattern=rf"{STEPS}|(100|[1-9]\d?)(\.0+)?%|\d{{1,2}}\.\d+%|{'|'.join(UNITS)}",
        form="a number of tokens, a share such as 50%, sentence, or line")
    after: str = setting("keep", "y- after B': C (keep), or the generator's own end (rewrite)",
                         "paper", choices=("keep", "rewrite"))
    max_length: int | None = setting(
        None, "tokens of prompt and response; a longer response loses its right end; "
        "without it min(2048, the model's context)", "paper", low=2)
    generate_every: int = setting(1, "steps between generating pairs", "authors' code", low=1)
    alpha: float = setting(0.5, "weight of the old EMA in its update", "paper", high=1)
    ema_every: str = setting("2", "optimizer steps between EMA updates, or 'epoch'", "paper",
                             pattern=f"{STEPS}|epoch", form="a number of steps, or epoch")
    buffer_size: int = setting(2000, "pairs in the buffer, over all processes", "paper", low=1)
    replay: str = setting("uniform", "draws from the buffer; inverse-count: by 1 / (uses + 1)",
                          "paper; the other: authors' code", choices=("uniform", "inverse-count"))
    ref_refresh: str = setting(
        "epoch", "steps between refreshes of the reference, 'epoch' or 'never'", "authors' code",
        pattern=f"{STEPS}|epoch|never", form="a number of steps, epoch or never")
    ref_from: str = setting("ema", "what a refreshed reference copies", "authors' code",
                            choices=("ema", "policy"))
    rejected: str = setting("sapo", "where y- comes from: SAPO, or the data's 'rejected'", "paper",
                            choices=("sapo", "data"))
    score_on: str = setting("response", "tokens the loss compares", "paper",
                            choices=("response", "segment"))
    nll_on: str = setting("response", "tokens of the NLL term", "paper",
                          choices=("response", "prompt+response"))
    eos_in_segment: str = setting("stop", "an end token in B' ends y-, or is never sampled",
                                  "authors' code", choices=("stop", "ban"))
    temperature: float = setting(0.7, "temperature of B'; 0 is greedy", "authors' code")
    top_k: int = setting(50, "top-k of B'; 0 keeps all", "authors' code")
    top_p: float = setting(0.95, "top-p of B'; 1 keeps all", "authors' code", low=1e-6, high=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 does not clip")
    generate_ahead: int = setting(8, "at most so many batches are generated ahead", low=1, high=999)
    generate_rows: int = setting(64, "at most this many texts are generated at once", low=1)


# ------------------------------------------------------------------------ state
def stream(seed, purpose, *place):
    """The seed for all draws of one purpose at one place (rank, epoch); no others share it."""
    key = (len(purpose), *purpose.encode(), *place)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


@dataclass(kw_only=True)
class State:
    """Everything that Algorithm 1 changes, and what it needs to know of its surroundings."""
    policy: torch.nn.Module                 # theta, perhaps wrapped by DDP
    ema: torch.nn.Module                    # theta_ema, float32, not wrapped
    generator: torch.nn.Module              # generates B': the EMA, or its whole or bfloat16 copy
    reference: torch.nn.Module | None       # pi_ref, where the loss has one
    optimizer: torch.optim.Optimizer
    buffer: ReplayBuffer
    cut_rng: np.random.Generator            # where y+ is cut
    sample_rng: torch.Generator             # what B' says
    eos: tuple                              # ids that end an answer
    vocab: int | None = None                # ids from here on are never sampled
    breaks: frozenset = frozenset()         # ids that end a sentence or a line, if B is one
    steps_per_epoch: int = 0                # for 'epoch'; 0: unknown, and the reference stays
    processes: int = 1                      # which share batch and buffer
    keep_ref: bool = True                   # keep the reference's log-probs with the pair
    ahead: deque = field(default_factory=deque)     # pairs made ahead, not yet in the buffer
    step: int = 0
    ref_version: int = 0
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def start(cls, policy, cfg, eos, seed=0, lr=1e-6, copy=twin, rank=0, processes=1,
              optimizer=None, generator=None, **more):
        """Before the first step: theta_ema = pi_ref = theta, an empty buffer, seeded draws.
        copy(policy) makes a model that does not train; `more` are the other fields of a State."""
        if cfg.ema_every == "epoch" and not more.get("steps_per_epoch"):
            raise ValueError("ema_every 'epoch' needs steps_per_epoch")
        if cfg.segment in UNITS and not more.get("breaks"):
            raise ValueError(f"segment {cfg.segment!r} needs breaks, the ids that end one")
        ema, capacity = copy(policy), len(range(rank, cfg.buffer_size, processes))
        trained = [p for p in policy.parameters() if p.requires_grad]
        return cls(
            policy=policy, ema=ema, generator=generator or ema, eos=tuple(eos), processes=processes,
            reference=copy(policy) if cfg.loss in WITH_REFERENCE else None,
            optimizer=optimizer or torch.optim.AdamW(trained, lr=lr, weight_decay=0.0),
            buffer=ReplayBuffer(capacity, stream(seed, "draws", rank), cfg.replay),
            cut_rng=np.random.default_rng(stream(seed, "cuts", rank)),
            sample_rng=torch.Generator().manual_seed(stream(seed, "sampler", rank)), **more)

    def models(self):
        """{name: model} of those a checkpoint must hold; the generator is copied from the EMA."""
        policy = getattr(self.policy, "module", self.policy)               # not DDP's wrapper
        models = {"policy": policy, "ema": self.ema, "reference": self.reference}
        return {name: model for name, model in models.items() if model is not None}

    def state_dict(self):
        """Everything a checkpoint must hold: {part: nested tensors, arrays and plain values}.

        Tensors are the live ones, shards where they are sharded. "shared" is the same on all
        processes, "own" is this one's.
        """
        models = self.models()
        weights = {name: own_parameters(model) for name, model in models.items()}
        own = {"buffer": self.buffer.state_dict(), "ahead": pack(self.ahead),
               "cut_rng": self.cut_rng.bit_generator.state,
               "sample_rng": self.sample_rng.get_state()}
        return weights | {"optimizer": named_moments(models["policy"], self.optimizer), "own": own,
                          "shared": {"step": self.step, "ref_version": self.ref_version}}

    def load_state_dict(self, state):
        """Continue from a `state_dict`; weights and moments are left to machine/checkpoint.py."""
        self.step, self.ref_version = state["shared"]["step"], state["shared"]["ref_version"]
        own = state["own"]
        self.buffer.load_state_dict(own["buffer"])
        self.ahead = deque(unpack(own["ahead"]))
        self.cut_rng.bit_generator.state = own["cut_rng"]
        self.sample_rng.set_state(own["sample_rng"])


def named_moments(policy, optimizer):
    """{parameter name: {moment: tensor}}: an optimizer's state, which it keeps by number."""
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    return {names[i]: moments for i, moments in optimizer.state_dict()["state"].items()}
