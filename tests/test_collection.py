"""README.md lists every test file, and what is said about tests by name is about tests that are there."""
import ast
import re

from chapters import ROOT
from conftest import SLOW

FILES = {path.stem: path for path in (ROOT / "tests").glob("test_*.py")}


def test_the_table_lists_every_test_file():
    cells = [line.split("|")[1] for line in (ROOT / "tests" / "README.md").read_text().splitlines()
             if line.startswith("| `test_")]
    assert sorted(re.findall(r"`(\w+)\.py`", " ".join(cells))) == sorted(FILES)


def test_what_is_slow_is_there():
    functions = [node.name for path in FILES.values() for node in ast.walk(ast.parse(path.read_bytes()))
                 if isinstance(node, ast.FunctionDef)]
    assert SLOW <= {*FILES, *functions}


def test_patches_and_scripts_named_in_the_readme_are_there():
    text = (ROOT / "tests" / "README.md").read_text()
    for name in re.findall(r"(?:tests/)?planted_bugs/\w+\.patch", text) + re.findall(r"\btests/\w+\.py", text):
        assert (ROOT / "tests" / name.removeprefix("tests/")).exists(), name
