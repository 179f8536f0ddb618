"""Many processes compute what one would, go on as another number, and end when one dies: DDP, LoRA and --shard.

    pytest tests/test_ddp.py [--slow]                     the claims
    python tests/test_ddp.py kills 10                     kill a process at a random moment, ten times; each time all end and the run goes on
    python tests/test_ddp.py throughput --steps 60        pairs per second of 2 processes against 1, and what the exchange of gradients costs

The file is its own worker: `torchrun tests/test_ddp.py work ORDERS.json` computes many cases and runs many jobs in one
go, as starting processes and importing torch takes longer than any of them.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GEMMA, ROOT, oracle, random_texts, small_model
from safetensors.torch import load_file, save_file

import train
from buffer import unpack
from machine import checkpoint, folders, parallel
from machine.checkpoint import from_disk, redistribute
from machine.dataset import Draw
from machine.files import BadInput
from machine.folders import blank, load_pretrained, plain_weights
from machine.parallel import World, load_weights
from model import add_lora, twin, unshard
from sapo import Example, SAPOConfig, State, sapo_step

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PAIRS = 8


def torchrun(processes, *arguments, check=True):
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---------------------------------------------------------------- the worker

def work(orders):
    """What `ordered` asks for, on this process: cases, then jobs, each in a process group of its own; rank 0 writes results.json."""
    orders = Path(orders)
    asked, first = json.loads(orders.read_text()), int(os.environ["RANK"]) == 0
    world, results, codes = World("cpu"), {}, []
    for case in asked["cases"]:
        results |= {f"{'/'.join(map(str, case))}/{k}": v for k, v in three_steps(*case, world).items()}
    ports = world.all([free_port() for _ in asked["jobs"]])[0]
    world.close()
    if first:
        save_file(results, orders.with_name("cases.safetensors"))
    for job, port in zip(asked["jobs"], ports):
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}        # the agent's store serves one group
        if first and job["resume"]:
            again(*job["resume"])
        if job["alone"]:                                                 # no exchange of gradients, to see what it costs
            train.wrap = lambda model, world, cfg: model
        if job["watch"]:
            watch_saves(Path(job["watch"]))
        codes.append(train.main(job["arguments"]))
        train.wrap = parallel.wrap
    if first:
        orders.with_name("codes.json").write_text(json.dumps(codes))


def newly_held():
    """Bytes of the tensors made since `gc.freeze` that are alive in this process, shared memory counted once; of a sharded one, its shard."""
    storages = (t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def watch_saves(note):
    """From now on `note`-RANK.jsonl gets a line for each checkpoint and each model written: bytes of new tensors, at most and afterwards."""
    peak, note = [0], f"{note}-{os.environ['RANK']}.jsonl"

    def gathering(tensor):
        tensor = unshard(tensor)
        if os.environ["RANK"] != "0":                                    # what only waits for the collector is not held
            gc.collect()
        peak[0] = max(peak[0], newly_held())
        return tensor

    def watched(original):
        def call(run, *arguments):
            sizes = [4 * p.numel() for p in run.model.parameters()]
            gc.collect()
            gc.freeze()
            peak[0] = 0
            original(run, *arguments)
            with open(note, "a") as f:
                f.write(json.dumps({"what": original.__name__, "most": peak[0], "left": newly_held(), "model": sum(sizes), "largest": max(sizes)}) + "\n")
            gc.unfreeze()
        return call

    checkpoint.unshard = folders.unshard = gathering
    train.Run.save, train.Run.export = watched(train.Run.save), watched(train.Run.export)


def job(*arguments, resume=(), alone=False, watch=""):
    """One command line of train.py for `ordered`; resume (FROM, TO): it goes on with a copy of FROM, one checkpoint back."""
    more = ["--resume", resume[1]] if resume else []
    return {"arguments": [*map(str, [*more, *arguments])], "resume": [*map(str, resume)], "alone": alone, "watch": str(watch)}


def ordered(processes, folder, cases=(), jobs=()):
    """One torchrun for many cases and jobs: ({case: {name: tensor}}, exit code of each job, what was printed)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orders.json").write_text(json.dumps({"cases": list(cases), "jobs": list(jobs)}))
    done = torchrun(processes, __file__, "work", folder / "orders.json")
    split = {}
    for name, value in load_file(folder / "cases.safetensors").items():
        *case, k = name.split("/", 4)
        split.setdefault(tuple(case), {})[k] = value
    return split, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


