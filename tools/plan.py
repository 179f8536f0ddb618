"""What a run needs on each GPU, known before it is started, from config.json alone: no weight is read, no GPU is needed.

    python tools/plan.py CONFIG_OR_DIR --world 8 --gpu-memory 80 [--loss orpo] [--lora 16] [--micro-batch 2] [--gradient-checkpointing]
    python tools/plan.py --table            Mistral-7B and Llama-3-8B on 8 x 80 GB, 8 x 141 GB and 1 x 24 GB

Three ways to train: ddp (all weights on every GPU), lora (a frozen base and adapters, under DDP), shard (FSDP2). What
stands all run long (`standing`) is exact: tests/test_plan.py holds it against the live tensors. What comes and goes
(`passing`) is a formula for each of the moments that can be the highest; the one of activations is held, on a CPU,
against the bytes that autograd keeps. Leaves out what is under a megabyte (rotary tables, ids), the CUDA context,
NCCL's buffers and fragments: a card sold as 80 GB has 85.5e9 bytes, and the difference is meant for those.

Axes as in model.py: D hidden size, I intermediate, H query heads, K key-value heads, E head size, V vocabulary,
P prefix, S continuation.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from losses import KEPT, LOGITS, LOSSES, WITH_REFERENCE
from machine.files import BadInput, read_json
from machine.flags import PRESETS, Config
from machine.config import config_from_dict
from model import ModelConfig, Transformer, add_lora

MODES = ("ddp", "lora", "shard")
STANDING = ("weights", "gradients", "moments", "EMA", "generator", "reference")
MODELS = {      # the public sizes, as their config.json has them
    "Mistral-7B": dict(model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, max_position_embeddings=32768, rope_theta=10000.0, rms_norm_eps=1e-5, sliding_window=4096),
    "Llama-3-8B": dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5),
}
MACHINES = ((8, 80), (8, 141), (1, 24))     # GPUs, GB of each


@dataclasses.dataclass
class Job:
    """The settings of a run that its memory depends on. Defaults are the paper's."""
    world: int = 8
    loss: str = "dpo"
    optimizer: str = "rmsprop"
    lora: int = 16
    half: bool = True               # --dtype bfloat16
    micro_batch: int = 1
    gradient_checkpointing: bool = False
    max_length: int = 2048
    continuation: int = 0           # tokens of each text that the other does not share; 0: all but the first, the worst
    batch_size: int = 64
    ema_every: int = 2
    generate_ahead: int = 8
    generate_rows: int = 64
    eval_rows: int = 200


# ---------------------------------------------------------------- what stands all run long

def shapes(config, rank):
    """{name: (shape, trained)} of a Transformer, with adapters where rank > 0; a tied head counts once."""
    return _shapes(json.dumps(dataclasses.asdict(config)), rank)


@functools.cache
def _shapes(config, rank):
    config = ModelConfig(**json.loads(config))
    with torch.device("meta"):
        model = Transformer(config)
    if rank:
        add_lora(model, rank, 32.0, torch.Generator().manual_seed(0))
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


