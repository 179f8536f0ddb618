"""Broken and hostile files, thousands of them: each must be taken, or refused in one line that a person can read.

    python tools/fuzz.py all                 20,000 data lines, 2,000 of each JSON file, 1,000 headers, 500 templates, 600 tokenizers
    python tools/fuzz.py lines 500 --from 7  cases 7 to 506 of one kind: lines, configs, headers, templates or tokenizers

A case is a sound folder or data file in which one file was damaged, as a generator seeded by kind and number decides.
It goes through train.main, with only the training itself left out, and in one case of 23 with the training as well
(data lines go straight through read_rows and Data, which is where main sends them, and one in 46 through main and training).
Taken means exit code 0. Refused means exit code 2, a single line on standard error, and no file written. All else has
escaped: a traceback, another exit code, more lines or control characters, more than LIMIT seconds, MEMORY bytes more.
Escaped cases are printed with their number; what once escaped is a case of tests/test_fuzz.py, written out.
A tokenizer is tried in a process of its own, with training in one case of three, for its library may end the process
(a Rust abort, which no Python can catch): that is counted as aborted. Left out: templates made to run for ever or to fill
the memory on their way, which nothing in the project stops; how long a text they may make is bounded (MAX_TEXT).
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train
from machine import folders
from machine.dataset import Data
from machine.rows import read_rows
from machine.text import Text
from machine.files import BadInput
from machine.flags import Config
from machine.config import read_config
from machine.folders import companions, save_pretrained
from machine.parallel import starting_model
from model import ModelConfig, Transformer

LIMIT = 12                  # seconds of computing a case
MEMORY = 4 * 2**30          # bytes of address space a case
COUNTS = {"lines": 20_000, "configs": 2000, "headers": 1000, "templates": 500, "tokenizers": 600}
ROWS = [{"prompt": "Who is Ada?", "chosen": "A girl with a red kite."},
        {"prompt": "Where?", "chosen": "In the park \u2014 b\u00fccher \u6f22\u5b57 \U0001f600.", "rejected": "No.",
         "verifier": {"must": ["park"], "must_not": ["rain"]}},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"}], "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                                                  {"role": "user", "content": "c"}, {"role": "assistant", "content": "e"}],
         "id": 7}]
CONFIGS = {"llama": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": False, "rope_theta": 5e5, "torch_dtype": "float32",
                     "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 64}},
           "mistral": {"model_type": "mistral", "sliding_window": 8, "rope_theta": 1e4, "hidden_act": "silu", "eos_token_id": 1},
           "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2, "layer_types": ["full_attention"] * 2,
                     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "eos_token_id": [1, 3]},
           "qwen3": {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "attention_bias": False, "use_cache": True},
           "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True, "no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "use_sliding_window": False,
                       "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16, "mscale": 1.0,
                                        "mscale_all_dim": 0.5, "truncate": False}},
           "gemma3_text": {"model_type": "gemma3_text", "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 8,
                           "layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2, "hidden_act": None,
                           "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": None, "use_bidirectional_attention": False,
                           "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                               "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}}
GENERATION = {"bos_token_id": 0, "eos_token_id": [1, 4], "pad_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9,
              "_from_model_config": True}
CHATML = """{%- if messages[0]['role'] == 'system' %}{% set first = 1 %}{{ '<|system|>' + messages[0]['content'] + '<|end|>' }}{% else %}{% set first = 0 %}{{ '<|system|>You are kind.<|end|>' }}{% endif %}
{%- for message in messages[first:] %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<|' + message.role + '|>' + message['content'] | trim }}{% generation %}{{ eos_token }}{% endgeneration %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
DATED = """{{- bos_token }}{%- set ns = namespace(system='') %}
{%- if tools is defined and tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- macro shown(m) %}{{ '<|' ~ m.role ~ '|>\\n' ~ (m.content if m.content is string else m.content | tojson) }}{% endmacro %}
{%- set date = strftime_now('%d %b %Y') %}{{- '<|system|>Today: ' + date + '<|end|>' }}
{%- for m in messages %}{% if m.role in ['user', 'assistant', 'system'] %}{{- shown(m) + '<|end|>' }}{% else %}{% break %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
SNIPPETS = ["{{ messages }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{% include 'x' %}", "{% extends '/etc/passwd' %}",
            "{% import 'x' as y %}",
            "{% for i in range(9999) %}{% for j in range(99) %}xxxxxxxxxxxxx{% endfor %}{% endfor %}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 9**9**5 }}", "{{ 'x' * 10**8 }}", "{{ [0] * 10**7 }}", "{{ 'x' | center(10**8) }}",
            "{{ '%099999999d' % 1 }}", "{{ 10**5000 }}",
            "{% set n = namespace(x='xx') %}{% for i in range(24) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "{{ strftime_now('%' * 5000) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('one\nline\x1b[2J') }}", "{{ raise_exception(messages) }}",
            "{{ lipsum(9, html=false) }}",
            "{{ messages | tojson | length }}", "{{ undefined.attribute }}", "{{ messages[0].update(role='x') }}", "{{ messages.append(1) }}",
            "{{ '\\ud800' }}", "{% raw %}",
            "{{ none.x }}", "{{ eos_token * 3 }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ 'x' | indent(10**8) }}",
            "{{ messages | map(attribute='role') | list }}",
            "{{ ('(' * 3000) }}", "{{ " + "(" * 3000, "{{ " + "-" * 3000 + "1 }}", "{% if 1 %}" * 300, "{{ " + "a." * 3000 + "a }}", "{{ 1/0 }}",
            "{{ '{}'.format(x) }}",
            "{{ '{0.__class__}'.format(messages) }}", "{{ strftime_now }}", "{{ namespace(**{'a': 1}).a }}", "{{ tools.x }}", "{{ joiner() }}",
            "{% trans %}x{% endtrans %}"]
DEEP = "@deep@"             # stands for 10,000 brackets, which json cannot write
WEIRD = [None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**53, 2**63, -2**63, 10**30, 10**400, 0.5, -0.0, 5e-324, 1e308, float("nan"),
         float("inf"), -float("inf"),
         "", " ", "a", "1", "silu", "\ud800", "\x00", "\x1b[2J\x07", "\u2028\u0085", "\u202e", "\U0001f600", "../../etc/passwd", "/etc/passwd",
         "x" * 5000, "<|end|>", "<s>",
         [], {}, [[]], [None], ["a", 1], {"": None}, {"content": 3}, {"content": "<|end|>"}, {"__class__": "x"}, {"role": "assistant", "content": ""},
         [{"role": "assistant", "content": "x"}], [{"name": "default", "template": "{{ messages }}"}], DEEP, "{{ messages }}", "llama", list(range(3000))]
PIECES = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\udfff\\ud800", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"-1",
          b"9" * 30, b"9" * 5000, b'"', b"\\",
          b"[" * 10_000, b'{"":' * 10_000, b"{", b"}", b"]", b",", b":", b"null", b"true", b"\n", b"\r", b"\x0b", b"\x1b[2J", b"\xe2\x80\xa8",
          b" " * 5000, b"{}", b'"chosen":', b"{{", b"%}"]


WORDS = ["Who", "is", "Ada", "?", "A", "girl", "with", "a", "red", "kite", ".", "Where", "In", "the", "park", "No", "Hello", "Good", "day", "Be", "kind"]
ENDS = {"<s>": 0, "<|end|>": 1, "<|user|>": 2, "<|assistant|>": 3, "<|system|>": 4}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?,<>|_ \u2581"


def numbered(pieces):
    return ENDS | {piece: i for i, piece in enumerate(dict.fromkeys(pieces), len(ENDS))}


MODELS = [      # beside the tiny world's own
    {"type": "WordLevel", "vocab": numbered(["[UNK]", *WORDS, *LETTERS]), "unk_token": "[UNK]"},
    {"type": "WordPiece", "vocab": numbered(["[UNK]", *WORDS, *LETTERS, *("##" + c for c in LETTERS)]), "unk_token": "[UNK]", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 100},
    {"type": "Unigram", "unk_id": 5, "byte_fallback": False, "vocab": [[piece, -float(i)] for piece, i in numbered(["<unk>", *WORDS, *LETTERS]).items()]},
    {"type": "BPE", "vocab": numbered([*(f"<0x{i:02X}>" for i in range(256)), *LETTERS, "th", "the"]), "merges": [["t", "h"], ["th", "e"]], "unk_token": None,
     "byte_fallback": True, "fuse_unk": True, "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}]
PARTS = {"normalizer": [
    None, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "StripAccents"}, {"type": "Nmt"},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAA"}, {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Prepend", "prepend": "x" * 5000}, {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 50_000},
    {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": "y"}, {"type": "Replace", "pattern": {"Regex": ""}, "content": "zz"},
    {"type": "Replace", "pattern": {"String": ""}, "content": ""}, {"type": "Sequence", "normalizers": [{"type": "NFD"}] * 300}],
         "pre_tokenizer": [
    None, {"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}, {"type": "Digits", "individual_digits": True},
    {"type": "Split", "pattern": {"Regex": "(?=(x+x+)+y)"}, "behavior": "Isolated", "invert": False}, {"type": "CharDelimiterSplit", "delimiter": "e"},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True}, {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": 0}],
         "post_processor": [
    None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, {"type": "BertProcessing", "sep": ["<|end|>", 1], "cls": ["<s>", 0]},
    {"type": "RobertaProcessing", "sep": ["<|end|>", 2**31], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
     "special_tokens": {"<s>": {"id": "<s>", "ids": [7_000_000], "tokens": ["<s>"]}}}],
         "decoder": [None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "ByteFallback"}, {"type": "Fuse"},
                     {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
                     {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}, {"type": "Strip", "content": " ", "start": 2**40, "stop": 0},
                     {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 50_000}]}
IDS = [-1, 5, 1023, 1024, 5000, 2**31 - 1, 2**31, 2**31 + 5, 2**32, 2**63, 1.5, "7"]


# ------------------------------------------------------------------------------------------------ damage

def spoil_bytes(rng, content):
    """One to four small injuries: flipped, lost, doubled, moved, cut off, or foreign bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 60))
        way = rng.randrange(7)
        if way == 0 and i < len(content):
            content[i] ^= 1 << rng.randrange(8)
        elif way == 1:
            del content[i:i + n]
        elif way == 2:
            content[i:i] = content[i:i + n] * rng.choice((1, 2, 50))
        elif way == 3:
            part = content[i:i + n]
            del content[i:i + n]
            content[(j := rng.randrange(len(content) + 1)):j] = part
        elif way == 4 and rng.random() < 0.3:
            del content[i:]
        elif way == 5:
            content[i:i] = rng.randbytes(n)
        else:
            content[i:i + rng.choice((0, n))] = rng.choice(PIECES)
    return bytes(content)