# ---------------------------------------------------------------- three steps on given pairs

def three_steps(way, loss, dtype, micro_batch, world):
    """[6] ... [9] three times on the same eight pairs a step, shared out over the processes: {name: tensor}, equal on all."""
    dtype = getattr(torch, dtype)
    cfg = SAPOConfig(loss=loss, rejected="data", batch_size=PAIRS, buffer_size=PAIRS, micro_batch=micro_batch,
                     ema_every="2", ref_refresh="2", alpha=0.7, beta=0.3, lam=0.4, max_grad_norm=0.5)
    prompts, chosen, rejected = (random_texts([3 + (5 * i + k) % 7 for i in range(3 * PAIRS)], seed=k) for k in (1, 2, 3))
    rows = [Example(p, c, c[:1] + r, i) for i, (p, c, r) in enumerate(zip(prompts, chosen, rejected))]
    base = small_model(3, dtype=dtype, **(GEMMA if way == "shard" else {}))     # whose blocks differ in what they are given
    if way == "lora":
        add_lora(base, 3, 7.0, torch.Generator().manual_seed(1)).to(dtype)
    sharded = way == "shard" and world.many

    def parted():
        return load_weights(parallel.shard(blank(base.config, dtype), world, False), base.named_parameters())

    model = policy = parted() if sharded else base
    if world.many and not sharded:
        policy = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Adam divides a gradient by its own size: with the usual eps, one that is nearly 0 moves its weight by what rounding made of it
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, weight_decay=0.0)
    state = State.start(policy, cfg, (2,), seed=world.rank, processes=world.size, optimizer=optimizer, keep_ref=way != "shard",
                        copy=lambda _: parted().requires_grad_(False) if sharded else twin(model))
    draw, result, places = Draw(rows, PAIRS, 0, world), {}, []

    def lap(stage, lap=state.clock.lap):
        lap(stage)
        if stage == "backward":
            places.append([p.grad.data_ptr() for p in model.parameters() if p.grad is not None])

    state.clock.lap = lap if policy is not model else state.clock.lap
    for step in range(3):
        places.clear()
        metrics = world.mean(sapo_step(state, draw, cfg))
        for key in ("buffer/size", "gen/tokens", "train/tokens"):        # as train.py has it: of all processes together
            metrics[key] *= world.size
        if step == 2:                # DDP has arranged its buckets for good
            assert all(some == places[-1] for some in places), "gradients of a first micro-batch are held beside DDP's buckets"
        result |= {f"gradient {step} {k}": unshard(p.grad).clone() for k, p in model.named_parameters() if p.grad is not None}
        result[f"metrics {step}"] = torch.tensor([v for k, v in sorted(metrics.items()) if isinstance(v, float) and not k.startswith("time/")], dtype=torch.float64)
    for name, m in (("weights", model), ("ema", state.ema), *([("reference", state.reference)] if state.reference else [])):
        result |= {f"{name} {k}": t.clone() for k, t in plain_weights(m)}
    sums = {k: v.double().sum().item() for k, v in result.items()}
    assert all(other == sums for other in world.all(sums)), "the processes have drifted apart"
    return result


CASES = [(way, loss, dtype, micro) for dtype in ("float64", "float32") for way in ("ddp", "lora", "shard") for loss in ("dpo", "orpo") for micro in (1, 8)]
QUICK = [case for case in CASES if case[2] == "float64"]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow, id="-".join(map(str, c))) for c in CASES])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_compute_what_one_would(request, processes, case):
    alone = three_steps(*case, World("cpu"))
    result = request.getfixturevalue({2: "two", 4: "four"}[processes])[0][tuple(map(str, case))]
    assert result.keys() == alone.keys() and len(alone["metrics 1"]) > 12
    bound = 1e-10 if case[2] == "float64" else 1e-5
    for k, expected in alone.items():
        floor = 1.0 if k.startswith(("gradient", "metrics")) else 0.0
        assert (result[k] - expected).norm() <= bound * max(expected.norm(), floor), k
    assert any(k.startswith("gradient 2") and v.norm() > 1e-3 for k, v in alone.items())


