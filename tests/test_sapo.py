"""Algorithm 1 (sapo.py) as claims: the listing, the cut, who writes what, the buffer, the two losses, the EMA, the reference.

Oracles: a float64 loop over one text at a time, closed forms, two plain rows in place of a shared prefix, one micro-batch
in place of four. Left out: the formulas and the decoder by themselves, files, flags and processes; those have their own files.
"""

import ast
import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import losses
import sapo
from buffer import Pair, ReplayBuffer, collate
from conftest import NUMBERS, ROOT, fits, make_pairs, small_model
from losses import IGNORE, LOSSES, by_text, preference_loss, score, scored_tokens
from machine.folders import load_pretrained, save_pretrained
from model import add_lora, generate, own_parameters, twin
from sapo import Example, SAPOConfig, State, accumulate_gradient, ema_update, named_moments, sapo_step, split

VOCAB, EOS = NUMBERS["vocab_size"], 2
ENDS = (EOS, 44)                                             # more than one token may end an answer
WAYS = [dict(loss="dpo", score_on="response"), dict(loss="dpo", score_on="segment")] + [
    dict(loss=loss, score_on=s, nll_on=n) for loss in ("orpo", "slic") for s in ("response", "segment") for n in ("response", "prompt+response")]
WAYS += [dict(loss=loss, score_on=s) for loss in ("ipo", "rpo", "simpo") for s in ("response", "segment")] + [
    dict(zip(("loss", "score_on", "nll_on", "nll"), way)) for way in (
        ("dpo", "response", "response", 0.6), ("ipo", "segment", "prompt+response", 0.6), ("rpo", "response", "prompt+response", 0.6),
        ("simpo", "segment", "response", 0.6), ("orpo", "response", "prompt+response", 0.6), ("slic", "segment", "response", 0.6))]
ALONE = [way for way in WAYS if way["loss"] != "rpo"]        # a pair's loss does not depend on the other pairs
NAMES, ALONE_NAMES = (["-".join(map(str, way.values())) for way in ways] for ways in (WAYS, ALONE))


def tokens(rng, n):
    """n ids, none of which ends an answer."""
    return [t + (t in ENDS) for t in rng.integers(3, VOCAB - 1, n).tolist()]


def examples(n, seed=0, longest=11):
    """Rows with prompts of 1 to 5 tokens and responses of 1 to `longest`; two in three are closed by an end token."""
    rng = np.random.default_rng(seed)
    return [Example(tokens(rng, rng.integers(1, 6)), tokens(rng, rng.integers(1, longest)) + [EOS] * (i % 3 > 0),
                    tokens(rng, rng.integers(1, longest)) + [EOS], row=i) for i in range(n)]


def settings(**change):
    """A SAPOConfig far from its defaults."""
    return SAPOConfig(**{**dict(beta=0.37, lam=0.23, delta=2.9, gamma=0.8, tau=0.6, batch_size=4, micro_batch=3, segment="4", alpha=0.3, ema_every="3", buffer_size=50,
                                ref_refresh="never", temperature=1.3, top_k=0, top_p=1.0, max_grad_norm=0.0), **change})


def start(cfg, dtype=torch.float64, lr=0.01, **more):
    """A State whose EMA and reference are already other models than the policy."""
    state = State.start(small_model(0, dtype), cfg, eos=ENDS, lr=lr, **more)
    sapo.copy_parameters(state.ema, small_model(1, dtype))
    if state.reference is not None:
        sapo.copy_parameters(state.reference, small_model(2, dtype))
    return state


def stream(data):
    """draw(n): the rows of `data` in order, over and over."""
    rows = itertools.cycle(data)
    return lambda n: list(itertools.islice(rows, n))


def triple(x, a, b, c, new, row=-1):
    """The Pair of a cut (A, B, C) and of what was generated in B's place."""
    return Pair(x, a + b + c, a + new + ([] if new[-1] in ENDS else c), len(a), len(a) + len(b), len(a) + len(new), row)


def kinds():
    """Every kind of pair that gave trouble somewhere, by name."""
    rng = np.random.default_rng(5)
    t = lambda n: tokens(rng, n)
    b, ended, y = t(6), t(2) + [EOS] + t(3), t(4)
    pairs = {
        "plain": triple(t(5), t(4), t(6), t(3) + [EOS], t(6)),
        "empty A": triple(t(4), [], t(5), t(2) + [EOS], t(5)),
        "empty C, truncated": triple(t(3), t(5), t(4), [], t(4)),
        "y- ended early": triple(t(3), t(2), t(7), t(4) + [EOS], t(2) + [EOS]),
        "y- ended at once": triple(t(6), t(3), t(4), [EOS], [44]),
        "identical": triple(t(4), t(3), b, t(2) + [EOS], b),
        "B' begins like B": triple(t(2), t(4), b, t(2) + [EOS], b[:3] + t(3)),
        "B' ends like B": triple(t(2), t(4), b, t(2) + [EOS], t(3) + b[3:]),
        "y- begins y+": triple(t(3), t(2), ended, [], ended[:3]),
        "y+ begins y-": Pair(t(3), y, y + t(3), 0, 4, 7),
        "prompt of one token": triple(t(1), [], t(4), [EOS], t(4)),
        "one token and the end": triple(t(3), [], t(1), [EOS], t(1)),
        "one token against another": triple([9], [], [17], [], [33]),
        "long": triple(t(12), t(20), t(9), t(15) + [EOS], t(9))}
    for row, pair in enumerate(pairs.values()):
        pair.row = 100 + row
    return pairs


def logps_by_hand(model, text, first, last):
    """log p(text[t] | text[:t]) for first <= t < last, from a forward pass of that text alone."""
    logits = model(torch.tensor([text]))[0]
    return [logits[t - 1].log_softmax(-1)[text[t]] for t in range(first, last)]


def by_hand(model, pairs, cfg, reference=None):
    """The losses of a micro-batch in plain arithmetic, from the papers: one text at a time, a loop over its tokens, all of the response counted."""
    mean = lambda values: sum(values) / len(values)
    minus_log_sigmoid = lambda x: -torch.log(torch.sigmoid(x))
    said, refs, nlls, values = [], [], [], []
    for p in pairs:
        x = len(p.prompt)
        first = x + (p.start if cfg.score_on == "segment" else 0)
        ends = (p.stop, p.rejected_stop) if cfg.score_on == "segment" else (len(p.chosen), len(p.rejected))
        sides = [(p.prompt + y, first, x + end) for y, end in zip((p.chosen, p.rejected), ends)]
        said.append([logps_by_hand(model, *side) for side in sides])
        refs.append([logps_by_hand(reference, *side) for side in sides] if cfg.loss in losses.WITH_REFERENCE else ())
        nlls.append([-logp for logp in logps_by_hand(model, p.prompt + p.chosen, x if cfg.nll_on == "response" else 1, x + len(p.chosen))])
    for (up, down), ref, nll, pair in zip(said, refs, nlls, pairs):
        if cfg.loss == "dpo":
            loss = minus_log_sigmoid(cfg.beta * (sum(up) - sum(ref[0]) - (sum(down) - sum(ref[1]))))
        elif cfg.loss == "ipo":
            loss = (mean(up) - mean(ref[0]) - (mean(down) - mean(ref[1])) - 1 / (2 * cfg.beta)) ** 2
        elif cfg.loss == "rpo":
            near, loss = [math.exp((cosine(reference, pair, other) - 1) / cfg.tau) for other in pairs], 0
            for w, (_, theirs), (_, ref_theirs) in zip(near, said, refs):
                loss += minus_log_sigmoid(w / sum(near) * cfg.beta * (sum(up) - sum(ref[0]) - (sum(theirs) - sum(ref_theirs)))) / len(pairs)
        elif cfg.loss == "simpo":
            loss = minus_log_sigmoid(cfg.beta * mean(up) - cfg.beta * mean(down) - cfg.gamma)
        elif cfg.loss == "slic":
            loss = torch.clamp(cfg.delta - sum(up) + sum(down), min=0) + cfg.lam * sum(nll)
        elif cfg.loss == "orpo":
            p, q = mean(up).exp(), mean(down).exp()
            loss = mean(nll) + cfg.lam * minus_log_sigmoid(torch.log((p / (1 - p)) / (q / (1 - q))))
        values.append(loss + cfg.nll * mean(nll))
    return torch.stack(values)


def prompt_by_hand(model, pair):
    """The mean of the embeddings of a prompt's tokens, as floats."""
    rows = model.model.embed_tokens.weight.tolist()
    return [sum(rows[t][d] for t in pair.prompt) / len(pair.prompt) for d in range(len(rows[0]))]


