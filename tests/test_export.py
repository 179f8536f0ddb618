"""What is delivered: the written folders, that they say how the model was trained, what they come from, and how good they are.

The runs are those of test_run.py, small and forked. The hub is a cache on the disk, laid out as huggingface_hub lays it out, with
HF_HUB_OFFLINE set (conftest.py sets it), or a `snapshot_download` that writes down what it is asked for.
"""

import functools
import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import oracle, small_model
from safetensors.torch import load_file, save_file
from test_ddp import torchrun
from test_refusals import GOOD, Reached, build, call
from test_run import differences, lines, make_world, resume, run, stop_at, tuned

import show
import train
from machine.files import BadInput
from machine.folders import companions, find_model, load_pretrained, save_pretrained

TEMPLATE = ("{% for m in messages %}{{ '<|assistant|>' if m['role'] == 'assistant' else '[user] ' }}{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
COMMIT, LATER = "0a1b2c3d4e" * 4, "f" * 40


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a small run on a checkpoint that lies on the disk in bfloat16."""
    folder = tmp_path_factory.mktemp("world")
    flags = make_world(folder)
    edit(folder / "base/config.json", torch_dtype="bfloat16")
    model = small_model(3, torch.float32, vocab_size=1024, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        max_position_embeddings=256, num_hidden_layers=1)
    save_pretrained(model, folder / "weights", torch.bfloat16, companions(folder / "base"))
    return tuned(flags, folder / "weights", "--steps", 3)


def base_of(world, folder):
    return Path(shutil.copytree(world[1], folder / "base"))



# ---------------------------------------------------------------- template and end tokens

def test_the_written_folders_have_the_template_and_the_end_tokens_of_the_training(world, tmp_path):
    transformers, base = oracle("transformers"), base_of(world, tmp_path)
    edit(base / "generation_config.json", eos_token_id=None)
    edit(base / "config.json", eos_token_id=0)
    edit(base / "tokenizer_config.json", eos_token="<s>", chat_template="{{ 'stale' }}")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    flags = [*world, "--model", base, "--chat-template", template]
    printed = run(tmp_path / "whole", *flags)
    assert printed.count("written folders: ") == 1 and f"chat_template.jinja is {template}" in printed
    for name in ("source", "model", "ema"):
        folder = tmp_path / "whole" / name
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE and "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
        assert 1 in json.loads((folder / "generation_config.json").read_text())["eos_token_id"], "<|end|>, which the template writes"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole/model")
    prompt = lines(tmp_path / "whole/pairs.jsonl")[0]["ids"][0]
    said = lines(world[3])[lines(tmp_path / "whole/pairs.jsonl")[0]["row"]]["prompt"]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
    assert list(getattr(asked, "input_ids", asked)) == prompt and tokenizer.eos_token == "<|end|>"

    for damage in (lambda: template.write_text("{{ 1 / 0 }}"), template.unlink):           # it is not read again
        out = tmp_path / damage.__name__.strip("<>")
        template.write_text(TEMPLATE)
        run(out, *flags, hook=stop_at("sapo_step", 2))
        damage()
        assert "written folders" not in resume(out)
        assert (out / "model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()
        assert {p.name: p.read_bytes() for p in (out / "source").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "whole/source").iterdir()}


def test_a_folder_that_needs_no_change_is_written_as_it_was(world, tmp_path):
    assert "written folders" not in run(tmp_path / "run", *world, "--steps", 1)
    for name, content in companions(world[1]).items():
        assert (tmp_path / "run/model" / name).read_bytes() == content, name


# ---------------------------------------------------------------- the hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that writes down which patterns and revisions it is asked for, and gives a snapshot of test_refusals' model."""
    import huggingface_hub
    build(tmp_path)
    state = SimpleNamespace(asked=[], folder=tmp_path, answer=tmp_path / "snapshots" / COMMIT)
    shutil.copytree(tmp_path / "model", state.answer)
    shutil.rmtree(tmp_path / "model")

    def snapshot_download(repo, revision, allow_patterns, **how):
        state.asked.append((repo, revision, any("safetensors" in p for p in allow_patterns)))
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return state


HUB = [*GOOD, "--model", "org/name"]


@pytest.mark.parametrize("more", [["--data", "typo.jsonl"], ["--max-length", "999999"], ["--chat-template", "none"], ["--out", "rows.jsonl"]], ids=" ".join)
def test_what_can_be_refused_is_refused_before_weights_are_fetched(hub, more):
    code, said = call(hub.folder, [*HUB, *more])
    assert code == 2 and hub.asked and not any(weights for *_, weights in hub.asked), said


def test_weights_come_last_and_at_the_commit_that_was_checked(hub):
    with pytest.raises(Reached):
        call(hub.folder, HUB)
    assert hub.asked == [("org/name", None, False)] * 2 + [("org/name", COMMIT, True)] * 2


def test_a_run_from_nothing_fetches_no_weights(hub):
    with pytest.raises(Reached):
        call(hub.folder, [*HUB, "--from-scratch", "--sft-steps", "1", "--sft-batch-size", "2"])
    assert {weights for *_, weights in hub.asked} == {False}


def test_the_runs_config_json_trains_the_same_commit(hub):
    with pytest.raises(Reached):
        call(hub.folder, HUB)
    assert json.loads((hub.folder / "out/config.json").read_text())["settings"]["model"] == f"org/name@{COMMIT}"
    hub.asked.clear()
    with pytest.raises(Reached):
        call(hub.folder, ["--config", "out/config.json", "--out", "again"])
    assert {revision for _, revision, _ in hub.asked} == {COMMIT}


@pytest.mark.parametrize("local, asked", [(0, [1, 2]), (1, [0, 1])])
def test_one_process_a_node_fetches_while_the_others_wait(hub, local, asked):
    seen = []

    def together(function):
        value = function()
        seen.append(len(hub.asked))
        return value

    assert find_model("org/name", SimpleNamespace(local=local, together=together)) == (hub.answer, COMMIT)
    assert seen == asked


@pytest.mark.parametrize("offline", [True, False])
def test_that_the_hub_is_switched_off_is_said(monkeypatch, tmp_path, offline):
    import huggingface_hub
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: exec("raise ConnectionError"))
    with pytest.raises(BadInput, match="--model org/name: no such folder, and the hub cannot be reached") as refusal:
        find_model("org/name", SimpleNamespace(local=0, together=lambda function: function()))
    assert ("HF_HUB_OFFLINE is set" in str(refusal.value)) == offline