# ---------------------------------------------------------------- whole jobs

SHORT = ["--preset", "tiny", "--sft-data", str(ROOT / "data/tiny_validation.jsonl"), "--sft-steps", "3", "--steps", "6", "--eval-every", "4", "--save-every", "3", "--eval-rows", "6", "--batch-size", "8", "--sft-batch-size", "8",
         "--samples", "3", "--eval-tokens", "8"]
BRIEF = ["--sft-steps", "1", "--steps", "1", "--eval-rows", "2", "--samples", "0", "--eval-tokens", "1"]


def newest(out):
    return sorted((Path(out) / "checkpoint").glob("step-*"))[-1]


def again(source, target):
    """A copy of a run as if it had been killed: its newest checkpoint, and what came after, are not there."""
    shutil.copytree(source, target)
    shutil.rmtree(newest(target))
    for name in ("model", "ema"):
        shutil.rmtree(Path(target) / name, ignore_errors=True)


def same(a, b):
    """Bit for bit the same weights, EMA, reference and moments?"""
    one, two = ([load_file(newest(out) / f"{n}.safetensors") for n in ("policy", "ema", "reference", "optimizer")] for out in (a, b))
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(one, two))


def logged(out):
    """The lines of metrics.jsonl that SAPO's steps wrote."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r and "step" in r]


def steps_logged(out):
    return [r["step"] for r in logged(out)]


def saved_parts(out):
    folder = newest(out)
    return [from_disk(folder, f"rank-{r}") for r in range(from_disk(folder, "shared")["world_size"])]


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Two processes: every case, then a DDP job, that job again from its checkpoint, and a sharded one, watched. (cases, codes, printed, folder)"""
    folder = tmp_path_factory.mktemp("two")
    return *ordered(2, folder, CASES, [
        job("--out", folder / "ddp", *SHORT), job(resume=(folder / "ddp", folder / "ddp-again")),
        job("--out", folder / "watched", "--shard", *SHORT, *BRIEF, watch=folder / "saves")]), folder


@pytest.fixture(scope="session")
def shard(two):
    """Two processes in shard mode: a job, that job again, and the DDP job of `two` once more, now in fresh processes."""
    folder = two[-1]
    _, codes, printed = ordered(2, folder / "shard-orders", jobs=[
        job("--out", folder / "shard", "--shard", *SHORT), job(resume=(folder / "shard", folder / "shard-again")), job(resume=(folder / "ddp", folder / "ddp-fresh"))])
    assert codes == [0, 0, 0], printed[-3000:]
    return folder


FEW = [1, 3, 7]


@pytest.fixture(scope="session")
def four(two, shard):
    """Four processes: every case; jobs of two that go on as four; jobs of four; jobs with few or short-cut rows; refusals."""
    folder = two[-1]
    few = {n: write_rows(folder / f"{n}.jsonl", [(f"Tell me of the fox, part {i}.", "The fox slept. " * (i + 1)) for i in range(n)]) for n in FEW}
    # every fourth row of the data, as dealt to four processes, is an end token alone once the response is cut or read
    cut = write_rows(folder / "cut.jsonl", [(f"Tell me of the fox, part {i}.", "<|end|>" if i % 4 == 1 else "The fox slept.") for i in range(24)])
    gone = write_rows(folder / "gone.jsonl", [("Tell me of the fox.", "<|end|>" if i % 4 else "The fox slept.") for i in range(24)])
    on = lambda data: ["--data", data, "--eval-data", data, "--sft-data", data, *SHORT, "--steps", "3"]
    jobs = [job(resume=(folder / way, folder / f"{way}-2-4")) for way in ("ddp", "shard")]
    jobs += [job("--out", folder / f"{way}4", *(["--shard"] if way == "shard" else []), *SHORT) for way in ("ddp", "shard")]
    jobs += [job("--out", folder / f"few{n}", *on(few[n])) for n in FEW] + [job("--out", folder / "cut", *on(cut))]
    jobs += [job("--out", folder / "gone", *on(gone)), job("--out", folder / "odd", *SHORT, "--batch-size", 6), job("--out", folder / "none", *on("none.jsonl"))]
    return *ordered(4, folder / "four", CASES, jobs), folder


