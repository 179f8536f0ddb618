"""The machine around Algorithm 1: flags, data, processes, schedule, evaluation, logs, checkpoints, and the loop.

    python train.py                                              the tiny world, from nothing, on a laptop
    python train.py --model DIR_OR_HUB_NAME --data FILE.jsonl    SAPO on a real checkpoint
    torchrun --nproc_per_node=8 train.py ...                     the same on many GPUs
    python train.py --resume runs/NAME                           go on where it stopped

Leaves out the method, which is sapo.py's. Read it from the bottom (`main`, then `Run.train`), or in its order.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from buffer import Pair, ReplayBuffer, collate, pack, unpack
from losses import token_scores
from machine.checkpoint import (
    checksum,
    clear_up,
    deal,
    from_disk,
    lock,
    newest_checkpoint,
    write_checkpoint,
)
from machine.dataset import Data, Draw, Text, read_rows
from machine.flags import flag_of, parse
from machine.folders import (
    BadInput,
    check_weights,
    companions,
    config_from_dict,
    config_to_dict,
    find_model,
    load_pretrained,
    new_folder,
    read_json,
    read_weights,
    refuse_links,
    save_adapter,
    save_pretrained,
    saved_dtype,
    write_json,
)
from machine.parallel import World, divide, fill, like, whole
from machine.report import (
    Held,
    Log,
    draw_curves,
    evaluate,
    one_line,
    pair_text,
    passes,
    print_table,
    show_pair,
)
from model import (
    Transformer,
    add_lora,
    blank,
    generate,
    plain_weights,
    twin,
)
from sapo import SAPOConfig, State, copy_parameters, make_pairs, sapo_step


# ------------------------------------------------------------------------------------------------ 4. schedule and optimizer
def learning_rate(step, steps, cfg, peak):
    """Linear warm-up to `peak`, then the decay. step counts from 0; the last step of linear is the last above 0."""
    warmup = round(steps * float(cfg.warmup[:-1]) / 100) if cfg.warmup.endswith("%") else int(cfg.warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
                   "inverse_sqrt": math.sqrt(max(1, warmup) / max(1, step)), "constant": 1.0}[cfg.lr_scheduler]



def make_optimizer(model, cfg):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=cfg.lr)
    return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)



def warm_up_step(policy, optimizer, examples, micro, cfg, autocast):
    """One step of supervised fine-tuning on chosen responses: the mean over rows of the mean NLL. Returns metrics."""
    optimizer.zero_grad(set_to_none=True)
    total, bad_rows = 0.0, []
    for i in range(0, len(examples), micro):
        part = examples[i:i + micro]
        batch = collate([Pair(e.prompt, e.chosen, []) for e in part], share=False, sides=1).to(next(policy.parameters()).device)
        alone = getattr(policy, "no_sync", contextlib.nullcontext) if i + micro < len(examples) else contextlib.nullcontext
        with alone():
            with autocast():
                nll = -token_scores(policy, batch).sum(-1) / batch.lengths[:, 0]       # (n,)
            (nll.sum() / len(examples)).backward()
        bad_rows += [e.row for e, x in zip(part, nll.tolist()) if not math.isfinite(x)]
        total += nll.detach().sum().item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm or torch.inf)
    norm = whole(norm)
    if norm.isfinite():
        optimizer.step()
    return {"loss": total / len(examples), "grad_norm": norm.item(), "bad_rows": bad_rows}



# ------------------------------------------------------------------------------------------------ 8. the loop
class Run:
    """One training run in one process: everything prepared and checked once, then `train`."""

    def __init__(self, cfg, preset, resume, world):
        self.cfg, self.preset, self.resume, self.world, self.out = cfg, preset, resume, world, Path(cfg.out)
        self.began, self.asked, self.bad, self.sft_step, self.state = time.monotonic(), None, 0, 0, None
        self.table, self.before, self.after, self.evaluated, self.spent, self.saved = {}, [], {}, None, {}, None
        self.again, self.lock = f"python train.py --resume {self.out}", None
        for name in ("batch_size", "sft_batch_size"):
            if getattr(cfg, name) % world.size:
                raise BadInput(f"{flag_of(name)} {getattr(cfg, name)} cannot be shared evenly by {world.size} processes")
        half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and world.device.type == "cuda"
        self.autocast = functools.partial(torch.autocast, world.device.type, torch.bfloat16) if half else contextlib.nullcontext
        self.half = torch.bfloat16 if half else torch.float32
        self.source = resume / "source" if resume else None
        if not resume or cfg.lora:                       # a whole model's checkpoint holds all weights, an adapter's only its own
            self.base, self.commit = find_model(cfg.model, world)
            self.source = self.source or self.base
        world.together(self.prepare)
        seen = world.all([self.fingerprint(), dataclasses.asdict(cfg)])
        if any(other != seen[0] for other in seen):      # they would take unequal numbers of steps, and wait for each other
            raise BadInput("not all processes have the same settings and data; start every node with the same command and the same files")

    # -- before the first weight is loaded: what can be refused is refused here

    def prepare(self):
        cfg, world = self.cfg, self.world
        rows = {name: read_rows(getattr(cfg, name)) for name in ("data", "sft_data", "eval_data") if getattr(cfg, name)}
        self.config = config_from_dict(read_json(self.source / "config.json", "model folder"))
        refuse_links(self.source)
        self.files = companions(self.source)
        if self.resume:
            name = read_json(self.resume / "config.json").get("dtype")
            if name not in ("float32", "bfloat16", "float16"):
                raise BadInput(f"{self.resume / 'config.json'}: dtype is {name!r}; put the file back as the run wrote it")
            self.dtype = getattr(torch, name)
        elif cfg.from_scratch:
            self.dtype = torch.float32
        else:
            check_weights(self.base, self.config)
            self.dtype = saved_dtype(self.base)
        context = self.config.max_position_embeddings
        cfg.max_length = cfg.max_length or min(2048, context)
        if cfg.max_length > context:
            raise BadInput(f"--max-length {cfg.max_length} is more than the model's context of {context}")
        cfg.max_prompt_length = cfg.max_prompt_length or cfg.max_length * 7 // 8
        if cfg.max_prompt_length >= cfg.max_length:
            raise BadInput(f"--max-prompt-length {cfg.max_prompt_length} leaves no room for a response within {cfg.max_length} tokens")
        self.text = Text(self.files, self.source, self.config, cfg.chat_template)

        train_rows, held_rows = rows["data"], rows.get("eval_data")
        if held_rows is None:                            # hold some back: every k-th row, so that both look alike
            held = min(100, max(1, len(train_rows) // 20))
            back = set(range(0, len(train_rows), len(train_rows) // held)[:held])
            held_rows, train_rows = [[r for i, r in enumerate(train_rows) if (i in back) == side] for side in (True, False)]
            if not train_rows:
                raise BadInput(f"{cfg.data}: one row is not enough, as some are held out; give --eval-data")
        if cfg.rejected == "data" and (without := sum(r.rejected is None for r in train_rows)):
            raise BadInput(f"{cfg.data}: --rejected data, but {without} rows have no rejected")
        make = lambda rows, name: Data(rows, self.text, cfg, name, world.first)
        self.data, self.held_data = make(train_rows, "train"), make(held_rows[:cfg.eval_rows], "held out")
        self.sft_data = make(rows["sft_data"], "warm-up") if "sft_data" in rows else self.data
        if not min(map(len, (self.data, self.held_data, self.sft_data))):
            raise BadInput(f"{self.data.note}; {self.held_data.note}; nothing is left to use")
        self.steps = cfg.steps if cfg.steps is not None else max(1, math.ceil(cfg.epochs * len(self.data) / cfg.batch_size))
        self.local = dataclasses.replace(cfg, batch_size=cfg.batch_size // world.size, buffer_size=cfg.buffer_size // world.size)
        if not self.resume:
            self.claim()

    def claim(self):
        """Refuse to write over anything, and to begin what the disk cannot hold."""
        out = self.out
        try:
            with contextlib.suppress(FileNotFoundError):
                out.with_name(f".{out.name}.tmp").lstat()                # where `record` begins to write
            parent = next(p for p in out.resolve().parents if p.exists())
        except (OSError, ValueError) as error:           # too long, with a NUL, below a file, no name at all
            raise BadInput(f"--out {out}: no folder can be made there ({getattr(error, 'strerror', None) or error}); choose another name") from None
        if self.world.first and (out.is_symlink() or out.exists()) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
            if out.is_symlink() or not out.is_dir() or not {"config.json", "source"} <= {p.name for p in out.iterdir()}:
                raise BadInput(f"--out {out} exists and is not a run folder; it is not replaced even with --overwrite; choose another name")
            if not self.cfg.overwrite:
                raise BadInput(f"--out {out} exists; choose another name, go on with --resume {out}, or replace it with --overwrite")
            if held := lock(out):
                held.close()
            for name in ("model", "data", "eval_data", "sft_data", "chat_template"):
                path = getattr(self.cfg, name)
                if path and Path(path).resolve().is_relative_to(out.resolve()):
                    raise BadInput(f"--out {out} would be replaced, and with it {flag_of(name)} {path}; choose another name")
        with torch.device("meta"):
            size = sum(p.numel() for p in Transformer(self.config).parameters())
        copies = (2 + 2 * (self.cfg.optimizer == "adamw") + (self.cfg.loss == "dpo")) * 4 * (self.cfg.keep + 1)
        need, free = 2 * self.dtype.itemsize * size + (0 if self.cfg.lora else copies * size), shutil.disk_usage(parent).free
        if self.world.first and need > free:
            raise BadInput(f"--out {out}: the checkpoints and models of this run take up to {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                           "free some, lower --keep, or choose another place")

    def take(self):
        """Make the run folder, or clear up an old one, and hold it."""
        if not self.resume:
            self.record()
        self.lock = lock(self.out)
        clear_up(self.out)

    def record(self):
        """The run folder with config.json (every setting, resolved, and what it was run with) and source/, whole or not there."""
        import importlib.metadata as metadata
        libraries = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm")
        with new_folder(self.out) as temporary:
            (temporary / "source").mkdir()
            for name, content in self.files.items():
                (temporary / "source" / name).write_bytes(content)
            write_json(temporary / "source" / "config.json", config_to_dict(self.config, self.dtype))
            write_json(temporary / "config.json", {
                "settings": dataclasses.asdict(self.cfg), "preset": self.preset, "steps": self.steps, "world_size": self.world.size,
                "model_commit": self.commit, "dtype": str(self.dtype).removeprefix("torch."), "eos_token_ids": list(self.text.eos),
                "data": [d.note for d in (self.data, self.held_data, self.sft_data)],
                "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in libraries}}})

    # -- models

    def starting_model(self):
        cfg, device = self.cfg, self.world.device
        if cfg.shard:
            model = divide(blank(self.config), self.world, self.half is torch.bfloat16)
            if cfg.from_scratch and not self.resume:
                fill(model, Transformer(self.config).init_weights(torch.Generator().manual_seed(cfg.seed)).named_parameters())
            return model if self.resume or cfg.from_scratch else fill(model, read_weights(self.base))
        if cfg.lora:
            base = load_pretrained(self.base, self.half, device)
            return add_lora(base, cfg.lora, cfg.lora_alpha, torch.Generator().manual_seed(cfg.seed), cfg.lora_projections.split(","))
        if self.resume:
            return blank(self.config).to(device)
        if cfg.from_scratch:
            return Transformer(self.config).init_weights(torch.Generator().manual_seed(cfg.seed)).to(device)
        return load_pretrained(self.base, device=device)

    def twin(self):
        """A copy of the policy that does not train, divided if the policy is."""
        if not self.cfg.shard:
            return twin(self.model)
        model = divide(blank(self.config), self.world, self.half is torch.bfloat16).requires_grad_(False)
        copy_parameters(model, self.model)
        return model

    def wrapped(self):
        """The policy as it is trained: under torchrun wrapped by DDP, unless it is divided."""
        if not self.world.many or self.cfg.shard:
            return self.model
        return torch.nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True,      # there are no buffers to broadcast
                                                         device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None)

    def plain(self, model):
        """`model` itself, or where it is divided a whole copy of it in the writer's place, until `refresh_writer`."""
        if self.cfg.shard:
            fill(self.state.writer, plain_weights(model))
            self.written_by, model = None, self.state.writer
        return model

    def refresh_writer(self):
        """The writer is the EMA itself, or a whole copy in the writer's dtype that follows whenever the EMA has moved."""
        state = self.state
        if state.writer is not state.ema and self.written_by != state.ema_version:
            fill(state.writer, plain_weights(state.ema))
        self.written_by = state.ema_version

    def begin_warm_up(self):
        self.policy = self.wrapped()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.cfg.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.draw = Draw(self.sft_data, self.cfg.sft_batch_size, self.cfg.seed, self.world)

    def begin_sapo(self):
        cfg, rank, seed = self.local, self.world.rank, self.cfg.seed
        ema, reference = self.twin(), self.twin() if cfg.loss == "dpo" else None
        separate = cfg.shard or self.half is torch.bfloat16 and not cfg.lora
        writer = blank(self.config, self.half).to(self.world.device).requires_grad_(False) if separate else ema
        self.policy, self.optimizer = self.wrapped(), make_optimizer(self.model, cfg)
        self.draw = Draw(self.data, self.cfg.batch_size, seed, self.world)
        self.state = State(self.policy, ema, writer, reference, self.optimizer, ReplayBuffer(cfg.buffer_size, seed + rank, cfg.replay),
                           np.random.default_rng(seed + rank), torch.Generator().manual_seed(seed + rank), self.text.eos, self.text.vocab,
                           max(1, round(len(self.data) / self.cfg.batch_size)), keep_ref=not cfg.shard)   # divided, all must make the same calls
        self.written_by = None

    # -- state in and out

    def trained(self, model):
        """(name, parameter) of what a checkpoint must hold: all, or the adapters alone."""
        return [(k, p) for k, p in model.named_parameters() if not self.cfg.lora or "lora_" in k]

    def parts(self):
        """(name, value) of a checkpoint's files, one model at a time in memory."""
        state, names = self.state, [k for k, p in self.model.named_parameters() if p.requires_grad]
        yield "policy", {k: whole(p) for k, p in self.trained(self.model)}
        moments = self.optimizer.state_dict()["state"]
        yield "optimizer", {names[i]: {k: whole(v) for k, v in m.items()} for i, m in moments.items()}
        for name in ("ema", "reference") if state else ():
            model = getattr(state, name)
            yield name, {k: whole(p) for k, p in self.trained(model)} if model is not None else {}
        yield "shared", {"sft_step": self.sft_step, "draw": self.draw.batch, "bad": self.bad, "sizes": self.log.sizes(), "stands_on": self.stands_on,
                         "table": self.table, "before": self.before, "evaluated": self.evaluated, "world_size": self.world.size, "sapo": bool(state),
                         **({k: getattr(state, k) for k in ("step", "ema_version", "ref_version")} if state else {})}
        own = {"buffer": state.buffer.state_dict(), "written": pack(state.written), "cuts": state.cuts.bit_generator.state,
               "sampler": state.sampler.get_state(), "held": pack(self.held.pairs), "gaps": self.held.gaps} if state else {}
        for rank, part in enumerate(self.world.all(own)):
            yield f"rank-{rank}", part

    def fingerprint(self):
        return {"data": self.data.fingerprint(), "eval_data": self.held_data.fingerprint(), "sft_data": self.sft_data.fingerprint()}

    def foundations(self):
        """{name: checksum} of what a run stands on and never writes. Were one of these another on resume, so were the run."""
        names = ["config.json", *sorted(f"source/{p.name}" for p in (self.out / "source").iterdir())] if self.world.first else []
        base = sorted(self.base.glob("*.safetensors")) if self.cfg.lora else []        # a checkpoint of adapters does not hold it
        return self.world.all({name: checksum(self.out / name) for name in names})[0] | self.fingerprint() | ({
            "model": [[path.name, path.stat().st_size, checksum(path, 2**24)] for path in base]} if base else {})

    def save(self):
        began = time.monotonic()
        folder = self.out / "checkpoint" / f"step-{self.sft_step + (self.state.step if self.state else 0):08d}"
        if folder != self.saved:                         # a whole checkpoint is never replaced: for a moment there would be none
            write_checkpoint(folder, self.parts(), self.cfg.keep, self.world)
            self.saved = folder
        self.spend("save", began)

    def load(self, folder):
        """Go on from a checkpoint: everything `parts` wrote."""
        shared = from_disk(folder / "shared")
        saved = shared["stands_on"]
        for name in self.stands_on | saved:
            if saved.get(name) != self.stands_on.get(name):
                where = getattr(self.cfg, name, None) or self.out / name
                raise BadInput(f"{where}: not what it was when the checkpoint was written; put the same files back")
        if self.steps < shared.get("step", 0):
            raise BadInput(f"--steps {self.steps}: this run has done {shared['step']} already")
        self.saved = folder
        weights = from_disk(folder / "policy")
        if weights.keys() != dict(self.trained(self.model)).keys():
            raise BadInput(f"{folder}: holds other weights than {self.out / 'source' / 'config.json'} asks for")
        fill(self.model, weights.items())
        self.sft_step, self.bad, self.table, self.before, self.evaluated = (shared[k] for k in ("sft_step", "bad", "table", "before", "evaluated"))
        if not shared["sapo"]:
            self.begin_warm_up()
        else:
            self.begin_sapo()
            state, world = self.state, self.world
            for name in ("ema", "reference"):
                if getattr(state, name) is not None:
                    fill(getattr(state, name), from_disk(folder / name).items())
            for k in ("step", "ema_version", "ref_version"):
                setattr(state, k, shared[k])
            own = deal([from_disk(folder / f"rank-{i}") for i in range(shared["world_size"])], self.cfg.batch_size, world)
            if own["cuts"] is None:                      # another number of processes: new generators
                seed = [self.cfg.seed, state.step, world.rank]
                own["cuts"] = own["buffer"]["rng"] = np.random.default_rng(seed).bit_generator.state
                own["sampler"] = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62))).get_state()
            state.buffer.load_state_dict(own["buffer"])
            state.written.extend(unpack(own["written"]))
            state.cuts.bit_generator.state = own["cuts"]
            state.sampler.set_state(own["sampler"])
            self.held = Held(self.held_data, unpack(own["held"]), own["gaps"])
        self.draw.batch = shared["draw"]
        named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        moments, saved = self.optimizer.state_dict(), from_disk(folder / "optimizer")
        moments["state"] = {i: {k: like(v, p) if v.dim() else v for k, v in saved[name].items()} for i, (name, p) in enumerate(named.items()) if name in saved}
        self.optimizer.load_state_dict(moments)
        self.world.together(lambda: self.log.cut(shared["sizes"]))
        self.log.say(f"resuming from {folder}: {self.sft_step} warm-up steps, {self.state.step if self.state else 0} SAPO steps done")

    # -- asked to stop, and time

    def poll(self):
        """True on all processes once one of them has got a signal or time is up. Called equally often by all."""
        late = self.cfg.max_minutes and time.monotonic() - self.began > 60 * self.cfg.max_minutes
        return self.world.sum([bool(self.asked or late)])[0] > 0

    def poll_or_stop(self):
        if self.poll():
            self.save()
            raise Stopped(f"stopped and saved; go on with: {self.again}")

    def spend(self, stage, began):
        self.spent[stage] = self.spent.get(stage, 0.0) + time.monotonic() - began

    # -- stages

    def stage(self, name, done, steps, peak, step, after):
        """Steps `done` ... `steps` of the warm-up or of SAPO: learning rate, one step, a line in metrics.jsonl, then `after`."""
        show = self.world.first and sys.stderr.isatty()
        with tqdm(total=steps, initial=done, desc=name, disable=not show, unit="step", leave=False) as bar:
            for number in range(done + 1, steps + 1):
                lr = learning_rate(number - 1, steps, self.cfg, peak)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                metrics = self.world.mean(step())
                bad_rows = metrics.pop("bad_rows")
                line = after(number, metrics | {"learning_rate": lr})
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                if math.isfinite(metrics["grad_norm"]):  # the same on all processes
                    self.bad = 0
                else:
                    self.bad += 1
                    rows = sorted({row for part in self.world.all(bad_rows) for row in part})
                    self.log.say(f"{name} step {number}: the gradient is not finite and changed nothing; loss not finite for data rows {rows[:16]}")
                    if self.bad >= self.cfg.max_bad_steps:
                        raise Diverged(f"{self.bad} steps in a row had a gradient that is not finite; what {self.out} holds is from before; "
                                       "look at the rows named above, or lower --lr")
                stop = self.poll()
                if (stop or number == steps or self.cfg.save_every and number % self.cfg.save_every == 0) and not self.bad:
                    self.save()
                if stop:
                    how = "and saved; go on" if not self.bad else "whose gradient was not finite; go on from the checkpoint before"
                    raise Stopped(f"stopped after {name} step {number}{', ' if self.bad else ' '}{how} with: {self.again}")

    def warm_up(self):
        cfg, log = self.cfg, self.log
        rows, micro = cfg.sft_batch_size // self.world.size, cfg.micro_batch

        def step():
            began = time.monotonic()
            metrics = warm_up_step(self.policy, self.optimizer, self.draw(rows), micro, cfg, self.autocast)
            self.spend("warm-up", began)
            return metrics

        def after(number, metrics):
            self.sft_step = number
            log.write("metrics", {"sft_step": number, **metrics})
            if number % (10 * cfg.show_every) == 0:
                log.say(f"warm-up step {number}/{cfg.sft_steps}  loss {metrics['loss']:.3f}")
            return f"loss {metrics['loss']:.3f}"

        self.stage("warm-up", self.sft_step, cfg.sft_steps, cfg.sft_lr, step, after)

    def sapo(self):
        cfg, state, log, judges = self.local, self.state, self.log, self.data.judges

        def step():
            self.refresh_writer()
            metrics = sapo_step(state, self.draw, cfg, self.autocast)
            for stage, seconds in state.times.items():
                self.spent[stage] = self.spent.get(stage, 0.0) + seconds
            for k in metrics.keys() & {"buffer/size", "gen/tokens_per_second"}:      # of all processes together
                metrics[k] *= float(self.world.size)
            if len(judges) == len(self.data):            # is y- really worse? the fresh pairs stand last in the buffer
                fresh = [state.buffer.pairs[-i] for i in range(1, cfg.batch_size + 1)]
                for side in ("chosen", "rejected"):
                    good = [passes(self.text.decode(getattr(p, side), True), judges[p.row]) for p in fresh]
                    metrics[f"pairs/{side}_judge"] = float(np.mean(good))
            return metrics

        def after(number, metrics):
            log.write("metrics", {"step": number, "epoch": number * self.cfg.batch_size / len(self.data), **metrics})
            line = f"loss {metrics['loss']:.3f}  margin {metrics['rewards/margins']:+.3f}  accuracy {metrics['rewards/accuracies']:.2f}"
            if number % cfg.show_every == 0 or number == 1:
                parts = pair_text(state.buffer.pairs[-1], self.text)
                log.write("pairs", parts)
                log.say(f"step {number}/{self.steps}  {line}  age {metrics['buffer/age']:.1f}\n{show_pair(parts)}")
            if metrics.get("ema/distance") == 0 and metrics["learning_rate"] > 0 and state.ema_version == 1:
                log.say("warning: no parameter moved; is the learning rate below what float32 can add?")
            if number < self.steps and cfg.eval_every and number % cfg.eval_every == 0:
                self.evaluate()
            return line

        self.stage("SAPO", state.step, self.steps, cfg.lr, step, after)

    def evaluate(self):
        """Policy and EMA (before the first step: the starting model, which both are) on the held-out rows, once a step."""
        state, began = self.state, time.monotonic()
        if self.evaluated == state.step:
            return
        full = state.step in (0, self.steps)
        models = {"start": self.model} if state.step == 0 else {"policy": self.model, "ema": state.ema}
        for name, model in models.items():
            model = self.plain(model)
            row = evaluate(model, self.held, self.answer, self.local, self.world, self.text, self.autocast, self.poll_or_stop, full)
            self.table[name] = row
            if full:
                texts = self.answer(model, self.shown())
                self.after[name] = [self.text.decode(ids, True) for ids in texts] if self.world.first else []
        if state.step == 0:
            self.before = self.after["start"]
        self.evaluated = state.step
        self.log.write("metrics", {"step": state.step, **{f"eval/{m}/{k}": v for m in models for k, v in self.table[m].items()}})
        self.spend("evaluate", began)

    def answer(self, model, pairs, temperature=0, top_k=0, top_p=1.0):
        """Each prompt's answer, in ids, with a generator of its own, so that evaluating changes nothing in the run."""
        generator, answers, state, cfg = torch.Generator().manual_seed(self.cfg.seed + self.world.rank), [], self.state, self.cfg
        for i in range(0, max(len(pairs), -(-len(self.held.data) // self.world.size)), cfg.write_rows):      # as often on every process
            self.poll_or_stop()
            part = pairs[i:i + cfg.write_rows]
            room = [max(1, min(cfg.eval_tokens, cfg.max_length - len(p.prompt))) for p in part]
            answers += generate(model, [p.prompt for p in part], room, state.eos, temperature, top_k, top_p, generator, state.vocab)
        return answers

    def shown(self):
        """The held-out rows answered for reading: the first, whatever the number of processes, which may change on resume."""
        return [self.held_data[i] for i in range(min(self.cfg.samples, len(self.held_data)))]

    def hold_out(self):
        """This process's share of held-out pairs: y- is the data's, or is rewritten once, now, by the starting model."""
        world, data, cfg = self.world, self.held_data, self.local
        examples, pairs = [data[i] for i in range(world.rank, len(data), world.size)], []
        scratch = dataclasses.replace(self.state, cuts=np.random.default_rng([cfg.seed, 1, world.rank]),
                                      sampler=torch.Generator().manual_seed(cfg.seed + world.rank), times={})
        for rejected in ("sapo", "data"):
            some = [e for e in examples if (e.rejected is None) == (rejected == "sapo")]
            for i in range(0, len(some), 64):
                pairs += make_pairs(scratch, some[i:i + 64], dataclasses.replace(cfg, rejected=rejected))
        return Held(data, sorted(pairs, key=lambda p: p.row), [])

    def train(self):
        cfg, world = self.cfg, self.world
        world.together(lambda: world.first and self.take())
        self.log = Log(self.out, world.first)
        for note in dict.fromkeys(d.note for d in (self.sft_data, self.data, self.held_data)):
            self.log.say(note)
        self.stands_on = self.foundations()
        checkpoint = world.all(world.together(lambda: newest_checkpoint(self.out) if self.resume and world.first else None))[0]
        if checkpoint:                                   # rank 0 writes, all read
            seen = checkpoint / "manifest.json"
            if len(set(world.all(seen.read_text("utf-8") if seen.is_file() else None))) > 1:
                raise BadInput(f"--resume {self.resume}: not all processes see {checkpoint}; on several nodes copy the run folder to each, or share it")
        if self.resume and not checkpoint:               # stopped before the first checkpoint: begin again
            self.resume = None
            if not cfg.lora and not hasattr(self, "base"):
                self.base, self.commit = find_model(cfg.model, world)
        self.model = self.starting_model()
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        sizes = [sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only) for only in (False, True)]
        self.log.say(f"{sizes[0]:,} parameters, {sizes[1]:,} of them trained, {world.size} process(es) on {world.device.type}, "
                     f"{cfg.sft_steps} warm-up steps, {self.steps} SAPO steps of {cfg.batch_size} pairs")
        if checkpoint:
            self.load(checkpoint)
        else:
            self.log.cut({"metrics": (0, None), "pairs": (0, None)})
            self.begin_warm_up()
        if self.state is None:
            self.warm_up()
            self.begin_sapo()
            self.refresh_writer()
            self.held = self.hold_out()
        if self.state.step == 0 or cfg.eval_every and self.state.step % cfg.eval_every == 0:     # perhaps stopped while evaluating
            self.evaluate()
        self.sapo()
        self.evaluate()
        self.finish()

    def finish(self):
        """The samples, both models as Hugging Face folders, the curves, and the table."""
        out, world = self.out, self.world
        base = self.cfg.model + (f" at {self.commit}" if getattr(self, "commit", None) else "")
        for name, model in (("model", self.model), ("ema", self.state.ema)) if self.steps else ():
            weights = {}
            for k, tensor in plain_weights(model):       # all processes gather, the first keeps
                if world.first:
                    weights[k] = tensor.to("cpu", self.dtype)
            if world.first:
                save_pretrained(model, out / name, self.dtype, self.files | {"README.md": self.card(name, base).encode()}, weights)
                if self.cfg.lora:
                    save_adapter(model, out / f"{name}_adapter", self.base)
        if world.first:
            prompts = [self.text.decode(e.prompt, True) for e in self.shown()]
            columns = {"prompt": prompts, "chosen": [self.text.decode(e.chosen, True) for e in self.shown()], "start": self.before, **self.after}
            lines = [json.dumps(dict(zip(columns, values)), ensure_ascii=False) + "\n" for values in zip(*columns.values())]
            (out / ".samples.tmp").write_text("".join(lines), "utf-8")
            (out / ".samples.tmp").replace(out / "samples.jsonl")
            write_json(out / "results.json", self.table)
            draw_curves(out)
            print_table(self.table)
            for i, prompt in enumerate(prompts[:1]):
                print(f"prompt  {one_line(prompt, 200)}\nbefore  {one_line(self.before[i], 400)}")
                if "policy" in self.after:
                    print(f"after   {one_line(self.after['policy'][i], 400)}")
            self.profile()
        world.all(None)

    def profile(self):
        """Where the time went, and the memory."""
        total = time.monotonic() - self.began
        shares = sorted((self.spent | {"other": total - sum(self.spent.values())}).items(), key=lambda x: -x[1])
        print(f"\n{total:.0f} s: " + ", ".join(f"{k} {v / total:.0%}" for k, v in shares if v / total >= 0.005))
        if self.world.device.type == "cuda":
            print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        else:
            with contextlib.suppress(ImportError):       # not on Windows
                import resource
                print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == 'darwin' else 1024) / 2**10:.2f} GB")
        print(f"everything is in {self.out}")

    def card(self, name, base):
        """README.md of a written model."""
        rows = [f"| {m} | " + " | ".join(f"{v:.4f}" for v in row.values()) + " |" for m, row in self.table.items()]
        heads = list(next(iter(self.table.values())))
        kept = {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(SAPOConfig)} | {k: getattr(self.cfg, k) for k in ("lr", "optimizer", "epochs", "seed", "lora")}
        settings = "\n".join(f"    {flag_of(k)} {v}" for k, v in kept.items())
        what = "the trained policy" if name == "model" else "the exponential moving average that wrote the rejected responses"
        return (f"# {what[0].upper() + what[1:]} of a SAPO run\n\nFine-tuned from `{base}` on `{self.cfg.data}` by Self-Augmented Preference Optimization "
                f"(arXiv 2405.20830), loss {self.cfg.loss}, {self.state.step} steps.\n\nOn {len(self.held_data)} held-out rows:\n\n| | {' | '.join(heads)} |\n"
                f"|{'---|' * (len(heads) + 1)}\n" + "\n".join(rows) + f"\n\nSettings:\n\n{settings}\n")



