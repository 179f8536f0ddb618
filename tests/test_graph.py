"""What `generate` does on a GPU alone, on a CPU: one decoding step is recorded there as a CUDA graph, and replayed.

A stand-in for the graph does what CUDA does. Recording executes nothing that lasts; replaying does the same operations on
the same memory, so that a Python number or a tensor made anew by each step stays what it was; and nothing recorded may ask
what a tensor holds.
"""

import contextlib
import sys
import types

import pytest
import torch
from conftest import GEMMA, KINDS, ROOT, random_texts, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from model import generate

ASKS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "unique"}      # a GPU would be waited for


def memory(tensor):
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}                 # {address: (memory that was written to, what it held)}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ASKS, function
        for tensor, argument in zip(args, function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                whole = memory(tensor)
                self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Graph:
    def replay(self):
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (made, again))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def recorded(graph):
    with Recording() as recording:
        yield
    for whole, held in recording.before.values():
        whole.copy_(held)
    graph.calls = recording.calls


def as_on_a_gpu(monkeypatch):
    """model.py with the branches of `generate` that CUDA takes, and the stand-in."""
    source = (ROOT / "model.py").read_text("utf-8")
    for old, new in [('device.type == "cpu"', "False"), ('device.type == "cuda"', "True")]:
        assert old in source
        source = source.replace(old, new)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    module = types.ModuleType("model_on_a_gpu")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("numbers", [{}, GEMMA, KINDS, {"sliding_window": 5}], ids=["plain", "gemma", "kinds", "window"])
@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.7, top_k=5, top_p=0.9), dict(temperature=1.0)],
                         ids=["greedy", "filtered", "sampled"])
def test_a_recorded_step_generates_the_same_texts(numbers, how, monkeypatch):
    there, model = as_on_a_gpu(monkeypatch), small_model(**numbers)
    same = there.Transformer(model.config).to(next(model.parameters()).dtype)
    same.load_state_dict(model.state_dict())
    asked = dict(eos=(7, 8), vocab=59, ban=(3,), **how)
    texts = [g(m, random_texts([4, 9, 1, 6]), [30, 3, 22, 40], rng=torch.Generator().manual_seed(3), **asked)
             for g, m in [(generate, model), (there.generate, same)]]
    assert texts[0] == texts[1] and max(map(len, texts[0])) > 8
