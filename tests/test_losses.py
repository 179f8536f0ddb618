"""The losses: against a loop of Python floats, against TRL, and where float32 runs out of digits."""

import math
import random

import pytest
import torch

import losses
from buffer import Pair, collate
from conftest import oracle, random_texts, small_hf_model
from losses import (
    IGNORE,
    dpo_loss,
    ipo_loss,
    log1mexp,
    log_odds,
    orpo_loss,
    preference_loss,
    rpo_loss,
    score,
    scored_tokens,
    simpo_loss,
    slic_loss,
    token_logps,
)
from machine.folders import load_pretrained
from sapo import SAPOConfig

EDGES = [0.0, -1e-12, -1e-8, -1e-4, -math.log(2), -1.0, -50.0, -1e4]      # mean log-probs


def logsigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def some_logps(n, seed, low=-6.0, high=-0.01):
    rng = random.Random(seed)
    return [rng.uniform(low, high) for _ in range(n)]


def tensors(*lists, dtype=torch.float64):
    return [torch.tensor(x, dtype=dtype) for x in lists]


# ---------------------------------------------------------------- DPO

def test_dpo_is_what_a_loop_of_floats_says():
    beta, rows = 0.37, list(zip(*(some_logps(9, seed, -80, 0) for seed in range(4))))
    loss, up, down = dpo_loss(*tensors(*zip(*rows)), beta)
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(rows):
        assert up[i].item() == pytest.approx(beta * (chosen - ref_chosen), abs=1e-12)
        assert down[i].item() == pytest.approx(beta * (rejected - ref_rejected), abs=1e-12)
        assert loss[i].item() == pytest.approx(-logsigmoid(beta * (chosen - ref_chosen - rejected + ref_rejected)), rel=1e-12)


def test_the_first_dpo_loss_is_ln_2():
    """The policy is its own reference then, whatever the texts and whatever beta."""
    chosen, rejected = tensors(some_logps(5, 1), some_logps(5, 2))
    loss, up, down = dpo_loss(chosen, rejected, chosen, rejected, beta=0.7)
    assert torch.allclose(loss, torch.full_like(loss, math.log(2)), atol=1e-15) and not up.any() and not down.any()


def test_dpo_falls_as_the_margin_grows():
    chosen = torch.linspace(-300, 300, 61, dtype=torch.float64)
    loss = dpo_loss(chosen, *tensors([-3.0], [-5.0], [-4.0]), beta=0.1)[0]
    falls = bool((loss.diff() < 0).all())
    assert falls, f"as y+ gains 600 nats on y-, the loss goes from {loss[0]:.3g} to {loss[-1]:.3g}: it must fall"


def test_the_dpo_gradient_raises_chosen_and_lowers_rejected_alike():
    chosen, rejected = (x.requires_grad_() for x in tensors(some_logps(6, 3), some_logps(6, 4)))
    dpo_loss(chosen, rejected, *tensors(some_logps(6, 5), some_logps(6, 6)), beta=0.3)[0].sum().backward()
    assert (chosen.grad < 0).all() and torch.allclose(rejected.grad, -chosen.grad)


def test_the_dpo_gradient_is_beta_times_how_wrong_the_margin_is():
    """DPO, the equation after 7: beta sigmoid(rejected reward - chosen reward)."""
    beta, (chosen, rejected, ref) = 0.45, tensors(some_logps(6, 7), some_logps(6, 8), some_logps(6, 9))
    chosen.requires_grad_()
    loss, up, down = dpo_loss(chosen, rejected, ref, 2 * ref, beta)
    loss.sum().backward()
    assert torch.allclose(-chosen.grad, beta * torch.sigmoid(down - up))


def test_dpo_stays_finite_at_any_margin():
    chosen = torch.tensor([-1e6, 0.0, 1e6], requires_grad=True)
    loss = dpo_loss(chosen, -chosen.detach(), torch.zeros(3), torch.zeros(3), beta=2.0)[0]
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


# ---------------------------------------------------------------- IPO

def test_ipo_is_what_a_loop_of_floats_says():
    beta, rows = 0.37, list(zip(*(some_logps(9, seed) for seed in range(4))))
    loss, up, down = ipo_loss(*tensors(*zip(*rows)), beta)
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(rows):
        assert up[i].item() == pytest.approx(beta * (chosen - ref_chosen), abs=1e-12)
        assert down[i].item() == pytest.approx(beta * (rejected - ref_rejected), abs=1e-12)
        assert loss[i].item() == pytest.approx(((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2, abs=1e-12)


def gaps_after(loss, steps, gaps):
    """Where gradient descent on the log-probs themselves brings these gaps, log pi/ref (y+) - log pi/ref (y-)."""
    ref_chosen, ref_rejected = tensors(some_logps(len(gaps), 5), some_logps(len(gaps), 6))
    chosen, rejected = ref_chosen + torch.tensor(gaps, dtype=torch.float64), ref_rejected.clone()
    for _ in range(steps):
        both = chosen.requires_grad_(), rejected.requires_grad_()
        up, down = torch.autograd.grad(loss(*both, ref_chosen, ref_rejected)[0].sum(), both)
        chosen, rejected = (chosen - 0.1 * up).detach(), (rejected - 0.1 * down).detach()
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def test_ipo_draws_the_gap_to_1_over_2_beta_from_both_sides():
    """And there it stays, where DPO's grows on: slower and slower, but without end."""
    beta, gaps = 0.4, [-3.0, 0.0, 1.25, 2.0, 9.0]
    after = gaps_after(lambda *logps: ipo_loss(*logps, beta), 100, gaps)
    assert torch.allclose(after, torch.full_like(after, 1 / (2 * beta)), atol=1e-12)
    dpo = [gaps_after(lambda *logps: dpo_loss(*logps, beta), steps, gaps) for steps in (0, 100, 1000)]
    assert (dpo[1] > dpo[0]).all() and (dpo[2] > dpo[1] + 0.5).all() and (dpo[2] > 1 / (2 * beta)).all()


# ---------------------------------------------------------------- RPO

def some_prompts(n, seed=0, size=5):
    rng = random.Random(seed)
    return [[rng.gauss(0, 3) for _ in range(size)] for _ in range(n)]


def nearness(prompts, tau):
    """RPO's weights as lists: row i is exp((cos(x_i, x_j) - 1) / tau) over its own sum."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))
    rows = [[math.exp((dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) - 1) / tau) for b in prompts] for a in prompts]
    return [[value / sum(row) for value in row] for row in rows]


def test_rpo_is_what_a_loop_of_floats_says():
    beta, tau, n = 0.37, 0.4, 7
    rows, prompts = list(zip(*(some_logps(n, seed, -80, 0) for seed in range(4)))), some_prompts(n)
    loss, up, down = rpo_loss(*tensors(*zip(*rows)), *tensors(prompts), beta, tau)
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(rows):
        mine, total = beta * (chosen - ref_chosen), 0.0
        assert up[i].item() == pytest.approx(mine, abs=1e-12)
        assert down[i].item() == pytest.approx(beta * (rejected - ref_rejected), abs=1e-12)
        for weight, (_, other, _, ref_other) in zip(nearness(prompts, tau)[i], rows):
            total -= logsigmoid(weight * (mine - beta * (other - ref_other)))
        assert loss[i].item() == pytest.approx(total / n, rel=1e-12)


def test_rpo_of_one_pair_is_dpo():
    for i, row in enumerate(zip(*(some_logps(6, seed, -80, 0) for seed in range(4)))):
        logps = tensors(*([value] for value in row))
        one, dpo = rpo_loss(*logps, *tensors(some_prompts(1, i)), 0.37, 0.4), dpo_loss(*logps, 0.37)
        assert all(torch.equal(a, b) for a, b in zip(one, dpo, strict=True))


@pytest.mark.parametrize("tau", [0.05, 0.5, 100.0])
def test_each_row_of_rpos_weights_sums_to_1(tau):
    """The weights as the gradient shows them: where policy and reference agree, dL_i / d log pi(y-_j) is beta w_ij / 2n."""
    beta, n, prompts = 0.37, 6, some_prompts(6)
    chosen, rejected = tensors(some_logps(n, 1), some_logps(n, 2))
    slopes = torch.autograd.functional.jacobian(lambda x: rpo_loss(chosen, x, chosen, rejected, *tensors(prompts), beta, tau).value, rejected)
    weights = slopes * 2 * n / beta
    assert torch.allclose(weights.sum(1), torch.ones(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(weights, *tensors(nearness(prompts, tau)), atol=1e-12)
    assert (weights.argmax(1) == torch.arange(n)).all(), "no prompt is nearer than one's own"
    if tau == 100:
        assert weights.std() < 0.01, "to a high temperature all prompts are alike"


def test_a_prompt_that_comes_twice_weighs_as_much_as_ones_own():
    prompts = some_prompts(4)
    prompts[3] = [2.5 * x for x in prompts[1]]           # of the same direction: the cosine does not see lengths
    zeros = torch.zeros(4, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda x: rpo_loss(zeros, x, zeros, zeros, *tensors(prompts), 1.0, 0.3).value, zeros)
    assert slopes[1, 3].item() == pytest.approx(slopes[1, 1].item(), rel=1e-12)
    assert torch.allclose(slopes[1], slopes[3]) and slopes[0, 0] > 1.5 * slopes[0, 1]


def test_rpos_weights_are_float32_under_autocast():
    logps, prompts = tensors(*(some_logps(8, seed, -120, -40) for seed in range(4)), dtype=torch.float32), some_prompts(8, size=256)
    prompts, = tensors([[x + 3 for x in prompt] for prompt in prompts], dtype=torch.float32)
    want = rpo_loss(*logps, prompts, 0.37, 0.1).value
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(rpo_loss(*logps, prompts, 0.37, 0.1).value, want, rtol=1e-6, atol=0)


def test_chunks_do_not_add_up_the_heads_gradient_in_bfloat16():
    rng = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(256, size, generator=rng) for size in (16, 16))
    labels, gradients = torch.randint(0, 256, (256,), generator=rng), {}
    for chunk, dtype in [(0, torch.float64), (0, torch.float32), (4, torch.float32)]:
        for keep in (0, 256):
            w = weight.to(dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                token_logps(hidden.to(dtype), w, labels, chunk, keep).sum().backward()
            gradients[chunk, dtype, keep] = w.grad.double()
    exact = gradients.pop((0, torch.float64, 0))
    del gradients[0, torch.float64, 256]
    errors = {key: (g - exact).norm().item() for key, g in gradients.items()}
    whole = errors.pop((0, torch.float32, 0))
    assert whole > 0 and max(errors.values()) < 1.2 * whole, (whole, errors)


# ---------------------------------------------------------------- SimPO

def test_simpo_is_what_a_loop_of_floats_says():
    beta, gamma, rows = 2.3, 0.9, list(zip(some_logps(9, 1), some_logps(9, 2)))
    loss, up, down = simpo_loss(*tensors(*zip(*rows)), beta, gamma)
    for i, (chosen, rejected) in enumerate(rows):
        assert (up[i].item(), down[i].item()) == pytest.approx((beta * chosen, beta * rejected), rel=1e-12)
        assert loss[i].item() == pytest.approx(-logsigmoid(beta * chosen - beta * rejected - gamma), rel=1e-12)


def test_simpo_asks_for_its_margin():
    """A reward margin of gamma costs ln 2, as no margin does in DPO; more costs less."""
    beta, gamma = 2.0, 1.2
    rejected = torch.tensor([-2.0], dtype=torch.float64)
    less, enough, more = (simpo_loss(rejected + (gamma + extra) / beta, rejected, beta, gamma).value.item() for extra in (-0.3, 0, 0.3))
    assert enough == pytest.approx(math.log(2), abs=1e-15) and more < enough < less


# ---------------------------------------------------------------- ORPO

def test_orpo_is_what_a_loop_of_floats_says():
    lam, rows = 0.23, list(zip(some_logps(9, 1, 0.1, 5), some_logps(9, 2), some_logps(9, 3)))
    loss, up, down = orpo_loss(*tensors(*zip(*rows)), lam)
    for i, (nll, chosen, rejected) in enumerate(rows):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen, rejected)]
        assert loss[i].item() == pytest.approx(nll - lam * logsigmoid(math.log(odds[0] / odds[1])), rel=1e-9)
        assert (up[i].item(), down[i].item()) == pytest.approx((lam * chosen, lam * rejected))


def test_orpo_without_lam_is_supervised_fine_tuning():
    nll, chosen, rejected = (x.requires_grad_() for x in tensors(some_logps(4, 1, 0, 3), some_logps(4, 2), some_logps(4, 3)))
    loss, *_ = orpo_loss(nll, chosen, rejected, lam=0)
    loss.sum().backward()
    assert torch.equal(loss, nll) and (nll.grad == 1).all() and not chosen.grad.any() and not rejected.grad.any()


def test_the_orpo_gradient_raises_chosen_and_lowers_rejected():
    nll, chosen, rejected = tensors([1.0] * 6, some_logps(6, 3), some_logps(6, 4))
    orpo_loss(nll, chosen.requires_grad_(), rejected.requires_grad_(), lam=0.3)[0].sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize("rejected", EDGES)
@pytest.mark.parametrize("chosen", EDGES)
def test_orpo_is_finite_in_float32(chosen, rejected):
    """Values and gradients, also where both texts are certain (log-prob 0) or nearly agree: the regime SAPO lives in."""
    nll, chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-chosen, chosen, rejected))
    loss, *_ = orpo_loss(nll, chosen, rejected, lam=0.5)
    loss.sum().backward()
    assert all(x.isfinite().all() for x in (loss, chosen.grad, rejected.grad))


@pytest.mark.parametrize("x", EDGES)
def test_log_odds_are_finite_in_float32(x):
    logp = torch.tensor([x], requires_grad=True)
    value = log_odds(logp)
    value.sum().backward()
    assert value.isfinite().all() and logp.grad.isfinite().all() and logp.grad >= 0


def test_log_odds_are_those_of_the_probability():
    p = torch.tensor([0.999, 0.75, 0.5, 0.2, 1e-9], dtype=torch.float64)
    assert torch.allclose(log_odds(p.log()), torch.logit(p), atol=1e-12)


@pytest.mark.parametrize("x", [-1e-11, -1e-8, -1e-4, -0.1, -0.5, -0.69, -0.6931, -0.69315, -0.7, -1.0, -2.0, -10.0, -16.0, -40.0])
def test_log1mexp_keeps_its_digits_in_float32(x):
    x = torch.tensor(x).item()                           # the float32 nearest to x
    exact = math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x)).item() == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.3, -0.69, -0.7, -3.0, -30.0])
def test_the_gradient_of_log1mexp_is_right_on_both_sides_of_ln_2(x):
    logp = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    log1mexp(logp).backward()
    assert logp.grad.item() == pytest.approx(1 / -math.expm1(-x), rel=1e-9)     # d/dx log(1 - e^x) = 1 / (1 - e^-x)


# ---------------------------------------------------------------- SLiC

def test_slic_is_what_a_loop_of_floats_says():
    delta, lam, rows = 1.7, 0.23, list(zip(some_logps(40, 1, 0.1, 5), some_logps(40, 2), some_logps(40, 3)))
    loss, up, down = slic_loss(*tensors(*zip(*rows)), delta, lam)
    for i, (nll, chosen, rejected) in enumerate(rows):
        assert loss[i].item() == pytest.approx(max(0.0, delta - chosen + rejected) + lam * nll, rel=1e-12)
        assert (up[i].item(), down[i].item()) == (chosen, rejected)
    assert 5 < sum(delta - chosen + rejected < 0 for _, chosen, rejected in rows) < 35, "on both sides of the hinge"


def test_beyond_its_margin_a_pair_costs_slic_the_nll_alone():
    """Short of delta the chosen text is raised and the rejected one lowered, each by 1; from there on only the NLL is left."""
    nll, chosen, rejected = (x.requires_grad_() for x in tensors([2.0] * 4, [-3.0, -3.0, -9.0, -3.0], [-4.4, -4.6, -3.0, -50.0]))
    loss, *_ = slic_loss(nll, chosen, rejected, delta=1.5, lam=0.3)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.1 + 0.6, 0.6, 7.5 + 0.6, 0.6])
    assert chosen.grad.tolist() == [-1, 0, -1, 0] and rejected.grad.tolist() == [1, 0, 1, 0] and nll.grad.tolist() == [0.3] * 4


# ---------------------------------------------------------------- log-probs of tokens

def some_tokens(dtype=torch.float64, B=3, T=7, D=5, V=11, seed=0):
    """hidden (B, T, D), weight (V, D), labels (B, T) of which a third is not scored, and random weights for a sum of them."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(B, T, D, generator=g).to(dtype), torch.randn(V, D, generator=g).to(dtype)
    labels = torch.randint(V, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 1 / 3] = IGNORE
    labels[1, 2] = 0                                     # a token like any other
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.randn(B, T, generator=g, dtype=torch.float64)


def gathered(hidden, weight, labels):
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORE, 0.0, logps)


@pytest.mark.parametrize("chunk, keep", [(0, 0), (1, 0), (4, 0), (4, 1000), (1000, 0)])
def test_token_logps_are_the_log_softmax_at_the_labels(chunk, keep):
    hidden, weight, labels, mix = some_tokens()
    expected = gathered(hidden, weight, labels)
    wanted = torch.autograd.grad((expected * mix).sum(), (hidden, weight))
    result = token_logps(hidden, weight, labels, chunk, keep)
    got = torch.autograd.grad((result * mix).sum(), (hidden, weight))
    assert torch.allclose(result, expected, atol=1e-13, rtol=0)
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(got, wanted))


