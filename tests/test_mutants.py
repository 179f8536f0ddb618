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
    assert command(copied, "homework").returncode == 0
    (copied / "sapo.py").write_text((copied / "sapo.py").read_text("utf-8") + "# mine\n", "utf-8")
    kept = texts(copied)
    assert "sapo.py" in command(copied, "undo").stderr and texts(copied) == kept
    assert command(copied, "undo", "--force").returncode == 0 and texts(copied) == before


def test_homework_empties_three_functions_and_keeps_their_docstrings(copied):
    whole = {file: (copied / file).read_text("utf-8") for file in ("sapo.py", "losses.py")}
    assert command(copied, "homework").returncode == 0
    emptied = 0
    for file, text in whole.items():
        for old, new in zip(ast.parse(text).body, ast.parse((copied / file).read_text("utf-8")).body, strict=True):
            if ast.dump(old) != ast.dump(new):
                emptied += 1
                assert (file, new.name) in [homework[:2] for homework in mutants.HOMEWORK]
                assert ast.get_docstring(new) == ast.get_docstring(old) and ast.dump(new.args) == ast.dump(old.args)
                assert len(new.body) == 2 and ast.unparse(new.body[1]).startswith("raise NotImplementedError('yours to write: ")
    assert emptied == 3


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
