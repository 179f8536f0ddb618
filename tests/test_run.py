"""Whole runs of train.py, from the command line to the run folder: what is written, what is measured, going on after a stop.

A run here is a process of its own, forked from a server that has imported everything: that takes a tenth of a second
where a fresh interpreter takes three. Its world is a corner of the tiny one: a few rows, a model of 40,000 numbers.
Left out: deaths and damage, which test_crash.py has, and many processes, which test_ddp.py has.
"""

import functools
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, oracle, randomise, small_model
from safetensors.torch import load_file, save_file

import train
from buffer import unpack
from machine import parallel
from machine.checkpoint import from_disk, load_optimizer, to_disk
from machine.rows import Row
from machine.text import Text
from machine.flags import DATA, Config
from machine.folders import companions, load_pretrained, save_pretrained
from model import generate
from sapo import named_moments

EOS = 1                                                  # <|end|>, of the tiny tokenizer
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
SETTINGS = ("--from-scratch --device cpu --sft-steps 4 --sft-batch-size 4 --sft-lr 1e-2 --steps 8 --batch-size 4 --micro-batch 2 --segment 5 "
            "--buffer-size 12 --generate-ahead 2 --lr 3e-3 --optimizer adamw --warmup 2 --ema-every 3 --ref-refresh 4 --max-prompt-length 48 --max-length 160 "
            "--eval-every 3 --save-every 2 --eval-tokens 6 --samples 2 --show-every 3").split()


# ---------------------------------------------------------------- a run as a process

def _main(argv, hook, log):
    """What the forked process does: train.main with its output in the file `log`; `hook` may change things before."""
    torch.set_num_threads(1)
    with open(log, "ab", buffering=0) as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w", closefd=False), write_through=True) for i in (1, 2))
    train.tqdm.set_lock(threading.RLock())               # its own would be a semaphore that a killed process leaves behind
    torch.manual_seed(os.getpid())                       # a draw from nobody's generator shows as a difference
    train.np.random.seed(os.getpid() % 2**31)
    if hook:
        hook()
    else:
        train.draw_curves = lambda folder: None          # half of a small run's time
    os._exit(train.main([str(a) for a in argv]))


@functools.cache
def server():
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train", "test_run", "torch._dynamo", "jinja2.ext", "jinja2.sandbox"])     # what a run would import
    return context


def start(argv, log, hook=None):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    process = server().Process(target=_main, args=(argv, hook, str(log)))
    process.start()
    return process


def run(out, *argv, hook=None, code=0, log=None):
    """A run to its end in `out` (or going on there: argv begins with --resume); returns what it printed."""
    log = log or Path(out).with_name(Path(out).name + ".log")
    before = log.stat().st_size if log.exists() else 0
    process = start(argv if "--resume" in argv else [*argv, "--out", out], log, hook)
    process.join(300)
    printed = log.read_bytes()[before:].decode()
    assert process.exitcode == code, f"exit code {process.exitcode}:\n{printed[-3000:]}"
    assert "Traceback" not in printed and "Exception ignored" not in printed, printed[-3000:]
    return printed


def resume(out, *argv, **more):
    return run(out, "--resume", out, *argv, **more)


def everything():
    """A hook that changes nothing: the run as it is, curves too."""


def at_call(name, number, action):
    """A hook: `action` is called at the beginning of the number-th call of train.<name>, or of a name in another module."""
    owner, _, name = name.rpartition(".")
    owner = sys.modules.get(owner) or getattr(train, owner) if owner else train
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def counted(*arguments, **named):
        calls[0] += 1
        if calls[0] == number:
            action()
        return original(*arguments, **named)

    setattr(owner, name, counted)
    train.draw_curves = lambda folder: None


def send(number):
    os.kill(os.getpid(), number)


def stop_at(name, number, signum=signal.SIGTERM):
    return functools.partial(at_call, name, number, functools.partial(send, signum))


# ---------------------------------------------------------------- what a run left

def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def metrics(out):
    """metrics.jsonl without what a clock decides."""
    return [{k: repr(v) for k, v in row.items() if not k.startswith("time/") and k != "gen/tokens_per_second"} for row in lines(Path(out) / "metrics.jsonl")]


