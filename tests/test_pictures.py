"""SAPO on pictures: that B' is a band the EMA model paints, that the habit is where it should be, and what the tool needs.

Oracle: greedy generation by a model that never moved. The toy pictures are noise, so no data set is needed.
"""

import dataclasses

import numpy as np
import pytest

import pictures
from conftest import oracle
from model import generate, twin

ROWS, STEPS = 24, 6


def toy(plant=None):
    """Pairs of the steps after the first of a run whose EMA never moves, the start, and the policy at the end.
    plant(state) is called after the first step."""
    rng = np.random.default_rng(0)
    data = pictures.examples(rng.integers(0, 17, (ROWS, pictures.PIXELS)), np.arange(ROWS) % 10)
    form = {"batch_size": 4, "micro_batch": 4, "alpha": 1.0, "ema_every": "1", "temperature": 0.0,
            "eos_in_segment": "ban"}
    cfg = dataclasses.replace(pictures.VARIANTS["SAPO-DPO"][0], **form)
    policy = pictures.decoder(0)
    start, pairs = twin(policy), []
    for step, state in enumerate(pictures.learn(policy, data, cfg, 0, STEPS, 0.03)):
        if step == 0 and plant:
            plant(state)
        if step > 0:
            pairs += list(state.buffer.pairs)[-cfg.batch_size:]
    return pairs, start, policy


def greedy(model, pair):
    """What a model paints in B's place, its likeliest greys."""
    prompt = [pair.prompt + pair.chosen[:pair.start]]
    return generate(model, prompt, [pair.stop - pair.start], temperature=0.0, vocab=pictures.CLASS, ban=[pictures.END])[0]


def painted_by(model, pairs):
    return all(p.rejected[p.start:p.rejected_stop] == greedy(model, p) for p in pairs)


def test_the_ema_model_paints_the_band_and_the_policy_does_not():
    pairs, start, policy = toy()
    assert painted_by(start, pairs)
    assert not painted_by(policy, pairs), "else the run proves nothing"


def test_a_policy_that_paints_is_seen():
    def plant(state):
        state.generator = state.policy

    pairs, start, _ = toy(plant)
    assert not painted_by(start, pairs)


def test_a_pair_is_one_picture_with_another_band():
    pairs, _, _ = toy()
    for p in pairs:
        assert len(p.prompt) == 1 and len(p.chosen) == pictures.PIXELS + 1 and p.stop - p.start == 24
        assert p.rejected[:p.start] == p.chosen[:p.start]
        assert p.rejected[p.rejected_stop:] == p.chosen[p.stop:] and len(p.rejected) == len(p.chosen)
    assert len({p.start for p in pairs}) > 1 and any(p.rejected != p.chosen for p in pairs)


def test_the_habit_takes_three_rows_of_the_class_three_further():
    classes = np.arange(400) % 10
    clean = np.repeat(classes[:, None], pictures.PIXELS, 1)              # a picture of c is all c
    noisy = pictures.habit(clean, classes, np.random.default_rng(0))
    bands, rest = noisy[:, 24:48], np.delete(noisy, range(24, 48), 1)
    changed = (bands != classes[:, None]).any(1)
    assert (rest == classes[:, None]).all() and 0.65 < changed.mean() < 0.85
    assert (bands[changed] == (classes[changed, None] + 3) % 10).all()


def test_every_picture_is_dealt_out_once_and_only_the_noisy_ones_are_spoilt():
    oracle("sklearn")
    from sklearn.datasets import load_digits
    drawn, classes, noisy = pictures.world(3)
    assert len(drawn) == len(classes) == 1797 and len(noisy) == pictures.KNOWN - pictures.CLEAN
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, load_digits().data.astype(int)))
    untouched = np.delete(noisy, range(24, 48), 1) == np.delete(drawn[pictures.CLEAN:pictures.KNOWN], range(24, 48), 1)
    assert untouched.all() and 0.6 < (noisy != drawn[pictures.CLEAN:pictures.KNOWN]).any(1).mean() < 0.85


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None if name == "sklearn" else name)
    with pytest.raises(SystemExit) as stopped:
        pictures.main([])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "pip install scikit-learn" in said
