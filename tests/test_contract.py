"""What is taught is what was written: rows proven or refused, whatever the chat template; export of what was used.

    SAPO_TOKENIZERS=FOLDER python tests/test_contract.py      the table: each template in FOLDER, each kind of conversation

The templates written out here have the manners of published ones, on the tiny world's tokenizer. With SAPO_TOKENIZERS=FOLDER
every FOLDER/NAME with tokenizer.json, tokenizer_config.json and a chat template is tried beside them.
"""

import ast
import datetime
import json
import os
import re
import subprocess
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
from conftest import NUMBERS, ROOT, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from test_templates import folder_of

from machine import text as chat
from machine.dataset import Data
from machine.files import BadInput
from machine.flags import Config
from machine.config import read_config
from machine.folders import companions
from machine.rows import KINDS, Row, read_rows
from machine.text import Remarks, Text
from model import ModelConfig

TINY = ROOT / "data/tiny_model"
ROOMY = ModelConfig(**NUMBERS | {"vocab_size": 2**20})
TURN = "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"

HEADER = "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}{{ '<|assistant|>' }}"                 # Llama-3's first
SYSTEM_TURN = """{%- if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + (sys + '\\n\\n' if loop.last and sys is defined else '') + m.content + \
'<|assistant|>' }}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"""                               # Mistral's v0.3
TWO_ENDS = "{% for m in messages %}" + TURN + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}<s>{% endif %}"      # Phi-3's
DROPS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|end|>' }}{% elif m.role == 'assistant' %}\
{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
OPENS = DROPS.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")                        # DeepSeek-R1-Distill's
TOOLS = """{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}\
{% if m.reasoning_content is defined %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}\
{% for call in m.tool_calls or [] %}{{ '\\n' + call | tojson }}{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""                                           # Qwen's
TEMPLATES = {"chatml": None, "llama3, dated": None, "thinking": None, "header": HEADER, "system turn": SYSTEM_TURN, "two ends": TWO_ENDS,
             "drops": DROPS, "tools": TOOLS}


def text_of(name, **files):
    """The Text of a template written here, on the tiny world's tokenizer or on that of test_templates.py."""
    if TEMPLATES.get(name, HEADER) is None:
        return Text(companions(folder_of(name)) | files, name, ROOMY)
    source = TEMPLATES.get(name) or name
    return Text(companions(TINY) | {"chat_template.jinja": source.encode()} | files, "tiny", read_config(TINY))


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def encode(text, raw):
    (row,) = text.encode([Row(raw, "rows.jsonl, line 7")])
    return [ids and text.decode(ids) for ids in row]


U, A = turn("user", "Where is bell 3?"), turn("assistant", "Harbor 3.")
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "bell"}}, "id": "abcdefghi"}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds it.", "parameters": {
    "type": "object", "properties": {"what": {"type": "string", "description": "What?"}}, "required": ["what"]}}}
KINDS_OF_TALK = {
    "plain": {"prompt": "Where is bell 3?", "chosen": "Harbor 3."}, "system": {"messages": [turn("system", "Answer in one word."), U, A]},
    "multi-turn": {"messages": [U, A, turn("user", "And bell 4?"), turn("assistant", "Harbor 4.")]},
    "system, multi-turn": {"messages": [turn("system", "Answer in one word."), U, A, turn("user", "And bell 4?"), turn("assistant", "Harbor 4.")]},
    "tool result": {"tools": [TOOL], "messages": [U, turn("assistant", "", tool_calls=[CALL]), turn("tool", "harbor", tool_call_id="abcdefghi"), A]},
    "tool call": {"tools": [TOOL], "messages": [U, turn("assistant", None, tool_calls=[CALL])]},
    "reasoning": {"messages": [U, A | {"reasoning_content": "I count."}]}, "thoughts in the text": {"prompt": "2 + 2?", "chosen": "<think>\nI count.\n</think>\n\n4"},
    "odd blanks": {"prompt": "  Where?\t\n ", "chosen": "\n\n  In the\r\n\r\n  harbor. \u2003\n"},
    "Unicode": {"prompt": "Ünïcödé: 東京 👩‍👩‍👧‍👦", "chosen": "e\u0301 ﬁ ½ \u200f 🏳️‍🌈 नमस्ते"}}


def real():
    root = os.environ.get("SAPO_TOKENIZERS")
    folders = sorted(Path(root).iterdir()) if root else []
    return [f for f in folders if (f / "tokenizer.json").exists() and not (f / "model.safetensors").exists()]


