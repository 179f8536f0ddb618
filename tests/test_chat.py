"""tools/chat.py: what it shows is what `generate` says to the template's prompt, turn by turn, and bad input is one line."""

import io
import shutil
import sys

import pytest
import torch
from conftest import ROOT, small_model
from tokenizers import Tokenizer, processors

import chat
from machine.folders import companions, load_pretrained, save_pretrained
from machine.process import printable
from machine.text import Text
from model import generate

GREEDY = ["--temperature", "0", "--max-new-tokens", "7", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model that says something else to each prompt, with the tiny world's tokenizer and template."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save_pretrained(small_model(dtype=torch.float32, vocab_size=1024), folder, torch.float32, companions(ROOT / "data/tiny_model"))
    return folder


@pytest.fixture
def says(capsys, monkeypatch):
    """(exit code, stdout, stderr) of a command line, with a text as its standard input."""
    def says(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = chat.main(list(map(str, argv)))
        return code, *capsys.readouterr()
    return says


def expected(folder, *turns):
    """The greedy answer to turns of user, assistant, user, ... by `generate` alone."""
    model = load_pretrained(folder).eval()
    text = Text(companions(folder), folder, model.config)
    turns = "".join(f"<|{role}|>{words}<|end|>" for role, words in zip(["user", "assistant"] * 9, turns))
    ids = text.tokenizer.encode(f"<s>{turns}<|assistant|>", add_special_tokens=False).ids
    return text.decode(generate(model, [ids], [7], text.eos, temperature=0, vocab=text.vocab)[0], True)


def shown(*answers):
    """Answers as a terminal gets them, a line each: random weights say characters that would steer it."""
    return "".join(printable(answer, "\n\t") + "\n" for answer in answers)


def test_it_answers_one_prompt_with_the_template(folder, says):
    answer = expected(folder, "Tell of a duck.")
    assert len(answer) > 8 and answer != expected(folder, "Tell of a dog.")
    assert says(folder, *GREEDY, "--prompt", "Tell of a duck.") == (0, shown(answer), "")
    assert says(folder, *GREEDY, "--prompt", "-", stdin="Tell of a duck.\n") == (0, shown(answer), "")


def test_bytes_that_are_no_text_are_shown_as_such_and_answered(folder, says):
    for how in (["--prompt", "Tell of a \udcff."], ["--prompt", "-"], []):
        code, said, err = says(folder, *GREEDY, *how, stdin="Tell of a \udcff.\n")
        assert (code, err) == (0, "") and said == shown(expected(folder, "Tell of a ?."))


def test_turns_stand_on_the_turns_before_and_an_empty_one_begins_anew(folder, says):
    first = expected(folder, "Hello.")
    second = expected(folder, "Hello.", first, "And then?")
    assert len({first, second, expected(folder, "And then?")}) == 3
    code, out, err = says(folder, *GREEDY, stdin="Hello.\nAnd then?\n\nAnd then?\n")
    assert (code, out) == (0, shown(first, second, expected(folder, "And then?"))) and err == "(a new conversation)\n"


def test_two_models_answer_each_in_a_conversation_of_its_own(folder, says, tmp_path):
    save_pretrained(small_model(1, torch.float32, vocab_size=1024), tmp_path / "base", torch.float32, companions(folder))
    lines = []
    for name in (folder, tmp_path / "base"):
        first = expected(name, "Hello.")
        lines.append([f"-- {name}\n{shown(words)}" for words in (first, expected(name, "Hello.", first, "Why?"))])
    assert len({line.partition("\n")[2] for lines_of in lines for line in lines_of}) == 4
    code, out, _ = says(folder, "--compare", tmp_path / "base", *GREEDY, stdin="Hello.\nWhy?\n")
    assert (code, out) == (0, lines[0][0] + lines[1][0] + lines[0][1] + lines[1][1])


def test_without_a_template_the_model_goes_on_from_the_text(folder, says, tmp_path):
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("*.jinja", "README.md"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.save(str(tmp_path / "plain/tokenizer.json"))
    model = load_pretrained(folder).eval()
    text = Text(companions(tmp_path / "plain"), folder, model.config)
    ids = tokenizer.encode("Once upon a").ids
    assert ids[0] == text.bos
    answer = text.decode(generate(model, [ids], [7], text.eos, temperature=0, vocab=text.vocab)[0], True)
    assert says(tmp_path / "plain", *GREEDY, "--prompt", "Once upon a") == (0, shown(answer), "")


def test_a_seed_and_a_temperature_give_the_same_answer_again(folder, says):
    seen = [says(folder, "--temperature", 1.5, "--max-new-tokens", 7, "--device", "cpu", "--seed", seed, "--prompt", "Hello.")[1] for seed in (1, 1, 2)]
    assert seen[0] == seen[1] != seen[2]


def test_the_text_comes_while_it_is_made(folder, says, monkeypatch):
    """What is shown before each further token is the text of those before it."""
    seen, see = [], chat.Screen.see

    def watched(screen, tokens):
        see(screen, tokens)
        seen.append((list(screen.ids), screen.shown))

    monkeypatch.setattr(chat.Screen, "see", watched)
    says(folder, *GREEDY, "--prompt", "Tell of a duck.")
    answer = expected(folder, "Tell of a duck.")
    text = Text(companions(folder), folder, load_pretrained(folder).config)
    assert len(seen) == 6 and [len(ids) for ids, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(so_far == text.decode(ids, True).rstrip("\ufffd") and answer.startswith(so_far) for ids, so_far in seen)


def test_half_a_character_waits_and_nothing_steers_the_terminal(capsys):
    parts = {(1,): "caf\ufffd", (1, 2): "café", (1, 2, 3): "café \033[31mred\a\u3000\u0645\u06cc\u200c"}

    class Words:
        eos = (7,)

        def decode(self, ids, skip):
            return parts[tuple(ids)]

    screen = chat.Screen(Words())
    screen.see(torch.tensor([1]))
    assert capsys.readouterr().out == "caf"
    screen.see(torch.tensor([2]))
    screen.end([1, 2, 3])
    assert capsys.readouterr().out == "é \ufffd[31mred\ufffd\u3000\u0645\u06cc\u200c\n", "blanks and joiners of other scripts steer nothing"


def test_a_stopped_answer_stays_in_the_conversation(folder, capsys, monkeypatch):
    def stop(screen, tokens):
        see(screen, tokens)
        if len(screen.ids) == 3:
            raise KeyboardInterrupt

    see = chat.Screen.see
    speaker = chat.Speaker(str(folder), 42)
    speaker.load("cpu", torch.float32)
    monkeypatch.setattr(chat.Screen, "see", stop)
    assert speaker.answer("Hello.", chat.settings(["x", *GREEDY]))[0] == 3
    assert shown(speaker.turns[1]["content"]) == capsys.readouterr().out and expected(folder, "Hello.").startswith(speaker.turns[1]["content"])


def test_of_a_run_its_model_answers(folder, says, tmp_path):
    run = tmp_path / "run"
    (run / "source").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    code, out, err = says(run, "--prompt", "Hello.")
    assert code == 2 and not out and "has not written its model/ yet" in err and err.count("\n") == 1
    shutil.copytree(folder, run / "model")
    assert says(run, *GREEDY, "--prompt", "Hello.")[1] == shown(expected(folder, "Hello."))


@pytest.mark.parametrize("argv, words", [
    ([".", "--device", "cuda"], "torch sees none here; use --device cpu"),
    (["nowhere", "--prompt", "x"], "chat: nowhere: no such folder, and the hub cannot be reached"), ([ROOT / "docs", "--prompt", "x"], "config.json"),
    ([".", "--prompt", "x", "--top-p", 0], "--top-p is 0.0; it must be from"), ([".", "--max-new-tokens", 0], "--max-new-tokens is 0"),
    ([".", "--temperature", "nan"], "--temperature is nan"), ([".", "--prompt", " "], "--prompt is empty")])
def test_bad_input_is_one_line_and_code_2(says, argv, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = says(*argv)
    assert code == 2 and not out and words in err and err.count("\n") == 1


def test_no_weight_is_read_before_both_models_are_found(folder, says, monkeypatch):
    monkeypatch.setattr(chat, "load_pretrained", lambda *_: pytest.fail("weights were read"))
    code, out, err = says(folder, "--compare", "nowhere", "--prompt", "Hello.")
    assert code == 2 and not out and err.startswith("chat: nowhere: no such folder") and err.count("\n") == 1


def test_a_conversation_that_fills_the_context_is_one_line(folder, says):
    code, out, err = says(folder, *GREEDY, stdin="Hello.\n" + "a duck and " * 60 + "\n")
    assert code == 2 and out == shown(expected(folder, "Hello."))
    assert "the model's context ends at 128; begin a new one" in err and err.count("\n") == 1


def test_what_a_gpu_generates_behind_the_end_is_not_shown(folder, capsys):
    text = Text(companions(folder), folder, load_pretrained(folder).config)
    screen, ids = chat.Screen(text), [*text.tokenizer.encode("harbor").ids, text.end, 140, 141]
    for token in ids:
        screen.see(torch.tensor([token]))
    assert screen.ids == ids[:-2] and capsys.readouterr().out == text.decode(ids[:-3])
