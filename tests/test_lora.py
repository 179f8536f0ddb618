"""LoRA: what trains, what is shared, that an average of adapters is the average of the weights, and that peft reads them."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from buffer import Pair, collate
from conftest import GEMMA, KINDS, NUMBERS, oracle, random_texts, small_hf_model, small_model
from losses import preference_loss, scored_tokens
from machine.flags import DATA
from machine.folders import companions, load_pretrained, plain_weights, save_adapter, save_pretrained
from model import PROJECTIONS, LoRA, Transformer, add_lora, generate, twin
from sapo import Example, SAPOConfig, State, ema_update, sapo_step
from test_model import GEMMA3

RANK, ALPHA = 3, 7.5                                     # so B A x is scaled by 2.5
DECODERS = {"plain": {}, "tied": dict(tie_word_embeddings=True), "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True)}
LAYERED = DECODERS | {"two kinds of layers": KINDS, "Gemma": GEMMA}      # these do not save as a Llama
IDS = torch.tensor(random_texts([30, 30]))


def seeded(seed=4):
    return torch.Generator().manual_seed(seed)


def adapted(dtype=torch.float64, B=None, projections=PROJECTIONS, **changes):
    """The small model with adapters. B: a seed for their B, which is 0 where none is given."""
    model = add_lora(small_model(0, torch.float32, **changes), RANK, ALPHA, seeded(), projections).to(dtype)
    return model if B is None else with_B(model, B)


@torch.no_grad()
def with_B(model, seed):
    generator = seeded(seed)
    for m in adapters(model).values():
        m.lora_B.copy_(0.2 * torch.randn(m.lora_B.shape, generator=generator))
    return model


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def merged(model):
    """The plain decoder that the weights of `plain_weights` make."""
    plain = Transformer(model.config).to(model.lm_head.weight.dtype)
    weights = dict(plain_weights(model))
    assert set(weights) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
    return plain


def some_pairs():
    a, b, c, new, x = random_texts([3, 4, 2, 4, 5], seed=7)
    return [Pair(x, a + b + c, a + new + c, 3, 7, 7), Pair(c, b, new, 0, 4, 4)]


def training(cfg, steps, **more):
    """The State after some steps of SAPO on a policy with adapters; EMA and reference are twins taken at B = 0."""
    state = State.start(adapted(**more), cfg, eos=[2], lr=0.02)
    texts = iter(random_texts([4, 9] * 200, seed=8))
    for _ in range(steps):
        sapo_step(state, lambda n: [Example(next(texts), next(texts)) for _ in range(n)], cfg)
    return state


def logits(model):
    with torch.no_grad():
        return model(IDS)


# ---------------------------------------------------------------- the layer

@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_adds_alpha_over_rank_times_B_A_x(bias):
    linear = torch.nn.Linear(5, 7, bias=bias).double()
    layer, x = LoRA(linear, RANK, ALPHA, seeded()).double(), torch.randn(2, 5, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_(generator=seeded(2))
    W, A, B = (t.tolist() for t in (linear.weight, layer.lora_A, layer.lora_B))
    assert (len(A), len(A[0]), len(B), len(B[0])) == (RANK, 5, 7, RANK)
    for row, out in zip(x.tolist(), layer(x).tolist()):
        for i in range(7):
            want = sum(W[i][j] * row[j] for j in range(5)) + (linear.bias[i].item() if bias else 0)
            want += 7.5 / 3 * sum(B[i][r] * A[r][j] * row[j] for r in range(RANK) for j in range(5))
            assert out[i] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", LAYERED)
def test_while_B_is_0_the_logits_are_the_bases_bit_for_bit(decoder, dtype):
    base = small_model(0, torch.float32, **LAYERED[decoder]).to(dtype)
    model = adapted(dtype, **LAYERED[decoder])
    assert torch.equal(logits(model), logits(base))
    assert (logits(with_B(model, 1)) - logits(base)).abs().max() > 0.5, "and afterwards they are not"


def test_bit_for_bit_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(adapted(torch.float32)), logits(small_model(0, torch.float32)))


@pytest.mark.parametrize("projections", [PROJECTIONS, ("q_proj", "v_proj"), ("o_proj", "gate_proj"), ("down_proj",)])
def test_adapters_stand_where_they_were_asked_for(projections):
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    want = {f"model.layers.{i}.{'self_attn' if p in attention else 'mlp'}.{p}" for i in range(NUMBERS["num_hidden_layers"]) for p in projections}
    assert set(adapters(adapted(projections=projections))) == want


def test_the_names_of_the_base_stay():
    """What reads a checkpoint by name still does."""
    names = {name for name, _ in adapted().named_parameters()}
    assert {name for name, _ in small_model().named_parameters()} == {name for name in names if ".lora_" not in name}


def test_A_depends_on_the_generator_alone():
    def drawn(seed, noise, weights):
        torch.manual_seed(noise)
        return [m.lora_A for m in adapters(add_lora(small_model(weights, torch.float32), RANK, ALPHA, seeded(seed))).values()]

    one, same, other = drawn(4, 1, 0), drawn(4, 2, 9), drawn(5, 1, 0)
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))
    assert not any(torch.equal(a, b) for i, a in enumerate(one) for b in one[:i] if a.shape == b.shape), "each layer has its own"
    model, before = small_model(), torch.get_rng_state()
    add_lora(model, RANK, ALPHA, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_A_x_is_as_large_as_x():
    layer = LoRA(torch.nn.Linear(400, 2, bias=False), 50, ALPHA, seeded())
    assert layer.lora_A.std().item() == pytest.approx(400 ** -0.5, rel=0.03)


# ---------------------------------------------------------------- what trains and what is shared

def test_only_B_trains():
    model, cfg = adapted(B=1), SAPOConfig(loss="orpo", lam=0.3)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    preference_loss(model, collate(some_pairs(), **scored_tokens(cfg)), cfg)[0].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {f"{name}.lora_B" for name in adapters(model)} and len(touched) == 14


def test_recomputing_blocks_gives_B_the_same_gradient():
    """The embedding is frozen, so a block's input needs no gradient: where some kinds of checkpointing lose everything."""
    cfg, model, gradients = SAPOConfig(loss="orpo", lam=0.3), adapted(B=1), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        preference_loss(model, collate(some_pairs(), **scored_tokens(cfg)), cfg)[0].sum().backward()
        gradients.append([m.lora_B.grad.clone() for m in adapters(model).values()])
    assert all(torch.allclose(a, b, atol=1e-13) and a.any() for a, b in zip(*gradients))