def their_ids(tokenizer, turns, more, **how):
    """transformers' ids of a conversation, with the date of ours."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024", **more, **how)
    return tokenizer(text.replace(datetime.datetime.now().strftime("%d %B %Y"), "26 July 2024"), add_special_tokens=False)["input_ids"]


def verdict(folder, raw):
    """What becomes of a row under a real template: "=" if its ids are transformers', "+" if the prompt is, and the whole differs by it,
    with what was remarked; or the refusal."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    remarks = Remarks()
    try:
        text = Text(companions(folder), folder.name, ModelConfig(**NUMBERS | {"vocab_size": 2**20}, source=config))
        row = Row(raw, "rows.jsonl, line 7")
        (ids,) = text.encode([row], remarks)
        remarks.refuse()
    except BadInput as refusal:
        return f"refused: {refusal}"
    prompt, chosen, _ = ids
    tokenizer = oracle("transformers").AutoTokenizer.from_pretrained(folder)
    turns = text._turns(row)
    asked, whole = their_ids(tokenizer, turns, row.more, add_generation_prompt=True), their_ids(tokenizer, turns + [row.chosen], row.more)
    assert [i for i in chosen if i in text.eos] == chosen[-1:]
    if prompt + chosen != whole[:len(prompt + chosen)]:
        assert prompt == asked and "rendered otherwise alone" in remarks.note()
        return "+" + remarks.note()
    assert text.decode(whole[len(prompt + chosen):], True).strip() == "" or "header" in remarks.note() or folder.name == "llama3_first"
    assert prompt == asked[:len(prompt)] and len(asked) - len(prompt) <= 1       # a token may reach over the border
    return ("=" if prompt == asked else "= (one token reaches over the border)") + remarks.note()


@pytest.mark.parametrize("folder", real(), ids=lambda f: f.name)
@pytest.mark.parametrize("kind", KINDS_OF_TALK)
def test_a_row_under_a_real_template_is_transformers_ids_or_refused_in_a_sentence(folder, kind):
    assert re.match(r"=|\+|refused: .*(rows.jsonl, line 7: |opens <think>)", verdict(folder, KINDS_OF_TALK[kind]))


# ---------------------------------------------------------------- the rule, by the manner of the template

def test_the_prompt_is_what_the_model_is_given_at_inference_though_the_conversation_renders_it_otherwise():
    """The system text stands in the last turn alone: half of the prompt would be trained as the answer."""
    raw, text = KINDS_OF_TALK["system"], text_of("system turn")
    remarks = Remarks()
    (prompt, chosen, _), = text.encode([Row(raw, "rows.jsonl, line 7")], remarks)
    assert text.decode(prompt) == "<s><|user|>Answer in one word.\n\nWhere is bell 3?<|assistant|>" and text.decode(chosen) == "Harbor 3.<|end|>"
    assert "1 rows: the prompt is rendered otherwise alone than in the whole conversation" in remarks.note() and "rows.jsonl, line 7" in remarks.note()
    assert encode(text, KINDS_OF_TALK["system, multi-turn"])[0].endswith("Harbor 3.<|end|><|user|>Answer in one word.\n\nAnd bell 4?<|assistant|>")


@pytest.mark.parametrize("name", ["header", "two ends"])
def test_an_answer_ends_in_the_first_end_token_after_its_text(name):
    """Not in the last special token that the template writes: the header of the next turn, the end of the text."""
    text = text_of(name)
    assert text.end == text.tokenizer.token_to_id("<|end|>") and encode(text, KINDS_OF_TALK["plain"])[1] == "Harbor 3.<|end|>"
    assert text.tokenizer.token_to_id("<|assistant|>") not in text.eos


@pytest.mark.parametrize("name, raw, what", [
    ("drops", KINDS_OF_TALK["thoughts in the text"], r"changes the answer: '<think>\\nI count.*became '\\n\\n4<\|end\|>'"),
    ("drops", KINDS_OF_TALK["system"], "drops the turn 'Answer in one word.', role system"),
    (OPENS, KINDS_OF_TALK["plain"], "opens <think> for the model to go on from, and renders answers without it"),
    ("header", {"prompt": "Hi", "chosen": "a<|end|>b"}, "an end token stands inside the answer"),
    ("{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}", KINDS_OF_TALK["plain"], None),
    ("{% for m in messages %}{{ m.content | replace('bell', 'ball') }}<|end|>{% endfor %}", KINDS_OF_TALK["plain"], "Where is bell 3.* is lost"),
    ("{% for m in messages %}{{ m.content | replace('Harbor', '') }}<|end|>{% endfor %}", KINDS_OF_TALK["plain"], "changes the answer"),
    ("{% for m in messages %}{{ m.content | escape }}<|end|>{% endfor %}", {"prompt": "a", "chosen": "1 < 2"}, "changes the answer: '1 < 2' became '1 &lt; 2"),
    *(("header", KINDS_OF_TALK[kind], f"does not write '{key}'") for kind, key in (
        ("tool result", "tool_calls"), ("tool call", "tool_calls"), ("reasoning", "reasoning_content"))),
    ("header", {"tools": [TOOL], "messages": [U, A]}, "does not write 'tools'"), ("header", {"messages": [U, A | {"weight": 0}]}, "does not write 'weight'"),
])
def test_a_template_that_loses_what_was_written_is_refused_and_what_is_formatting_is_counted(name, raw, what):
    if what is None:
        remarks = Remarks()
        text_of(name).encode([Row(raw, "rows.jsonl, line 7")], remarks)
        assert "1 rows: the chat template or the tokenizer changes blanks or forms of letters (rows.jsonl, line 7: " in remarks.note()
        return
    with pytest.raises(BadInput, match=what):
        encode(text_of(name), raw)


LAST = ["Who?", "n", "i", "t", "s", "k", "think", "assistant", "<", ">", "", " "]
EMPTY_THOUGHT = DROPS.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n\n</think>\n\n{% endif %}")


