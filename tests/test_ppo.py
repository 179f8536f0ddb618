"""PPO as a tool: its equations against loops of floats, its clip and its baseline by what they do, and a whole small run.

Oracles: equation 7 of arXiv 1707.06347 one float at a time, with the derivative written by hand; the KL of two known
distributions; a reward whose best answers are known.
"""

import functools
import json
import math

import pytest
import torch

import measure
import ppo
from conftest import small_model
from machine.flags import DATA
from machine.folders import companions, load_pretrained, read_config, save_pretrained
from model import Transformer, twin
from sapo import Example

CLIP = 0.2


def loop(logps, old, advantages):
    """Equation 7 token by token in Python's floats: its value, and its derivative with respect to log pi."""
    values, slopes = [], []
    for now, before, advantage in zip(logps, old, advantages):
        ratio = math.exp(now - before)
        held = min(max(ratio, 1 - CLIP), 1 + CLIP)
        values.append(min(ratio * advantage, held * advantage))
        slopes.append(ratio * advantage if ratio * advantage <= held * advantage else 0.0)     # d r / d log pi = r
    return values, slopes


def slope(logps, old, advantages):
    """(value, whether clipped, derivative with respect to logps) of `surrogate` on plain lists, a token a row."""
    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]
    logps = column(logps).requires_grad_()
    value, clipped = ppo.surrogate(logps, column(old), column(advantages), CLIP)
    value.sum().backward()
    return value[:, 0].tolist(), clipped[:, 0].tolist(), logps.grad[:, 0].tolist()


def test_the_surrogate_and_its_gradient_are_what_a_loop_of_floats_says():
    rng = torch.Generator().manual_seed(0)
    old = (-3 * torch.rand(400, generator=rng, dtype=torch.float64)).tolist()
    moved = [o + d for o, d in zip(old, (0.4 * torch.randn(400, generator=rng, dtype=torch.float64)).tolist())]
    advantages = torch.randn(400, generator=rng, dtype=torch.float64).tolist()
    value, clipped, gradient = slope(moved, old, advantages)
    values, slopes = loop(moved, old, advantages)
    assert value == pytest.approx(values, rel=1e-12) and gradient == pytest.approx(slopes, rel=1e-12)
    assert clipped == [s == 0 for s in slopes] and 50 < sum(clipped) < 350


@pytest.mark.parametrize("advantage, ratio, stops", [
    (1.0, 1.3, True), (1.0, 0.7, False), (-1.0, 0.7, True), (-1.0, 1.3, False), (1.0, 1.1, False), (-1.0, 0.9, False)])
def test_the_gradient_stops_where_the_ratio_has_gone_far_enough_and_not_where_it_went_the_wrong_way(advantage, ratio, stops):
    _, clipped, gradient = slope([math.log(ratio)], [0.0], [advantage])
    assert clipped == [stops] and gradient == pytest.approx([0.0 if stops else ratio * advantage])


def test_advantages_of_a_group_sum_to_0_whatever_the_rewards_level():
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages = ppo.group_advantages(rewards)
    assert advantages.sum(1).tolist() == pytest.approx([0.0] * 6, abs=1e-12)
    assert torch.allclose(ppo.group_advantages(rewards + 100), advantages)
    assert advantages.square().mean(1).tolist() == pytest.approx([1.0] * 6, rel=1e-2)
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))


def test_the_kl_estimator_is_never_negative_and_is_the_kl_on_average():
    pi, reference = (torch.randn(50, generator=torch.Generator().manual_seed(i), dtype=torch.float64).log_softmax(-1) for i in (0, 1))
    each = ppo.kl_penalty(pi, reference)
    assert (each >= 0).all() and (each > 0).any() and (ppo.kl_penalty(pi, pi) == 0).all()
    assert (pi.exp() * each).sum().item() == pytest.approx((pi.exp() * (pi - reference)).sum().item())
    tiny = torch.tensor([0.0, 1e-4, -1e-4])              # float32, where exp(x) - 1 - x would be noise
    assert (ppo.kl_penalty(tiny, torch.zeros(3)) >= 0).all()