def test_tokens_without_a_label_count_zero():
    hidden, weight, labels, _ = some_tokens()
    assert (labels == IGNORE).any() and not token_logps(hidden, weight, labels)[labels == IGNORE].any()


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_head_does_not_run_where_there_is_no_label(chunk):
    hidden, weight, labels, _ = some_tokens()
    poisoned = hidden.detach().clone()
    poisoned[labels == IGNORE] = torch.nan
    poisoned.requires_grad_()
    token_logps(poisoned, weight, labels, chunk).sum().backward()
    assert weight.grad.isfinite().all() and not poisoned.grad[labels == IGNORE].any()


def test_chunks_are_small_and_computed_again_in_the_backward_pass(monkeypatch):
    hidden, weight, labels, _ = some_tokens()
    sizes, plain = [], losses._label_logps
    monkeypatch.setattr(losses, "_label_logps", lambda rows, *more: sizes.append(len(rows)) or plain(rows, *more))
    result = token_logps(hidden, weight, labels, chunk=4)
    forward, n = list(sizes), int((labels != IGNORE).sum())
    result.sum().backward()
    assert sum(forward) == n and max(forward) <= 4 and sum(sizes) == 2 * n
    sizes.clear()
    token_logps(hidden, weight, labels, chunk=4, keep=n).sum().backward()
    assert sizes == forward, "few enough are kept"


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_batch_without_any_label_has_log_probs_and_gradients_of_zero(chunk):
    hidden, weight, labels, _ = some_tokens()
    result = token_logps(hidden, weight, torch.full_like(labels, IGNORE), chunk)
    result.sum().backward()
    assert result.shape == labels.shape and not result.any() and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    hidden, weight, labels, _ = some_tokens(dtype)
    result, exact = token_logps(hidden, weight, labels), gathered(hidden.double(), weight.double(), labels)
    assert result.dtype == torch.float32 and torch.allclose(result.double(), exact, atol=0.1, rtol=0)
    again = result.to(dtype)                             # what a log-softmax in half precision could at best give
    assert not torch.equal(result, again.float()), "the log-probs were rounded to half precision"