def cache(root, folder, commit=COMMIT, branch="main"):
    """A model folder as a snapshot of org/name in the hub's cache: links to blobs, and a branch that points to it."""
    repo = root / "models--org--name"
    for path in folder.iterdir():
        blob, link = repo / "blobs" / f"{commit[:8]}-{path.name}", repo / "snapshots" / commit / path.name
        for new in (blob, link, repo / "refs" / branch):
            new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs" / branch).write_text(commit)
    return repo


def cache_at(root, then=None):
    """A hook: the hub's cache is there, and the hub cannot be reached."""
    import huggingface_hub.constants as constants
    constants.HF_HUB_CACHE = str(root)
    train.draw_curves = lambda folder: None
    if then:
        then()


FRONT = "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE.txt\nlanguage:\n- en\nmodel-index: broken\n---\n# Base\n"


@pytest.fixture(scope="module")
def from_the_hub(world, tmp_path_factory):
    """(flags, the cache's folder, a finished run with --lora 2 on org/name)."""
    folder = tmp_path_factory.mktemp("hub")
    base = base_of(world, folder)
    for name, content in {"README.md": FRONT, "LICENSE.txt": "You may.", "NOTICE": "Ours.", "USE_POLICY.md": "Do no harm."}.items():
        (base / name).write_text(content)
    cache(folder / "cache", base)
    flags = [*world, "--model", "org/name", "--lora", 2]
    run(folder / "run", *flags, hook=functools.partial(cache_at, folder / "cache"))
    return flags, folder / "cache", folder / "run"


