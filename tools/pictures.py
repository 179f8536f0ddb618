"""The same nine lines on pictures: SAPO on handwritten digits, where B' is a band that the EMA model paints.

    python tools/pictures.py            five seeds; prints the table and draws docs/figures/pictures.png
    python tools/pictures.py --tune     learning rates, on a seed that is not in the table

A picture is a row of ids: its class (the prompt), 64 pixels of 17 greys in raster order, an end token. A
decoder learns from noisy ones, then from clean ones by SFT or SAPO; a classifier says what it draws.
"""

import argparse
import copy
import random
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import study         # which finds the modules below
import torch
from model import ModelConfig, Transformer, generate
from sapo import Example, SAPOConfig, State, sapo_step
from train import sft_step

PIXELS, END, CLASS = 64, 17, 18         # grey levels are ids 0 to 16, class c is CLASS + c
CLEAN, KNOWN, EACH = 300, 1300, 30      # pictures up to CLEAN are clean, to KNOWN noisy; samples of a class
FORM = {"batch_size": 16, "micro_batch": 16, "buffer_size": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SFT, STEPS, BASE_STEPS = SAPOConfig(**FORM), 96, 800
VARIANTS = {         # name: (settings, the learning rate that --tune found)
    "SFT": (SFT, 9e-3), "SAPO-DPO": (SAPOConfig(**FORM, segment="24"), 1e-4),
    "SAPO-ORPO": (SAPOConfig(**FORM, segment="24", loss="orpo"), 3e-3),
    "whole picture, DPO": (SAPOConfig(**FORM, segment="100%", after="rewrite"), 3e-4)}
COLUMNS = {"verifier": (2,), "distance": (1,), "ink": (2,), "minus start": (2, "+"), "minus SFT": (2, "+")}


def world(seed):
    """All pictures (n, 64) in an order of this seed, their classes (n,), and CLEAN to KNOWN made noisy."""
    from sklearn.datasets import load_digits
    (pictures, classes), rng = load_digits(return_X_y=True), np.random.default_rng(seed)
    order = rng.permutation(len(classes))
    pictures, classes = pictures[order].astype(int), classes[order]
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


def pixels(row):         # (64,); what is missing is white
    return np.array([*(token for token in row if token != END), *[0] * PIXELS][:PIXELS])


def results(seed, variants):
    """{name: ({column: value}, pictures, which pass, early and late pairs by class)} of one seed."""
    from sklearn.svm import SVC
    pictures, classes, noisy = world(seed)
    known, its_class, clean = pictures[:KNOWN], classes[:KNOWN], examples(pictures[:CLEAN], classes[:CLEAN])
    verifier, base, done = SVC().fit(known, its_class), decoder(seed), {}
    *_, state = learn(base, examples(noisy, its_class[CLEAN:]), SFT, seed, BASE_STEPS, 6e-3)
    for name, (cfg, lr) in {"held-out pictures": (SFT, 0.0), "start": (SFT, 0.0), **variants}.items():
        policy, asked, pairs = copy.deepcopy(base), np.repeat(range(10), EACH), []
        for step, state in enumerate(learn(policy, clean, cfg, seed, STEPS if lr else 0, lr)):
            if step in (5, STEPS - 1):
                pairs.append({p.prompt[0] - CLASS: p for p in state.buffer.pairs})
        rows = generate(policy, [[CLASS + c] for c in asked.tolist()], [PIXELS + 1] * len(asked), [END],
                        rng=torch.Generator().manual_seed(seed), vocab=CLASS)
        if not done:         # the first row of the table, which no model drew
            rows, asked = [[*p, END] for p in pictures[KNOWN:].tolist()], classes[KNOWN:]
        drawn = np.array([pixels(row) for row in rows])
        passes = (verifier.predict(drawn) == asked) & [row[PIXELS:] == [END] for row in rows]
        near = [np.linalg.norm(known[its_class == c] - p, axis=1).min() for p, c in zip(drawn, asked)]
        done[name] = dict(zip(COLUMNS, [passes.mean(), np.mean(near), drawn.mean()])), drawn, passes, pairs
    for row, *_ in done.values():
        row |= {f"minus {of}": row["verifier"] - done[of][0]["verifier"] for of in ("start", "SFT")}
    return done


def mosaic(axis, title, rows):
    """rows: {label: (pictures (n, 64), marked (n, 64) bool)}, n / 10 of a class. Marked: on orange."""
    pictures, marked = (np.array(part)[..., None] for part in zip(*rows.values()))      # (rows, n, 64, 1)
    paper = np.where(marked, [1.0, 0.75, 0.4], 1.0) * (1 - pictures / 16)               # (rows, n, 64, 3)
    n, gaps = pictures.shape[1], [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)]
    framed = np.pad(paper.reshape(-1, n, 8, 8, 3), gaps, constant_values=0.8)           # (rows, n, 9, 9, 3)
    axis.imshow(framed.swapaxes(1, 2).reshape(-1, 9 * n, 3))
    axis.set(xticks=[0.9 * n * (c + 0.5) - 1 for c in range(10)], xticklabels=range(10), title=title,
             yticks=[9 * y + 3.5 for y in range(len(rows))], yticklabels=rows)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)


def draw_figure(done, path):
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), layout="constrained", height_ratios=(4, 1.7))
    pairs, place, shown = {}, np.arange(PIXELS), [c * EACH + i for c in range(10) for i in range(3)]
    for when, of_class in zip(("early", "late"), done["SAPO-ORPO"][3]):
        some = [of_class[c] for c in range(10)]
        band = [(place >= p.start) & (place < p.rejected_stop) for p in some]
        pairs |= {f"y+, {when}": ([pixels(p.chosen) for p in some], band),
                  f"y-, {when}": ([pixels(p.rejected) for p in some], band)}
    drawn = {name: (of[1][shown], ~of[2][shown, None] & (place >= 0)) for name, of in [*done.items()][1:]}
    mosaic(axes[0], "y+ = A B C is a clean picture; in y- = A B' C the EMA model painted the band", pairs)
    mosaic(axes[1], "Pictures of the digit above, on orange where the verifier reads another digit", drawn)
    figure.savefig(path, dpi=140)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    tune = parser.parse_args(argv).tune
    if not (find_spec("sklearn") and find_spec("matplotlib")):
        parser.exit(2, "pictures.py needs two packages more: pip install scikit-learn matplotlib\n")
    rates = {k + f" x {f}" * (f != 1): (c, lr * f) for k, (c, lr) in VARIANTS.items() for f in (0.3, 1, 3)}
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        variants = rates if tune else VARIANTS
        done = list(pool.map(partial(results, variants=variants), [0] if tune else range(1, 6)))
    table = [[name, *(study.cell([of[name][0][k] for of in done], *form) for k, form in COLUMNS.items())]
             for name in done[0]]
    print(study.markdown(["", *COLUMNS], table))
    if not tune:
        draw_figure(done[0], study.ROOT / "docs/figures/pictures.png")


if __name__ == "__main__":
    main()
