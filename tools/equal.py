"""Does this checkout compute what another revision computed? Six kinds of run in both, compared number by number.

    python tools/equal.py REVISION              run and compare; the exit code says whether all are equal
    python tools/equal.py REVISION --moved      code has only moved: go on with the other's run folder here as well

Compared are metrics.jsonl without its times, pairs.jsonl, samples.jsonl, results.json and every tensor of model/ and
ema/, of a run alone, one with ORPO, one that goes on where another stopped, two processes with DDP and with --shard, and adapters.
Where a name has changed between the two, RENAMED says so; numbers must be the same to the last digit.
One thread a process, since sums over more threads differ in the last digit. Two to four minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--preset", "tiny", "--sft-steps", "30", "--steps", "5", "--eval-rows", "12", "--eval-tokens", "16",
         "--eval-every", "2", "--show-every", "2", "--batch-size", "8", "--sft-batch-size", "8", "--micro-batch", "3",
         "--buffer-size", "24", "--save-every", "5", "--lr", "1e-3"]
RENAMED = {                 # key of a JSON file there -> its name here
    "buffer/age": "buffer/staleness", "pairs/chosen_judge": "pairs/chosen_verified",
    "pairs/rejected_judge": "pairs/rejected_verified"}
MEASURES = {"accuracy": "ranking_accuracy", "margin": "gap_change", "judge, greedy": "verifier/greedy",
            "judge, sampled": "verifier/sampled", "judge, temperature 1": "verifier/temperature_1"}
RENAMED |= MEASURES | {f"eval/{m}/{old}": f"eval/{m}/{new}" for m in ("start", "policy", "ema") for old, new in MEASURES.items()}


def python(tree, *arguments, processes=1):
    """Run a program of a tree, under torchrun where there are to be several processes."""
    command = [sys.executable] + ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] * (processes > 1)
    done = subprocess.run([*command, *map(str, arguments)], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(map(str, arguments))} ended with {done.returncode}\n{done.stdout[-3000:]}")


def runs(tree, out, base):
    """Make every kind of run of a tree below `out`; `base` is the model that adapters stand on."""
    python(tree, "train.py", *SHORT, "--out", out / "alone")
    python(tree, "train.py", *SHORT, "--steps", "3", "--save-every", "3", "--out", out / "resumed")
    python(tree, "train.py", "--resume", out / "resumed", "--steps", "7")
    python(tree, "train.py", *SHORT, "--loss", "orpo", "--segment", "30%", "--replay", "inverse-count", "--out", out / "orpo")
    for kind, more in (("ddp", []), ("shard", ["--shard"])):
        python(tree, "train.py", *SHORT, *more, "--out", out / kind, processes=2)
    python(tree, "train.py", *SHORT, "--model", base, "--no-from-scratch", "--lora", "4", "--out", out / "lora")


def named(value):
    """A JSON value under today's names, without times."""
    if isinstance(value, list):
        return [named(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {RENAMED.get(k, k): named(v) for k, v in value.items() if not k.startswith("time/") and "per_second" not in k}


def content(run):
    """{name: value} of everything that is compared in a run folder."""
    found = {}
    for name in ("metrics.jsonl", "pairs.jsonl", "samples.jsonl"):
        lines = (run / name).read_text("utf-8").splitlines()
        found |= {f"{name} line {i}": named(json.loads(line)) for i, line in enumerate(lines, 1)}
    found["results.json"] = named(json.loads((run / "results.json").read_text("utf-8")))
    for model in ("model", "ema"):
        for path in sorted((run / model).glob("*.safetensors")):
            found |= {f"{model} {k}": v for k, v in load_file(path).items()}
    return found


def same(a, b):
    return a.equal(b) if hasattr(a, "equal") and hasattr(b, "equal") else json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def compare(kind, there, here):
    """Print one line for a kind of run, and the first difference; True if there is none."""
    before, now = content(there), content(here)
    differ = [k for k in sorted(before.keys() | now.keys()) if k not in before or k not in now or not same(before[k], now[k])]
    print(f"{kind:24} {len(now):4} things  {'equal' if not differ else f'{len(differ)} DIFFER, first {differ[0]}'}")
    if differ:
        print(f"    there  {str(before.get(differ[0]))[:600]}\n    here   {str(now.get(differ[0]))[:600]}")
    return not differ


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("revision")
    parser.add_argument("--moved", action="store_true", help="the other's run folders must be readable here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="equal-") as temporary:
        work = Path(temporary)
        other = work / "other"
        other.mkdir()
        archive = subprocess.run(["git", "archive", given.revision], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", other], input=archive, check=True)
        python(other, "train.py", *SHORT, "--sft-steps", "60", "--steps", "1", "--lr", "0", "--out", work / "base")
        for tree, out in ((other, work / "there"), (ROOT, work / "here")):
            runs(tree, out, work / "base/model")
        good = [compare(run.name, run, work / "here" / run.name) for run in sorted((work / "there").iterdir())]
        if given.moved:
            python(other, "train.py", *SHORT, "--steps", "3", "--save-every", "3", "--out", work / "old")
            python(ROOT, "train.py", "--resume", work / "old", "--steps", "7")
            good.append(compare("their folder, resumed", work / "there/resumed", work / "old"))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