def test_a_run_with_adapters_finds_its_commit_again_offline_though_the_branch_moved(from_the_hub, tmp_path):
    flags, root, finished = from_the_hub
    root, out = shutil.copytree(root, tmp_path / "cache", symlinks=True), tmp_path / "run"
    run(out, *flags, hook=functools.partial(cache_at, root, stop_at("sapo_step", 2)))
    moved = shutil.copytree(finished / "model", tmp_path / "later")
    cache(root, moved, LATER)
    assert (root / "models--org--name/refs/main").read_text() == LATER
    resume(out, hook=functools.partial(cache_at, root))
    assert not differences(finished, out)


def test_without_the_weights_in_the_cache_the_sentence_is_about_the_hub(from_the_hub, tmp_path):
    flags, root, _ = from_the_hub
    root = shutil.copytree(root, tmp_path / "cache", symlinks=True)
    (root / "models--org--name/snapshots" / COMMIT / "model.safetensors").unlink()
    printed = run(tmp_path / "run", *flags, hook=functools.partial(cache_at, root), code=2)
    assert f"--model org/name@{COMMIT}: no such folder, and the hub cannot be reached, as HF_HUB_OFFLINE is set" in printed


def test_an_adapter_names_the_hubs_base_and_commit_and_peft_finds_it(from_the_hub, monkeypatch):
    peft, transformers, (_, root, out) = oracle("peft"), oracle("transformers"), from_the_hub
    config = json.loads((out / "model_adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out / "model_adapter", dtype=torch.float32, cache_dir=root).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = load_pretrained(out / "model")(ids)
        assert (theirs(ids).logits - want).abs().max() < 1e-5 * want.abs().max()


def test_an_adapter_on_a_local_base_names_it_wherever_it_is_read(world, tmp_path, monkeypatch):
    base_of(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [*map(str, world), "--model", "base", "--lora", "2", "--steps", "1", "--out", "run"]
    assert train.main(flags) == 0
    config = json.loads((tmp_path / "run/model_adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "base"), None)


# ---------------------------------------------------------------- the card

@pytest.mark.parametrize("name", ["model", "ema"])
def test_the_card_has_the_hubs_metadata_and_the_bases_licence(from_the_hub, name):
    from huggingface_hub import ModelCard
    folder = from_the_hub[2] / name
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {"base_model": "org/name", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sapo", "dpo"],
                                   "license": "other", "license_name": "llama3.2", "license_link": "LICENSE.txt"}
    assert f"Fine-tuned from `org/name@{COMMIT}`" in card.text and "# Base" not in card.text
    assert (folder / "LICENSE.txt").read_text() == "You may." and {"NOTICE", "USE_POLICY.md"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("readme", [None, "no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_local_base_is_no_base_model_of_the_hub_and_its_readme_may_be_anything(world, tmp_path, readme):
    from huggingface_hub import ModelCard
    base = base_of(world, tmp_path)
    if readme:
        (base / "README.md").write_text(readme)
    run(tmp_path / "run", *world, "--model", base, "--steps", 1, "--loss", "orpo")
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sapo", "orpo"]}
    assert f"Fine-tuned from `{base}`" in card.text


# ---------------------------------------------------------------- measured as written

def finished(out):
    """results.json, and the card's rows as numbers."""
    table = json.loads((out / "results.json").read_text())
    cards = {}
    for line in (out / "model/README.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| |"):
            name, *values = (cell.strip() for cell in line.strip("|").split("|"))
            cards[name] = [float(v) for v in values]
    return table, cards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_the_folder_is_measured_as_it_was_written(world, tmp_path, dtype):
    """float32 is what was trained, to the last bit; the others are rounded, and their row is that of the rounded model."""
    out = tmp_path / "run"
    printed = run(out, *world, *([] if dtype == "float32" else ["--save-dtype", dtype]), "--lr", "1e-5")
    stored = {t.dtype for name in ("model", "ema") for t in load_file(out / name / "model.safetensors").values()}
    assert stored == {torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)}
    table, card = finished(out)
    assert list(table) == ["start", "policy", "ema", "written"] and (table["written"] == table["policy"]) == (dtype == "float32")
    assert card == {name: pytest.approx(list(row.values()), abs=1e-4) for name, row in table.items()}
    assert "\nwritten " in printed
    start, trained, written = (load_file(path) for path in (Path(world[1]) / "model.safetensors", sorted(out.glob("checkpoint/*/policy.safetensors"))[-1],
                                                            out / "model/model.safetensors"))
    size = moved = kept = 0
    for name, before in start.items():
        went = trained[f"policy.{name}"] != before
        size, moved, kept = size + before.numel(), moved + went.sum().item(), kept + (went & (written[name].float() != before)).sum().item()
    sentence = f"{moved:,} of {size:,} weights moved; {kept / moved:.1%} of those differ from the start in the written folder"
    assert f"\n{sentence}\n" in printed and sentence in (out / "model/README.md").read_text()
    assert moved > 0.5 * size and (kept == moved if dtype == "float32" else kept < 0.5 * moved if dtype != "float16" else 0 < kept < moved)


def test_a_run_in_bfloat16_says_how_much_of_it_its_forward_passes_see(world, tmp_path):
    printed = run(tmp_path / "run", *world, "--dtype", "bfloat16", "--lr", "1e-5")
    start, trained = load_file(Path(world[1]) / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    moved = sum((trained[name] != before).sum().item() for name, before in start.items())
    seen = sum((trained[name].bfloat16() != before).sum().item() for name, before in start.items())
    assert f" in the written folder, {seen / moved:.1%} in forward passes, as bfloat16\n" in printed and 0 < seen < 0.5 * moved
    printed = run(tmp_path / "adapters", *world, "--dtype", "bfloat16", "--lora", 2)
    assert "weights moved" in printed and "in forward passes" not in printed, "an adapter is not rounded with its base"


def spoil():
    """A hook: between the writing and the reading back, somebody touches the file."""
    original = train.Run.measure_written

    def touched(run):
        path = run.out / "model/model.safetensors"
        save_file({name: t * 1.5 for name, t in load_file(path).items()}, path, {"format": "pt"})
        original(run)

    train.Run.measure_written, train.draw_curves = touched, lambda folder: None


@pytest.mark.parametrize("more", [[], ["--lora", "2"]], ids=" ".join)
def test_what_is_measured_is_read_from_the_disk(world, tmp_path, more):
    run(tmp_path / "run", *world, *more, hook=spoil)
    table, _ = finished(tmp_path / "run")
    assert abs(table["written"]["nll"] - table["policy"]["nll"]) > 0.1


@pytest.mark.parametrize("more", [[], ["--lora", "2"]], ids=" ".join)
def test_nothing_that_was_trained_is_held_while_the_folder_is_measured(world, tmp_path, monkeypatch, more):
    held, original = [], train.load_pretrained

    def load(*arguments):
        gc.collect()
        held.append([o for o in gc.get_objects() if issubclass(type(o), (train.State, torch.optim.Optimizer)) or type(o).__name__ == "Transformer"][:])
        return original(*arguments)

    gc.collect()
    before = sum(issubclass(type(o), (train.State, torch.optim.Optimizer)) or type(o).__name__ == "Transformer" for o in gc.get_objects())
    monkeypatch.setattr(train, "load_pretrained", load)
    assert train.main([*map(str, world), *more, "--out", str(tmp_path / "run")]) == 0
    assert [len(objects) for objects in held] == [before]


def one_is_blind():
    """A hook: of two processes the second, which is not here, sees no file."""
    original = train.World.all
    train.World.all = lambda world, value: [value, False] if value is True else original(world, value)
    train.draw_curves = lambda folder: None


def test_a_folder_that_not_all_processes_see_is_not_measured(world, tmp_path):
    assert "model/ is not measured as written: not all processes see it" in run(tmp_path / "run", *world, hook=one_is_blind)
    assert set(finished(tmp_path / "run")[0]) == {"start", "policy", "ema"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard"], ["--lora", "2"], []], ids=" ".join)
def test_two_processes_measure_what_was_written(world, tmp_path, more):
    for name, dtype in (("whole", "float32"), ("rounded", "bfloat16")):
        printed = torchrun(2, "train.py", *world, *more, "--save-dtype", dtype, "--out", tmp_path / name).stdout
        table, _ = finished(tmp_path / name)
        assert (table["written"] == pytest.approx(table["policy"], rel=1e-5, abs=1e-5)) == (name == "whole") and "weights moved" in printed
        assert set(load_pretrained(tmp_path / name / "model").state_dict()) == set(load_pretrained(world[1]).state_dict())


def test_a_signal_while_the_folder_is_measured_costs_nothing(world, tmp_path):
    base = base_of(world, tmp_path)
    (base / "README.md").write_text("# Base, of which a folder that is not measured yet must not tell")
    run(tmp_path / "whole", *world, "--model", base)
    printed = run(tmp_path / "run", *world, "--model", base, hook=stop_at("Evaluation.measure", 4))      # after start, policy and EMA
    assert "stopped and saved; go on with" in printed and not (tmp_path / "run/model/README.md").exists()
    assert len(list((tmp_path / "run/checkpoint").iterdir())) == len(list((tmp_path / "whole/checkpoint").iterdir()))
    resume(tmp_path / "run")
    assert not differences(tmp_path / "whole", tmp_path / "run")


def test_the_dtype_of_the_folders_may_be_chosen_again(world, tmp_path):
    run(tmp_path / "run", *world)
    resume(tmp_path / "run", "--save-dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "run/model/model.safetensors").values()} == {torch.bfloat16}
    assert finished(tmp_path / "run")[0]["written"] != finished(tmp_path / "run")[0]["policy"]


def test_where_the_start_is_not_on_the_disk_nothing_is_said_of_it(world, tmp_path):
    assert "weights moved" not in run(tmp_path / "run", *world, "--steps", 1, "--sft-steps", 1)


# ---------------------------------------------------------------- rows as the loss sees them

def test_steps_0_shows_the_first_rows_and_so_does_the_viewer_without_a_run(world, tmp_path, capsys):
    printed = run(tmp_path / "run", *world, "--steps", 0)
    assert show.main(["--data", str(world[3]), "--model", str(world[1]), "--n", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown in printed and printed.index(shown) < printed.index("parameters, ")
    assert [line for line in shown.splitlines() if line.endswith(":")] == [f"{world[3]}, line {n}:" for n in (1, 2, 3)]
    row = lines(world[3])[0]
    assert f"    prompt    '<s><|user|>{row['prompt']}<|end|><|assistant|>'\n              [0, 2, " in shown
    assert f"    chosen    {row['chosen']!r} and the end token '<|end|>'\n" in shown and shown.splitlines()[4].endswith(" 1]")
    assert "the end token" not in run(tmp_path / "trained", *world, "--steps", 1)


def test_the_viewer_takes_a_template_and_says_what_is_wrong(world, tmp_path, capsys):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    where = ["--data", str(world[3]), "--model", str(world[1])]
    assert show.main([*where, "--n", "1", "--chat-template", str(tmp_path / "template.jinja")]) == 0
    assert "    prompt    '[user] " in capsys.readouterr().out
    assert show.main(["--data", "none.jsonl", "--model", str(world[1])]) == 2 and "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show.main(["--data", str(world[3])])