def spoil_json(rng, value):
    """One to three values of a JSON tree replaced by strange ones, lost, renamed, doubled or wrapped; as bytes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = [(value, k) for k in (value if isinstance(value, dict) else range(len(value)))] if isinstance(value, (dict, list)) else []
        for holder, k in places:                         # grows while it is walked: all places of the tree
            if isinstance(holder[k], (dict, list)):
                places += [(holder[k], j) for j in (holder[k] if isinstance(holder[k], dict) else range(len(holder[k])))][:200]
        if not places or rng.random() < 0.02:
            value = copy.deepcopy(rng.choice(WEIRD))
            continue
        (holder, k), strange = rng.choice(places), copy.deepcopy(rng.choice(WEIRD))
        way = rng.randrange(6)
        if way == 0:
            del holder[k]
        elif way == 1 and isinstance(holder, dict):
            holder[str(strange)[:60]] = holder.pop(k)
        elif way == 2:
            holder[k] = [holder[k]] * rng.choice((1, 2, 100))
        elif way == 3:
            other, j = rng.choice(places)
            with contextlib.suppress(ValueError, IndexError, KeyError):
                holder[k] = json.loads(json.dumps(other[j]))
        else:
            holder[k] = strange
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    return text.replace(f'"{DEEP}"', "[" * 10_000 + "]" * 10_000).encode("utf-8", "surrogatepass")


def spoil_text(rng, text):
    """A template with strange statements put in between its own, or bytes spoiled."""
    if rng.random() < 0.4:
        return spoil_bytes(rng, text.encode())
    for _ in range(rng.randint(1, 2)):
        i = rng.choice([0, len(text), rng.randrange(len(text)), max(0, text.find("{", rng.randrange(len(text))))])
        text = text[:i] + rng.choice(SNIPPETS) + text[i:]
    return text.encode("utf-8", "surrogatepass")


def spoil_tokenizer(rng, content):
    """tokenizer.json with another model or another part, ids that nothing has, settings that draw or count; or spoiled as any JSON."""
    value = json.loads(content)
    if rng.random() < 0.6:
        value["model"] = copy.deepcopy(rng.choice(MODELS))
        value |= {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
                  "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}}
    for _ in range(rng.choice((1, 1, 2, 3))):
        way, model = rng.randrange(7), value["model"]
        if way < 3:
            part = rng.choice(sorted(PARTS))
            value[part] = copy.deepcopy(rng.choice(PARTS[part]))
        elif way == 3 and isinstance(model["vocab"], dict):
            model["vocab"][rng.choice(sorted(model["vocab"]))] = rng.choice(IDS)
        elif way == 3:
            model["unk_id"] = rng.choice([None, *IDS])
        elif way == 4:
            model |= {"unk_token": rng.choice([None, "<zz>", "a"]), "dropout": rng.choice([None, 0.3, 1.0, 2.0, -1.0]), "byte_fallback": rng.random() < 0.5}
        elif way == 5:
            for piece in rng.sample(sorted(model["vocab"]) if isinstance(model["vocab"], dict) else range(5, 20), 9):
                model["vocab"].pop(piece if isinstance(piece, str) else 5)
        else:
            value["added_tokens"].append({"id": rng.choice(IDS), "content": rng.choice(["e", "<|end|>", "<x>", ""]), "special": rng.random() < 0.5,
                                          "single_word": False, "lstrip": True, "rstrip": False, "normalized": rng.random() < 0.5})
    content = json.dumps(value).encode()
    return content if rng.random() < 0.85 else spoil_json(rng, value) if rng.random() < 0.8 else spoil_bytes(rng, content)


def spoil_header(rng, content):
    """The JSON header of a safetensors file, its length, or a piece of the file anywhere."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = content[8:8 + size], content[8 + size:]
    way = rng.randrange(5)
    if way < 3:
        header = spoil_json(rng, json.loads(header)) if way else spoil_bytes(rng, header)
        length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(header) + len(body),
                                                                    len(header) + rng.randint(-9, 9)))
        return struct.pack("<Q", max(0, length)) + header + body
    if way == 3:
        return content[:rng.randrange(len(content))]
    return spoil_bytes(rng, content[:size + 8]) + body