@pytest.mark.parametrize("last", LAST)
def test_where_an_answer_begins_does_not_hang_on_what_the_last_turn_says(last):
    """The turn's text was looked for, and found in the words that open the answer."""
    raw = {"messages": [turn("user", "A"), turn("assistant", "b"), turn("user", last), turn("assistant", "Hello.")]}
    with pytest.raises(BadInput, match="opens <think> for the model to go on from"):
        encode(text_of(OPENS), raw)
    prompt, chosen, _ = encode(text_of(EMPTY_THOUGHT), raw)
    assert prompt + chosen == f"<s><|user|>A<|end|><|assistant|>b<|end|><|user|>{last}<|end|><|assistant|><think>\n\n</think>\n\nHello.<|end|>"
    assert chosen.strip() == "Hello.<|end|>", "but for a token that reaches over the border"


@pytest.mark.parametrize("last", LAST)
def test_a_thought_that_is_opened_for_the_model_and_empty_in_a_conversation_is_closed_by_the_answer(last):
    source = ("{% for m in messages %}{{ ('<|assistant|><think></think>' if m.role == 'assistant' else '<|user|>') + m.content + '<|end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}")            # Nemotron 3's
    prompt, chosen, _ = encode(text_of(source), {"messages": [turn("user", last), turn("assistant", "Hello.")]})
    assert prompt + chosen == f"<|user|>{last}<|end|><|assistant|><think>\n</think>Hello.<|end|>" and chosen.endswith("</think>Hello.<|end|>")


@pytest.mark.parametrize("asked, answered", [("Assistant:", "ASSISTANT: "), ("<|assistant|>assistant", "<|assistant|>model "), ("<|user|>", "<|assistant|>"),
                                             ("<|assistant|>Sure, ", "<|assistant|>")])
def test_half_a_header_is_no_part_of_an_answer(asked, answered):
    source = ("{% for m in messages %}{{ (ANSWERED if m.role == 'assistant' else '<|user|>') + m.content + '<|end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ ASKED }}{% endif %}").replace("ANSWERED", repr(answered)).replace("ASKED", repr(asked))
    with pytest.raises(BadInput, match=r"has .* for the model to go on from, and .* before an answer"):
        encode(text_of(source), {"messages": [turn("user", "Is it a?"), turn("assistant", "Hello.")]})


def test_arguments_of_a_call_that_are_written_as_a_text_within_json_are_refused():
    """OpenAI stores them as a text, and a template that writes JSON escapes it a second time."""
    call = CALL | {"function": {"name": "find", "arguments": json.dumps({"what": "bell"})}}
    for messages in ([U, turn("assistant", None, tool_calls=[call])], [U, turn("assistant", "", tool_calls=[call]), turn("tool", "harbor"), A]):
        with pytest.raises(BadInput, match=r"arguments as a text within JSON, '{\"what\": \"bell\"}'; store them as an object"):
            encode(text_of("tools"), {"messages": messages})
    worse = {"prompt": [U], "chosen": [A], "rejected": [turn("assistant", None, tool_calls=[call])]}
    with pytest.raises(BadInput, match="arguments as a text within JSON"):
        encode(text_of("tools"), worse)
    plain = TOOLS.replace("call | tojson", "call.function.name + ' ' + call.function.arguments")
    assert encode(text_of(plain), {"messages": [U, turn("assistant", None, tool_calls=[call])]})[1] == '\nfind {"what": "bell"}<|end|>'


def test_a_turn_that_a_template_writes_as_json_or_takes_for_a_switch_is_not_lost():
    said, remarks = '{"sky": "clear"}\n20', Remarks()
    source = TOOLS.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content.replace('/no_think', '') }}")
    rows = [Row({"messages": [U, A, turn("tool", said), A]}, "line 1"), Row({"messages": [turn("system", "Be brief. /no_think"), U, A]}, "line 2")]
    (prompt, *_), (brief, *_) = text_of(source).encode(rows, remarks)
    assert not remarks.refused and json.dumps(said) in text_of(source).decode(prompt) and "Be brief. <|end|>" in text_of(source).decode(brief)
    assert "2 rows: the chat template or the tokenizer changes blanks or forms of letters" in remarks.note()


def test_thoughts_of_earlier_answers_alone_may_be_dropped():
    source = TOOLS.replace("m.reasoning_content is defined", "m.reasoning_content is defined and loop.last")
    remarks, early = Remarks(), {"messages": [U, A | {"reasoning_content": "I count."}, U, A]}
    text_of(source).encode([Row(early, "line 1")], remarks)
    assert not remarks.refused and "does not write the key 'reasoning_content'" in remarks.note()
    with pytest.raises(BadInput, match="does not write 'reasoning_content'"):
        encode(text_of("header"), {"messages": [U, A | {"reasoning_content": "I count."}]})