def checkpoints(out):
    return sorted((Path(out) / "checkpoint").glob("step-*"))


def state_of(folder):
    """A checkpoint as {file: bytes or object}, without what must differ between two runs: their names and how long their lines are."""
    state = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} | {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    del state["manifest.json"]
    return state | {"shared.json": {k: v for k, v in state["shared.json"].items() if k not in ("sizes", "stands_on")}}


def differences(a, b):
    """What two finished runs do not have in common, bit for bit, times apart."""
    a, b, found = Path(a), Path(b), []
    for name in ("model/model.safetensors", "ema/model.safetensors", "model/README.md", "samples.jsonl", "pairs.jsonl", "results.json"):
        present = [(x / name).exists() for x in (a, b)]
        if present[0] != present[1] or all(present) and (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    if metrics(a) != metrics(b):
        found.append("metrics.jsonl")
    one, two = (state_of(checkpoints(x)[-1]) for x in (a, b))
    return found + [k for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)]


# ---------------------------------------------------------------- the world

def make_world(folder):
    """Flags of a small run: model, data and settings, all of it in `folder`."""
    shutil.copytree(DATA / "tiny_model", folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | SMALL))
    rows = {name: lines(DATA / f"tiny_{name}.jsonl")[:n] for name, n in (("train", 26), ("base", 22), ("test", 6))}
    for row, other in zip(rows["test"][::2], rows["train"]):       # some held-out rows bring a worse answer, the others get one made
        row["rejected"] = other["chosen"]
    rows["test"][2]["rejected"] = "Qzx! Vjk?"            # rare and short: less likely a token, more likely in all
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return ["--model", folder / "base", "--data", folder / "train.jsonl", "--sft-data", folder / "base.jsonl", "--eval-data", folder / "test.jsonl", *SETTINGS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run that nothing disturbed. Its folder is read only by agreement: copy it to change it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "printed").write_text(run(out, *world, "--keep", 9, hook=everything))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def tuned(world, base, *more):
    """Flags for a run on the weights that another run wrote: no SFT."""
    flags = [*world]
    for flag, value in (("--model", base), ("--sft-steps", 0)):
        flags[flags.index(flag) + 1] = value
    flags.remove("--from-scratch")
    return [*flags, *more]


# ---------------------------------------------------------------- what is written

FILES = {"config.json", "metrics.jsonl", "pairs.jsonl", "samples.jsonl", "results.json", "model", "ema", "checkpoint", "source"}


def test_a_run_leaves_its_files_and_nothing_else(whole):
    found = {p.name for p in whole.iterdir()}
    try:
        import matplotlib  # noqa: F401
        assert (whole / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    except ImportError:
        assert "curves.png" not in found
    assert found - {"curves.png"} == FILES
    for name in ("model", "ema"):
        assert {p.name for p in (whole / name).iterdir()} == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                                              "chat_template.jinja", "README.md"}
    assert [p.name for p in checkpoints(whole)] == [f"step-{n:08d}" for n in (2, 4, 6, 8, 10, 12)]


