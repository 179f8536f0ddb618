"""tools/attack.py sees what it looks for: a resumed run that differs, a refusal that is none, a run beyond its budget; and a few of its attacks."""

import functools
import os
import random
import sys
import time

import pytest

import attack
import sapo
import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="attacks fork")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return attack.Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def flags(bench):
    return tuple(bench.flags(random.Random(1)))


def forgets(monkeypatch):
    """A State that does not take its cuts' generator from a checkpoint."""
    original = sapo.State.load_state_dict

    def load(self, state):
        kept = self.cut_rng.bit_generator.state
        original(self, state)
        self.cut_rng.bit_generator.state = kept

    monkeypatch.setattr(sapo.State, "load_state_dict", load)


def test_a_run_that_goes_on_differently_is_seen(bench, flags, monkeypatch):
    bench.whole(flags)
    out = bench.place()
    attack.shutil.copytree(bench.stopped(flags), out)
    assert attack.finished(bench, flags, out) == "equal"
    attack.shutil.rmtree(out)
    attack.shutil.copytree(bench.stopped(flags), out)
    forgets(monkeypatch)
    assert attack.finished(bench, flags, out).startswith("failed: [")


def test_what_is_no_refusal_is_not_taken_for_one(bench, flags, monkeypatch):
    assert attack.refused("warning: x\nerror: no\n") and not attack.refused("error: a\nerror: b\n") and not attack.refused("Traceback\nerror: a\n")
    monkeypatch.setattr(train, "parse", lambda *_: 1 / 0)
    code, printed = bench.start(bench.place(), flags).end()
    assert code == 70 and "ZeroDivisionError" in printed and not attack.refused(printed)


def test_a_run_beyond_its_budget_is_ended(bench, flags):
    code, _ = bench.start(bench.place(), flags, functools.partial(time.sleep, 60)).end(0.3)
    assert code is None


@pytest.mark.parametrize("way", attack.DAMAGE)
def test_every_damage_changes_the_file(tmp_path, way):
    files = [tmp_path / name for name in ("a", "b")]
    for seed in range(20):
        for path in files:
            path.unlink(missing_ok=True)
            path.write_bytes(path.name.encode() * 600)
        attack.damage(files[0], way, random.Random(seed), files)
        assert files[0].is_symlink() or not files[0].is_file() or files[0].read_bytes() != b"a" * 600
        assert files[1].read_bytes() == b"b" * 600


@pytest.mark.parametrize("place", attack.PLACES)
def test_a_place_where_a_signal_comes_is_a_function(place):
    owner, _, name = place.rpartition(".")
    assert callable(getattr(sys.modules[owner], name))


@pytest.mark.slow
@pytest.mark.parametrize("kind, number", [("kills", 1), ("signals", 5), ("corruption", 6), ("races", 2), ("encodings", 0), ("templates", 2)])
def test_an_attack_is_withstood(bench, kind, number):
    outcome, what = attack.ATTACKS[kind](bench, number, random.Random(f"{kind} {number}"))
    assert outcome in ("equal", "refused"), (outcome, what)
