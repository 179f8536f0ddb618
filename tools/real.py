"""SAPO and its relatives on a real checkpoint: the study's variants, one seed, few steps, on data you bring.

    python tools/real.py --model DIR --data TRAIN.jsonl --eval-data EVAL.jsonl [--steps 30] [--variants "SFT,SAPO-DPO"]

Every variant is `python train.py` with COMMON and its own flags of the table, on the same prompts for the same steps at
the same learning rate, one process on one thread each, --jobs at a time; a variant that is in --out already is not run
again, so take another --out for other settings. In fewer steps than an epoch, "every epoch" is never. Then all models,
as saved, are measured alike, computing in float32, on the rows of --eval-data. It prints Markdown: NLL a token; the
share of rows on which y+ has the higher mean log-prob than the data's `rejected`, where there is one, and than the
starting model's own greedy answer; the length of greedy answers in tokens; some of them side by side. Left out: seeds,
intervals and tuning, which tools/study.py has; so a difference here is one observation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import measure
import study
from buffer import Pair
from machine.dataset import Data
from machine.rows import read_rows
from machine.text import Text
from machine.flags import parse
from machine.folders import companions, load_pretrained
from machine.report import one_line
from model import generate

BATCH = 8


def with_batches(name):
    """A relative's flags, a buffer of one batch being one of this size."""
    return study.RELATIVES[name][0].replace(f"--buffer-size {study.BATCH}", f"--buffer-size {BATCH}")


VARIANTS = {    # variant: its flags beside COMMON; SAPO's segment is half the answer
    **{name: with_batches(name) for name in ("SFT", "offline DPO", "offline ORPO", "SPIN")},
    **{name: f"{study.RELATIVES[name][0]} --segment 50% --buffer-size 64".strip() for name in ("SAPO-DPO", "SAPO-ORPO")}}
COMMON = (f"--device cpu --batch-size {BATCH} --micro-batch 4 --optimizer adamw --lr-scheduler linear --warmup 10% "
          "--eval-every 0 --save-every 0 --keep 1 --eval-rows 1 --samples 0")


def own_flags(variant, paired):
    """Where the data have no `rejected`, SFT generates segments that lambda 0 then ignores."""
    flags = VARIANTS[variant]
    return flags if paired or variant != "SFT" else flags.replace("--rejected data", "--segment 50%")


def flags_of(variant, args, paired):
    return [*COMMON.split(), "--model", args.model, "--data", args.data, "--eval-data", args.eval_data,
            "--steps", str(args.steps), "--lr", f"{args.lr:g}", "--max-length", str(args.max_length),
            "--dtype", args.dtype, "--seed", str(args.seed), *own_flags(variant, paired).split()]


def folder_of(variant, out):
    return out / variant.replace(" ", "-")


def run(variant, out, flags):
    """One run, unless its model is there; returns its seconds."""
    folder = folder_of(variant, out)
    log, seconds = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.seconds")
    if not (folder / "model").is_dir():
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(folder), "--overwrite"]
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"real: {variant} ended with code {code}; see {log}")
        seconds.write_text(f"{time.monotonic() - began:.0f}")
    print(f"{variant}: done, {seconds.read_text()} s", file=sys.stderr, flush=True)
    return int(seconds.read_text())


def answers(model, data, text, tokens):
    """A greedy answer of at most so many tokens to each prompt, in ids."""
    ids = []
    for i in range(0, len(data), 32):
        part = [data[j].prompt for j in range(i, min(i + 32, len(data)))]
        ids += generate(model, part, [tokens] * len(part), text.eos, temperature=0, vocab=text.vocab)
    return ids


def measured(folder, args, own):
    """({metric: value}, answers as text, own); own: the starting model's answers in ids, or None while that is what is
    measured."""
    model = load_pretrained(folder)
    text = Text(companions(folder), folder, model.config)
    cfg = parse(["--model", args.model, "--data", args.data, "--max-length", str(args.max_length),
                 "--max-prompt-length", str(args.max_length * 7 // 8)]).cfg
    data = Data(read_rows(args.eval_data)[:args.rows], text, cfg, "eval")
    examples, generated = [data[i] for i in range(len(data))], answers(model, data, text, args.tokens)
    own = own or generated
    pairs = [Pair(e.prompt, e.chosen, answer) for e, answer in zip(examples, own)]
    paired = [Pair(e.prompt, e.chosen, e.rejected) for e in examples if e.rejected]
    found = measure.Listening(data, pairs, cfg, text).measure(model, full=False)
    row = {"NLL": f"{found['nll']:.3f}", "ahead of the data's": f"{measure.ahead(model, paired):.2f}" if paired else "-",
           "ahead of the start's own": f"{found['ranking_accuracy']:.2f}",
           "tokens": f"{statistics.mean(map(len, generated)):.1f}"}
    return row, [text.decode(ids, True) for ids in generated], own


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--out", default="runs/real")
    parser.add_argument("--variants", help=f"comma-separated; default all that the data allow: {','.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rows", type=int, default=64, help="of --eval-data, at most")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    paired = all(row.rejected for row in read_rows(args.data))
    allowed = [variant for variant in VARIANTS if paired or not variant.startswith("offline")]
    variants = args.variants.split(",") if args.variants else allowed
    if set(variants) - set(VARIANTS):
        parser.error(f"--variants: choose from {', '.join(VARIANTS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        taken = pool.map(lambda variant: run(variant, out, flags_of(variant, args, paired)), variants)
        seconds = dict(zip(variants, taken))
    rows, texts, own = {}, {}, None
    for variant in ("start", *variants):
        folder = args.model if variant == "start" else folder_of(variant, out) / "model"
        rows[variant], texts[variant], own = measured(folder, args, own)
    print(measure.markdown(["variant", "flags", *rows["start"], "seconds"],
                         [[variant, f"`{own_flags(variant, paired)}`" if variant in VARIANTS else "", *row.values(),
                           seconds.get(variant, "")] for variant, row in rows.items()]))
    for i, row in enumerate(read_rows(args.eval_data)[:args.samples]):
        prompt = row.turns if isinstance(row.turns, str) else row.turns[-1]["content"]
        shown = {"prompt": prompt, "y+": row.chosen["content"], **{variant: texts[variant][i] for variant in texts}}
        print("\n" + "\n".join(f"{name:<13} {one_line(text, 150)}" for name, text in shown.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
