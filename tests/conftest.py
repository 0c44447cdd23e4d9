import ast
import functools
import os
import random

import pytest

# One thread for each of pytest's workers: two that each want both cores wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from chapters import TRAINED, Chapter, load_chapter, run_here, set_up, twins
from ranks import Ranks


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped where there is none")
    config.addinivalue_line("markers", "reaches(*names): code that the test needs; where it is an earlier chapter's, see chapters.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    result = yield   # what -k leaves, in pytest's order
    left_out = [] if os.environ.get("ALL") else twins(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # The long group first and the many small ones last, so that no process waits long for another at the end.
    items.sort(key=lambda item: ("ranks" not in item.fixturenames) + (item.path.stem == "test_planted_bugs"))
    return result


@functools.cache
def with_ranks(path):
    """Names of a test file's functions that ask for the fixture `ranks`, themselves or by way of another fixture."""
    arguments = {node.name: {argument.arg for argument in node.args.args}
                 for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.FunctionDef)}
    names = {"ranks"}
    while more := {name for name, wanted in arguments.items() if wanted & names} - names:
        names |= more
    return names


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """pytest -n: all tests with `ranks` go to one of its processes, which starts them once; so do a file's tests of one chapter."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, function = nodeid.partition("[")[0].split("::")
            if function in with_ranks(config.rootpath / file):
                return "ranks"
            return next((file + name for name in TRAINED if name in nodeid), nodeid)
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    mark = item.get_closest_marker("reaches")
    Chapter.allowed = {name.partition(".")[0] for name in mark.args} if mark else None
    try:
        return (yield)
    finally:
        Chapter.allowed = None


def pytest_terminal_summary(terminalreporter):
    """What test_kills.py has killed, and where."""
    for report in terminalreporter.getreports("passed"):
        for _, (script, counts) in report.user_properties:
            where = ", ".join(f"{number} {phase}" for phase, number in sorted(counts.items()))
            terminalreporter.write_line(f"killed {script} {sum(counts.values())} times, nothing lost: {where}")


@pytest.fixture(scope="session", params=TRAINED)
def chapter(request):
    """Each chapter that has a train.py, in turn."""
    return load_chapter(request.param)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small text of 120 documents of different lengths, made of a few words."""
    dice = random.Random(0)
    words = "the king and queen of night speak softly to a fool who would not hear them again".split()
    documents = [f"{dice.choice(['ROMEO', 'JULIET'])}:\n" + " ".join(dice.choices(words, k=dice.randint(1, 60))) + "."
                 for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="session")
def trained(chapter, text_file, tmp_path_factory):
    """The folder of a run of three steps. Not to be changed: take a copy."""
    out = tmp_path_factory.mktemp("trained")
    run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 3, "--out", out)
    return out


@pytest.fixture(scope="session")
def ranks():
    """Several processes that talk to each other: ranks(size, work, *arguments), see ranks.py."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script module, arguments...) runs its main() here, without a new process -> (status, stdout, stderr)."""
    def call(module, *arguments):
        status = 0
        with monkeypatch.context() as patch:
            set_up(patch, module, *arguments)
            try:
                module.run(module.main)
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory):
    """Where torch's compiler keeps what it compiled: equal code of several chapters goes through the C++ compiler once."""
    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if os.environ.get("PYTEST_XDIST_WORKER") else here) / "kernels"   # of all processes of pytest -n
    folder.mkdir(exist_ok=True)
    return folder
