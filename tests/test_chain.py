"""Each chapter changes little of the one before, and its README says what: the table under "## What changed".

    | file | symbol | why |
    |---|---|---|
    | `model.py` | `RMSNorm`, `CONFIGS` | ... |    top-level names that changed, came or went, in one row or several
    | `generate.py` | docstring | ... |            also: imports, main block, comments (those that stand alone)
    | `tokenizer.py` | new file | ... |            the chapter before has none; `parallel/mesh.py` is a file of a
                                                   package folder
    | `ngram.py`, `gru.py` | left behind | ... |   the chapter before has them, this one does not
    | `idle.py` | from chapter 3 | ... |           the chapter before left it behind; beside these words what differs
                                                   from chapter 3's

Every symbol that differs, be it in a comment, must be listed, and nothing that does not. The other words are needed
only where no symbol of a file differs, but they must be true. A file that is not listed is byte-identical.

The chain must stay light too: the budgets are in budgets.py, which prints how much of them is used.
"""
import ast
import io
import itertools
import re
import tokenize

import pytest

import budgets
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


def rows(readme):
    """(files, names) of each row of the table in a README's section "What changed"."""
    section = re.search(r"^## What changed\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    head = re.compile(r"^\| file \| symbol \| why \|\n\|[-:| ]+\|\n", re.MULTILINE)
    if not section or not head.search(section[1]):
        raise ValueError('no table "| file | symbol | why |" in a section "## What changed"')
    found = []
    for row in itertools.takewhile(lambda line: line.startswith("|"), head.split(section[1])[1].splitlines()):
        cells = row.strip("| ").split("|", 2)
        paths = re.findall(r"`([^`]+)`", cells[0])
        if not paths or len(cells) < 3:
            raise ValueError(f"a row needs files in backticks, what changed, and why: {row}")
        found.append((paths, re.findall(r"`[^`]+`|[^`,\s][^`,]*[^`,\s]", cells[1])))
        if len(found[-1][1]) > budgets.SYMBOLS:
            raise ValueError(f"a row names {len(found[-1][1])} things, at most {budgets.SYMBOLS} can be told as"
                             f" one: {row}")
    return found


def files(folder):
    """{path in the chapter: bytes} of its programs. An empty file, as __init__.py is, says nothing."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for pattern in ("*.py", "*/*.py") for path in folder.glob(pattern) if path.stat().st_size}


def problems(*folders):
    """What the table of the last of these chapters hides or makes up about its difference from those before, a line
    each.
    """
    *earlier, old, new = map(files, folders)
    table = {}
    try:
        for paths, names in rows((folders[-1] / "README.md").read_text()):
            for path in paths:
                table.setdefault(path, set()).update(names)
    except ValueError as error:
        return [f"{folders[-1].name}/README.md: {error}"]
    found = []
    for file in sorted(old.keys() | new.keys() | table.keys()):
        came_from = [number for number, chapter in enumerate(earlier, start=1) if file in chapter
                     and file in new.keys() - old.keys()]
        before = earlier[came_from[-1] - 1][file] if came_from else old.get(file)
        differ, claimed = differences(before, new.get(file)), table.get(file, set())
        required = {name for name in differ if name.startswith("`")}
        if before != new.get(file) and not required and not claimed & differ:
            required = differ or {"nothing but order or blank lines, so make it identical"}
        if came_from:
            differ, required = ({*names, f"from chapter {came_from[-1]}"} for names in (differ, required))
        for what, which in (("not listed", required - claimed), ("listed, but not so", claimed - differ)):
            found += [f"{folders[-1].name}/{file}: {what}: {', '.join(sorted(which))}"] if which else []
    return found


@pytest.mark.parametrize("before, after", PAIRS)
def test_the_table_tells_what_changed(before, after):
    found = problems(*[CHAPTERS_ROOT / name for name in CHAPTERS[:CHAPTERS.index(after) + 1]])
    assert not found, "\n" + "\n".join(found)


# ------------------------------------------------------------------------------------------- files named in the prose

def missing(folder):
    """(file, name) of each program that comments or docstrings of a chapter name and that is not there. One that
    another chapter has is written "chapter 4's memory.py".
    """
    found = []
    for file, text in files(folder).items():
        prose = [token.string for token in tokenize.tokenize(io.BytesIO(text).readline)
                 if token.type == tokenize.COMMENT or token.string.startswith('"""')]
        prose = re.sub(r"[\s#]+", " ", " ".join(prose))   # without the lines' ends
        for number, name in re.findall(r"(?:[Cc]hapter (\d)'s )?(\w[\w./-]*\.py)\b", prose):
            where = next(folder.parent.glob(f"chapter-0{number}-*")) if number else folder
            if not [*where.glob(name), *where.glob(f"*/{name}"), *folder.parent.glob(name)]:
                found.append((file, name))
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_files_that_comments_and_docstrings_name_are_there(chapter):
    assert missing(CHAPTERS_ROOT / chapter) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_command_of_a_copied_file_names_its_own_chapter(chapter):
    for file, text in files(CHAPTERS_ROOT / chapter).items():
        assert set(re.findall(rf"(chapter-\d\d-[\w-]+)/{file}\b", text.decode())) <= {chapter}, file


# ------------------------------------------------------------------------------------------------------- the budgets

@pytest.mark.parametrize("before, after", PAIRS)
def test_a_step_changes_few_lines(before, after):
    step, counts = f"{CHAPTERS.index(before) + 1} -> {CHAPTERS.index(after) + 1}", budgets.steps(CHAPTERS_ROOT)
    for file in budgets.BUDGETS:
        changed, most = counts[file, step], budgets.budget(file, step)
        assert most is None or changed <= most, f"{file} {step}: {changed} changed lines, budget {most}"


def test_no_function_is_over_80_lines():
    assert [found for found in budgets.functions(CHAPTERS_ROOT) if found[0] > budgets.FUNCTION] == []


def test_no_line_is_over_120_columns():
    assert budgets.long_lines(CHAPTERS_ROOT) == []


# ---------------------------------------------------------------------------------------- the rules, on tiny chapters

HEAD = "| file | symbol | why |\n|---|---|---|\n"
OLD = ("'''Old.'''\nimport os\n\nA, B = 1, 2\n\n# How.\n@cache\ndef f(x):\n    return x   # as it is\n\n"
       "if __name__ == '__main__':\n    f(1)\n")


def check(folder, old, new, table, *earlier):
    """The problems of chapter two after chapter one, made of these {file: text}, and of those before."""
    readme = {"README.md": f"# Two\n\n## What changed\n\nLittle.\n\n{table}\n\n## Proof\n\n| a | b |\n"}
    chapters = {**{f"before-{number}": texts for number, texts in enumerate(earlier)}, "one": old, "two": new | readme}
    for name, texts in chapters.items():
        for file, text in texts.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text)
    return problems(*[folder / name for name in chapters])


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