# ------------------------------------------------------------------------------------------------ where it is put

def small_model(**changes):
    """A model that is loaded and trained in a moment, with random weights."""
    sizes = dict(vocab_size=1024, hidden_size=12, intermediate_size=9, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=4, max_position_embeddings=512)
    return Transformer(ModelConfig(**sizes | changes)).init_weights(torch.Generator().manual_seed(0))


@contextlib.contextmanager
def memory_limit(more):
    """MemoryError inside beyond `more` bytes of address space above what the process has, where there is a /proc."""
    try:
        import resource
        with open("/proc/self/statm", "rb") as f:
            limit = int(f.read().split()[0]) * resource.getpagesize() + more
    except (ImportError, OSError):                       # only Linux has both
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    lower = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Bench:
    """Sound folders and data files under a temporary folder, in which one file at a time is damaged."""

    def __init__(self, root):
        self.root, self.out = Path(root), Path(root) / "out"
        tokenizer = companions(ROOT / "data/tiny_model")
        settings = json.loads(tokenizer["tokenizer_config.json"])
        template = tokenizer["chat_template.jinja"].decode()
        settings |= {"pad_token": None, "unk_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"},
                     "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
        for name, changes in CONFIGS.items():
            model = small_model(tie_word_embeddings=name in ("llama", "smollm3", "gemma3_text"), qkv_bias=name == "qwen2",
                                qk_norm=name in ("qwen3", "gemma3_text"), gemma_norms=name == "gemma3_text")
            beside = tokenizer | {"generation_config.json": json.dumps(GENERATION).encode()}
            before = folders.SHARD_BYTES
            folders.SHARD_BYTES = 30_000 if name == "mistral" else before
            save_pretrained(model, self.root / name, torch.float32, beside)
            folders.SHARD_BYTES = before
            config = json.loads((self.root / name / "config.json").read_text())
            config = {k: v for k, v in config.items() if not k.startswith("rope")} | changes
            (self.root / name / "config.json").write_text(json.dumps(config))
            if name.startswith("qwen"):                  # the template stands in tokenizer_config.json, in both its forms
                (self.root / name / "chat_template.jinja").unlink()
                settings["chat_template"] = template if name == "qwen2" else [{"name": "tool_use", "template": "{{ tools }}"},
                                                                              {"name": "default", "template": template}]
                (self.root / name / "tokenizer_config.json").write_text(json.dumps(settings))
        self.good = self.root / "good.jsonl"
        self.good.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
        self.plain = self.root / "plain.jsonl"           # what a small vocabulary can say
        self.plain.write_text("".join(json.dumps({"prompt": f"Where is {name}?", "chosen": f"In the park with {name}."}) + "\n" for name in ("Ada", "Bob", "a girl")))
        folder = self.root / "llama"
        self.text = Text(companions(folder), folder, read_config(folder))
        self.cfg = Config(max_length=64, max_prompt_length=48)

    def damage(self, kind, number):
        """(file to damage, its new bytes, model folder, data file) of one case."""
        rng, data = random.Random(f"{kind} {number}"), self.good
        folder = self.root / list(CONFIGS)[number % len(CONFIGS)]
        if kind == "lines":
            row = rng.choice(ROWS)
            line = spoil_json(rng, row) if rng.random() < 0.6 else spoil_bytes(rng, json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
            data = self.root / rng.choice(("bad.jsonl",) * 8 + ("bad.json", "bad.jsonl.gz"))
            first = json.dumps(ROWS[0]).encode()
            content = b"[" + first + b"," + line + b"]" if data.suffix == ".json" else first + b"\n" + line + b"\n"
            if data.suffix == ".gz":
                content = gzip.compress(content, mtime=0)
                content = spoil_bytes(rng, content) if rng.random() < 0.5 else content
            return data, content, folder, data
        if kind == "configs":
            file = folder / ("config.json", "tokenizer_config.json", "generation_config.json")[number // len(CONFIGS) % 3]
            content = file.read_bytes()
            return file, spoil_json(rng, json.loads(content)) if rng.random() < 0.75 else spoil_bytes(rng, content), folder, data
        if kind == "headers":
            file = rng.choice(sorted(folder.glob("*.safetensors*")))
            content = file.read_bytes()
            if file.suffix == ".json":
                return file, spoil_json(rng, json.loads(content)) if rng.random() < 0.7 else spoil_bytes(rng, content), folder, data
            return file, spoil_header(rng, content), folder, data
        if kind == "tokenizers":
            return folder / "tokenizer.json", spoil_tokenizer(rng, (folder / "tokenizer.json").read_bytes()), folder, data
        folder = self.root / ("llama", "mistral")[number % 2]
        return folder / "chat_template.jinja", spoil_text(rng, rng.choice((CHATML, DATED, (folder / "chat_template.jinja").read_text()))), folder, data

    @contextlib.contextmanager
    def put(self, file, content):
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        try:
            yield
        finally:
            file.unlink()
            if before is not None:
                file.write_bytes(before)

    def run(self, kind, number):
        """One case by number: "accepted", "refused", or what is wrong."""
        file, content, folder, data = self.damage(kind, number)
        with self.put(file, content):
            if kind == "lines" and number % 46:
                return self.watched(lambda: self.lines(data), "")
            if kind == "tokenizers":
                return apart(lambda: self.main(folder, self.plain, number % 3 == 0, "--eval-data", self.plain))
            return self.main(folder, data, whole=number % 23 == 0)

    def lines(self, data):
        try:
            Data(read_rows(data), self.text, self.cfg, "train")
            return 0
        except BadInput as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return 2

    def main(self, folder, data, whole=False, *more):
        """Through train.main; without `whole`, loading the model takes the place of training it."""
        argv = ["--model", folder, "--data", data, "--eval-data", self.good, "--out", self.out, "--device", "cpu", "--steps", 1, "--batch-size", 1,
                "--buffer-size", 4, "--segment", 3, "--eval-rows", 2, "--eval-tokens", 3, "--samples", 1, *more]
        training, handlers = train.Run.train, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def load(run):
            starting_model(run.cfg, run.inputs.config, run.inputs.base, run.world, run.half)

        if not whole:
            train.Run.train = load
        try:
            return self.watched(lambda: train.main(list(map(str, argv))), str(folder))
        finally:
            train.Run.train = training
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def watched(self, function, name):
        """Call function() -> exit code with time, memory and output watched."""
        def ring(*_):
            raise TimeoutError("did not end by itself")

        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))      # as a process has them
        files, began, before = set(self.root.rglob("*")), time.process_time(), signal.signal(signal.SIGVTALRM, ring)
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)   # of computing, not of waiting for a core
        faulthandler.dump_traceback_later(20 * LIMIT, exit=True, file=sys.__stderr__)       # for what no signal stops
        wrong = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), memory_limit(MEMORY):
                result = function()
        except BaseException:
            wrong = traceback.format_exc(limit=-3)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - began
        err.flush()
        said = [line for line in err.buffer.getvalue().decode().split("\n") if line]
        refusal = [line for line in said if not line.startswith("warning: ")]
        if wrong is None and result == 0:
            wrong = next((f"said {line!r}"[:300] for line in said if not line.isprintable()), None)
        elif wrong is None:
            if result != 2 or len(refusal) != 1 or not refusal[0].startswith("error: "):
                wrong = f"exit code {result}, {said}"[:1500]
            elif not all(line.isprintable() and len(line) <= 700 + 2 * len(name) for line in said):
                wrong = f"not a line that a person reads: {said}"[:1500]
            elif (new := set(self.root.rglob("*")) - files):
                wrong = f"refused, but wrote {sorted(map(str, new))[:3]}"
        shutil.rmtree(self.out, ignore_errors=True)
        if wrong is None and seconds > LIMIT:
            wrong = f"took {seconds:.0f} s"
        return wrong or ("accepted" if result == 0 else "refused")


