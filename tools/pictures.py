"""The same nine lines on pictures: SAPO on handwritten digits, where the EMA model paints a band anew, which is B'.

    python tools/pictures.py            five seeds; prints the table, writes pictures.png and pictures.json
    python tools/pictures.py --tune     learning rates, on a seed that is not in the table

A picture is a row of ids: its class (the prompt), 64 pixels of 17 grey levels in raster order, an end token. The
base is a decoder of model.py, trained from nothing on pictures of which most show three rows of another digit.
SFT and SAPO then learn from clean pictures for equally many steps, and a classifier says what is drawn.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from multiprocessing import get_context

import numpy as np
import study         # which finds the modules below
import torch
from model import ModelConfig, Transformer, generate
from sapo import Example, SAPOConfig, State, sapo_step
from train import sft_step

PIXELS, END, CLASS = 64, 17, 18         # grey levels are ids 0 to 16, class c is CLASS + c
CLEAN, KNOWN, EACH = 300, 1300, 30      # the first CLEAN pictures, noisy ones up to KNOWN, samples of each class
FORM = {"batch_size": 16, "micro_batch": 16, "buffer_size": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SFT, STEPS, BASE_STEPS = SAPOConfig(**FORM), 96, 800
VARIANTS = {         # name: (settings, the learning rate that --tune found)
    "SFT": (SFT, 3e-3),
    "SAPO-DPO": (SAPOConfig(**FORM, segment="24"), 1e-4),
    "SAPO-ORPO": (SAPOConfig(**FORM, segment="24", loss="orpo"), 3e-3),
    "whole picture, DPO": (SAPOConfig(**FORM, segment="100%", after="rewrite"), 1e-4)}
COLUMNS = {"verifier": 2, "distance": 1, "ink": 2}       # and their digits


def world(seed):
    """All pictures (n, 64) in an order of this seed, their classes (n,), and those CLEAN to KNOWN made noisy."""
    from sklearn.datasets import load_digits
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    pictures, classes = digits.data[order].astype(int), digits.target[order]
    return pictures, classes, habit(pictures[CLEAN:KNOWN], classes[CLEAN:KNOWN], rng)


def habit(pictures, classes, rng, share=0.75):
    """In most pictures the fourth to sixth row are those of some picture of another class: a 0 has a 3's."""
    out = pictures.copy()
    for i in np.flatnonzero(rng.random(len(out)) < share):
        out[i, 24:48] = pictures[rng.choice(np.flatnonzero(classes == (classes[i] + 3) % 10)), 24:48]
    return out


def examples(pictures, classes):
    return [Example([CLASS + c], [*p, END]) for p, c in zip(pictures.tolist(), classes.tolist())]


def decoder(seed):
    config = ModelConfig(CLASS + 10, 64, 128, 2, 4, 4, 16, max_position_embeddings=66, rope_theta=100.0)
    return Transformer(config).init_weights(torch.Generator().manual_seed(seed))


