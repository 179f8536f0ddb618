"""The method's family: y- that are written to their end, segments that are a sentence or a line, steps without generating.

    python tests/test_family.py MODEL DATA N 50% sentence line     N pairs of each kind: what ends B', the seam, ten triples
"""

import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fits, make_pairs, small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from test_sapo import ENDS, EOS, VOCAB, examples, losses_of, settings, start, stream

import sapo
from buffer import collate
from losses import preference_loss
from machine.dataset import Data
from machine.files import BadInput
from machine.flags import PRESETS, Config, checked, parse
from machine.config import read_config
from machine.folders import companions, load_pretrained
from machine.report import pair_text, show_pair
from machine.rows import read_rows
from machine.text import Text
from sapo import Example, sapo_step, split

TINY = ROOT / "data/tiny_model"
TEXT = Text(companions(TINY), TINY, read_config(TINY))
STOPS = frozenset({50, 51})         # ids that end a sentence, here


# ---------------------------------------------------------------- whole answers: --after rewrite

def test_an_answer_that_is_rewritten_ends_by_itself_or_fills_the_room_and_then_has_no_end_token():
    """SPIN writes an answer to its own end; one that is cut off must not be closed with an end token nobody wrote."""
    cfg, data = settings(segment="4", after="rewrite", max_length=24), examples(60)
    state = start(cfg)
    state.eos = (EOS, *range(58, VOCAB))
    data = [e._replace(chosen=[t if t == EOS else 3 + t % 50 for t in e.chosen]) for e in data]
    pairs, ended = make_pairs(state, data, cfg), Counter()
    for e, p in zip(data, pairs):
        assert p.rejected[:p.start] == e.chosen[:p.start] and p.stop == len(p.chosen) and p.rejected_stop == len(p.rejected)
        assert not p.keeps_C and not set(p.rejected[:-1]) & set(state.eos)
        by_itself, full = p.rejected[-1] in state.eos, len(p.prompt) + len(p.rejected) == 24
        assert by_itself or full
        ended[by_itself] += 1
    assert min(ended.values()) > 5, ended
    _, metrics = losses_of(small_model(0), pairs, cfg, small_model(2))
    assert (metrics["pairs/seam_gap"] == 0).all() and (metrics["pairs/segment_gap"] != 0).all()


def test_where_a_rewritten_answer_starts_is_drawn_as_before():
    cuts, rng = Counter(), np.random.default_rng(3)
    for _ in range(10_000):
        cuts[split([*range(100, 110), EOS], "4", ENDS, rng, after="rewrite")] += 1
    assert set(cuts) == {(i, 11) for i in range(7)} and fits(list(cuts.values()), [10_000 / 7] * 7)


@torch.no_grad()
def test_without_a_max_length_the_room_is_the_models_context():
    cfg, state = settings(after="rewrite"), start(settings(after="rewrite"))
    state.eos, context = (), state.policy.config.max_position_embeddings
    (pair,) = make_pairs(state, [Example([5, 6], [7, 8, 9])], cfg)
    assert len(pair.prompt) + len(pair.rejected) == context


SPIN = dict(segment="100%", after="rewrite", alpha=0.0, ema_every="epoch", ref_refresh="epoch", batch_size=4, buffer_size=4)


def test_spin_writes_whole_answers_from_a_copy_that_is_frozen_for_an_epoch(monkeypatch):
    cfg = settings(**SPIN)
    state = start(cfg, steps_per_epoch=3)
    sapo.copy_parameters(state.ema, state.policy)
    writers, generate = [], sapo.generate
    monkeypatch.setattr(sapo, "generate", lambda model, *more: writers.append(model.model.embed_tokens.weight.sum().item()) or generate(model, *more))
    policies, first = [], None
    for step in range(6):
        policies.append(state.policy.model.embed_tokens.weight.sum().item())
        metrics = sapo_step(state, stream(examples(12)), cfg)
        first = first or metrics
        assert metrics["pairs/whole"] == 1 and metrics["pairs/seam_gap"] == 0
    assert set(writers) == {policies[0], policies[3]} and policies[0] != policies[3], "theta of the epoch's beginning writes all epoch long"