def apart(function):
    """What function() -> str returns in a process of its own; "aborted" where that process ends by itself."""
    if not hasattr(os, "fork"):
        return function()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)     # Rust tells of its end
        os.write(writer, function().encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as f:
        said = f.read().decode("utf-8", "replace")
    status = os.waitpid(child, 0)[1]
    return said or ("aborted" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT else f"the process ended with status {status}")


def fuzz(kind, numbers, root, say=print):
    """Counter of accepted, refused, escaped and aborted; the last two are said."""
    bench, counts = Bench(root), collections.Counter(accepted=0, refused=0, escaped=0, aborted=0)
    for number in numbers:
        outcome = bench.run(kind, number)
        counts[outcome if outcome in counts else "escaped"] += 1
        if outcome not in ("accepted", "refused"):
            say(f"escaped: {kind} {number}: {outcome}")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["all", *COUNTS])
    parser.add_argument("count", type=int, nargs="?", help="cases; of configs, for each of three files")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first case")
    args = parser.parse_args()
    escaped, lines = 0, []
    for kind in COUNTS if args.kind == "all" else [args.kind]:
        n, began = (args.count or COUNTS[kind]) * (3 if kind == "configs" else 1), time.monotonic()
        with tempfile.TemporaryDirectory() as root:
            counts = fuzz(kind, range(args.first, args.first + n), root, lambda line: print(line, flush=True))
        escaped += counts["escaped"]
        lines.append(f"| {kind} | {n} | {counts['accepted']} | {counts['refused']} | {counts['escaped']} | {counts['aborted']} | {time.monotonic() - began:.0f} |")
    print("\n| mutated | cases | accepted | refused in one line | escaped | aborted in Rust | s |\n|---|---|---|---|---|---|---|", *lines, sep="\n")
    sys.exit(escaped > 0)


if __name__ == "__main__":
    main()
