"""The loop: supervised fine-tuning, then Algorithm 1, evaluated before and after, saved and resumed.

    python train.py                                              the tiny world, from scratch, on a laptop
    python train.py --model DIR_OR_HUB_NAME --data FILE.jsonl    SAPO on a real checkpoint
    torchrun --nproc_per_node=8 train.py ...                     the same on many GPUs
    python train.py --resume runs/NAME                           go on where it stopped

Leaves out the method (sapo.py) and what a real run needs around it (machine/). Read it from `Run.train` on.
"""

import dataclasses
import math
import os
import secrets
import sys
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from machine import process

if __name__ == "__main__":
    process.begin()              # what follows takes seconds

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from buffer import Pair, collate, pack, unpack
from losses import batch_logps, by_text
from machine import checkpoint
from machine.curves import draw_curves
from machine.dataset import Draw
from machine.files import BadInput, write_json, write_whole
from machine.flags import parse
from machine.folders import (blank, load_pretrained, load_weights, plain_weights, read_weights, save_adapter,
                             save_pretrained, stored_weights)
from machine.inputs import read_inputs
from machine.parallel import World, slow_dtype, starting_model, twin_of, wrap
from machine.process import Diverged, Stopped, signals
from machine.report import (Evaluation, Log, Moved, Pace, eval_pairs, introduction, model_card, pair_text,
                            passes, print_profile, show_pair, show_rows, table_text, write_samples)
from model import own_parameters
from sapo import (State, clear_gradients, copy_parameters, exchange_gradients, named_moments, optimizer_step,
                  sapo_step)

KEPT = ("sft_step", "bad_steps", "evaluated", "table", "answers", "stands_on", "tokens")    # in a checkpoint
OF_ALL = {"buffer/size", "gen/tokens_per_second", "gen/tokens", "train/tokens"}    # of all processes together


# ------------------------------------------------------------------------------- one step
def learning_rate(step, steps, cfg, peak):
    """Linear warm-up to `peak`, then the decay. step counts from 0; linear ends above 0.

    As in transformers, but with the warm-up one step ahead: theirs wastes the first step on a rate of 0.
    """
    warmup = cfg.warmup_steps(steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done, scale = (step - warmup) / max(1, steps - warmup), warmup or 10_000
    decay = {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
             "inverse_sqrt": math.sqrt(scale / (scale + step - warmup)), "constant": 1.0}
    return peak * decay[cfg.lr_scheduler]


def make_optimizer(model, cfg):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=cfg.lr)
    return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def sft_step(policy, optimizer, examples, cfg, autocast):
    """One step of SFT on chosen responses: the mean over rows of the mean NLL. Returns metrics."""
    clear_gradients(optimizer, policy)
    device, total = next(policy.parameters()).device, 0.0
    bad_rows = []
    for i in range(0, len(examples), cfg.micro_batch):
        part = examples[i:i + cfg.micro_batch]
        batch = collate([Pair(e.prompt, e.chosen, []) for e in part], share=False, sides=1).to(device)
        with exchange_gradients(policy, last=i + cfg.micro_batch >= len(examples)):
            with autocast():
                nll = -by_text(batch_logps(policy, batch), batch).sum(-1) / batch.lengths[:, 0]    # (n,)
            (nll.sum() / len(examples)).backward()
        bad_rows += [e.row for e, x in zip(part, nll.tolist()) if not math.isfinite(x)]
        total += nll.detach().sum().item()
    norm = optimizer_step(optimizer, policy, cfg.max_grad_norm)
    return {"loss": total / len(examples), "grad_norm": norm, "bad_rows": bad_rows}


