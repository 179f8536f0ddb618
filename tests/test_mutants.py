"""The planted bugs: that each can be planted, has its test, can be taken back, and (with --slow) is caught."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

import mutants
from conftest import ROOT
from mutants import MUTANTS, STATIONS

FILES = ("losses.py", "buffer.py", "model.py", "sapo.py", "machine/folders.py", "tools/mutants.py")
NAMES = [re.sub(r"[^\w.]+", "_", f"{m.file} {m.name}") for m in MUTANTS]


@pytest.fixture
def copied(tmp_path):
    """A small copy of the project, to plant in."""
    (tmp_path / "tests").mkdir()
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def command(folder, *arguments):
    return subprocess.run([sys.executable, "tools/mutants.py", *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8")


def texts(folder):
    return {file: (folder / file).read_bytes() for file in FILES}


def functions_of(file):
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_bug_finds_its_place_and_its_test(mutant):
    text = mutants.mutated(mutant, ROOT)                 # raises where the old text is not there exactly once
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((ROOT / mutant.file).read_text("utf-8"))), "the bug is more than a comment"
    assert mutants.where(mutant, ROOT) != "the module"
    file, test = mutant.test.split("[")[0].split("::")
    assert test in functions_of(file)


def test_bugs_are_told_apart_and_six_are_stations_of_the_workshop():
    assert len({m.name for m in MUTANTS}) == len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 24
    assert sorted(m.station for m in MUTANTS if m.station) == list(STATIONS)


def test_planting_says_where_to_look_and_undo_restores_every_byte(copied):
    before, number = texts(copied), next(i for i, m in enumerate(MUTANTS, 1) if m.station == STATIONS[3])
    planted = command(copied, str(number))
    assert planted.returncode == 0 and all(word in planted.stdout for word in ("sapo.py", "ema_update", MUTANTS[number - 1].test, "undo"))
    assert MUTANTS[number - 1].name not in planted.stdout, "what it is, is for the reader to find"
    assert [file for file in FILES if texts(copied)[file] != before[file]] == ["sapo.py"]
    assert "undo" in command(copied, "2").stderr, "one at a time"
    assert command(copied, "undo").returncode == 0 and texts(copied) == before
    assert {str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file()} == set(FILES)
    assert command(copied, "undo").returncode == 1, "nothing is left to undo"


def test_undo_throws_away_work_only_when_told(copied):
    before = texts(copied)
    assert command(copied, "station", "4").returncode == 0
    (copied / "sapo.py").write_text((copied / "sapo.py").read_text("utf-8") + "# mine\n", "utf-8")
    kept = texts(copied)
    assert "sapo.py" in command(copied, "undo").stderr and texts(copied) == kept
    assert command(copied, "undo", "--force").returncode == 0 and texts(copied) == before


def test_a_station_is_planted_without_a_word_and_told_in_three_hints(copied):
    before, mutant = texts(copied), mutants.of_station("3")
    secrets = (mutant.name, mutant.test, "ReplayBuffer", "buffer.py,")
    said = command(copied, "station", "3")
    assert said.returncode == 0 and not any(secret in said.stdout for secret in secrets), said.stdout
    assert "git" not in said.stdout and texts(copied) != before
    hints = [command(copied, "hint").stdout for _ in range(4)]
    assert len(set(hints)) == 3 and "ReplayBuffer.add" in hints[2] == hints[3] and not any("ReplayBuffer" in hint for hint in hints[:2])
    assert "Yes" in command(copied, "guess", "buffer.ReplayBuffer.add").stdout and "Yes" in command(copied, "guess", "add").stdout
    assert "No" in command(copied, "guess", "split").stdout
    told = command(copied, "reveal").stdout
    assert mutant.name in told and mutant.test in told and "\n-        self.pairs.append(pair)\n" not in told and "+        if len(self)" in told
    assert command(copied, "undo").returncode == 0 and texts(copied) == before
    assert command(copied, "station", "7").returncode == 1 and "2b" in command(copied, "station", "7").stderr
    assert command(copied, "hint").returncode == 1


@pytest.mark.parametrize("station", mutants.HINTS)
def test_each_station_has_its_hints_and_no_hint_but_the_last_names_the_function(station):
    mutant = mutants.of_station(station)
    function = mutants.where(mutant, ROOT)
    hints = [mutants.hint(mutant, station, level, ROOT) for level in (1, 2, 3)]
    assert f"{mutant.file}, {function}." in hints[2] and not re.search(r"\.py|\w_\w|\w\.\w", " ".join(hints[:2])), hints
    guesses = {answer: mutants.guessed(mutant.file, function, answer)[:3] == "Yes"
               for answer in (function, f"{mutant.file[:-3]}.{function}", function.split(".")[-1], "", "sapo", "collate_all", function[1:])}
    assert list(guesses.values()) == [True] * len(set(guesses) - {"", "sapo", "collate_all", function[1:]}) + [False] * 4, guesses


def test_a_text_that_is_not_found_once_stops_everything(copied):
    (copied / "buffer.py").write_text((copied / "buffer.py").read_text("utf-8").replace("replace=False", "replace = False"), "utf-8")
    stopped = command(copied)
    assert stopped.returncode == 1 and "drawn with replacement" in stopped.stderr and "0 times" in stopped.stderr


def test_a_number_that_no_bug_has_is_refused(copied):
    for wrong in ("0", str(len(MUTANTS) + 1), "seven"):
        assert command(copied, wrong).returncode == 1 and "list" in command(copied, wrong).stderr


@pytest.mark.parametrize("change, said", [("self.pairs.append(pair)", "caught"), ("# a comment", "MISSED")])
def test_a_bug_is_caught_or_missed(change, said, copied):
    """A bug that no test can see is reported, and the exit code says so."""
    (copied / "tests/test_few.py").write_text("import sys; sys.path.insert(0, '.')\nimport buffer\n\n\ndef test_add():\n"
                                              "    b = buffer.ReplayBuffer(2)\n    b.add(1)\n    assert len(b) == 1\n", "utf-8")
    planted = mutants.Mutant("nobody enters", "buffer.py", f"        {'self.pairs.append(pair)'}", f"        pass    # {change}" if said == "caught" else
                             f"        self.pairs.append(pair)    {change}", "tests/test_few.py::test_add")
    lines = []
    mutants.MUTANTS.append(planted)
    try:
        missed = mutants.hunt([planted], copied, jobs=1, say=lines.append)
    finally:
        mutants.MUTANTS.remove(planted)
    assert lines[0].startswith(said) and missed == ([planted] if said == "MISSED" else [])


@pytest.mark.slow
def test_every_bug_is_caught():
    done = subprocess.run([sys.executable, "tools/mutants.py"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
