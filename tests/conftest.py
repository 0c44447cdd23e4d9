import ast
import functools
import inspect
import os
import random
import re

import pytest

# One thread for each of pytest's workers: two that each want both cores wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from chapters import CHAPTERS, TRAINED, Chapter, load_chapter, run_here, set_up, twins
from ranks import Ranks

# Files and functions that take long: they start processes cold, call a compiler, train until something is learned, or
# try many cases. `pytest -m quick` leaves them out, as it does all tests with `ranks`.
SLOW = {
    "test_compiler", "test_elastic", "test_kills", "test_streams", "test_the_named_test_turns_red",
    "test_bpe_demo_runs_and_draws", "test_training_does_not_depend_on_the_hash_seed", "test_a_million_of_anything",
    "test_killed_at_any_instant", "test_killed_half_way_then_continued", "test_two_processes_at_once",
    "test_ctrl_c_keeps_the_part_and_exits_with_130", "test_the_real_library_offline_says_one_line",
    "test_compiled_decode_gives_the_same_tokens", "test_small_batches_compute_what_linear_does", "test_any_schedule",
    "test_compiled_equals_eager_and_compiles_no_more_after_two_batches", "test_the_compiler_can_follow",
    "test_compiled_decode_of_integers_gives_the_same_tokens", "test_nothing_is_said",
    "test_loading_takes_the_memory_of_one_model", "test_no_network_is_one_line",
    "test_no_score_below_the_entropy_and_two_trained_models_near_it", "test_the_ladder_scores_no_validation_document",
    "test_loss_script_runs", "test_a_profile_sums_to_the_step_and_changes_nothing",
    "test_the_command_trains_measures_draws_and_goes_on",
    "test_less_than_one_percent_of_the_budget_is_wasted_on_natural_documents",
    "test_a_run_whose_steps_were_left_out_resumes_bit_for_bit", "test_a_killed_command_goes_on_and_makes_no_run_twice",
    "test_the_code_of_the_library_is_enough_and_mixed",
    "test_killed_with_its_workers_then_continued", "test_no_variant_scores_below_the_entropy_of_a_source",
    "test_the_default_run_starts_and_resumes", "test_python_docs_is_there_without_network",
    "test_the_road_on_one_axis", "test_an_alphabet_of_one_letter", "test_learned_positions_train_as_train_py_does",
}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped where there is none")
    config.addinivalue_line("markers", "reaches(*names): code that the test needs; where it is an earlier chapter's,"
                                       " see chapters.py")
    config.addinivalue_line("markers", "quick: one case of each test and chapter, without what takes long; see"
                                       " tests/README.md")
    for number in range(1, len(CHAPTERS) + 1):
        config.addinivalue_line("markers", f"chapter{number}: what is tested is chapter {number}'s")


@functools.cache
def chapter_of_file(module):
    """Number of the last chapter that a test file speaks of or loads, in a list; an empty one if it is about none."""
    loaded = " ".join(value.folder.name for value in vars(module).values() if isinstance(value, Chapter))
    return sorted(re.findall(r"[Cc]hapter[- ]?0?([1-9])", inspect.getsource(module) + loaded))[-1:]


def chapters_of(item):
    """Numbers of the chapters that a test is about: those that its parameters name, else that of its file."""
    named = {one or other for one, other in re.findall(r"chapter-0(\d)-|\bch(\d)_", item.nodeid)}
    return sorted(named) or chapter_of_file(item.module)


def is_quick(item):
    return "ranks" not in item.fixturenames and not {item.path.stem, item.originalname} & SLOW


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    seen = set()
    for item in items:
        chapters = chapters_of(item)
        case = item.path, item.originalname, *chapters
        for mark in [f"chapter{number}" for number in chapters] + ["quick"] * (is_quick(item) and case not in seen):
            item.add_marker(mark)
        seen.add(case)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    result = yield   # what -k and -m leave, in pytest's order
    left_out = [] if os.environ.get("ALL") else twins(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # The long groups first and the many small ones last, so that no process waits long for another at the end.
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
    """pytest -n: a file's tests with `ranks` go to one of its processes, and so do a file's tests of one chapter.

    Each process starts ranks of its own, once. The groups are handed out one by one, so that all processes have about
    the same to do. A rank computes in one thread, and sleeps while it waits for another.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, function = nodeid.partition("[")[0].split("::")
            if function in with_ranks(config.rootpath / file):
                return f"{file} ranks"
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
    rng = random.Random(0)
    words = "the king and queen of night speak softly to a fool who would not hear them again".split()
    documents = [f"{rng.choice(['ROMEO', 'JULIET'])}:\n" + " ".join(rng.choices(words, k=rng.randint(1, 60))) + "."
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
    """Where torch's compiler keeps what it compiled: equal code of chapters goes through the C++ compiler once."""
    here = tmp_path_factory.getbasetemp()
    # Of all processes of pytest -n.
    folder = (here.parent if os.environ.get("PYTEST_XDIST_WORKER") else here) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder
