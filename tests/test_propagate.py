"""propagate.py on a small repository of four chapters."""
import subprocess
import sys

import pytest

from chapters import ROOT

ONE, TWO, THREE, FOUR = CHAPTERS = ["chapter-01-a", "chapter-02-b", "chapter-03-c", "chapter-04-d"]
TEXT = "".join(f"line {n}\n" for n in range(20))
FIXED = TEXT.replace("line 5\n", "line five\n")


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """model.py is the same in chapters 2 to 4, and nobody's settings of git count."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):   # set where a git hook runs the tests
        monkeypatch.delenv(name, raising=False)
    for name in CHAPTERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(TEXT)
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "user.name", "A Reader")
    git(tmp_path, "config", "user.email", "reader@example.org")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Four chapters")
    (tmp_path / TWO / "model.py").write_text(FIXED)
    return tmp_path


def propagate(folder, *arguments):
    command = [sys.executable, ROOT / "tests" / "propagate.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def contents(repository):
    return {path.relative_to(repository).as_posix(): path.read_text() for path in repository.glob("chapter-*/*")}


def test_identical_copies_become_the_fix_and_earlier_chapters_stay(repository):
    (repository / THREE / "model.py").chmod(0o640)
    (repository / FOUR / "model.py").chmod(0o755)
    assert propagate(repository, f"{TWO}/model.py") == (0, [f"{THREE}: merged", f"{FOUR}: merged"], [])
    assert contents(repository) == {f"{name}/model.py": TEXT if name == ONE else FIXED for name in CHAPTERS}
    assert [(repository / name / "model.py").stat().st_mode & 0o777 for name in (THREE, FOUR)] == [0o640, 0o755]


def test_a_second_run_finds_nothing_to_do(repository):
    (repository / FOUR / "model.py").write_text(TEXT + "and more\n")
    propagate(repository, f"{TWO}/model.py")
    before = contents(repository)
    assert propagate(repository, f"{TWO}/model.py") == (0, [f"{THREE}: already has it", f"{FOUR}: already has it"], [])
    assert contents(repository) == before


def test_what_a_later_chapter_changed_elsewhere_stays(repository):
    (repository / THREE / "model.py").write_text(TEXT.replace("line 15\n", "") + "and more\n")
    (repository / FOUR / "model.py").unlink()
    assert propagate(repository, f"{TWO}/model.py") == (0, [f"{THREE}: merged", f"{FOUR}: unchanged: no such file"], [])
    assert (repository / THREE / "model.py").read_text() == FIXED.replace("line 15\n", "") + "and more\n"


def test_a_conflict_is_left_to_the_reader_and_does_not_stop_the_others(repository):
    (repository / THREE / "model.py").write_text(TEXT.replace("line 5\n", "line V\n"))
    conflict = f"{THREE}: CONFLICT: markers left in {THREE}/model.py; resolve by hand"
    assert propagate(repository, f"{TWO}/model.py") == (1, [conflict, f"{FOUR}: merged"], [])
    marked = f"<<<<<<< {THREE}\nline V\n=======\nline five\n>>>>>>> {TWO} with the fix\n"
    assert (repository / THREE / "model.py").read_text() == TEXT.replace("line 5\n", marked)
    assert (repository / FOUR / "model.py").read_text() == FIXED
    before = contents(repository)
    assert propagate(repository, f"{TWO}/model.py") == (1, [conflict, f"{FOUR}: already has it"], [])
    assert contents(repository) == before, "markers within markers"


def test_paths_are_those_of_the_folder_one_is_in(repository):
    assert propagate(repository / TWO, "model.py") == (0, [f"{THREE}: merged", f"{FOUR}: merged"], [])


@pytest.mark.parametrize("arguments, message", [
    ([], "name one file"),
    ([f"{TWO}/model.py", f"{TWO}/data.py"], "name one file"),
    (["notes.py"], "notes.py is not in a chapter folder"),
    (["../model.py"], "../model.py is not in a chapter folder"),
    ([TWO], f"{TWO} is not in a chapter folder"),
    ([f"{TWO}/missing.py"], f"{TWO}/missing.py is no file"),
    ([f"{TWO}/new.py"], f"{TWO}/new.py is in no commit yet"),
    ([f"{THREE}/model.py"], f"{THREE}/model.py is as it was in the last commit"),
])
def test_bad_input_is_one_line_and_changes_nothing(repository, arguments, message):
    (repository / "notes.py").write_text(TEXT)
    (repository / TWO / "new.py").write_text(TEXT)
    before = contents(repository)
    status, printed, errors = propagate(repository, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and errors[0].startswith(f"error: {message}"), errors
    assert contents(repository) == before


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert propagate(tmp_path, "model.py") == (2, [], ["error: this folder is in no git repository"])