class Stopped(Exception):
    """The run was asked to stop, and has saved."""



class Diverged(Exception):
    """Too many steps in a row were not finite."""



def main(argv=None):
    """Run the command line `argv`; returns the exit code: 0 done or stopped, 1 the disk failed, 2 bad input, 3 diverged."""
    world = run = None
    say = lambda kind, text, here=int(os.environ.get("RANK", 0)) == 0: print(kind + one_line(str(text), 700), file=sys.stderr) if here else None
    shared = True                    # all processes end here, and for the same reason
    try:
        world = World(None)
        cfg, preset, resume = world.together(lambda: parse(sys.argv[1:] if argv is None else argv))
        world.place(cfg.device)
        cfg.out = world.all(cfg.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")[0]
        run = Run(cfg, preset, resume, world)
        if resume:                   # with what was changed
            run.again = "python train.py " + shlex.join(sys.argv[1:] if argv is None else argv)

        def ask(signum, frame):
            if run.asked == signal.SIGINT == signum:
                raise KeyboardInterrupt
            run.asked = signum
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, ask)
        run.train()
        return 0
    except BadInput as error:
        say("error: ", error)
        return 2
    except Stopped as stopped:
        say("", stopped)
        return 0
    except Diverged as error:
        say("error: ", error)
        return 3
    except (OSError, SafetensorError) as error:
        shared = False
        say("error: ", f"{error}; " + (f"what was saved before is whole: {run.again}" if run and run.out.exists() else "nothing was written"), True)
        return 1
    except KeyboardInterrupt:
        shared = False
        say("error: ", "stopped at once; the last checkpoint stands")
        return 130
    except Exception:
        shared = False
        raise
    finally:
        if run and run.lock:
            run.lock.close()
        if world and shared:         # NCCL's farewell waits for all; torchrun ends the others when one has left
            world.close()
if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if "RANK" in os.environ:         # gloo's threads may still hold tensors, and the interpreter's end would abort on them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
