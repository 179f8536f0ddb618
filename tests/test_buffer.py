"""A pair's life: who leaves the replay buffer, who is drawn how often, that a saved buffer goes on as if nothing had happened, and what row a pair becomes."""

import io
import json
import random
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch

from buffer import Pair, ReplayBuffer, collate, pack, unpack
from conftest import fits
from losses import IGNORE


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
    waiting = rows(filled(8, capacity=5).pairs)
    assert waiting == [3, 4, 5, 6, 7], f"of pairs 0 to 7 a buffer of 5 holds {waiting}: the oldest must leave"


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
    """Whatever a pair's staleness and uses."""
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


# ---------------------------------------------------------------- a batch

END = 2


def any_pair(rng, sides):
    """A pair of SAPO's or of the data's own, of so few different tokens that texts often agree by chance; its kinds, by name."""
    def ids(least, most):
        return [rng.randint(3, 5) for _ in range(rng.randint(least, most))]

    prompt, A, B, C = ids(1, rng.choice([1, 4])), ids(0, 3), ids(1, 4), ids(0, 3) + [END] * rng.randint(0, 1)
    if sides == 1 and rng.random() < 0.5:
        return Pair(prompt, A + B + C, []), {"no y-"}
    if rng.random() < 0.2:
        return Pair(prompt, A + B + C, ids(1, 7)), {"of the data"}
    new = list(B) if rng.random() < 0.2 else ids(len(B), len(B))
    ended = rng.random() < 0.3
    if ended:
        new = new[:rng.randrange(len(B))] + [END]
    pair = Pair(prompt, A + B + C, A + new + ([] if ended else C), len(A), len(A + B), len(A + new))
    kinds = {"empty A": not A, "empty C": not C, "ended": ended, "identical": new == B,
             "begins like B": new != B and new[0] == B[0], "prompt of one token": len(prompt) == 1}
    return pair, {name for name, true in kinds.items() if true}


def token_by_token(pairs, share, score_on, common, nll_on, sides):
    """What `collate` promises, one token after the other: a stream of cells (id, label, scored, seam); rows; (n, 3) lengths.

    Each text is read but for its last token, and a cell says what is to be made of the token after.
    """
    texts, lengths = [], []
    for p in pairs:
        chosen, rejected = p.prompt + p.chosen, p.prompt + p.rejected
        prefix = -1                                      # as long as what follows it begins alike, and two tokens follow
        while prefix + 3 <= min(len(chosen), len(rejected)) and chosen[prefix + 1] == rejected[prefix + 1]:
            prefix += 1
        counts, rows = [], []
        for text, stop in ((chosen, p.stop), (rejected, p.rejected_stop)):
            row, preference, nll = [], 0, 0
            for place in range(1, len(text)):
                in_response = place - len(p.prompt)      # 0 is its first token
                scored = in_response >= 0
                if score_on == "segment" and not p.start <= in_response < stop:
                    scored = False
                if not common and place <= prefix:
                    scored = False
                asked = {None: False, "response": in_response >= 0, "prompt+response": True}[nll_on]
                labelled = scored or asked and text is chosen
                both_have_C = p.rejected_stop > 0 and p.rejected[p.rejected_stop:] != []
                seam = scored and both_have_C and in_response >= stop
                row.append((text[place - 1], text[place] if labelled else IGNORE, scored, seam))
                preference, nll = preference + scored, nll + labelled
            rows.append(row)
            counts.append((preference, nll))
        texts.append((prefix, *rows))
        lengths.append([counts[0][0], counts[1][0], counts[0][1]])
    stream, numbers = [], [[], []]
    for prefix, *both in texts:
        for side, row in enumerate(both[:sides]):
            shared = numbers[0][-1][:prefix] if share and side else []           # the numbers of y+'s tokens, again
            own = row[len(shared):]
            numbers[side].append(shared + list(range(len(stream), len(stream) + len(own))))
            stream += own
    numbers = numbers[0] + numbers[1]
    width = max(map(len, numbers))
    return stream, [row + [-1] * (width - len(row)) for row in numbers], lengths


def any_batch(rng, share):
    """(pairs, options of collate, kinds of its pairs)"""
    options = dict(share=share, score_on=rng.choice(["response", "segment"]), common=rng.random() < 0.5,
                   nll_on=rng.choice([None, "response", "prompt+response"]), sides=1 if not share and rng.random() < 0.5 else 2)
    pairs, kinds = zip(*(any_pair(rng, options["sides"]) for _ in range(rng.choice([1, 1, 2, 3, 5]))))
    return list(pairs), options, kinds


TENSORS = {"ids": torch.int64, "labels": torch.int64, "scored": torch.bool, "seam": torch.bool, "rows": torch.int64, "lengths": torch.int64}


def test_a_batch_is_what_an_oracle_lays_out_token_by_token():
    rng, seen = random.Random(11), Counter()
    for number in range(1000):
        pairs, options, kinds = any_batch(rng, share=number % 2 == 0)
        batch = collate(pairs, **options)
        stream, rows, lengths = token_by_token(pairs, **options)
        said = f"batch {number}: {options} of {pairs}"
        for i, name in enumerate(("ids", "labels", "scored", "seam")):
            assert getattr(batch, name).tolist() == [cell[i] for cell in stream], f"{name} of {said}"
        assert (batch.rows.tolist(), batch.lengths.tolist()) == (rows, lengths), said
        assert {name: getattr(batch, name).dtype for name in TENSORS} == TENSORS
        seen.update(name for names in kinds for name in names)
        seen.update(f"{name}: {value}" for name, value in options.items())
        seen["C in both"] += bool(batch.seam.any())
        seen["nothing is scored"] += not batch.scored.any()
        seen["nothing is shared"] += bool(options["share"] and len(batch.ids) == (batch.rows >= 0).sum())
    assert len(seen) == 22 and min(seen.values()) > 20, f"each option and each kind of pair often enough: {seen}"


def test_some_pairs_of_a_batch_are_the_batch_of_those_pairs():
    """In any order."""
    rng = random.Random(12)
    for _ in range(300):
        pairs, options, _ = any_batch(rng, share=True)
        chosen = rng.sample(range(len(pairs)), rng.randint(1, len(pairs)))
        some, alone = collate(pairs, **options).some(chosen), collate([pairs[i] for i in chosen], **options)
        assert all(torch.equal(getattr(some, name), getattr(alone, name)) for name in TENSORS)
        again = some.some(range(len(chosen)))
        assert all(torch.equal(getattr(again, name), getattr(alone, name)) for name in TENSORS), "which has texts of its own"


def test_a_pair_without_a_prompt_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="at least one token of prompt"):
        collate([Pair([1], [3], [4]), Pair([], [3, 4], [3, 5])])


@pytest.mark.parametrize("rejected_stop, keeps", [(0, False), (1, True), (3, True), (4, False)])
def test_y_minus_keeps_C_where_it_goes_on_after_what_was_generated(rejected_stop, keeps):
    assert Pair([7], [3, 4, 5, 6], [3, 9, 5, 6], 0, 2, rejected_stop).keeps_C == keeps
