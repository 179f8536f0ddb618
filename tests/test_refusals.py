"""Bad input: each kind is refused with exit code 2 and one line that says what to do, before any weight is loaded.

    python tests/test_refusals.py        the table: each kind and the line it gets

Every case begins with a small model, eight rows and a command line that would train. One thing is then broken.
Left out: config.json in every detail, which test_model.py has, and what only a run under way can meet (test_run.py).
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import signal
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, small_model
from safetensors.torch import load_file, save_file

import train
from machine import checkpoint, folders, parallel
from machine import text as chat
from machine.files import BadInput
from machine.rows import MAX_LINE
from machine.flags import LAYOUT, Config
from machine.folders import companions, save_pretrained
from model import Transformer

GOOD = "--model model --data rows.jsonl --out out --steps 1 --batch-size 2 --buffer-size 4 --device cpu".split()
SHORT = 10_000              # characters of a rendered conversation at most, here
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
           "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}")


class Reached(BaseException):
    """The program went on to load weights. No `except Exception` hides it."""


# ---------------------------------------------------------------- a world to break

@functools.cache
def sound_world():
    """{path: bytes} of a folder in which GOOD would train."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_pretrained(small_model(dtype=torch.float32, vocab_size=1024), folder / "model", torch.float32, companions(ROOT / "data/tiny_model"))
        rows = [{"prompt": f"Tell of {n} dogs.", "chosen": f"There were {n} dogs.", "rejected": "No."} for n in range(8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def build(folder):
    for name, content in sound_world().items():
        write(folder / name, content)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode())


def read(path):
    return json.loads(path.read_text("utf-8"))


def picture(folder):
    """What is there: names, and what the files hold."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else os.readlink(p) if p.is_symlink() else None for p in folder.rglob("*")}


def call(folder, argv):
    """train.main in `folder`: (exit code, stderr). Loading weights raises Reached."""
    def reached(*_, **__):
        raise Reached

    err, here, handlers = io.StringIO(), os.getcwd(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.ExitStack() as stack:
        for target, name in ((parallel, "load_pretrained"), (parallel, "read_weights"), (folders, "read_weights"),
                             (Transformer, "init_weights")):
            stack.enter_context(mock.patch.object(target, name, reached))
        stack.enter_context(mock.patch.object(chat, "MAX_TEXT", SHORT))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(err))
        os.chdir(folder)
        try:
            return train.main(argv), err.getvalue()
        finally:
            os.chdir(here)
            for number, handler in handlers.items():
                signal.signal(number, handler)


# ---------------------------------------------------------------- ways to break it: each gives (what to do to the folder, the command line)

def flags(text):
    """The good command line with further flags, which beat the same flags before them."""
    return lambda folder: None, GOOD + text.split()


def only(*argv):
    return lambda folder: None, list(argv)


def files(more="", **contents):
    """Files written anew, or removed if None, by their names in FILES."""
    def damage(folder):
        for name, content in contents.items():
            path = folder / FILES[name]
            path.unlink(missing_ok=True)
            if content is not None:
                write(path, content)
    return damage, GOOD + more.split()


FILES = {"config": "model/config.json", "tokenizer": "model/tokenizer.json", "tokenizer_config": "model/tokenizer_config.json",
         "generation_config": "model/generation_config.json", "chat_template": "model/chat_template.jinja", "weights": "model/model.safetensors",
         "pickle": "model/pytorch_model.bin", "sentencepiece": "model/tokenizer.model", "rows": "rows.jsonl", "rows_json": "rows.json",
         "rows_gz": "rows.jsonl.gz", "rows_parquet": "rows.parquet", "template": "template.jinja", "run": "run/config.json", "source": "run/source/x",
         "note": "notes/note.txt"}


def line(content, more=""):
    """The third data line replaced."""
    def damage(folder):
        lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
        lines[2] = (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n"
        (folder / "rows.jsonl").write_bytes(b"".join(lines))
    return damage, GOOD + more.split()


def edit(name, more="", **changes):
    """Keys of a JSON file changed, or removed if None."""
    def damage(folder):
        path = folder / FILES[name]
        write(path, {k: v for k, v in (read(path) | changes).items() if v is not None})
    return damage, GOOD + more.split()


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model/model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model/model.safetensors", {"format": "pt"})
    return damage, GOOD


def index(file):
    """An index in place of the one file, in which lm_head.weight is said to be in `file`."""
    def damage(folder):
        folder /= "model"
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        names = dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
        write(folder / "model.safetensors.index.json", {"weight_map": names | {"lm_head.weight": file}})
    return damage, GOOD


def both(*ways):
    """Several things done, and the last command line."""
    def damage(folder):
        for do, _ in ways:
            do(folder)
    return damage, ways[-1][1]


def a_run(settings, argv):
    """A run folder `run` whose config.json says `settings` on top of what a run with GOOD says."""
    def damage(folder):
        kept = dict(dataclasses.asdict(Config(model="model", data="rows.jsonl", out="run", steps=1, batch_size=2, buffer_size=4)))
        write(folder / "run/config.json", {"layout": LAYOUT, "settings": kept | settings, "preset": "paper-dpo", "dtype": "float32"})
        write(folder / "run/source/x", "")
    return damage, argv.split()


def template(text):
    return files(chat_template=text)


TOP = "model.layers.1."
NO_TEMPLATE = files(chat_template=None)
TWO_USERS = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
turn = lambda role, content: {"role": role, "content": content}

REFUSED = {     # kind: ((how to make it so, the command line), words that the line must say)

    # -- flags and settings
    "a flag that is unknown": (flags("--learning 3"), "--learning", "--help"),
    "a flag cut short": (flags("--batch 3"), "--batch", "--help"),
    "a number of steps that is a word": (flags("--steps many"), "--steps", "many"),
    "steps below 0": (flags("--steps -1"), "--steps", "at least 0"),
    "beta 0": (flags("--beta 0"), "--beta", "at least 1e-12"),
    "beta that is not a number": (flags("--beta nan"), "--beta", "nan", "a number"),
    "lambda below 0, whatever the loss": (flags("--lam -0.1"), "--lam", "at least 0"),
    "alpha above 1": (flags("--alpha 1.5"), "--alpha", "at most 1"),
    "an infinite learning rate": (flags("--lr inf"), "--lr", "inf"),
    "a loss that is not implemented": (flags("--loss ppo"), "--loss", "dpo"),
    "an optimizer that is not implemented": (flags("--optimizer sgd"), "--optimizer", "adamw"),
    "a segment of 0 tokens": (flags("--segment 0"), "--segment", "50%"),
    "a segment of 150%": (flags("--segment 150%"), "--segment", "50%"),
    "an EMA update every 0 steps": (flags("--ema-every 0"), "--ema-every", "epoch"),
    "a reference refreshed sometimes": (flags("--ref-refresh sometimes"), "--ref-refresh", "never"),
    "a warm-up below 0": (flags("--warmup=-3"), "--warmup", "10%"),
    "batches of 0": (flags("--batch-size 0"), "--batch-size", "at least 1"),
    "a buffer smaller than a batch": (flags("--buffer-size 1"), "--buffer-size 1", "batch of 2"),
    "a temperature below 0": (flags("--temperature -1"), "--temperature", "at least 0"),
    "a temperature that is nearly 0": (flags("--temperature 1e-40"), "--temperature 1e-40", "give 0"),
    "a nucleus of nothing": (flags("--top-p 0"), "--top-p", "at least 1e-06"),
    "a seed below 0": (flags("--seed -1"), "--seed", "at least 0"),
    "a text longer than the context": (flags("--max-length 129"), "--max-length 129", "128"),
    "a prompt that leaves no room": (flags("--max-prompt-length 128"), "--max-prompt-length 128", "no room for a response"),
    "both lengths, which leave no room": (flags("--max-prompt-length 64 --max-length 64"), "--max-prompt-length 64", "no room for a response"),
    "a device that is not here": (flags("--device cuda"), "--device cuda", "--device cpu"),
    "random weights without SFT": (flags("--from-scratch"), "--from-scratch with --sft-steps 0", "give them some SFT"),
    "adapters on random weights": (flags("--from-scratch --sft-steps 3 --lora 4"), "--lora", "--from-scratch"),
    "adapters on projections that do not exist": (flags("--lora 4 --lora-projections q_proj,x_proj"), "--lora-projections", "q_proj"),
    "adapters with shards": (flags("--lora 4 --shard"), "--lora with --shard", "torchrun"),
    "shards in a single process": (flags("--shard"), "--shard", "torchrun"),
    "a preset that is unknown": (flags("--preset huge"), "--preset", "paper-dpo"),
    "data without a model": (only("--data", "rows.jsonl"), "--model is missing", "folder or hub name"),
    "a model without data": (only("--model", "model"), "--data is missing", "prompt and chosen"),
    "y- from data that have none": (both(line({"prompt": "a", "chosen": "b"}), flags("--rejected data")), "--rejected data", "no rejected"),

    # -- --config and --resume
    "a config that is not there": (flags("--config none.json"), "none.json", "no such file"),
    "a config of something else": (flags("--config model/config.json"), "model/config.json", "not the config.json of a run"),
    "a config with an unknown setting": (a_run({"speed": 9}, "--config run/config.json"), "run/config.json",
                                         "not the config.json of a run", "speed"),
    "a config of an older version": (a_run({"write_ahead": 8, "write_rows": 64}, "--config run/config.json"), "run/config.json",
                                     "not the config.json of a run of this version", "write_ahead"),
    "a config with a setting of the wrong type": (a_run({"steps": "ten"}, "--config run/config.json"), "--steps is 'ten'", "int"),
    "a config with true for a number": (a_run({"lr": True}, "--config run/config.json"), "--lr is True", "float"),
    "a run to resume that is not there": (only("--resume", "none"), "none/config.json", "no such file"),
    "a run to resume that is a model": (only("--resume", "model"), "model/config.json", "not the config.json of a run"),
    "a run of an older version to resume": (a_run({"write_ahead": 8, "write_rows": 64}, "--resume run"), "run/config.json",
                                            "not the config.json of a run of this version", "write_ahead"),
    "rows for SFT, and no SFT": (flags("--sft-data rows.jsonl"), "--sft-data without --sft-steps", "give --sft-steps N"),
    "weight decay of an optimizer that has none": (flags("--weight-decay 0.1"), "--weight-decay 0.1", "--optimizer adamw"),
    "a run to resume with a preset": (a_run({}, "--resume run --preset tiny"), "--resume and --preset", "give one of them"),
    "a run to resume with another loss": (a_run({}, "--resume run --loss orpo"), "--loss orpo contradicts the saved run", "'dpo'"),
    "a run to resume whose config is cut": (both(a_run({}, ""), (lambda f: (f / "run/config.json").write_text('{"settings": {'), ["--resume", "run"])),
                                            "run/config.json", "JSON"),

    # -- data
    "data that are not there": (flags("--data none.jsonl"), "none.jsonl", "no such file"),
    "eval data that are not there": (flags("--eval-data none.jsonl"), "none.jsonl", "no such file"),
    "SFT data that are not there": (flags("--sft-data none.jsonl --sft-steps 1"), "none.jsonl", "no such file"),
    "data that are a model's folder": (flags("--data model"), "model/config.json, line 1", "not JSON"),
    "data that are a folder of something else": (files("--data notes", note="x"), "notes", "no .jsonl or .json file in it"),
    "data in parquet": (files("--data rows.parquet", rows_parquet=b"PAR1"), "rows.parquet", "only JSON lines are read", "to_json"),
    "a comma behind the data": (flags("--data rows.jsonl,"), "rows.jsonl,", "a path between commas is empty"),
    "a comma and a blank for eval data": ((lambda f: None, GOOD + ["--eval-data", " , "]), "a path between commas is empty"),
    "data in an unsound gzip": (files("--data rows.jsonl.gz", rows_gz=b"not gzip"), "rows.jsonl.gz", "cannot be read"),
    "data in a gzip cut short": (files("--data rows.jsonl.gz", rows_gz=gzip.compress(b'{"prompt": "a", "chosen": "b"}\n' * 99)[:-12]),
                                 "rows.jsonl.gz", "cannot be read"),
    "data in .json that are one object": (files("--data rows.json", rows_json={"data": [{"prompt": "a", "chosen": "b"}]}), "rows.json, line 1", "['data']"),
    "data in .json that are cut short": (files("--data rows.json", rows_json=b'[{"prompt": "a"'), "rows.json", "JSON"),
    "a row of a .json list": (files("--data rows.json", rows_json=[{"prompt": "a", "chosen": "b"}, {"prompt": "a"}]), "rows.json, row 2", "chosen"),
    "an empty file": (files(rows=b""), "rows.jsonl", "no rows"),
    "blank lines alone": (files(rows=b"\n \n\t\n"), "rows.jsonl", "no rows"),
    "a single row": (files(rows={"prompt": "a", "chosen": "b"}), "rows.jsonl", "one row is not enough", "--eval-data"),
    "a model for data": (flags("--data model/model.safetensors"), "model.safetensors, line 1", "not"),
    "a line that is not JSON": (line(b'{"prompt": "a", "chosen": "b"'), "rows.jsonl, line 3", "not JSON"),
    "a line that is a list": (line(["a", "b"]), "rows.jsonl, line 3", "prompt", "chosen"),
    "a line that is not UTF-8": (line(b'{"prompt": "caf\xe9", "chosen": "b"}'), "rows.jsonl, line 3", "UTF-8"),
    "a line with half a surrogate pair": (line(b'{"prompt": "a", "chosen": "\\ud83d"}'), "rows.jsonl, line 3", "UTF-8"),
    "a key that stands twice": (line(b'{"prompt": "a", "chosen": "b", "chosen": "c"}'), "rows.jsonl, line 3", "a key stands twice"),
    "a line of 100,000 brackets": (line(b"[" * 100_000), "rows.jsonl, line 3", "not JSON"),
    "a line of 10 MB": (line(b'"' + b"a" * MAX_LINE), "rows.jsonl, line 3", "longer than", "JSON lines"),
    "a row without a prompt": (line({"chosen": "b"}), "rows.jsonl, line 3", "prompt is missing", "messages"),
    "a row without a response": (line({"prompt": "a"}), "rows.jsonl, line 3", "['prompt']", "needs prompt and chosen"),
    "a response that is a number": (line({"prompt": "a", "chosen": 7}), "rows.jsonl, line 3", "chosen must be a text or a list of messages"),
    "an empty response": (line({"prompt": "a", "chosen": ""}), "rows.jsonl, line 3", "response is empty"),
    "a response of blanks": (line({"prompt": "a", "chosen": " \n"}), "rows.jsonl, line 3", "response is empty"),
    "an empty worse response": (line({"prompt": "a", "chosen": "b", "rejected": " "}), "rows.jsonl, line 3", "the rejected response is empty"),
    "no messages": (line({"messages": []}), "rows.jsonl, line 3", "messages must be a"),
    "messages that end with the user's": (line({"messages": [turn("assistant", "a"), turn("user", "b")]}), "rows.jsonl, line 3", "assistant"),
    "messages without a question": (line({"messages": [turn("assistant", "b")]}), "rows.jsonl, line 3", "before the assistant's answer"),
    "a message without content": (line({"messages": [{"role": "user"}, turn("assistant", "b")]}), "rows.jsonl, line 3", "role and a content"),
    "a message whose content is a list": (line({"messages": [turn("user", [{"type": "image"}]), turn("assistant", "b")]}),
                                          "rows.jsonl, line 3", "both text"),
    "a verifier of something else": (line({"prompt": "a", "chosen": "b", "verifier": {"must": "b"}}), "rows.jsonl, line 3",
                                     "verifier must be", "must_not"),
    "a verifier of something else, under its old name": (line({"prompt": "a", "chosen": "b", "judge": {"must": "b"}}),
                                                         "rows.jsonl, line 3", "verifier must be", "must_not"),
    "a malformed line of eval data": (both(line({"prompt": "a"}), flags("--eval-data rows.jsonl")), "rows.jsonl, line 3", "chosen"),
    "responses that hold nothing but an end": (files(rows=b'{"prompt": "a", "chosen": "<|end|>"}\n' * 9), "dropped", "--max-length"),

    # -- where the model is
    "a model that is nowhere": (flags("--model some/model"), "--model some/model", "no such folder", "give its folder"),
    "a model name with ../": (flags("--model ../../x"), "--model ../../x", "no such folder", "hub name"),
    "a model name with a blank": ((lambda f: None, GOOD + ["--model", "my model"]), "--model my model", "hub name"),
    "a model name with NUL": ((lambda f: None, GOOD + ["--model", "mod\0el"]), "--model", "hub name"),
    "a model that is a file": (flags("--model rows.jsonl"), "--model ", "rows.jsonl: no such folder"),
    "a data name with NUL": ((lambda f: None, GOOD + ["--data", "rows\0.jsonl"]), "rows", "no such file"),

    # -- config.json against the weights
    "no config.json": (files(config=None), "model/config.json", "model folder"),
    "a config.json that is not JSON": (files(config=b"{'vocab_size': 1024}"), "model/config.json", "JSON"),
    "a config.json without its sizes": (edit("config", hidden_size=None), "hidden_size", "whole number"),
    "a family that is not implemented": (edit("config", model_type="gpt2"), "gpt2", "llama"),
    "a rope that is not implemented": (edit("config", rope_parameters={"rope_type": "longrope", "factor": 4.0}), "longrope", "yarn"),
    "an activation that is not implemented": (edit("config", hidden_act="gelu"), "gelu", "only silu"),
    "quantised weights": (edit("config", quantization_config={"quant_method": "awq"}), "quantised", "use the unquantised checkpoint"),
    "a mixture of experts": (edit("config", num_local_experts=8), "mixture-of-experts"),
    "heads that cannot be shared": (edit("config", num_key_value_heads=4), "6 query heads", "4 key-value heads"),
    "more layers in the config than in the weights": (edit("config", num_hidden_layers=3), "model.layers.2.", "and 8 others are missing from the weights"),
    "10^12 parameters, said the config": (edit("config", hidden_size=2**20, intermediate_size=2**20, vocab_size=2**20), "has shape", "1048576"),
    "a tied head that differs": (edit("config", tie_word_embeddings=True), "lm_head", "embedding"),

    # -- the weights
    "no weights": (files(weights=None), "no model.safetensors", "convert"),
    "weights in a pickle": (files(weights=None, pickle=pickle.dumps({})), "no model.safetensors", "convert pickled weights"),
    "a pickle that calls itself safetensors": (files(weights=pickle.dumps({"lm_head.weight": b"x" * 999})), "not a sound safetensors file"),
    "weights cut short": ((lambda f: os.truncate(f / "model/model.safetensors", 20_000), GOOD), "not a sound safetensors file"),
    "a header that claims 2 GB": (files(weights=(2 * 10**9).to_bytes(8, "little") + b"{}" * 50), "not a sound safetensors file"),
    "a header that claims 2 GB of one tensor": (files(weights=(lambda h: len(h).to_bytes(8, "little") + h)(
        b'{"lm_head.weight": {"dtype": "F32", "shape": [500000000], "data_offsets": [0, 2000000000]}}')), "not a sound safetensors file"),
    "a tensor that is missing": (weights(lambda w: w.pop(TOP + "mlp.up_proj.weight")), "mlp.up_proj.weight", "missing"),
    "a tensor too many": (weights(lambda w: w.update({TOP + "mlp.fourth.weight": torch.ones(2)})), "fourth", "not in the model"),
    "a tensor of another shape": (weights(lambda w: w.update({TOP + "mlp.up_proj.weight": torch.ones(24, 28)})), "(24, 28)", "(28, 24)"),
    "weights that are whole numbers": (weights(lambda w: w.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)})), "I8", "float32"),
    "a shard that is missing": (index("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors", "not a file in this folder"),
    "an index that points to ../": (index("../rows.jsonl"), "../rows.jsonl", "not a file in this folder"),
    "an index that points to /": (index("/etc/passwd"), "/etc/passwd", "not a file in this folder"),

    # -- tokenizer and chat template
    "no tokenizer": (files(tokenizer=None), "no tokenizer.json", "copy it"),
    "a sentencepiece model alone": (files(tokenizer=None, sentencepiece=b"\n\x0b"), "convert tokenizer.model", "AutoTokenizer"),
    "a tokenizer cut short": ((lambda f: os.truncate(f / "model/tokenizer.json", 9_000), GOOD), "model/tokenizer.json", "not a tokenizer"),
    "a tokenizer of bytes": (files(tokenizer=b"\xff\xfe" * 99), "model/tokenizer.json", "not a tokenizer"),
    "a tokenizer that is another object": (files(tokenizer={"model": 3}), "model/tokenizer.json", "not a tokenizer"),
    "more tokens than the model has": (both(edit("config", vocab_size=900), weights(lambda w: w.update(
        {k: w[k][:900].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")}))), "ids go up to 945", "only 900", "resize"),
    "settings of the tokenizer cut short": ((lambda f: os.truncate(f / "model/tokenizer_config.json", 9), GOOD), "model/tokenizer_config.json", "not JSON"),
    "settings of the tokenizer that are a list": (files(tokenizer_config=[1]), "model/tokenizer_config.json", "not a JSON object"),
    "a template that is not UTF-8": (files(chat_template="caf\u00e9 {{ x }}".encode("latin-1")), "chat_template.jinja is not UTF-8"),
    "no end token": (both(files(generation_config=None, chat_template=None), edit("tokenizer_config", eos_token=None),
                          edit("config", eos_token_id=None)), "no end token"),
    "conversations without a chat template": (both(NO_TEMPLATE, line({"messages": [turn("user", "a"), turn("assistant", "b")]})), "--chat-template"),
    "a template file that is not there": (flags("--chat-template none.jinja"), "--chat-template none.jinja", "cannot be read"),
    "a template file that is not UTF-8": (files("--chat-template template.jinja", template=b"\xff\xfe{{ x }}"),
                                          "--chat-template ", "template.jinja: cannot be read"),
    "a template that is not Jinja": (template("{% for m in messages %}{{ m.content }}"), "not valid Jinja"),
    "a template that is a number": (both(NO_TEMPLATE, edit("tokenizer_config", chat_template=7)), "chat template is not valid Jinja"),
    "a template that makes a book of a line": (template(f"{{{{ 'a' * {SHORT + 1} }}}}"), "chat template makes 10,001 characters",
                                               "one conversation", "10,000"),
    "a template that counts to 10^9": (template("{% for i in range(10**9) %}{% endfor %}"), "chat template", "Range too big"),
    "a template that reaches for classes": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template", "unsafe"),
    "a template that reaches for globals": (template("{{ raise_exception.__globals__['os'].listdir('/') }}"), "chat template", "unsafe"),
    "a template that writes into the messages": (template("{{ messages.append(1) }}"), "chat template", "unsafe"),
    "a template that asks for a file": (template("{% include '/etc/passwd' %}"), "chat template", "loader"),
    "a template that refuses the roles": (both(line(TWO_USERS), template(MISTRAL)), "chat template refuses", "'user', 'user'", "must alternate"),

    # -- where the run goes
    "a run folder that is a file": (flags("--out rows.jsonl"), "--out rows.jsonl exists and is not a run folder", "another name"),
    "a run folder below a file": (flags("--out rows.jsonl/run"), "--out rows.jsonl/run", "no folder can be made there", "another name"),
    "a run folder that is the model": (flags("--out model"), "--out model exists and is not a run folder", "another name"),
    "a run folder that exists": (a_run({}, " ".join(GOOD + ["--out", "run"])), "--out run exists", "--resume run", "--overwrite"),
    "a folder that is no run, to be replaced": (flags("--out model --overwrite"), "--out model", "not a run folder", "not replaced"),
    "a file to be replaced": (flags("--out rows.jsonl --overwrite"), "--out rows.jsonl", "not a run folder", "another name"),
    "a run to be replaced that holds the model": (both(a_run({}, ""), (lambda f: (f / "model").rename(f / "run/model"),
                                                       GOOD + "--model run/model --out run --overwrite".split())),
                                                  "--out run", "run/model; or choose another name"),
    "such a run whose name has a comma": (both(a_run({}, ""), (lambda f: (f / "model").rename(f / "run/model"), []),
                                               (lambda f: (f / "run").rename(f / "lr1,b2"), GOOD + "--model lr1,b2/model --out lr1,b2 --overwrite".split())),
                                          "--out lr1,b2", "lr1,b2/model; or choose another name"),
    "the folder one stands in": (flags("--out ."), "--out .", "another name"),
    "a run folder whose name has NUL": ((lambda f: None, GOOD + ["--out", "o\0ut"]), "--out", "null byte", "another name"),
    "a run folder whose name is too long": (flags("--out " + "o" * 300), "--out", "too long", "another name"),
    "a run folder that is a link to nowhere": ((lambda f: (f / "out").symlink_to(f / "nowhere"), GOOD), "--out out exists", "another name"),
}


def refuse(folder, kind):
    """(exit code, stderr, what stood in the folder before, and after) of one kind."""
    (damage, argv), *_ = REFUSED[kind]
    build(folder)
    damage(folder)
    before = picture(folder)
    return *call(folder, argv), before, picture(folder)


def test_the_command_line_is_good_until_something_is_broken(tmp_path):
    build(tmp_path)
    with pytest.raises(Reached):
        call(tmp_path, GOOD)
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line_before_any_weight_is_loaded(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, err, before, after = refuse(tmp_path, kind)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and len(err) < 600, err
    for word in REFUSED[kind][1:]:
        assert word in err
    assert after == before, "something was written or changed"


def test_a_folder_in_which_nothing_can_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    (tmp_path / "there").mkdir()
    checkpoint.may_write(Config(out=str(tmp_path / "there/run")))
    with pytest.raises(BadInput, match="nothing can be written there; choose another folder"):
        checkpoint.may_write(Config(out=str(tmp_path / "new/run")))


def test_what_is_cleared_up_is_the_runs_own(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in ("mine.tmp", "results.json.tmp", ".model.tmp", "checkpoint/.step-00000003.tmp", "checkpoint/notes.tmp"):
        (tmp_path / name).write_text("x")
    checkpoint.clear_up(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoint", "mine.tmp", "notes.tmp"]


if __name__ == "__main__":
    width = max(map(len, REFUSED))
    for kind in REFUSED:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kind:<{width}}  {refuse(Path(folder), kind)[1].strip()}", flush=True)
    print(f"{len(REFUSED)} kinds")
