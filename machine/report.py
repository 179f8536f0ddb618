"""What a run says of itself: at its start, on held-out rows, in its log, at its end; curves.py draws it."""

import dataclasses
import json
import math
import os
import re
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open
from tqdm import tqdm

from buffer import collate
from losses import WITH_REFERENCE, score
from machine.files import plain_file, to_json, write_whole
from machine.flags import flag_of
from machine.process import one_line
from model import generate
from sapo import SAPOConfig, generate_segments, pair_of_data, splice, split, stream


# ------------------------------------------------------------------------------ the start
def introduction(model, inputs, world):
    """What a run is about to do, line by line, and what it would be well to change before it does."""
    cfg, steps = inputs.cfg, inputs.steps
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield (f"{size:,} parameters, {trained:,} of them trained, {world.size} process(es) on "
           f"{world.device.type}, {cfg.sft_steps} SFT steps, {steps} SAPO steps of {cfg.batch_size} pairs, "
           f"{cfg.warmup_steps(steps)} of them warm-up of the learning rate")
    copies = 2 + (cfg.loss in WITH_REFERENCE) + (2 if cfg.optimizer == "adamw" else 1)      # all float32
    if steps:
        yield (f"a checkpoint will take {trained * copies * 4 / 1e6:,.0f} MB; there will be one every "
               f"{cfg.save_every or steps} steps, and {max(1, cfg.keep)} kept (--save-every, --keep)")
    lengths = np.diff(inputs.data[0].ends[:, :2])[:, 0] - 1      # of y+, without its end token
    whole = np.mean(lengths <= int(cfg.segment)) if cfg.segment.isdigit() else 0
    if whole > 0.5 and steps and cfg.rejected == "sapo":
        yield (f"warning: {whole:.0%} of the responses (median {np.median(lengths):.0f} tokens) are no "
               f"longer than --segment {cfg.segment}, so they are replaced whole; give --segment 50%")