def standing(config, mode, job):
    """{item: bytes} on the first process, which has the most. float32 unless said otherwise."""
    sizes = shapes(config, job.lora if mode == "lora" else 0)
    pieces = job.world if mode == "shard" else 1
    mine = {}                            # FSDP2 shards by rows, and the last shard is padded
    for name, (shape, _) in sizes.items():
        mine[name] = -(-shape[0] // pieces) * math.prod(shape[1:])
    trained = [n for name, n in mine.items() if sizes[name][1]]
    half = 2 if job.half else 4
    if mode == "lora":                   # the base and A are there once, for all; the base is in the dtype of autocast
        weights = sum(n * (4 if "lora_" in name else half) for name, n in mine.items())
        twin = 4 * sum(trained)          # policy, EMA and reference differ in B
    else:
        weights = twin = 4 * sum(mine.values())
    whole = sum(math.prod(shape) for shape, _ in sizes.values())
    copied = mode == "shard" or mode == "ddp" and job.half               # else the EMA itself generates
    return {
        "weights": weights, "gradients": 4 * sum(trained),               # DDP's buckets are the gradients
        "moments": {"adamw": 2, "rmsprop": 1}[job.optimizer] * 4 * sum(trained) + 4 * len(trained),  # and step counts
        "EMA": twin, "generator": half * whole if copied else 0,
        "reference": twin if job.loss in WITH_REFERENCE else 0}


# ---------------------------------------------------------------- what comes and goes

def dtypes(mode, job):
    """(bytes of the residual stream, bytes of what matrices take and give)."""
    if not job.half:
        return 4, 4
    return (4, 2) if mode == "ddp" else (2, 2)           # float32 weights under autocast: the embedding, hence the stream, is float32


def kept_by_block(c, P, S, wide, item, rank):
    """Bytes that autograd keeps of one pair, T = P + 2S tokens in two texts of P + S, in one block.

    RMSNorm, twice    x in float32 (the stream itself, if that is float32), and, where its weight is trained, x / rms;
                      Gemma has four, and its x / rms is float32
    q, k, v           their input, where the matrices are trained; under autocast once for each, as each casts it anew
    attention         of both texts in full the kernel keeps q, k, v, output and log-sum-exp. With grouped heads k and v
                      are expanded to H. A window's mask is left out: T * T bytes for all, or twice that in each
                      block where the kernel makes numbers of it
    o                 its input, where it is trained
    MLP               the input (gate, up: as q, k, v), gate, silu(gate), up; and down's input, where it is trained
    LoRA              nothing but A x of each adapter: frozen matrices keep no input
    """
    D, I, H, K, E = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    T, cast, trained = P + 2 * S, wide != item, not rank
    norms = 4 * T * D * (4 + trained * 4) if c.gemma_norms else 2 * T * D * (4 + trained * wide)
    inputs = T * D * item * trained * (3 + 2 if cast else 1 + 1)
    attention = 2 * (P + S) * H * (4 * E * item + 4)
    if c.qk_norm:
        attention += T * E * (H + K) * (4 + trained * (4 if c.gemma_norms else item))
    output = T * H * E * item * trained
    mlp = T * I * item * (3 + trained)
    return norms + inputs + attention + output + mlp + 7 * rank * T * item


def kept(config, mode, job, pairs, P, S, labels):
    """Bytes of activations that autograd keeps of a micro-batch of pairs until its backward pass; labels: of a pair."""
    wide, item = dtypes(mode, job)
    T, D, rank = P + 2 * S, config.hidden_size, job.lora if mode == "lora" else 0
    block = kept_by_block(config, P, S, wide, item, rank)
    blocks = config.num_hidden_layers * (T * D * wide if job.gradient_checkpointing else block)
    last = T * D * (4 + (not rank) * wide) + labels * D * wide           # the last norm, and the rows that have a label
    if pairs * labels * config.vocab_size <= KEPT:                       # else the head runs again in the backward pass
        last += labels * (4 * config.vocab_size + (D * item if wide != item else 0))
    return pairs * (blocks + last)


def passing(config, mode, job):
    """{item: bytes} of what comes and goes; see `peak` for which are there at the same time."""
    wide, item = dtypes(mode, job)
    D, I, V, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    S = min(job.continuation or job.max_length, job.max_length - 2)
    P = job.max_length - 1 - S
    T, labels, m = P + 2 * S, 2 * S + (P if job.loss != "dpo" else 0), job.micro_batch
    rank = job.lora if mode == "lora" else 0
    sizes = shapes(config, rank)
    count = lambda keep: sum(math.prod(shape) for name, (shape, trained) in sizes.items() if keep(name, shape, trained))
    block = count(lambda name, *_: name.startswith("model.layers.0."))
    root = count(lambda name, *_: not name.startswith("model.layers."))
    largest = max(math.prod(shape) for shape, _ in sizes.values())

    grown = T * (3 * I * item + 2 * D * wide)                            # gradients inside the block that is being differentiated
    if job.gradient_checkpointing:
        grown += kept_by_block(config, P, S, wide, item, rank)           # which is computed again just before
    activations = kept(config, mode, job, m, P, S, labels) + m * grown
    logits = 16 * min(m * labels * V, max(V, LOGITS))                    # logits, in float32, their log-softmax, its gradient, theirs: one chunk
    if mode == "ddp":                                                    # autocast keeps what it has cast until the pass ends
        copies = item * count(lambda name, shape, _: len(shape) == 2 and ("embed" not in name or config.tie_word_embeddings)) if wide != item else 0
    elif mode == "lora":
        copies = item * count(lambda name, *_: "lora_" in name) if job.half else 0
    else:        # the root and two blocks gathered, one more on its way; gradients before they are sharded
        copies = item * (2 * root + 3 * block) + (item + 4) * block
    end = (2 * item + 4) * root if mode == "shard" else 0                # the root's gradients, exchanged when no activation is left
    trained = count(lambda name, shape, trained: trained)
    update = 4 * trained if mode != "shard" else 4 * -(-trained // job.world)       # torch's multi-tensor optimizers hold one more of each

    rows = max(min(job.ema_every, job.generate_ahead) * job.batch_size // job.world, -(-job.eval_rows // job.world))
    rows, width, size = min(rows, job.generate_rows), -(-job.max_length // 64) * 64, 2 if job.half and mode != "ddp" else 4       # float32: what DDP evaluates
    cache = 2 * layers * rows * config.num_key_value_heads * width * config.head_dim * size
    prompts = rows * job.max_length * size * ((3 + bool(rank)) * I + 3 * D)     # a block's prefill, all rows at once
    gather = 4 * largest if mode == "shard" else 0                       # one whole tensor on its way to the generator
    return {"copies": copies, "activations": activations, "logits": logits, "last exchange": end, "update": update,
            "KV cache": cache, "prompts": prompts, "gather": gather}


def peak(config, mode, job):
    """{item: bytes}: all items, `standing` (their sum), and `peak`, the highest of four moments."""
    stands, passes = standing(config, mode, job), passing(config, mode, job)
    moments = {"training": passes["copies"] + passes["activations"] + passes["logits"],
               "the last exchange": passes["last exchange"], "the update": passes["update"],
               "generating": passes["KV cache"] + max(passes["prompts"], passes["gather"])}
    total = sum(stands.values())
    return stands | {"standing": total} | passes | {"peak": total + max(moments.values())}, max(moments, key=moments.get)


def fit(config, mode, job, memory):
    """(Job with the largest micro-batch and then as many --generate-rows as fit, bytes) or (None, the least bytes)."""
    share = max(1, job.batch_size // job.world)

    def at(m, rows):
        return peak(config, mode, dataclasses.replace(job, micro_batch=m, generate_rows=rows))[0]["peak"]

    if at(1, 1) > memory:
        return None, at(1, 1)
    micro = max(m for m in range(1, share + 1) if at(m, 1) <= memory)
    rows = max(2**i for i in range(job.generate_rows.bit_length()) if at(micro, 2**i) <= max(memory, at(micro, 1)))
    return dataclasses.replace(job, micro_batch=micro, generate_rows=rows), at(micro, rows)


# ---------------------------------------------------------------- what is printed

def read(path):
    path = Path(path)
    return config_from_dict(read_json(path / "config.json" if path.is_dir() else path, "plan"))


def gigabytes(n):
    return f"{n / 1e9:.2f}" if n else "-"


def print_plan(config, job, memory):
    sizes = {mode: shapes(config, job.lora if mode == "lora" else 0) for mode in MODES}
    parameters = sum(math.prod(shape) for shape, _ in sizes["ddp"].values())
    adapters = sum(math.prod(shape) for shape, trained in sizes["lora"].values() if trained)
    print(f"{parameters:,} parameters ({adapters:,} trained with --lora {job.lora}), {job.loss}, {job.optimizer}, {'bfloat16' if job.half else 'float32'}, "
          f"up to {job.max_length} tokens, {job.micro_batch} pair(s) a micro-batch{', gradient checkpointing' if job.gradient_checkpointing else ''}\n"
          f"GB (1e9 bytes) on each of {job.world} GPU(s) of {memory / 1e9:g} GB\n")
    plans = {mode: peak(config, mode, job) for mode in MODES}
    print(f"{'':<14}" + "".join(f"{mode:>10}" for mode in MODES))
    for item in plans["ddp"][0]:
        print(f"{item:<14}" + "".join(f"{gigabytes(plans[mode][0][item]):>10}" for mode in MODES))
    print(f"{'highest at':<14}" + "  ".join(f"{mode}: {plans[mode][1]}" for mode in MODES) + "\n")
    for mode in MODES:
        best, size = fit(config, mode, job, memory)
        gb = f"{size / 1e9:.1f} GB"
        if best:
            how = f"fits with --micro-batch {best.micro_batch} --generate-rows {best.generate_rows}: {gb}"
        else:
            how = f"does not fit: {gb} with --micro-batch 1 --generate-rows 1"
        print(f"{mode:<6}" + how)


def print_table(job):
    print("GB on each GPU with the largest micro-batch (m) that fits, and then as many rows generated at once (g); "
          f"'no': GB with one of each.\n2048 tokens, bfloat16, LoRA rank {job.lora}, "
          f"{'with' if job.gradient_checkpointing else 'without'} gradient checkpointing\n")
    print("| model | loss, optimizer | GPUs | ddp | lora | shard |\n|---|---|---|---|---|---|")
    for name, raw in MODELS.items():
        for loss, optimizer in (("dpo", "rmsprop"), ("orpo", "adamw")):
            for world, memory in MACHINES:
                cells = []
                for mode in MODES:
                    this = dataclasses.replace(job, world=world, loss=loss, optimizer=optimizer)
                    best, size = fit(config_from_dict(raw), mode, this, memory * 10**9)
                    gb = f"{size / 1e9:.0f}"
                    cell = f"{gb}, m {best.micro_batch}, g {best.generate_rows}" if best else f"no ({gb})"
                    cells.append("-" if mode == "shard" and world == 1 else cell)
                print(f"| {name} | {loss}, {optimizer} | {world} x {memory} GB | " + " | ".join(cells) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="config.json, or the folder it is in")
    parser.add_argument("--table", action="store_true", help="7 B and 8 B on three machines")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB (1e9 bytes) of one GPU [80]")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="dpo")
    parser.add_argument("--optimizer", choices=("adamw", "rmsprop"), help="[that of the loss's paper preset]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-length", type=int, help="[min(2048, the model's context)]")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    for name, help in (("world", "processes, one a GPU"), ("lora", "rank, for the lora column"), ("micro_batch", "pairs in one forward pass"),
                       ("batch_size", "pairs a step, over all processes"), ("generate_rows", "texts generated at once"),
                       ("continuation", "tokens of each text of a pair that are its own; 0: all of --max-length")):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Job, name), help=f"{help} [{getattr(Job, name)}]")
    flags = parser.parse_args(argv)
    if not flags.table and not flags.model:
        parser.error("give config.json or a model folder, or --table")
    sizes = (flags.world, flags.lora, flags.micro_batch, flags.batch_size, flags.generate_rows, flags.max_length or 3)
    if min(*sizes, flags.continuation + 1) < 1:
        parser.error("sizes must be at least 1")
    if not 0 < flags.gpu_memory < 1e6:
        parser.error("--gpu-memory must be a number of gigabytes")
    optimizer = flags.optimizer or {**dataclasses.asdict(Config()), **PRESETS.get(f"paper-{flags.loss}", {})}["optimizer"]
    job = Job(flags.world, flags.loss, optimizer, flags.lora, flags.dtype == "bfloat16", flags.micro_batch,
              flags.gradient_checkpointing, flags.max_length or 2048, flags.continuation, flags.batch_size,
              generate_rows=flags.generate_rows)
    if flags.table:
        return print_table(job)
    try:
        config = read(flags.model)
        job.max_length = min(job.max_length, config.max_position_embeddings)
        if flags.max_length and flags.max_length > config.max_position_embeddings:
            raise BadInput(f"--max-length {flags.max_length} is more than the model's context of {config.max_position_embeddings}")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not flags.json:
        return print_plan(config, job, flags.gpu_memory * 1e9)
    result = {"settings": dataclasses.asdict(job), "gpu_memory": flags.gpu_memory * 1e9}
    for mode in MODES:
        items, moment = peak(config, mode, job)
        best, size = fit(config, mode, job, flags.gpu_memory * 1e9)
        result[mode] = items | {
            "highest at": moment, "fits": best is not None, "micro_batch": best and best.micro_batch,
            "generate_rows": best and best.generate_rows, "at least": size}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
