import os
import random

import pytest

# One thread for each of pytest's workers: two that each want both cores wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from chapters import TRAINED, load_chapter, run_here


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script module, arguments...) runs its main() here, without a new process -> (status, stdout, stderr)."""
    def call(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__file__, *map(str, arguments)])
        status = 0
        try:
            module.run(module.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call
