"""What the tests share: the repository on the path, `--slow`, oracles (code nobody here wrote) and small random models.

The models' numbers are all unusual (theta, eps, a head size that is not hidden / heads, three query heads to a
key-value head), and their weights are large: with defaults, or with weights of 0.02, a wrong model passes for a right one.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                      # before anything imports huggingface_hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # what is tested is exact, and not more than one GPU's
for quiet in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRL_EXPERIMENTAL_SILENCE"):
    os.environ[quiet] = "1"
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
torch.set_num_threads(1)                                # the models are so small that a second thread only waits

NUMBERS = dict(vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, head_dim=10, max_position_embeddings=128, rms_norm_eps=3e-3)
THETA = 523.0
KINDS = dict(layer_types=["near", "far"], kinds={"near": dict(sliding_window=4, rope_theta=61.0), "far": dict(rope={"rope_type": "linear", "factor": 3.0})})
GEMMA = KINDS | dict(qk_norm=True, gemma_norms=True, hidden_act="gelu_pytorch_tanh", embedding_scale=24 ** 0.5, attention_scale=23 ** -0.5)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or needs much memory; runs with --slow only")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning:transformers")
    signal.signal(signal.SIGINT, signal.default_int_handler)     # nohup and a shell's & have these ignored, by children too
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def oracle(name):
    """The module `name`. Without it the test is skipped, unless REQUIRE_ORACLES=1: then it fails, as in continuous integration."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("REQUIRE_ORACLES") == "1":
            pytest.fail(f"REQUIRE_ORACLES=1, but {name} cannot be imported: {error}", pytrace=False)
        pytest.skip(f"{name} cannot be imported; pip install -r tests/requirements.txt")
    if name == "transformers":
        module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture
def shared():
    """The folder beside the repository that holds stories260K; absent in a plain clone."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no ../shared")
    return folder


@torch.no_grad()
def randomise(model, seed):
    """Weights large enough for each of them to matter; norms and biases too, which libraries start at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model.eval()


def small_model(seed=0, dtype=torch.float64, **changes):
    """Our decoder with random weights, float64 so that exact claims can be tested exactly."""
    from model import ModelConfig, Transformer
    return randomise(Transformer(ModelConfig(**(NUMBERS | {"rope_theta": THETA} | changes))), seed).to(dtype)


def small_hf_model(family="llama", seed=0, **changes):
    """transformers' decoder of a family, float32, with random weights."""
    transformers = oracle("transformers")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    config = transformers.AutoConfig.for_model(family, **(NUMBERS | rope | changes))
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)


def random_texts(lengths, vocab=NUMBERS["vocab_size"], seed=0):
    """Lists of random ids, one of each length; id 0 is left out, which is what padding looks like."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def make_pairs(state, examples, cfg):
    """[2] [3] [4] of sapo_step alone: the Pairs of these Examples, by the state's generator, cuts and random numbers."""
    import sapo
    cuts = [sapo.split(e.chosen, cfg.segment, state.eos, state.cut_rng, state.breaks, cfg.after) for e in examples]
    segments = sapo.generate_segments(state.generator, examples, cuts, cfg, state.eos, state.sample_rng, state.vocab, breaks=state.breaks)
    return [sapo.splice(e, cut, new, state.eos) for e, cut, new in zip(examples, cuts, segments)]


def fits(counts, expected):
    """Chi-square: are counts within five standard deviations of what chance gives around `expected`?"""
    assert len(counts) == len(expected) and min(expected) >= 5, "too few draws for a chi-square"
    statistic, freedom = sum((c - e) ** 2 / e for c, e in zip(counts, expected)), len(counts) - 1
    return statistic < freedom + 5 * (2 * freedom) ** 0.5
