"""The replay buffer: who leaves, who is drawn how often, and that a saved buffer goes on as if nothing had happened."""

import io
import json
import random
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from buffer import Pair, ReplayBuffer, pack, unpack
from conftest import fits


def some_pairs(n, seed=0):
    """n pairs in which every field holds something of its own, lists of length 0 included."""
    rng = random.Random(seed)
    tokens = lambda: [rng.randrange(2**31) for _ in range(rng.randrange(5))]
    return [Pair(tokens(), tokens(), tokens(), start=rng.randrange(9), stop=rng.randrange(99), rejected_stop=rng.randrange(999), row=i,
                 step=rng.randrange(2**40), uses=rng.randrange(7), ref_chosen=-rng.random() / 3, ref_rejected=-rng.random() * 1e9,
                 ref_version=rng.randrange(-1, 50)) for i in range(n)]


def filled(n, capacity=None, **more):
    buffer = ReplayBuffer(capacity or n, **more)
    for i in range(n):
        buffer.add(Pair([i], [i], [i], row=i))
    return buffer


def rows(pairs):
    return [p.row for p in pairs]


# ---------------------------------------------------------------- first in, first out

def test_the_oldest_pair_leaves_first():
    assert rows(filled(8, capacity=5).pairs) == [3, 4, 5, 6, 7]


def test_the_buffer_grows_to_its_capacity_and_no_further():
    buffer, sizes = ReplayBuffer(3), []
    for i in range(5):
        buffer.add(Pair([i], [], []))
        sizes.append(len(buffer))
    assert sizes == [1, 2, 3, 3, 3]


def test_a_pair_that_left_is_never_drawn():
    buffer = filled(50, capacity=4)
    assert {p.row for _ in range(100) for p in buffer.sample(2)} == {46, 47, 48, 49}


def test_an_absurd_capacity_is_refused():
    with pytest.raises(ValueError):
        ReplayBuffer(0)


def test_an_unknown_way_to_draw_is_refused():
    with pytest.raises(ValueError, match="inverse-count"):
        ReplayBuffer(3, replay="newest")


# ---------------------------------------------------------------- draws

@pytest.mark.parametrize("replay", ["uniform", "inverse-count"])
def test_no_pair_comes_twice_in_one_draw(replay):
    buffer = filled(9, replay=replay)
    assert all(len(set(rows(buffer.sample(7)))) == 7 for _ in range(200))


@pytest.mark.parametrize("replay", ["uniform", "inverse-count"])
def test_all_can_be_drawn_at_once(replay):
    assert sorted(rows(filled(6, replay=replay).sample(6))) == list(range(6))


def test_asking_for_more_than_there_is_raises():
    with pytest.raises(ValueError, match="4 pairs asked of a buffer that holds 3"):
        filled(3, capacity=10).sample(4)


def test_a_refused_draw_counts_no_use():
    buffer = filled(3)
    with pytest.raises(ValueError):
        buffer.sample(4)
    assert [p.uses for p in buffer.pairs] == [0, 0, 0]


def test_draws_are_uniform_over_the_buffer():
    """Whatever a pair's age and uses."""
    buffer, counts = filled(12, seed=5), Counter()
    for _ in range(3000):
        for i, pair in enumerate(buffer.pairs):
            pair.uses = 9 * (i % 3)
        counts.update(rows(buffer.sample(4)))
    assert fits([counts[i] for i in range(12)], [1000] * 12)


def test_every_place_in_a_draw_is_uniform_too():
    buffer = filled(6, seed=6)
    counts = Counter(buffer.sample(3)[0].row for _ in range(3000))
    assert fits([counts[i] for i in range(6)], [500] * 6)


def test_inverse_count_weighs_a_pair_by_one_over_uses_plus_one():
    buffer, uses, counts = filled(4, seed=7, replay="inverse-count"), [0, 1, 3, 9], Counter()
    for _ in range(4000):
        for pair, n in zip(buffer.pairs, uses):
            pair.uses = n
        counts[buffer.sample(1)[0].row] += 1
    weights = [1 / (n + 1) for n in uses]
    assert fits([counts[i] for i in range(4)], [4000 * w / sum(weights) for w in weights])


