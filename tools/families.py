"""Every family of checkpoints against transformers, and SAPO on every family.

    python tools/families.py [DIR ...]               one table: how far logits differ, for folders read and for folders written;
                                                     and for real checkpoints DIR, whether greedy text is the same too
    python tools/families.py steps                   three steps of SAPO through train.main on a tiny random model of each family
    python tools/families.py lora DIR                trained parameters and peak memory of one step, LoRA against all weights

Everything is measured when it is asked for. A family here is a row of tests/test_model.py's FAMILIES under its public name;
what differs between the members (biases, norms, ties, head size, window, rope) is what that row sets, far from defaults.
SAPO_TOKENIZERS names a folder with real tokenizers (subfolders llama2, llama3_1, smollm2, mistral, qwen3, gemma3, each with
tokenizer.json and tokenizer_config.json, as tests/test_templates.py has them); a family whose tokenizer is not there takes
the tiny world's.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tokenizers
import torch
from test_model import FAMILIES, edit, load_theirs, read, stored, transformers_4

import train
from conftest import NUMBERS, oracle, random_texts, small_hf_model
from machine import folders
from machine.rows import Row
from machine.text import Text
from machine.flags import DATA, parse
from machine.folders import companions, load_pretrained, save_pretrained
from machine.parallel import World, starting_model
from model import generate
from sapo import sapo_step

NAMED = {       # public name: (row of FAMILIES, folder of its tokenizer)
    "Llama 2": ("llama, a key-value head for each query head", "llama2"), "Llama 3": ("llama, head_dim null", "llama3_1"),
    "Llama 3.1": ("llama, llama3 rope beyond its length", "llama3_1"), "Llama 3.2": ("llama, llama3 rope beyond its length, tied", "llama3_1"),
    "SmolLM2": ("llama, tied", "smollm2"), "Mistral v0.1": ("mistral, beyond its window", "mistral"),
    "Mistral v0.2, v0.3": ("mistral, no window, head_dim null", "mistral"), "Mistral Nemo": ("mistral, no window", "mistral"),
    "Qwen2": ("qwen2", "qwen3"), "Qwen2.5, tied": ("qwen2, tied", "qwen3"), "Qwen3": ("qwen3", "qwen3"), "Qwen3, tied": ("qwen3, tied", "qwen3"),
    "Qwen2.5 with yarn": ("qwen2, yarn rope", "qwen3"), "SmolLM3": ("smollm3", "smollm2"), "Gemma 3": ("gemma3_text", "gemma3")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUND = 1e-4


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# ------------------------------------------------------------------------------------------------ logits

@torch.no_grad()
def gap(ours, theirs, ids):
    """The largest difference of logits anywhere."""
    a, b = ours(ids), theirs(ids).logits
    assert b.std() > 0.5, "logits near 0 agree with anything"
    return (a - b).abs().max().item()


def differences(name, dialect, shards, dtype, folder):
    """(max logit difference of a folder that transformers wrote, of the folder that we then write), both against transformers.

    dialect: 5 or 4, the version of transformers whose config.json it is. shards: in several files, here and when written.
    """
    family, numbers = FAMILIES[NAMED[name][0]]
    theirs, ids = small_hf_model(family, **numbers), torch.tensor(random_texts([90, 90]))
    for p in theirs.parameters():
        p.data = p.data.to(dtype).float()                # not .to(dtype) on the whole model: that would round its rotary frequencies as well
    copy.deepcopy(theirs).to(dtype).save_pretrained(folder / "theirs", **({"max_shard_size": "5KB"} if shards else {}))
    assert (len(list((folder / "theirs").glob("*.safetensors"))) > 2) == shards
    if dialect == 4:
        edit(folder / "theirs", **transformers_4(read(folder / "theirs"), "type") | {"torch_dtype": str(dtype).removeprefix("torch.")})
    ours, before = load_pretrained(folder / "theirs"), folders.SHARD_BYTES
    folders.SHARD_BYTES = 9000 if shards else before
    save_pretrained(ours, folder / "ours", dtype)
    folders.SHARD_BYTES = before
    assert (len(list((folder / "ours").glob("*.safetensors"))) > 2) == shards and stored(folder / "ours") == {dtype}
    return gap(ours, theirs, ids), gap(ours, load_theirs(folder / "ours"), ids)


def table():
    """Prints the table; returns the largest number in it."""
    oracle("transformers")
    print("Largest difference of logits to transformers' on 2 x 90 random tokens; each number is the larger one of a single file and of shards.\n")
    print_row("family", "head", *(f"config of {d}.x, {t}" for d in (5, 4) for t in DTYPES), "written back, worst of all")
    print_row(*["---"] * 9)
    worst = 0.0
    for name in NAMED:
        read_, written = {}, 0.0
        for dialect in (5, 4):
            for kind, dtype in DTYPES.items():
                for shards in (False, True):
                    with tempfile.TemporaryDirectory() as folder:
                        a, b = differences(name, dialect, shards, dtype, Path(folder))
                    read_[dialect, kind] = max(a, read_.get((dialect, kind), 0.0))
                    written = max(b, written)
        tied = FAMILIES[NAMED[name][0]][1].get("tie_word_embeddings")
        print_row(name, "tied" if tied else "own", *(f"{x:.0e}" for x in read_.values()), f"{written:.0e}")
        worst = max(worst, written, *read_.values())
    return worst


def real(folder):
    """One row about a real checkpoint; returns its largest difference, or infinity if greedy text differs."""
    ours, theirs = load_pretrained(folder), load_theirs(folder)
    tokenizer = tokenizers.Tokenizer.from_str((Path(folder) / "tokenizer.json").read_text("utf-8"))
    length = min(400, ours.config.max_position_embeddings)
    difference = gap(ours, theirs, torch.tensor(random_texts([length, length], ours.config.vocab_size)))
    prompt = tokenizer.encode("Once upon a time, there was").ids
    (text,) = generate(ours, [prompt], [60], temperature=0)
    full = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    same = text == full[0, len(prompt):].tolist()
    print_row(Path(folder).name, f"{sum(p.numel() for p in ours.parameters()):,}", f"{difference:.0e}", "the same" if same else "DIFFERENT",
              " ".join(tokenizer.decode(text).split())[:90])
    return difference if same else float("inf")


# ------------------------------------------------------------------------------------------------ a few steps

def tokenizer_files(name):
    """({file name: bytes}, what it is) of a family's tokenizer, or of the tiny world's."""
    folder = Path(os.environ.get("SAPO_TOKENIZERS", "nowhere")) / name
    return (companions(folder), name) if (folder / "tokenizer.json").exists() else (companions(DATA / "tiny_model"), "tiny")


def a_checkpoint(name, folder):
    """A folder as from the hub: random weights of a family, with a tokenizer and chat template. Returns which."""
    (family, numbers), (files, which) = FAMILIES[NAMED[name][0]], tokenizer_files(NAMED[name][1])
    size = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size()
    ends = json.loads(files.get("generation_config.json", b"{}")).get("eos_token_id")
    theirs = small_hf_model(family, **NUMBERS | numbers | dict(vocab_size=size + 3, max_position_embeddings=320, eos_token_id=ends))
    theirs.save_pretrained(folder)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return which


def three_steps(name, folder):
    """SAPO on a tiny random model: (tokenizer, losses of the three steps, gap between the written model here and in transformers)."""
    which = a_checkpoint(name, folder / "model")
    flags = ("--device cpu --steps 3 --batch-size 4 --micro-batch 2 --segment 6 --buffer-size 8 --lr 1e-3 --optimizer adamw --eval-rows 2 --eval-tokens 4 "
             "--samples 1 --max-length 320").split()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        exit_code = train.main(["--model", str(folder / "model"), "--data", str(DATA / "tiny_validation.jsonl"),
                                "--out", str(folder / "run"), *flags])
    assert exit_code == 0, printed.getvalue()[-2000:]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    ours, theirs = load_pretrained(folder / "run/model"), load_theirs(folder / "run/model")
    tokenizer = oracle("transformers").AutoTokenizer.from_pretrained(folder / "run/model")
    ask, text = "Where is Ada?", Text(companions(folder / "model"), folder / "model", ours.config)
    turns = [{"role": "user", "content": ask}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True) if text.template else tokenizer(ask)
    assert text.encode([Row({"prompt": ask, "chosen": "There."}, "")])[0][0] == expected["input_ids"]
    difference = gap(ours, theirs, torch.tensor(random_texts([90, 90], ours.config.vocab_size)))
    return which + ("" if text.template else ", no chat template"), [r["loss"] for r in rows if "loss" in r], difference


def steps():
    oracle("transformers")
    print_row("family", "tokenizer", "first DPO loss", "third", "written model, logits to transformers'")
    print_row(*["---"] * 5)
    worst = 0.0
    for name in NAMED:
        with tempfile.TemporaryDirectory() as folder:
            which, losses, difference = three_steps(name, Path(folder))
        print_row(name, which, f"{losses[0]:.6f}", f"{losses[-1]:.4f}", f"{difference:.0e}")
        worst = max(worst, difference, abs(losses[0] - 0.693147) * 100)
    return worst


# ------------------------------------------------------------------------------------------------ LoRA's memory

def one_step(folder, rank, loss, dtype):
    """What a child process does: one step as train.py takes it; prints (trained parameters, the base's, bytes above the libraries)."""
    now = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        flags = "--device cpu --optimizer adamw --batch-size 4 --micro-batch 2 --segment 16".split()
        command = parse(["--model", folder, "--data", str(DATA / "tiny_train.jsonl"), "--out", f"{out}/run",
                         "--lora", str(rank), "--loss", loss, "--dtype", dtype, *flags])
        world = World(None)
        world.place("cpu")
        run = train.Run(command, world)
        before = now("VmHWM")                            # interpreter, libraries, tokenised rows
        run.model = starting_model(run.cfg, run.inputs.config, run.inputs.base, world, run.half)
        run.begin_sapo()
        assert torch.isfinite(torch.tensor(sapo_step(run.state, run.draw, run.cfg, run.autocast)["grad_norm"]))
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    base = sum(p.numel() for name, p in run.model.named_parameters() if "lora_" not in name)
    print(json.dumps([trained, base, now("VmHWM") - before]))


def lora(folder):
    print("Peak memory of one step of 4 pairs (micro-batch 2, AdamW, CPU) above the interpreter with its libraries and data; LoRA on all seven projections.\n")
    print_row("loss", "autocast", "trained", "trained parameters", "peak memory", "per parameter of the model")
    print_row(*["---"] * 6)
    for loss in ("dpo", "orpo"):
        for dtype in ("float32", "bfloat16"):
            for rank in (0, 16):
                child = subprocess.run([sys.executable, __file__, "one-step", folder, str(rank), loss, dtype], capture_output=True, text=True)
                assert child.returncode == 0, child.stderr[-3000:]
                trained, size, peak = json.loads(child.stdout.splitlines()[-1])
                print_row(loss, dtype, f"LoRA, rank {rank}" if rank else "all weights", f"{trained:,}", f"{peak / 1e9:.2f} GB", f"{peak / size:.1f} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="steps, lora DIR, or folders of real checkpoints")
    what = parser.parse_args().what
    if what[:1] == ["one-step"]:
        return one_step(what[1], int(what[2]), *what[3:])
    if what[:1] == ["lora"]:
        return lora(*what[1:])
    if what == ["steps"]:
        worst = steps()
    else:
        worst = table()
        if what:
            print("\nReal checkpoints, 2 x at most 400 random tokens, and 60 greedy tokens after \"Once upon a time, there was\".\n")
            print_row("checkpoint", "parameters", "logits", "greedy text", "which is")
            print_row(*["---"] * 5)
            worst = max(worst, *map(real, what))
    sys.exit(worst > BOUND)


if __name__ == "__main__":
    main()
