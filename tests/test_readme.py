"""README.md, README.zh.md and docs/ against the code: flags exist, links hold, tables are what was measured.

    python tests/test_readme.py         bring the line numbers of the links up to date

A fenced block whose first line ends in `short` is run as it stands, by `pytest --slow`, in a copy of the project. The
others take longer, or need a model, a network or a GPU; they are run by hand, and what they print is pasted.
"""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import mutants
from machine.flags import Config, flag_of

FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
CODE_LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)\)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = ["README.md", "README.zh.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FLAGS = {flag_of(f.name) for f in dataclasses.fields(Config)} | {"--preset", "--config", "--resume", "--help"}
FLAGS |= {f"--no-{f.name.replace('_', '-')}" for f in dataclasses.fields(Config) if f.type is bool}


def text_of(page):
    return (ROOT / page).read_text("utf-8")


def commands(block):
    """The lines of a block that are commands, without comments, continued lines joined."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines if re.match(r"(\w+=\S+ )*(python3?|torchrun|pytest|pip) ", line)]


def all_commands(page):
    text = text_of(page)
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    spans = [span for span in spans if span.startswith(("python ", "torchrun ", "pytest "))]
    return [command for _, block in FENCED.findall(text) for command in commands(block)] + spans


def short_blocks():
    return [block for page in PAGES for first, block in FENCED.findall(text_of(page)) if first.split()[-1:] == ["short"]]


def definition(name, file):
    """The line, from 1, on which a file defines a name: a function, a class, a constant, or Class.attribute."""
    lines, start = (ROOT / file).read_text("utf-8").splitlines(), 0
    for part in name.split("."):
        found = [i for i in range(start, len(lines)) if re.match(rf"\s*((def|class) {part}\b|{part}\s*[:=])", lines[i])]
        assert found, f"{file} does not define {name}"
        start = found[0]
    return start + 1


def linked(text):
    return CODE_LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{definition(m[1], m[2].removeprefix('../'))})", text)


def table_numbers(page):
    """The digits of each row of each table, outside fenced blocks."""
    rows = [line for line in FENCED.sub("", text_of(page)).splitlines() if line.startswith("|")]
    return [re.findall(r"\d+(?:\.\d+)?", row) for row in rows]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_code_point_to_the_line_that_defines_their_name(page):
    assert linked(text_of(page)) == text_of(page), "run: python tests/test_readme.py"


def test_there_are_links_to_code_for_each_step_of_the_method():
    names = {name for page in PAGES for name, _, _ in CODE_LINK.findall(text_of(page))}
    assert {"split", "generate_segments", "splice", "sapo_step", "dpo_loss", "orpo_loss", "log_odds", "ema_update"} <= names


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_pictures_it_names_are_there(page):
    folder = (ROOT / page).parent
    for target in LINK.findall(text_of(page)):
        if not target.startswith(("http", "#", "mailto:")):
            assert (folder / target.split("#")[0]).exists(), target
    for name in re.findall(r"(?:python|pytest) (?:-\w+ )*\"?([\w/]+\.py)", "\n".join(all_commands(page))):
        if not name.startswith("gen_") and name != "show_result.py":     # FastChat's own
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_it_exists(page):
    for command in all_commands(page):
        words = shlex.split(command)
        script = next((w for w in words if w.endswith(".py")), "")
        flags = {w.split("=")[0] for w in words[words.index(script):] if w.startswith("--")} if script else set()
        if script == "train.py":
            assert flags <= FLAGS, (command, flags - FLAGS)
        elif script.startswith("tools/"):
            source = (ROOT / script).read_text("utf-8")
            for flag in flags - {"--help"}:
                field = rf"^    {flag[2:].replace('-', '_')}: "          # a flag made from a dataclass field
                assert f'"{flag}"' in source or re.search(field, source, re.M), command


def test_enough_commands_are_checked():
    found = [command for page in PAGES for command in all_commands(page)]
    assert sum("train.py" in command for command in found) > 20 and sum("tools/" in command for command in found) > 10


def test_every_test_it_names_exists():
    named = {found for page in PAGES for found in re.findall(r"(tests/test_\w+\.py)::(\w+)", text_of(page))}
    assert len(named) >= 6 and all(f"def {test}(" in (ROOT / file).read_text("utf-8") for file, test in named)


@pytest.mark.parametrize("title, name", [("Results", "study"), ("Results on a real checkpoint", "constraints"),
                                         ("Results on worked arithmetic", "arithmetic"), ("Results of the second look", "again")])
def test_the_studys_tables_are_those_it_wrote(title, name):
    section = re.search(rf"^## {title}\n.*?(?=^## )", text_of("docs/study.md"), re.M | re.S)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    written = text_of(f"docs/figures/{name}.md").splitlines()
    assert len(rows) >= 12 and set(rows) <= set(written), set(rows) - set(written)


def test_the_studys_summary_is_made_of_its_tables():
    _, *rows = re.findall(r"^\| .*(?= \|$)", text_of("docs/study.md").partition("## In short")[2].partition("## Rules")[0], re.M)
    assert len(rows) == 8
    for column, name in enumerate(("study", "constraints", "arithmetic"), 1):
        written = [line.split(" | ") for line in text_of(f"docs/figures/{name}.md").splitlines() if line.startswith("| ")]
        values = {}
        for cells in [cells for cells in written if len(cells) > 2]:         # of a table's rows: greedy; of a claim's: its difference
            values.setdefault(cells[0][2:], cells[2])
            values.setdefault(cells[1], cells[2])
        for row in rows:
            cells = row[2:].split(" | ")
            key = {"base, after SFT": "base", "SFT for as long": "SFT"}.get(cells[0], cells[0])
            assert cells[column] == values.get(key, "-"), (cells[0], name)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_is_short(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= 240 and max(map(len, lines)) <= 120


def test_the_chinese_readme_has_the_same_commands_figures_and_links():
    ours, theirs = "README.md", "README.zh.md"
    assert all_commands(theirs) == all_commands(ours)
    assert table_numbers(theirs) == table_numbers(ours)
    here = [target for target in LINK.findall(text_of(ours)) if target != theirs]
    assert [target for target in LINK.findall(text_of(theirs)) if target != ours] == here


@pytest.mark.slow
def test_the_commands_marked_short_run(tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*mutants.NOT_COPIED))
    run = [command for block in short_blocks() for command in commands(block)]
    assert len(run) >= 8, run
    for command in run:
        command_here = re.sub(r"\bpython ", f"{shlex.quote(sys.executable)} ", command, count=1)
        done = subprocess.run(command_here, shell=True, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, encoding="utf-8", errors="replace")
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(linked(text_of(page)), "utf-8")
