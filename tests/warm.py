"""Processes that begin warm: forked from one that has imported torch and nothing of ours, they start in a tenth of a
second, not in five.

    done = warm.run("-m", "pytest", "-q", "tests/test_model.py", cwd=ROOT)   # as subprocess.run([python, "-m", ...])
    process = warm.start(chapter.folder / "train.py", "--steps", 4)          # to be killed: process.kill()

What runs is what `python ...` would run: the same file, arguments, folder and environment, in a process of its own.
Only an import that a script forgot, and the warm process happens to have, would go unnoticed: so each chapter's
train.py is started cold once (test_train.py). Where fork and torch do not go well together, on macOS, on Windows and
beside CUDA, these processes start cold too.
"""
import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
IMPORTED = ["torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.nn.attention.varlen", "torch.profiler",
            "torch.utils.flop_counter", "torch.utils.tensorboard",
            "tensorboard.backend.event_processing.event_accumulator",
            "transformers.models.gpt2.modeling_gpt2", "transformers.models.qwen3.modeling_qwen3",
            "transformers.models.auto.modeling_auto",
            "matplotlib.backends.backend_agg", "matplotlib.figure", "hypothesis", "tiktoken", "tqdm", "pytest",
            "_pytest.assertion.rewrite"]


@functools.cache
def context():
    """multiprocessing's way to start a process here. In a process that began warm it is to fork itself."""
    import torch
    if os.environ.get("WARM"):
        return multiprocessing.get_context("fork")
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def become(arguments, cwd, environment, path, files):
    """In the new process: be `python arguments...`, with these files as standard input, output and error."""
    gc.freeze()   # what has been imported stays: to look through it takes half a second each time
    for stream, file in enumerate(files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT if stream else os.O_RDONLY), stream)
    sys.stdin, sys.stdout, sys.stderr = (open(stream, mode, closefd=False) for stream, mode in enumerate("rww"))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment, **({"WARM": "1"} if multiprocessing.get_start_method(allow_none=True)
                                      == "forkserver" else {}))
    first, *rest = arguments
    try:
        if first == "-c":
            sys.argv, sys.path = ["-c", *rest[1:]], ["", *path]
            exec(rest[0], {"__name__": "__main__"})
        elif first == "-m":
            sys.argv, sys.path = rest, [os.getcwd(), *path]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = [first, *rest], [str(Path(first).parent), *path]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()   # a process of multiprocessing leaves them out


def start(*arguments, cwd=None, env=None, output=(os.devnull, os.devnull)):
    """A multiprocessing.Process that is `python arguments...`, its standard output and error in two files."""
    # Not what pytest added.
    path = [entry for entry in sys.path if entry and Path(entry).resolve() not in (TESTS, TESTS.parent)]
    process = context().Process(target=become, args=(
        list(map(str, arguments)), str(cwd or os.getcwd()), dict(env or os.environ), path,
        [os.devnull, *map(str, output)]))
    process.start()
    return process


def run(*arguments, timeout=200, **where):
    """subprocess.run([python, *arguments], capture_output=True, text=True, ...)"""
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("output", "error")]
        process = start(*arguments, output=output, **where)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        texts = [path.read_text() for path in output]
    if process.exitcode == -9:
        raise subprocess.TimeoutExpired(arguments, timeout, *texts)
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)