def cosine(model, pair, other):
    a, b = prompt_by_hand(model, pair), prompt_by_hand(model, other)
    dot = lambda u, v: sum(x * y for x, y in zip(u, v, strict=True))
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def gradient(model, loss):
    """The gradient of loss.sum() as one vector; parameters it does not reach count as 0."""
    grads = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), grads)])


def losses_of(model, pairs, cfg, reference=None, share=True):
    """(losses, metrics) of pairs as one Batch, through collate, score and preference_loss."""
    options, scores, prompts = scored_tokens(cfg), None, None
    if cfg.loss in losses.WITH_REFERENCE:
        with torch.no_grad():
            scores = score(reference, collate(pairs, **options))
    if cfg.loss == "rpo":
        prompts = torch.tensor([prompt_by_hand(reference, p) for p in pairs], dtype=torch.float64)
    return preference_loss(model, collate(pairs, share=share, **options), cfg, scores, prompts)


def watch(monkeypatch, owner, name):
    """Record the calls of owner.name as (arguments, result)."""
    calls, original = [], getattr(owner, name)

    def recorded(*arguments, **named):
        result = original(*arguments, **named)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def rows_seen(model):
    """A list that grows by the number of pairs of each forward pass of `model`."""
    seen = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[1]) // 2))
    return seen


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def close(left, right, atol):
    return torch.allclose(torch.as_tensor(left, dtype=torch.float64), torch.as_tensor(right, dtype=torch.float64), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------ the listing

def test_sapo_step_reads_like_algorithm_1():
    source = inspect.getsource(sapo.sapo_step).split('"""')[2]
    assert re.findall(r"\[(\d)\]", source) == list("123456789")
    for line in source.splitlines():
        if re.search(r"\[\d\]", line):
            assert re.fullmatch(r" +[^#\s][^#]*  # \[\d\]( \[\d\])*", line), f"not a statement that ends in its number: {line}"


def test_the_docstring_shows_the_nine_lines():
    assert re.findall(r"^    \[(\d)\] .+$", sapo.__doc__, re.M) == list("123456789")


def test_the_nine_numbers_stand_near_the_top_on_one_screen():
    """A reader who opens sapo.py finds all of Algorithm 1 without a search: in order, once each, in one function."""
    lines = (ROOT / "sapo.py").read_text("utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("def sapo_step("))
    numbers = re.findall(r"\[(\d)\]", inspect.getsource(sapo_step))
    near = re.findall(r"\[(\d)\]", "\n".join(lines[begin:begin + 45]))
    assert numbers == list("123456789"), "each number once, and in order"
    assert begin < 60, f"def sapo_step stands on line {begin + 1}"
    assert near[:9] == list("123456789"), "the last of them is more than 45 lines below the first line of sapo_step"


def imports(file):
    """Names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file, siblings", [("losses.py", set()), ("buffer.py", {"losses"}), ("model.py", set()),
                                            ("sapo.py", {"losses", "buffer", "model"}), ("train.py", {"losses", "buffer", "model", "sapo"})])
def test_imports_go_one_way(file, siblings):
    if file == "train.py" and not (ROOT / file).exists():
        pytest.skip("train.py is not written yet")
    found = imports(file) & {path.stem for path in ROOT.glob("*.py")}
    assert found <= siblings if file == "train.py" else found == siblings


def test_algorithm_1_touches_no_files_flags_or_processes():
    roots = {name.split(".")[0] for name in imports("sapo.py")}
    assert not roots & {"argparse", "tokenizers", "json", "os", "pathlib", "safetensors", "transformers"}
    assert not [name for name in imports("sapo.py") if name.startswith("torch.distributed")]
    assert "torch.distributed" not in (ROOT / "sapo.py").read_text("utf-8")


@pytest.mark.parametrize("segment", ["4", "50%", "sentence"])
@pytest.mark.parametrize("response", [[], [EOS]])
def test_an_empty_response_is_refused_in_a_sentence(response, segment):
    with pytest.raises(ValueError, match="nothing to rewrite in an empty response"):
        split(response, segment, ENDS, np.random.default_rng(0), breaks=(7,))


# ------------------------------------------------------------------------------------------------ [2] the cut

@pytest.mark.parametrize("ended", [True, False], ids=["ended", "truncated"])
@pytest.mark.parametrize("n, segment, length", [(9, "4", 4), (13, "1", 1), (700, "256", 256), (37, "50%", 18), (37, "30%", 11),
                                                (10, "9", 9), (5, "256", 5), (700, "701", 700), (21, "100%", 21), (1, "50%", 1), (1, "256", 1)])
def test_cuts_are_uniform_over_the_legal_ones(n, segment, length, ended):
    chosen, draws = list(range(100, 100 + n)) + [EOS] * ended, 10_000
    cuts, rng = Counter(), np.random.default_rng(3)
    for _ in range(draws):
        cuts[split(chosen, segment, ENDS, rng)] += 1
    legal = [(i, i + length) for i in range(n - length + 1)]
    assert set(cuts) <= set(legal), "B has the asked length, lies within y+ and never holds the end token"
    rarest = min(legal, key=cuts.__getitem__)
    even = len(legal) == 1 or fits([cuts[cut] for cut in legal], [draws / len(legal)] * len(legal))
    assert even, f"of {len(legal)} legal cuts, each of which should come about {draws / len(legal):.0f} times, B = {rarest} came {cuts[rarest]} times"


@pytest.mark.parametrize("segment, n, length", [("256", 1000, 256), ("256", 256, 256), ("256", 255, 255), ("7", 1, 1), ("1", 9, 1), ("50%", 9, 4),
                                                ("50%", 11, 6), ("1%", 9, 1), ("100%", 9, 9), ("12.5%", 80, 10), ("150%", 6, 6)])
def test_a_segment_is_tokens_or_a_share_but_never_nothing_and_never_too_much(segment, n, length):
    assert sapo.segment_length(segment, n) == length


# ------------------------------------------------------------------------------------------------ [3] [4] the rejected response

@pytest.mark.parametrize("segment", ["4", "50%", "100%"])
@pytest.mark.parametrize("eos_in_segment", ["stop", "ban"])
def test_y_minus_is_A_then_new_tokens_then_C(segment, eos_in_segment, monkeypatch):
    cfg, data = settings(segment=segment, eos_in_segment=eos_in_segment), examples(60)
    state = start(cfg)
    state.eos = (EOS, *range(40, VOCAB))                     # a third of the vocabulary ends an answer
    data = [e._replace(chosen=[t if t == EOS else 3 + t % 37 for t in e.chosen]) for e in data]
    calls, ended = watch(monkeypatch, sapo, "generate"), 0
    pairs = make_pairs(state, data, cfg)
    (_, segments), = calls
    for e, p, new in zip(data, pairs, segments):
        A, B, C = p.chosen[:p.start], p.chosen[p.start:p.stop], p.chosen[p.stop:]
        stopped = new[-1] in state.eos
        ended += stopped
        assert (p.prompt, p.chosen, p.row) == (e.prompt, e.chosen, e.row) and A + B + C == e.chosen
        assert EOS not in B and 1 <= len(new) <= len(B) and (stopped or len(new) == len(B))
        assert p.rejected == A + new + ([] if stopped else C)
        assert p.rejected[p.start:p.rejected_stop] == new
        assert not set(new[:-1]) & set(state.eos), "nothing follows an end token"
    assert 10 < ended < 60 if eos_in_segment == "stop" else ended == 0


def test_y_plus_and_the_data_are_left_alone():
    data, cfg = examples(20), settings()
    before = [(list(e.prompt), list(e.chosen)) for e in data]
    for p, e in zip(make_pairs(start(cfg), data, cfg), data):
        p.rejected[0], p.prompt[0] = -1, -1
        assert p.chosen == e.chosen
    assert [(e.prompt, e.chosen) for e in data] == before


def test_the_policy_never_writes(monkeypatch):
    cfg = settings(ema_every="2", generate_ahead=1)
    state, calls = start(cfg), watch(monkeypatch, sapo, "generate")
    for _ in range(3):
        sapo_step(state, stream(examples(9)), cfg)
    assert len(calls) == 3 and all(arguments[0] is state.ema for arguments, _ in calls)


@pytest.mark.parametrize("changed", ["policy", "ema", "reference"])
def test_what_is_generated_depends_on_the_ema_alone(changed):
    cfg = settings(batch_size=20)
    one, two = start(cfg), start(cfg)
    sapo.copy_parameters(getattr(two, changed), small_model(77))
    for state in (one, two):
        sapo_step(state, stream(examples(20)), cfg)
    generated = [[p.rejected for p in state.buffer.pairs] for state in (one, two)]
    same = generated[0] == generated[1]
    assert same == (changed != "ema"), f"B' {'stays the same' if same else 'changes'} with the {changed}: it is the EMA's, and nobody else's"


def test_the_ema_writes_its_own_greedy_continuation_of_x_and_A():
    cfg = settings(temperature=0.0, eos_in_segment="ban")
    state = start(cfg, vocab=50)
    for p in make_pairs(state, examples(12), cfg):
        text = p.prompt + p.chosen[:p.start]
        for _ in range(p.stop - p.start):
            logits = state.ema(torch.tensor([text]))[0, -1]
            logits[[*ENDS, *range(50, VOCAB)]] = -math.inf
            text = text + [int(logits.argmax())]
        assert p.rejected[p.start:p.rejected_stop] == text[len(p.prompt) + p.start:]


def test_sampling_follows_its_settings(monkeypatch):
    cfg = settings(temperature=0.9, top_k=11, top_p=0.83)
    state, calls = start(cfg, vocab=50), watch(monkeypatch, sapo, "generate")
    make_pairs(state, examples(5), cfg)
    given = inspect.signature(generate).bind(*calls[0][0]).arguments
    assert (given["temperature"], given["top_k"], given["top_p"], given["vocab"]) == (0.9, 11, 0.83, 50)
    assert given["rng"] is state.sample_rng and set(given["eos"]) == set(ENDS) and not given["ban"]


def test_the_generator_is_given_x_and_A_only(monkeypatch):
    cfg, data = settings(), examples(30)
    calls = watch(monkeypatch, sapo, "generate")
    pairs = make_pairs(start(cfg), data, cfg)
    _, prefixes, budgets, *_ = calls[0][0]
    assert prefixes == [e.prompt + e.chosen[:p.start] for e, p in zip(data, pairs)]
    assert budgets == [p.stop - p.start for p in pairs]
    assert any(p.start > 0 for p in pairs), "some A is not empty"


def test_other_B_and_C_leave_B_prime_the_same():
    cfg, data, rng = settings(eos_in_segment="ban"), examples(30), np.random.default_rng(8)
    pairs = make_pairs(start(cfg), data, cfg)
    other = [e._replace(chosen=p.chosen[:p.start] + tokens(rng, len(p.chosen) - p.start - (p.chosen[-1] == EOS)) + [EOS] * (p.chosen[-1] == EOS))
             for e, p in zip(data, pairs)]
    again = make_pairs(start(cfg), other, cfg)
    assert sum(p.chosen != q.chosen for p, q in zip(pairs, again)) > 20
    assert [p.rejected[:p.rejected_stop] for p in pairs] == [q.rejected[:q.rejected_stop] for q in again]


def test_another_A_changes_B_prime():
    cfg, data = settings(temperature=0.0), examples(60)
    pairs = make_pairs(start(cfg), data, cfg)
    other = [e._replace(chosen=[7] * p.start + p.chosen[p.start:]) for e, p in zip(data, pairs)]
    again = make_pairs(start(cfg), other, cfg)
    moved = [p.rejected[p.start:p.rejected_stop] != q.rejected[q.start:q.rejected_stop] for p, q in zip(pairs, again) if p.start > 2]
    assert len(moved) > 5 and sum(moved) > len(moved) / 2


def test_identical_and_ended_and_whole_segments_are_counted(monkeypatch):
    cfg = settings(batch_size=6, segment="3", eos_in_segment="stop")
    lengths = (8, 8, 8, 3, 3, 8)                             # two of them no longer than the segment
    data = [Example([5 + i], list(range(6 + i, 6 + i + n)) + [EOS], row=i) for i, n in enumerate(lengths)]
    goes_on = lambda prefix, n: [prefix[-1] + 1 + i for i in range(n)]              # which is B itself

    def write(model, prefixes, budgets, *rest):
        return [goes_on(p, n) if i < 2 else [EOS] if i == 2 else [4] * n for i, (p, n) in enumerate(zip(prefixes, budgets))]

    monkeypatch.setattr(sapo, "generate", write)
    state = start(cfg)
    for pair in kinds().values():                            # they may be drawn, but they are not fresh
        state.buffer.add(pair)
    metrics = sapo_step(state, stream(data), cfg)
    assert metrics["pairs/identical"] == pytest.approx(2 / 6)
    assert metrics["pairs/whole"] == pytest.approx(2 / 6)
    assert metrics["gen/eos_fraction"] == pytest.approx(1 / 6)


def test_the_datas_own_rejected_is_used_when_asked_and_nothing_is_written(monkeypatch):
    cfg, data = settings(rejected="data"), examples(12)
    state = start(cfg)
    monkeypatch.setattr(sapo, "generate", lambda *_: pytest.fail("nobody has to write"))
    draw = stream(data)
    metrics = [sapo_step(state, draw, cfg) for _ in range(2)]
    assert [(p.prompt, p.chosen, p.rejected, p.row) for p in state.buffer.pairs] == [(e.prompt, e.chosen, e.rejected, e.row) for e in data[:8]]
    assert all(math.isfinite(m["loss"]) for m in metrics)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_generating_ahead_changes_nothing(loss):
    runs = []
    for ahead in (1, 3, 8):
        cfg = settings(loss=loss, generate_ahead=ahead, ema_every="4", ref_refresh="3", alpha=0.6)
        state, draw = start(cfg), stream(examples(23))
        lines = [{k: v for k, v in sapo_step(state, draw, cfg).items() if not k.startswith(("time/", "gen/tokens"))} for _ in range(8)]
        runs.append((lines, list(state.buffer.pairs), weights(state.policy).tolist(), weights(state.ema).tolist()))
    same = runs[0] == runs[1] == runs[2]
    assert same                                          # not in one: pytest would draw thousands of numbers side by side


def test_an_ema_that_moves_every_epoch_needs_to_know_how_long_that_is():
    with pytest.raises(ValueError, match="steps_per_epoch"):
        State.start(small_model(0), settings(ema_every="epoch"), [2])


def test_segments_are_generated_as_far_ahead_as_the_ema_stands_still(monkeypatch):
    cfg = settings(ema_every="4", generate_ahead=8)
    state, calls = start(cfg), watch(monkeypatch, sapo, "generate")
    for _ in range(9):
        sapo_step(state, stream(examples(23)), cfg)
    assert [len(arguments[1]) for arguments, _ in calls] == [16, 16, 16]


# ------------------------------------------------------------------------------------------------ [5] [6] the buffer

def test_fresh_pairs_are_in_the_buffer_before_the_draw_and_the_oldest_leaves(monkeypatch):
    cfg, data = settings(buffer_size=10, ema_every="2"), examples(40)
    state = start(cfg)
    drawn, draw = watch(monkeypatch, state.buffer, "sample"), stream(data)
    for step in range(5):
        sapo_step(state, draw, cfg)
        first = max(0, 4 * (step + 1) - 10)
        assert [p.row for p in state.buffer.pairs] == list(range(first, 4 * (step + 1)))
        assert [p.step for p in state.buffer.pairs] == [row // 4 for row in range(first, 4 * (step + 1))]
    assert sorted(p.row for p in drawn[0][1]) == [0, 1, 2, 3], "the first draw finds the first batch"
    assert any(p.step == step for step, (_, pairs) in enumerate(drawn[1:], 1) for p in pairs)
    assert any(p.step < step for step, (_, pairs) in enumerate(drawn[1:], 1) for p in pairs)


def test_staleness_uses_and_size_of_the_buffer_are_reported(monkeypatch):
    cfg = settings(buffer_size=30)
    state = start(cfg)
    calls, draw, uses = watch(monkeypatch, state.buffer, "sample"), stream(examples(40)), Counter()
    for step in range(6):
        metrics = sapo_step(state, draw, cfg)
        drawn = calls[-1][1]
        uses.update(id(p) for p in drawn)
        assert metrics["buffer/size"] == 4 * (step + 1)
        assert metrics["buffer/staleness"] == pytest.approx(sum(step - p.row // 4 for p in drawn) / 4)   # four rows a step
        assert metrics["buffer/uses"] == pytest.approx(sum(uses[id(p)] for p in drawn) / 4)
    assert metrics["buffer/staleness"] > 0 and metrics["buffer/uses"] > 1


def test_training_uses_the_drawn_pairs_not_the_fresh_ones(monkeypatch):
    cfg = settings(batch_size=3)
    state, draw = start(cfg), stream(examples(20))
    sapo_step(state, draw, cfg)
    drawn = state.buffer.sample(3)
    monkeypatch.setattr(state.buffer, "sample", lambda n: drawn)
    want = losses_of(copy.deepcopy(state.policy), drawn, cfg, state.reference)[0].mean().item()
    assert sapo_step(state, draw, cfg)["loss"] == pytest.approx(want, abs=1e-12)


# ------------------------------------------------------------------------------------------------ [7] how a pair is scored

@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_losses_and_gradients_are_those_of_a_loop_over_tokens(way):
    cfg, model, reference, pairs = settings(**way), small_model(0), small_model(2), list(kinds().values())
    loss, _ = losses_of(model, pairs, cfg, reference)
    want = by_hand(model, pairs, cfg, reference)
    assert close(loss, want, 1e-10)
    assert close(gradient(model, loss), gradient(model, want), 1e-10)


def test_each_loss_has_its_loop():
    assert {way["loss"] for way in WAYS} == set(LOSSES), "add it to WAYS and to by_hand"


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_a_shared_prefix_equals_two_plain_rows(way):
    cfg, model, reference = settings(**way), small_model(0), small_model(2)
    for name, pairs in {**{k: [p] for k, p in kinds().items()}, "all in one batch": list(kinds().values())}.items():
        (shared, _), (plain, _) = (losses_of(model, pairs, cfg, reference, share) for share in (True, False))
        assert close(shared, plain, 1e-10), name
        assert close(gradient(model, shared), gradient(model, plain), 1e-10), name


@pytest.mark.parametrize("share", [True, False], ids=["prefix", "plain"])
@pytest.mark.parametrize("way", WAYS[:10:3], ids=NAMES[:10:3])
def test_recomputing_blocks_and_head_changes_nothing(way, share, monkeypatch):
    cfg, model, reference, pairs = settings(**way), small_model(0), small_model(2), list(kinds().values())
    want, _ = losses_of(model, pairs, cfg, reference, share)
    want_gradient = gradient(model, want)
    model.gradient_checkpointing = True
    monkeypatch.setattr(losses, "LOGITS", 7 * VOCAB)
    monkeypatch.setattr(losses, "KEPT", 9 * VOCAB)
    heads = watch(monkeypatch, losses, "token_logps")
    loss, _ = losses_of(model, pairs, cfg, reference, share)
    assert heads[-1][0][3:] == (7, 9), "the head really runs on seven tokens at a time"
    assert close(loss, want, 1e-12) and close(gradient(model, loss), want_gradient, 1e-10)


def test_one_side_is_the_chosen_rows_of_two():
    pairs = list(kinds().values())
    pairs[-1].rejected += pairs[-1].rejected                 # a long one must not widen the rows
    one, two = collate(pairs, share=False, sides=1), collate(pairs, share=False)
    width = max(len(p.prompt + p.chosen) for p in pairs) - 1
    assert len(one.ids) == sum(len(p.prompt + p.chosen) - 1 for p in pairs)
    assert one.rows.shape == (len(pairs), width) and two.rows.shape[1] > width
    for mine, theirs in zip(one[:4], two[:4]):
        assert torch.equal(by_text(mine, one), by_text(theirs, two)[:len(pairs), :width])


@pytest.mark.parametrize("way", ALONE, ids=ALONE_NAMES)
def test_padding_changes_no_loss(way):
    cfg, model, reference, pairs = settings(**way), small_model(0), small_model(2), list(kinds().values())
    rng = np.random.default_rng(4)
    giant = triple(tokens(rng, 40), tokens(rng, 50), tokens(rng, 30), tokens(rng, 45), tokens(rng, 30))
    alone = torch.cat([losses_of(model, [p], cfg, reference)[0] for p in pairs])
    assert close(losses_of(model, pairs + [giant], cfg, reference)[0][:-1], alone, 1e-12)


@pytest.mark.parametrize("name", kinds())
def test_labels_are_the_response_and_nothing_of_the_prompt(name):
    p = kinds()[name]
    plain, batch = collate([p, kinds()["long"]], share=False), collate([p, kinds()["long"]])
    for one in (plain, batch):
        labels = [one.labels[row[row >= 0]] for row in one.rows[[0, 2]]]
        assert [row[row != IGNORE].tolist() for row in labels] == [p.chosen, p.rejected]
    assert plain.lengths[0].tolist()[:2] == batch.lengths[0].tolist()[:2] == [len(p.chosen), len(p.rejected)]


@pytest.mark.parametrize("name", kinds())
def test_a_label_is_the_token_after(name):
    p = kinds()[name]
    batch = collate([p, kinds()["long"]])
    for y, row in zip((p.chosen, p.rejected), batch.rows[[0, 2]].tolist()):
        text = p.prompt + y
        assert [batch.ids[i] for i in row if i >= 0] == text[:-1]
        for place, i in enumerate(row):
            if i >= 0 and batch.labels[i] != IGNORE:
                read, label = int(batch.ids[i]), int(batch.labels[i])
                assert label == text[place + 1], f"after {text[place]} comes {text[place + 1]}, but {read} has the label {label}"


def test_the_prompt_is_scored_only_for_the_nll_and_only_when_asked():
    p = kinds()["plain"]
    labels = lambda **more: [t for t in collate([p], **more).labels.tolist() if t != IGNORE]
    assert sorted(labels(nll_on="response")) == sorted(labels())
    batch, asked = collate([p], nll_on="response"), collate([p], nll_on="prompt+response")
    extra = (asked.labels != IGNORE) & (batch.labels == IGNORE)
    assert asked.labels[extra].tolist() == p.prompt[1:] and not asked.scored[extra].any()
    assert asked.lengths[0].tolist() == [len(p.chosen), len(p.rejected), len(p.prompt) + len(p.chosen) - 1]


def test_dpo_takes_sums_and_leaves_out_A_which_cancels():
    cfg, model, reference, p = settings(), small_model(0), small_model(2), kinds()["plain"]
    assert p.chosen[p.start] != p.rejected[p.start]
    _, metrics = losses_of(model, [p], cfg, reference)

    def summed(model, y):
        text = p.prompt + y
        logps = model(torch.tensor([text]))[0].log_softmax(-1).detach()
        return sum(float(logps[t - 1, text[t]]) for t in range(len(p.prompt) + p.start, len(text)))

    chosen, rejected = summed(model, p.chosen), summed(model, p.rejected)
    assert metrics["logps/chosen"].item() == pytest.approx(chosen, abs=1e-10)
    assert metrics["logps/rejected"].item() == pytest.approx(rejected, abs=1e-10)
    assert metrics["rewards/chosen"].item() == pytest.approx(cfg.beta * (chosen - summed(reference, p.chosen)), abs=1e-10)
    assert metrics["rewards/rejected"].item() == pytest.approx(cfg.beta * (rejected - summed(reference, p.rejected)), abs=1e-10)


def test_orpo_takes_means_over_the_whole_response():
    cfg, model, p = settings(loss="orpo"), small_model(0), kinds()["B' begins like B"]
    _, metrics = losses_of(model, [p], cfg)
    for y, name in ((p.chosen, "chosen"), (p.rejected, "rejected")):
        text = p.prompt + y
        logps = model(torch.tensor([text]))[0].log_softmax(-1).detach()
        mean = sum(float(logps[t - 1, text[t]]) for t in range(len(p.prompt), len(text))) / len(y)
        assert metrics[f"logps/{name}"].item() == pytest.approx(mean, abs=1e-10)
        assert metrics[f"rewards/{name}"].item() == pytest.approx(cfg.lam * mean, abs=1e-10)
        if name == "chosen":
            assert metrics["nll_loss"].item() == pytest.approx(-mean, abs=1e-10)


def test_slic_takes_sums_and_reports_them():
    cfg, model, p = settings(loss="slic", nll_on="prompt+response"), small_model(0), kinds()["plain"]
    _, metrics = losses_of(model, [p], cfg)
    for y, name in ((p.chosen, "chosen"), (p.rejected, "rejected")):
        text = p.prompt + y
        total = sum(logps_by_hand(model, text, len(p.prompt) + p.start, len(text))).item()       # A cancels and is left out
        assert metrics[f"logps/{name}"].item() == pytest.approx(total, abs=1e-10) == metrics[f"rewards/{name}"].item()
    logps = logps_by_hand(model, p.prompt + p.chosen, 1, len(p.prompt + p.chosen))
    assert metrics["nll_loss"].item() == pytest.approx(-sum(logps).item() / len(logps), abs=1e-10), "per token, for people to read"


def test_pairs_stand_on_both_sides_of_the_slic_hinge():
    """Else the comparisons above prove half of it."""
    for score_on in ("response", "segment"):
        _, metrics = losses_of(small_model(0), list(kinds().values()), settings(loss="slic", score_on=score_on))
        beyond = metrics["rewards/margins"] > settings().delta
        assert beyond.any() and not beyond.all()


@pytest.mark.parametrize("share", [True, False], ids=["prefix", "plain"])
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@torch.no_grad()
def test_the_gap_is_that_of_the_segments_and_that_of_the_seam(way, share):
    """The seam: what C gains by standing after B and not after B'. It is 0 where y- has no C, or C is not compared."""
    cfg, model, pairs = settings(**way), small_model(0), kinds()
    if cfg.score_on == "response":
        pairs["the data's own"] = Pair(*(tokens(np.random.default_rng(6), n) for n in (3, 7, 5)))
    _, metrics = losses_of(model, list(pairs.values()), cfg, small_model(2), share)
    moved = 0
    for i, (name, p) in enumerate(pairs.items()):
        x, chosen, rejected = len(p.prompt), p.prompt + p.chosen, p.prompt + p.rejected
        ends = (p.stop, p.rejected_stop) if cfg.score_on == "segment" else (len(p.chosen), len(p.rejected))
        gap = sum(logps_by_hand(model, chosen, x + p.start, x + ends[0])) - sum(logps_by_hand(model, rejected, x + p.start, x + ends[1]))
        seam = 0.0
        if cfg.score_on == "response" and 0 < p.rejected_stop < len(p.rejected):
            assert chosen[x + p.stop:] == rejected[x + p.rejected_stop:], "C, and C once more"
            seam = sum(logps_by_hand(model, chosen, x + p.stop, len(chosen))) - sum(logps_by_hand(model, rejected, x + p.rejected_stop, len(rejected)))
        assert close(metrics["pairs/seam_gap"][i], float(seam), 1e-10), name
        assert close(metrics["pairs/segment_gap"][i], float(gap - seam), 1e-10), name
        moved += abs(float(seam)) > 0.1 and abs(float(gap - seam)) > 0.1
    assert moved > 3 if cfg.score_on == "response" else moved == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_margins_and_accuracies_compare_chosen_with_rejected(loss):
    _, m = losses_of(small_model(0), list(kinds().values()), settings(loss=loss), small_model(2))
    assert close(m["rewards/margins"], m["rewards/chosen"] - m["rewards/rejected"], 0)
    assert m["rewards/accuracies"].tolist() == [float(c > r) for c, r in zip(m["rewards/chosen"], m["rewards/rejected"])]
    assert 0 < m["rewards/accuracies"].mean() < 1


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["float32", "bfloat16"])
def test_the_first_dpo_loss_is_ln_2_and_rewards_are_0(autocast):
    cfg = settings(micro_batch=3, batch_size=8)
    state = State.start(small_model(0, torch.float32), cfg, eos=ENDS)
    metrics = sapo_step(state, stream(examples(30)), cfg, autocast)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics["grad_norm"] > 0
    assert [metrics[f"rewards/{k}"] for k in ("chosen", "rejected", "margins")] == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("loudness", [1, 3000])              # the second makes log-probs that are exactly 0 in float32
def test_orpo_is_finite_where_chosen_and_rejected_agree(loudness):
    cfg, model, pairs = settings(loss="orpo"), small_model(0, torch.float32), kinds()
    with torch.no_grad():
        model.lm_head.weight *= loudness
    p = pairs["identical"]
    if loudness > 1:                                         # a pair that the model finds certain
        text = [5, 6]
        for _ in range(6):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        p = Pair(text[:2], text[2:], text[2:], 1, 3, 3)
        assert model(torch.tensor([text]))[0].log_softmax(-1)[1:-1].gather(1, torch.tensor(text)[2:, None]).sum() == 0
    loss, _ = losses_of(model, [p], cfg)
    assert loss.isfinite().all() and gradient(model, loss).isfinite().all()
    assert (loss - losses_of(model, [p], settings(loss="orpo", lam=0.0))[0]).item() == pytest.approx(cfg.lam * math.log(2), abs=1e-5)


@pytest.mark.parametrize("way", ALONE, ids=ALONE_NAMES)
def test_one_micro_batch_equals_four(way):
    pairs, results = list(kinds().values()), []
    for size in (len(pairs), 4):                             # 14 pairs: 4, 4, 4 and 2
        cfg = settings(**way, micro_batch=size)
        state = start(cfg)
        seen = rows_seen(state.policy)
        metrics = accumulate_gradient(state, pairs, cfg)
        assert seen == ([14] if size == 14 else [4, 4, 4, 2])
        results.append((torch.cat([p.grad.flatten() for p in state.policy.parameters()]), metrics))
        for p in pairs:
            p.ref_version = -1
    (one, a), (four, b) = results
    assert close(one, four, 1e-12) and a.pop("bad_rows") == b.pop("bad_rows") and a == pytest.approx(b, abs=1e-12)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_rpo_compares_within_a_micro_batch():
    """The one loss to which micro-batches matter: each y+ meets the y- of its own micro-batch, and where that is one pair it is DPO."""
    pairs, gradients = list(kinds().values()), {}
    order = sorted(pairs, key=lambda p: len(p.prompt + p.chosen + p.rejected))
    for size in (len(pairs), 4, 1):
        cfg = settings(loss="rpo", micro_batch=size)
        state = start(cfg)
        metrics = accumulate_gradient(state, pairs, cfg)
        want = torch.cat([by_hand(state.policy, order[i:i + size], cfg, state.reference) for i in range(0, len(pairs), size)])
        gradients[size] = torch.cat([p.grad.flatten() for p in state.policy.parameters()])
        assert metrics["loss"] == pytest.approx(want.mean().item(), rel=1e-6)
        assert relative(gradients[size], gradient(state.policy, want) / len(pairs)) < 1e-6     # prompt_vectors are float32
    assert relative(gradients[4], gradients[len(pairs)]) > 0.1
    cfg = settings(loss="dpo")
    state = start(cfg)
    accumulate_gradient(state, pairs, cfg)
    assert relative(gradients[1], torch.cat([p.grad.flatten() for p in state.policy.parameters()])) < 1e-12


def test_a_prompts_vector_is_the_mean_of_the_references_embeddings():
    pairs, model = list(kinds().values()), small_model(2)
    vectors = sapo.prompt_vectors(model, pairs)
    assert vectors.shape == (len(pairs), NUMBERS["hidden_size"]) and not vectors.requires_grad
    assert close(vectors, [prompt_by_hand(model, p) for p in pairs], 1e-6)
    assert sapo.prompt_vectors(small_model(2, torch.bfloat16), pairs).dtype == torch.float32
    one = next(p for p in pairs if len(p.prompt) == 1)
    assert close(sapo.prompt_vectors(model, [one])[0], model.model.embed_tokens.weight[one.prompt[0]].detach(), 1e-6)


def displaced():
    """A pair of which DPO, by its first-order effect, lowers both texts: y+ is what the model says anyway, and y- is that but for one token."""
    model, rng = small_model(0), np.random.default_rng(223)
    prompt = tokens(rng, 3)
    text = list(prompt)
    for _ in range(6):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    chosen, at = text[3:], int(rng.integers(1, 5))
    return Pair(prompt, chosen, chosen[:at] + tokens(rng, 1) + chosen[at + 1:])


@pytest.mark.parametrize("nll, rises", [(0.0, False), (1.0, True)])
def test_an_nll_raises_y_plus_where_dpo_alone_lowers_both(nll, rises):
    """DPO asks for a larger gap, which two falling texts give as well (likelihood displacement); the NLL asks for y+ itself."""
    model, pair, size = small_model(0), displaced(), 1e-8
    both = lambda: [sum(logps_by_hand(model, pair.prompt + y, 3, 9)) for y in (pair.chosen, pair.rejected)]
    step = -gradient(model, losses_of(model, [pair], settings(nll=nll), twin(model))[0])
    before = both()
    slopes = [(gradient(model, logp) @ step).item() for logp in before]
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() + size * step
    torch.nn.utils.vector_to_parameters(moved, model.parameters())
    up, down = ((new - old).item() / size for new, old in zip(both(), before))
    assert (up, down) == pytest.approx(slopes, rel=0.01), "a small step does what the gradient says"
    assert up > down and abs(up) > 100
    assert up > 0 if rises else 0 > up


def test_the_gradient_is_that_of_the_mean_loss():
    cfg, pairs = settings(), list(kinds().values())
    state = start(cfg)
    metrics = accumulate_gradient(state, pairs, cfg)
    loss, parts = losses_of(state.policy, pairs, cfg, state.reference)
    got = torch.cat([p.grad.flatten() for p in state.policy.parameters()])
    assert close(got, gradient(state.policy, loss) / len(pairs), 1e-12)
    assert metrics["loss"] == pytest.approx(loss.mean().item(), abs=1e-12)
    assert metrics["rewards/margins"] == pytest.approx(parts["rewards/margins"].mean().item(), abs=1e-12)


def test_an_unknown_loss_is_refused():
    cfg = settings(loss="kto")
    with pytest.raises(ValueError, match="kto"):
        sapo_step(start(cfg), stream(examples(9)), cfg)


# ------------------------------------------------------------------------------------------------ [8] the step

@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_the_policy_moves_against_the_gradient_no_farther_than_the_clip_allows(limit):
    cfg = settings(max_grad_norm=limit, batch_size=6, segment="2")
    state = start(cfg)
    state.optimizer = torch.optim.SGD(state.policy.parameters(), lr=0.7)
    before = weights(state.policy)
    metrics = sapo_step(state, stream(examples(20)), cfg)
    moved = weights(state.policy) - before
    grad = torch.cat([p.grad.flatten() for p in state.policy.parameters()])
    assert metrics["grad_norm"] > 0.1, "and the norm reported is the one before clipping"
    assert moved.norm() == pytest.approx(0.7 * (limit or metrics["grad_norm"]), rel=1e-4)
    assert close(moved, -0.7 * grad, 1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_steps_on_the_same_pairs_lower_the_loss(loss):
    cfg = settings(loss=loss, batch_size=8, buffer_size=8, rejected="data")
    state = start(cfg)
    first, *_, last = [sapo_step(state, stream(examples(8)), cfg)["loss"] for _ in range(5)]
    assert last < 0.8 * first


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_seen():
    cfg = settings(ema_every="1")
    state, draw = start(cfg), stream(examples(20))
    sapo_step(state, draw, cfg)
    policy, ema, moments = weights(state.policy), weights(state.ema), [m["exp_avg"].clone() for m in state.optimizer.state.values()]
    hook = state.policy.model.norm.weight.register_hook(lambda g: g * math.nan)
    metrics = sapo_step(state, draw, cfg)
    assert math.isnan(metrics["grad_norm"]) and "ema/distance" not in metrics
    assert torch.equal(policy, weights(state.policy)) and torch.equal(ema, weights(state.ema))
    assert all(map(torch.equal, moments, [m["exp_avg"] for m in state.optimizer.state.values()]))
    assert state.step == 2
    hook.remove()
    sapo_step(state, draw, cfg)                              # and the next good step goes on
    assert weights(state.policy).isfinite().all() and not torch.equal(policy, weights(state.policy))


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_whose_loss_is_not_finite_are_named(loss):
    cfg, pairs = settings(loss=loss), [p for k, p in kinds().items() if k != "one token against another"]
    state = start(cfg)
    bad = {pairs[3].row, pairs[9].row}
    for p in pairs[3], pairs[9]:
        p.chosen[-2] = 60
    assert [p.row for p in pairs if 60 in p.prompt + p.chosen[:-1] + p.rejected[:-1]] == [pairs[3].row, pairs[9].row]
    with torch.no_grad():
        state.policy.model.embed_tokens.weight[60] = math.nan
    assert set(accumulate_gradient(state, pairs, cfg)["bad_rows"]) == bad
    assert accumulate_gradient(start(cfg), pairs, cfg)["bad_rows"] == []


def test_rpo_names_the_row_that_is_not_finite_and_not_the_rows_it_was_compared_with():
    cfg, pairs = settings(loss="rpo", micro_batch=20), [p for k, p in kinds().items() if k != "one token against another"]
    state = start(cfg)
    pairs[3].rejected[-2] = 60
    assert [p.row for p in pairs if 60 in p.prompt + p.chosen[:-1] + p.rejected[:-1]] == [pairs[3].row]
    with torch.no_grad():
        state.policy.model.embed_tokens.weight[60] = math.nan
    assert accumulate_gradient(state, pairs, cfg)["bad_rows"] == [pairs[3].row]


# ------------------------------------------------------------------------------------------------ [9] the EMA

def test_alpha_weighs_the_old_ema():
    ema, policy = small_model(1), small_model(0)
    old, new = weights(ema), weights(policy)
    distance = ema_update(ema, policy, 0.83)
    moved, turned = (close(weights(ema), share * old + (1 - share) * new, 1e-14) for share in (0.83, 0.17))
    assert moved, f"with alpha 0.83 the EMA is {'0.17 of the old and 0.83 of the new weights' if turned else 'something else'}: alpha weighs the old ones"
    assert bool(torch.equal(weights(policy), new)), "the policy moved"
    assert distance == pytest.approx(float(0.83 * (new - old).norm() / new.norm()), rel=1e-12)


@pytest.mark.parametrize("alpha, source", [(0.0, 0), (1.0, 1)])
def test_alpha_0_copies_and_alpha_1_never_moves(alpha, source):
    ema, policy = small_model(1, torch.float32), small_model(0, torch.float32)
    ema_update(ema, policy, alpha)
    assert torch.equal(weights(ema), weights(small_model(source, torch.float32)))


def test_the_ema_keeps_its_closed_form_over_1000_small_steps():
    alpha, rate, n = 0.97, 5e-7, 1000
    policy = torch.nn.Linear(5, 7)
    torch.nn.init.normal_(policy.weight, 0.0, 0.02, torch.Generator().manual_seed(4))
    torch.nn.init.normal_(policy.bias, 0.0, 0.02, torch.Generator().manual_seed(5))
    first, ema, coarse = weights(policy).double(), twin(policy), twin(policy).bfloat16()
    begin = [p.detach().double() for p in policy.parameters()]
    for step in range(1, n + 1):
        with torch.no_grad():
            for p, p0 in zip(policy.parameters(), begin):
                p.copy_(p0 + step * rate)
        ema_update(ema, policy, alpha)
        for old, new in zip(coarse.parameters(), policy.parameters()):
            old.lerp_(new.detach().bfloat16(), 1 - alpha)
    lag = alpha * (1 - alpha**n) / (1 - alpha)               # in steps: e <- alpha (e + 1)
    want = first + rate * (n - lag)
    assert close(weights(ema), want, 1e-7)
    assert (weights(coarse).double() - want).abs().max() > 1e-5, "an EMA in bfloat16 would be seen"


def test_the_ema_moves_every_k_steps_after_the_optimizer():
    cfg = settings(alpha=0.3, ema_every="3")
    state, draw = start(cfg), stream(examples(30))
    ema = weights(state.ema)
    for step in range(1, 8):
        metrics = sapo_step(state, draw, cfg)
        if step % 3 == 0:
            ema = 0.3 * ema + 0.7 * weights(state.policy)    # the policy as it is after this step
        assert close(weights(state.ema), ema, 1e-13), f"step {step}"
        assert ("ema/distance" in metrics) == (step % 3 == 0)


def test_the_ema_of_an_epoch_moves_at_its_end():
    cfg = settings(ema_every="epoch")
    state, draw = start(cfg, steps_per_epoch=2), stream(examples(30))
    assert ["ema/distance" in sapo_step(state, draw, cfg) for _ in range(5)] == [False, True, False, True, False]


def test_frozen_parameters_stay_shared_and_untouched():
    cfg, policy = settings(ema_every="1"), small_model(0)
    policy.model.embed_tokens.requires_grad_(False)
    state = State.start(policy, cfg, eos=ENDS, lr=0.01)
    frozen, trained = policy.model.embed_tokens.weight.clone(), policy.lm_head.weight.clone()
    assert state.ema.model.embed_tokens.weight is policy.model.embed_tokens.weight
    for _ in range(2):
        sapo_step(state, stream(examples(20)), cfg)
    assert torch.equal(policy.model.embed_tokens.weight, frozen)
    assert not torch.equal(state.ema.lm_head.weight, trained)
    ema = small_model(1)                                            # one that does not share: its frozen parameters are left alone too
    ema_update(ema, policy, 0.4)
    assert torch.equal(ema.model.embed_tokens.weight, small_model(1).model.embed_tokens.weight)


# ------------------------------------------------------------------------------------------------ the reference

def test_the_reference_is_asked_once_about_a_pair():
    cfg, pairs = settings(micro_batch=20), list(kinds().values())
    state = start(cfg)
    seen = rows_seen(state.reference)
    first = accumulate_gradient(state, pairs[:9], cfg)
    assert seen == [9]
    assert accumulate_gradient(state, pairs[:9], cfg) == first and seen == [9]
    accumulate_gradient(state, pairs, cfg)
    assert seen == [9, 5], "only the new ones"


def test_without_keeping_the_reference_is_always_asked():
    cfg, pairs = settings(micro_batch=20), list(kinds().values())
    state = start(cfg, keep_ref=False)
    seen = rows_seen(state.reference)
    assert accumulate_gradient(state, pairs, cfg) == accumulate_gradient(state, pairs, cfg) and seen == [14, 14]


@pytest.mark.parametrize("ref_from", ["ema", "policy"])
def test_after_a_refresh_nothing_of_the_old_reference_is_used(ref_from, monkeypatch):
    cfg = settings(ref_refresh="2", ref_from=ref_from, ema_every="1", batch_size=6, buffer_size=12)
    state, draw, reused = start(cfg), stream(examples(40)), 0
    calls = watch(monkeypatch, state.buffer, "sample")
    for step in range(6):
        reference, known = copy.deepcopy(state.reference), {id(p) for p in state.buffer.pairs if p.ref_version >= 0}
        sapo_step(state, draw, cfg)
        drawn = calls[-1][1]
        reused += step in (2, 4) and sum(id(p) in known for p in drawn)
        chosen, rejected = score(reference, collate(drawn, **scored_tokens(cfg)))
        assert close([p.ref_chosen for p in drawn], chosen, 1e-10) and close([p.ref_rejected for p in drawn], rejected, 1e-10)
    assert reused > 0, "pairs scored before a refresh are drawn after it"


@pytest.mark.parametrize("every, refreshed", [("never", []), ("3", [3, 6]), ("epoch", [4, 8])])
@pytest.mark.parametrize("ref_from", ["ema", "policy"])
def test_the_reference_is_refreshed_when_asked_from_whom_it_was_asked(every, refreshed, ref_from):
    cfg = settings(ref_refresh=every, ref_from=ref_from, ema_every="2")
    state, draw, changed = start(cfg, steps_per_epoch=4), stream(examples(30)), []
    for step in range(1, 9):
        before = weights(state.reference)
        sapo_step(state, draw, cfg)
        if not torch.equal(before, weights(state.reference)):
            changed.append(step)
            assert torch.equal(weights(state.reference), weights(getattr(state, ref_from)))
        assert state.ref_version == len(changed)
    assert changed == refreshed


def test_at_the_start_ema_and_reference_are_copies_of_the_policy_that_do_not_train():
    policy = small_model(3)
    state = State.start(policy, settings(buffer_size=77, replay="inverse-count"), eos=[EOS], lr=0.004)
    for model in (state.ema, state.reference):
        for theirs, mine in zip(model.parameters(), policy.parameters()):
            assert torch.equal(theirs, mine) and theirs.data_ptr() != mine.data_ptr() and not theirs.requires_grad
    assert len({id(policy), id(state.ema), id(state.reference)}) == 3 and state.policy is policy and state.generator is state.ema
    assert all(p.requires_grad for p in policy.parameters())
    assert (len(state.buffer), len(state.ahead), state.step) == (0, 0, 0)
    assert (state.buffer.pairs.maxlen, state.buffer.replay) == (77, "inverse-count")
    assert (state.optimizer.defaults["lr"], state.optimizer.defaults["weight_decay"]) == (0.004, 0.0)


@pytest.mark.parametrize("nll", [0.0, 0.6])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_each_loss_is_finite_and_only_dpo_ipo_and_rpo_have_a_reference(loss, nll):
    cfg = settings(loss=loss, nll=nll)
    state, draw = start(cfg), stream(examples(20))
    before = weights(state.policy)
    for _ in range(3):
        metrics = sapo_step(state, draw, cfg)
        assert all(math.isfinite(v) for k, v in metrics.items() if k != "bad_rows") and not metrics["bad_rows"]
    assert weights(state.policy).isfinite().all() and not torch.equal(before, weights(state.policy))
    asked = loss in losses.WITH_REFERENCE
    assert asked == {"dpo": True, "ipo": True, "rpo": True, "simpo": False, "orpo": False, "slic": False}.get(loss, asked)
    assert (state.reference is not None) == asked == any(p.ref_version == 0 for p in state.buffer.pairs)
    assert ("nll_loss" in metrics) == (loss in ("orpo", "slic") or nll > 0)


# ------------------------------------------------------------------------------------------------ saving

DERIVED = {"generator": "a copy of the EMA, which whoever loads makes anew", "clock": "the seconds of one step"}
SAVED = {       # when a run is saved: its settings, how many steps it has gone, how many pairs are made ahead
    "dpo": (dict(loss="dpo", ref_refresh="3", ema_every="2"), 8, 0),
    "dpo, pairs ahead": (dict(loss="dpo", ref_refresh="3", ema_every="4", buffer_size=9), 6, 8),
    "orpo, inverse-count": (dict(loss="orpo", ema_every="3", replay="inverse-count"), 4, 8),
    "adapters": (dict(loss="dpo", ref_refresh="3", ema_every="4"), 6, 8),
    "before the first step": (dict(loss="dpo"), 0, 0)}


def saving(cfg, case, stranger=False):
    """A State that has yet to take a step. A stranger has other weights, random numbers and steps, yet the same frozen ones."""
    if case == "adapters":
        policy = add_lora(small_model(0), 3, 7.5, torch.Generator().manual_seed(4))
    else:
        policy = small_model(7 if stranger else 0)
    state = State.start(policy, cfg, eos=ENDS, seed=99 if stranger else 5, lr=0.01, generator=twin(policy).float(),
                        steps_per_epoch=4, optimizer=torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01))
    for i, model in enumerate(state.models().values()):
        with torch.no_grad():
            for p in own_parameters(model).values():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * stranger + i), dtype=p.dtype))
    if stranger:
        state.step, state.ref_version = 1234, 56
        state.ahead.append(kinds()["plain"])
        state.buffer.add(kinds()["long"])
    sapo.copy_parameters(state.generator, state.ema)
    return state


