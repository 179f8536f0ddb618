"""What it costs: seconds and memory of this code beside transformers and TRL, on the same weights and the same tokens.

    python tools/bench.py [generate|train|step|padding|growth|all] [--device cpu|cuda] [--threads N] [--repeats 5]
                          [--sizes tiny,small,smollm2] [--model DIR] [--json FILE] [--figure FILE.png] [--quick]
                          [--data FILE.jsonl] [--against REVISION]

    generate   `generate` against transformers' (sampling, KV cache on), and against transformers without a cache, which
               is the authors' way
    train      one optimizer step on the same pairs: with the prefix shared, with both texts in full, by a revision
               --against, and by TRL's own trainer; seconds, memory, share of the matmul peak, page faults
    step       the whole of Algorithm 1, a step, against transformers' generate and TRL's step
    padding    pairs of unequal lengths (Capybara's, and those of --data): how many of the tokens that go through the
               matrices are real, beside two padded layouts; then a step, with the revision --against beside it, and TRL
    growth     how time and memory grow with length, batch, segment, vocabulary and buffer, beside what they ought to do

With --device cuda the first three are the GPU's tables: decoding against the bandwidth floor and transformers, training
against the matmul peak (and TRL where it is installed), the stages of a step. --quick tries the script at toy sizes;
with --as-gpu it tries the GPU's tables on a CPU.

How: all variants run in one process in the order A B A B after one unmeasured round. A number is a median, in brackets
the least and the greatest; a ratio is the median of each round's own ratio, above 1 where we are faster. Both sides use
AdamW at the same rate, clip the gradient, compute the reference's log-probs anew in each step, and must agree in their
losses (`loss apart`: the greatest difference over all rounds). TRL runs its own collator and compute_loss, without
truncation and recomputation; the rest of its Trainer is spared it. Memory is what a fresh process (on CUDA: the
allocator) needs at its peak above weights and AdamW's moments. Left out: quality, which the tests and tools/study.py
look at.
"""

import argparse
import functools
import gc
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
               "TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
               "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import sapo
from buffer import Pair, ReplayBuffer, collate
from losses import IGNORE, batch_logps, scored_tokens
from machine.folders import load_pretrained, save_pretrained
from model import ModelConfig, Transformer, generate, twin

warnings.filterwarnings("ignore", category=FutureWarning)
MiB, GiB = 2**20, 2**30
SAMPLING = dict(temperature=0.7, top_k=50, top_p=0.95)      # the authors'
#          hidden, layers, heads, key-value heads, intermediate, vocabulary
SIZES = {"toy": (64, 2, 4, 2, 128, 256), "tiny": (128, 4, 4, 2, 352, 1024), "small": (512, 8, 8, 4, 1376, 8192),
         "trained": (256, 4, 4, 2, 704, 8192), "smollm2": (576, 30, 9, 3, 1536, 49152), "wide": (576, 4, 9, 3, 1536, 49152),
         "1.2B": (2048, 16, 32, 8, 8192, 128256)}
#          median tokens of a prompt and of a response; lengths are lognormal with sigma 0.7, and 1792 and 2048 in all at most
LENGTHS = {"Capybara-like": (500, 300), "long answers": (120, 700)}
#          prompt, A, B, C; prompt + A is shared, B + C is not   vocabulary, pairs
SHAPES = {"long": ((512, 128, 256, 128), 49152, 2), "short": ((48, 16, 192, 64), 8192, 4)}


