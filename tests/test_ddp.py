"""Many processes compute what one would: gradients, weights, EMA and metrics under torchrun, for DDP, LoRA and --shard.

The file is its own worker: `torchrun tests/test_ddp.py ...` takes three steps on given pairs and writes what came out.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, random_texts, small_model

import train
from buffer import ReplayBuffer, unpack
from model import add_lora, blank, plain_weights, twin
from sapo import Example, SAPOConfig, State, copy_parameters, sapo_step

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
PAIRS = 8


def torchrun(processes, *arguments, check=True, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **more)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


# ---------------------------------------------------------------- three steps on given pairs

def three_steps(way, loss, dtype, micro_batch, out):
    """[6] ... [9] three times on the same eight pairs a step, shared out over the processes; rank 0 writes the result."""
    world = train.World("cpu")
    cfg = SAPOConfig(loss=loss, rejected="data", batch_size=PAIRS // world.size, buffer_size=PAIRS // world.size, micro_batch=micro_batch,
                     ema_every="2", ref_refresh="2", alpha=0.7, beta=0.3, lam=0.4, max_grad_norm=0.5)
    prompts, chosen, rejected = (random_texts([3 + (5 * i + k) % 7 for i in range(3 * PAIRS)], seed=k) for k in (1, 2, 3))
    rows = [Example(p, c, c[:1] + r, i) for i, (p, c, r) in enumerate(zip(prompts, chosen, rejected))]
    base = small_model(3, dtype=getattr(torch, dtype))
    if way == "lora":
        add_lora(base, 3, 7.0, torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    if way == "shard":
        split = lambda: train.divide(blank(base.config, getattr(torch, dtype)), world, False)
        model, ema, reference = split(), split().requires_grad_(False), split().requires_grad_(False)
        for m in (model, ema, reference):
            train.fill(m, base.named_parameters())
        policy = model
    else:
        model, ema, reference = base, twin(base), twin(base)
        policy = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world.many else model
    state = State(policy, ema, ema, reference if loss == "dpo" else None,
                  torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0),
                  ReplayBuffer(cfg.buffer_size, world.rank), np.random.default_rng(0), torch.Generator(), (2,), keep_ref=way != "shard")
    draw, result = train.Draw(rows, PAIRS, 0, world), {}
    for step in range(3):
        metrics = world.mean(sapo_step(state, draw, cfg))
        result |= {f"gradient {step} {k}": train.whole(p.grad).clone() for k, p in model.named_parameters() if p.grad is not None}
        result[f"metrics {step}"] = torch.tensor([metrics[k] for k in ("loss", "rewards/margins", "logps/chosen", "grad_norm")], dtype=torch.float64)
    for name, m in (("weights", model), ("ema", ema), ("reference", reference)):
        result |= {f"{name} {k}": train.whole(t).clone() for k, t in plain_weights(m)}
    for value in world.all({k: v.double().sum().item() for k, v in result.items()}):       # equal on all processes
        assert value == {k: v.double().sum().item() for k, v in result.items()}
    if world.first:
        save_file({k: v.clone() for k, v in result.items()}, out)
    world.close()


CASES = [("ddp", "dpo", 2), ("ddp", "orpo", 8), ("lora", "dpo", 8), ("shard", "dpo", 8), ("shard", "orpo", 2), ("lora", "orpo", 2), ("ddp", "dpo", 8),
         ("shard", "dpo", 1)]
QUICK = [("ddp", "dpo", 2, "float64"), ("shard", "orpo", 2, "float64")]


@pytest.mark.parametrize("way, loss, micro, dtype", [pytest.param(*c, d, marks=[] if (*c, d) in QUICK else pytest.mark.slow)
                                                      for c in CASES for d in ("float64", "float32")])
def test_many_processes_compute_what_one_would(tmp_path, way, loss, micro, dtype):
    quick = (way, loss, micro, dtype) in QUICK
    results = {}
    one = "lora" if way == "lora" else "ddp"
    for n in (1, 2) if quick else (1, 2, 4):
        out = tmp_path / f"{n}.safetensors"
        arguments = (Path(__file__), one if n == 1 else way, loss, dtype, micro, out)
        torchrun(n, *arguments)
        results[n] = load_file(out)
    bound = 1e-10 if dtype == "float64" else 1e-5
    for n, result in results.items():
        assert result.keys() == results[1].keys()
        for k, v in result.items():
            expected = results[1][k]
            # Adam divides a gradient by its own size, so where a gradient is nearly 0 its rounding decides; weights are held to their norm
            assert (v - expected).norm() <= bound * max(expected.norm(), 1.0 if k.startswith(("gradient", "metrics")) else 0), (n, k)
    assert any(k.startswith("gradient 2") and v.norm() > 1e-3 for k, v in results[1].items())


# ---------------------------------------------------------------- whole jobs

SHORT = ["--sft-steps", "3", "--steps", "6", "--eval-every", "4", "--save-every", "3", "--eval-rows", "6", "--batch-size", "8", "--sft-batch-size", "8",
         "--samples", "1", "--eval-tokens", "8"]


def job(processes, out, *more, check=True):
    return torchrun(processes, "train.py", "--out", out, *SHORT, *more, check=check)


def newest(out):
    return sorted((Path(out) / "checkpoint").glob("step-*"))[-1]


def same(a, b, names=("policy", "ema", "reference", "optimizer")):
    one, two = ([load_file(newest(out) / f"{n}.safetensors") for n in names] for out in (a, b))
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(one, two))


def step_back(out):
    """Forget the newest checkpoint and what came after it: as if the run had been killed."""
    import shutil
    shutil.rmtree(newest(out))
    shutil.rmtree(Path(out) / "model", ignore_errors=True)


@pytest.mark.parametrize("way", [[], pytest.param(["--shard"], marks=pytest.mark.slow)], ids=["ddp", "shard"])
def test_a_job_of_two_processes_resumes_bit_for_bit_and_its_buffers_differ(tmp_path, way):
    import shutil
    job(2, tmp_path / "a", *way)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    step_back(tmp_path / "b")
    torchrun(2, "train.py", "--resume", tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")
    for name in ("model", "ema"):
        assert (tmp_path / f"a/{name}/model.safetensors").read_bytes() == (tmp_path / f"b/{name}/model.safetensors").read_bytes()
    parts = [train.from_disk(newest(tmp_path / "a") / f"rank-{r}") for r in (0, 1)]
    rows = [{(p.row, tuple(p.rejected)) for p in unpack(part["buffer"]["pairs"])} for part in parts]
    assert rows[0] and rows[1] and not rows[0] & rows[1]
    lines = [json.loads(line) for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r and "step" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    job(before, tmp_path / "run")
    step_back(tmp_path / "run")
    folder = newest(tmp_path / "run")
    key = lambda p: (p.row, p.step, tuple(p.rejected))
    saved = [train.from_disk(folder / f"rank-{r}") for r in range(before)]
    dealt = [train.deal(saved, 8, dataclasses.replace(FakeWorld(), rank=r, size=after)) for r in range(after)]
    for name, read in (("buffer", lambda p: unpack(p["buffer"]["pairs"])), ("written", lambda p: unpack(p["written"])), ("held", lambda p: unpack(p["held"]))):
        one, two = (Counter(key(p) for part in parts for p in read(part)) for parts in (saved, dealt))
        assert one == two and (one or name == "written")
    torchrun(after, "train.py", "--resume", tmp_path / "run")
    shared = train.from_disk(newest(tmp_path / "run") / "shared")
    assert shared["step"] == 6 and shared["world_size"] == after
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r and "step" in r] == [1, 2, 3, 4, 5, 6]


@dataclasses.dataclass
class FakeWorld:
    rank: int = 0
    size: int = 1


@pytest.mark.slow
def test_two_agents_over_loopback_do_what_one_does(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = ["train.py", "--out", str(tmp_path / "nodes"), *SHORT]
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1",
                                "--master_addr=127.0.0.1", f"--master_port={port}", *arguments], cwd=ROOT, env=ENVIRONMENT) for i in (0, 1)]
    assert [a.wait(300) for a in agents] == [0, 0]
    job(2, tmp_path / "node")
    assert same(tmp_path / "nodes", tmp_path / "node")


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_resumes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--out", str(tmp_path / "run"), *SHORT]
    job(2, tmp_path / "whole")
    agent = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    while not list((tmp_path / "run/checkpoint").glob("step-*")):
        time.sleep(0.1)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    began = time.monotonic()
    assert agent.wait(90) != 0 and time.monotonic() - began < 60
    assert not [c for c in children if Path(f"/proc/{c}").exists()]
    torchrun(2, "train.py", "--resume", tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c}) + "\n" for p, c in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_fewer_rows_than_a_batch_or_than_processes_do_not_hang(tmp_path, rows):
    data = write_rows(tmp_path / "few.jsonl", [(f"Tell me of the fox, part {i}.", "The fox slept. " * (i + 1)) for i in range(rows)])
    job(4, tmp_path / "run", "--data", data, "--eval-data", data, "--sft-data", data, "--steps", "3")


@pytest.mark.slow
def test_bad_input_is_one_line_from_one_process(tmp_path):
    done = job(2, tmp_path / "run", "--data", tmp_path / "none.jsonl", check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "none.jsonl" in lines[0]
    odd = job(3, tmp_path / "run", check=False)
    assert "cannot be shared evenly by 3 processes" in odd.stderr and odd.stderr.count("error: ") == 1


if __name__ == "__main__":
    way, loss, dtype, micro, out = sys.argv[1:]
    three_steps(way, loss, dtype, int(micro), out)
    os._exit(0)                     # as train.py ends, and for the same reason