@torch.no_grad()
def fill(state, saved):
    """What machine/checkpoint.py does with what `state_dict` gave: weights, moments by name, the rest by load_state_dict."""
    for name, model in state.models().items():
        parameters = own_parameters(model)
        assert saved[name].keys() == parameters.keys()
        for key, tensor in saved[name].items():
            parameters[key].copy_(tensor)
    names = [name for name, p in state.policy.named_parameters() if p.requires_grad]
    moments = {i: saved["optimizer"][name] for i, name in enumerate(names) if name in saved["optimizer"]}
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": moments})
    state.load_state_dict(saved)
    sapo.copy_parameters(state.generator, state.ema)
    return state


def contents(value):
    """Everything that a value holds, as plain data that can be compared with ==; it knows no kind of value it was not told of."""
    if isinstance(value, torch.nn.Module):
        return {name: contents(p) for name, p in value.named_parameters()}
    if isinstance(value, torch.optim.Optimizer):
        return contents(value.state_dict())
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, np.random.Generator):
        return contents(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return contents(value.get_state())
    if isinstance(value, Pair):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (ReplayBuffer, sapo.Clock)):
        return {name: contents(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: contents(v) for k, v in value.items()}
    if hasattr(value, "maxlen"):
        return value.maxlen, [contents(v) for v in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [contents(v) for v in value]
    assert value is None or type(value) in (bool, int, float, str), f"say here how to compare a {type(value).__name__}"
    return value


def fields_of(state):
    """{name: contents} of all that a State holds, fields or not."""
    return {name: contents(value) for name, value in vars(state).items()}


def stream_from(at):
    """draw(n), of which `at` rows were drawn already."""
    rows = itertools.islice(itertools.cycle(examples(23)), at, None)
    return lambda n: list(itertools.islice(rows, n))


def untimed(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "gen/tokens"))}