def test_a_prompt_that_is_cut_within_a_word_is_not_lost():
    """In the whole text the prompt's last letters are three tokens, of which the last reaches over the border."""
    vocab = {word: i for i, word in enumerate(("x", "a", "b", "c", "d", "cd", "bc", "abc", "<|end|>"))}
    tokenizer = Tokenizer(models.BPE(vocab, [("c", "d"), ("b", "c"), ("a", "bc")]))
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<|end|>"}'}
    text = Text(files, "here", ROOMY)
    (prompt, chosen, _), = text.encode([Row({"prompt": "xabc", "chosen": "dx"}, "line 1")])
    assert text.ids(["xabc"]) == [[0, 7]] and prompt == [0] and chosen == [1, 2, 5, 0, 8]


def test_what_an_attacker_found():
    """Each of these once trained something else without a word."""
    for template, raw, what in [
        ("{% for m in messages %}<|{{m.role}}|>{% if m.reasoning_content %}{{m.reasoning_content}}<|end|><|assistant|>{% endif %}{{m.content}}<|end|>{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}", {"messages": [U, A | {"reasoning_content": "Surely Harbor 3. I say"}]},
         "writes more of the answer behind its end token"),
        ("{% for m in messages %}{% if m.role != 'system' %}<|{{m.role}}|>{{m.content}}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
         {"messages": [turn("system", "Where"), U, A]}, "drops the turn 'Where', role system"),
        ("{% for m in messages %}<|{{m.role}}|>{% if m.reasoning_content %}<think>{% endif %}{{m.content}}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
         {"messages": [U, A | {"reasoning_content": "I count."}]}, "'I count.' is lost on its way into tokens")]:
        with pytest.raises(BadInput, match=what):
            encode(text_of(template), raw)
    both = {"chat_template_kwargs": {"name": "x"}, "messages": [U | {"name": "Ada"}, A]}
    remarks = Remarks()
    text_of("{% for m in messages %}<|{{m.role}}|>{{m.name}}{{m.content}}<|end|>{% endfor %}").encode([Row(both, "line 7")], remarks)
    assert "does not write the key 'name'" in remarks.note(), "the row's is not used, though the message's is"


def test_the_answer_is_whole_though_its_call_repeats_the_question():
    source = SYSTEM_TURN.replace("m.content + '<|end|>'", "m.content + (m.tool_calls | tojson if m.tool_calls else '') + '<|end|>'")
    raw = {"messages": [turn("system", "Be brief."), turn("user", "bell"), turn("assistant", None, tool_calls=[CALL])]}
    prompt, chosen, _ = encode(text_of(source), raw)
    assert prompt.endswith("Be brief.\n\nbell<|assistant|>") and chosen == json.dumps([CALL]) + "<|end|>"


def test_an_end_that_the_tokenizer_names_and_generation_config_does_not_is_exported():
    files = companions(TINY) | {"tokenizer_config.json": b'{"eos_token": "<|end|>"}', "generation_config.json": b'{"eos_token_id": 0}'}
    assert exported(Text(files, "here", read_config(TINY)))["generation_config.json"] == {"eos_token_id": [1, 0]}


def test_a_token_that_reaches_over_the_border_is_the_responses_and_is_counted():
    """A prompt without a template that ends in a blank: at inference it would be one token longer."""
    remarks, text = Remarks(), Text({k: v for k, v in companions(TINY).items() if k != "chat_template.jinja"}, "tiny", read_config(TINY))
    (prompt, chosen, _), = text.encode([Row({"prompt": "Who? ", "chosen": "dog."}, "rows.jsonl, line 7")], remarks)
    assert (text.decode(prompt), text.decode(chosen)) == ("Who?", " dog.<|end|>")
    assert "1 rows: one token holds the prompt's end and the response's beginning" in remarks.note() and "line 7" in remarks.note()


def test_everything_a_message_carries_goes_to_the_template():
    text = text_of("tools")
    prompt, chosen, _ = encode(text, KINDS_OF_TALK["tool result"])
    assert json.dumps(TOOL) in prompt and json.dumps(CALL) in prompt and "<|tool|>harbor<|end|>" in prompt and chosen == "Harbor 3.<|end|>"
    assert encode(text, KINDS_OF_TALK["tool call"])[1] == "\n" + json.dumps(CALL) + "<|end|>"
    assert encode(text, KINDS_OF_TALK["reasoning"])[1] == "<think>\nI count.\n</think>\n\nHarbor 3.<|end|>"
    switch = text_of("{% if loud %}!{% endif %}" + TOOLS)
    assert encode(switch, {"messages": [U, A], "chat_template_kwargs": {"loud": True, "quiet": None}})[0].startswith("!")


def test_bookkeeping_that_a_template_does_not_write_is_counted():
    remarks = Remarks()
    text_of("header").encode([Row({"messages": [U | {"name": "Ada", "id": 3}, A]}, f"line {i}") for i in range(3)], remarks)
    assert "3 rows: the chat template does not write the key 'id' (line 0: " in remarks.note() and "key 'name'" in remarks.note()


def test_a_row_that_is_nested_too_deeply_is_refused_like_any_other():
    def deep(n):
        return deep(n + 1)

    remarks = Remarks()
    assert remarks.attempt(Row({"prompt": "a", "chosen": "b"}, "line 9"), deep, 0) is None
    with pytest.raises(BadInput, match="^line 9: maximum recursion depth"):
        remarks.refuse()


def test_all_rows_that_are_refused_are_counted_and_the_first_is_named(tmp_path):
    """A row is named by its file and line, also after rows were held out and dropped."""
    rows = [{"prompt": "a", "chosen": "b"}] * 4 + [{"prompt": "a", "chosen": "x<|end|>y"}] + [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "<|end|>z"}]
    (tmp_path / "rows.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=r"rows.jsonl, line 6: an end token stands inside .* \(1 other rows are refused as well\)$"):
        Data(read_rows(tmp_path / "rows.jsonl"), text_of("header"), Config(max_prompt_length=9, max_length=30), "train")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows[:4], {"prompt": "a", "chosen": "<|end|>"}, {"prompt": "c", "chosen": "d"}])))
    data = Data(read_rows(tmp_path / "rows.jsonl")[1:], text_of("header"), Config(max_prompt_length=9, max_length=30), "train")
    assert [place.rpartition(" ")[2] for place in data.places] == ["2", "3", "4", "6"]


def test_a_tokenizer_that_loses_letters_is_refused_and_one_that_changes_their_form_is_counted():
    def tokenizer(change):
        tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        tokenizer.normalizer = change
        return text_of("header", **{"tokenizer.json": tokenizer.to_str().encode()})

    remarks, raw = Remarks(), {"prompt": "Where?", "chosen": "In \uff28arbor."}
    tokenizer(normalizers.NFKC()).encode([Row(raw, "line 1")], remarks)
    assert "changes blanks or forms of letters" in remarks.note()
    with pytest.raises(BadInput, match="Harbor|arbor.* is lost on its way into tokens"):
        encode(tokenizer(normalizers.Replace("\uff28", "")), raw)


# ---------------------------------------------------------------- special tokens, from every file that names them

def test_special_tokens_are_read_from_all_their_files():
    """transformers' order: added_tokens_decoder, or where there is none special_tokens_map.json and added_tokens.json."""
    bare = {"tokenizer_config.json": b"{}"}
    size = Tokenizer.from_file(str(TINY / "tokenizer.json")).get_vocab_size()
    for files in ({"special_tokens_map.json": {"eos_token": {"content": "<|stop|>"}}, "added_tokens.json": {"<|stop|>": size}},
                  {"tokenizer_config.json": {"eos_token": "<|stop|>", "added_tokens_decoder": {size: {"content": "<|stop|>", "special": True}}},
                   "special_tokens_map.json": {"eos_token": "not read"}},
                  {"tokenizer_config.json": {"eos_token": "<|stop|>"}}):
        files = bare | {name: json.dumps(value).encode() for name, value in files.items()}
        text = Text({"tokenizer.json": companions(TINY)["tokenizer.json"]} | files, "here", ROOMY)
        (_, chosen, _), = text.encode([Row({"prompt": "a", "chosen": " b<|stop|>"}, "here")])
        assert text.eos == (size,) and chosen[-1] == size and chosen.count(size) == 1, files
        with pytest.raises(BadInput, match="an end token stands inside"):
            text.encode([Row({"prompt": "a", "chosen": " b <|stop|> c"}, "here")])
    wrong = {"tokenizer_config.json": json.dumps({"added_tokens_decoder": {"3": {"content": "<|end|>"}}}).encode()}
    with pytest.raises(BadInput, match=r"'<\|end\|>' has id 3 in one file and 1 in tokenizer.json"):
        Text(companions(TINY) | wrong, "here", ROOMY)


def test_a_tokens_manner_is_what_the_tokenizers_settings_say():
    """As in transformers, which believe tokenizer_config.json."""
    settings = {"eos_token": "<|end|>", "added_tokens_decoder": {"1": {"content": "<|end|>", "lstrip": True, "special": True}}}
    text = Text(companions(TINY) | {"tokenizer_config.json": json.dumps(settings).encode()}, "here", ROOMY)
    token = text.tokenizer.get_added_tokens_decoder()[1]
    assert token.lstrip and token.special and text.ids(["a <|end|>"]) == text.ids(["a<|end|>"])


def test_a_named_end_that_is_an_ordinary_token_is_one_token_all_the_same():
    files = companions(TINY) | {"tokenizer_config.json": b'{"eos_token": "e"}', "generation_config.json": b"{}"}
    text = Text({k: v for k, v in files.items() if k != "chat_template.jinja"}, "here", ROOMY)
    assert text.eos == (text.tokenizer.token_to_id("e"),) and text.typed_ends.sub("", "thee") == "th"


def test_ids_with_a_gap_are_bounded_by_the_largest():
    """A count was taken for a bound, and then the end token lay beyond it."""
    raw = json.loads((TINY / "tokenizer.json").read_text())
    raw["model"]["vocab"]["<|end|>"] = 2000
    raw["added_tokens"] = [token | {"id": 2000 if token["content"] == "<|end|>" else token["id"]} for token in raw["added_tokens"]]
    files = companions(TINY) | {"tokenizer.json": json.dumps(raw).encode(), "tokenizer_config.json": b'{"eos_token": "<|end|>"}'}
    text = Text(files, "here", ROOMY)
    assert text.eos == (2000,) and text.vocab == 2001
    with pytest.raises(BadInput, match="ids go up to 2000, the model has only 2000"):
        Text(files, "here", ModelConfig(**NUMBERS | {"vocab_size": 2000}))


