"""torchrun: the processes of a run, and FSDP2's shards.

Every process takes the same number of steps and makes the same calls; what one of them refuses, all refuse.
"""

import datetime
import os
import timeit

import torch
import torch.distributed as dist

from machine.files import BadInput
from machine.folders import blank, load_pretrained, load_weights, read_weights
from model import Transformer, add_lora, twin
from sapo import copy_parameters, stream


class World:
    """This process among all: rank, size, device. Without torchrun it is alone, and calls return at once."""

    def __init__(self, device="auto"):
        place = os.environ if "RANK" in os.environ else {}       # a scheduler may set WORLD_SIZE alone
        self.rank, self.size = int(place.get("RANK", 0)), int(place.get("WORLD_SIZE", 1))
        self.first, self.many = self.rank == 0, bool(place)
        self.local = int(place.get("LOCAL_RANK", 0))
        self.group = None
        if self.many:            # before flags are read, so that what one refuses, all refuse
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
            long = datetime.timedelta(days=1)            # while one process downloads or writes
            self.group = dist.new_group(backend="gloo", timeout=long)        # for plain values, beside NCCL
        if device:
            self.place(device)

    def place(self, device):
        """Take a device: cpu, cuda, or auto."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.local >= torch.cuda.device_count() > 0:
            raise BadInput(f"process {self.local} of this node has no GPU, as it has only "
                           f"{torch.cuda.device_count()}; lower --nproc_per_node")
        self.device = torch.device(f"cuda:{self.local}" if device == "cuda" else device)
        if self.many and device == "cuda":
            torch.cuda.set_device(self.device)

    def all(self, value):
        """Every process's value, as a list, on every process."""
        values = [value] * self.size
        if self.many:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values):
        """Sums of a list of numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.many:
            dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def mean(self, metrics):
        """Metrics with each float replaced by its mean over processes, which have equally many pairs."""
        keys = sorted(k for k, v in metrics.items() if isinstance(v, float))
        sums = self.sum([metrics[k] for k in keys])
        return metrics | {k: v / self.size for k, v in zip(keys, sums)}

    def together(self, function):
        """function() on every process; what one refuses, all refuse, so that none waits for ever."""
        result = refusal = None
        try:
            result = function()
        except BadInput as error:
            refusal = str(error)
        for rank, sentence in enumerate(self.all(refusal)):
            if sentence:
                who = f" (process {rank} of {self.size}: every node must see what is read)" if rank else ""
                raise BadInput(sentence + who)
        return result

    def close(self):
        if self.many and dist.is_initialized():
            dist.destroy_process_group()


def slow_dtype(dtype, device):
    """[a sentence] if a small product says that a CPU lacks the instructions for `dtype`, else []."""
    seconds = []
    for kind in (torch.float32, dtype):
        a = torch.ones(256, 256, dtype=kind)
        seconds.append(min(timeit.repeat(lambda: a @ a, number=1, repeat=3)))
    times = seconds[1] / seconds[0]
    said = f"a product in {dtype} takes this CPU {times:.0f} times as long; --dtype float32 is faster"
    return [said] if times > 2 and device.type == "cpu" and dtype is not torch.float32 else []


def shard(model, world, half):
    """FSDP2: each block's parameters are sharded, in float32; compute is in bfloat16 if `half`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else {}
    mesh = init_device_mesh(world.device.type, (world.size,))
    how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision))
    for block in model.model.layers:
        fully_shard(block, **how)
    # left to itself, the root stays whole from a forward to the backward pass, which a reference never has
    return fully_shard(model, reshard_after_forward=True, **how)


# ------------------------------------------------------------------------ models of a run
def starting_model(cfg, config, base, world, half, blank_only=False):
    """The policy before the first step, from the folder `base` or from scratch.

    blank_only: one to be filled by a checkpoint. half: the dtype of an adapter's base, and of compute.
    """
    rng = torch.Generator().manual_seed(stream(cfg.seed, "weights"))
    if cfg.lora:
        model = load_pretrained(base, half, world.device)
        model = add_lora(model, cfg.lora, cfg.lora_alpha, rng, cfg.lora_projections.split(","))
    else:
        model = blank(config, device="cpu" if cfg.shard else world.device)
        model = shard(model, world, half is torch.bfloat16) if cfg.shard else model
        if cfg.from_scratch and not blank_only:
            load_weights(model, Transformer(config).init_weights(rng).named_parameters())
        elif not blank_only:
            load_weights(model, read_weights(base))
    model.gradient_checkpointing = cfg.gradient_checkpointing
    return model


def twin_of(model, cfg, world, half):
    """A copy of the policy that does not train, sharded if the policy is."""
    if not cfg.shard:
        return twin(model)
    copy = shard(blank(model.config), world, half is torch.bfloat16).requires_grad_(False)
    copy_parameters(copy, model)
    return copy


def wrap(model, world, cfg):
    """The policy as it is trained: under torchrun wrapped by DDP, unless it is sharded."""
    if not world.many or cfg.shard:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapper = torch.nn.parallel.DistributedDataParallel
    return wrapper(model, gradient_as_bucket_view=True, device_ids=device_ids)