@pytest.mark.parametrize("case", SAVED)
def test_a_state_goes_on_bit_for_bit_from_its_state_dict(case):
    """A fresh State with other weights, random numbers and capacity, filled from it, takes the same steps as the one that was saved."""
    change, steps, ahead = SAVED[case]
    cfg = settings(**change)
    one, two = saving(cfg, case), saving(settings(**change | {"buffer_size": 3}), case, stranger=True)
    draw = stream_from(0)
    for _ in range(steps):
        sapo_step(one, draw, cfg)
    assert len(one.ahead) == ahead
    fill(two, copy.deepcopy(one.state_dict()))
    draws = draw, stream_from(cfg.batch_size * two.step + len(two.ahead))
    for step in range(3):
        ours, theirs = (untimed(sapo_step(state, rows, cfg)) for state, rows in zip((one, two), draws))
        assert ours == theirs, f"step {step + 1} after loading"
        assert torch.equal(weights(one.policy), weights(two.policy)) and torch.equal(weights(one.ema), weights(two.ema))
        assert list(one.buffer.pairs) == list(two.buffer.pairs) and list(one.ahead) == list(two.ahead)
    assert one.ref_version == two.ref_version and (one.reference is None or torch.equal(weights(one.reference), weights(two.reference)))


@pytest.mark.parametrize("case", SAVED)
def test_whatever_a_step_changes_is_saved_or_derived(case):
    """All that a State holds is walked: what changes in a step must come back, so nothing that is added can be forgotten."""
    change, steps, ahead = SAVED[case]
    cfg = settings(**change)
    one, two = saving(cfg, case), saving(settings(**change | {"buffer_size": 3}), case, stranger=True)
    before, draw = fields_of(one), stream_from(0)
    for _ in range(steps):
        sapo_step(one, draw, cfg)
    fill(two, copy.deepcopy(one.state_dict()))
    after, loaded = fields_of(one), fields_of(two)
    changed = {name for name in after if after[name] != before.get(name)}
    assert set(after) == {f.name for f in dataclasses.fields(State)}, "a step makes nothing that is not a field"
    if steps:
        ours = {"policy", "ema", "generator", "optimizer", "buffer", "cut_rng", "sample_rng", "step", "clock"}
        expected = ours | ({"reference", "ref_version"} if cfg.loss == "dpo" else set()) | ({"ahead"} if ahead else set())
        assert changed >= expected, "else the run proves nothing"
    lost = {name for name in after if after[name] != loaded[name]} - DERIVED.keys()
    assert not lost, f"state_dict and load_state_dict forget {sorted(lost)}"
    same = {k: v for k, v in after.items() if k != "clock"} == {k: v for k, v in loaded.items() if k != "clock"}
    assert same, "and the generator is the EMA's copy in both"


