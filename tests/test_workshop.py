"""The workshop: the notebook is what its cells say, hunts give nothing away, and (with --slow) it runs from top to bottom."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, oracle

import make_notebook
import mutants

STATIONS = list(mutants.HINTS)
NOT_NEEDED = ("transformers", "trl", "peft", "hypothesis", "scipy", "IPython", "nbclient")


def page(name):
    return (ROOT / "docs" / name).read_text("utf-8")


def cells():
    return make_notebook.cells(page("workshop_cells.py"))


def python(text):
    return "\n".join(line for line in text.splitlines() if not line.startswith("%"))


def test_the_notebook_is_made_from_its_cells_and_holds_no_outputs():
    written = json.loads(page("workshop.ipynb"))
    assert written == make_notebook.notebook(page("workshop_cells.py")), "run: python tools/make_notebook.py"
    assert not any(cell.get("outputs") for cell in written["cells"]) and len(page("workshop.ipynb")) < 300_000


def test_the_notebook_is_a_valid_one():
    nbformat = oracle("nbformat")
    nbformat.validate(nbformat.reads(page("workshop.ipynb"), as_version=4))


def test_the_nine_lines_come_in_order_each_with_a_picture_and_a_claim():
    parts, code = re.split(r"(?=## \[\d\])", "\n".join(text if kind == "markdown" else f"\n{python(text)}\n" for kind, text in cells())), []
    numbered = [part for part in parts if re.match(r"## \[\d\]", part)]
    assert [part[4] for part in numbered] == list("123456789")
    for part in numbered:
        assert re.search(r"plt\.show|draw_", part) and "assert " in part, part[:60]


def test_each_station_is_planted_looked_at_guessed_tested_and_undone():
    text = "\n".join(text for _, text in cells())
    for station in "123456":
        part = text[text.index(f"## Station {station}."):].split("\n## ")[0] if station != "6" else text[text.index("## Station 6."):]
        steps = [f"bug = plant({station})", "draw_curves(", "<summary>Hint 1", "<summary>Hint 3", "bug.guess(", "assert bug.test()", "bug.reveal()", "bug = None"]
        places = [part.find(step) for step in steps]
        assert -1 not in places and places == sorted(places), (station, places)
    assert all(ast.parse(python(text)) for kind, text in cells() if kind == "code")


def test_the_commands_are_the_same_in_bash_and_powershell():
    """One command a line, without &&, VAR=value, continued lines, quotes other than ", and variables. Both leave what stands
    in " as it is, if it has neither $ nor ` nor \\ nor !."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page("workshop.md"), re.M | re.S)
    lines = [line for language, block in blocks if language != "python" for line in block.splitlines()]
    assert len(lines) > 12
    for line in lines:
        bare = re.sub(r'"[^"$`\\!]*"', '""', line)
        assert re.match(r"(python|pip|jupyter) ", line) and not re.search(r"&&|[\\;$`'*~<>|]", bare), line


@pytest.mark.parametrize("station", STATIONS)
def test_neither_page_gives_a_bug_away_and_the_answers_name_it(station):
    mutant = mutants.of_station(station)
    told = page("workshop.md") + re.sub(r"<details>.*?</details>", "", "\n".join(text for _, text in cells()), flags=re.S)
    assert mutant.test not in told and mutant.name not in told and mutant.new.strip() not in told
    assert f"`{mutant.test}`" in page("workshop_answers.md")
    assert f"station {station}" in page("workshop.md") or station in "23456" and f"**{station}. " in page("workshop.md")


@pytest.mark.parametrize("station", STATIONS)
def test_a_bug_is_planted_in_copies_and_our_own_files_stay_as_they_are(station, capsys):
    import workshop
    before = {name: sys.modules[name] for name in workshop.METHOD}
    bug = workshop.plant(station)
    assert all(sys.modules[name] is module for name, module in before.items())
    file, function = bug.mutant.file[:-3], mutants.where(bug.mutant, ROOT)
    bug.show(f"{file}.{function}")
    shown = capsys.readouterr().out
    assert bug.mutant.new.strip().splitlines()[0] in shown or function == "sapo_step"
    bug.guess(function), bug.guess("collate"), bug.reveal()
    said = capsys.readouterr().out
    assert "Yes" in said and bug.mutant.name in said
    assert bug.sapo.collate is bug.buffer.collate is not before["buffer"].collate, "the copies use each other"


def test_a_planted_bug_changes_what_its_copies_do():
    import numpy as np
    import workshop
    bug, rng = workshop.plant(1), np.random.default_rng(0)
    stops = {code.split(list(range(9)), "4", (), rng)[1] for code in [bug.sapo] for _ in range(300)}
    assert max(stops) == 8 and max(workshop.sapo.split(list(range(9)), "4", (), rng)[1] for _ in range(300)) == 9


def test_a_stations_tests_need_no_more_than_training_and_pytest():
    files = sorted({mutants.of_station(station).test.split("::")[0] for station in STATIONS})
    code = f"import sys; sys.modules |= dict.fromkeys({NOT_NEEDED!r}); import pytest; sys.exit(pytest.main(['-q', '--collect-only', *{files!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    for name in ("nbclient", "nbformat", "ipykernel"):
        oracle(name)
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*mutants.NOT_COPIED))
    node = make_notebook.execute(json.loads(page("workshop.ipynb")), copy / "docs")
    pictures = sum("image/png" in output.get("data", {}) for cell in node.cells for output in cell.get("outputs", []))
    assert pictures >= 9 + 6
    for file in ("losses.py", "buffer.py", "sapo.py"):
        assert (copy / file).read_bytes() == (ROOT / file).read_bytes(), "no station touches the files"
