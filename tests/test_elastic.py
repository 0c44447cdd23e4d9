"""Chapter 6 under torchrun: ranks that are killed, that fail alone or together, and runs that are told to end.

torchrun is the real one; but so that a test costs seconds, it begins warm (warm.py), and forks its ranks instead of starting them
(--run-path --start-method fork). A rank runs this file, which runs train.py. Only one test starts everything cold.
"""
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import warm
from chapters import expect_error, load_chapter, set_up
from ranks import CHAPTER
from test_layouts import SIZES, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
START = warm.context().get_start_method().replace("forkserver", "fork")   # what began warm forks itself
LONG = 200   # seconds in which everything here ends, or it hangs
BAD = "error: "


def rank(*arguments):
    """In a rank: train.py with these arguments. Where to leave the process id, and code that breaks something, are in the environment."""
    number, folder = os.environ["RANK"], Path(os.environ["PIDS"])
    (folder / f"new.{number}").write_text(str(os.getpid()))
    os.replace(folder / f"new.{number}", folder / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{number}")
    chapter = load_chapter(CHAPTER)
    exec(os.environ["BREAK"], globals() | {"chapter": chapter, "rank": int(number), "here": folder.parent})
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch, chapter.train, *arguments)
        patch.setattr(chapter.train, "write_sample", lambda *_: "")
        patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**SIZES | {"num_hidden_layers": 2}))
        chapter.train.run(chapter.train.main)


class Torchrun:
    """torchrun with ranks, running: process, and what it and they have written so far."""

    def __init__(self, folder, ranks, arguments, restarts=0, broken=""):
        self.ranks, self.pids = ranks, folder / "pids"
        self.pids.mkdir(parents=True)
        self.files = folder / "output", folder / "error"
        self.process = warm.start(
            "-m", "torch.distributed.run", "--run-path", "--start-method", START, "--nproc_per_node", ranks, "--max-restarts", restarts,
            __file__, *arguments, cwd=Path(__file__).parent, output=self.files, env=os.environ | {"PIDS": str(self.pids), "BREAK": broken})

    def pid(self, start, rank):
        """Process id of a rank of the first, second, ... start, as soon as it has one."""
        wait(lambda: (self.pids / f"{start}.{rank}").exists(), self)
        return int((self.pids / f"{start}.{rank}").read_text())

    def text(self, stream):
        return self.files[stream].read_text().replace("\r", "\n") if self.files[stream].exists() else ""

    def told(self):
        """Everything that ranks have said is wrong, and whether one had a traceback."""
        lines = [line[line.index(BAD):] for line in self.text(1).splitlines() if BAD in line]
        # torchrun's own report is none of the ranks'.
        return lines, bool(re.search(r"train\.py\", line|\[rank\d\]: Traceback", self.text(1)))

    def end(self):
        """Its exit status, when it and all its ranks are gone."""
        self.process.join(LONG)
        assert self.process.exitcode is not None, f"torchrun does not end:\n{self.text(1)}"
        for path in self.pids.iterdir():
            assert not alive(int(path.read_text())), f"rank {path.name} is still there"
        return self.process.exitcode

    def kill(self):
        for path in self.pids.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        self.process.kill()
        self.process.join()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait(condition, run):
    end = time.monotonic() + LONG
    while not condition():
        assert run.process.is_alive() and time.monotonic() < end, f"what was waited for did not come\n{run.text(0)}\n{run.text(1)}"
        time.sleep(0.01)


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(ranks, flags of train.py..., restarts=0, broken="") -> Torchrun. None of them is left behind."""
    runs = []

    def start(ranks, *arguments, **how):
        runs.append(Torchrun(tmp_path / f"run{len(runs)}", ranks, arguments, **how))
        return runs[-1]
    yield start
    for run in runs:
        run.kill()


@pytest.fixture
def flags(text_file, tmp_path):
    return "--data", text_file, "--batch-tokens", 128, "--save-every", 1, "--out", tmp_path / "out"


def step(out):
    """Of the last complete checkpoint; -1 if there is none."""
    for name in ("checkpoint", "checkpoint.old"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return json.loads((out / name / "state.json").read_text())["step"]
    return -1


def tensors(out):
    files = [*sorted((out / "checkpoint").glob("*.safetensors")), out / "model.safetensors"]
    return {(path.name, name): tensor for path in files for name, tensor in load_file(path).items()}


# All of them with KILLS=10 pytest -k killed_ranks; else the first.
LAYOUTS = ["--dp 2 --zero 3", "--pp 2 --accumulate 2", "--tp 2", "--dp 2 --precision bf16-pure"][:None if "KILLS" in os.environ else 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_ranks_start_again_and_the_run_goes_on(layout, torchrun, text_file, tmp_path):
    """kill -9 of a random rank at random instants: in start-up, in a step, while saving."""
    kills, dice = int(os.environ.get("KILLS", 2)), random.Random(layout)
    flags = ["--data", text_file, "--batch-tokens", 128, "--save-every", 1, "--steps", 4 * (kills + 1), *layout.split()]
    whole = torchrun(2, *flags, "--out", tmp_path / "whole")
    run = torchrun(2, *flags, "--out", tmp_path / "out", "--resume", restarts=kills)
    for start in range(kills):
        pids, before = [run.pid(start, rank) for rank in (0, 1)], step(tmp_path / "out")
        if start == 0 or dice.random() < 0.8:   # else in start-up
            wait(lambda: step(tmp_path / "out") > before, run)
        time.sleep(dice.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):   # it has ended by itself; what is wrong is found below
            os.kill(dice.choice(pids), signal.SIGKILL)
    assert whole.end() == 0, whole.text(1)
    assert run.end() == 0, run.text(1)
    assert len(list(run.pids.iterdir())) == 2 * (kills + 1)   # as often as they were killed, and not once more
    assert "resuming after step" in run.text(0)
    errors, traceback = run.told()
    assert not traceback and len(errors) <= kills and all("torchrun ends all ranks" in line for line in errors), run.text(1)

    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("whole", "out")]
    assert names[0] == names[1]   # nothing half-written is left
    whole, killed = (json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "out"))
    assert all(whole[key] == killed[key] for key in ("tokens", "steps", "val_bits_per_byte", "flops_per_token"))


def test_every_start_has_its_own_part_of_the_store(monkeypatch):
    """Or a rank that is early finds the address that a dead one has left there; in half of all restarts it would wait for that."""
    parallel, store, joined = load_chapter(CHAPTER).parallel, torch.distributed.HashStore(), []
    monkeypatch.setattr(parallel.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, store, **__: joined.append(store))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for start, machines in ("0", "1"), ("1", "1"), ("2", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
        parallel.join("gloo")
    first, second, of_several = joined
    first.set("address", "dead")
    assert first.check(["address"]) and not second.check(["address"])
    assert of_several is store   # where each torchrun counts for itself, the count would keep the ranks apart


def test_a_killed_rank_ends_the_run_with_one_message(torchrun, flags, tmp_path):
    run = torchrun(2, *flags, "--dp", 2, "--steps", 1000)
    wait(lambda: step(tmp_path / "out") > 0, run)
    os.kill(run.pid(0, 1), signal.SIGKILL)
    assert run.end() != 0
    (message,), traceback = run.told()
    assert "one of them has died" in message and "--resume" in message and not traceback, run.text(1)


# What rank 1 does that rank 0 does not: the code, whether it ends in a traceback, and words of the messages.
ALONE = {
    "dies before it joins": ("""