# ---------------------------------------------------------------- export: what was used

def exported(text):
    return {name: json.loads(content) if name.endswith(".json") else content.decode() for name, content in text.exported()[0].items()}


def test_the_export_has_the_template_and_the_ends_that_were_used(tmp_path):
    """A base model with --chat-template: its own files name another end, or none."""
    (tmp_path / "mine.jinja").write_text(HEADER)
    files = companions(TINY) | {"generation_config.json": b'{"eos_token_id": 0, "temperature": 0.6}', "special_tokens_map.json": b'{"eos_token": "<s>"}',
                                "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "<s>", "chat_template": "old", "model_max_length": 64}'}
    del files["chat_template.jinja"]
    text = Text(files, "here", read_config(TINY), str(tmp_path / "mine.jinja"))
    written, notes = exported(text), text.exported()[1]
    assert written["chat_template.jinja"] == HEADER and written["generation_config.json"] == {"eos_token_id": [1, 0], "temperature": 0.6}
    assert written["tokenizer_config.json"] == {"bos_token": "<s>", "eos_token": "<|end|>", "model_max_length": 64}
    assert written["special_tokens_map.json"] == {"eos_token": "<|end|>"} and len(notes) == 3
    again = Text(text.exported()[0], "there", read_config(TINY))
    assert (again.eos, again.end) == (text.eos, text.end) and again.exported() == (text.exported()[0], [])
    rows = [Row(KINDS_OF_TALK[kind], "") for kind in ("plain", "multi-turn", "system")]
    assert again.encode(rows) == text.encode(rows)


def test_the_export_of_a_checkpoint_that_agrees_with_itself_is_byte_for_byte_its_own():
    files = companions(TINY)
    assert Text(files, "here", read_config(TINY)).exported() == (files, [])


def test_the_eos_token_stays_where_the_template_writes_it():
    """Phi-3's template writes eos_token at the end of all; another there would change what it renders."""
    files = companions(TINY) | {"chat_template.jinja": TWO_ENDS.replace("<s>", "{{ eos_token }}").encode(),
                                "tokenizer_config.json": b'{"eos_token": "<s>"}', "generation_config.json": b'{"eos_token_id": [1, 0]}'}
    text = Text(files, "here", read_config(TINY))
    assert text.end == 1 and text.exported() == (files, [])


# ---------------------------------------------------------------- shapes and files that are not read

def refusal(raw):
    with pytest.raises(BadInput, match="^rows.jsonl, line 7: ") as caught:
        Row(raw, "rows.jsonl, line 7")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("raw, word", [
    ({"system": "Answer in French.", "messages": [U, A]}, "the column system would be lost; put it into the messages"),
    ({"prompt": "a", "chosen": "b", "weight": 0.5}, "the column weight would be lost"), ({"messages": [U, A], "tool_calls": [CALL]}, "the column tool_calls"),
    ({"prompt": "Answer in French.", "chosen": [U, A]}, "prompt says what the conversation beside it does not"),
    ({"prompt": [turn("system", "x")], "chosen": "b", "rejected": [U, A]}, "rejected has another history than chosen"),
    ({"chosen": [U, A], "rejected": [U | {"content": "What?"}, A]}, "rejected has another history"),
    ({"chosen": [U, A], "rejected": [U, A, turn("user", "Thanks.")]}, "rejected has another history|must be the assistant's"),
    ({"chosen": [U, A], "rejected": [turn("user", "thanks")]}, "the last message in rejected must be the assistant's"),
    ({"prompt": json.dumps([U]), "chosen": "b"}, "a list of messages is stored as a text; decode it once with json.loads"),
    ({"messages": json.dumps([U, A])}, "stored as a text"), ({"messages": [U, A], "tools": "[]x"}, "tools must be a list"),
    ({"prompt": [], "chosen": "b"}, "prompt must be a text or a list of messages"), ({"prompt": 3, "chosen": [U, A]}, "prompt must be a text or a list"),
    ({"messages": [U, turn("assistant", [{"type": "text", "text": "x"}])]}, "needs a role and a content, both text"),
    ({"question": "a", "answer": "b"}, "columns ..answer., .question..: a row needs prompt and chosen .or completion., or messages; datasets' rename_column"),
    ({"system": "x", "conversations": []}, "the column system would be lost"), ({"tools": [TOOL], "conversations": []}, "ShareGPT's, which drops tools; convert"),
    ({"prompt": [U], "chosen": [A, U, A], "rejected": [A]}, "chosen has several messages; with a rejected one"),
    ({"prompt": [turn("system", "x"), U], "chosen": [U, A]}, "chosen begins neither with prompt nor with an answer to it"),
    ({"prompt": [U, A], "chosen": "b"}, "prompt ends in an assistant's message"), ({"messages": [U, A], "chat_template_kwargs": {"messages": []}}, "cannot hold messages"),
    ({"chosen": "a", "rejected": "b"}, "prompt is missing"), ({"messages": [U, turn("assistant", " ")]}, "the messages response is empty")])
def test_a_row_that_would_lose_something_is_refused(raw, word):
    assert re.search(word, refusal(raw))


FOREIGN = {
    "ShareGPT": ([{"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}],
                 [([turn("system", "Be brief."), turn("user", "Hi")], "Ho")]),
    "Alpaca": ([{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say a.", "input": "", "output": "a"}],
               [("Add.\n\n1 2", "3"), ("Say a.", "a")]),
    "KTO": ([{"prompt": "Hi", "completion": "Ho", "label": True}, {"prompt": "Hi", "completion": "Hu", "label": False}], [("Hi", "Ho")]),
    "hh-rlhf": ([{"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: Hu"}], [([turn("user", "Hi")], "Ho")])}


def follow(recipe, folder, monkeypatch):
    """Run the recipe of a refusal as it is printed, and read what it makes."""
    (command,) = re.findall(r'python -c "(.*)"$', recipe)
    monkeypatch.chdir(folder)
    exec(compile(command.replace("\\n", "\\\\n") if "\n" in command else command, "recipe", "exec"), {})
    return [(row.turns, row.chosen["content"]) for row in read_rows(folder / "theirs.converted.jsonl")]


@pytest.mark.parametrize("name", FOREIGN)
def test_the_recipe_for_another_shape_works(name, tmp_path, monkeypatch):
    oracle("datasets")
    raws, expected = FOREIGN[name]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, raws)))
    lost = ", which drops rejected" if "rejected" in raws[0] else ""
    with pytest.raises(BadInput, match=f"theirs.jsonl, line 1: columns .* are {name}'s{lost}; convert it once") as refused:
        read_rows(tmp_path / "theirs.jsonl")
    assert follow(str(refused.value), tmp_path, monkeypatch) == expected


@pytest.mark.parametrize("suffix", [s for s in KINDS if s not in (".zst", ".xz")])
def test_the_recipe_for_another_kind_of_file_works(suffix, tmp_path, monkeypatch):
    rows = oracle("datasets").Dataset.from_list([{"prompt": "Hi", "chosen": "Ho"}, {"prompt": "a,b", "chosen": "c\nd"}])
    path = tmp_path / f"theirs{suffix}"
    if suffix == ".arrow":
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        getattr(rows, f"to_{KINDS[suffix]}")(path)
    with pytest.raises(BadInput, match=f"theirs{suffix}: only JSON lines are read; convert it once") as refused:
        read_rows(path)
    assert follow(str(refused.value), tmp_path, monkeypatch) == [("Hi", "Ho"), ("a,b", "c\nd")]


@pytest.mark.parametrize("name", ["it's.csv", "a`b`.csv", 'say "$(date)".csv', "back\\slash.csv", "100%, 两 é.csv"])
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's quotes, and names that Windows forbids")
def test_neither_shell_nor_python_reads_anything_into_a_files_name(name, tmp_path):
    (tmp_path / name).write_text("prompt,chosen\n")
    with pytest.raises(BadInput, match="only JSON lines are read") as refused:
        read_rows(str(tmp_path / name))
    command = str(refused.value).partition("convert it once: ")[2].replace("python -c", "printf %s", 1)
    code = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    words = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert str(tmp_path / name) in words and f"{name.partition('.')[0]}.converted.jsonl" in words


def test_a_hub_name_for_data_gets_its_recipe():
    with pytest.raises(BadInput, match=r"^org/some-data: no such file; .*load_dataset\('org/some-data', split='train'\).to_json"):
        read_rows("org/some-data")


FORMATS = {     # as TRL and the Hub have them
    "standard, explicit": {"prompt": "Hi", "chosen": "Ho", "rejected": "Hu"},
    "conversational, explicit": {"prompt": [turn("user", "Hi")], "chosen": [turn("assistant", "Ho")], "rejected": [turn("assistant", "Hu")]},
    "conversational, implicit": {"chosen": [turn("user", "Hi"), turn("assistant", "Ho")], "rejected": [turn("user", "Hi"), turn("assistant", "Hu")]},
    "prompt-completion": {"prompt": "Hi", "completion": "Ho"},
    "prompt-completion, conversational": {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Ho")]},
    "language modelling": {"messages": [turn("user", "Hi"), turn("assistant", "Ho")]},
    "ultrafeedback_binarized": {"prompt": "Hi", "prompt_id": "1f", "chosen": [turn("user", "Hi"), turn("assistant", "Ho")],
                                "rejected": [turn("user", "Hi"), turn("assistant", "Hu")], "messages": [turn("user", "Hi"), turn("assistant", "Ho")],
                                "score_chosen": 8.5, "score_rejected": 7.0}}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_written_by_the_datasets_library_are_the_same_examples(name, tmp_path):
    """It fills what one row lacks with null: here an optional tool_calls."""
    extra = turn("user", "Hi"), turn("assistant", "Yes.", tool_calls=None)
    rows = oracle("datasets").Dataset.from_list([FORMATS[name]] + ([{"messages": list(extra)}] if name == "language modelling" else []))
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_json(tmp_path / "list.json", lines=False)
    encoded = [text_of("header").encode(read_rows(tmp_path / file))[0] for file in ("rows.jsonl", "list.json")]
    expected = encode(text_of("header"), {"prompt": "Hi", "chosen": "Ho"} | ({"rejected": "Hu"} if "rejected" in FORMATS[name] else {}))
    assert encoded[0] == encoded[1] and [ids and text_of("header").decode(ids) for ids in encoded[0]] == expected


# ---------------------------------------------------------------- any row at all

PIECES = ["Hi", "dog", "Harbor 3.", "Where?", "and", "so on", "Yes", "no", ".", "12", " ", "\n", "\r\n", "\t", "\0", "\u00e9", "e\u0301", "\U0001f600", "\ufb01", "\u200d", "\ufeff", "<|end|>", "<s>", "<|user|>",
          "<|assistant|>", "<|im_end|>", "<|eot_id|>", "<think>", "</think>", "{{ x }}", "\\n", '"', "<", "[INST]", "\u2028", "7"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "assistant", "assistant", "system", "tool"]), "content": st.one_of(TEXTS, TEXTS, st.none())}, optional={
    "tool_calls": st.sampled_from([None, [], [CALL]]), "reasoning_content": TEXTS, "name": st.just("Ada"), "weight": st.just(0)})
