"""The README against the code: its flags exist, its links point to the line they name, its short commands run.

    python tests/test_readme.py         bring the line numbers of the links up to date

A fenced block whose first line ends in `short` is run as it stands, by `pytest --slow`, in a copy of the project. The others
take longer, or need a model, a network or a GPU; they are run by hand, and what they print is pasted.
"""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import mutants
from conftest import ROOT
from machine.flags import Config, flag_of

FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)")


def readme():
    return (ROOT / "README.md").read_text("utf-8")


def commands(block):
    """The lines of a block that are commands, without comments, continued lines joined."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines if re.match(r"(\w+=\S+ )*(python3?|torchrun|pytest|pip) ", line)]


def all_commands():
    text = readme()
    spans = [span for span in re.findall(r"`([^`\n]+)`", FENCED.sub("", text)) if span.startswith(("python ", "torchrun ", "pytest "))]
    return [command for _, block in FENCED.findall(text) for command in commands(block)] + spans


def short_blocks():
    return [block for first, block in FENCED.findall(readme()) if first.split()[-1:] == ["short"]]


def definition(name, file):
    """The line, from 1, on which a file defines a name: a function, a class, a constant, or Class.attribute."""
    lines, start = (ROOT / file).read_text("utf-8").splitlines(), 0
    for part in name.split("."):
        found = [i for i in range(start, len(lines)) if re.match(rf"\s*((def|class) {part}\b|{part}\s*[:=])", lines[i])]
        assert found, f"{file} does not define {name}"
        start = found[0]
    return start + 1


def linked(text):
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{definition(m[1], m[2])})", text)


def test_links_point_to_the_line_that_defines_their_name():
    assert len(LINK.findall(readme())) >= 15
    assert linked(readme()) == readme(), "run: python tests/test_readme.py"


def test_the_files_and_pictures_it_names_are_there():
    for name in re.findall(r"\]\(([\w/]+\.\w+)\)", readme()) + re.findall(r"(?:python|pytest) (?:-\w+ )*\"?([\w/]+\.py)", "\n".join(all_commands())):
        if not name.startswith("gen_") and name != "show_result.py":     # FastChat's own
            assert (ROOT / name).is_file(), name


def test_every_flag_in_it_exists():
    ours = {flag_of(f.name) for f in dataclasses.fields(Config)}
    ours |= {"--preset", "--config", "--resume", "--help"} | {f"--no-{f.name.replace('_', '-')}" for f in dataclasses.fields(Config) if f.type is bool}
    checked = 0
    for command in all_commands():
        words = shlex.split(command)
        script = next((w for w in words if w.endswith(".py")), "")
        if script == "train.py":
            flags = {w.split("=")[0] for w in words[words.index(script):] if w.startswith("--")}
            assert flags <= ours, (command, flags - ours)
        elif script.startswith("tests/") and "pytest" not in command:
            source, flags = (ROOT / script).read_text("utf-8"), {w for w in words if w.startswith("--")} - {"--help"}
            assert all(f'"{flag}"' in source or re.search(rf"^    {flag[2:].replace('-', '_')}: ", source, re.M) for flag in flags), command
        else:
            continue
        checked += 1
    assert checked > 30


def test_every_test_it_names_exists():
    named = set(re.findall(r"(tests/test_\w+\.py)::(\w+)", readme()))
    assert len(named) >= 6 and all(f"def {test}(" in (ROOT / file).read_text("utf-8") for file, test in named)


def test_the_studys_tables_are_those_it_wrote():
    section = re.search(r"^## The study.*?(?=^## )", readme(), re.M | re.S)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    written = (ROOT / "docs/figures/study.md").read_text("utf-8").splitlines()
    assert len(rows) > 25 and set(rows) <= set(written)


@pytest.mark.slow
def test_the_commands_marked_short_run(tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*mutants.NOT_COPIED))
    run = [command for block in short_blocks() for command in commands(block)]
    assert len(run) >= 8, run
    for command in run:
        done = subprocess.run(re.sub(r"\bpython ", f"{shlex.quote(sys.executable)} ", command, count=1), shell=True, cwd=copy,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
        red = "pytest" in command and "test_sapo.py::test_cuts" in command       # of the planted bug
        assert done.returncode == (1 if red else 0), f"{command}\n{done.stdout[-3000:]}"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(linked(readme()), "utf-8")
