"""A test that cannot fail proves nothing. Each patch of planted_bugs/ is a mistake that a reader may make; the test
that it names must turn red. They are the chapters' exercises too: apply one with `git apply`, run pytest, find the
line."""
import os
import shutil
import subprocess

import pytest

import warm
from chapters import ROOT

PATCHES = sorted((ROOT / "tests" / "planted_bugs").glob("*.patch"))
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)


def head(patch):
    """What stands above the diff, {"Test": ..., "Symptom": ...}."""
    return dict(line.split(": ", 1) for line in patch.read_text().partition("\n\n")[0].splitlines())


def edited_folders(patch):
    return [line.split("/")[1] for line in patch.read_text().splitlines() if line.startswith("+++ b/")]


def git_apply(patch, folder, *flags):
    # Outside a repository git apply takes paths as they are, and would skip them in silence inside one.
    subprocess.run(["git", "apply", *flags, patch], cwd=folder, check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})


@each_patch
def test_it_applies_and_names_its_chapter_and_its_test(patch):
    git_apply(patch, ROOT, "--check")
    chapter = edited_folders(patch)[0].replace("chapter-0", "ch").partition("-")[0]   # ch1, or data
    assert patch.name.startswith(f"{chapter}_")
    file, _, name = head(patch)["Test"].partition("::")
    assert head(patch)["Symptom"]
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), f"{file} has no {name}"


@each_patch
def test_the_named_test_turns_red(patch, tmp_path):
    for folder in ["data", *edited_folders(patch)]:
        shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("out*", "__pycache__", "*.txt", "*.jsonl", "*.json"))
    git_apply(patch, tmp_path)
    done = warm.run("-m", "pytest", "-qx", "-p", "no:cacheprovider", head(patch)["Test"], cwd=ROOT,
                    env=os.environ | {"CHAPTERS_ROOT": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 1 and " failed" in done.stdout, f"{patch.name} goes unnoticed\n{done.stdout[-2000:]}"