@pytest.mark.parametrize("table, expected", [
    ("| `parallel/m.py` | `f` | why |", []),
    ("| `m.py` | `f` | why |", ["m.py: listed, but not so: `f`", "parallel/m.py: not listed: `f`"])])
def test_files_of_a_package_folder(tmp_path, table, expected):
    old, new = ({"parallel/__init__.py": "", "parallel/m.py": OLD.replace("return x", f"return {result}")}
                for result in ("x", "-x"))
    assert check(tmp_path, old, new, HEAD + table) == [f"two/{line}" for line in expected]


# m.py, which chapters 1 and 2 have, chapter 3 has not, and chapter 4 has again.
@pytest.mark.parametrize("new, cell, expected", [
    ("x", "from chapter 2", []),
    ("x", "new file", ["not listed: from chapter 2", "listed, but not so: new file"]),
    ("x", "from chapter 2, `f`", ["listed, but not so: `f`"]),
    ("-x", "from chapter 2", ["not listed: `f`"]),
    ("-x", "from chapter 2, `f`", []),
])
def test_a_file_that_comes_back_came_back_unchanged_or_says_how(tmp_path, new, cell, expected):
    first, second, fourth = (OLD.replace("return x", f"return {result}") for result in ("x + 1", "x", new))
    found = check(tmp_path, {}, {"m.py": fourth}, f"{HEAD}| `m.py` | {cell} | why |", {"m.py": first}, {"m.py": second})
    assert found == [f"two/m.py: {line}" for line in expected]


def test_a_row_names_no_more_than_can_be_told_as_one(tmp_path):
    names = [f"x{number}" for number in range(budgets.SYMBOLS + 1)]
    old, new = ("".join(f"{name} = {value}\n" for name in names) for value in (1, 2))
    all_in_one = f"| `m.py` | {', '.join(f'`{name}`' for name in names)} | why |"
    two_rows = "".join(f"| `m.py` | {', '.join(f'`{name}`' for name in part)} | why |\n"
                       for part in (names[:6], names[6:]))
    assert check(tmp_path / "two rows", {"m.py": old}, {"m.py": new}, HEAD + two_rows) == []
    found, = check(tmp_path / "one row", {"m.py": old}, {"m.py": new}, HEAD + all_in_one)
    assert found.startswith("two/README.md: a row names 13 things")


@pytest.mark.parametrize("text, expected", [
    ("# See a.py.\n", []),
    ("# See old.py.\n", ["old.py"]),
    ("x = 1   # chapter\n        # 1's old.py\n", []),
    ("# See chapter 1's a.py.\n", ["a.py"]),
    ('"""Chapter 1\'s\nold.py, b.py, parallel/b.py, parallel/a.py."""\n', ["parallel/a.py"]),
    ('"""Say: python chapter-01-one/old.py, not chapter-01-one/a.py."""\n', ["chapter-01-one/a.py"]),
    ("name = 'old.py'\n", []),
])
def test_names_of_files_in_comments_and_docstrings(tmp_path, text, expected):
    for path in ("chapter-01-one/old.py", "chapter-02-two/a.py", "chapter-02-two/parallel/b.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text if path.endswith("a.py") else "")
    assert [name for _, name in missing(tmp_path / "chapter-02-two")] == expected


@pytest.mark.parametrize("table", ["", f"## Other\n\n{HEAD}", f"{HEAD}| m.py | `f` | why |", f"{HEAD}| `m.py` | `f` |"])
def test_a_table_that_cannot_be_read_is_a_problem(tmp_path, table):
    found, = check(tmp_path, {"m.py": OLD}, {"m.py": OLD}, table)
    assert found.startswith("two/README.md: ")