ASKED = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": TEXTS}), min_size=1, max_size=3)
ANSWERED = st.tuples(ASKED, TEXTS).map(lambda talk: [*talk[0], turn("user", "Well?"), turn("assistant", "Yes, " + talk[1])])
TALKS = st.one_of(st.lists(MESSAGES, min_size=1, max_size=4), ANSWERED)
ROWS = st.one_of(st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS}, optional={"rejected": TEXTS}),
                 st.fixed_dictionaries({"messages": TALKS}, optional={"rejected": TEXTS}),
                 st.fixed_dictionaries({"messages": TALKS}, optional={"tools": st.just([TOOL]), "system": TEXTS}),
                 st.fixed_dictionaries({"chosen": TALKS}, optional={"prompt": st.one_of(TEXTS, TALKS), "rejected": TALKS}),
                 st.fixed_dictionaries({"prompt": TALKS, "completion": TALKS}))
SEEN = {"proven": 0, "refused": 0}                       # told by: pytest tests/test_contract.py -k any_row -s


def squeeze(text):
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def said(raw):
    """(what must stand in the prompt, in the answer, in the worse answer), read off the row by other means than machine/rows.py."""
    answer = raw.get("chosen", raw.get("completion", raw.get("messages")))
    if isinstance(answer, str):
        before, last = [raw["prompt"]] if isinstance(raw["prompt"], str) else raw["prompt"], {"content": answer}
    else:
        prompt = raw.get("prompt") or []
        before = ([prompt] if isinstance(prompt, str) else prompt) + answer[:-1]
        last = answer[-1]
    worse = raw.get("rejected") or ""
    worse = worse if isinstance(worse, str) else worse[-1]["content"] or ""
    asked = [m if isinstance(m, str) else m["content"] or "" for m in before if isinstance(m, str) or m["role"] != "assistant"]
    asked += [call["function"]["name"] for m in before if isinstance(m, dict) for call in m.get("tool_calls") or []]
    asked += [tool["function"]["description"] for tool in raw.get("tools", [])] + [raw.get("system", "")]
    return asked, [last["content"] or "", last.get("reasoning_content") or ""], [worse]


