"""From the command line to token ids: flags, data rows, truncation, the order of rows, where a model comes from, schedules.

    python tests/test_data.py --rows 200000        how fast so many rows are read and tokenised, and in how much memory

Left out: what is refused, which test_refusals.py has, and chat templates, which test_templates.py has.
"""

import argparse
import dataclasses
import gzip
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUMBERS, ROOT
from tokenizers import Tokenizer, processors

import train
from machine.dataset import Data, Draw
from machine.rows import Row, read_rows
from machine.text import Text
from machine.files import BadInput
from machine.flags import LAYOUT, PRESETS, Config, flag_of, kind_of, parse, resolved
from machine.config import read_config
from machine.folders import BESIDE, WEIGHTS, companions, find_model, save_pretrained
from machine.parallel import World
from machine.report import passes
from model import ModelConfig, Transformer
from train import learning_rate

TINY = ROOT / "data/tiny_model"
SOME = ["--model", "m", "--data", "d"]
END = 1                                                  # <|end|> of the tiny tokenizer; BOS is 0


def turn(role, content):
    return {"role": role, "content": content}


def tiny_text(**settings):
    """The tiny world's Text; settings replace files, None removes one."""
    files = companions(TINY) | settings
    return Text({k: v for k, v in files.items() if v is not None}, TINY, read_config(TINY))


def plain_text(post_processor=None):
    """The same tokenizer without a chat template, and perhaps with tokens that it puts around every text."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single=post_processor, special_tokens=[("<s>", 0), ("<|end|>", END)])
    return tiny_text(**{"chat_template.jinja": None, "tokenizer.json": tokenizer.to_str().encode()})


# ---------------------------------------------------------------- rows

U, A = turn("user", "Who?"), turn("assistant", "A dog.")
SHAPES = {      # the row: (turns, chosen, rejected)
    "prompt and chosen": ({"prompt": "Who?", "chosen": "A dog."}, "Who?", "A dog.", None),
    "with a worse answer": ({"prompt": "Who?", "chosen": "A dog.", "rejected": "No."}, "Who?", "A dog.", "No."),
    "an empty prompt": ({"prompt": "", "chosen": "A dog."}, "", "A dog.", None),
    "messages": ({"messages": [U, A]}, [U], "A dog.", None),
    "messages and a worse text": ({"messages": [U, A], "rejected": "No."}, [U], "A dog.", "No."),
    "a system turn": ({"messages": [turn("system", "Bark."), U, A]}, [turn("system", "Bark."), U], "A dog.", None),
    "many turns": ({"messages": [U, A, U, turn("assistant", "A cat.")]}, [U, A, U], "A cat.", None),
    "chosen as messages": ({"chosen": [U, A]}, [U], "A dog.", None),
    "ultrafeedback": ({"prompt": "Who?", "prompt_id": "1f", "chosen": [U, A], "rejected": [U, turn("assistant", "No.")],
                       "messages": [U, turn("assistant", "Not this.")], "score_chosen": 8.5, "score_rejected": 7.0}, [U], "A dog.", "No."),
    "messages beside a chosen text": ({"prompt": "Who?", "chosen": "A dog.", "messages": [U, turn("assistant", "Not this.")]}, "Who?", "A dog.", None),
    "null for what is not there": ({"prompt": "Who?", "chosen": "A dog.", "rejected": None, "verifier": None}, "Who?", "A dog.", None),
    "null for a part of a verifier": ({"prompt": "Who?", "chosen": "A dog.", "verifier": {"must": ["dog"], "must_not": None}}, "Who?", "A dog.", None, {"must": ["dog"]}),
    "empty columns, which say nothing": ({"prompt": "Who?", "chosen": "A dog.", "system": "", "tool_calls": []}, "Who?", "A dog.", None),
    "further keys, in row and message": ({"messages": [U | {"id": 7}, A | {"name": "x", "tool_calls": None}], "source": "web"}, [U | {"id": 7}], "A dog.", None),
    "prompt and completion": ({"prompt": "Who?", "completion": "A dog."}, "Who?", "A dog.", None),
    "explicit prompt": ({"prompt": [U], "chosen": [A], "rejected": [turn("assistant", "No.")]}, [U], "A dog.", "No."),
    "explicit prompt and completion": ({"prompt": [turn("system", "Bark."), U], "completion": [A]}, [turn("system", "Bark."), U], "A dog.", None),
    "explicit prompt, answers as text": ({"prompt": [U], "chosen": "A dog.", "rejected": "No."}, [U], "A dog.", "No."),
    "explicit prompt that the whole repeats": ({"prompt": [U], "chosen": [U, A], "rejected": [U, turn("assistant", "No.")]}, [U], "A dog.", "No."),
    "the conversation goes on behind the prompt": ({"prompt": [turn("system", "Bark."), U], "chosen": [A, U, turn("assistant", "A cat.")]},
                                                   [turn("system", "Bark."), U, A, U], "A cat.", None),
    "a plain prompt before one message": ({"prompt": "Who?", "chosen": [A]}, [U], "A dog.", None),
    "capybara": ({"source": "Dove", "conversation": [{"input": "Who?", "output": "A dog."}], "original_response": "A dog.", "generation_prompt": ["x"],
                  "raw_generation_responses": ["x"], "new_generations": ["x"], "prompt": "user: Who?\nassistant: A dog.\nuser: Sure?\n",
                  "chosen": [U, A, turn("user", "Sure?"), turn("assistant", "Yes.")], "rejected": [U, A, turn("user", "Sure?"), turn("assistant", "No.")],
                  "rating_chosen": 5, "rating_rejected": 4, "chosen_model": "a", "rejected_model": "b"}, [U, A, turn("user", "Sure?")], "Yes.", "No."),
    "blanks are kept": ({"prompt": " Who?\n", "chosen": "\n A dog. "}, " Who?\n", "\n A dog. ", None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_may_have_any_of_the_usual_shapes(shape):
    raw, turns, chosen, rejected, *verifier = SHAPES[shape]
    row = Row(raw, "here")
    assert content([row]) == [(turns, chosen, rejected, *(verifier or [None]))]


def content(rows):
    return [(row.turns, row.chosen["content"], row.rejected and row.rejected["content"], row.verifier) for row in rows]


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    """Lines, gzip, a list, whatever the name; a folder, several files; a byte-order mark, Windows' line ends, blank lines, no newline at the end, Unicode escaped or not."""
    raws = [raw for raw, *_ in SHAPES.values()] + [{"prompt": "caf\u00e9 \U0001f600\u2028", "chosen": "\u00fc\u0085", "verifier": {"must": ["\u00fc"]}}]
    lines = [json.dumps(raw, ensure_ascii=i % 2 == 0).encode() for i, raw in enumerate(raws)]
    files = {"lf.jsonl": b"\n".join(lines) + b"\n", "open.jsonl": b"\n".join(lines), "crlf.jsonl": b"\r\n".join(lines) + b"\r\n",
             "bom.jsonl": b"\xef\xbb\xbf" + b"\n".join(lines), "blank.jsonl": b"\n\n" + b"\n \t\n".join(lines) + b"\n\n", "other.txt": b"\n".join(lines),
             "zipped.jsonl.gz": gzip.compress(b"\n".join(lines)), "list.json": json.dumps(raws, indent=2).encode(),
             "lines.json": b"\xef\xbb\xbf" + b"\n".join(lines), "list.jsonl": b"\n\xef\xbb\xbf[" + b",\n".join(lines) + b"]"}
    expected = content(Row(raw, "") for raw in raws)
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
        assert content(read_rows(tmp_path / name)) == expected, name
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, part in enumerate((lines[:3], lines[3:9], lines[9:])):
        (parts / f"part-{i}.jsonl").write_bytes(b"\n".join(part))
    (parts / "README.md").write_text("not a row")
    assert content(read_rows(parts)) == expected == content(read_rows(",".join(str(parts / f"part-{i}.jsonl") for i in range(3))))