def test_a_saved_state_names_moments_by_parameter_and_holds_the_adapters_alone():
    cfg = settings()
    full, adapted = saving(cfg, "dpo"), saving(cfg, "adapters")
    for state in (full, adapted):
        sapo_step(state, stream_from(0), cfg)
        saved = state.state_dict()
        trained = {name for name, p in state.policy.named_parameters() if p.requires_grad}
        assert saved.keys() == {"policy", "ema", "reference", "optimizer", "shared", "own"}
        assert saved["optimizer"].keys() == trained == set(named_moments(state.policy, state.optimizer))
        for name, p in state.policy.named_parameters():
            if p.requires_grad:
                assert saved["optimizer"][name]["exp_avg"] is state.optimizer.state[p]["exp_avg"]
    assert full.state_dict()["policy"].keys() == {name for name, _ in full.policy.named_parameters()}
    assert {name.rpartition(".")[2] for name in adapted.state_dict()["ema"]} == {"lora_A", "lora_B"}


def test_the_default_optimizer_has_what_is_trained_alone():
    policy = add_lora(small_model(0), 3, 7.5, torch.Generator().manual_seed(4))
    state = State.start(policy, settings(), ENDS)
    sapo_step(state, stream_from(0), settings())
    assert state.state_dict()["optimizer"].keys() == {name for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_generator_of_its_own_follows_the_ema(dtype, monkeypatch):
    """After each step it is the EMA in its own dtype, and it generates, not the EMA."""
    cfg = settings(ema_every="2", generate_ahead=1)
    state = start(cfg, generator=small_model(5, dtype))
    sapo.copy_parameters(state.generator, state.ema)
    calls, draw = watch(monkeypatch, sapo, "generate"), stream(examples(9))
    before = weights(state.generator)
    for step in range(1, 5):
        sapo_step(state, draw, cfg)
        assert torch.equal(weights(state.generator), weights(state.ema).to(dtype))
        assert torch.equal(before, weights(state.generator)) == (step == 1)
    assert len(calls) == 4 and all(arguments[0] is state.generator for arguments, _ in calls)


# ------------------------------------------------------------------------------------------------ small things

@pytest.mark.parametrize("every, steps", [("never", 0), ("epoch", 17), ("5", 5)])
def test_a_period_is_a_number_of_steps(every, steps):
    assert sapo.period(every, start(settings(), steps_per_epoch=17)) == steps


@pytest.mark.parametrize("every, step, left", [("1", 0, 1), ("1", 9, 1), ("5", 0, 5), ("5", 4, 1), ("5", 5, 5), ("epoch", 20, 14), ("epoch", 33, 1)])
def test_steps_until_the_next_update(every, step, left):
    state = start(settings(), steps_per_epoch=17)
    state.step = step
    assert [sapo.steps_ahead(state, settings(ema_every=every, generate_ahead=most)) for most in (99, 3, 1)] == [left, min(left, 3), 1]


def test_cuts_texts_and_draws_each_follow_the_seed():
    def first_numbers(seed):
        state = start(settings(), seed=seed)
        return [state.cut_rng.integers(2**60), torch.randint(2**60, (1,), generator=state.sample_rng).item(), state.buffer.rng.integers(2**60)]

    one, same, other = map(first_numbers, (6, 6, 7))
    assert one == same and not any(a == b for a, b in zip(one, other))


def test_the_same_seed_gives_the_same_run():
    cfg, ends = settings(), []
    for _ in range(2):
        state, draw = start(cfg, seed=6), stream(examples(30))
        for _ in range(3):
            sapo_step(state, draw, cfg)
        ends.append(weights(state.policy))
    assert torch.equal(*ends)


def test_metrics_have_the_names_that_trl_users_know():
    common = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
              "pairs/identical", "pairs/segment_gap", "pairs/seam_gap", "buffer/size", "buffer/staleness", "buffer/uses", "gen/eos_fraction", "gen/tokens_per_second", "ema/distance",
              "time/generate", "time/train", "bad_rows"}
    for loss, more in (("dpo", set()), ("orpo", {"nll_loss", "log_odds_ratio"}), ("slic", {"nll_loss"}),
                       ("ipo", set()), ("rpo", set()), ("simpo", set())):
        cfg = settings(loss=loss, ema_every="1")
        metrics = sapo_step(start(cfg), stream(examples(9)), cfg)
        assert common | more <= set(metrics)
        assert all(type(v) in (int, float) and math.isfinite(v) for k, v in metrics.items() if k != "bad_rows")