# ---------------------------------------------------------------------------------- a run
class Run:
    """One training run in one process: what it needs is read and checked first, then `train` does it."""

    def __init__(self, command, world):
        self.world, self.resume = world, command.resume
        self.inputs = read_inputs(command, world)
        self.cfg, self.text = self.inputs.cfg, self.inputs.text
        self.data, self.steps = self.inputs.data[0], self.inputs.steps
        self.out, self.lock = Path(self.cfg.out), None
        self.began, self.sft_step = time.monotonic(), 0
        self.state = self.evaluation = None
        self.bad_steps, self.saved = 0, None
        self.table, self.answers = {}, {}                        # {model: {metric: value}}, {model: [text]}
        self.tokens = {"gen/num_tokens": 0.0, "train/num_tokens": 0.0}       # since the start
        self.evaluated, self.spent = None, {}                    # at which step; {stage: seconds}
        half = self.cfg.dtype == "bfloat16" or self.cfg.dtype == "auto" and world.device.type == "cuda"
        self.half = torch.bfloat16 if half else torch.float32
        self.autocast = partial(torch.autocast, world.device.type, torch.bfloat16) if half else nullcontext
        self.evaluation_of = partial(Evaluation, self.inputs, world, self.autocast, self.poll_or_stop)

    # -- the story
    def train(self):
        cfg, world = self.cfg, self.world
        inputs = self.inputs
        signals.at_once = False                  # while the folder is made, until it is known how to go on
        world.together(self.claim)
        signals.stop_at_once()
        for note in dict.fromkeys([*(d.note for d in inputs.data), *slow_dtype(self.half, world.device)]):
            self.log.say(note)
        if inputs.notes:
            self.log.say("written folders: " + "; ".join(inputs.notes))
        if not self.steps:
            self.log.say(show_rows(self.data, self.text))
        found = checkpoint.find_checkpoint(self.out, self.resume, world)
        if self.resume and not found:            # stopped before the first checkpoint: begin again
            if any(world.all((self.out / "model").is_dir())):
                raise BadInput(f"{self.out}: no checkpoint is left to go on from (--keep 0 has none); "
                               f"start anew from --model {self.out / 'model'}")
            self.resume = None
            inputs.find_weights(world)
        frozen = inputs.base if cfg.lora else None
        self.stands_on = checkpoint.foundations(self.out, frozen, inputs.fingerprints(), world)
        self.model = starting_model(cfg, inputs.config, inputs.base, world, self.half, bool(self.resume))
        for line in introduction(self.model, inputs, world):
            self.log.say(line)
        world.all(None)                          # all are here, none has begun
        signals.at_once = False                  # from now on there is something to save
        if found:
            self.load(found)
        else:
            self.log.cut({"metrics": 0, "pairs": 0}, -1)
            self.begin_sft()
        if self.state is None:
            self.sft()
            self.begin_sapo()
            pairs = eval_pairs(inputs.data[1], self.state.generator, cfg, self.text, world, self.poll_or_stop)
            self.evaluation = self.evaluation_of(pairs)
        if self.state.step == 0 or cfg.eval_every and self.state.step % cfg.eval_every == 0:
            self.evaluate()                      # perhaps stopped while it evaluated
        self.stage("SAPO", self.state.step, self.steps, cfg.lr, self.step, self.after_step, cfg.show_every)
        self.evaluate()
        self.finish()

    def claim(self):
        """Make the run folder, or clear up an old one, and hold it."""
        if self.world.first:
            self.lock = checkpoint.lock(self.out) if self.resume else checkpoint.new_run(self.inputs)
            checkpoint.clear_up(self.out)
        self.log = Log(self.out, self.world.first, self.cfg)
        signals.again = signals.again or process.command("--resume", self.out)

    def begin_sft(self):
        cfg, self.policy = self.cfg, wrap(self.model, self.world, self.cfg)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, cfg.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.draw = Draw(self.inputs.data[2], cfg.sft_batch_size, cfg.seed, self.world, "SFT order")

    def begin_sapo(self):
        """theta_ema = pi_ref = theta, an empty buffer, generators of this process's own."""
        cfg, world = self.cfg, self.world
        self.policy, self.optimizer = wrap(self.model, world, cfg), make_optimizer(self.model, cfg)
        self.draw = Draw(self.data, cfg.batch_size, cfg.seed, world)
        generator = None
        if cfg.shard or self.half is torch.bfloat16 and not cfg.lora:      # whole, in a dtype that is fast
            generator = blank(self.inputs.config, self.half).to(world.device).requires_grad_(False)
        self.state = State.start(
            self.policy, cfg, self.text.eos, cfg.seed, rank=world.rank, vocab=self.text.vocab,
            breaks=self.text.breaks(cfg.segment),
            optimizer=self.optimizer, generator=generator, processes=world.size,
            copy=lambda _: twin_of(self.model, cfg, world, self.half),
            steps_per_epoch=max(1, round(len(self.data) / cfg.batch_size)),
            keep_ref=not cfg.shard)              # with shards, all must make the same calls
        copy_parameters(self.state.generator, self.state.ema)

    # -- the two stages
    def stage(self, name, done, steps, peak, step, after, every):
        """Steps `done` ... `steps` of SFT or SAPO: learning rate, step(), after(...), evaluate, save, perhaps
        stop. after(...) gives the text of a line, due every `every` steps, and what is printed below it."""
        pace = Pace(done, steps, every)
        show = self.world.first and sys.stderr.isatty()
        with tqdm(total=steps, initial=done, desc=name, disable=not show, unit="step", leave=False) as bar:
            for number in range(done + 1, steps + 1):
                lr = learning_rate(number - 1, steps, self.cfg, peak)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                metrics = self.world.mean(step())
                bad_rows = metrics.pop("bad_rows")
                line, more = after(number, metrics | {"learning_rate": lr})
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                speed = pace(number)
                if speed:
                    self.log.say(f"{name} step {number}/{steps}  {line}  lr {lr:.2g}  {speed}{more}")
                self.count_bad(name, number, steps, metrics, bad_rows)
                self.save_or_stop(name, number, steps)

    def count_bad(self, name, number, steps, metrics, bad_rows):
        """Count steps in a row whose gradient was not finite, as all processes do; Diverged if they are too
        many, or all there are."""
        if math.isfinite(metrics["grad_norm"]):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        data = self.inputs.data[2] if name == "SFT" else self.data
        rows = sorted({row for part in self.world.all(bad_rows) for row in part})[:16]
        places = "; ".join(data.places[row] for row in rows) or "no row"
        self.log.say(f"{name} step {number}: the gradient is not finite and changed nothing; loss not finite "
                     f"for {places}")
        if self.bad_steps >= min(self.cfg.max_bad_steps, steps):
            raise Diverged(f"{self.bad_steps} steps in a row had a gradient that is not finite; what "
                           f"{self.out} holds is from before; look at the rows named above, or lower --lr")

    def save_or_stop(self, name, number, steps):
        every = self.cfg.eval_every
        if name == "SAPO" and number < steps and every and number % every == 0:
            self.evaluate()
        stop, every = self.poll(), self.cfg.save_every
        if not self.bad_steps and (stop or number == steps or every and number % every == 0):
            self.save()
        if stop:
            how = " and saved; go on"
            if self.bad_steps:
                how = ", whose gradient was not finite; go on from the checkpoint before"
            raise Stopped(f"stopped after {name} step {number}{how} with: {signals.again}")

    def sft(self):
        cfg = self.cfg

        def step():
            began, n = time.monotonic(), cfg.sft_batch_size // self.world.size
            metrics = sft_step(self.policy, self.optimizer, self.draw(n), cfg, self.autocast)
            self.spend("SFT", began)
            return metrics

        def after(number, metrics):
            self.sft_step = number
            self.log.write("metrics", {"sft_step": number, **metrics})
            return f"loss {metrics['loss']:.3f}", ""

        self.stage("SFT", self.sft_step, cfg.sft_steps, cfg.sft_lr, step, after, 10 * cfg.show_every)

    def step(self):
        """[1] to [9], and what the machine adds to the metrics."""
        state, verifiers = self.state, self.data.verifiers
        metrics = sapo_step(state, self.draw, self.cfg, self.autocast)
        for stage, seconds in state.clock.seconds.items():
            self.spent[stage] = self.spent.get(stage, 0.0) + seconds
        for key in metrics.keys() & OF_ALL:
            metrics[key] *= self.world.size
        generated = "gen/eos_fraction" in metrics            # with --generate-every, not on each step
        if generated and len(verifiers) == len(self.data):   # is y- really worse? they stand last
            fresh = [state.buffer.pairs[-i] for i in range(1, self.cfg.batch_size // self.world.size + 1)]
            for side in ("chosen", "rejected"):
                texts = [self.text.decode(getattr(p, side), True) for p in fresh]
                good = [passes(text, verifiers[p.row]) for text, p in zip(texts, fresh)]
                metrics[f"pairs/{side}_verified"] = float(np.mean(good))
        return metrics

    def after_step(self, number, metrics):
        cfg, log = self.cfg, self.log
        for name in self.tokens:
            self.tokens[name] += metrics[name.replace("num_", "")]         # gen/tokens, train/tokens
        drawn = -(-number // cfg.generate_every) * cfg.batch_size
        log.write("metrics", {"step": number, "epoch": drawn / len(self.data), **metrics, **self.tokens})
        line = (f"loss {metrics['loss']:.3f}  reward margin {metrics['rewards/margins']:+.3f}  "
                f"reward accuracy {metrics['rewards/accuracies']:.2f}  "
                f"staleness {metrics['buffer/staleness']:.1f}")
        pair = ""
        if number % cfg.show_every == 0 or number == 1:
            parts = pair_text(self.state.buffer.pairs[-1], self.text)
            log.write("pairs", parts)
            pair = "\n" + show_pair(parts)
        return line, pair

    # -- evaluation
    def evaluate(self):
        """Policy and EMA (at first: the starting model, which both are) on the held-out rows, once a step."""
        state, began = self.state, time.monotonic()
        if self.evaluated == state.step:
            return
        full = state.step in (0, self.steps)
        models = {"start": self.model} if state.step == 0 else {"policy": self.model, "ema": state.ema}
        for name, model in models.items():
            if self.cfg.shard:                   # the generator is lent: it is the only whole model
                model = load_weights(state.generator, plain_weights(model))
            self.table[name] = self.evaluation.measure(model, full)
            if full:
                self.answers[name] = self.evaluation.samples(model)
        if self.cfg.shard:
            copy_parameters(state.generator, state.ema)
        self.evaluated = state.step
        if state.step == 0 and not math.isfinite(self.table["start"]["nll"]):
            raise BadInput("the NLL of the held-out rows is not finite before the first step: the weights of "
                           "--model are not sound, or --sft-lr is too high")
        values = {f"eval/{name}/{key}": value for name in models for key, value in self.table[name].items()}
        self.log.write("metrics", {"step": state.step, "eval/rows": len(self.evaluation.data), **values})
        if not full:
            table = {name: self.table[name] for name in models}
            self.log.say(table_text(table, f"step {state.step}: {self.evaluation.rows}"))
        self.spend("evaluate", began)

    # -- save and resume, signals and time
    def save(self):
        began = time.monotonic()
        number = self.sft_step + (self.state.step if self.state else 0)
        folder = self.out / "checkpoint" / f"step-{number:08d}"
        if folder != self.saved and self.model:  # a whole checkpoint is never replaced
            checkpoint.write_checkpoint(folder, self.parts(), self.cfg.keep, self.world)
            self.saved = folder
        self.spend("save", began)

    def parts(self):
        """{name: value} of everything a checkpoint must hold."""
        if self.state:
            parts = self.state.state_dict()
            parts["own"] |= {"eval_pairs": pack(self.evaluation.pairs), "gaps": self.evaluation.gaps}
        else:
            parts = {"policy": own_parameters(self.model), "shared": {}, "own": {},
                     "optimizer": named_moments(self.model, self.optimizer)}
        parts["shared"] |= {name: getattr(self, name) for name in KEPT} | {
            "sapo": self.state is not None, "draw": self.draw.batch, "sizes": self.log.sizes(),
            "world_size": self.world.size}
        return parts

    def load(self, folder):
        """Go on from a checkpoint: everything that `parts` wrote."""
        shared, world = checkpoint.from_disk(folder, "shared"), self.world
        saved = shared["stands_on"]
        for name in self.stands_on | saved:
            if saved.get(name) != self.stands_on.get(name):
                where = getattr(self.cfg, name, None) or self.out / name
                raise BadInput(f"{where}: not what it was when the checkpoint was written; put the same "
                               "files back")
        if self.steps < shared.get("step", 0):
            raise BadInput(f"--steps {self.steps}: this run has done {shared['step']} already")
        self.saved = folder
        for name in KEPT:
            setattr(self, name, shared[name])
        self.begin_sapo() if shared["sapo"] else self.begin_sft()
        models = self.state.models() if self.state else {"policy": self.model}
        for name, model in models.items():
            load_weights(model, checkpoint.tensors_of(folder, name))
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        self.draw.batch = shared["draw"]
        if self.state:
            owns = [checkpoint.from_disk(folder, f"rank-{i}") for i in range(shared["world_size"])]
            own = checkpoint.redistribute(owns, self.cfg.batch_size, self.cfg.seed, shared["step"], world)
            self.state.load_state_dict({"shared": shared, "own": own})
            copy_parameters(self.state.generator, self.state.ema)
            self.evaluation = self.evaluation_of(unpack(own["eval_pairs"]), own["gaps"])
        done = shared.get("step", 0)
        self.log.cut(shared["sizes"], self.sft_step + done)
        self.log.say(f"resuming from {folder}: {self.sft_step} SFT steps, {done} SAPO steps done")

    def poll(self):
        """True on all processes once one has got a signal or time is up. All call it equally often."""
        late = self.cfg.max_minutes and time.monotonic() - self.began > 60 * self.cfg.max_minutes
        return self.world.sum([bool(signals.asked or late)])[0] > 0

    def poll_or_stop(self):
        if self.poll():
            if self.evaluation:                  # else SAPO has not begun, and what went before is saved
                self.save()
            raise Stopped(f"stopped and saved; go on with: {signals.again}")

    def spend(self, stage, began):
        self.spent[stage] = self.spent.get(stage, 0.0) + time.monotonic() - began

    # -- the end
    def finish(self):
        """The models as Hugging Face folders, measured as written; the samples, the curves, and the table."""
        moved, out = "", self.out
        if self.steps:
            moved = self.export("model", self.model)
            self.export("ema", self.state.ema)
            self.measure_written()
        if self.world.first:
            for name in ("model", "ema") if self.steps else ():
                write_whole(out / name / "README.md", model_card(name, self.inputs, self.table, moved))
            write_json(out / "results.json", self.table)
            draw_curves(out)
            print("", table_text(self.table, self.evaluation.rows), "", sep="\n")
            if moved:
                print(moved)
            write_samples(out / "samples.jsonl", self.evaluation.shown, self.text, self.answers)
            print_profile(time.monotonic() - self.began, self.spent, self.world.device)
            print(f"everything is in {out}")
            if self.steps and not self.cfg.keep and (out / "checkpoint").exists():
                (out / "checkpoint").rename(out / "checkpoint.tmp")      # half deleted, it would look torn
                checkpoint.clear_up(out)
        self.world.all(None)

    def export(self, name, model):
        """A model as a Hugging Face folder, and its adapter; all processes gather, the first keeps. Returns
        what Moved says of it."""
        cfg, inputs = self.cfg, self.inputs
        first, weights = self.world.first, {}
        here = first and name == "model" and not (cfg.from_scratch or cfg.sft_steps)   # the run's own start
        moved = Moved(stored_weights(cfg.model) if here else {}, self.half, cfg.lora)
        for key, tensor in plain_weights(model):
            if first:
                weights[key] = tensor.to("cpu", inputs.written())
                moved.add(key, tensor, weights[key])
        if first:
            files = {file: content for file, content in inputs.files.items() if file != "README.md"}
            save_pretrained(model, self.out / name, inputs.written(), files, weights)
            if cfg.lora:
                save_adapter(model, self.out / f"{name}_adapter", *inputs.origin())
        self.world.all(None)                     # as in write_checkpoint
        return moved.line()

    def measure_written(self):
        """Measure model/ as it is on disk, once all that was trained is freed: a second model may not fit."""
        began, folder = time.monotonic(), self.out / "model"
        generator = self.state.generator if self.cfg.shard else None
        self.state = self.optimizer = None
        self.policy = self.model = None

        def read_back():
            if generator:
                return load_weights(generator, read_weights(folder))
            return load_pretrained(folder, self.half if self.cfg.lora else torch.float32, self.world.device)

        self.world.all(None)                     # once the first has written it
        if all(self.world.all((folder / "config.json").is_file())):
            self.table["written"] = self.evaluation.measure(self.world.together(read_back))
        else:
            self.log.say("model/ is not measured as written: not all processes see it")
        self.spend("evaluate", began)


# ---------------------------------------------------------------------------- the command
def begin(argv, world):
    """The Run for a command line; until it is prepared, a signal ends it at once."""
    signals.stop_at_once()
    command = world.together(lambda: parse(argv, __doc__.rpartition("\n\n")[0]))
    world.together(lambda: world.place(command.cfg.device))
    signals.again = process.command(*argv) if command.resume else ""         # with what was changed
    default = f"runs/{command.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    out = world.all(command.cfg.out or default)[0]
    return Run(command._replace(cfg=dataclasses.replace(command.cfg, out=out)), world)


def main(argv=None):
    """Run a command line: 0 done or stopped, 1 the disk failed, 2 bad input, 3 diverged, 130 interrupted."""
    world = run = None
    code, together = 0, True         # whether all processes end here, and for the same reason
    signals.again = ""
    signals.mind()
    try:
        try:
            world = World(None)
            run = begin(sys.argv[1:] if argv is None else argv, world)
            run.train()
        finally:
            signals.at_once, signals.asked = False, None
            if run and run.lock:
                run.lock.close()
    except (BadInput, Stopped, Diverged) as end:
        code = end.code
        process.say("error: " if code else "", end)
    except (OSError, SafetensorError) as error:
        code, together = 1, False
        kept = "what was saved before is whole: " if signals.again else "nothing was written"
        process.say("error: ", f"{error}; {kept}{signals.again}", always=True)
    except KeyboardInterrupt:
        code, together = 130, False
        process.say("error: ", "stopped at once; the last checkpoint stands")
    if world and together:           # NCCL's farewell waits for all; torchrun ends others when one has left
        world.close()
    return code


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if "RANK" in os.environ:     # gloo's threads may hold tensors still, on which Python's end would abort
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