# ----------------------------------------------------------------------------- measuring
def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def rounds(variants, repeats, device):
    """{variant: function} -> {variant: seconds of each repetition}, A B A B, after one round that is not measured."""
    seconds = {name: [] for name in variants}
    for i in range(repeats + 1):
        for name, run in variants.items():
            gc.collect()
            sync(device)
            start = time.perf_counter()
            run()
            sync(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values, unit=1.0, digits=3):
    """'median [least-greatest]' of the values in a unit."""
    least, middle, most = (f"{v / unit:.{digits}g}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} [{least}-{most}]"


def times_faster(seconds, ours, theirs):
    return spread([b / a for a, b in zip(seconds[ours], seconds[theirs])]) if theirs in seconds else "-"


def memory_of(run, device):
    """Bytes that memory rises by at most while run() runs; None where this cannot be told (only CUDA and Linux say)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    now = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    try:
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)                    # freed memory goes back first
        Path("/proc/self/clear_refs").write_text("5")       # the highest so far is forgotten
    except (OSError, AttributeError):
        return None
    before = now("VmRSS")
    run()
    return now("VmHWM") - before


class Report:
    """Tables on standard output, rows as they come on standard error, and all of it with raw seconds in a JSON file."""

    def __init__(self, path, about):
        self.path, self.start, self.shown = path, time.perf_counter(), {}
        self.data = {"about": about, "tables": {}, "errors": {}}
        print("  ".join(f"{k} {v}" for k, v in about.items()), flush=True)

    def row(self, table, raw=None, **cells):
        self.data["tables"].setdefault(table, []).append(cells | {"raw": raw})
        line = " | ".join(map(str, cells.values()))
        print(f"{time.perf_counter() - self.start:6.0f} s  {table}: {line}", file=sys.stderr, flush=True)
        self.save()

    def save(self):
        if self.path:
            Path(self.path).write_text(json.dumps(self.data, indent=1) + "\n")

    def show(self):
        """Print the rows that were not printed yet, as aligned tables."""
        for title, rows in self.data["tables"].items():
            rows, self.shown[title] = rows[self.shown.get(title, 0):], len(rows)
            if rows:
                names = [k for k in rows[0] if k != "raw"]
                lines = [names] + [[str(r.get(k, "")) for k in names] for r in rows]
                widths = [max(map(len, column)) for column in zip(*lines)]
                aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
                print(f"\n{title}", *aligned, sep="\n", flush=True)

    @contextmanager
    def section(self, name):
        """What fails in here is printed and noted, and the run goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            print(f"{name} failed and is left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self.data["errors"][name] = traceback.format_exc()
            self.save()
            error.__traceback__ = None                      # it holds models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------- models, ours and theirs
def build(size, device="cpu", dtype=torch.float32, seed=0, vocab=None, Transformer=Transformer):
    """A Transformer of random weights."""
    hidden, layers, heads, kv, intermediate, V = SIZES[size]
    config = ModelConfig(vocab or V, hidden, intermediate, layers, heads, kv, hidden // heads,
                         max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device(device):
        return Transformer(config).init_weights(torch.Generator(device).manual_seed(seed)).to(dtype)


def toy(args, usual):
    """A size or a vocabulary, or with --quick the toy one."""
    return usual if not args.quick else "toy" if isinstance(usual, str) else 256


def shrink(args, lengths):
    return [max(1, k // 16) for k in lengths] if args.quick else list(lengths)


def the_model(args, size, dtype):
    """(model, label): the checkpoint of --model for the size smollm2, else random weights."""
    if size == "smollm2" and args.model:
        return load_pretrained(args.model, dtype, args.device), "SmolLM2-135M"
    return build(toy(args, size), args.device, dtype), size


def transformers_copy(model, dtype=torch.float32):
    """transformers' model of the same weights, by way of a folder."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model", dtype)
        copy = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    return copy.to(model.lm_head.weight.device)


def missing(*modules):
    """The reason why a peer cannot run here, or None."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"{name} cannot be imported ({type(error).__name__})"


def random_ids(n, vocab, seed):
    return torch.randint(1, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def their_kernels():
    """All of torch's attention kernels, as transformers has them; model.py leaves one out."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


@their_kernels()
def their_generate(model, prompts, n, cache=True, **sampling):
    """transformers' generate: n tokens after each prompt (a list of ids), shorter prompts padded on the left."""
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with patch.object(model.generation_config, "eos_token_id", None), torch.inference_mode():
        model.eval()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n, use_cache=cache, pad_token_id=0,
                             **(sampling or dict(do_sample=False)))
    assert out.shape[1] == width + n
    return out[:, width:].tolist()


def trl_trainer(loss, model, reference, cfg):
    """TRL's trainer around a transformers model. It gets one row of text to be content; we hand its collator ids."""
    import datasets
    import tokenizers
    import transformers
    import trl
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>"))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                                 unk_token="<unk>")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    common = dict(output_dir=tempfile.mkdtemp(), use_cpu=model.device.type == "cpu", bf16=False, report_to="none",
                  gradient_checkpointing=False)
    if loss == "dpo":
        args = trl.DPOConfig(**common, beta=cfg.beta, max_length=None)
        return trl.DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=words)
    orpo = importlib.import_module("trl.experimental.orpo")
    args = orpo.ORPOConfig(**common, beta=cfg.lam, max_length=10**9)            # None would mean 512
    return orpo.ORPOTrainer(model=model, args=args, train_dataset=rows, processing_class=words)


def trl_row(pair, loss):
    """A Pair as a row of TRL's tokenized data set, as each trainer's collator wants it."""
    if loss == "dpo":
        return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    row = {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
    for side in ("chosen", "rejected"):
        ids = pair.prompt + getattr(pair, side)
        row |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids),
                f"{side}_labels": [-100] * len(pair.prompt) + getattr(pair, side)}
    return row


# ----------------------------------------------------------------------------- one training step, three ways
def make_pairs(n, lengths, vocab, seed=0):
    """n Pairs whose prompt, A, B and C have these lengths; B' is as long as B."""
    pairs = []
    for i in range(n):
        prompt, A, B, C, new = (random_ids(k, vocab, 5 * (seed + i) + j) for j, k in enumerate((*lengths, lengths[2])))
        pairs.append(Pair(prompt, A + B + C, A + new + C, len(A), len(A + B), len(A + B)))
    return pairs


def micro_batches(pairs, cfg):
    """As sapo forms them, by length: the same for TRL, so that padding is not what is compared."""
    order = sorted(pairs, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
    return [order[i:i + cfg.micro_batch] for i in range(0, len(order), cfg.micro_batch)]


def our_trainer(policy, reference, cfg, share=True, autocast=nullcontext, sapo=sapo):
    """pairs -> loss: gradient, clipping, AdamW, as in sapo_step. keep_ref False: the reference is scored each time."""
    state = sapo.State.start(policy, cfg, (), keep_ref=False)
    state.ema = state.generator = policy                    # no EMA takes part here
    state.reference = reference if cfg.loss == "dpo" else None
    laid_out = functools.partial(sapo.collate, share=share)

    def step(pairs):
        state.clock.start()
        with patch.object(sapo, "collate", laid_out):
            loss = sapo.accumulate_gradient(state, pairs, cfg, autocast)["loss"]
        return finish(loss, policy, state.optimizer, cfg)
    return step


@functools.cache
def revision(name):
    """(model, sapo), two modules of the project as a revision of git has them."""
    root, ours = Path(__file__).resolve().parent.parent, ("losses", "model", "buffer", "sapo")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", name, *(f"{m}.py" for m in ours)], cwd=root, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        with patch.dict(sys.modules), patch.object(sys, "path", [folder, *sys.path]):
            for module in ours:
                del sys.modules[module]
            importlib.invalidate_caches()
            return importlib.import_module("model"), importlib.import_module("sapo")


def their_trainer(policy, reference, cfg, autocast=nullcontext):
    """The same with transformers' models, TRL's collator and TRL's compute_loss."""
    trainer = trl_trainer(cfg.loss, policy, reference, cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)

    @their_kernels()
    def step(pairs):
        policy.train()
        total = 0.0
        for part in micro_batches(pairs, cfg):
            batch = trainer._prepare_inputs(trainer.data_collator([trl_row(p, cfg.loss) for p in part]))
            with autocast():
                loss = trainer.compute_loss(policy, batch) * len(part) / len(pairs)
            loss.backward()
            total += loss.item()
        return finish(total, policy, optimizer, cfg)
    return step


def finish(loss, policy, optimizer, cfg):
    torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)                   # at the end, so that memory_of counts gradients
    return loss


def train_variant(variant, size, vocab, cfg, device="cpu", autocast=nullcontext, checkpointing=False):
    """(step, policy): policy from seed 0, the reference a tenth of the way to seed 1, so that the DPO loss is not
    ln 2. variant: ours, in full, TRL, or a revision of git."""
    other = () if variant in ("ours", "in full", "TRL") else revision(variant)
    maker = other[0].Transformer if other else Transformer
    policy, reference = (build(size, device, seed=seed, vocab=vocab, Transformer=maker) for seed in (0, 1))
    with torch.no_grad():
        for p, r in zip(policy.parameters(), reference.parameters()):
            r.lerp_(p, 0.9)
    if variant == "TRL":
        policy, reference = transformers_copy(policy), transformers_copy(reference) if cfg.loss == "dpo" else None
        return their_trainer(policy, reference, cfg, autocast), policy
    policy.gradient_checkpointing = checkpointing
    code = other[1] if other else sapo
    return our_trainer(policy, reference.requires_grad_(False), cfg, variant != "in full", autocast, code), policy


def train_config(loss, n):
    """nll_on "prompt+response" is what TRL's ORPO does; it gives both sides the same work."""
    return sapo.SAPOConfig(loss=loss, lam=0.1, batch_size=n, micro_batch=n, nll_on="prompt+response")


def variant_memory(variant, loss, size, vocab, n, lengths):
    """Bytes at the peak of one step above weights and moments, which a tiny step before it creates. lengths: of all
    pairs, or a name of LENGTHS and a segment."""
    pairs = make_pairs(n, lengths, vocab) if len(lengths) == 4 else uneven_pairs(n, *lengths, vocab)
    step, _ = train_variant(variant, size, vocab, train_config(loss, n))
    step(make_pairs(1, (2, 2, 2, 2), vocab))
    return memory_of(lambda: step(pairs), "cpu")


def in_a_child(*request):
    """variant_memory in a fresh process, which no earlier variant has warmed."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--memory-of", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {request} was not measured: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------- the tables of a CPU
def generation(args, report):
    for size in args.sizes:
        batch, new, prompt = (2, 8, 8) if args.quick else (4, 64, 64) if size == "smollm2" else (8, 128, 64)
        model, label = the_model(args, size, torch.float32)
        theirs, vocab = transformers_copy(model), model.config.vocab_size
        prompts = [random_ids(prompt, vocab, i) for i in range(batch)]
        same = generate(model, prompts, [8] * batch, temperature=0) == their_generate(theirs, prompts, 8)
        for n in (new, 2 * new) if size == args.sizes[0] else (new,):    # the first size also at segment 256, uncached
            variants = {
                "ours": lambda: generate(model, prompts, [n] * batch, rng=torch.Generator().manual_seed(0), **SAMPLING),
                "transformers": lambda: their_generate(theirs, prompts, n, do_sample=True, **SAMPLING),
                "no cache": lambda: their_generate(theirs, prompts, n, cache=False, do_sample=True, **SAMPLING)}
            names = list(variants)
            if n == new:
                del variants["no cache"]
            seconds = rounds(variants, args.repeats, "cpu")
            cells = {name: spread(seconds[name]) if name in seconds else "-" for name in names}
            cells |= {f"faster than {name}": times_faster(seconds, "ours", name) for name in names[1:]}
            report.row("generate, CPU: seconds", seconds, size=label, batch=batch, new=n, **cells,
                       **{"same greedy text": "yes" if same else "NO"})


def peers_missing(section):
    if why := missing("datasets", "trl", "trl.experimental.orpo"):
        print(f"{section}: TRL is left out: {why}", flush=True)
    return why


def training(args, report):
    """share: of the float32 matmul peak, measured first, what the matmuls of the method come to; faults: of pages, a
    step."""
    names = ["ours", "in full", *([args.against] if args.against else []), *([] if peers_missing("train") else ["TRL"])]
    peak = matmul_peak(256 if args.quick else 2048, torch.float32, "cpu")
    for shape, (lengths, vocab, n) in SHAPES.items():
        size, vocab, lengths = toy(args, "trained"), toy(args, vocab), shrink(args, lengths)
        pairs = make_pairs(n, lengths, vocab)
        for loss in ("dpo", "orpo"):
            losses, faults, variants = {name: [] for name in names}, {name: [] for name in names}, {}
            for name in names:
                step, policy = train_variant(name, size, vocab, train_config(loss, n))
                variants[name] = lambda name=name, step=step: losses[name].append(counting(faults[name], step, pairs))
            asked = asked_flops(build(size, vocab=vocab), collate(pairs, **scored_tokens(train_config(loss, n))), loss)
            seconds = rounds(variants, args.repeats, "cpu")
            del variants, step, policy
            peaks = {name: in_a_child(name, loss, size, vocab, n, lengths) for name in names}
            cells = {}
            for name in names:
                mebibytes = f"{peaks[name] / MiB:.0f}" if peaks[name] else "-"
                cells |= {name: spread(seconds[name]), f"{name} MiB": mebibytes}
                cells |= {f"{name} share": f"{asked / statistics.median(seconds[name]) / peak:.0%}"}
                cells |= {f"{name} faults": f"{statistics.median(faults[name][1:]):.0f}" if faults[name] else "-"}
            cells |= {f"faster than {name}": times_faster(seconds, "ours", name) for name in names[1:]}
            report.row("one training step, CPU: seconds, and peak memory above weights and moments",
                       {"seconds": seconds, "bytes": peaks, "losses": losses, "faults": faults, "peak": peak}, shape=shape,
                       loss=f"{loss} {losses['ours'][0]:.4f}", pairs=n, **cells, **{"loss apart": apart(losses)})


def matmul_peak(side, dtype, device):
    """FLOP a second of a large square product: the best of 10."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(rounds({"": lambda: a @ b}, 10, device)[""])


def asked_flops(model, batch, loss):
    """FLOP of the matmuls that a step of the method comes to, nothing recomputed: 2 a parameter and token, the head at
    labelled tokens only, attention's causal half; twice as many in the backward pass, as many again in DPO's reference."""
    c, head = model.config, model.lm_head.weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - head * (1 if c.tie_word_embeddings else 2)
    lengths = (batch.rows >= 0).sum(1)
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * int((lengths * (lengths + 1)).sum())
    labelled = int((batch.labels != IGNORE).sum())
    return (4 if loss == "dpo" else 3) * 2 * (blocks * len(batch.ids) + head * labelled + attention)


def counting(faults, step, pairs):
    """A step's loss; the page faults it took are added to a list (none where they are not told)."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return step(pairs)
    before = getrusage(RUSAGE_SELF).ru_minflt
    loss = step(pairs)
    faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)
    return loss


def apart(losses):
    """The greatest difference between our losses and another variant's, over all rounds."""
    return f"{max((abs(a - b) for other in losses.values() for a, b in zip(losses['ours'], other))):.1g}"


def whole_step(args, report):
    """Both shapes in one batch. Two steps a round, since we generate the segments of both at once: the EMA moves every
    second step.

    The peers generate them step by step (transformers, at the same cuts) and move no EMA; both use the same
    micro-batches.
    """
    if peers_missing("step"):
        return
    size, vocab, B = toy(args, "trained"), toy(args, 49152), 16 if args.quick else 256
    pairs = [p for lengths, *_ in SHAPES.values() for p in make_pairs(2, shrink(args, lengths), vocab)]
    examples = [sapo.Example(p.prompt, p.chosen) for p in pairs]
    for loss in ("dpo", "orpo"):
        cfg = sapo.SAPOConfig(loss=loss, lam=0.1, batch_size=4, micro_batch=2, segment=str(B), buffer_size=4,
                              nll_on="prompt+response")
        policy = build(size, vocab=vocab)
        state, cut_rng = sapo.State.start(policy, cfg, (), keep_ref=False), np.random.default_rng(0)
        theirs, ema, reference = (transformers_copy(policy) for _ in range(3))
        step = their_trainer(theirs, reference, cfg)

        def ours():
            for _ in range(2):
                sapo.sapo_step(state, lambda n: (examples * n)[:n], cfg)

        def peers():
            for _ in range(2):
                cuts = [sapo.split(e.chosen, cfg.segment, (), cut_rng) for e in examples]
                prefixes = [e.prompt + e.chosen[:start] for e, (start, _) in zip(examples, cuts)]
                segments = their_generate(ema, prefixes, B, do_sample=True, **SAMPLING)
                step([Pair(e.prompt, e.chosen, e.chosen[:start] + new + e.chosen[stop:])
                      for e, new, (start, stop) in zip(examples, segments, cuts)])

        seconds = rounds({"ours": ours, "peers": peers}, args.repeats, "cpu")
        report.row("a whole step, CPU: seconds for two steps of 2 long and 2 short pairs", seconds, loss=loss,
                   ours=spread(seconds["ours"]), **{"transformers + TRL": spread(seconds["peers"])},
                   faster=times_faster(seconds, "ours", "peers"))


# ----------------------------------------------------------------------------- pairs of unequal lengths
def uneven_pairs(n, kind, segment, vocab, shrunk=1):
    """n Pairs of the lengths of a kind, cut as SAPO cuts; B' is as long as B."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(n):
        prompt, response = (max(4, int(m * rng.lognormal(0, 0.7)) // shrunk) for m in LENGTHS[kind])
        prompt = min(prompt, 1792 // shrunk)
        pairs.append(cut_pair(prompt, min(response, 2048 // shrunk - prompt), segment, vocab, rng, 3 * i))
    return pairs


def cut_pair(prompt, response, segment, vocab, rng, seed):
    x, y, new = (random_ids(k, vocab, seed + j) for j, k in enumerate((prompt, response, response)))
    start, stop = sapo.split(y, segment, (), rng)
    return Pair(x, y, y[:start] + new[start:stop] + y[stop:], start, stop, stop)


def pairs_of_file(path, segment, vocab):
    """Pairs as long as the rows of a file of `messages`; a token is a word or a mark, and four more open each turn."""
    rng, pairs = np.random.default_rng(0), []
    for i, line in enumerate(Path(path).read_text("utf-8").splitlines()):
        turns = [len(re.findall(r"\w+|[^\w\s]", turn["content"])) + 4 for turn in json.loads(line)["messages"]]
        pairs.append(cut_pair(sum(turns[:-1]) + 4, turns[-1] - 3, segment, vocab, rng, 3 * i))
    return pairs


def multiplied(pairs, cfg):
    """Tokens that go through the matrices of a block in one pass over these pairs, as a hook counts them."""
    model, tokens = build("toy"), []
    model.model["layers"][0].mlp.gate_proj.register_forward_hook(lambda module, given, out: tokens.append(out[..., 0].numel()))
    with torch.no_grad():
        for part in micro_batches(pairs, cfg):
            batch_logps(model, collate(part, **scored_tokens(cfg)))
    return sum(tokens)


def padding(args, report):
    """Real tokens: of each pair both texts without their last token, what they share once."""
    n, vocab, shrunk = (8, 256, 16) if args.quick else (64, 256, 1)
    tables = {(kind, segment): uneven_pairs(n, kind, segment, vocab, shrunk) for kind, segment in (
        ("Capybara-like", "256"), ("long answers", "256"), ("long answers", "64"))}
    if args.data:
        tables |= {(Path(args.data).name, segment): pairs_of_file(args.data, segment, vocab) for segment in ("256", "50%")}
    for (kind, segment), pairs in tables.items():
        for micro in (1, 8, 16):
            cfg, real, rows, parts = train_config("dpo", len(pairs)), 0, 0, 0
            cfg.micro_batch, inside = micro, 0
            for part in micro_batches(pairs, cfg):
                batch = collate(part, **scored_tokens(cfg))
                both = [(t.prefix, len(t.chosen.ids), len(t.rejected.ids)) for t in batch.texts]
                real += sum(a + b - p for p, a, b in both)
                rows += batch.rows.numel()
                inside += int((batch.rows >= 0).sum())
                parts += len(part) * (max(p for p, *_ in both) + 2 * max(max(a, b) - p for p, a, b in both))
            shares = {"ours": multiplied(pairs, cfg), "prefix, continuations": parts, "two rows": rows}
            report.row("padding: share of the multiplied tokens that are real", shares | {"real": real}, lengths=kind,
                       segment=segment, pairs=len(pairs), **{"micro-batch": micro, "real tokens": real},
                       **{name: f"{real / tokens:.0%}" for name, tokens in shares.items()},
                       **{"places in attention's rows": f"{inside / rows:.0%}"})
    report.show()
    names = ["ours", *([args.against] if args.against else []), *([] if peers_missing("padding") else ["TRL"])]
    size, vocab, n = toy(args, "wide"), toy(args, 49152), 8
    for kind, segment in list(tables)[:2]:
        pairs, losses, variants = uneven_pairs(n, kind, segment, vocab, shrunk), {name: [] for name in names}, {}
        for name in names:
            step, _ = train_variant(name, size, vocab, train_config("dpo", n))
            variants[name] = lambda name=name, step=step: losses[name].append(step(pairs))
        seconds = rounds(variants, args.repeats, "cpu")
        del variants, step
        cells = {name: spread(seconds[name]) for name in names}
        cells |= {f"faster than {name}": times_faster(seconds, "ours", name) for name in names[1:]}
        if not args.quick:
            peaks = {name: in_a_child(name, "dpo", size, vocab, n, (kind, segment)) for name in names}
            cells |= {f"{name} MiB": f"{peaks[name] / MiB:.0f}" if peaks[name] else "-" for name in names}
        report.row(f"padding: a DPO step of {n} pairs, CPU: seconds, and peak memory above weights and moments",
                   {"seconds": seconds, "losses": losses}, lengths=kind, segment=segment, size=size, **cells,
                   **{"loss apart": apart(losses)})


# ----------------------------------------------------------------------------- growth
def growths(quick):
    """(what grows, its values, what is measured, its law, the exponents the law allows, value -> function, is memory
    measured)"""
    size, text = ("toy", 64) if quick else ("tiny", 256)

    def train(length=text, n=2, vocab=1024, segment=8):
        pairs = make_pairs(n, (length // 2, 0, segment, length // 2 - segment), vocab)
        step, _ = train_variant("ours", size, vocab, train_config("dpo", n))
        return lambda: step(pairs)

    def generating(segment=text // 4, n=2, vocab=1024):
        model, prompts = build(size, vocab=vocab), [random_ids(text // 4, vocab, i) for i in range(n)]
        return lambda: generate(model, prompts, [segment] * n, rng=torch.Generator().manual_seed(0), **SAMPLING)

    def full_buffer(capacity):
        store, lists = ReplayBuffer(capacity), ([1] * 8, [2] * 8, [3] * 8)     # which all pairs share
        store.pairs.extend(Pair(*lists) for _ in range(capacity))
        return store

    def add(capacity):
        store, pairs = full_buffer(capacity), [Pair([1], [2], [3]) for _ in range(1000)]
        return lambda: [store.add(p) for p in pairs]

    def draw(capacity):
        store = full_buffer(capacity)
        return lambda: [store.sample(8) for _ in range(100)]

    def powers(first, last, by=2):
        return [first * by**i for i in range(30) if first * by**i <= last]

    lengths, batches, segments = powers(256, 2048), powers(1, 16), powers(16, 256)
    vocabularies, buffers = powers(1024, 2**17), powers(10, 10**6, 10)
    if quick:
        lengths, batches, segments = powers(32, 128), powers(1, 4), powers(4, 16)
        vocabularies, buffers = powers(256, 1024), powers(10, 1000, 10)
    return [("length", lengths, "train", "linear, then quadratic", (0.5, 2), lambda v: train(length=v), True),
            ("batch", batches, "train", "linear", (0.5, 1.2), lambda v: train(n=v), True),
            ("batch", batches, "generate", "constant, then linear", (0, 1), lambda v: generating(n=v), False),
            ("segment", segments, "train", "constant", (-0.2, 0.2),
             lambda v: train(length=4 * segments[-1], segment=v), False),
            ("segment", segments, "generate", "linear", (0.5, 1.3), lambda v: generating(segment=v), False),
            ("vocabulary", vocabularies, "train", "constant, then linear", (0, 1.1), lambda v: train(vocab=v), True),
            ("vocabulary", vocabularies, "generate", "constant, then linear", (0, 1.1),
             lambda v: generating(vocab=v), False),
            ("buffer", buffers, "1000 adds", "constant", (-0.2, 0.2), add, False),
            ("buffer", buffers, "100 draws of 8", "constant, then a deque's n / 64", (-0.2, 0.6), draw, False)]


def growth(args, report):
    slope = lambda x, y: float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])
    curves = []
    for what, values, quantity, law, (low, high), make, with_memory in growths(args.quick):
        seconds, peaks = [], []
        for value in values:
            run = make(value)
            seconds.append(rounds({"": run}, args.repeats, "cpu")[""])
            if with_memory:
                peaks.append(memory_of(run, "cpu"))
        medians = [statistics.median(s) for s in seconds]
        curves.append((what, values, f"{quantity}, s", law, low, high, medians, seconds))
        if with_memory and None not in peaks:
            curves.append((what, values, f"{quantity}, MiB", "constant, then linear", 0, 1.1, [p / MiB for p in peaks], None))
    for what, values, quantity, law, low, high, points, seconds in curves:
        exponent, last = slope(values, points), slope(values[-2:], points[-2:])
        report.row("growth, CPU: measured ~ value ^ exponent", {"values": values, "points": points, "seconds": seconds},
                   grows=what, measured=quantity, points="  ".join(f"{v}: {p:.3g}" for v, p in zip(values, points)),
                   law=law, exponent=f"{exponent:.2f}",
                   **{"last two": f"{last:.2f}", "allowed": f"{low} to {high}",
                      "fits": "yes" if low <= exponent <= high else "NO"})
    if args.figure:
        draw_growth([(c[0], c[1], c[2], c[6]) for c in curves], args.figure)


def draw_growth(curves, path):
    """Each quantity over its first value, both axes logarithmic; dotted: constant, linear, quadratic. 900 pixels
    wide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), dpi=100, layout="constrained")
    for ax, what in zip(axes.flat, dict.fromkeys(c[0] for c in curves)):
        mine = [c for c in curves if c[0] == what]
        x = np.array(mine[0][1], float)
        tallest = max(max(np.divide(c[3], c[3][0])) for c in mine)
        for power in (0, 1, 2):
            ax.plot(x, (x / x[0]) ** power, ":", color="0.6", lw=1)
        for (_, values, name, points), marker in zip(mine, "osd^"):
            ax.plot(values, np.divide(points, points[0]), marker=marker, ms=4, label=name)
        ax.set(xscale="log", yscale="log", title=what, ylim=(0.3, 4 * max(tallest, 2)))
        shown = mine[0][1] if len(mine[0][1]) < 7 else mine[0][1][::2]
        ax.set_xticks(shown, [str(v) if v % 1000 else f"{v // 1000}k" for v in shown])
        ax.minorticks_off()
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    for ax in axes[:, 0]:
        ax.set_ylabel("times the first point")
    axes.flat[5].axis("off")
    axes.flat[5].text(0, 0.5, "dotted: constant, linear,\nquadratic growth", fontsize=10)
    figure.savefig(path)


