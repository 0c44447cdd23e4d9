"""What --compile needs is found, or named in one line; nobody waits for a compilation that was killed."""
import os
import signal
import sys
import threading
import time

import pytest
from filelock import FileLock

from chapters import TRAINED, expect_error, load_chapter

COMPILING = [name for name in TRAINED if name >= "chapter-03"]
WITH_KERNELS = [name for name in TRAINED if name >= "chapter-05"]
OLD = ("#!/bin/sh\n[ \"$1\" = --version ] && echo 'g++ (Ubuntu 7.5.0) 7.5.0' && exit\n"
       "echo \"g++: error: unrecognized '-std=c++20'\" >&2\nexit 1\n")
GOOD = "#!/bin/sh\necho 'a compiler 99'\n"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name=contents...): these and no others are on the path."""
    import torch._inductor.config
    before = torch._inductor.config.cpp.cxx
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "")

    def put(**contents):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "sh").symlink_to("/bin/sh")
        for name, text in contents.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
    yield put
    torch._inductor.config.cpp.cxx = before


@pytest.mark.parametrize("contents, chosen, words", [   # programs on the path, what CXX says, what is missed
    ({}, "", ["g++ cannot be run", "g++ 12 or newer", "clang++", "CXX"]),
    ({"g++": GOOD}, "c++-13", ["c++-13 cannot be run", "g++ 12 or newer"]),
    ({"g++": OLD, "clang++": GOOD}, "", ["7.5.0", "unrecognized '-std=c++20'", "g++ 12 or newer", "CXX"])])
@pytest.mark.parametrize("name", COMPILING)
def test_a_compiler_that_is_missing_or_too_old(name, contents, chosen, words, programs, monkeypatch, tmp_path, call):
    chapter = load_chapter(name)
    programs(**contents)
    monkeypatch.setenv("CXX", chosen)
    scripts = [(chapter.train, "--compile", "default", "--device", "cpu", "--out", tmp_path / "out")]
    if name in WITH_KERNELS:
        scripts += [(chapter.small_batch_matmul,), (chapter.generate, "a", "--compile")]
    for script in scripts:
        expect_error(call(*script), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("contents, chosen", [({"g++": GOOD, "clang++": OLD}, ""), ({"clang++": GOOD}, ""),
                                              ({"mine": GOOD, "g++": OLD}, "mine")])
def test_a_compiler_that_will_do(contents, chosen, programs, monkeypatch):
    programs(**contents)
    monkeypatch.setenv("CXX", chosen)
    load_chapter(COMPILING[0]).compiler.check_compiler("cpu")
    assert os.environ["CXX"] == next(iter(contents))


def test_a_folder_that_cannot_be_written(programs, monkeypatch, tmp_path, call):
    programs(**{"g++": GOOD})
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    for name in COMPILING:
        expect_error(call(load_chapter(name).train, "--compile", "default", "--device", "cpu"), "file/below",
                     "TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    for name in WITH_KERNELS:
        expect_error(call(load_chapter(name).small_batch_matmul), str(tmp_path / "file"), "TORCH_EXTENSIONS_DIR")


@pytest.fixture
def compile_by(programs, monkeypatch, tmp_path):
    """compile_by(load): small_batch_matmul.cpp is compiled in a folder of its own, by load() instead of the library.

    Returns (the chapter, the folder).
    """
    programs(**{"g++": GOOD})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    chapter = load_chapter(WITH_KERNELS[0])
    kernel, name = chapter.small_batch_matmul.kernel, f"{chapter.custom_ops.CHAPTER}_small_batch"

    def compile_by(load):
        monkeypatch.setattr(chapter.small_batch_matmul.cpp_extension, "load", load)
        monkeypatch.setattr(chapter.small_batch_matmul.torch.library, "register_fake",
                            lambda name: lambda function: None)
        monkeypatch.setattr(chapter.small_batch_matmul.torch.ops, chapter.custom_ops.CHAPTER,
                            type("Operators", (), {"small_batch_matmul": type("", (), {"default": 1})}),
                            raising=False)
        return kernel.__wrapped__, tmp_path / name   # not the cached one
    return compile_by


def test_a_compilation_that_was_killed_is_not_waited_for(compile_by):
    """The library's lock is a file, and stays; ours is held by a process, and goes with it."""
    kernel, folder = compile_by(lambda *_, **__: seen.append((folder / "lock").exists()))
    seen = []
    folder.mkdir()
    child = os.fork()
    if not child:
        FileLock(folder / "compiling").acquire()
        (folder / "lock").touch()
        time.sleep(100)
    while not (folder / "lock").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kernel()
    assert seen == [False]


def test_of_two_that_compile_one_waits_and_says_so(compile_by, capsys):
    kernel, folder = compile_by(lambda *_, **__: time.sleep(3) or order.append("compiled"))
    order = []
    first = threading.Thread(target=kernel)
    first.start()
    while not (folder / "compiling").exists():
        time.sleep(0.01)
    kernel()
    first.join()
    assert order == ["compiled"] * 2
    assert capsys.readouterr().err.count("waiting for another process that compiles the same") == 1


def test_a_compilation_that_fails_says_why(compile_by):
    def fail(*_, **__):
        raise RuntimeError("Error building extension 'small_batch_matmul':\n[1/2] c++ ...\nsmall_batch_matmul.cpp:6:"
                           " fatal error: No space left on device\n")
    kernel, _ = compile_by(fail)
    with pytest.raises(load_chapter(WITH_KERNELS[0]).cli.InputError,
                       match="g\\+\\+ .*No space left on device.*--compile"):
        kernel()
