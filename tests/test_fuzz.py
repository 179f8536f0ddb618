"""A short slice of tools/fuzz.py, and what once escaped it, written out: each file is taken or refused in one line."""

import gzip
import json

import pytest

import fuzz


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return fuzz.Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("kind, count", [("lines", 400), ("configs", 24), ("headers", 60), ("templates", 12), ("tokenizers", 16)])
def test_damaged_files_are_taken_or_refused_in_one_line(kind, count, tmp_path):
    said = []
    counts = fuzz.fuzz(kind, range(1, 1 + count), tmp_path, said.append)
    assert not said and not counts["escaped"] and counts["accepted"] and counts["refused"]


def changed(bench, file, **keys):
    return json.dumps(json.loads((bench.root / "llama" / file).read_text()) | keys).encode()


ROW = json.dumps(fuzz.ROWS[0]).encode()
HALF = rb'{"prompt": "a \ud800", "chosen": "b"}'                # JSON allows half a surrogate pair, UTF-8 does not
TORN = bytearray(gzip.compress(ROW * 50, mtime=0))
TORN[14] ^= 0xFF
ESCAPED = {     # what once ended in a traceback, or worse: (the file in its place, its content or what makes it, what becomes of it)
    "a .gz that is torn inside": ("bad.jsonl.gz", bytes(TORN), "refused"),
    "half a surrogate pair in a .json": ("bad.json", b"[" + ROW + b"," + HALF + b"]", "refused"),
    "half a surrogate pair in a .jsonl": ("bad.jsonl", ROW + b"\n" + HALF, "refused"),
    "half a surrogate pair in a key of config.json": ("llama/config.json", lambda b: changed(b, "config.json", **{"\ud800": 1}), "refused"),
    "an end token that is half a surrogate pair": ("llama/tokenizer_config.json", lambda b: changed(b, "tokenizer_config.json", eos_token="\ud800"),
                                                   "refused"),
    "a context of one token": ("llama/config.json", lambda b: changed(b, "config.json", max_position_embeddings=1), "refused"),
    "a family of 5,000 letters": ("llama/config.json", lambda b: changed(b, "config.json", model_type="x" * 5000), "refused"),
    "a tensor whose name clears the screen": ("mistral/model.safetensors.index.json",
                                              b'{"weight_map": {"\\u001b[2J\\u0007": "model-00001-of-00003.safetensors"}}', "refused"),
    "a template whose complaint clears the screen": ("llama/chat_template.jinja", b"{{ raise_exception('a\nb\x1b[2J') }}", "refused"),
    "a template that writes half a surrogate pair": ("llama/chat_template.jinja", rb"{{ '\ud800' }}", "refused"),
    "a template whose name is a list": ("qwen3/tokenizer_config.json", lambda b: changed(b, "tokenizer_config.json", chat_template=[
        {"name": [], "template": "x"}, {"name": "default", "template": fuzz.CHATML}]), "accepted"),
    "a template that makes 70 MB": ("llama/chat_template.jinja", b"{{ (messages[0].role | first) * 70000000 }}" + fuzz.DATED.encode(), "refused"),
}


@pytest.mark.parametrize("what", ESCAPED)
def test_what_once_escaped_does_so_no_more(bench, what):
    name, content, outcome = ESCAPED[what]
    file = bench.root / name
    with bench.put(file, content(bench) if callable(content) else content):
        folder = file.parent if file.parent != bench.root else bench.root / "llama"
        assert bench.main(folder, file if name.startswith("bad") else bench.good) == outcome


def test_what_is_watched_for_is_seen(bench):
    """Else nothing above means anything."""
    def write():
        (bench.root / "more").write_text("x")
        print("error: no", file=fuzz.sys.stderr)
        return 2

    def shout(*lines, code=2):
        return lambda: [print(line, file=fuzz.sys.stderr) for line in lines] and code

    assert bench.watched(shout("error: no"), "") == "refused" and bench.watched(shout("warning: so", code=0), "") == "accepted"
    assert "wrote" in bench.watched(write, "")
    assert "exit code 1" in bench.watched(shout("error: no", code=1), "") and "exit code 2" in bench.watched(shout("error: no", "again"), "")
    assert "person" in bench.watched(shout("error: \x1b[2J"), "") and "person" in bench.watched(shout("error: " + "x" * 9000), "")
    assert "ZeroDivisionError" in bench.watched(lambda: 1 / 0, "") and "MemoryError" in bench.watched(lambda: bytearray(2 * fuzz.MEMORY), "")
    assert "Encode" in bench.watched(lambda: print("\ud800"), "")


def test_what_does_not_end_is_seen(bench, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)

    def spin():
        while True:
            pass

    assert "did not end" in bench.watched(spin, "")


def test_cases_depend_on_kind_and_number_alone(bench):
    for kind in fuzz.COUNTS:
        cases = [bench.damage(kind, n) for n in range(40)]
        assert cases == [bench.damage(kind, n) for n in range(40)] and len({c[1] for c in cases}) > 30
