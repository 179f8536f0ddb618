"""What a buffer saves: SAPO-DPO that generates pairs on every N-th step only, at equal compute.

    python tools/replay.py [--every 1,2,4,8] [--steps 120,240] [--seeds 5] [--jobs 2]

Each run is the tiny world's SAPO-DPO with `--generate-every N`, from the study's base of its seed, at the study's
learning rate for it, measured on the test rows. It prints the verifier's mean score, as mean and
95 % t-interval over seeds, and the means of tokens generated, tokens trained on and seconds. It draws replay.png into --figures: the score over
tokens of both kinds. Runs that are done are not done again. Left out: tuning, so a rate that is best for one N serves all.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import study

RATE = 3e-4     # SAPO-DPO's in docs/figures/study.json


def flags_of(every):
    return f"--generate-every {every}" if every > 1 else ""


def tokens_of(folder):
    """(generated, trained on) at the end of a run, of its metrics.jsonl."""
    last = study.steps_of(Path(folder))[-1]
    return last["gen/num_tokens"], last["train/num_tokens"]


def measured(runs, every, steps, seeds):
    """{column: a value for each seed} of one setting."""
    runs.args.steps = steps
    jobs = [runs.job(flags_of(every), RATE, seed, "test") for seed in seeds]
    tokens = [tokens_of(job["folder"]) for job in jobs]
    return {"score": [study.verified(runs.result(job)) for job in jobs],
            "generated": [generated for generated, _ in tokens], "trained": [trained for _, trained in tokens],
            "seconds": [study.known(Path(job["folder"]) / "trained.json", job["flags"])["seconds"] for job in jobs]}


def draw(table, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, costs, label in ((axes[0], ("generated", "trained"), "tokens generated and trained on, millions"),
                               (axes[1], ("generated",), "tokens generated, millions")):
        for every in sorted({every for every, _ in table}):
            points = sorted((steps, row) for (e, steps), row in table.items() if e == every)
            x = [sum(statistics.mean(row[cost]) for cost in costs) / 1e6 for _, row in points]
            mean, half = zip(*(study.interval(row["score"]) for _, row in points))
            axis.errorbar(x, mean, half, marker="o", markersize=4, capsize=3, label=f"every {every}" if every > 1 else "every step")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("verifier, mean of three")
    axes[1].legend(title="pairs are generated", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", default="1,2,4,8")
    parser.add_argument("--steps", default="120,240", help="steps of a run; one point of a curve each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sft-steps", type=int, default=500)
    parser.add_argument("--rows", type=int, help="test rows used (default all)")
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--figures", default="docs/figures")
    args = parser.parse_args(argv)
    lengths, every = ([int(n) for n in text.split(",")] for text in (args.steps, args.every))
    args.steps = lengths[0]
    runs = study.Study(args)
    runs.do("bases", [runs.job("", None, seed, "test") for seed in runs.seeds])
    jobs = []
    for steps in lengths:
        runs.args.steps = steps          # which `job` reads
        jobs += [runs.job(flags_of(n), RATE, seed, "test") for n in every for seed in runs.seeds]
    runs.do("runs", jobs)
    table = {(n, steps): measured(runs, n, steps, runs.seeds) for n in every for steps in lengths}
    Path(args.figures).mkdir(parents=True, exist_ok=True)
    draw(table, Path(args.figures) / "replay.png")
    rows = [[f"`--generate-every {n}`", steps, study.cell(row["score"], 2),
             *(f"{statistics.mean(row[kind]) / 1e3:,.0f}k" for kind in ("generated", "trained")),
             f"{statistics.mean(row['seconds']):.0f}"] for (n, steps), row in table.items()]
    print(study.markdown(["", "steps", "verifier, mean of three", "tokens generated", "tokens trained on", "seconds"], rows))
    Path(args.out, "replay.json").write_text(json.dumps({f"{n} {steps}": row for (n, steps), row in table.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