def test_inverse_count_evens_the_uses_out():
    spread = {}
    for replay in ("uniform", "inverse-count"):
        buffer = filled(40, seed=8, replay=replay)
        for _ in range(400):
            buffer.sample(4)
        spread[replay] = np.std([p.uses for p in buffer.pairs])
    assert spread["inverse-count"] < 0.8 * spread["uniform"]


def test_uses_are_counted_on_the_pairs_that_were_drawn():
    buffer, counts = filled(7, seed=9), Counter()
    for _ in range(30):
        counts.update(rows(buffer.sample(3)))
    assert [p.uses for p in buffer.pairs] == [counts[i] for i in range(7)]


def test_a_draw_returns_the_pairs_themselves():
    """The reference's log-probs are written onto a drawn pair and must be there at its next draw."""
    buffer = filled(3)
    buffer.sample(3)[0].ref_version = 17
    assert sorted(p.ref_version for p in buffer.pairs) == [-1, -1, 17]


def test_the_seed_decides_the_draws():
    draws = lambda seed: [rows(filled(30, seed=seed).sample(5)) for _ in range(2)]
    assert draws(1)[0] == draws(1)[1] != draws(2)[0]


# ---------------------------------------------------------------- saving

def through_files(state):
    """A buffer's state through real bytes: the generator as JSON, the pairs as a numpy archive that may hold no pickles."""
    text, archive = json.dumps({k: v for k, v in state.items() if k != "pairs"}), io.BytesIO()
    np.savez(archive, **state["pairs"])
    with np.load(io.BytesIO(archive.getvalue()), allow_pickle=False) as arrays:
        return json.loads(text) | {"pairs": dict(arrays)}


@pytest.mark.parametrize("replay", ["uniform", "inverse-count"])
def test_a_saved_buffer_continues_the_same_draws(replay):
    buffer = filled(20, capacity=15, seed=3, replay=replay)
    for _ in range(9):
        buffer.sample(4)
    other = ReplayBuffer(1, seed=99, replay=replay)
    other.load_state_dict(through_files(buffer.state_dict()))
    for i in range(20):
        assert rows(other.sample(4)) == rows(buffer.sample(4))
        for one in (buffer, other):
            one.add(Pair([i], [i], [i], row=100 + i))
    assert [asdict(p) for p in other.pairs] == [asdict(p) for p in buffer.pairs]


def test_a_saved_state_does_not_move_on_with_the_buffer():
    buffer = filled(6, seed=4)
    state = buffer.state_dict()
    first = [rows(buffer.sample(3)) for _ in range(5)]
    buffer.load_state_dict(state)
    assert [p.uses for p in buffer.pairs] == [0] * 6 and [rows(buffer.sample(3)) for _ in range(5)] == first


def test_uses_survive_saving():
    buffer, other = filled(5, seed=2), ReplayBuffer(1)
    for _ in range(7):
        buffer.sample(2)
    other.load_state_dict(through_files(buffer.state_dict()))
    assert [p.uses for p in other.pairs] == [p.uses for p in buffer.pairs] and sum(p.uses for p in other.pairs) == 14


def test_the_capacity_survives_saving():
    other = ReplayBuffer(1)
    other.load_state_dict(through_files(filled(2, capacity=3).state_dict()))
    for i in range(10):
        other.add(Pair([], [], [], row=i))
    assert rows(other.pairs) == [7, 8, 9]


@pytest.mark.parametrize("n", [0, 1, 25])
def test_what_is_packed_unpacks_to_the_same_pairs(n):
    pairs = some_pairs(n)
    assert unpack(pack(pairs)) == pairs


def test_pairs_of_empty_lists_unpack():
    pairs = [Pair([], [], []), Pair([], [], [], uses=2)]
    assert unpack(pack(pairs)) == pairs


def test_pairs_come_back_as_plain_data():
    """numpy integers would pass every comparison here and break json later."""
    pairs = unpack(through_files({"pairs": pack(some_pairs(4))})["pairs"])
    assert json.loads(json.dumps([asdict(p) for p in pairs])) == [asdict(p) for p in some_pairs(4)]


def test_packed_pairs_hold_numbers_only():
    assert {a.dtype.kind for a in pack(some_pairs(3)).values()} == {"i", "f"}


def test_an_empty_buffer_survives_saving():
    buffer = filled(3)
    buffer.load_state_dict(through_files(ReplayBuffer(4).state_dict()))
    assert len(buffer) == 0 and buffer.pairs.maxlen == 4
