"""A test that cannot fail proves nothing. Each patch of planted_bugs/ is a mistake that a reader may make; the test that it
names must turn red. They are the chapters' exercises too: apply one with `git apply`, run pytest, find the line."""
import os
import shutil
import subprocess

import pytest

import warm
from chapters import ROOT

PATCHES = sorted((ROOT / "tests" / "planted_bugs").glob("*.patch"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_the_named_test_turns_red(patch, tmp_path):
    fields = dict(line.split(": ", 1) for line in patch.read_text().partition("\n\n")[0].splitlines())
    files, _, name = fields["Test"].partition("::")
    assert fields["Symptom"] and f"def {name.partition('[')[0]}(" in (ROOT / files).read_text(), f"{patch.name}: no {name}"
    for folder in ["data", *{line.split("/")[1] for line in patch.read_text().splitlines() if line.startswith("+++ b/")}]:
        shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("out*", "__pycache__", "*.txt", "*.jsonl", "*.json"))
    # Outside a repository git apply takes paths as they are, and would skip them in silence inside one.
    environment = os.environ | {"CHAPTERS_ROOT": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", patch], cwd=tmp_path, env=environment, check=True)
    done = warm.run("-m", "pytest", "-q", "-p", "no:cacheprovider", fields["Test"], cwd=ROOT, env=environment)
    assert done.returncode == 1 and " failed" in done.stdout, f"{patch.name} goes unnoticed\n{done.stdout[-2000:]}"