# ----------------------------------------------------------------------------- the tables of a GPU
def gpu_rates(args, report):
    """(bytes a second, FLOP a second) of a large copy, read and written bytes counted, and of a large bf16 matmul: the
    best of 10."""
    n, side = (2**20, 256) if args.quick else (2**31, 8192)
    source = torch.zeros(n, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    bandwidth = 2 * n / min(rounds({"": lambda: target.copy_(source)}, 10, args.device)[""])
    flops = matmul_peak(side, torch.bfloat16, args.device)
    report.row("GPU: rates measured in this run", None, copy=f"{bandwidth / 1e12:.2f} TB/s",
               matmul_bf16=f"{flops / 1e12:.0f} TFLOP/s")
    return bandwidth, flops


def gpu_generation(args, report, size, bandwidth):
    """Decoding in bf16. The floor of a step: weights, and the keys and values stored so far, read once at the copy's
    rate."""
    prompt, new = (16, 12) if args.quick else (128, 256)
    model, label = the_model(args, size, torch.bfloat16)
    c, why = model.config, missing("transformers")
    theirs = None if why else transformers_copy(model, torch.bfloat16)
    numbers = sum(p.numel() for p in model.parameters())    # of the embedding only a row a token is read
    weights = 2 * (numbers - (0 if c.tie_word_embeddings else model.model.embed_tokens.weight.numel()))
    for batch in (1, 8, 64):
        prompts, decode = [random_ids(prompt, c.vocab_size, i) for i in range(batch)], []

        def ours():
            clock, rng = sapo.Clock(), torch.Generator().manual_seed(0)
            clock.start()
            generate(model, prompts, [new] * batch, rng=rng, lap=clock.lap, **SAMPLING)
            decode.append(clock.seconds["decode"] / (new - 1))

        def transformers():
            their_generate(theirs, prompts, new, do_sample=True, **SAMPLING)

        variants = {"ours": ours} if why else {"ours": ours, "transformers": transformers}
        with report.section(f"GPU generate {size} batch {batch}"):
            seconds = rounds(variants, args.repeats, args.device)
            cached = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * batch * (prompt + new / 2)
            floor, measured = (weights + cached) / bandwidth, decode[1:]
            rates = {"ours tokens/s": why, "transformers tokens/s": why}
            rates |= {f"{name} tokens/s": spread([batch * new / s for s in taken]) for name, taken in seconds.items()}
            report.row("GPU: generate, bf16", {"seconds": seconds, "decode": measured, "floor": floor}, size=label,
                       batch=batch, new=new, **rates, faster=times_faster(seconds, "ours", "transformers"),
                       **{"ms a decode step": spread(measured, 1e-3), "floor ms": f"{floor * 1e3:.3g}"},
                       share=f"{floor / statistics.median(measured):.0%}")


def gpu_training(args, report, size, peak):
    """Rows of 2048 tokens: a prefix of 1024, two continuations of 512. MFU counts 6 FLOP for each parameter and token
    of a row.

    asked: what asked_flops says.
    """
    autocast = functools.partial(torch.autocast, args.device, torch.bfloat16)
    n, vocab = {"smollm2": 8}.get(size, 4), toy(args, SIZES[size][5])
    pairs = make_pairs(n, shrink(args, (512, 512, 256, 256)), vocab)
    peers = ["TRL"] * (size == "smollm2" and not peers_missing("GPU train"))
    for loss, checkpointing in (("dpo", False), ("dpo", True), ("orpo", False), ("orpo", True)):
        with report.section(f"GPU train {size} {loss} checkpointing {checkpointing}"):
            names = ["ours"] + peers * (not checkpointing)
            cfg, losses, variants, made = train_config(loss, n), {name: [] for name in names}, {}, {}
            for name in names:
                made[name] = train_variant(name, toy(args, size), vocab, cfg, args.device, autocast, checkpointing)
                variants[name] = lambda name=name: losses[name].append(made[name][0](pairs))
            seconds = rounds(variants, args.repeats, args.device)
            memory, policy = memory_of(variants["ours"], args.device), made["ours"][1]
            batch = collate(pairs, **scored_tokens(cfg))
            tokens, N, asked = len(batch.ids), sum(p.numel() for p in policy.parameters()), asked_flops(policy, batch, loss)
            middle = statistics.median(seconds["ours"])
            report.row("GPU: training, bf16 autocast on float32 weights",
                       {"seconds": seconds, "bytes": memory, "losses": losses, "tokens": tokens}, size=size, loss=loss,
                       checkpointing=checkpointing, pairs=n, seconds=spread(seconds["ours"]),
                       MFU=f"{6 * N * tokens / middle / peak:.1%}", asked=f"{asked / middle / peak:.1%}",
                       **{"tokens/s": f"{tokens / middle:.0f}", "GiB above weights": f"{(memory or 0) / GiB:.2f}",
                          "faster than TRL": times_faster(seconds, "ours", "TRL"), "loss apart": apart(losses)})
        policy = made = variants = None


def gpu_step(args, report, size):
    """Where the time of sapo_step goes: prompts and responses of 512, segments of 256, a bf16 generator that follows
    the EMA."""
    n, micro, long = (4, 2, 32) if args.quick else (16, 8, 512) if size == "smollm2" else (8, 4, 512)
    cfg = sapo.SAPOConfig(batch_size=n, micro_batch=micro, segment=str(long // 2), buffer_size=4 * n)
    policy = build(toy(args, size), args.device)
    state = sapo.State.start(policy, cfg, (), generator=twin(policy).to(torch.bfloat16))
    vocab, seeds = policy.config.vocab_size, itertools.count()
    autocast, stages = functools.partial(torch.autocast, args.device, torch.bfloat16), []

    def draw(k):
        return [sapo.Example(*(random_ids(long, vocab, next(seeds)) for _ in range(2))) for _ in range(k)]

    def two_steps():         # the segments of both are generated in the first
        spent, start = {}, time.perf_counter()
        for _ in range(2):
            sapo.sapo_step(state, draw, cfg, autocast)
            for stage, seconds in state.clock.seconds.items():
                spent[stage] = spent.get(stage, 0.0) + seconds
        sync(args.device)
        spent["all else"] = time.perf_counter() - start - sum(spent.values())
        stages.append(spent)

    two_steps()
    stages.clear()
    memory = memory_of(lambda: rounds({"": two_steps}, args.repeats, args.device), args.device)
    measured = stages[1:]
    whole, parts = [sum(s.values()) for s in measured], {}
    for stage in stages[-1]:
        parts[stage] = f"{statistics.median(s[stage] for s in measured) / statistics.median(whole):.0%}"
    report.row("GPU: stages of sapo_step, DPO", {"stages": measured, "bytes": memory}, size=size, pairs=n,
               **{"seconds a step": spread(whole, 2)}, **parts, **{"GiB above weights": f"{(memory or 0) / GiB:.2f}"})


def gpu(args, report):
    rates = [3e12, 8e14]         # stand in only if the next line fails
    with report.section("GPU rates"):
        rates = gpu_rates(args, report)
    tables = (("generate", gpu_generation, rates[:1]), ("train", gpu_training, rates[1:]), ("step", gpu_step, ()))
    for size in args.sizes:
        for name, table, rate in tables:
            if args.section in (name, "all"):
                with report.section(f"GPU {name} {size}"):
                    table(args, report, size, *rate)
                report.show()


# ----------------------------------------------------------------------------- the command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("section", nargs="?", default="all", choices=("generate", "train", "step", "padding", "growth", "all"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--repeats", type=int, help="measured rounds (default 5; with --quick 2)")
    parser.add_argument("--sizes", help="of generate: tiny,small,smollm2; with --device cuda of all tables: "
                        "smollm2,1.2B")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct for the size smollm2; without it, random "
                        "weights")
    parser.add_argument("--data", help="padding: count the tokens of this file of messages too")
    parser.add_argument("--against", metavar="REVISION", help="train, padding: time a revision of git too")
    parser.add_argument("--json", help="write everything there, raw seconds too")
    parser.add_argument("--figure", help="growth: draw it there (png)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--as-gpu", action="store_true", help="the GPU's tables on this device; with --quick, to try "
                        "them on a CPU")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        return print(json.dumps(variant_memory(*json.loads(args.memory_of))))
    on_gpu = args.device == "cuda" or args.as_gpu
    args.sizes = (args.sizes or ("smollm2,1.2B" if on_gpu else "tiny,small,smollm2")).split(",")
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"--sizes: {', '.join(unknown)} is unknown; choose from {', '.join(SIZES)}")
    args.repeats = args.repeats or (2 if args.quick else 5)
    peers = [name for name in ("transformers", "trl") if not missing(name)]
    report = Report(args.json, {
        "command": " ".join(sys.argv[1:]), "torch": torch.__version__,
        **{name: importlib.import_module(name).__version__ for name in peers}, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "-"})
    if on_gpu:
        gpu(args, report)
    else:
        for name, table in {"generate": generation, "train": training, "step": whole_step,
                            "padding": padding, "growth": growth}.items():
            if args.section in (name, "all"):
                with report.section(name):
                    table(args, report)
                report.show()
    print(f"\n{time.perf_counter() - report.start:.0f} s in all")
    if report.data["errors"]:
        print(f"FAILED: {', '.join(report.data['errors'])}")


if __name__ == "__main__":
    main()
