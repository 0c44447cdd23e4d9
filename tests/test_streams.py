"""Standard streams that are closed, full or of a narrow encoding: no traceback, and no work lost."""
import ast
import os
import subprocess
import sys

import pytest

from chapters import CHAPTERS, CHAPTERS_ROOT, chapter1, load_chapter

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
from cli import ArgumentParser, InputError, run

def main():
    parser = ArgumentParser("A script.")
    parser.add_argument("action")
    action = parser.parse_args().action
    sys.stderr.write("a bar\\n")
    with open("file", "w") as file:   # gets the lowest number that is free
        print("caf\\u00e9 \\u20ac \\udc80")
        os.system("echo a compiler speaks; echo and complains >&2")
        file.write(f"written {sys.stdin.read()!r}" if action == "read" else "written")
    if action == "bad":
        raise InputError("bad input")

run(main)
"""
FULL = "standard output or a file: No space left on device"
ALL = [">&-", "2>&-", "<&-", ">/dev/full", "2>/dev/full", ">&- 2>&- <&-", ">/dev/full 2>&-", ">&- 2>/dev/full"]


def shell(command, tmp_path, **environment):
    """(status, standard output, standard error) of a command whose streams the shell redirects."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=200, env=environment)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return done.returncode, out, err


@pytest.fixture(params=["chapter-01-foundations", "chapter-06-parallelism"])   # the two versions of cli.py
def script(request, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return f"{sys.executable} script.py {load_chapter(request.param).folder}"


@pytest.mark.parametrize("streams", ALL)
def test_closed_and_full_streams(script, tmp_path, streams):
    full = ">/dev/full" in streams.replace("2>/dev/full", "")
    status, out, err = shell(f"{script} go {streams}", tmp_path)
    assert status == (2 if full else 0)
    assert (FULL in err) == (full and "2>" not in streams)
    assert ("a bar" in err) == ("2>" not in streams)
    assert (tmp_path / "file").read_text() == "written"
    for bad in ("bad", "--no-such-flag"):
        status, out, err = shell(f"{script} {bad} {streams}", tmp_path)
        errors = sum(line.startswith("error: ") for line in err.splitlines())
        assert status == 2 and ("2>" in streams or errors == 1), err
    status, out, err = shell(f"{script} --help {streams}", tmp_path)
    assert status == (2 if full else 0)


@pytest.mark.parametrize("environment, printed, read", [
    ({"PYTHONIOENCODING": "utf-8"}, "caf\u00e9 \u20ac \\udc80".encode(), "\u00e9"),
    ({"PYTHONIOENCODING": "latin-1"}, b"caf\xe9 \\u20ac \\udc80", "\u00c3\u00a9"),
    ({"PYTHONIOENCODING": "ascii"}, b"caf\\xe9 \\u20ac \\udc80", "\udcc3\udca9"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"caf\\xe9 \\u20ac \\udc80", "\udcc3\udca9")])
def test_narrow_encodings(script, tmp_path, environment, printed, read):
    (tmp_path / "in").write_text("\u00e9", encoding="utf-8")
    status, _, err = shell(f"{script} read <in >out", tmp_path, **environment)
    assert status == 0, err
    assert printed in (tmp_path / "out").read_bytes()
    assert (tmp_path / "file").read_text() == f"written {read!r}"


@pytest.mark.parametrize("streams", ALL)
@pytest.mark.parametrize("command, good", [("data/download.py --list", True), ("data/download.py nothing", False),
                                           ("tests/propagate.py", False)])
def test_the_scripts_beside_the_chapters(tmp_path, streams, command, good):
    full = good and ">/dev/full" in streams.replace("2>/dev/full", "")
    status, out, err = shell(f"{sys.executable} {CHAPTERS_ROOT}/{command} {streams}", tmp_path)
    assert status == (0 if good and not full else 2), (out, err)
    assert not out or good, out   # not even where standard error is closed
    assert "2>" in streams or err.count("error: ") == (not good or full), err


def test_a_training_and_its_text(tmp_path, text_file):
    """The real thing once: tqdm, TensorBoard, the download script and the samples, with nowhere to write to."""
    flags = " ".join(map(str, ("--data", text_file, *chapter1.quick, "--steps", 1, "--out", tmp_path / "out")))
    status, _, _ = shell(f"{sys.executable} {chapter1.folder}/train.py {flags} >&- 2>/dev/full <&-", tmp_path)
    assert status == 0 and {"summary.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    status, _, err = shell(f"{sys.executable} {chapter1.folder}/generate.py a 3 --checkpoint out >/dev/full <&-",
                           tmp_path)
    assert (status, err) == (2, f"error: {FULL}\n")


def test_every_script_ends_in_run():
    """Where the streams are looked after. A script is what has a main block."""
    for path in [path for name in CHAPTERS for path in sorted((CHAPTERS_ROOT / name).glob("*.py"))]:
        blocks = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.If)
                  and "__name__" in ast.unparse(node.test)]
        for block in blocks:
            assert ast.unparse(block.body[-1]) in ("run(main)", "run_script(main)"), path
