"""Each chapter changes little of the one before, and its README says what: the table under "## What changed".

    | file | symbol | why |
    |---|---|---|
    | `model.py` | `RMSNorm`, `CONFIGS` | ... |      top-level names that changed, came or went, in one row or several
    | `generate.py` | docstring | ... |             also: imports, main block, comments (those that stand alone)
    | `tokenizer.py` | new file | ... |             the chapter before has none
    | `ngram.py`, `gru.py` | left behind | ... |    the chapter before has them, this one does not

Every symbol that differs, be it in a comment, must be listed, and nothing that does not. The other words are needed
only where no symbol of a file differs, but they must be true. A file that is not listed is byte-identical.
"""
import ast
import itertools
import re

import pytest

from chapters import CHAPTERS, CHAPTERS_ROOT

PAIRS = [pair for pair in itertools.pairwise(CHAPTERS) if (CHAPTERS_ROOT / pair[1] / "README.md").is_file()]


def names(node):
    """What a top-level statement is called in the table. Symbols stand between backticks, as they do there."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return ["imports"]
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return ["main block"]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [f"`{node.name}`"]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [f"`{ast.unparse(name)}`" for target in targets for name in getattr(target, "elts", [target])]
    return [f"`{ast.unparse(node).splitlines()[0]}`"]   # a bare statement, as it is written


def parts(text):
    """{name in the table: lines} of everything in a file, with the comments directly above and inside."""
    tree, lines, end = ast.parse(text), text.split("\n"), 0
    found = {"comments": []}
    for node in tree.body:
        start = min(item.lineno for item in [node, *getattr(node, "decorator_list", [])]) - 1
        while start > end and lines[start - 1].startswith("#"):
            start -= 1
        found["comments"] += [line for line in lines[end:start] if line.strip()]
        end = node.end_lineno
        while lines[end:] and lines[end].startswith(" "):   # a comment that ends a body is no part of its tree
            end += 1
        is_docstring = node is tree.body[0] and ast.get_docstring(tree) is not None
        for name in ["docstring"] if is_docstring else names(node):
            found[name] = found.get(name, []) + lines[start:end]
    found["comments"] += [line for line in lines[end:] if line.strip()]
    return found


def differences(old, new):
    """The names of all that differs between the bytes of two versions of a file, None where there is no such file."""
    if old == new:
        return set()
    if old is None or new is None:
        return {"new file" if old is None else "left behind"}
    old, new = parts(old.decode()), parts(new.decode())
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def listed(readme):
    """{file: set of names} of the table in a README's section "What changed"."""
    section = re.search(r"^## What changed\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    head = re.compile(r"^\| file \| symbol \| why \|\n\|[-:| ]+\|\n", re.MULTILINE)
    if not section or not head.search(section[1]):
        raise ValueError('no table "| file | symbol | why |" in a section "## What changed"')
    found = {}
    for row in itertools.takewhile(lambda line: line.startswith("|"), head.split(section[1])[1].splitlines()):
        cells = row.strip("| ").split("|", 2)
        files = re.findall(r"`([^`]+)`", cells[0])
        if not files or len(cells) < 3:
            raise ValueError(f"a row needs files in backticks, what changed, and why: {row}")
        for file in files:
            found.setdefault(file, set()).update(re.findall(r"`[^`]+`|[^`,\s][^`,]*[^`,\s]", cells[1]))
    return found


def problems(before, after):
    """What the table of the folder `after` hides or makes up about its difference from `before`, a line each."""
    old, new = ({path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in (before, after))
    try:
        table = listed((after / "README.md").read_text())
    except ValueError as error:
        return [f"{after.name}/README.md: {error}"]
    found = []
    for file in sorted(old.keys() | new.keys() | table.keys()):
        differ, claimed = differences(old.get(file), new.get(file)), table.get(file, set())
        required = {name for name in differ if name.startswith("`")}
        if old.get(file) != new.get(file) and not required and not claimed & differ:
            required = differ or {"nothing but order or blank lines, so make it identical"}
        for what, which in (("not listed", required - claimed), ("listed, but not so", claimed - differ)):
            found += [f"{after.name}/{file}: {what}: {', '.join(sorted(which))}"] if which else []
    return found


@pytest.mark.parametrize("before, after", PAIRS)
def test_the_table_tells_what_changed(before, after):
    found = problems(CHAPTERS_ROOT / before, CHAPTERS_ROOT / after)
    assert not found, "\n" + "\n".join(found)


# ---------------------------------------------------------------------------------------- the rules, on tiny chapters

HEAD = "| file | symbol | why |\n|---|---|---|\n"
OLD = ("'''Old.'''\nimport os\n\nA, B = 1, 2\n\n# How.\n@cache\ndef f(x):\n    return x   # as it is\n\n"
       "if __name__ == '__main__':\n    f(1)\n")


def check(folder, old, new, table):
    """The problems of chapter two after chapter one, made of these {file: text}."""
    readme = {"README.md": f"# Two\n\n## What changed\n\nLittle.\n\n{table}\n\n## Proof\n\n| a | b |\n"}
    for name, files in (("one", old), ("two", new | readme)):
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    return problems(folder / "one", folder / "two")


@pytest.mark.parametrize("change, cell, expected", [   # what is replaced in OLD, what the table says, what is wrong
    ("Old -> Old", None, []),
    ("Old -> Old", "`f`", ["listed, but not so: `f`"]),
    ("return x -> return -x", "`f`", []),
    ("return x -> return -x", None, ["not listed: `f`"]),
    ("return x -> return -x", "docstring, `A`", ["not listed: `f`", "listed, but not so: `A`, docstring"]),
    ("as it is -> as it was", "`f`, new file", ["listed, but not so: new file"]),
    ("as it is -> as it is\n    # done", None, ["not listed: `f`"]),
    ("How -> Why", None, ["not listed: `f`"]),
    ("@cache\n -> ", None, ["not listed: `f`"]),
    ("f(x) -> g(x)", None, ["not listed: `f`, `g`"]),
    ("1, 2 -> 1, 3", "`B`", ["not listed: `A`"]),
    ("1, 2 -> 1, 2\nC: int = 3", None, ["not listed: `C`"]),
    ("1, 2 -> 1, 2\nprint(A)", None, ["not listed: `print(A)`"]),
    ("Old -> New", "docstring", []),
    ("Old -> New", None, ["not listed: docstring"]),
    ("Old -> New", "imports", ["not listed: docstring", "listed, but not so: imports"]),
    ("import os -> import sys", None, ["not listed: imports"]),
    ("os\n\nA, B -> sys\n\nA, C", "`B`, `A`, `C`", []),
    ("f(1) -> f(2)", None, ["not listed: main block"]),
    ("os\n -> os\n\n# Alone.\n", None, ["not listed: comments"]),
    ("os\n -> os\n\n", None, ["not listed: nothing but order or blank lines, so make it identical"]),
])
def test_changes_within_a_file(tmp_path, change, cell, expected):
    table = HEAD + (f"| `m.py` | {cell} | why |" if cell else "")
    found = check(tmp_path, {"m.py": OLD}, {"m.py": OLD.replace(*change.split(" -> "))}, table)
    assert found == [f"two/m.py: {line}" for line in expected]


@pytest.mark.parametrize("old, new, cell, expected", [   # the files of the two chapters
    ({}, {"m.py": OLD}, "new file", []),
    ({}, {"m.py": OLD}, "`f`", ["not listed: new file", "listed, but not so: `f`"]),
    ({"m.py": OLD}, {}, "left behind", []),
    ({"m.py": OLD}, {}, "new file", ["not listed: left behind", "listed, but not so: new file"]),
    ({}, {}, "left behind", ["listed, but not so: left behind"]),
])
def test_files_that_come_and_go(tmp_path, old, new, cell, expected):
    found = check(tmp_path, old, new, f"{HEAD}| `m.py` | {cell} | why |")
    assert found == [f"two/m.py: {line}" for line in expected]


def test_several_rows_of_a_file_and_several_files_of_a_row(tmp_path):
    new = OLD.replace("return x", "return -x").replace("Old", "New") + "C = 3\n"
    rows = "| `m.py` | `f`, docstring | a, `b` \\| c |\n| `m.py`, `n.py` | `C` | d |\n| `k.py`,`l.py` |left behind| e |"
    old = dict.fromkeys(["k.py", "l.py", "m.py", "n.py"], OLD)
    assert check(tmp_path, old, {"m.py": new, "n.py": OLD + "C = 3\n"}, HEAD + rows) == []


@pytest.mark.parametrize("table", ["", f"## Other\n\n{HEAD}", f"{HEAD}| m.py | `f` | why |", f"{HEAD}| `m.py` | `f` |"])
def test_a_table_that_cannot_be_read_is_a_problem(tmp_path, table):
    found, = check(tmp_path, {"m.py": OLD}, {"m.py": OLD}, table)
    assert found.startswith("two/README.md: ")