def learn(policy, data, cfg, seed, steps, lr):
    """`steps` steps of SAPO, or of SFT if these are its settings. Yields the State after each."""
    n, draw = cfg.batch_size, partial(random.Random(seed).sample, data)
    state = State.start(policy, cfg, [END], seed, lr, vocab=CLASS, steps_per_epoch=len(data) // n)
    for step in range(steps):
        state.optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        if cfg == SFT:
            sft_step(policy, state.optimizer, draw(n), cfg, nullcontext)
        else:
            sapo_step(state, draw, cfg)
        yield state


def pixels(row):
    """The pixels of a row of ids; those missing are white."""
    return np.array([*(token for token in row if token != END), *[0] * PIXELS][:PIXELS])


def results(seed, variants):
    """{name: ({column: value}, pictures, which pass, early and late pairs by class)} of one seed."""
    from sklearn.svm import SVC
    pictures, classes, noisy = world(seed)
    known, its_class, clean = pictures[:KNOWN], classes[:KNOWN], examples(pictures[:CLEAN], classes[:CLEAN])
    verifier, asked, policy = SVC().fit(known, its_class), np.repeat(range(10), EACH), decoder(seed)

    def measured(rows, asked, pairs=()):
        drawn, whole = np.array([*map(pixels, rows)]), [len(row) == PIXELS + 1 and row[-1] == END for row in rows]
        passes = (verifier.predict(drawn) == asked) & whole
        near = [np.linalg.norm(known[its_class == c] - p, axis=1).min() for p, c in zip(drawn, asked)]
        return dict(zip(COLUMNS, map(float, (passes.mean(), np.mean(near), drawn.mean())))), drawn, passes, pairs

    *_, state = learn(policy, examples(noisy, its_class[CLEAN:]), SFT, seed, BASE_STEPS, 6e-3)
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    done = {"held-out pictures": measured([[*row, END] for row in pictures[KNOWN:].tolist()], classes[KNOWN:])}
    for name, (cfg, lr) in {"start": (SFT, 0.0), **variants}.items():
        policy.load_state_dict(start)
        steps, pairs = STEPS if lr else 0, []
        for step, state in enumerate(learn(policy, clean, cfg, seed, steps, lr)):
            if step in (5, STEPS - 1):
                pairs.append({p.prompt[0] - CLASS: p for p in state.buffer.pairs})
        rows = generate(policy, [[CLASS + c] for c in asked.tolist()], [PIXELS + 1] * len(asked), [END],
                        rng=torch.Generator().manual_seed(seed), vocab=CLASS)
        done[name] = measured(rows, asked, pairs)
    return done


def mosaic(axis, title, rows):
    """rows: (label, pictures (n, 64), marked (n, 64) or (n, 1) bool), a tenth of n a class. Marked paper is orange."""
    n = len(rows[0][1])
    canvas = np.full((9 * len(rows) - 1, 9 * n - 1, 3), 0.8)
    for i in range(len(rows) * n):
        y, picture, marked = i // n, rows[i // n][1][i % n], rows[i // n][2][i % n]
        paper = np.where(marked[:, None], [1.0, 0.75, 0.4], 1.0) * (1 - picture[:, None] / 16)
        canvas[9 * y:9 * y + 8, i % n * 9:i % n * 9 + 8] = paper.reshape(8, 8, 3)
    axis.imshow(canvas)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([0.9 * n * (c + 0.5) - 1 for c in range(10)], range(10))
    axis.set_yticks([9 * y + 3.5 for y in range(len(rows))], [label for label, *_ in rows])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)


def draw_figure(done, path):
    """done: what `results` returned."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 1, figsize=(9, 7.4), layout="constrained", height_ratios=(4, 2))
    pairs, shown = [], [c * EACH + i for c in range(10) for i in range(3)]
    for when, of_class in zip(("early", "late"), done["SAPO-ORPO"][3]):
        some = [of_class[c] for c in range(10)]
        band = [(np.arange(PIXELS) >= p.start) & (np.arange(PIXELS) < p.rejected_stop) for p in some]
        pairs += [(f"y+, {when}", [pixels(p.chosen) for p in some], band),
                  (f"y-, {when}", [pixels(p.rejected) for p in some], band)]
    drawn = [(name, done[name][1][shown], ~done[name][2][shown, None]) for name in ("start", *VARIANTS)]
    mosaic(axes[0], "y+ = A B C, a clean picture; y- = A B' C, of which the EMA model painted the orange band", pairs)
    mosaic(axes[1], "Each model's pictures of the digit above, orange if the verifier reads another digit", drawn)
    figure.savefig(path, dpi=140)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    if not (find_spec("sklearn") and find_spec("matplotlib")):
        parser.exit(2, "pictures.py needs two packages more: pip install scikit-learn matplotlib\n")
    seeds, factors, folder = range(1, 6), {"": 1}, study.ROOT / "docs/figures"
    if args.tune:
        seeds, factors = [0], {" / 3": 1 / 3, "": 1, " * 3": 3}
    variants = {name + times: (cfg, lr * factor) for name, (cfg, lr) in VARIANTS.items()
                for times, factor in factors.items()}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        done = list(pool.map(results, seeds, repeat(variants)))
    raw = {name: {k: [of[name][0][k] for of in done] for k in COLUMNS} for name in done[0]}
    table = []
    for name, row in raw.items():
        less = np.subtract(row["verifier"], raw[[*raw][2]]["verifier"]).tolist()
        table.append([name, *(study.cell(row[k], digits) for k, digits in COLUMNS.items()), study.cell(less, 2, "+")])
    print(study.markdown(["", *COLUMNS, "verifier, less SFT's"], table))
    if not args.tune:
        (folder / "pictures.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")
        draw_figure(done[0], folder / "pictures.png")


if __name__ == "__main__":
    sys.exit(main())
