"""torchrun: the processes of a run, and FSDP2."""

import datetime
import os

import torch
import torch.distributed as dist

from machine.folders import BadInput


class World:
    """This process among all: rank, size, device. Without torchrun it is alone and every call returns at once."""

    def __init__(self, device="auto"):
        self.rank, self.size, self.local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.first, self.many, self.group = self.rank == 0, "RANK" in os.environ, None
        if self.many:            # before the flags are read, so that what one process refuses (a folder its node lacks), all refuse
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=30))
            self.group = dist.new_group(backend="gloo")  # for plain values: works the same beside NCCL
        if device:
            self.place(device)

    def place(self, device):
        """Take a device: cpu, cuda, mps, or auto."""
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(f"cuda:{self.local}" if kind == "cuda" else kind)
        if self.many and kind == "cuda":
            torch.cuda.set_device(self.device)

    def all(self, value):
        """Every process's value, as a list, on every process."""
        values = [value]
        if self.many:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values):
        """Sums of a list of numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.many:
            dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def mean(self, metrics):
        """Metrics with each float replaced by its mean over processes; each has as many pairs, so means of means are means."""
        keys = sorted(k for k, v in metrics.items() if isinstance(v, float))
        return metrics | {k: v / self.size for k, v in zip(keys, self.sum([metrics[k] for k in keys]))}

    def together(self, function):
        """function() on every process; what one refuses, all refuse, so that none waits for another for ever."""
        result = refusal = None
        try:
            result = function()
        except BadInput as error:
            refusal = str(error)
        for rank, sentence in enumerate(self.all(refusal)):
            if sentence:
                raise BadInput(sentence + (f" (process {rank} of {self.size}: every node must see what is read)" if rank else ""))
        return result

    def close(self):
        if self.many and dist.is_initialized():
            dist.destroy_process_group()



def divide(model, world, half):
    """FSDP2: each block's parameters are divided among the processes, float32 shards, bfloat16 compute if `half`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    how = dict(mesh=init_device_mesh(world.device.type, (world.size,)), mp_policy=MixedPrecisionPolicy(
        **(dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else {})))
    for block in model.model.layers:
        fully_shard(block, **how)
    # left to itself, the root stays whole after a forward pass until the backward pass, which a reference never has
    return fully_shard(model, reshard_after_forward=True, **how)



def whole(tensor):
    """A tensor that may be divided, in one piece (all processes together), on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()



def like(tensor, parameter):
    """A whole tensor divided and placed as `parameter` is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)



@torch.no_grad()
def fill(model, weights):
    """Copy (name, whole tensor) pairs into a model that may be divided."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        if name in parameters:
            parameters[name].copy_(like(tensor, parameters[name]))
    return model