def proven_or_refused(name, raw):
    text = PREPARED[name]
    try:
        ids = text.encode([Row(raw, "rows.jsonl, line 7")])[0]
    except BadInput as refused:
        assert str(refused).startswith("rows.jsonl, line 7: ") and "\n" not in str(refused)
        SEEN["refused"] += 1
        return
    for part, words in zip(ids, said(raw)):
        for word in words if part else ():
            if part is not ids[0]:
                word = text.typed_ends.sub("", word)                   # what is typed at an answer's end is its end
            assert squeeze(word) in squeeze(text.decode(part)), (name, word, text.decode(part))
    for answer in ids[1:]:
        assert not answer or answer[-1] in text.eos and not set(answer[:-1]) & set(text.eos)
    SEEN["proven"] += 1


PREPARED = {name: text_of(name) for name in TEMPLATES}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=125, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=ROWS)
def test_any_row_is_proven_or_refused_and_never_silently_changed(name, raw):
    proven_or_refused(name, raw)


def test_a_fair_share_of_the_random_rows_is_proven():
    """Or the property would say nothing."""
    print(SEEN)
    assert SEEN["proven"] > 0.2 * sum(SEEN.values()) or not sum(SEEN.values())


@pytest.mark.parametrize("planted", ["_holds", "_prove", "_all_used"])
def test_the_property_fails_where_a_check_is_planted_out(planted):
    """1,000 rows at least; each check alone is needed."""
    before = dict(SEEN)

    @settings(max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(list(TEMPLATES)), ROWS)
    def attack(name, raw):
        proven_or_refused(name, raw)

    out = mock.patch.object(chat, "_holds", lambda *_: True) if planted == "_holds" else mock.patch.object(Text, planted, lambda *_: True)
    with out, pytest.raises((AssertionError, ExceptionGroup)):
        attack()
    SEEN.update(before)


if __name__ == "__main__":
    for folder in real():
        for kind, raw in KINDS_OF_TALK.items():
            print(f"| {folder.name} | {kind} | {verdict(folder, raw)} |", flush=True)