def test_the_first_dpo_loss_of_rewritten_answers_is_ln_2():
    cfg = settings(after="rewrite", segment="50%")
    state = start(cfg)
    sapo.copy_parameters(state.reference, state.policy)
    assert sapo_step(state, stream(examples(8)), cfg)["loss"] == pytest.approx(np.log(2), abs=1e-12)


def test_an_answer_that_may_not_end_cannot_be_written_to_its_end():
    with pytest.raises(BadInput, match="--after rewrite with --eos-in-segment ban"):
        parse(["--after", "rewrite", "--eos-in-segment", "ban"])


def test_pairs_of_the_data_have_no_segment_to_be_scored_on():
    with pytest.raises(BadInput, match="--rejected data with --score-on segment"):
        parse(["--rejected", "data", "--score-on", "segment"])


@pytest.mark.parametrize("after", ["keep", "rewrite"])
@pytest.mark.parametrize("limit", [20, 21])
def test_a_prompt_that_leaves_no_room_is_one_error(after, limit):
    cfg = settings(after=after, segment="3", max_length=limit)
    with pytest.raises(ValueError, match=f"max_length {limit} leaves no room"):
        sapo.generate_segments(small_model(0), [Example(list(range(3, 21)), [5, 6, 7, 8, 9, 10, 1])],
                          [(3, 6 if after == "keep" else 7)], cfg, ENDS, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("context, longest", [(64, 64), (4096, 2048)])
def test_without_max_length_a_text_has_at_most_2048_tokens(context, longest, monkeypatch):
    model, asked = small_model(0), []
    model.config = dataclasses.replace(model.config, max_position_embeddings=context)
    monkeypatch.setattr(sapo, "generate", lambda _, prompts, budgets, *more: asked.extend(budgets) or [[5]] * len(prompts))
    sapo.generate_segments(model, [Example([3, 4], [5, 6, 7, 1])], [(1, 4)], settings(after="rewrite", max_length=None), ENDS, None)
    assert asked == [longest - 2 - 1]


# ---------------------------------------------------------------- a sentence or a line

@pytest.mark.parametrize("ids, found", [
    ([3, 4, 50, 5, 6, 7, 51, 8, 50], [(0, 3), (3, 7), (7, 9)]), ([3, 50, 51, 51, 4, 50], [(0, 2), (4, 6)]), ([3, 4, 50, 5], [(0, 3), (3, 4)]),
    ([50, 3, 50], [(1, 3)]), ([3, 4], [(0, 2)]), ([50, 51], [(0, 2)]), ([3], [(0, 1)])])
def test_a_text_falls_into_its_sentences(ids, found):
    """Each ends in its first stop; an empty line belongs to none, what has no stop is one."""
    assert sapo.units(ids, STOPS) == found
    assert all(i < j for i, j in found) and all(a[1] <= b[0] for a, b in zip(found, found[1:]))


def test_sentences_are_drawn_uniformly():
    chosen, cuts, rng = [3, 4, 50, 5, 50, 6, 7, 8, 51, 9, 9, 50, EOS], Counter(), np.random.default_rng(3)
    for _ in range(10_000):
        cuts[split(chosen, "sentence", ENDS, rng, STOPS)] += 1
    assert set(cuts) == {(0, 3), (3, 5), (5, 9), (9, 12)} and fits(list(cuts.values()), [2500] * 4)


def test_a_new_sentence_stops_at_the_first_stop_it_writes_and_has_room_to_be_longer_than_the_old_one():
    cfg = settings(segment="sentence", max_length=64)
    state, data = start(cfg, breaks=STOPS), []
    for e in examples(80):
        words = [3 + t % 40 for t in e.chosen if t != EOS]
        data.append(e._replace(chosen=[*words, 50, *words[:3], 51, EOS]))
    pairs, causes = make_pairs(state, data, cfg), Counter()
    for e, p in zip(data, pairs):
        new = p.rejected[p.start:p.rejected_stop]
        assert p.chosen[p.stop - 1] in STOPS and not set(new[:-1]) & (STOPS | set(ENDS))
        cause = "stop" if new[-1] in STOPS else "end" if new[-1] in ENDS else "room"
        assert cause != "room" or len(new) == min(max(p.stop - p.start, sapo.LONGEST_UNIT), 64 - len(p.prompt) - len(p.chosen) + p.stop - p.start)
        assert p.rejected[p.rejected_stop:] == ([] if cause == "end" else p.chosen[p.stop:])
        causes[cause, len(new) > p.stop - p.start] += 1
    assert causes["stop", True] and causes["stop", False] and causes["end", True] + causes["end", False]


def words_of(kind):
    return {TEXT.tokenizer.decode([i]) for i in TEXT.breaks(kind)}


def test_what_ends_a_sentence_is_read_off_the_tokens():
    assert {".", "!", "?"} <= words_of("sentence") and not {",", "dog", " dog", "'"} & words_of("sentence")
    assert all("\n" in word for word in words_of("line")) and TEXT.breaks("256") == TEXT.breaks("50%") == frozenset()
    with pytest.raises(ValueError, match="segment 'line' needs breaks"):
        start(settings(segment="line"))


@pytest.mark.parametrize("kind, text, expected", [
    ("sentence", 'He ran. "Stop!" she said. Why?', ["He ran.", ' "Stop!', '" she said.', " Why?"]),
    ("sentence", "他跑了。她说：“停！”为什么？", ["他跑了。", "她说：“停！", "”为什么？"]),
    ("sentence", "No stop at all", ["No stop at all"]), ("sentence", "One.\n\n\nTwo.", ["One.", "Two."]),
    ("line", "def f(x):\n    return x\n\nprint(f(1))\n", ["def f(x):\n", "    return x\n", "print(f(1))\n"])])
def test_english_chinese_and_code_fall_into_sentences_and_lines(kind, text, expected):
    """On a tokenizer of single letters, where a closing quote is a token of its own and goes with what follows."""
    whole = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(text)) + ["</s>", "[UNK]"])}, unk_token="[UNK]"))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    files = {"tokenizer.json": whole.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    read = Text(files, "here", read_config(TINY))
    ids = whole.encode(text).ids
    assert whole.decode(ids) == text
    found = [whole.decode(ids[i:j]) for i, j in sapo.units(ids, read.breaks(kind))]
    assert [piece.strip(" ") for piece in found] == [piece.strip(" ") for piece in expected]


# ---------------------------------------------------------------- pairs on every N-th step

@pytest.mark.parametrize("every, ema_every", [(1, "3"), (2, "2"), (3, "2"), (4, "1"), (2, "5")])
def test_pairs_are_generated_on_every_nth_step_by_the_ema_of_that_step(every, ema_every, monkeypatch):
    cfg = settings(generate_every=every, ema_every=ema_every, buffer_size=60)
    state, seen, drawn = start(cfg), [], []
    draw = stream(examples(40))
    monkeypatch.setattr(sapo.ReplayBuffer, "add", lambda self, pair: (seen.append(pair.step), self.pairs.append(pair))[1])
    generate = sapo.generate
    monkeypatch.setattr(sapo, "generate", lambda *args: drawn.append((state.step, len(args[1]))) or generate(*args))
    total = {"gen/tokens": 0, "train/tokens": 0}
    for step in range(12):
        metrics = sapo_step(state, draw, cfg)
        assert ("gen/eos_fraction" in metrics) == (step % every == 0) and (metrics["gen/tokens"] > 0) == (step % every == 0)
        assert metrics["train/tokens"] > 0
        total = {name: total[name] + metrics[name] for name in total}
    assert Counter(seen) == {step: cfg.batch_size for step in range(0, 12, every)}
    pairs = list(state.buffer.pairs)
    assert total["gen/tokens"] == sum(p.rejected_stop - p.start for p in pairs)
    steps = int(ema_every)
    for step, rows in drawn:                             # all batches of one EMA are made at once, and no more
        assert rows == cfg.batch_size * len([s for s in range(step, (step // steps + 1) * steps) if s % every == 0])


def test_steps_between_draw_from_the_buffer_as_ever():
    cfg = settings(generate_every=4)
    state = start(cfg)
    for _ in range(3):
        sapo_step(state, stream(examples(20)), cfg)
    assert len(state.buffer) == cfg.batch_size and all(p.uses == 3 for p in state.buffer.pairs)


# ---------------------------------------------------------------- all of it is off by default

def test_the_defaults_stay_the_papers():
    cfg = checked(Config(model="m", data="d", **PRESETS["paper-dpo"]))
    assert (cfg.after, cfg.generate_every, cfg.nll, cfg.segment, cfg.loss) == ("keep", 1, 0.0, "256", "dpo")


def new_pairs(model, text, rows, n, cfg):
    """n Pairs of SAPO with this model as the generator, on rows drawn at random."""
    data, breaks = Data(rows, text, cfg, "rows"), text.breaks(cfg.segment)
    rng, draws = np.random.default_rng(0), torch.Generator().manual_seed(0)
    picked = [data[int(i)] for i in rng.choice(len(data), n)]
    cuts = [split(e.chosen, cfg.segment, text.eos, rng, breaks, cfg.after) for e in picked]
    segments = sapo.generate_segments(model, picked, cuts, cfg, text.eos, draws, text.vocab, breaks=breaks)
    return [sapo.splice(e, cut, new, text.eos) for e, cut, new in zip(picked, cuts, segments)]


def cause_of(pair, text, breaks):
    """What ended B', where it should have been one sentence or line."""
    new = pair.rejected[pair.start:pair.rejected_stop]
    said = text.decode(new, True)
    if new[-1] in text.eos:
        return "the answer's end token"
    if new[-1] not in breaks:
        return "no room left"
    return "a number's full stop" if re.search(r"\d\.$", said) else "one whole sentence or line"


@torch.no_grad()
def gaps(model, pairs, cfg):
    """Mean (segment gap, seam gap) in nats, over the pairs in which y- keeps C."""
    kept, sums = [p for p in pairs if p.keeps_C], []
    for i in range(0, len(kept), 8):
        metrics = preference_loss(model, collate(kept[i:i + 8]), dataclasses.replace(cfg, loss="simpo"))[1]
        sums.append(torch.stack([metrics["pairs/segment_gap"], metrics["pairs/seam_gap"]], 1))
    return torch.cat(sums).mean(0).tolist(), len(kept)


if __name__ == "__main__":
    folder, rows, n, segments = Path(sys.argv[1]), read_rows(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    text, model = Text(companions(folder), folder, read_config(folder)), load_pretrained(folder).eval()
    for segment in segments:
        cfg = Config(model=str(folder), data=sys.argv[2], segment=segment, max_length=512, max_prompt_length=448)
        pairs = new_pairs(model, text, rows, n, cfg)
        print(f"--segment {segment}: {n} pairs;", {k: c / n for k, c in Counter(
            "all of y+" if p.start == 0 and p.stop >= len(p.chosen) - 1 else "inside y+" for p in pairs).items()})
        if segment in sapo.UNITS:
            ends = Counter(cause_of(p, text, text.breaks(segment)) for p in pairs)
            print("  B' is ended by", {cause: round(count / n, 3) for cause, count in ends.most_common()})
        (inside, seam), kept = gaps(model, pairs[:96], cfg)
        print(f"  log p(B) - log p(B') {inside:+.1f}, seam {seam:+.1f} nats, means over {kept} of 96 pairs that keep C")
        for p in pairs[:10]:
            print(show_pair(pair_text(p, text)))