def test_a_twin_shares_the_base_and_A_and_copies_B():
    model = adapted(B=1)
    other = dict(twin(model).named_parameters())
    for name, p in model.named_parameters():
        assert (other[name] is p) == (not name.endswith("lora_B")) and torch.equal(other[name], p) and not other[name].requires_grad
    assert all(p.requires_grad == name.endswith("lora_B") for name, p in model.named_parameters()), "and the model goes on training"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_stays_the_base_bit_for_bit_while_the_policy_trains(dtype):
    cfg = SAPOConfig(batch_size=4, segment="4", ema_every="2", ref_refresh="never", alpha=0.3)
    state, base = training(cfg, steps=4, dtype=dtype), small_model(0, torch.float32).to(dtype)
    assert torch.equal(logits(state.reference), logits(base))
    assert all((logits(m) - logits(base)).abs().max() > 0.01 for m in (state.policy, state.ema))
    start = dict(adapted(dtype).named_parameters())
    for model in (state.policy, state.ema):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert moved == {f"{name}.lora_B" for name in adapters(model)}


def test_a_refreshed_reference_is_the_emas_equal_and_goes_no_further():
    cfg = SAPOConfig(batch_size=4, segment="4", ema_every="1", ref_refresh="3", alpha=0.3)
    state = training(cfg, steps=3)
    assert torch.equal(logits(state.reference), logits(state.ema)) and not torch.equal(logits(state.ema), logits(state.policy))
    before = logits(state.reference)
    with_B(state.policy, 5)
    ema_update(state.ema, state.policy, 0.5)
    assert torch.equal(logits(state.reference), before)