@pytest.fixture(scope="session")
def back(four):
    """The jobs of four processes go on as two."""
    folder = four[-1]
    assert ordered(2, folder / "back", jobs=[job(resume=(folder / f"{way}4", folder / f"{way}-4-2")) for way in ("ddp", "shard")])[1] == [0, 0]


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c}) + "\n" for p, c in rows))
    return path


@pytest.mark.parametrize("first, second", [("ddp", "ddp-again"), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("shard", "shard-again"), ("ddp", "ddp-fresh")))])
def test_a_job_of_two_processes_resumes_bit_for_bit_and_its_buffers_differ(request, two, first, second):
    folder = two[-1]
    if second != "ddp-again":
        request.getfixturevalue("shard")
    assert two[1] == [0, 0, 0], two[2][-3000:]
    assert same(folder / first, folder / second)
    for name in ("model/model.safetensors", "ema/model.safetensors", "samples.jsonl", "results.json"):
        assert (folder / first / name).read_bytes() == (folder / second / name).read_bytes(), name
    assert steps_logged(folder / second) == [1, 2, 3, 4, 5, 6]
    assert [r["buffer/size"] for r in logged(folder / second)] == [8, 16, 24, 32, 40, 48], "of all processes"
    rows = [{(p.row, tuple(p.rejected)) for p in unpack(part["buffer"]["pairs"])} for part in saved_parts(folder / first)]
    assert rows[0] and rows[1] and not rows[0] & rows[1]


def saves(two, rank):
    """What `watch_saves` noted: of the checkpoints after SFT and after SAPO, then of the policy and the EMA."""
    assert two[1] == [0, 0, 0], two[2][-3000:]
    rows = [json.loads(line) for line in (two[-1] / f"saves-{rank}.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["save", "save", "export", "export"]
    return rows


def test_on_saving_only_rank_0_ever_holds_a_whole_model(two):
    """All gather the shards, tensor by tensor, and only the first process keeps them."""
    for first, other in zip(saves(two, 0), saves(two, 1)):
        assert first["most"] >= first["model"] > 3 * first["largest"]
        assert other["largest"] <= other["most"] < 3 * other["largest"], other       # a tensor, and its copy while it is gathered


def test_on_saving_rank_0_holds_one_part_at_a_time_and_afterwards_none(two):
    """The largest part is the optimizer's, two moments of each weight. What is written goes at once, not when the garbage collector comes by."""
    for row in saves(two, 0):
        assert row["most"] < 2 * row["model"] + 2 * row["largest"] and row["left"] < row["model"] / 2, row


@dataclasses.dataclass
class FakeWorld:
    rank: int = 0
    size: int = 1


def counted(parts):
    """Every pair of a saved run, and how often it is there: of the buffers, generated ahead, evaluated on."""
    read = {"buffer": lambda p: unpack(p["buffer"]["pairs"]), "ahead": lambda p: unpack(p["ahead"]), "eval": lambda p: unpack(p["eval_pairs"])}
    return {name: Counter((p.row, p.step, p.uses, tuple(p.rejected)) for part in parts for p in take(part)) for name, take in read.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "shard"])
@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_processes(request, four, way, before, after):
    folder = four[-1]
    source, target = folder / (way if before == 2 else f"{way}4"), folder / f"{way}-{before}-{after}"
    if after == 1:                                       # one process alone shards nothing
        again(source, target)
        signals = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        assert train.main(["--resume", str(target), "--no-shard"]) == 0
        for s, handler in zip((signal.SIGTERM, signal.SIGINT), signals):
            signal.signal(s, handler)
    elif after == 2:
        request.getfixturevalue("back")
    assert four[1][:4] == [0] * 4, four[2][-3000:]
    saved = [from_disk(sorted((target / "checkpoint").glob("step-*"))[0], f"rank-{r}") for r in range(before)]      # where it went on
    dealt = [redistribute(saved, 8, 42, 3, FakeWorld(r, after)) for r in range(after)]
    assert counted(saved) == counted(dealt) and counted(saved)["buffer"].total() == counted(dealt)["buffer"].total() > 0
    shared, once = (from_disk(newest(out), "shared") for out in (target, source))
    assert shared["world_size"] == after and (shared["step"], shared["draw"]) == (once["step"], once["draw"]) == (6, 6)
    assert steps_logged(target) == [1, 2, 3, 4, 5, 6]
    # the rows learned from are those of the run that was not interrupted: as many, and the same
    rows = [Counter(p.row for part in saved_parts(out) for p in unpack(part["buffer"]["pairs"])) for out in (source, target)]
    assert rows[0] == rows[1] and rows[0].total() == 48
    texts = [[json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] for out in (source, target)]
    one, two = ([(t["prompt"], t["chosen"], t["start"]) for t in x] for x in texts)       # "start" was answered before the change
    assert one == two and len(one) == 3
    oracle("transformers").AutoModelForCausalLM.from_pretrained(target / "model", dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "shard", "ddp4", "shard4"])