def test_reading_the_prompts_and_writing_are_timed_apart():
    """One pass over all prompts, then one for each further token of the longest budget."""
    model, laps, passes = small_model(0), [], []
    model.register_forward_hook(lambda *_: passes.append(list(laps)))
    generate(model, [[5, 6, 7], [8]], [4, 6], temperature=0, lap=laps.append)
    assert laps == ["prefill", "decode"] and passes == [[]] + [["prefill"]] * 5


def test_a_steps_time_is_for_writing_or_training_or_the_data(monkeypatch):
    """By a clock that goes on by one second whenever it is read, so each lap takes one."""
    monkeypatch.setattr(sapo.time, "perf_counter", itertools.count().__next__)
    cfg = settings(ema_every="2", generate_ahead=2, batch_size=4, micro_batch=2)
    state, draw = start(cfg), stream(examples(20))
    writing, reading = (sapo_step(state, draw, cfg) for _ in range(2))
    stages = {"reference": 2, "forward": 2, "backward": 2, "optimizer": 1, "ema": 1}
    assert {k: v for k, v in writing.items() if k.startswith("time/")} == {
        f"time/{k}": v for k, v in (stages | {"data": 4, "prefill": 1, "decode": 1, "generate": 2, "train": 8}).items()}
    assert {k: v for k, v in reading.items() if k.startswith("time/")} == {
        f"time/{k}": v for k, v in (stages | {"data": 3, "generate": 0, "train": 8}).items()}
    written = sum(p.rejected_stop - p.start for p in state.buffer.pairs)
    assert writing["gen/tokens_per_second"] == written / 2 and "gen/tokens_per_second" not in reading


def test_a_lap_lasts_from_the_lap_before(monkeypatch):
    """So the stages of a step make up the whole of it, and `start` forgets the step before."""
    clock, seconds = sapo.Clock(), itertools.accumulate([3, 1, 2, 4, 8, 5])
    monkeypatch.setattr(sapo.time, "perf_counter", seconds.__next__)
    clock.start()
    for stage in ("data", "forward", "data"):
        clock.lap(stage)
    assert clock.seconds == {"data": 1 + 4, "forward": 2}
    clock.start()
    clock.lap("forward")
    assert clock.seconds == {"forward": 5}


def test_the_five_lines_of_the_docstring_run(tmp_path, capsys):
    save_pretrained(small_model(0), tmp_path / "folder", torch.float32)
    code = inspect.cleandoc(sapo.__doc__.split("a run is five lines:")[1])
    assert len(code.splitlines()) == 5
    for old, new in (('"folder"', repr(str(tmp_path / "folder"))), ("...]", "*more]"), ("range(100)", "range(3)")):
        assert old in code
        code = code.replace(old, new)
    names = dict(vars(sapo), load_pretrained=load_pretrained, random=random, more=examples(20))
    random.seed(1)
    exec(code, names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