def test_blank_lines_count_in_the_number_of_a_malformed_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"prompt": "a", "chosen": "b"}\n\n\n{"prompt": "a"}\n')
    with pytest.raises(BadInput, match="rows.jsonl, line 5: "):
        read_rows(tmp_path / "rows.jsonl")


def test_the_tiny_worlds_rows_are_read_with_their_verifiers():
    rows = read_rows(ROOT / "data/tiny_test.jsonl")
    assert len(rows) == 200 and all(passes(row.chosen["content"], row.verifier) for row in rows)


def test_a_verifier_may_stand_under_its_old_name_judge(tmp_path):
    """Files of an older version are read on; where both names stand, the new one counts."""
    old, new = {"must": ["dog"], "must_not": ["cat"]}, {"must": ["bird"]}
    rows = [{"prompt": "Who?", "chosen": "A dog."} | more for more in ({"judge": old}, {"verifier": new, "judge": old}, {})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(tmp_path / "rows.jsonl")
    assert [row.verifier for row in read] == [old, new, None]
    data = Data(read, tiny_text(), Config(max_prompt_length=9, max_length=30), "some")
    assert data.verifiers == {0: old, 1: new}
    named_anew = Row(rows[0] | {"judge": None, "verifier": old}, "")
    assert Data([named_anew, *read[1:]], tiny_text(), data.cfg, "some").fingerprint() == data.fingerprint()


@pytest.mark.parametrize("answer, verifier, right", [
    ("Mia had a red ball.", {"must": ["Mia", "red"]}, True), ("Mia had a ball.", {"must": ["Mia", "red"]}, False),
    ("MIA had a Red ball.", {"must": ["mia", "rED"]}, True), ("Miami was hundred.", {"must": ["Mia"]}, False),
    ("She had a hundred.", {"must_not": ["red", "he"]}, True), ("He was tired.", {"must_not": ["he"]}, False),
    ("a red  ball", {"must": ["red ball"]}, False), ("a red ball.", {"must": ["red ball."]}, True), ("It costs $5 (c++).", {"must": ["$5", "c++"]}, True),
    ("état", {"must_not": ["tat"]}, True), ("", {"must_not": ["x"]}, True), ("", {}, True),
    ("1.5", {"must": ["1.5"]}, True), ("1x5", {"must": ["1.5"]}, False),
    ("x", {"must": ["x"], "must_not": ["x"]}, False)])
def test_a_verifier_looks_for_whole_words_whatever_their_case(answer, verifier, right):
    assert passes(answer, verifier) is right


# ---------------------------------------------------------------- token ids

def shortened(prompt, chosen, bos, max_prompt, max_length):
    """The rule, token by token: (prompt, chosen, whether each was cut)."""
    prompt, chosen, cut = list(prompt), list(chosen), [False, False]
    while len(prompt) > max_prompt:
        prompt.pop(1 if prompt[0] == bos and len(prompt) > 1 else 0)
        cut[0] = True
    while len(prompt) + len(chosen) > max_length:
        chosen.pop()
        cut[1] = True
    return prompt, chosen, cut


@pytest.mark.parametrize("text", [tiny_text(), plain_text("<s> $A"), plain_text()], ids=["template", "bos", "no bos"])
def test_the_prompt_loses_its_left_end_but_not_its_bos_then_the_response_its_right_end(text):
    rng = random.Random(0)
    words = "the dog ran to a red lake with Mia and she was happy".split()
    rows = [Row({"prompt": " ".join(rng.choices(words, k=rng.randint(1, 12))), "chosen": " " + " ".join(rng.choices(words, k=rng.randint(1, 12))),
                 **({"rejected": " " + " ".join(rng.choices(words, k=9))} if i % 3 else {})}, "") for i in range(60)]
    whole, seen = text.encode(rows), set()
    for max_prompt, max_length in ((3, 9), (8, 12), (1, 40), (6, 7), (100, 101), (7, 100)):
        data = Data(rows, text, SimpleNamespace(max_prompt_length=max_prompt, max_length=max_length), "some")
        cuts = np.zeros(2, int)
        for i, (prompt, chosen, rejected) in enumerate(whole):
            *expected, cut = shortened(prompt, chosen, text.bos, max_prompt, max_length)
            worse = rejected and shortened(prompt, rejected, text.bos, max_prompt, max_length)[1]
            assert list(data[i]) == [*expected, worse, i]
            assert (expected[1][-1] == text.end) != cut[1]               # a response that was cut has no end token
            cuts += cut
        assert f"{cuts[0]} prompts cut on the left, {cuts[1]} responses cut on the right, 0 rows dropped" in data.note
        seen |= {(bool(cuts[0]), bool(cuts[1]))}
    assert {(True, False), (True, True)} <= seen


def test_rows_without_a_response_are_dropped_and_counted_and_verifiers_stay_with_their_rows():
    """A response that was nothing but its end, once or twice."""
    texts = ["<|end|>", "One.", "<|end|><|end|> ", "Three.", "Four."]
    rows = [Row({"prompt": "a", "chosen": t, "verifier": {"must": [t]}}, "") for t in texts]
    data = Data(rows, tiny_text(), Config(max_prompt_length=9, max_length=30), "some")
    kept = [tiny_text().decode(data[i].chosen, True) for i in range(len(data))]
    assert kept == ["One.", "Three.", "Four."] and "2 rows dropped" in data.note
    assert data.verifiers == {i: {"must": [t]} for i, t in enumerate(kept)}


def test_special_tokens_that_were_typed_are_counted_and_told():
    prompts = ["plain", "a <|user|> b", [turn("system", "<s>"), turn("user", "x")], "< s > <|us er|>"]
    rows = [Row({"prompt": p, "chosen": "c"} if isinstance(p, str) else {"messages": [*p, turn("assistant", "c")]}, f"line {i}") for i, p in enumerate(prompts)]
    rows.append(Row({"prompt": "a", "chosen": "b<|system|>c"}, ""))
    data = Data(rows, tiny_text(), Config(max_prompt_length=30, max_length=60), "some")
    assert "; 3 rows: special tokens are typed in the text, and the model reads them as real (line 1: '<|user|>')" in data.note
    assert "special" not in Data(rows[:1], tiny_text(), Config(max_prompt_length=30, max_length=60), "some").note


def test_a_worse_answer_that_is_cut_is_counted():
    rows = [Row({"prompt": "a", "chosen": "b", "rejected": "c " * n}, f"line {n}") for n in (1, 40, 50)]
    data = Data(rows, tiny_text(), Config(max_prompt_length=9, max_length=30), "some")
    assert "; 2 rows: the rejected response is cut on the right (line 40: to " in data.note
    assert "0 responses cut on the right" in data.note


@pytest.mark.parametrize("around", [None, "<s> $A", "$A <|end|>", "<s> $A <|end|>"])
@pytest.mark.parametrize("prompt", ["Who? ", ""])
def test_a_plain_prompt_and_its_response_get_the_tokenizers_bos_and_one_end_token(around, prompt):
    text = plain_text(around)
    (asked, chosen, rejected), = text.encode([Row({"prompt": prompt, "chosen": "A dog.", "rejected": "7"}, "")])
    for answer, ids in (("A dog.", chosen), ("7", rejected)):
        bos = [0] if around and "<s>" in around or not prompt else []            # without any prompt a text still needs a beginning
        assert asked + ids == bos + text.tokenizer.encode(prompt + answer, add_special_tokens=False).ids + [END]
    assert asked and END not in asked


def test_a_token_that_both_begins_and_ends_texts_begins_even_an_empty_one():
    """GPT-2's kind: <|endoftext|> is BOS and EOS."""
    names = json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>"}).encode()
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", END)])
    text = tiny_text(**{"chat_template.jinja": None, "tokenizer_config.json": names, "tokenizer.json": tokenizer.to_str().encode()})
    (prompt, chosen, _), = text.encode([Row({"prompt": "", "chosen": "A dog."}, "")])
    assert prompt == [END] and chosen == text.tokenizer.encode("A dog.", add_special_tokens=False).ids + [END]


@pytest.mark.parametrize("text", [tiny_text(), plain_text("<s> $A"), plain_text("<s> $A <|end|>")], ids=["template", "plain", "closed"])
def test_an_end_token_typed_in_an_answer_is_its_end_or_is_refused(text):
    """The rest of the answer must not be dropped, and what the model stops at must not stand inside."""
    rows = [Row({"prompt": "a", "chosen": answer}, "here") for answer in (" One.", " One.<|end|>", " One.<|end|>\n", " One.<|end|><|end|>")]
    encoded = text.encode(rows)
    assert all(row == encoded[0] for row in encoded) and encoded[0][1].count(END) == 1
    for answer in (" One.<|end|> Two.", "<|end|>One.", " One.<|end|> Two.<|end|>"):
        with pytest.raises(BadInput, match="^here: an end token stands inside the answer"):
            text.encode([Row({"prompt": "a", "chosen": answer}, "here")])


def test_a_plain_prompt_may_end_in_the_end_token():
    (prompt, chosen, _), = plain_text("<s> $A").encode([Row({"prompt": "Who?<|end|>", "chosen": "A dog."}, "")])
    assert prompt[-1] == END and chosen[-1] == END and chosen.count(END) == 1


def test_stories260k_takes_plain_text(shared):
    folder = shared / "models/stories260K"
    text = Text(companions(folder), folder, read_config(folder))
    (prompt, chosen, _), = text.encode([Row({"prompt": "Once upon a time,", "chosen": " there was a dog."}, "")])
    assert prompt[0] == text.bos == 1 and (prompt + chosen).count(1) == 1 and chosen[-1] == 2 and text.eos == (2,)
    assert text.decode(prompt + chosen, True) == "Once upon a time, there was a dog."


@pytest.mark.parametrize("generation, config, expected", [
    ({"eos_token_id": [2, 3]}, {"eos_token_id": 4}, (1, 2, 3, 4)), ({"eos_token_id": 7}, {}, (1,)), ({}, {"eos_token_id": [5, 5]}, (1,)),
    ({"eos_token_id": None}, {"eos_token_id": None}, (1,)), ({"eos_token_id": [False, "2", 2.0, -1, 10**6, 3]}, {}, (1, 3))])
def test_end_tokens_are_a_set_from_three_files_without_stale_numbers(generation, config, expected):
    """7 and 5 are ordinary tokens: a home-made checkpoint keeps the 2 that its config class was born with."""
    files = companions(TINY) | {"generation_config.json": json.dumps(generation).encode()}
    assert Text(files, TINY, ModelConfig(**NUMBERS | {"vocab_size": 1024}, source=config)).eos == expected


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_broken_file_beside_the_weights_is_refused(name):
    for broken, words in ((b'{"eos_token_id": [1,}', "not JSON"), (b"[1]", "not a JSON object")):
        with pytest.raises(BadInput, match=f"{name}: {words}"):
            tiny_text(**{name: broken})


def test_padding_and_truncation_in_tokenizer_json_are_switched_off():
    """Some checkpoints carry them from their training, and then every prompt would be as long as the longest."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(5)
    rows = [Row({"prompt": "a " * n, "chosen": "b"}, "") for n in (1, 30)]
    assert tiny_text(**{"tokenizer.json": tokenizer.to_str().encode()}).encode(rows) == tiny_text().encode(rows)


@pytest.mark.parametrize("part", [{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"post_processor": {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "none", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}}], ids=["when it is read", "when it encodes"])
def test_a_tokenizer_in_whose_library_something_breaks_is_refused(part):
    """Both panic in Rust, which is no Exception to Python."""
    broken = json.loads(companions(TINY)["tokenizer.json"]) | part
    with pytest.raises(BadInput, match="not a tokenizer"):
        tiny_text(**{"tokenizer.json": json.dumps(broken).encode()})


def test_the_fingerprint_follows_every_token_and_every_border():
    def of(*rows):
        rows = [Row(dict(zip(("prompt", "chosen", "rejected", "verifier"), row)), "") for row in rows]
        return Data(rows, plain_text(), Config(max_prompt_length=30, max_length=60), "some").fingerprint()

    one, two = ("a b", " c", " d"), ("e", " f", " g")
    others = [of(("a b", " c", " h"), two), of(("a", " b c", " d"), two), of(two, one), of(one), of((*one, {"must": ["c"]}), two)]
    assert of(one, two) == of(one, two) and len({of(one, two), *others}) == 6


# ---------------------------------------------------------------- [1] the order of rows

def drawn(data, batch, batches, size, seed=3, ahead=1, begin=0):
    """What each of `size` processes draws in so many batches, as a list of batches, `ahead` batches in one call."""
    mine, result = batch // size, []
    for rank in range(size):
        draw = Draw(data, batch, seed, SimpleNamespace(rank=rank, size=size))
        draw.batch = begin
        rows = [row for _ in range(batches // ahead) for row in draw(ahead * mine)]
        assert draw.batch == begin + batches
        result.append([rows[i:i + mine] for i in range(0, len(rows), mine)])
    return result


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_row_comes_once_an_epoch_whatever_the_number_of_processes(size):
    data, batch, epochs = list(range(31)), 12, 12        # 31 batches are 12 epochs
    ranks = drawn(data, batch, 31, size)
    order = [row for b in range(31) for rank in ranks for row in rank[b]]
    assert order == [row for (b,) in zip(*drawn(data, batch, 31, 1)) for row in b]
    for epoch in range(epochs):
        assert sorted(order[epoch * 31:(epoch + 1) * 31]) == data
    assert len({tuple(order[e * 31:(e + 1) * 31]) for e in range(epochs)}) == epochs            # each in an order of its own


def test_within_a_batch_and_an_epoch_processes_draw_different_rows():
    for b in zip(*drawn(list(range(48)), 12, 4, 4)):
        assert len({row for part in b for row in part}) == 12


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    data = list(range(20))
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = drawn(data, 4, 10, 2)
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert first == drawn(data, 4, 10, 2) and first != drawn(data, 4, 10, 2, seed=4)


def test_batches_drawn_ahead_are_the_same_batches():
    assert drawn(list(range(20)), 4, 12, 2, ahead=3) == drawn(list(range(20)), 4, 12, 2)


def test_the_position_is_one_number():
    """Which is all that a checkpoint keeps, also for another number of processes."""
    data = list(range(20))
    for size in (1, 2, 4):
        whole = drawn(data, 4, 12, size)
        assert [rank[7:] for rank in whole] == drawn(data, 4, 5, size, begin=7)


def test_a_batch_may_be_larger_than_the_data():
    ((batch,),) = drawn(list(range(3)), 8, 1, 1)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


# ---------------------------------------------------------------- flags

def another(f):
    """A value of a setting, other than its default, that is allowed beside all defaults."""
    texts = {"segment": "7%", "ema_every": "epoch", "ref_refresh": "never", "warmup": "3", "lora_projections": "q_proj,o_proj"}
    kind = kind_of(f)
    if f.metadata.get("choices"):
        return next(c for c in f.metadata["choices"] if c not in (f.default, "cuda"))
    return not f.default if kind is bool else texts.get(f.name, "x") if kind is str else f.default / 2 + 0.2 if kind is float else (f.default or 70) + 1


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def test_a_batch_that_cannot_be_shared_is_refused_only_where_it_is_used():
    assert resolved(Config(sft_batch_size=64, batch_size=6), 512, processes=3).sft_steps == 0
    with pytest.raises(BadInput, match="--sft-batch-size 64 cannot be shared evenly by 3 processes"):
        resolved(Config(sft_batch_size=64, batch_size=6, sft_steps=1), 512, processes=3)
    with pytest.raises(BadInput, match="--batch-size 64"):
        resolved(Config(batch_size=64), 512, processes=3)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_flag(name, monkeypatch):
    monkeypatch.setenv("RANK", "0")                      # --shard wants torchrun
    value, flag = another(FIELDS[name]), flag_of(name)
    more = {"from_scratch": ["--sft-steps", "3"], "sft_data": ["--sft-steps", "3"], "weight_decay": ["--optimizer", "adamw"]}.get(name, [])
    cfg, *_ = parse([*SOME, *more, *([flag] if value is True else [flag, str(value)])])
    base, *_ = parse([*SOME, *more])
    assert getattr(cfg, name) == value != getattr(base, name)
    assert {k for k in FIELDS if getattr(cfg, k) != getattr(base, k)} == {name}


def test_help_names_every_flag_with_its_default_and_source(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())      # lines are wrapped wherever it suits
    assert end.value.code == 0
    for name, f in FIELDS.items():
        default = "none" if f.default in ("", None) else f.default
        assert flag_of(name) in text and "".join(f"{f.metadata['help']}[{default};{f.metadata['source']}]".split()) in text
        assert f.metadata["source"] in ("ours", "paper", "authors' code", "SLiC-HF", "TRL", "RPO") or ";" in f.metadata["source"]


def test_a_switch_can_be_switched_off():
    assert parse([*SOME, "--gradient-checkpointing", "--no-gradient-checkpointing"])[0].gradient_checkpointing is False


def test_nothing_given_is_the_tiny_world_and_a_model_or_data_the_papers_dpo():
    cfg, preset, resume = parse([])
    assert (preset, resume) == ("tiny", None) and all(getattr(cfg, k) == v for k, v in PRESETS["tiny"].items())
    for path in (cfg.model, cfg.data, cfg.eval_data, cfg.sft_data):
        assert Path(path).exists()
    cfg, preset, _ = parse(SOME)
    assert preset == "paper-dpo" and cfg == Config(model="m", data="d") and cfg.sft_steps == 0


PAPER = dict(beta=0.1, lam=0.05, batch_size=64, segment="256", alpha=0.5, ema_every="2", buffer_size=2000, replay="uniform", epochs=4.0, temperature=0.7,
             top_k=50, top_p=0.95, rejected="sapo", score_on="response", nll_on="response", seed=42, max_grad_norm=1.0)


@pytest.mark.parametrize("preset, numbers", [
    ("paper-dpo", dict(loss="dpo", lr=5e-7, lr_scheduler="linear", warmup="10%", optimizer="rmsprop", ref_refresh="epoch", ref_from="ema")),
    ("paper-orpo", dict(loss="orpo", lr=5e-6, lr_scheduler="inverse_sqrt", warmup="100", optimizer="adamw"))])
def test_a_paper_preset_holds_the_papers_numbers(preset, numbers):
    cfg, *_ = parse([*SOME, "--preset", preset])
    assert {k: getattr(cfg, k) for k in PAPER | numbers} == PAPER | numbers


def saved(path, preset="paper-orpo", **settings):
    path.write_text(json.dumps({"layout": LAYOUT, "settings": settings, "preset": preset, "dtype": "float32"}))
    return str(path)


def test_a_flag_beats_the_config_which_beats_the_preset(tmp_path):
    config = saved(tmp_path / "config.json", model="m", data="d", lr=1e-3, beta=0.7, out="runs/old", overwrite=True)
    cfg, preset, _ = parse(["--config", config, "--beta", "0.3"])
    assert (cfg.beta, cfg.lr, cfg.loss, cfg.lr_scheduler, preset) == (0.3, 1e-3, "orpo", "inverse_sqrt", "paper-orpo")
    assert (cfg.out, cfg.overwrite) == ("", False)       # where the earlier run went is not where this one goes
    with pytest.raises(BadInput, match="--config and --preset: each brings all settings"):
        parse(["--config", config, "--preset", "paper-dpo"])


def test_rows_of_ones_own_are_not_measured_on_those_of_a_preset():
    cfg, *_ = parse(["--preset", "tiny", "--data", "d"])
    assert (cfg.eval_data, cfg.sft_data) == ("", "") and cfg.sft_steps == 500
    cfg, *_ = parse(["--preset", "tiny", "--data", "d", "--eval-data", "e"])
    assert cfg.eval_data == "e" and parse(["--preset", "tiny"]).cfg.eval_data.endswith("tiny_test.jsonl")


def test_the_config_of_a_run_gives_its_settings_again(tmp_path):
    first, *_ = parse([*SOME, "--preset", "paper-orpo", "--segment", "50%", "--lora", "4", "--max-length", "99"])
    again, preset, _ = parse(["--config", saved(tmp_path / "config.json", **dataclasses.asdict(first))])
    assert again == first and preset == "paper-orpo"


def test_resuming_takes_the_runs_settings_and_only_some_flags(tmp_path):
    saved(tmp_path / "config.json", model="m", data="d", lr=1e-3, out="elsewhere")
    cfg, preset, resume = parse(["--resume", str(tmp_path), "--steps", "9", "--lr", "0.001"])
    assert (cfg.steps, cfg.lr, cfg.out, preset, resume) == (9, 1e-3, str(tmp_path), "paper-orpo", tmp_path)
    with pytest.raises(BadInput, match="--lr 0.002 contradicts the saved run, which has 0.001; .*--steps"):
        parse(["--resume", str(tmp_path), "--lr", "0.002"])


@pytest.mark.parametrize("flags", [["--learning-rate", "1"], ["--ste", "3"], ["--no-shar"], ["stray"], ["--preset=tin"]])
def test_flags_are_written_out(flags):
    with pytest.raises(BadInput, match="--help lists every flag"):
        parse([*SOME, *flags])


# ---------------------------------------------------------------- where the model comes from

REPOSITORY = """config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json chat_template.jinja LICENSE LICENSE.txt NOTICE USE_POLICY.md README.md .gitattributes
    pytorch_model.bin pytorch_model.bin.index.json consolidated.safetensors consolidated.00.pth original/consolidated.00.pth original/params.json
    onnx/model.onnx onnx/model.safetensors training_args.bin model.gguf flax_model.msgpack tf_model.h5 events.out.tfevents modeling_custom.py""".split()
NEEDED = """config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json chat_template.jinja LICENSE LICENSE.txt NOTICE USE_POLICY.md README.md""".split()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that writes down what it is asked for, in a current folder that is empty. `answer` may be an exception."""
    import huggingface_hub
    state = SimpleNamespace(asked=[], answer=tmp_path / "snapshots/0a1b2c")

    def snapshot_download(repo, **more):
        state.asked.append((repo, more))
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return state


def test_a_local_folder_beats_a_hub_name(hub, tmp_path):
    (tmp_path / "org/name").mkdir(parents=True)
    assert find_model("org/name", World("cpu")) == (Path("org/name"), None) and not hub.asked


@pytest.mark.parametrize("name, repo, revision", [
    ("org/name", "org/name", None), ("org/name@v1.0", "org/name", "v1.0"), ("name@refs/pr/3", "name", "refs/pr/3")])
def test_a_hub_name_may_carry_a_revision_and_its_commit_is_kept(hub, name, repo, revision):
    assert find_model(name, World("cpu")) == (hub.answer, "0a1b2c")
    assert {(r, more["revision"]) for r, more in hub.asked} == {(repo, revision)}


def test_only_what_is_needed_is_asked_for(hub):
    """No pickles, no second copy of the weights in another format, no code."""
    from huggingface_hub.utils import filter_repo_objects
    hub.answer.mkdir(parents=True)
    (hub.answer / "model-00001-of-00002.safetensors").touch()
    find_model("org/name", World("cpu"), BESIDE + WEIGHTS)
    find_model("org/name", World("cpu"))
    beside, whole = (set(filter_repo_objects(REPOSITORY, allow_patterns=more["allow_patterns"])) for _, more in hub.asked[:0:-2])
    assert whole == set(NEEDED) and whole - beside == {name for name in NEEDED if name.startswith("model")}


def hub_error(name):
    from huggingface_hub import errors
    kind = getattr(errors, name)
    error = kind.__new__(kind)                           # their arguments change between versions
    error.args = ("nothing\nworth reading",)
    return error


@pytest.mark.parametrize("error, words", [
    ("HFValidationError", "not a hub name"), ("GatedRepoError", "gated; accept its terms on the hub, then run: hf auth login"),
    ("RepositoryNotFoundError", "knows no such repository"), ("RevisionNotFoundError", "or revision"), ("LocalEntryNotFoundError", "cannot be reached"),
    ("OfflineModeIsEnabled", "cannot be reached"), (ConnectionError("x"), "download the repository elsewhere and give its folder"),
    (KeyError("x"), "cannot be reached")])
def test_what_goes_wrong_at_the_hub_is_told_with_what_to_do(hub, error, words):
    hub.answer = hub_error(error) if isinstance(error, str) else error
    with pytest.raises(BadInput, match=f"^--model org/name: .*{words}") as refusal:
        find_model("org/name", World("cpu"))
    assert "\n" not in str(refusal.value) and len(hub.asked) == 1


def test_offline_a_hub_name_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(BadInput, match="--model org/name: no such folder, and the hub cannot be reached, as HF_HUB_OFFLINE is set .*; download the repository elsewhere"):
        find_model("org/name", World("cpu"))


def test_a_model_from_the_hub_is_trained_and_its_commit_recorded(hub, tmp_path):
    """A snapshot of the hub's cache is a folder of links to blobs."""
    from test_refusals import GOOD, Reached, build, call
    build(tmp_path)
    hub.answer = tmp_path / "cache/snapshots/0a1b2c"
    hub.answer.mkdir(parents=True)
    (tmp_path / "cache/blobs").mkdir()
    for i, file in enumerate(sorted((tmp_path / "model").iterdir())):
        file.rename(tmp_path / f"cache/blobs/{i}")
        (hub.answer / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "model").rmdir()
    with pytest.raises(Reached):
        call(tmp_path, [*GOOD, "--model", "org/name@v1.0"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_commit"], config["settings"]["model"]) == ("0a1b2c", "org/name@0a1b2c")


# ---------------------------------------------------------------- schedules

def schedule(kind, warmup, steps, peak):
    """Learning rates of all steps, one after the other: up in equal parts to the peak, then down."""
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append((rates[-1] if rates else 0.0) + peak / warmup)
        elif kind == "linear":                           # equal parts again, of which the last is above 0
            rates.append(peak if step == warmup else rates[-1] - peak / (steps - warmup))
        elif kind == "cosine":
            rates.append(peak * math.cos(0.5 * math.pi * (step - warmup) / (steps - warmup)) ** 2)
        elif kind == "inverse_sqrt":
            rates.append(peak * (warmup / step) ** 0.5 if warmup else peak * (10_000 / (10_000 + step)) ** 0.5)
        else:
            rates.append(peak)
    return rates


@pytest.mark.parametrize("kind", FIELDS["lr_scheduler"].metadata["choices"])
@pytest.mark.parametrize("warmup, number, steps", [
    ("10%", 4, 40), ("7", 7, 50), ("0", 0, 13), ("0%", 0, 13), ("12.5%", 5, 40), ("100%", 6, 6), ("90", 90, 20), ("1", 1, 1)])
def test_the_learning_rate_rises_and_falls_as_a_plain_loop_says(kind, warmup, number, steps):
    cfg = Config(lr_scheduler=kind, warmup=warmup)
    rates = [learning_rate(step, steps, cfg, 3e-4) for step in range(steps)]
    assert rates == pytest.approx(schedule(kind, number, steps, 3e-4), rel=1e-9)
    assert min(rates) > 0 and max(rates) <= 3e-4 * (1 + 1e-12)


# ---------------------------------------------------------------- size

MEASURE = """
import sys, threading, time, torch
sys.path[:0] = [{root!r}]
from machine.folders import load_pretrained
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))
torch.set_num_threads(1)
torch.ones(8, 8) @ torch.ones(8, 8)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load_pretrained({folder!r})
done = True
thread.join()
print((max(peak, anonymous()) - before) / sum(p.numel() * 4 for p in model.parameters()))
"""
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
               max_position_embeddings=8192, tie_word_embeddings=True)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells anonymous memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_the_memory_of_one_model_and_a_little(tmp_path, dtype):
    """A model of SmolLM2's shape, or SmolLM2 itself where SMOLLM2 says where it is; float32 in memory, whatever the file holds."""
    folder = os.environ.get("SMOLLM2") if dtype == torch.bfloat16 else None
    if not folder:
        folder = tmp_path / "model"
        save_pretrained(Transformer(ModelConfig(**SMOLLM2)).init_weights(torch.Generator().manual_seed(0)), folder, dtype)
    done = subprocess.run([sys.executable, "-c", MEASURE.format(root=str(ROOT), folder=str(folder))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.9 < float(done.stdout) < 1.2


def measure(number):
    """Read and tokenise so many rows of a few sentences; prints one line."""
    from resource import RUSAGE_SELF, getrusage  # not on Windows
    peak = lambda: getrusage(RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    with tempfile.TemporaryDirectory() as folder:
        path, stories = Path(folder) / "rows.jsonl", [row.chosen["content"] for row in read_rows(ROOT / "data/tiny_base.jsonl")]
        with open(path, "w", encoding="utf-8") as f:
            for i in range(number):
                f.write(json.dumps({"prompt": f"Tell story {i}.", "chosen": stories[i % len(stories)] + f" The end, {i}."}) + "\n")
        size, before, began = path.stat().st_size, peak(), time.monotonic()
        rows = read_rows(path)
        data = Data(rows, tiny_text(), Config(max_prompt_length=64, max_length=512), "train")
        seconds = time.monotonic() - began
    print(f"{len(data):,} rows, {size / 1e6:.0f} MB, {len(data.tokens):,} tokens: {seconds:.1f} s, {len(data) / seconds:,.0f} rows/s, "
          f"peak RSS {peak():.2f} GB ({before:.2f} GB before)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="how many")
    measure(parser.parse_args().rows)