# ----------------------------------------------------------------------------- evaluation
def eval_pairs(data, model, cfg, text, world, poll):
    """This process's share of the held-out rows, as Pairs whose y- stays the same all run long.

    It is the data's own, or else made now by `model`, the starting one, as SAPO makes it. Every size-th row
    is this process's, so that shares differ by one at most. poll() is `Evaluation`'s.
    """
    cut_rng = np.random.default_rng(stream(cfg.seed, "held-out cuts", world.rank))
    rng = torch.Generator().manual_seed(stream(cfg.seed, "held-out sampler", world.rank))
    mine = [data[i] for i in range(world.rank, len(data), world.size)]
    bare = [e for e in mine if e.rejected is None]
    pairs = [pair_of_data(e) for e in mine if e.rejected is not None]
    breaks = text.breaks(cfg.segment)
    cuts = [split(e.chosen, cfg.segment, text.eos, cut_rng, breaks, cfg.after) for e in bare]
    for i in range(0, -(-len(data) // world.size), cfg.generate_rows):           # as often on every process
        poll()
        some = slice(i, i + cfg.generate_rows)
        new = generate_segments(model, bare[some], cuts[some], cfg, text.eos, rng, text.vocab, breaks=breaks)
        pairs += map(splice, bare[some], cuts[some], new, repeat(text.eos))
    return sorted(pairs, key=lambda p: p.row)


def passes(answer, verifier):
    """Whether every word (or phrase) of "must" stands in the answer and none of "must_not"; case aside."""
    def has(phrase):
        return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", answer, re.IGNORECASE) is not None

    return all(map(has, verifier.get("must", ()))) and not any(map(has, verifier.get("must_not", ())))


class Evaluation:
    """Held-out rows, and how a model is measured on them by all processes together.

    poll() is called now and then, equally often by all, and raises where the run is to stop. pairs: this
    process's, from `eval_pairs`; gaps: log p(y+) - log p(y-) of the starting model on them, once measured.
    """

    def __init__(self, inputs, world, autocast, poll, pairs, gaps=()):
        self.cfg, self.text = inputs.cfg, inputs.text
        self.data, self.world = inputs.data[1], world
        self.autocast, self.poll = autocast, poll
        self.pairs, self.gaps = pairs, list(gaps)
        self.share = -(-len(self.data) // world.size)    # rows of a process, at most
        self.rows = f"{len(self.data)} held-out rows, {len(self.data.verifiers)} of them with a verifier"
        self.shown = [self.data[i] for i in range(min(self.cfg.samples, len(self.data)))]

    @torch.no_grad()
    def measure(self, model, full=True):
        """{metric: value} of a model.

        nll: per token of y+. ranking_accuracy: share of rows whose mean log-prob is higher for y+ than for
        y-; no reference. gap_change: log p(y+) - log p(y-), minus the starting model's. verifier/...: share
        of answers that pass: greedy, and with `full` also at the run's own sampling settings and at
        temperature 1.
        """
        table = self.log_probs(model)
        if self.data.verifiers:
            cfg = self.cfg
            table["verifier/greedy"] = self.verified(model)
            if full:
                table["verifier/sampled"] = self.verified(model, cfg.temperature, cfg.top_k, cfg.top_p)
                table["verifier/temperature_1"] = self.verified(model, 1.0)
        return table

    def log_probs(self, model):
        sums, gaps = np.zeros(4), []     # nll, tokens, ranked right, change of the gap
        for i in range(0, self.share, self.cfg.micro_batch):
            self.poll()
            part = self.pairs[i:i + self.cfg.micro_batch]
            if not part:
                continue
            batch = collate(part).to(self.world.device)
            with self.autocast():
                chosen, rejected = score(model, batch)
            gap, lengths = chosen - rejected, batch.lengths
            right = (chosen / lengths[:, 0] > rejected / lengths[:, 1]).sum().item()
            start = self.gaps[i:i + self.cfg.micro_batch] or gap.tolist()
            gaps += gap.tolist()
            change = math.fsum(gap.tolist()) - math.fsum(start)
            sums += [-chosen.sum().item(), lengths[:, 0].sum().item(), right, change]
        self.gaps = self.gaps or gaps
        sums, rows = self.world.sum(sums.tolist()), len(self.data)
        return {"nll": sums[0] / sums[1], "ranking_accuracy": sums[2] / rows, "gap_change": sums[3] / rows}

    def verified(self, model, temperature=0, top_k=0, top_p=1.0):
        """Share of answers that pass their row's verifier."""
        verifiers = self.data.verifiers
        pairs = [p for p in self.pairs if p.row in verifiers]
        answers = self.answers(model, pairs, temperature, top_k, top_p)
        good = [passes(self.text.decode(a, True), verifiers[p.row]) for p, a in zip(pairs, answers)]
        return self.world.sum([sum(good)])[0] / len(verifiers)

    def answers(self, model, pairs, temperature=0, top_k=0, top_p=1.0):
        """Each prompt's answer, in ids. The draws are its own: evaluating changes nothing in the run."""
        cfg, answers = self.cfg, []
        rng = torch.Generator().manual_seed(stream(cfg.seed, "answers", self.world.rank))
        for i in range(0, max(len(pairs), self.share), cfg.generate_rows):       # as often on every process
            self.poll()
            prompts = [p.prompt for p in pairs[i:i + cfg.generate_rows]]
            room = [max(1, min(cfg.eval_tokens, cfg.max_length - len(prompt))) for prompt in prompts]
            answers += generate(model, prompts, room, self.text.eos, temperature, top_k, top_p, rng,
                                self.text.vocab)
        return answers

    def samples(self, model):
        """The first rows answered greedily, as text, whatever the number of processes."""
        return [self.text.decode(ids, True) for ids in self.answers(model, self.shown)]


# ------------------------------------------------------------------------------------ log
class Log:
    """metrics.jsonl, pairs.jsonl, TensorBoard and the screen, by rank 0; `sizes` and `cut` keep a resumed log
    seamless. A step of TensorBoard's counts the steps of both stages."""

    def __init__(self, folder, first, cfg):
        self.folder, self.cfg = folder, cfg
        self.first, self.board = first, None
        self.files = {name: open(plain_file(folder / f"{name}.jsonl"), "a", encoding="utf-8")
                      for name in ("metrics", "pairs") if first}

    def write(self, name, row):
        if self.first:
            rounded = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in row.items()}
            self.files[name].write(to_json(rounded) + "\n")
            self.files[name].flush()
        if self.board and name == "metrics":
            step = row.get("sft_step") or self.cfg.sft_steps + row["step"]
            for key in row.keys() - {"step", "sft_step"}:
                self.board.add_scalar("SFT/" * ("sft_step" in row) + key, row[key], step)
            self.board.flush()

    def say(self, line):
        if self.first:
            tqdm.write(line)

    def sizes(self):
        """{name: bytes} of what was written so far, which the disk holds from now on."""
        for f in self.files.values():
            os.fsync(f.fileno())
        return {name: os.path.getsize(f.name) for name, f in self.files.items()}

    def cut(self, sizes, steps):
        """Take back what was written after a checkpoint at `steps` of both stages: no line twice, none
        missing. TensorBoard is told to hide it (an evaluation at that very step it may show twice)."""
        if self.first and self.cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=steps + 1)
        for name, f in self.files.items():
            if os.path.getsize(f.name) < sizes[name]:
                self.say(f"warning: {f.name} is shorter than it was; its lost lines stay lost")
                f.truncate(Path(f.name).read_bytes().rfind(b"\n") + 1)          # half a line is none
            else:
                f.truncate(sizes[name])


class Pace:
    """'0.35 s/step, 00:42 left', all included, at the first steps, each `every`-th, the last, each minute."""

    def __init__(self, done, steps, every):
        self.done, self.steps = done, steps
        self.every = every
        self.began = self.said = time.monotonic()

    def __call__(self, number):
        now = time.monotonic()
        if number not in (1, 2, 5, self.steps) and number % self.every and now - self.said < 60:
            return ""
        self.said, each = now, (now - self.began) / (number - self.done)
        return f"{each:.2g} s/step, {tqdm.format_interval(each * (self.steps - number))} left"


def pair_text(pair, text):
    """A triple as text and ids. A part is what it adds: Llama's tokenizers strip a text's first space."""
    def part(ids, start=0, stop=None):
        return text.decode(ids[:stop])[len(text.decode(ids[:start])):]

    return {"step": pair.step, "row": pair.row, "prompt": part(pair.prompt),
            "A": part(pair.chosen, 0, pair.start), "B": part(pair.chosen, pair.start, pair.stop),
            "B'": part(pair.rejected, pair.start, pair.rejected_stop), "C": part(pair.chosen, pair.stop),
            "C kept": pair.keeps_C or pair.stop == len(pair.chosen),
            "ids": [pair.prompt, pair.chosen, pair.rejected],
            "cuts": [pair.start, pair.stop, pair.rejected_stop]}


def show_pair(parts):
    """Both texts of `pair_text`, B and B' in brackets, in two lines."""
    A, C = one_line(parts["A"], 40), one_line(parts["C"], 40)
    B, new = one_line(parts["B"], 60), one_line(parts["B'"], 60)
    return f"    y+  {A} [{B}] {C}\n    y-  {A} [{new}] {C if parts['C kept'] else ''}"


def show_rows(data, text, n=3):
    """The first rows of a Data as the loss sees them: whole texts, end tokens marked, and ids."""
    lines = []
    for i in range(min(n, len(data))):
        row = data[i]
        lines.append(f"{data.places[i]}:")
        for name, ids in (("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected)):
            if ids:
                cut = len(ids) - (name != "prompt" and ids[-1] in text.eos)
                end = f" and the end token {text.decode(ids[cut:])!r}" if ids[cut:] else ""
                lines += [f"    {name:<8}  {text.decode(ids[:cut])!r}{end}", f"              {ids}"]
    return "\n".join(lines)


# -------------------------------------------------------------------------------- the end
def table_text(table, rows):
    """{model: {metric: value}} as aligned text, under a line that says what rows it is of."""
    columns = list(next(iter(table.values())))
    lines = [rows, "eval      " + "  ".join(c.rjust(max(8, len(c))) for c in columns)]
    for name, row in table.items():
        lines.append(f"{name:<8}  " + "  ".join(f"{row[c]:.3f}".rjust(max(8, len(c))) for c in columns))
    return "\n".join(lines)


def print_profile(seconds, stages, device):
    """Where the time went, and a GPU's memory."""
    shares = sorted((stages | {"other": seconds - sum(stages.values())}).items(), key=lambda x: -x[1])
    parts = [f"{name} {share / seconds:.0%}" for name, share in shares if share / seconds >= 0.005]
    print(f"\n{seconds:.0f} s: " + ", ".join(parts))
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def write_samples(path, examples, text, answers):
    """samples.jsonl: prompts, what was chosen, and {model: [answer to each]}; the first also printed."""
    columns = {"prompt": [text.decode(e.prompt) for e in examples],
               "chosen": [text.decode(e.chosen, True) for e in examples], **answers}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for sample in rows[:1]:
        print(f"prompt  {one_line(sample['prompt'], 200)}\nbefore  {one_line(sample['start'], 400)}")
        if "policy" in sample:
            print(f"after   {one_line(sample['policy'], 400)}")


class Moved:
    """How much of what training changed can be seen: in the written weights, and in forward passes in `half`.
    start: the `stored_weights` it began with; {} where they are not at hand, and then nothing is said."""

    def __init__(self, start, half, lora):
        self.start, self.dtype = start, half if lora else torch.float32      # in which they were read
        self.half = torch.float32 if lora else half      # adapters are not rounded together with the base
        self.counts = np.zeros(4, np.int64)      # weights; those that moved; of these, written so, seen so

    def add(self, name, trained, written):
        file, shape, _ = self.start.get(name, (None, None, None))
        if shape == tuple(trained.shape):
            with safe_open(file, "pt") as f:
                start, trained = f.get_tensor(name).to(self.dtype), trained.to("cpu")
            moved, seen = trained != start, trained.to(self.half) != start.to(self.half)
            self.counts += [moved.numel(), *(int(x.sum()) for x in (moved, moved & (written != start), seen))]

    def line(self):
        size, moved = self.counts[:2].tolist()
        kept, seen = self.counts[2:] / max(1, moved)
        half = f", {seen:.1%} in forward passes, as bfloat16" if self.half is torch.bfloat16 else ""
        return (f"{moved:,} of {size:,} weights moved; {kept:.1%} of those differ from the start in the "
                f"written folder{half}") if size else ""


def front_matter(inputs):
    """The Hub's metadata of a model that this run made, as YAML; the licence is the one of the base's."""
    try:
        stated = metadata_load(Path(inputs.cfg.out, "source", "README.md")) or {}
    except Exception:                                    # there is none, or it is broken in any way
        stated = {}
    licence = {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}
    base = inputs.origin()[0] if inputs.commit and not inputs.cfg.from_scratch else None
    data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation",
                         tags=["sapo", inputs.cfg.loss], **licence)
    return f"---\n{data.to_yaml()}\n---\n"


def model_card(name, inputs, table, moved):
    """README.md of a written model: what it is, from what, and what was measured."""
    cfg, heads = inputs.cfg, list(next(iter(table.values())))
    what = "The trained policy" if name == "model" else "The moving average, which generated y-,"
    begun = "Trained from random weights, with the config of" if cfg.from_scratch else "Fine-tuned from"
    lines = []
    for model, row in table.items():
        lines.append(f"| {model} | " + " | ".join(f"{v:.4f}" for v in row.values()) + " |")
    shown = [f.name for f in dataclasses.fields(SAPOConfig)] + ["lr", "optimizer", "epochs", "seed", "lora"]
    settings = [f"    {flag_of(k)} {getattr(cfg, k)}" for k in shown]
    return "\n".join([
        f"{front_matter(inputs)}\n# {what} of a SAPO run\n",
        f"{begun} `{cfg.model}` on `{cfg.data}` by Self-Augmented Preference Optimization (arXiv "
        f"2405.20830), loss {cfg.loss}, {inputs.steps} steps.\n",
        f"On {len(inputs.data[1])} held-out rows; `written` is model/ as it was read back from the disk, "
        f"{inputs.written()}:\n",
        f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}", *lines,
        f"\n{moved}" if moved and name == "model" else "",
        "\nSettings:\n", *settings, ""])
