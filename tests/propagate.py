"""Carry the fix of a bug forward: every later chapter has its own copy of the file, and with it the bug.

    python tests/propagate.py chapter-02-qwen3-packed/data.py

Fix the bug in the chapter that introduced it, do not commit yet, and run this. What changed since the last commit is
merged into the file of the same name in each later chapter; what those chapters changed themselves stays. Running it
again does no harm. Where both touched the same lines, or neighbours, git leaves its conflict markers in the file: edit
it, keep what is right. (A file with markers is left alone, but run this again after you resolved them and git may ask
once more: it cannot know your answer.) Then read the whole `git diff`, run the tests, and commit all chapters together.

Exit status: 0 all merged, 1 conflicts to resolve by hand, 2 nothing done because the request makes no sense.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "chapter-01-foundations"))
from cli import InputError, run


def git(*arguments, folder="."):
    return subprocess.run(["git", *map(str, arguments)], cwd=folder, capture_output=True)


def find(path):
    """The root of the repository we are in, and a file of one of its chapters as seen from there."""
    top = git("rev-parse", "--show-toplevel")
    if top.returncode != 0:
        raise InputError("this folder is in no git repository")
    root, full = Path(top.stdout.decode().rstrip("\n")), Path(path).resolve()
    if not full.is_relative_to(root) or not re.match(r"chapter-\d\d-[^/]+/", full.relative_to(root).as_posix()):
        raise InputError(f"{path} is not in a chapter folder of {root}")
    if not full.is_file():
        raise InputError(f"{path} is no file")
    return root, full.relative_to(root)


def merge(path, base, fix, chapter):
    """Merge the change from base to fix into the file at path. Returns what became of it, as one line of the report."""
    if not path.is_file():
        return "unchanged: no such file"
    conflict = f"CONFLICT: markers left in {path.parent.name}/{path.name}; resolve by hand"
    before = path.read_bytes()
    if re.search(rb"^<<<<<<< ", before, re.MULTILINE):
        return conflict
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base").write_bytes(base)
        (Path(folder) / "fix").write_bytes(fix)
        merged = git("merge-file", "-p", "-q", "-L", path.parent.name, "-L", f"{chapter} before the fix",
                     "-L", f"{chapter} with the fix", path, "base", "fix", folder=folder)
    if merged.returncode > 127:   # up to 127 it is the number of conflicts
        raise InputError(f"{path}: {merged.stderr.decode().strip()}")
    if merged.stdout == before:
        return "already has it"
    temporary = path.with_name(f".{path.name}.merged")   # written beside it, then renamed: never half a file
    temporary.write_bytes(merged.stdout)
    shutil.copymode(path, temporary)
    temporary.replace(path)
    return conflict if merged.returncode else "merged"


def main():
    if len(sys.argv) != 2:
        raise InputError("name one file, as in: python tests/propagate.py chapter-02-qwen3-packed/data.py")
    path = sys.argv[1]
    root, file = find(path)
    committed = git("cat-file", "blob", f"HEAD:{file.as_posix()}", folder=root)
    if committed.returncode != 0:
        raise InputError(f"{path} is in no commit yet: there is no version without the fix to compare with")
    fix = (root / file).read_bytes()
    if fix == committed.stdout:
        raise InputError(f"{path} is as it was in the last commit: there is no fix to carry forward")
    chapter, *rest = file.parts
    later = sorted(folder for folder in root.glob("chapter-*") if folder.is_dir() and folder.name > chapter)
    reports = {folder.name: merge(folder.joinpath(*rest), committed.stdout, fix, chapter) for folder in later}
    for name, report in reports.items():
        print(f"{name}: {report}")
    sys.exit(any(report.startswith("CONFLICT") for report in reports.values()))


if __name__ == "__main__":
    run(main)