def joins(backend):   # rank 0 is there already
    (here / "waits").touch() if rank == 0 else None
    while not (here / "waits").exists():
        time.sleep(0.01)
    join(backend) if rank == 0 else os._exit(1)
join, chapter.parallel.join = chapter.parallel.join, joins
""", False, ["one of them has died"]),
    "raises before it joins": ("def raises(*_): raise ValueError('a bug')\n"
                               "if rank == 1: chapter.train.choose_precision = raises", True, ["one of them has died"]),
    "finds bad input": ("def finds(*_): raise chapter.errors.InputError('only here')\n"
                        "if rank == 1: chapter.train.evaluate = finds", False, ["only here", "one of them has died"]),
    # Python ignores SIGXFSZ: writing more than that into a file is an OSError.
    "has a full disk": ("if rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))", False, ["cannot write a checkpoint"])}


@pytest.mark.parametrize("what", ALONE)
def test_what_happens_to_one_rank_alone_ends_all(what, torchrun, flags, tmp_path):
    broken, bug, words = ALONE[what]
    run = torchrun(2, *flags, "--dp", 2, "--steps", 3, broken=broken)
    assert run.end() != 0
    errors, traceback = run.told()
    assert traceback == bug and ("a bug" in run.text(1)) == bug, run.text(1)
    assert [word for line in errors for word in words if word in line] == words and len(errors) == len(words), run.text(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_told_to_end(number, torchrun, flags, tmp_path):
    """SIGTERM to torchrun, as a cluster sends it; SIGINT to all, as Ctrl-C in a terminal does."""
    run = torchrun(2, *flags, "--dp", 2, "--steps", 1000)
    wait(lambda: step(tmp_path / "out") > 0, run)
    pids = [run.pid(0, rank) for rank in (0, 1)]
    for pid in pids if number == signal.SIGINT else []:
        os.kill(pid, number)
    os.kill(run.process.pid, number)
    assert run.end() != 0
    errors, traceback = run.told()
    assert not traceback, run.text(1)
    if number == signal.SIGINT:
        assert not errors and run.text(1).count("interrupted") == 1, run.text(1)
    else:
        assert len(errors) == 1 and "told to end" in errors[0], run.text(1)
    complete = load_chapter(CHAPTER).checkpoint.complete_checkpoint(tmp_path / "out")
    load_chapter(CHAPTER).sharded_checkpoint.gather_model(complete)   # raises InputError if anything of it is missing


# Flags, ranks that torchrun has started, and words of the message; found before the ranks have met.
WORLDS = [("--dp 2 --tp 2", 2, "is 4 ranks, and torchrun has started 2"), ("--pp 3", 8, "is 6 ranks, and torchrun has started 8"), ("--dp 1", 2, "is 1 ranks"),
          ("--dp 2", None, "torchrun has started 1"), ("--tp 2", None, "torchrun --nproc_per_node 2"), ("--dp 4 --ep 3", 4, "must divide it"),
          ("--dp 0", 2, "--dp"), ("--zero 4", 2, "--zero"), ("--schedule magic", 2, "--schedule")]


@pytest.mark.parametrize("flags, world, words", WORLDS)
def test_ranks_that_do_not_fill_the_mesh(flags, world, words, call, monkeypatch, tmp_path):
    for name, value in ("RANK", 0), ("WORLD_SIZE", world):
        monkeypatch.setenv(name, str(value)) if world else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load_chapter(CHAPTER).errors, "leave", sys.exit)
    expect_error(call(load_chapter(CHAPTER).train, *flags.split(), "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def refused(chapter, runs):
    """In each of two ranks: what train.py says about each of these runs."""
    return [message(chapter, sizes, *arguments) for sizes, arguments in runs]


def message(chapter, sizes, *arguments):
    try:
        train(chapter, 2, sizes, False, *arguments)
    except chapter.errors.InputError as error:
        return str(error)


def test_all_ranks_refuse_the_same_for_the_same_reason(ranks, text_file, tmp_path):
    """In real ranks, after they have met. A rank that went on would wait for the others for ever."""
    out, flags = tmp_path / "out", ["--data", str(text_file), "--batch-tokens", "100", "--steps", "1"]
    here, there = ["--out", str(out)], ["--out", str(tmp_path / "damaged"), "--steps", "2", "--resume"]
    for process in ranks(2, refused, [(SIZES, [*flags, *here, "--dp", "2"])]):
        assert process == [None]   # a run, to be resumed
    shutil.copytree(out, tmp_path / "damaged")
    shard = max((tmp_path / "damaged" / "checkpoint").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    more = ["--steps", "2", "--resume"]
    expected = [
        (SIZES, [*here, "--tp", "2", "--config", "small-moe"], "experts"),
        (SIZES | {"num_attention_heads": 3, "num_key_value_heads": 3}, [*here, "--tp", "2"], "heads"),
        (SIZES | {"num_hidden_layers": 1}, [*here, "--pp", "2"], "1 layers do not fill 2"),
        (SIZES, [*here, "--pp", "2", "--precision", "bf16-pure"], "bf16-pure"),
        (SIZES, [*here, "--dp", "2", "--compile", "default"], "--compile"),
        (SIZES, [*here, "--dp", "2", "--profile"], "--profile"),
        (SIZES, [*here, "--dp", "2", *more, "--accumulate", "2"], "accumulate x dp 2, this command has 4"),
        (SIZES, [*here, "--tp", "2", *more], "accumulate x dp 2, this command has 1"),
        (SIZES, [*here, "--dp", "2", *more, "--batch-tokens", "101"], "batch_tokens 100"),
        (SIZES, ["--dp", "2", *there], shard.name),
        (SIZES, [*here, "--dp", "2", "--data", "nothing.txt"], "nothing.txt")]
    first, second = ranks(2, refused, [(sizes, flags + arguments) for sizes, arguments, _ in expected])
    for mine, theirs, (_, arguments, words) in zip(first, second, expected):
        assert mine and words in mine, (arguments, mine)
        assert theirs == mine, (arguments, theirs)


def test_a_rank_that_dies_in_start_up(text_file, tmp_path):
    """Everything cold: torchrun and ranks as a reader starts them."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", load_chapter(CHAPTER).folder / "train.py", "--dp", "2",
               "--data", text_file, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.parent.exists():
        process.kill()
        pytest.skip("needs Linux, to find the ranks")
    while len(children.read_text().split()) < 2:
        time.sleep(0.01)
    first, second = map(int, children.read_text().split())
    time.sleep(1)   # they import torch
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode != 0 and not alive(first) and "SIGKILL" in err


if __name__ == "__main__":
    rank(*sys.argv[1:])