# ---------------------------------------------------------------- merging and averaging

@pytest.mark.parametrize("decoder", LAYERED)
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_weights_give_the_logits_of_the_adapters(decoder, dtype, digits):
    model = adapted(dtype, B=1, **LAYERED[decoder])
    want = logits(model)
    assert (logits(merged(model)) - want).abs().max() < digits * want.abs().max()


def test_adapters_write_what_the_merged_model_writes():
    model, prompts = adapted(B=1), random_texts([5, 2, 7])
    how = dict(budgets=[9, 12, 4], eos=(3, 4), temperature=0.9, top_k=30, top_p=0.95)
    assert generate(model, prompts, rng=seeded(), **how) == generate(merged(model), prompts, rng=seeded(), **how)


def test_an_average_of_adapters_is_the_average_of_the_merged_weights():
    """In closed form, over five updates: because A is the same in both. With an A that trains it would not be."""
    alpha, policy = 0.83, adapted(B=1)
    ema = twin(policy)
    with_B(ema, 2)
    want = dict(plain_weights(ema))
    for seed in range(5):
        with_B(policy, 10 + seed)
        ema_update(ema, policy, alpha)
        want = {name: alpha * want[name] + (1 - alpha) * new for name, new in plain_weights(policy)}
        for name, got in plain_weights(ema):
            assert torch.allclose(got, want[name], rtol=0, atol=1e-14), name
    first, last = dict(plain_weights(with_B(twin(policy), 2))), dict(plain_weights(ema))
    assert {name for name in first if not torch.equal(first[name], last[name])} == {f"{name}.weight" for name in adapters(policy)}


def test_steps_move_the_merged_ema_as_an_ema_of_the_merged_policy():
    cfg = SAPOConfig(loss="orpo", batch_size=4, segment="4", ema_every="3", alpha=0.3)
    state = training(cfg, steps=3)
    before = dict(plain_weights(adapted()))
    for name, got in plain_weights(state.ema):
        assert torch.allclose(got, 0.3 * before[name] + 0.7 * dict(plain_weights(state.policy))[name], rtol=0, atol=1e-14), name


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize("decoder", DECODERS)
def test_a_model_with_adapters_is_saved_as_a_plain_one(tmp_path, decoder):
    model = adapted(torch.float32, B=1, **DECODERS[decoder])
    save_pretrained(model, tmp_path / "out", torch.float32)
    save_pretrained(small_model(0, torch.float32, **DECODERS[decoder]), tmp_path / "base", torch.float32)
    out, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in base.items()}
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "base/config.json").read_text()
    loaded = load_pretrained(tmp_path / "out")
    assert not adapters(loaded) and all(p.requires_grad for p in loaded.parameters())
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4 < (logits(load_pretrained(tmp_path / "base")) - logits(model)).abs().max()