def test_float64_stays_float64():
    assert token_logps(*some_tokens()[:3]).dtype == torch.float64


# ---------------------------------------------------------------- TRL

WORDS = ["<pad>", "</s>", "<unk>"] + [f"w{i}" for i in range(40)]


def word_tokenizer():
    tokenizers, transformers = oracle("tokenizers"), oracle("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def preference_rows():
    """Texts of SAPO's form, y- = A + B' + C, of unequal lengths, for TRL to read as text."""
    text = lambda ids: " ".join(WORDS[i % 40 + 3] for i in ids)
    rows = []
    for i, (x, a, b, c) in enumerate([(3, 2, 4, 3), (6, 0, 2, 1), (1, 5, 3, 2), (4, 1, 1, 6)]):
        prompt, start, segment, new, end = random_texts([x, a, b, b, c], seed=i)
        rows.append({"prompt": text(prompt), "chosen": " " + text(start + segment + end), "rejected": " " + text(start + new + end)})
    return rows


def trl_setup(tmp_path, trainer, config, rows, **settings):
    """(TRL's trainer on a random policy, our copy of the policy, its batch of all rows, the same rows as Pairs)."""
    datasets = oracle("datasets")
    models = {}
    for seed, name in enumerate(("policy", "reference")):
        models[name] = small_hf_model(seed=seed, vocab_size=len(WORDS))
        models[name].save_pretrained(tmp_path / name)
    more = {"ref_model": models["reference"]} if "DPO" in trainer.__name__ else {}
    args = config(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=64, **settings)
    theirs = trainer(model=models["policy"], args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=word_tokenizer(), **more)
    batch = theirs.data_collator(list(theirs.train_dataset))
    pairs = []
    for row in theirs.train_dataset:
        ids = lambda *names: next(list(row[n]) for n in names if row.get(n) is not None)
        prompt = ids("prompt_ids", "prompt_input_ids")
        answers = [ids(f"{side}_ids", f"{side}_input_ids") for side in ("chosen", "rejected")]
        pairs.append(Pair(prompt, *(a[len(prompt):] if "chosen_input_ids" in row else a for a in answers)))
    return theirs, load_pretrained(tmp_path / "policy"), batch, pairs


def assert_same_gradient(ours, theirs):
    theirs = dict(theirs.named_parameters())
    assert max(p.grad.abs().max() for p in ours.parameters()) > 0.01
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, theirs[name].grad, atol=2e-5, rtol=1e-4), name


