"""Writes docs/workshop.ipynb from docs/workshop_cells.py, where a cell begins with `# %%` or `# %% [markdown]`.

    python tools/make_notebook.py                    write it, without outputs: they are each reader's own
    python tools/make_notebook.py --run FILE.ipynb   run it from top to bottom, with outputs, into FILE; prints each cell's seconds

In text, {{hints 3}} becomes the hints of station 3 (tools/mutants.py), folded. `# %matplotlib inline` is run by the
notebook and no Python. --run needs nbclient, nbformat and ipykernel (tests/requirements.txt).
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import mutants

ROOT = Path(__file__).resolve().parent.parent
CELLS, NOTEBOOK = ROOT / "docs/workshop_cells.py", ROOT / "docs/workshop.ipynb"


def hints(match):
    """The three hints of a station, folded one by one."""
    station = match[1]
    mutant = mutants.of_station(station)
    said = [mutants.hint(mutant, station, level, ROOT) for level in (1, 2, 3)]
    return "\n\n".join(f"<details><summary>Hint {i}</summary>\n\n{hint}\n\n</details>" for i, hint in enumerate(said, 1))


def cells(source):
    """[(kind, text)] of a percent file."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            plain = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            found.append(("markdown", re.sub(r"\{\{hints (\w+)\}\}", hints, plain)))
        else:
            found.append(("code", re.sub(r"^# (%\w+)", r"\1", body, flags=re.M)))
    return found


def notebook(source):
    """The notebook as a dictionary (nbformat 4.5)."""
    made = []
    for i, (kind, text) in enumerate(cells(source)):
        cell = {"cell_type": kind, "id": f"cell-{i:02d}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def execute(content, folder, say=print):
    """Run a notebook in a folder, as Jupyter would: the nbformat node with its outputs. Raises at the first cell that fails."""
    import nbclient
    import nbformat
    node, started = nbformat.reads(json.dumps(content), as_version=4), {}
    nbformat.validate(node)

    def begin(cell, cell_index, **_):
        started[cell_index] = time.perf_counter()

    def end(cell, cell_index, **_):
        if cell.cell_type == "code":
            say(f"{cell_index:3}  {time.perf_counter() - started[cell_index]:6.1f} s  {next(iter(cell.source.splitlines()), '')[:80]}")

    client = nbclient.NotebookClient(node, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                                     on_cell_start=begin, on_cell_executed=end)
    client.execute()
    return node


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", type=Path, metavar="FILE", help="run it, and write it with its outputs there")
    args = parser.parse_args(argv)
    content = notebook(CELLS.read_text("utf-8"))
    if not args.run:
        NOTEBOOK.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
        return 0
    began = time.perf_counter()
    node = execute(content, ROOT)
    args.run.write_text(json.dumps(node, ensure_ascii=False, indent=1), "utf-8")
    print(f"{time.perf_counter() - began:.0f} s altogether, {args.run.stat().st_size / 1024:.0f} KB with outputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