def toy(reward, steps=1, seed=0, **settings):
    """`steps` steps of a small float32 model: (policy, metrics of each, (log-probs now, then, advantages) of each update)."""
    policy = small_model(0, torch.float32)
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.3)                  # flat enough to find something new
    s = ppo.Settings(group=8, tokens=8, minibatch=16, **{"epochs": 4, "beta": 0.0, "lr": 3e-3} | settings)
    optimizer, rng = torch.optim.Adam(policy.parameters(), s.lr), torch.Generator().manual_seed(seed)
    examples, reference = [Example([5, 20 + i], [], None, i) for i in range(4)], twin(policy)
    surrogate, seen = ppo.surrogate, []

    def spy(now, old, advantages, clip):
        seen.append((now.detach().clone(), old, advantages))
        return surrogate(now, old, advantages, clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "surrogate", spy)
        lines = [ppo.ppo_step(policy, reference, optimizer, examples, reward, s, [], rng) for _ in range(steps)]
    return policy, lines, seen


def small_ids(example, answer):
    """The share of an answer's tokens that are among the first twelve of 61."""
    return sum(token < 12 for token in answer) / len(answer)


def test_the_ratio_is_exactly_1_at_the_first_minibatch_and_moves_later():
    _, (metrics,), seen = toy(small_ids)
    assert len(seen) == 4 * 2, "epochs times minibatches"
    assert torch.equal(seen[0][0], seen[0][1]) and not any(torch.equal(now, old) for now, old, _ in seen[1:])
    assert metrics["kl"] == 0 and metrics["clipped"] > 0.1
    assert metrics["generated"] == 32 * 8 and metrics["trained"] == 4 * 32 * (2 + 8)


def test_an_answer_trains_on_its_own_advantage():
    """Tokens of an answer with a reward above its group's become more likely on average, those below less."""
    _, _, seen = toy(lambda example, answer: answer[0] < 30, epochs=6, lr=1e-3)
    for now, old, advantages in seen[-2:]:
        change = (now - old).sum(1)
        assert change[advantages[:, 0] > 0].mean() > 0.1 and change[advantages[:, 0] < 0].mean() < -0.1


def test_groups_of_equal_rewards_teach_nothing():
    policy, (metrics,), seen = toy(lambda example, answer: float(example.row % 2))
    start, _, _ = toy(small_ids, steps=0)
    assert metrics["reward"] == 0.5 and all((advantages == 0).all() for _, _, advantages in seen)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters()))


@pytest.mark.parametrize("level", [0, 5])
def test_a_toy_reward_is_learned_whatever_its_level(level):
    """Without the baseline, a reward of 5 and a little pulls up whatever was drawn, and nothing is learned."""
    _, lines, _ = toy(lambda example, answer: level + small_ids(example, answer), steps=15)
    first, last = lines[0]["reward"] - level, lines[-1]["reward"] - level
    assert first < 0.3 and last > 0.7
    assert toy(lambda example, answer: level + small_ids(example, answer), steps=2)[1] == lines[:2], "the same again"


def test_one_batch_moves_its_answers_only_so_far_however_many_epochs():
    """The clip takes each token's reason to go farther away; what others push still moves it. Unclipped it is 10 times as far."""
    _, _, seen = toy(small_ids, epochs=30)
    far = [((now - old).exp() - 1).abs().mean().item() for now, old, _ in seen[-2:]]
    assert 0.2 < max(far) < 1.5


def test_the_kl_penalty_holds_the_policy_back():
    free, held = (toy(small_ids, steps=8, beta=beta)[1][-1] for beta in (0.0, 1.0))
    assert held["kl"] < free["kl"] / 2


def test_a_run_writes_its_numbers_and_a_model_and_repeats(tmp_path, monkeypatch, capsys):
    start = Transformer(read_config(DATA / "tiny_model")).init_weights(torch.Generator().manual_seed(0))
    save_pretrained(start, tmp_path / "base", torch.float32, companions(DATA / "tiny_model"))
    monkeypatch.setattr(ppo, "passes", lambda answer, verifier: len(answer) % 2)         # which noise passes now and then
    monkeypatch.setattr(measure, "rows_of", functools.partial(measure.rows_of, rows=4))
    texts = []
    for name in ("one", "two"):
        ppo.main(["--model", str(tmp_path / "base"), "--out", str(tmp_path / name), "--steps", "2", "--prompts", "2",
                  "--group", "4", "--epochs", "1", "--tokens", "8", "--lr", "0.001"])
        texts.append((tmp_path / name / "metrics.jsonl").read_text("utf-8"))
    assert texts[0] == texts[1]
    *lines, table = map(json.loads, texts[0].splitlines())
    assert len(lines) == 2 and set(table) == {"start", "after"} and "verifier/greedy" in capsys.readouterr().out
    trained = load_pretrained(tmp_path / "one/model")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
