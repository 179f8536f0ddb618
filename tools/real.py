"""SAPO and its relatives on a real checkpoint: the study's arms, one seed, few steps, on data you bring.

    python tools/real.py --model DIR --data TRAIN.jsonl --eval-data EVAL.jsonl [--steps 30] [--arms "SFT,SAPO-DPO"]

Every arm is `python train.py` with COMMON and its own flags of the table, on the same prompts for the same steps at the same
learning rate, one process on one thread each, --jobs at a time; an arm that is in --out already is not run again, so take
another --out for other settings. In fewer steps than an epoch, "every epoch" is never. Then all models, as saved, are
measured alike, computing in float32, on the held-out rows. Prints Markdown: held-out NLL a token; the share of rows on which y+ has
the higher mean log-prob than the data's `rejected`, where there is one, and than the starting model's own greedy answer;
the length of greedy answers in tokens; some of them side by side. Left out: seeds, intervals and tuning, which
tools/study.py has; so a difference here is one observation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import study
from buffer import Pair
from machine.dataset import Data, Text, read_rows
from machine.flags import parse
from machine.folders import companions, load_pretrained
from machine.parallel import World
from machine.report import Held, evaluate, one_line
from model import generate

BATCH = 8
ARMS = {        # arm: its flags beside COMMON, the study's with a buffer of one batch of this size; SAPO's segment is half the answer
    **{arm: study.RELATIVES[arm].replace(f"--buffer-size {study.BATCH}", f"--buffer-size {BATCH}") for arm in ("SFT", "offline DPO", "offline ORPO", "SPIN")},
    **{arm: f"{study.RELATIVES[arm]} --segment 50% --buffer-size 64".strip() for arm in ("SAPO-DPO", "SAPO-ORPO")}}
COMMON = (f"--device cpu --batch-size {BATCH} --micro-batch 4 --optimizer adamw --lr-scheduler linear --warmup 10% --eval-every 0 --save-every 0 --keep 1 "
          "--eval-rows 1 --samples 0")


def own_flags(arm, paired):
    """Where the data have no `rejected`, SFT writes segments that lambda 0 then ignores."""
    return ARMS[arm] if paired or arm != "SFT" else ARMS[arm].replace("--rejected data", "--segment 50%")


def flags_of(arm, args, paired):
    return [*COMMON.split(), "--model", args.model, "--data", args.data, "--eval-data", args.eval_data, "--steps", str(args.steps), "--lr", f"{args.lr:g}",
            "--max-length", str(args.max_length), "--dtype", args.dtype, "--seed", str(args.seed), *own_flags(arm, paired).split()]


def run(arm, out, flags):
    """One run, unless its model is there; returns its seconds."""
    folder, seconds = out / arm.replace(" ", "-"), out / f"{arm.replace(' ', '-')}.seconds"
    if not (folder / "model").is_dir():
        began = time.monotonic()
        with open(folder.with_name(folder.name + ".log"), "w", encoding="utf-8") as log:
            code = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--out", str(folder), "--overwrite"], stdout=log,
                                  stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"real: {arm} ended with code {code}; see {folder}.log")
        seconds.write_text(f"{time.monotonic() - began:.0f}")
    print(f"{arm}: done, {seconds.read_text()} s", file=sys.stderr, flush=True)
    return int(seconds.read_text())


def answers(model, data, text, tokens):
    """A greedy answer of at most so many tokens to each prompt, in ids."""
    ids = []
    for i in range(0, len(data), 32):
        part = [data[j].prompt for j in range(i, min(i + 32, len(data)))]
        ids += generate(model, part, [tokens] * len(part), text.eos, temperature=0, vocab=text.vocab)
    return ids


def measure(folder, args, own):
    """({metric: value}, answers in ids, own); own: the starting model's answers, or None while that is what is measured."""
    model = load_pretrained(folder)
    text = Text(companions(folder), folder, model.config)
    cfg = parse(["--model", args.model, "--data", args.data, "--max-length", str(args.max_length), "--max-prompt-length", str(args.max_length * 7 // 8)])[0]
    data = Data(read_rows(args.eval_data)[:args.rows], text, cfg, "held out")
    examples, written = [data[i] for i in range(len(data))], answers(model, data, text, args.tokens)
    own = own or written
    pairs = [Pair(e.prompt, e.chosen, answer) for e, answer in zip(examples, own)]
    paired = [Pair(e.prompt, e.chosen, e.rejected) for e in examples if e.rejected]
    found = evaluate(model, Held(data, pairs, []), None, cfg, World("cpu"), text, nullcontext, lambda: None)
    row = {"NLL": f"{found['nll']:.3f}", "ahead of the data's": f"{study.ahead(model, paired):.2f}" if paired else "-",
           "ahead of the start's own": f"{found['accuracy']:.2f}", "tokens": f"{statistics.mean(map(len, written)):.1f}"}
    return row, [text.decode(ids, True) for ids in written], own


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--out", default="runs/real")
    parser.add_argument("--arms", help=f"comma-separated; default all that the data allow: {','.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    paired = all(row.rejected for row in read_rows(args.data))
    arms = args.arms.split(",") if args.arms else [arm for arm in ARMS if paired or not arm.startswith("offline")]
    if set(arms) - set(ARMS):
        parser.error(f"--arms: choose from {', '.join(ARMS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        seconds = dict(zip(arms, pool.map(lambda arm: run(arm, out, flags_of(arm, args, paired)), arms)))
    rows, texts, own = {}, {}, None
    for arm in ("start", *arms):
        rows[arm], texts[arm], own = measure(args.model if arm == "start" else out / arm.replace(" ", "-") / "model", args, own)
    print(study.markdown(["arm", "flags", *rows["start"], "seconds"],
                         [[arm, f"`{own_flags(arm, paired)}`" if arm in ARMS else "", *row.values(), seconds.get(arm, "")] for arm, row in rows.items()]))
    for i, row in enumerate(read_rows(args.eval_data)[:args.samples]):
        shown = {"prompt": row.turns if isinstance(row.turns, str) else row.turns[-1]["content"], "y+": row.chosen, **{arm: texts[arm][i] for arm in texts}}
        print("\n" + "\n".join(f"{name:<13} {one_line(text, 150)}" for name, text in shown.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
