"""The house: which rooms there are, how large each may grow, what may be written in them, and which way imports go.

    python tests/test_house.py [FOLDER]      lines, widest line, longest function and named lambdas of each file
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {       # file: (floor, lines at most, columns at most); imports go to lower floors, or to earlier files of one's own
    "losses.py": (1, 246, 100), "model.py": (1, 482, 100), "buffer.py": (2, 230, 100), "sapo.py": (3, 500, 100),
    "machine/files.py": (4, 123, 110), "machine/process.py": (4, 112, 110), "machine/config.py": (4, 168, 110),
    "machine/folders.py": (4, 227, 110), "machine/parallel.py": (4, 145, 110), "machine/flags.py": (4, 292, 110),
    "machine/rows.py": (4, 229, 110), "machine/template.py": (4, 60, 110), "machine/text.py": (4, 491, 110),
    "machine/dataset.py": (4, 132, 110), "machine/curves.py": (5, 103, 110), "machine/report.py": (5, 340, 110),
    "machine/checkpoint.py": (6, 269, 110), "machine/inputs.py": (6, 93, 110), "train.py": (7, 497, 110)}
ALTOGETHER = 4734
METHOD = ("losses.py", "model.py", "buffer.py", "sapo.py")
NOT_FOR_THE_METHOD = {"machine", "train", "argparse", "tokenizers", "jinja2", "tqdm", "os", "shutil", "huggingface_hub",
                      "safetensors", "matplotlib", "json", "pathlib"}
ORDER = list(ROOMS)


def read(file, root=ROOT):
    return (root / file).read_text("utf-8")


def walk(file, root=ROOT):
    return ast.walk(ast.parse(read(file, root)))


def imports(file):
    """The modules of this project that a file imports, as file names, and all module names."""
    names = []
    for node in walk(file):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.replace(".", "/") + ".py" for name in names} & set(ROOMS), names


def functions(file, root=ROOT):
    return [(node.end_lineno - node.lineno + 1, node.name) for node in walk(file, root)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def named_lambdas(file, root=ROOT):
    return [node.lineno for node in walk(file, root)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda)]


def names_in(target):
    return [node for node in ast.walk(target) if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))
            and isinstance(node.ctx, ast.Store) and getattr(node, "id", "") != "_"]


def crowded_assignments(file):
    return [node.lineno for node in walk(file) if isinstance(node, ast.Assign) and sum(len(names_in(t)) for t in node.targets) > 2]


def loose_walrus(file):
    """Lines of := that does not stand in the condition of a while."""
    tree = ast.parse(read(file))
    allowed = {(inner.lineno, inner.col_offset) for node in ast.walk(tree) if isinstance(node, ast.While)
               for inner in ast.walk(node.test) if hasattr(inner, "lineno")}
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.NamedExpr) and (node.lineno, node.col_offset) not in allowed]


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nested_comprehensions(file):
    """Lines of a list comprehension within another's condition or element."""
    found = []
    for node in walk(file):
        if isinstance(node, ast.ListComp):
            parts = [node.elt] + [condition for generator in node.generators for condition in generator.ifs]
            found += [node.lineno for part in parts for inner in ast.walk(part) if isinstance(inner, ast.ListComp)]
    return found


@pytest.mark.parametrize("file", ROOMS)
def test_a_room_stays_within_its_bounds(file):
    floor, lines, columns = ROOMS[file]
    text = read(file).splitlines()
    assert len(text) <= lines, f"{file} has {len(text)} lines: simplify a mechanism"
    wide = [i for i, line in enumerate(text, 1) if len(line) > columns]
    assert not wide, f"{file}: wider than {columns} columns: lines {wide}"
    assert max(functions(file))[0] <= 60, max(functions(file))


def test_the_house_is_small_altogether():
    assert sum(len(read(file).splitlines()) for file in ROOMS) <= ALTOGETHER


@pytest.mark.parametrize("file", ROOMS)
def test_statements_are_plain(file):
    assert not named_lambdas(file), "give it a def"
    assert not crowded_assignments(file), "at most two names in one assignment"
    assert not loose_walrus(file), "a walrus stands in a while only"
    assert not nested_comprehensions(file), "a loop says it plainly"


@pytest.mark.parametrize("file", ROOMS)
def test_imports_go_down(file):
    ours, _ = imports(file)
    assert all(ORDER.index(other) < ORDER.index(file) for other in ours), (file, ours)
    assert all(ROOMS[other][0] <= ROOMS[file][0] for other in ours)


@pytest.mark.parametrize("file", METHOD)
def test_the_method_reaches_nothing_of_the_machine(file):
    _, names = imports(file)
    reached = {name.split(".")[0] for name in names}
    assert not reached & NOT_FOR_THE_METHOD, reached & NOT_FOR_THE_METHOD
    assert not [name for name in names if name.startswith("torch.distributed")]


OWN = [p for folder in (".", "machine", "tools", "tests", "docs") for p in (ROOT / folder).glob("*.py")]    # a virtual
# environment or a run may lie in any other folder


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT)) for p in OWN))
def test_no_definition_takes_the_name_of_an_import(file):
    tree = ast.parse(read(file))
    made = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    taken = {(alias.asname or alias.name).split(".")[0] for node in tree.body
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not made & taken


def test_no_room_is_forgotten():
    here = {p.name for p in ROOT.glob("*.py")} | {f"machine/{p.name}" for p in (ROOT / "machine").glob("*.py")}
    assert here - {"machine/__init__.py"} == set(ROOMS)


def test_tools_and_tests_are_not_imported_from_below():
    for file in ROOMS:
        assert not {name.split(".")[0] for name in imports(file)[1]} & {p.stem for p in (ROOT / "tools").glob("*.py")}


def table(root):
    files = [file for file in [*ROOMS, *sorted({p.name for p in root.glob("*.py")} - set(ROOMS))] if (root / file).is_file()]
    rows = []
    for file in files:
        text = read(file, root).splitlines()
        longest = max(functions(file, root), default=(0, ""))
        rows.append((file, len(text), max(map(len, text)), *longest, len(named_lambdas(file, root))))
    print(f"{'file':24}{'lines':>6}{'widest':>8}{'longest function':>34}{'named lambdas':>15}")
    for file, lines, widest, length, name, lambdas in rows:
        print(f"{file:24}{lines:6}{widest:8}{f'{name} {length}':>34}{lambdas:15}")
    print(f"{'altogether':24}{sum(row[1] for row in rows):6}{max(row[2] for row in rows):8}{'':34}{sum(row[5] for row in rows):15}")


if __name__ == "__main__":
    table(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