def our_loss(tmp_path, policy, pairs, cfg, share=True):
    """(loss, metrics) of these Pairs, averaged, its gradient on the policy, with the reference that `trl_setup` saved."""
    batch, reference = collate(pairs, share, **scored_tokens(cfg)), None
    if cfg.loss in losses.WITH_REFERENCE:
        with torch.no_grad():
            reference = score(load_pretrained(tmp_path / "reference"), batch)
    loss, metrics = preference_loss(policy, batch, cfg, reference)
    loss.mean().backward()
    return loss.mean().item(), {name: value.mean().item() for name, value in metrics.items()}


TRLS = {        # a loss of ours: what TRL's DPOTrainer calls it
    "dpo": "sigmoid",
    "ipo": "ipo"}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", TRLS)
def test_a_loss_with_a_reference_is_trls(tmp_path, name, share):
    """From text on TRL's side: the same tokens, policy and reference give the same loss, rewards and gradient."""
    trl, cfg = oracle("trl"), SAPOConfig(loss=name, beta=0.21)
    trainer, policy, batch, pairs = trl_setup(tmp_path, trl.DPOTrainer, trl.DPOConfig, preference_rows(), beta=cfg.beta, loss_type=TRLS[name])
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    ours, parts = our_loss(tmp_path, policy, pairs, cfg, share)
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    margin = trainer._metrics["eval"]["rewards/margins"][-1]      # TRL's rewards hold A, in both alike: only their gap compares
    assert abs(margin) > 0.05, "the policy is not its own reference"
    if name == "dpo":                                    # TRL's rewards are sums, whatever the loss
        assert parts["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    assert_same_gradient(policy, trainer.model)


@pytest.mark.parametrize("row", [0, 1])
def test_dpo_with_an_nll_is_trls_sigmoid_and_sft(tmp_path, row):
    """One pair, because TRL's sft is a mean over the batch's tokens and ours over each pair's."""
    trl, cfg = oracle("trl"), SAPOConfig(loss="dpo", beta=0.21, nll=0.7)
    trainer, policy, batch, pairs = trl_setup(tmp_path, trl.DPOTrainer, trl.DPOConfig, preference_rows()[row:row + 1], beta=cfg.beta,
                                              loss_type=["sigmoid", "sft"], loss_weights=[1.0, cfg.nll])
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    ours, parts = our_loss(tmp_path, policy, pairs, cfg)
    assert ours == pytest.approx(theirs.item(), rel=1e-5) and cfg.nll * parts["nll_loss"] > 0.5, "the NLL counts"
    assert_same_gradient(policy, trainer.model)


@pytest.mark.parametrize("name, ours, theirs", [
    ("simpo", dict(beta=2.1, gamma=0.8), dict(beta=2.1, simpo_gamma=0.8)),
    ("hinge", dict(loss="slic", delta=1.0, lam=0.0), dict(beta=1.0))])
def test_a_loss_without_a_reference_is_trls(tmp_path, name, ours, theirs):
    """TRL's CPOTrainer holds SimPO and, as `hinge`, SLiC's loss of a pair. It takes sums of A too, which cancel."""
    oracle("trl")
    cpo, cfg = oracle("trl.experimental.cpo"), SAPOConfig(**{"loss": name} | ours)
    trainer, policy, batch, pairs = trl_setup(tmp_path, cpo.CPOTrainer, cpo.CPOConfig, preference_rows(), loss_type=name, cpo_alpha=0.0, **theirs)
    loss, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    ours, parts = our_loss(tmp_path, policy, pairs, cfg)
    assert ours == pytest.approx(loss.item(), rel=1e-5) and ours > 0.05
    names = ("rewards/margins", "rewards/accuracies") + (("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected") if name == "simpo" else ())
    for name in names:
        assert parts[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name
    assert 0 < parts["rewards/accuracies"] < 1
    assert_same_gradient(policy, trainer.model)


def test_the_odds_ratio_term_is_trls():
    from types import SimpleNamespace
    oracle("trl")
    ORPOTrainer, beta = oracle("trl.experimental.orpo").ORPOTrainer, 0.31
    chosen, rejected = tensors(some_logps(50, 1, -9, -1e-3), some_logps(50, 2, -9, -1e-3), dtype=torch.float32)
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs, their_up, their_down, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    loss, up, down = orpo_loss(torch.zeros(50), chosen, rejected, beta)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in ((-loss, theirs), (up, their_up), (down, their_down)))


@pytest.mark.parametrize("row", [0, 1])
def test_orpo_on_one_pair_is_trls(tmp_path, row):
    """One pair, because TRL's NLL is a mean over the batch's tokens and ours over each pair's."""
    oracle("trl")
    orpo, cfg = oracle("trl.experimental.orpo"), SAPOConfig(loss="orpo", lam=0.43, nll_on="prompt+response")
    trainer, policy, batch, pairs = trl_setup(tmp_path, orpo.ORPOTrainer, orpo.ORPOConfig, preference_rows()[row:row + 1], beta=cfg.lam)
    theirs, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    theirs.backward()

    ours, parts = our_loss(tmp_path, policy, pairs, cfg)
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"):
        assert parts[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name
    assert_same_gradient(policy, trainer.model)
