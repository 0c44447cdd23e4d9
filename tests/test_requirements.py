"""requirements.txt holds what the chapters import, tests/requirements.txt what the tests and some measurements need
besides.
"""
import ast
import re
import sys
from importlib import metadata

import pytest

import warm
from chapters import CHAPTERS_ROOT, expect_error

# Packages that only a comparison needs: a script that imports one says how to get it, or does without.
COMPARED = {"transformers": "benchmark_*.py", "gguf": "benchmark_decode.py", "llama_cpp": "benchmark_decode.py"}
BENCHMARKS = [path for path in sorted(CHAPTERS_ROOT.glob("chapter-*/benchmark_*.py"))
              if "from transformers" in path.read_text()]


def listed(path):
    """Distributions that a requirements file names, with those of the files that it includes."""
    found = set()
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= listed(path.parent / line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            name, version = line.split("==")   # all are pinned
            assert re.fullmatch(r"[\d.]+", version), line
            found.add(name.lower())
    return found


def with_dependencies(names):
    """And those on which these stand themselves: tiktoken brings regex, datasets brings pyarrow."""
    needed = {re.match(r"[\w.-]+", line)[0] for name in names for line in metadata.requires(name) or []
              if "extra ==" not in line}
    return {name.lower().replace("_", "-") for name in names | needed}


def imported(path):
    """Top-level names of the packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("requirements, patterns", [
    ("requirements.txt", ["chapter-*/*.py", "chapter-*/*/*.py", "data/*.py"]),
    ("tests/requirements.txt", ["tests/*.py"])])
def test_what_is_imported_is_listed(requirements, patterns):
    available, owners = with_dependencies(listed(CHAPTERS_ROOT / requirements)), metadata.packages_distributions()
    files = [path for pattern in patterns for path in sorted(CHAPTERS_ROOT.glob(pattern))]
    ours = {path.stem for path in CHAPTERS_ROOT.glob("*/*.py")}
    ours |= {path.parent.name for path in CHAPTERS_ROOT.glob("*/*/*.py")}
    assert files
    for path in files:
        for name in {*imported(path)} - ours - sys.stdlib_module_names:
            distributions = {owner.lower().replace("_", "-") for owner in owners.get(name, [])}
            compared = path.match(COMPARED[name]) if name in COMPARED else False
            assert distributions & available or compared, (f"{path.relative_to(CHAPTERS_ROOT)} imports {name}: "
                                                           f"not in {requirements}")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_comparison_says_what_to_install(path, tmp_path):
    script = (f"import runpy, sys; sys.modules['transformers'] = None; sys.path[0] = {str(path.parent)!r}; "
              f"sys.argv = [{str(path)!r}, *sys.argv[1:]]; runpy.run_path({str(path)!r}, run_name='__main__')")
    done = warm.run("-c", script, *["decode"] * (path.stem == "benchmark_serving"), cwd=tmp_path)
    expect_error((done.returncode, done.stdout, done.stderr), "pip install -r tests/requirements.txt")