@pytest.mark.parametrize("decoder", DECODERS)
def test_transformers_gives_the_saved_model_the_same_logits(tmp_path, decoder):
    transformers, model = oracle("transformers"), adapted(torch.float32, B=1, **DECODERS[decoder])
    save_pretrained(model, tmp_path / "out", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        want = logits(model)
        assert (theirs(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("projections", [PROJECTIONS, ("q_proj", "down_proj")])
@pytest.mark.parametrize("decoder", DECODERS)
def test_peft_gives_the_adapter_the_same_logits(tmp_path, decoder, projections):
    peft, transformers = oracle("peft"), oracle("transformers")
    model = adapted(torch.float32, B=1, projections=projections, **DECODERS[decoder])
    save_pretrained(small_model(0, torch.float32, **DECODERS[decoder]), tmp_path / "base", torch.float32)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = logits(model)
        assert (theirs(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()
        assert (theirs.merge_and_unload()(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()


def test_peft_gives_gemmas_adapter_the_same_logits(tmp_path):
    """Whose base is a folder of transformers, with layers of two kinds."""
    peft, theirs = oracle("peft"), small_hf_model("gemma3_text", **GEMMA3)
    theirs.save_pretrained(tmp_path / "base")
    model = with_B(add_lora(load_pretrained(tmp_path / "base"), RANK, ALPHA, seeded()), 1)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = logits(model)
        assert (adapted(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()
    save_pretrained(model, tmp_path / "merged", torch.float32)
    again = oracle("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (again(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()


def test_the_adapters_folder_names_its_base_and_holds_nothing_else(tmp_path):
    """So that peft.AutoPeftModelForCausalLM finds the base by itself, and a server knows what it may not serve it with."""
    peft, model = oracle("peft"), adapted(torch.float32, B=1)
    save_pretrained(small_model(0, torch.float32), tmp_path / "base", torch.float32)
    save_adapter(adapted(torch.float32), tmp_path / "adapter", "elsewhere")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")                  # over an older one
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {f.name for f in tmp_path.iterdir()} == {"base", "adapter"}
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == (str(tmp_path / "base"), RANK, ALPHA)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        want = logits(model)
        assert (theirs(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()


# ---------------------------------------------------------------- whole runs

def run(*flags):
    """train.main on the CPU; whatever it wants of the signals is taken back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.main(list(map(str, flags))) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of the base, folder of a finished run with --lora 4): four steps of SAPO on a small random checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    base = small_model(0, torch.float32, vocab_size=1030, max_position_embeddings=256, sliding_window=None)
    save_pretrained(base, folder / "base", torch.float32, companions(DATA / "tiny_model"))
    run("--model", folder / "base", "--data", DATA / "tiny_validation.jsonl", "--out", folder / "run", "--lora", 4, "--lora-alpha", 6, *SMALL)
    return folder / "base", folder / "run"


SMALL = ("--device cpu --steps 4 --save-every 2 --batch-size 4 --micro-batch 2 --segment 5 --buffer-size 8 --lr 0.03 --optimizer adamw --warmup 0 --ema-every 2 "
         "--max-prompt-length 48 --max-length 160 --eval-rows 2 --eval-tokens 4 --samples 1").split()


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_run_ends_with_merged_weights_that_only_projections_changed(finished, name):
    base, out = finished
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out / name))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and moved == {key for key in before if key.split(".")[-2] in PROJECTIONS}
    factors = load_file(out / f"{name}_adapter/adapter_model.safetensors")
    for key in moved:
        A, B = (factors[f"base_model.model.{key.removesuffix('weight')}lora_{leaf}.weight"].double() for leaf in "AB")
        assert len(A) == 4 and (after[key] - (before[key] + 6 / 4 * B @ A)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["model", "ema"])
def test_peft_loads_a_runs_adapter_onto_the_base_and_it_is_the_merged_model(finished, name):
    peft, transformers, (base, out) = oracle("peft"), oracle("transformers"), finished
    load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert peft.PeftConfig.from_pretrained(out / f"{name}_adapter").base_model_name_or_path == str(base)
    theirs, ids = peft.PeftModel.from_pretrained(load(base), out / f"{name}_adapter").eval(), torch.tensor(random_texts([60, 60], 1024))
    with torch.no_grad():
        want = load_pretrained(out / name)(ids)
        bound = 1e-5 * want.abs().max()
        assert (theirs(ids).logits - want).abs().max() < bound and (load(out / name).eval()(ids).logits - want).abs().max() < bound
        assert (load_pretrained(base)(ids) - want).abs().max() > 100 * bound


def test_a_run_that_died_after_two_steps_ends_bit_equal(finished, tmp_path):
    base, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    for path in (*sorted((again / "checkpoint").iterdir())[1:], *again.glob("model*"), *again.glob("ema*")):
        shutil.rmtree(path)
    run("--resume", again)
    for name in ("model/model.safetensors", "ema/model.safetensors", "model_adapter/adapter_model.safetensors", "ema_adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    steps = lambda folder: [{k: v for k, v in json.loads(line).items() if not k.startswith("time/") and "per_second" not in k}
                            for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps(again) == steps(out) and len(steps(out)) >= 5