@pytest.mark.parametrize("model", ["model", "ema"])
def test_written_folders_load_in_transformers(four, name, model):
    folder = four[-1] / name / model
    theirs = oracle("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, ids = load_pretrained(folder).eval(), torch.tensor(random_texts([20], 1000))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    saved = "policy" if model == "model" else model
    assert torch.equal(ours.model.norm.weight, load_file(newest(four[-1] / name) / f"{saved}.safetensors")[f"{saved}.model.norm.weight"])


@pytest.mark.slow
def test_sharding_changes_no_more_than_rounding(four):
    """The sharded job and the plain one took the same steps: the EMA generated, the policy learned, to float32's accuracy."""
    for one, other in (("ddp", "shard"), ("ddp4", "shard4")):
        a, b = (load_file(newest(four[-1] / x) / "policy.safetensors") for x in (one, other))
        apart, size = (sum(f(k).double().square().sum() for k in a).sqrt() for f in (lambda k: a[k] - b[k], lambda k: a[k]))
        assert apart < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize("number, name", list(enumerate([*(f"few{n}" for n in FEW), "cut"], 4)))
def test_few_or_dropped_rows_do_not_hang_four_processes(four, number, name):
    assert four[1][number] == 0 and steps_logged(four[-1] / name) == [1, 2, 3]
    if name == "cut":
        assert "6 rows dropped" in json.loads((four[-1] / "cut/config.json").read_text())["data"][0]


@pytest.mark.slow
@pytest.mark.parametrize("number, name, words", [(8, "gone", "18 rows dropped"), (9, "odd", "--batch-size 6 cannot be shared evenly by 4 processes"), (10, "none", "none.jsonl")])
def test_what_is_impossible_is_one_line_from_one_process(four, number, name, words):
    lines = [line for line in four[2].splitlines() if line.startswith("error: ") and words in line]
    assert four[1][number] == 2 and len(lines) == 1 and not (four[-1] / name).exists()


# ---------------------------------------------------------------- two nodes

def nodes(folder, *arguments):
    """Two agents over loopback, each in a folder of its own as if on a machine of its own: (exit codes, seconds, printed)."""
    began, agents, port = time.monotonic(), [], free_port()
    for i in (0, 1):
        (folder / f"node{i}").mkdir(exist_ok=True)
        agents.append(subprocess.Popen([*TORCHRUN, "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
                                        str(ROOT / "train.py"), *arguments], cwd=folder / f"node{i}", env=ENVIRONMENT, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    printed = [a.communicate(timeout=300)[0] for a in agents]
    return [a.returncode for a in agents], time.monotonic() - began, printed


@pytest.mark.slow
def test_two_nodes_that_share_no_disk_do_what_one_does_and_resume_once_both_have_the_folder(two, tmp_path):
    codes, _, printed = nodes(tmp_path, "--out", "run", *SHORT)
    assert codes == [0, 0], printed
    assert same(two[-1] / "ddp", tmp_path / "node0/run") and not (tmp_path / "node1/run").exists()
    shutil.move(tmp_path / "node0/run", tmp_path / "whole")
    again(tmp_path / "whole", tmp_path / "node0/run")

    codes, seconds, printed = nodes(tmp_path, "--resume", "run")                          # node 1 has nothing
    assert 0 not in codes and seconds < 60
    assert len([line for line in printed[0].splitlines() if line.startswith("error: ") and "process 1 of 2" in line]) == 1, printed

    shutil.copytree(tmp_path / "node0/run", tmp_path / "node1/run")                       # node 1 has another checkpoint
    manifest = newest(tmp_path / "node1/run") / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    codes, seconds, printed = nodes(tmp_path, "--resume", "run")
    assert 0 not in codes and seconds < 60 and "not all processes see" in printed[0], printed

    manifest.write_text(text)
    codes, _, printed = nodes(tmp_path, "--resume", "run")
    assert codes == [0, 0] and same(tmp_path / "whole", tmp_path / "node0/run"), printed


@pytest.mark.slow
def test_nodes_with_unlike_data_are_refused_before_they_wait_for_each_other(tmp_path):
    for i, n in enumerate((20, 28)):
        (tmp_path / f"node{i}").mkdir()
        write_rows(tmp_path / f"node{i}/rows.jsonl", [(f"Tell me of the fox, part {j}.", "The fox slept.") for j in range(n)])
    codes, seconds, printed = nodes(tmp_path, "--out", "run", *SHORT, "--data", "rows.jsonl")
    assert 0 not in codes and seconds < 60 and "the same settings and data" in printed[0], printed


# ---------------------------------------------------------------- a process dies

def alive(pid):
    """Is there such a process, and is it more than an entry that nobody has read?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_one(folder, whole, chance, span):
    """Start a job of two, kill one process after up to `span` seconds, and resume it. Returns what happened, as a line.

    AssertionError unless torchrun ends within 60 s with a code that is not 0, leaves no process behind, and the resumed run
    comes out as `whole` did. None if the job was done before it could be killed.
    """
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", "--out", str(folder), *SHORT, "--save-every", "1"]
    agent = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        assert agent.poll() is None
        time.sleep(0.05)
    delay, rank = chance.uniform(0, span), chance.randrange(2)
    time.sleep(delay)
    try:
        os.kill(int(workers[rank]), signal.SIGKILL)
    except ProcessLookupError:
        pass
    began = time.monotonic()
    code = agent.wait(90)
    seconds = time.monotonic() - began
    if code == 0:
        return None
    assert seconds < 60 and not any(map(alive, workers)), "a process outlived its agent"
    saved = sorted((folder / "checkpoint").glob("step-*")) if folder.exists() else []
    torchrun(2, "train.py", *(["--resume", folder] if (folder / "config.json").exists() else ["--out", folder, *SHORT]))
    assert same(folder, whole)
    return f"rank {rank} killed after {delay:.1f} s ({f'{len(saved)} checkpoints, ' + saved[-1].name if saved else 'nothing saved yet'}): all ended with code {code} in {seconds:.1f} s; resumed, equal bit for bit"


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_resumes(two, tmp_path):
    for attempt in range(5):                             # it may have been done before its time came
        if kill_one(tmp_path / f"{attempt}", two[-1] / "ddp", random.Random(), 6 / (attempt + 1)):
            return
    pytest.fail("the job was always done before the process could be killed")


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_with_the_flags_that_the_pages_name(tmp_path):
    """By itself torchrun dies of SIGUSR1 and leaves its processes behind."""
    page = (ROOT / "docs/reliability.md").read_text("utf-8")
    flags = re.search(r"--signals-to-handle=\S+ --shutdown-timeout=\d+", page)[0].split()
    out = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *flags, "train.py", "--out", str(out), *SHORT, "--steps", "900", "--max-minutes", "2"]
    agent = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or '"step"' not in metrics.read_text():
        assert agent.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    agent.send_signal(signal.SIGUSR1)
    said = agent.communicate(timeout=90)[1]
    assert "and saved; go on with" in said and not any(map(alive, workers))
    assert sorted((out / "checkpoint").glob("step-*/manifest.json"))


@pytest.mark.parametrize("place, good", [(0, True), (1, False)])
def test_a_process_without_a_gpu_of_its_own_is_refused(place, good, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = World(None)
    world.local = place                                  # as torchrun's LOCAL_RANK says
    if good:
        world.place("auto")
        assert world.device == torch.device("cuda:0")
    else:
        with pytest.raises(BadInput, match="only 1; lower --nproc_per_node"):
            world.place("auto")


def kills(times, seed):
    with tempfile.TemporaryDirectory() as folder:
        folder, chance, done = Path(folder), random.Random(seed), 0
        began = time.monotonic()
        torchrun(2, "train.py", "--out", folder / "whole", *SHORT)
        span = time.monotonic() - began
        for attempt in itertools.count():
            line = kill_one(folder / f"{attempt}", folder / "whole", chance, span)
            done += line is not None
            print(f"{done:3}  {line}" if line else "     done before it was killed; once more", flush=True)
            if done == times:
                return


# ---------------------------------------------------------------- throughput

def throughput(steps, rounds, batch):
    """1 process, 2 processes, and 2 that exchange no gradients, one thread each, in turn, at the same global batch.

    Pairs per second are those of time/train in metrics.jsonl (reference, forward, backward, optimizer and EMA; on two
    processes the mean of both, waiting included), without the first tenth of the steps. The share of time in
    communication is by how much the third is faster than the second: what DDP's exchange costs beyond what it hides.
    """
    arguments = ["--sft-steps", "3", "--steps", str(steps), "--batch-size", str(batch), "--sft-batch-size", str(batch), "--eval-every", "0", "--save-every", "0",
                 "--eval-rows", "2", "--samples", "0", "--eval-tokens", "1", "--buffer-size", "256"]
    print(f"the tiny world, {steps} steps of {batch} pairs, {rounds} rounds, one thread a process, {os.cpu_count()} cores")
    rates = {"1 process": [], "2 processes": [], "2 without exchange": []}
    with tempfile.TemporaryDirectory() as folder:
        for n, way in itertools.product(range(rounds), rates):
            out = Path(folder) / f"{n} {way}"
            if way == "1 process":
                subprocess.run([sys.executable, "train.py", "--out", str(out), *arguments], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
            else:
                assert ordered(2, Path(folder) / f"orders {n} {way}", jobs=[job("--out", out, *arguments, alone="without" in way)])[1] == [0]
            lines = logged(out)[steps // 10:]
            seconds = {k: sum(r[f"time/{k}"] for r in lines) for k in ("train", "generate")}
            rates[way].append([batch * len(lines) / seconds["train"], batch * len(lines) / sum(seconds.values())])
            print(f"round {n + 1}  {way:<19} {rates[way][-1][0]:8.1f} pairs/s trained   {rates[way][-1][1]:8.1f} pairs/s generated and trained", flush=True)
    one, two, free = (np.median(np.array(r), 0) for r in rates.values())
    print(f"2 processes against 1, medians: training {two[0] / one[0]:.2f}x, generating and training {two[1] / one[1]:.2f}x; "
          f"communication {1 - two[0] / free[0]:.0%} of the training time")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(sys.argv[2])
        sys.stdout.flush()
        os._exit(0)                     # as train.py ends, and for the same reason
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("kills")
    mode.add_argument("times", type=int)
    mode.add_argument("--seed", type=int, default=0)
    mode = modes.add_parser("throughput")
    for name, default in (("--steps", 60), ("--rounds", 3), ("--batch", 16)):
        mode.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    if arguments.mode == "kills":
        kills(arguments.times, arguments.seed)
    else:
        throughput(arguments.steps, arguments.rounds, arguments.batch)