@pytest.mark.parametrize("backend", ["inline", "module://nowhere", "nonsense"])
def test_a_backend_that_a_notebook_has_set_does_not_keep_the_curves_from_being_drawn(whole, tmp_path, backend):
    pytest.importorskip("matplotlib")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    draw = "from pathlib import Path; from machine.curves import draw_curves; draw_curves(Path(__import__('sys').argv[1]))"
    done = subprocess.run([sys.executable, "-c", draw, str(tmp_path)], cwd=ROOT, env=os.environ | {"MPLBACKEND": backend}, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", done.stderr[-500:]


def test_a_screen_that_cannot_show_a_character_does_not_end_the_run(tmp_path):
    """The line of a pair holds an ellipsis and whatever the data hold."""
    command = [sys.executable, "train.py", "--sft-steps", "1", "--steps", "1", "--batch-size", "2", "--sft-batch-size", "2", "--eval-rows", "1",
               "--eval-tokens", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and "step 1/1" in done.stdout and "?" in done.stdout, done.stderr[-500:]


def test_curves_that_cannot_be_drawn_are_a_line_and_no_end(tmp_path, capsys):
    from machine.curves import draw_curves
    draw_curves(tmp_path)                                # there is no metrics.jsonl
    printed = capsys.readouterr().out
    assert printed.startswith("no curves.png: ") and printed.count("\n") == 1


def test_config_json_names_every_setting_and_every_version(whole):
    saved = json.loads((whole / "config.json").read_text())
    assert set(saved["settings"]) == {f.name for f in train.dataclasses.fields(Config)}
    assert saved["settings"]["max_length"] == 160 and saved["settings"]["steps"] == 8 == saved["steps"] and saved["preset"] == "paper-dpo"
    assert saved["versions"]["torch"] == torch.__version__.split("+")[0] or saved["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "numpy", "tokenizers", "safetensors"} <= set(saved["versions"]) and saved["eos_token_ids"] == [EOS]


def test_metrics_jsonl_has_one_line_a_step_under_the_usual_names(whole):
    rows = lines(whole / "metrics.jsonl")
    assert [(r.get("sft_step"), r.get("step"), "loss" in r) for r in rows] == (
        [(n, None, True) for n in (1, 2, 3, 4)] + [(None, n, kind) for n, kind in ((0, False), (1, True), (2, True), (3, True), (3, False), (4, True), (5, True),
                                                                                 (6, True), (6, False), (7, True), (8, True), (8, False))])
    names = {"step", "epoch", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "gen/eos_fraction", "pairs/identical", "buffer/size", "buffer/staleness", "buffer/uses", "time/generate", "time/train", "pairs/chosen_verified"}
    for row in rows:
        if "loss" in row and "step" in row:
            assert names <= set(row) and all(math.isfinite(v) for v in row.values())
            assert row["epoch"] == pytest.approx(row["step"] * 4 / 26) and ("ema/distance" in row) == (row["step"] % 3 == 0)
    assert [r["buffer/size"] for r in rows if "buffer/size" in r] == [4, 8, 12, 12, 12, 12, 12, 12]
    assert [r["learning_rate"] for r in rows if "loss" in r and "step" in r] == pytest.approx([3e-3 * x for x in (.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    for m in ("start", "policy", "ema"):
        assert {f"eval/{m}/{k}" for k in ("nll", "ranking_accuracy", "gap_change", "verifier/greedy", "verifier/sampled", "verifier/temperature_1")} <= set().union(*rows)


def test_an_epoch_is_a_pass_over_the_data_also_where_not_every_step_draws():
    seen, names = [], ("loss", "rewards/margins", "rewards/accuracies", "buffer/staleness")
    run = SimpleNamespace(cfg=SimpleNamespace(batch_size=4, generate_every=3, show_every=99), tokens={}, data=range(16),
                          log=SimpleNamespace(write=lambda _, row: seen.append(row["epoch"])))
    for number in range(2, 8):
        train.Run.after_step(run, number, dict.fromkeys(names, 0.0))
    assert seen == [0.25, 0.25, 0.5, 0.5, 0.5, 0.75]


def test_pairs_jsonl_shows_that_a_b_and_c_are_the_chosen_response(whole, world):
    data = lines(world[world.index("--data") + 1])
    pairs = lines(whole / "pairs.jsonl")
    assert [p["step"] for p in pairs] == [0, 2, 5]
    for p in pairs:
        assert p["A"] + p["B"] + p["C"] == data[p["row"]]["chosen"] + "<|end|>" and p["B'"] and p["B"]
        assert data[p["row"]]["prompt"] in p["prompt"]


def test_samples_are_the_same_prompts_before_and_after(whole, world):
    rows = lines(world[world.index("--eval-data") + 1])
    samples = lines(whole / "samples.jsonl")
    assert len(samples) == 2 and all(set(s) == {"prompt", "chosen", "start", "policy", "ema"} for s in samples)
    assert all(row["prompt"] in s["prompt"] and s["chosen"] == row["chosen"] for row, s in zip(rows, samples))
    model = load_pretrained(whole / "model")
    text = Text(companions(whole / "model"), whole / "model", model.config)
    for row, s in zip(rows, samples):
        prompt = text.encode([Row(row, "eval")])[0][0]
        assert text.decode(generate(model, [prompt], [6], (EOS,), temperature=0, vocab=text.vocab)[0], True) == s["policy"]


def test_one_seed_gives_one_run_and_another_seed_another(whole, world, tmp_path):
    run(tmp_path / "again", *world)
    run(tmp_path / "other", *world, "--seed", 7)
    assert not differences(whole, tmp_path / "again")
    one, other = ([row["loss"] for row in metrics(out) if "loss" in row] for out in (whole, tmp_path / "other"))
    assert len(one) == len(other) and [a for a, b in zip(one, other) if a == b] == ["0.69314718"]      # the first DPO loss


@pytest.mark.slow
def test_the_default_job_is_the_same_run_twice_and_says_what_it_did(tmp_path):
    """As a user types it, in fresh interpreters whose sets and dicts of strings are in another order."""
    short = "--sft-steps 3 --steps 4 --eval-every 2 --save-every 2 --eval-rows 6 --batch-size 8 --sft-batch-size 8 --samples 1 --eval-tokens 8 --device cpu".split()
    for name in ("a", "b"):
        done = subprocess.run([sys.executable, "train.py", "--out", tmp_path / name, *short], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": {"a": "1", "b": "2"}[name]})
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "eval: 6 rows" in done.stdout and "\neval  " in done.stdout and "before  " in done.stdout and "y-  " in done.stdout
    assert not differences(tmp_path / "a", tmp_path / "b")
    assert FILES <= {p.name for p in (tmp_path / "a").iterdir()}
    assert json.loads((tmp_path / "a/config.json").read_text())["preset"] == "tiny"


def test_a_runs_config_gives_the_same_run_again(whole, tmp_path):
    run(tmp_path / "again", "--config", whole / "config.json")
    assert not differences(whole, tmp_path / "again")
    assert "contradicts" not in run(tmp_path / "seed", "--config", whole / "config.json", "--seed", 7, "--steps", 1)
    assert json.loads((tmp_path / "seed/config.json").read_text())["settings"]["seed"] == 7


# ---------------------------------------------------------------- the written model

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_written_folder_is_a_model_for_transformers_in_the_sources_dtype(whole, world, tmp_path, dtype):
    transformers = oracle("transformers")
    base = tmp_path / "base"
    save_pretrained(load_pretrained(whole / "model"), base, dtype, companions(whole / "model"))
    run(tmp_path / "run", *tuned(world, base, "--steps", 2, "--save-dtype", "auto"))
    for name in ("model", "ema"):
        folder = tmp_path / "run" / name
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {dtype}
        theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), transformers.AutoTokenizer.from_pretrained(folder)
        assert transformers.AutoConfig.from_pretrained(folder).dtype == dtype
        ours, text = load_pretrained(folder), Text(companions(folder), folder, load_pretrained(folder).config)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Write a short story with Leo and a duck."}], add_generation_prompt=True)
        prompt = list(getattr(prompt, "input_ids", prompt))
        ids = torch.tensor([prompt + list(range(5, 40))])
        with torch.no_grad():
            assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)[0, len(prompt):].tolist()
        assert answer == generate(ours, [prompt], [30], (EOS,), temperature=0)[0]
        assert tokenizer.decode(answer, skip_special_tokens=True) == text.decode(answer, True)


# ---------------------------------------------------------------- evaluation

def gap_by_hand(model, pair):
    """(sum, mean) log-probs of y+ and y-: ((sum, mean), (sum, mean)), one text at a time, in the model's own dtype."""
    sides = []
    for answer in (pair.chosen, pair.rejected):
        with torch.no_grad():
            logits = model(torch.tensor([pair.prompt + answer])).logits[0]
        logps = [logits[t - 1].log_softmax(-1)[token].item() for t, token in enumerate(pair.prompt + answer) if t >= len(pair.prompt)]
        sides.append((math.fsum(logps), math.fsum(logps) / len(logps)))
    return sides


def test_evaluation_is_what_a_loop_over_transformers_logits_gives(whole, world, tmp_path):
    transformers = oracle("transformers")
    pairs = unpack(from_disk(checkpoints(whole)[-1], "rank-0")["eval_pairs"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    for pair, row in zip(pairs, lines(world[world.index("--eval-data") + 1]), strict=True):       # the right texts, by another's template and tokenizer
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == tokenizer.decode(pair.prompt + pair.chosen)
        assert "rejected" not in row or tokenizer.decode(pair.rejected, skip_special_tokens=True) == row["rejected"]
    shutil.copytree(whole / "model", tmp_path / "start")
    weights = load_file(checkpoints(whole)[1] / "policy.safetensors")                           # step 4: SFT is over
    save_file({k.removeprefix("policy."): v for k, v in weights.items()}, tmp_path / "start/model.safetensors", {"format": "pt"})
    folders = {"start": tmp_path / "start", "policy": whole / "model", "ema": whole / "ema"}
    models = {k: transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64, attn_implementation="eager") for k, f in folders.items()}
    sides = {k: [gap_by_hand(model, pair) for pair in pairs] for k, model in models.items()}
    found = {k: v for row in lines(whole / "metrics.jsonl") if row.get("step") in (0, 8) for k, v in row.items()}
    gaps = {k: [c[0] - r[0] for c, r in s] for k, s in sides.items()}
    for name, rows in sides.items():
        assert found[f"eval/{name}/nll"] == pytest.approx(-sum(c[0] for c, _ in rows) / sum(len(p.chosen) for p in pairs), rel=1e-5)
        assert found[f"eval/{name}/ranking_accuracy"] == pytest.approx(sum(c[1] > r[1] for c, r in rows) / len(pairs))
        assert found[f"eval/{name}/gap_change"] == pytest.approx(sum(g - s for g, s in zip(gaps[name], gaps["start"])) / len(pairs), abs=2e-4)
    assert {c[1] > r[1] for c, r in sides["policy"]} == {True, False} and any((c[1] > r[1]) != (c[0] > r[0]) for c, r in sides["policy"])
    assert found["eval/start/gap_change"] == 0.0 and abs(found["eval/policy/gap_change"]) > 0.01


def test_evaluating_changes_nothing_in_the_run(whole, world, tmp_path):
    for name, flags in (("never", ["--eval-every", 0]), ("always", ["--eval-every", 1]), ("less", ["--eval-rows", 3, "--samples", 0])):
        run(tmp_path / name, *world, *flags)
        assert (tmp_path / name / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
        steps = [row for row in metrics(tmp_path / name) if "loss" in row]
        assert steps == [row for row in metrics(whole) if "loss" in row]
    assert sum("eval/policy/nll" in row for row in lines(tmp_path / "always/metrics.jsonl")) == 8


# ---------------------------------------------------------------- stop and go on

STOPS = {"SFT": ("sft_step", 2), "the end of SFT": ("sft_step", 4), "generating held-out y-": ("eval_pairs", 1), "evaluating the start": ("machine.report.score", 2),
         "answering at the start": ("machine.report.generate", 3), "the first step": ("sapo_step", 1), "between two saves": ("sapo_step", 5),
         "evaluating at step 3": ("Evaluation.measure", 2), "evaluating the EMA at step 6": ("Evaluation.measure", 5), "saving": ("checkpoint.write_checkpoint", 4),
         "the last step": ("sapo_step", 8), "the last evaluation": ("Evaluation.measure", 6)}
QUICK = ("SFT", "the first step", "evaluating at step 3", "the last evaluation")


@pytest.mark.parametrize("where", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in STOPS])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(whole, world, tmp_path, where):
    out = tmp_path / "run"
    printed = run(out, *world, hook=stop_at(*STOPS[where]))
    assert f"go on with: python train.py --resume {out}" in printed and not (out / "model").exists()
    resume(out)
    assert not differences(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--loss", "orpo"], ["--lora", 2], ["--loss", "orpo", "--lora", 2], ["--replay", "inverse-count", "--optimizer", "rmsprop"],
                                  ["--rejected", "data"], ["--loss", "slic", "--dtype", "bfloat16"]], ids=lambda m: " ".join(map(str, m)))
def test_so_does_every_other_kind_of_run(whole, world, tmp_path, more):
    flags = tuned(world, whole / "model", *more, "--generate-ahead", 1 + len(more))
    if "data" in more:
        flags[flags.index("--data") + 1] = flags[flags.index("--sft-data") + 1] = DATA / "tiny_train.jsonl"
    run(tmp_path / "whole", *flags)
    run(tmp_path / "run", *flags, hook=stop_at("sapo_step", 3))
    resume(tmp_path / "run", hook=stop_at("Evaluation.measure", 3))
    resume(tmp_path / "run")
    assert not differences(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_that_is_resumed_ends_the_same(whole, copy):
    resume(copy)
    assert not differences(whole, copy)
    assert {p.name for p in copy.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("left", [["model"], ["model", "ema"], ["model", "ema", "samples.jsonl"]], ids=" ".join)
def test_so_does_one_that_died_while_it_wrote_its_models(whole, copy, left):
    for name in {"model", "ema", "samples.jsonl", "results.json", "curves.png"} - set(left):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink(missing_ok=True)
    for name in (".model.4711.tmp", ".ema.4711.old", "checkpoint/.step-00000012.tmp"):      # and what it was writing then
        (copy / name).mkdir()
        (copy / name / "model.safetensors").write_bytes(b"half")
    resume(copy)
    assert not differences(whole, copy) and not list(copy.glob("**/.*"))


def test_more_steps_may_be_asked_of_a_finished_run(whole, copy):
    resume(copy, "--steps", 10)
    steps = [r["step"] for r in lines(copy / "metrics.jsonl") if "loss" in r and "step" in r]
    assert steps == list(range(1, 11)) and metrics(copy)[:4] == metrics(whole)[:4]
    assert json.loads((checkpoints(copy)[-1] / "shared.json").read_text())["step"] == 10


def test_fewer_steps_than_are_done_are_refused(copy):
    assert "error: --steps 5: this run has done 8 already" in resume(copy, "--steps", 5, code=2)


def test_steps_0_only_evaluates_and_the_run_can_be_trained_later(whole, world, tmp_path):
    run(tmp_path / "run", *world, "--steps", 0)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/ema").exists()
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in rows if "step" in r] == [0] and "eval/start/nll" in rows[-1]
    assert set(json.loads((tmp_path / "run/results.json").read_text())) == {"start"}
    resume(tmp_path / "run", "--steps", 8)
    assert not differences(whole, tmp_path / "run")


def test_a_run_out_of_time_saves_and_goes_on_later(whole, world, tmp_path):
    printed = run(tmp_path / "run", *world, "--max-minutes", 1e-6)
    assert "stopped after SFT step 1 and saved; go on with: python train.py --resume" in printed
    resume(tmp_path / "run", "--max-minutes", 0)
    assert not differences(whole, tmp_path / "run")


@pytest.mark.parametrize("flags, words", [
    (["--seed", 7], "--seed 7 contradicts the saved run, which has 42"), (["--lr", 1e-3], "--lr 0.001 contradicts"), (["--loss", "orpo"], "--loss orpo contradicts"),
    (["--preset", "tiny"], "--resume and --preset: each brings all settings"), (["--lora", 2], "--lora 2 contradicts"), (["--save-every", "x"], "--save-every")])
def test_what_contradicts_the_saved_run_is_refused(copy, flags, words):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    printed = resume(copy, *flags, code=2)
    assert words in printed and printed.count("\n") == 1
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def test_what_may_change_may_change(whole, world, tmp_path):
    run(tmp_path / "run", *world, hook=stop_at("sapo_step", 5))
    resume(tmp_path / "run", "--save-every", 1, "--keep", 3, "--show-every", 5, "--generate-ahead", 1, "--max-bad-steps", 2)
    assert [p.name for p in checkpoints(tmp_path / "run")] == [f"step-{n:08d}" for n in (10, 11, 12)]
    assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.parametrize("flag", ["--data", "--sft-data", "--eval-data"])
def test_other_data_are_refused_on_resume(world, tmp_path, flag):
    for name in ("train", "base", "test"):
        shutil.copy(world[1].with_name(f"{name}.jsonl"), tmp_path)
    flags = [tmp_path / f.name if isinstance(f, Path) and f.suffix == ".jsonl" else f for f in world]
    run(tmp_path / "run", *flags, hook=stop_at("sapo_step", 1))
    path = flags[flags.index(flag) + 1]
    rows = lines(path)
    if flag == "--eval-data":                            # the texts stay, only what the verifier asks changes
        rows[1]["verifier"]["must"] = ["platypus"]
    else:
        rows[3]["chosen"] = rows[4]["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert "put the same files back" in resume(tmp_path / "run", code=2)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_another_base_under_an_adapter_is_refused_on_resume(whole, world, tmp_path):
    base = shutil.copytree(whole / "model", tmp_path / "base")
    run(tmp_path / "run", *tuned(world, base, "--lora", 2), hook=stop_at("sapo_step", 2))
    save_pretrained(randomise(load_pretrained(base), 5), base, torch.float32)
    shutil.copytree(whole / "model", base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    assert f"error: {base}: not what it was when the checkpoint was written" in resume(tmp_path / "run", code=2)


def test_a_run_that_another_process_is_writing_is_left_alone(world, copy):
    fcntl = pytest.importorskip("fcntl")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with open(copy / "config.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process writes this run" in resume(copy, code=2)
        assert "another process writes this run" in run(copy, *world, "--overwrite", code=2)
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    resume(copy)


def test_the_line_that_says_how_to_go_on_has_what_was_changed(world, tmp_path):
    run(tmp_path / "run", *world, hook=stop_at("sapo_step", 1))
    printed = resume(tmp_path / "run", "--steps", 10, hook=stop_at("sapo_step", 1))
    assert f"go on with: python train.py --resume {tmp_path / 'run'} --steps 10\n" in printed


# ---------------------------------------------------------------- the run folder's name

def test_an_existing_run_folder_is_refused_and_replaced_only_on_demand(whole, world, copy):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert f"--out {copy} exists" in run(copy, *world, code=2)
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    run(copy, *world, "--steps", 3, "--overwrite")
    assert [r["step"] for r in lines(copy / "metrics.jsonl") if "loss" in r and "step" in r] == [1, 2, 3]
    assert [p.name for p in copy.parent.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_is_no_run_is_never_replaced(world, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("six years")
    assert "is not a run folder; it is not replaced even with --overwrite" in run(tmp_path / "thesis", *world, "--overwrite", code=2)
    assert (tmp_path / "thesis/chapter.txt").read_text() == "six years"


def test_a_run_that_died_before_its_first_checkpoint_begins_again(whole, world, tmp_path):
    process = start([*world, "--out", tmp_path / "run"], tmp_path / "log", stop_at("sft_step", 2, signal.SIGKILL))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(lines(tmp_path / "run/metrics.jsonl")) == 1
    resume(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")


@pytest.mark.parametrize("seconds, said", [((0.001, 0.4), "bfloat16 takes this CPU 400 times as long; --dtype float32 is faster"), ((0.001, 0.0015), "")])
def test_a_cpu_without_the_instructions_for_bfloat16_is_told_by_a_product(monkeypatch, seconds, said):
    times = iter(seconds)
    monkeypatch.setattr(parallel.timeit, "repeat", lambda product, **how: [next(times)] * 3 if product().shape == (256, 256) else None)
    note = "".join(parallel.slow_dtype(torch.bfloat16, torch.device("cpu")))
    assert said in note and bool(note) == bool(said)


def test_a_run_in_float32_says_nothing_of_bfloat16():
    assert not parallel.slow_dtype(torch.float32, torch.device("cpu"))


def test_a_resumed_optimizer_has_its_moments_for_itself(tmp_path):
    """Not as pages of the checkpoint's file, which goes when it is old."""
    model = small_model()
    optimizers = [torch.optim.AdamW(model.parameters()) for _ in range(2)]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    to_disk(named_moments(model, optimizers[0]), "optimizer", tmp_path)
    load_optimizer(tmp_path, model, optimizers[1])
    path = tmp_path / "optimizer.safetensors"
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    saved, loaded = (named_moments(model, optimizer) for optimizer in optimizers)
    assert all(torch.equal(loaded[name][moment], value) for name, moments in saved.items() for moment, value in moments.items())


def test_large_tensors_come_in_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the kernel does not let a process ask for huge pages")
    program = "import machine, resource, torch; torch.zeros(2**25).fill_(1); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    plain, faults = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}, []
    for environment in (plain, plain | {"THP_MEM_ALLOC_ENABLE": "0"}):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        faults.append(int(done.stdout))
    assert faults[1] - faults[0] > 2**27 / 4096 / 2, "half of the pages of one tensor, at least"
