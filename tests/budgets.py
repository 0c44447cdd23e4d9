"""How heavy the chain of chapters is: changed lines from each chapter to the next, long functions, long lines.

    python tests/budgets.py                  the numbers of the working tree, beside the budgets
    python tests/budgets.py 19f5888          and beside those of a commit

test_chain.py fails where a number is above its budget. Changed lines, added and removed, are counted with Python's
difflib; `diff` may mark a few more or fewer.
"""
import ast
import difflib
import itertools
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# {file: {step: lines}}; "" is every step that is not named. Chapter 2 is another model than chapter 1, so that step is
# free.
BUDGETS = {"train.py": {"": 60, "5 -> 6": 110}, "model.py": {"": 30}, "data.py": {"": 20}, "generate.py": {"": 80}}
FUNCTION = 80   # lines of the longest function
COLUMNS = 120
SYMBOLS = 12    # named in a row of a README's table "What changed"


def budget(file, step):
    return None if step == "1 -> 2" else BUDGETS[file].get(step, BUDGETS[file][""])


def changed_lines(old, new):
    """Of two texts: lines of the one that the other has not, both ways."""
    codes = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False).get_opcodes()
    return sum(i2 - i1 + j2 - j1 for tag, i1, i2, j1, j2 in codes if tag != "equal")


def steps(root):
    """{(file, step): changed lines} of a tree."""
    chapters = sorted(path for path in root.glob("chapter-0*") if path.is_dir())
    found = {}
    for before, after in itertools.pairwise(chapters):
        step = f"{int(before.name[8:10])} -> {int(after.name[8:10])}"
        for file in BUDGETS:
            found[file, step] = changed_lines((before / file).read_text(), (after / file).read_text())
    return found


def programs(root):
    return [path for folder in ("chapter-0*", "tests", "data") for path in sorted(root.glob(f"{folder}/**/*.py"))]


def functions(root):
    """(lines, file, name) of each function of the chapters, the longest first."""
    found = []
    for path in programs(root):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append((node.end_lineno - node.lineno + 1, str(path.relative_to(root)), node.name))
    return sorted(found, reverse=True)


def long_lines(root):
    """(file, line number) of each line over COLUMNS."""
    return [(str(path.relative_to(root)), number) for path in programs(root)
            for number, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > COLUMNS]


def main():
    trees = {"now": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            archive = subprocess.run(["git", "archive", sys.argv[1]], cwd=ROOT, capture_output=True)
            if archive.returncode:
                sys.exit(f"error: {archive.stderr.decode().strip()}")
            (Path(folder) / "tree.tar").write_bytes(archive.stdout)
            with tarfile.open(Path(folder) / "tree.tar") as tar:
                tar.extractall(Path(folder) / "tree", filter="data")
            trees = {sys.argv[1][:10]: Path(folder) / "tree"} | trees
        counts = {name: steps(tree) for name, tree in trees.items()}
        print(f"{'changed lines':<24}" + "".join(f"{name:>12}" for name in trees) + f"{'budget':>12}")
        for file, step in counts["now"]:
            numbers = "".join(f"{count[file, step]:>12}" for count in counts.values())
            print(f"{file:<14}{step:<10}{numbers}{budget(file, step) or '-':>12}")
        for name, tree in trees.items():
            longest, file, function = functions(tree)[0]
            print(f"\n{name}: longest function {longest} lines ({file}: {function}; budget {FUNCTION}), "
                  f"{len(long_lines(tree))} lines of more than {COLUMNS} columns")


if __name__ == "__main__":
    main()
