"""Chapter 6 under torchrun: ranks that are killed, that fail alone or together, and runs that are told to end.

torchrun is the real one; but so that a test costs seconds, it begins warm (warm.py), and forks its ranks instead of
starting them (--run-path --start-method fork). A rank runs this file, which runs train.py. Only one test starts
everything cold.
"""
import contextlib
import datetime
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
    """In a rank: train.py with these arguments.

    Where to leave the process id, and code that breaks something, are in the environment.
    """
    number, folder = os.environ["RANK"], Path(os.environ["PIDS"])
    (folder / f"new.{number}").write_text(str(os.getpid()))
    os.replace(folder / f"new.{number}", folder / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{number}")
    chapter = load_chapter(os.environ.get("CHAPTER", CHAPTER))
    # What is forked is told of its parent's death; what torchrun starts by default is not.
    torch.multiprocessing._prctl_pr_set_pdeathsig(0)
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
            "-m", "torch.distributed.run", "--run-path", "--start-method", START, "--nproc_per_node", ranks,
            "--max-restarts", restarts,
            __file__, *arguments, cwd=Path(__file__).parent, output=self.files,
            env=os.environ | {"PIDS": str(self.pids), "BREAK": broken})

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
        assert run.process.is_alive() and time.monotonic() < end, (
            f"what was waited for did not come\n{run.text(0)}\n{run.text(1)}")
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
    for name in ("checkpoint", ".checkpoint.replaced"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return json.loads((out / name / "state.json").read_text())["step"]
    return -1


def tensors(out):
    files = [*sorted((out / "checkpoint").glob("*.safetensors")), out / "model.safetensors"]
    return {(path.name, name): tensor for path in files for name, tensor in load_file(path).items()}


# All of them with KILLS=10 pytest -k killed_ranks; else the first.
LAYOUTS = ["--dp 2 --zero 3", "--pp 2 --accumulate 2", "--tp 2",
           "--dp 2 --precision bf16-pure"][:None if "KILLS" in os.environ else 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_ranks_start_again_and_the_run_goes_on(layout, torchrun, text_file, tmp_path):
    """kill -9 of a random rank at random instants: in start-up, in a step, while saving."""
    kills, rng = int(os.environ.get("KILLS", 2)), random.Random(layout)
    flags = ["--data", text_file, "--batch-tokens", 128, "--save-every", 1, "--steps", 4 * (kills + 1), *layout.split()]
    whole = torchrun(2, *flags, "--out", tmp_path / "whole")
    run = torchrun(2, *flags, "--out", tmp_path / "out", restarts=kills)   # without --resume: it is no new run
    for start in range(kills):
        pids, before = [run.pid(start, rank) for rank in (0, 1)], step(tmp_path / "out")
        if start == 0 or rng.random() < 0.8:   # else in start-up
            wait(lambda: step(tmp_path / "out") > before, run)
        time.sleep(rng.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):   # it has ended by itself; what is wrong is found below
            os.kill(rng.choice(pids), signal.SIGKILL)
    assert whole.end() == 0, whole.text(1)
    assert run.end() == 0, run.text(1)
    assert len(list(run.pids.iterdir())) == 2 * (kills + 1)   # as often as they were killed, and not once more
    assert "resuming after step" in run.text(0)
    errors, traceback = run.told()
    assert not traceback and len(errors) <= kills, run.text(1)
    assert all("torchrun ends all ranks" in line for line in errors), run.text(1)

    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("whole", "out")]
    assert names[0] == names[1]   # nothing half-written is left
    whole, killed = (json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "out"))
    assert all(whole[key] == killed[key] for key in ("tokens", "steps", "val_bits_per_byte", "flops_per_token"))


def test_every_start_has_its_own_part_of_the_store(monkeypatch):
    """Or a rank that is early finds the address that a dead one has left there; in half of all restarts it would wait
    for that.
    """
    parallel, store, joined = load_chapter(CHAPTER).parallel.mesh, torch.distributed.HashStore(), []
    monkeypatch.setattr(parallel.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, store, **__: joined.append(store))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for start, machines in ("0", "1"), ("1", "1"), ("2", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
        parallel.join("gloo", {})
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


def gone(pid):
    """Whether a process has ended; where nobody asks how, it stays in the list, without a command."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_torchrun_leaves_no_rank(torchrun, flags, tmp_path):
    run = torchrun(2, *flags, "--dp", 2, "--steps", 1000)
    wait(lambda: step(tmp_path / "out") > 0, run)
    pids = [run.pid(0, rank) for rank in (0, 1)]
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    end = time.monotonic() + LONG
    while not all(map(gone, pids)):
        assert time.monotonic() < end, "a rank goes on"
        time.sleep(0.1)
    (message,), traceback = run.told()
    assert "torchrun has been killed" in message and "--resume" in message and not traceback, run.text(1)
    chapter = load_chapter(CHAPTER)
    chapter.parallel.checkpoint.gather_model(chapter.checkpoint.complete_checkpoint(tmp_path / "out"))


def test_a_killed_torchrun_is_noticed_by_ranks_that_still_start(call, monkeypatch, tmp_path):
    """Its store was there before they were: there is no use in waiting for it."""
    parallel, given = load_chapter(CHAPTER).parallel.mesh, {}

    def refused(*_, timeout):
        given["patience"] = timeout.total_seconds()
        raise torch.distributed.DistNetworkError("the connection was refused\nand so on")
    monkeypatch.setattr(parallel, "tell_when_ended", lambda: None)
    monkeypatch.setattr(parallel.dist, "rendezvous", refused)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    refuses(WHOLE, "--steps 1", "localhost:1, connection was refused", call, monkeypatch, tmp_path)
    assert given["patience"] < 60


# What rank 1 does that rank 0 does not: the code, whether it ends in a traceback, and words of the messages.
ALONE = {
    "dies before it joins": ("""
def joins(*how):   # rank 0 is there already
    (here / "waits").touch() if rank == 0 else None
    while not (here / "waits").exists():
        time.sleep(0.01)
    join(*how) if rank == 0 else os._exit(1)
join, chapter.parallel.mesh.join = chapter.parallel.mesh.join, joins
""", False, ["one of them has died"]),
    "raises before it joins": ("def raises(*_): raise ValueError('a bug')\n"
                               "if rank == 1: chapter.train.choose_precision = raises", True, ["one of them has died"]),
    "finds bad input": ("def finds(*_): raise chapter.cli.InputError('only here')\n"
                        "if rank == 1: chapter.train.evaluate = finds", False, ["only here", "one of them has died"]),
    "dies while the others wait for it": ("if rank == 0: chapter.training_state.export = lambda *_: os._exit(1)",
                                          False, []),
    # Python ignores SIGXFSZ: writing more than that into a file is an OSError.
    "has a full disk": ("if rank == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))", False,
                        ["cannot write a checkpoint"])}


@pytest.mark.parametrize("what", ALONE)
def test_what_happens_to_one_rank_alone_ends_all(what, torchrun, flags, tmp_path):
    broken, bug, words = ALONE[what]
    run = torchrun(2, *flags, "--dp", 2, "--steps", 3, broken=broken)
    assert run.end() != 0
    errors, traceback = run.told()
    assert traceback == bug and ("a bug" in run.text(1)) == bug, run.text(1)
    assert [word for line in errors for word in words if word
            in line] == words and len(errors) == len(words), run.text(1)


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
    load_chapter(CHAPTER).parallel.checkpoint.gather_model(complete)   # raises InputError if anything of it is missing


# Flags, ranks that torchrun has started, and words of the message; found before the ranks have met.
WORLDS = [("--dp 2 --tp 2", 2, "is 4 ranks, and torchrun has started 2"),
          ("--pp 3", 8, "is 6 ranks, and torchrun has started 8"), ("--dp 1", 2, "is 1 ranks"),
          ("--dp 2", None, "torchrun has started 1"), ("--tp 2", None, "torchrun --nproc_per_node 2"),
          ("--dp 4 --ep 3", 4, "must divide it"),
          ("--dp 0", 2, "--dp"), ("--zero 4", 2, "--zero"), ("--schedule magic", 2, "--schedule")]


@pytest.mark.parametrize("flags, world, words", WORLDS)
def test_ranks_that_do_not_fill_the_mesh(flags, world, words, call, monkeypatch, tmp_path):
    environment = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost",
                   "MASTER_PORT": 0} if world else {}
    refuses(environment, flags, words, call, monkeypatch, tmp_path)


def refuses(environment, flags, words, call, monkeypatch, tmp_path):
    for name in load_chapter(CHAPTER).parallel.mesh.TOLD:
        if name in environment:
            monkeypatch.setenv(name, str(environment[name]))
        else:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load_chapter(CHAPTER).cli, "leave", sys.exit)
    expect_error(call(load_chapter(CHAPTER).train, *flags.split(), "--out", tmp_path / "out"), *words.split(", "))
    assert not (tmp_path / "out").exists()


# What torchrun tells its ranks, set by hand, and words of the message.
HALF = [({"RANK": 0}, "RANK in, not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, unset RANK"),
        ({"WORLD_SIZE": 2}, "not RANK, unset WORLD_SIZE"),
        ({"LOCAL_RANK": 0}, "not RANK, unset LOCAL_RANK"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": 1}, "not RANK, unset MASTER_ADDR MASTER_PORT"),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}, "not MASTER_ADDR, MASTER_PORT")]
WHOLE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
WRONG = [({"RANK": 1}, "RANK=1, WORLD_SIZE=1"), ({"RANK": -1}, "RANK=-1"), ({"RANK": "first"}, "RANK=first"),
         ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
         ({"WORLD_SIZE": 0}, "WORLD_SIZE=0"), ({"MASTER_PORT": "http"}, "localhost:http, no store"),
         ({"MASTER_PORT": 99999}, "localhost:99999, no store")]


@pytest.mark.parametrize("environment, words", HALF + [(WHOLE | wrong, words) for wrong, words in WRONG])
def test_a_rank_that_is_told_half(environment, words, call, monkeypatch, tmp_path):
    parallel = load_chapter(CHAPTER).parallel.mesh
    monkeypatch.setattr(parallel, "tell_when_ended", lambda: None)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: pytest.fail("it has joined"))
    refuses(environment, "--steps 1", words, call, monkeypatch, tmp_path)


def refused(chapter, runs):
    """In each of two ranks: what train.py says about each of these runs."""
    return [message(chapter, sizes, *arguments) for sizes, arguments in runs]


def message(chapter, sizes, *arguments):
    try:
        train(chapter, 2, sizes, False, *arguments)
    except chapter.cli.InputError as error:
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


# ------------------------------------------------------------------------------------- ranks that do not train the same

SETTINGS = {"--seed": "0", "--steps": "8", "--learning-rate": "0.003", "--precision": "fp32", "--tp": "2",
            "--resume": "False", "device": "cpu"}


@pytest.mark.parametrize("name, other", [("--seed", "1"), ("--steps", "9"), ("--learning-rate", "0.001"),
                                         ("--precision", "bf16"),
                                         ("--tp", "1"), ("--resume", "True"), ("device", "cuda")])
def test_other_flags_on_one_rank_are_found_before_the_ranks_talk(name, other, monkeypatch):
    parallel, store = load_chapter(CHAPTER).parallel.mesh, torch.distributed.HashStore()
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: pytest.fail("it has joined"))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    messages, given = [], [SETTINGS, SETTINGS, SETTINGS | {name: other}]
    for rank, settings in enumerate(given):   # the others' are there already
        for number, text in enumerate(given):
            store.set(f"settings {number}", json.dumps(text))
        monkeypatch.setattr(parallel.dist, "rendezvous", lambda *_, _rank=rank, **__: iter([(store, _rank, 3)]))
        with pytest.raises(load_chapter(CHAPTER).cli.InputError) as error:
            parallel.join("gloo", settings)
        messages.append(str(error.value))
    assert set(messages) == {f"the ranks do not train the same: {name} is {SETTINGS[name]} on rank 0 and {other} on"
                             " rank 2; all need the same command, data and disk"}


def test_another_seed_on_one_rank_ends_the_run_with_one_line(torchrun, flags, tmp_path):
    broken = ("parse = chapter.train.parse_arguments\ndef other():\n    found = parse()\n    found.seed = rank\n"
              "    return found\n"
              "chapter.train.parse_arguments = other")
    run = torchrun(2, *flags, "--steps", 3, "--tp", 2, broken=broken)
    assert run.end() != 0
    (message,), traceback = run.told()
    assert "--seed is 0 on rank 0 and 1 on rank 1" in message and not traceback, run.text(1)
    assert not (tmp_path / "out").exists()


def differing(chapter, runs):
    """In each of two ranks: what train.py says about each of these runs; of each flag's values the rank's own."""
    rank = torch.distributed.get_rank()
    return [message(chapter, sizes, *[word if isinstance(word, str) else word[rank] for word in arguments])
            for sizes, arguments in runs]


def test_another_text_checkpoint_or_model_on_one_rank_is_refused_by_all(ranks, call, text_file, tmp_path):
    """Whatever is cut. Rank 1 is a machine where a file of that name has something else in it."""
    here, there, missing = [str(tmp_path / name) for name in ("here", "there", "missing")]
    other = tmp_path / "other" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text().replace("king", "kind"))
    flags, texts = ["--data", str(text_file), "--batch-tokens", "100", "--save-every",
                    "1"], [str(text_file), str(other)]
    for rank, steps in enumerate(("1", "2")):
        ranks(2, differing, [(SIZES, [*flags, "--steps", steps, "--out", (here, there)[rank]])])
    again = [*flags, "--steps", "3", "--resume", "--out"]
    init = [*flags, "--steps", "1", "--out", missing, "--init"]
    cases = [(layout, ["--data", texts, "--steps", "1", "--out", missing, *layout.split()],
              f"data is {text_file.name} with fingerprint")
             for layout in ("--dp 2", "--dp 2 --zero 3", "--tp 2", "--pp 2", "--cp 2")]
    cases += [("checkpoint", [*again, [here, there]], "checkpoint is of step 1 on rank 0 and of step 2 on rank 1"),
              ("none", [*again, [here, missing]], "checkpoint is of step 1 on rank 0 and missing on rank 1"),
              ("init", [*init, [here, there], "--tp", "2"], "sum of the weights")]
    first, second = ranks(2, differing, [(SIZES, arguments) for _, arguments, _ in cases])
    for case, mine, theirs in zip(cases, first, second):
        assert mine and case[2] in mine and theirs == mine, (case, mine, theirs)
    assert step(tmp_path / "here") == 1 and step(tmp_path / "there") == 2 and step(tmp_path / "missing") == -1
    # The same text under another name is the same text.
    copy = tmp_path / "copy" / text_file.name
    copy.parent.mkdir()
    shutil.copyfile(text_file, copy)
    assert ranks(2, differing, [(SIZES, ["--data", [str(text_file), str(copy)], "--steps", "1", "--out",
                                         missing])]) == [[None], [None]]


def drifting(chapter, text_file, folder, layouts):
    """In each of two ranks: what it says where rank 1 changes something that both hold, between two checkpoints."""
    rank, found, save = torch.distributed.get_rank(), {}, chapter.train.save_checkpoint
    for layout, name, what in layouts:
        def spoil(out, model, tokenizer, optimizer, state):
            for parameter in optimizer.parameters if rank == 1 and state["step"] == 2 else []:
                if parameter.piece.name == name:
                    with torch.no_grad():
                        (parameter if what == "weight" else optimizer.inner.state[parameter][what]).view(-1)[3] += 1e-3
            save(out, model, tokenizer, optimizer, state)
        out = folder / layout.replace(" ", "") / what
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chapter.train, "save_checkpoint", spoil)
            found[layout, what] = message(chapter, SIZES, "--data", str(text_file), "--batch-tokens", "100", "--steps",
                                          "3", "--save-every", "1",
                                          "--out", str(out), *layout.split()), step(out)
    return found


def test_ranks_that_have_drifted_apart_are_found_when_they_save(ranks, text_file, tmp_path):
    layouts = [("--dp 2", "model.layers.1.mlp.up_proj.weight", "weight"),
               ("--dp 2", "model.embed_tokens.weight", "exp_avg_sq"),
               ("--cp 2", "model.norm.weight", "weight"),
               ("--tp 2", "model.layers.0.self_attn.q_norm.weight", "weight"),
               ("--pp 2", "model.embed_tokens.weight", "weight")]
    first, second = ranks(2, drifting, text_file, tmp_path, layouts)
    assert first == second
    for layout, name, what in layouts:
        told, saved = first[layout, what]
        assert "ranks 0 and 1" in told and name in told and (what == "weight" or what in told), (layout, told)
        assert saved == 1   # what was saved before stays


# ------------------------------------------------------------------------------------------------ rank 0 takes its time

def slow(chapter, folder, text_file, patience):
    """In each of two ranks: a run in which writing, export and sample take longer than the ranks wait for each other
    otherwise.
    """
    rank = torch.distributed.get_rank()
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=patience),
                                                       torch.distributed.group.WORLD)

    def slowly(real, on, times):
        waits = [1.5 * patience] * times if rank == on else []

        def wait(*arguments, **named):
            time.sleep(waits.pop() if waits else 0)
            (folder / f"{len(waits)} left of {real.__name__}").touch()
            return real(*arguments, **named)
        return wait
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, on, times in ((chapter.parallel.checkpoint.Writer, "write_data", 1, 1),
                                       (chapter.parallel.checkpoint.Writer, "finish", 0, 1),
                                       (chapter.training_state, "export", 0, 1), (chapter.train, "write_sample", 0, 2)):
            patch.setattr(owner, name, slowly(getattr(owner, name), on, times))
        train(chapter, 2, SIZES, False, "--data", str(text_file), "--batch-tokens", "100", "--steps", "1",
              "--save-every", "1", "--out", str(folder))
    return sorted(path.name for path in folder.glob("0 left of *"))


def test_the_others_wait_for_rank_0_as_long_as_it_takes(ranks, text_file, tmp_path):
    """And nobody leaves before it is ready."""
    assert ranks(2, slow, tmp_path, text_file,
                 2) == [[f"0 left of {name}" for name in ("export", "finish", "write_data", "write_sample")]] * 2


ENDS = """
import time, types, torch, cli
from parallel.mesh import start_ranks

class Slow:   # Python ends slowly
    def __del__(self):
        print("Python ends")

def main():
    mesh = start_ranks("cpu", types.SimpleNamespace(dp=1, cp=1, pp=1, tp=1, ep=1))
    main.slow = Slow()
    print("trained")

cli.run(main)
"""


def test_a_rank_that_is_ready_leaves_before_python_ends(tmp_path):
    """One of gloo's threads may want to give back a tensor.

    Python at its end would stop it, and C++ then aborts the process.
    """
    done = warm.run("-c", ENDS, cwd=load_chapter(CHAPTER).folder,
                    env=os.environ | {name: str(value) for name, value in (WHOLE | {"MASTER_PORT": 0}).items()})
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")


def test_a_rank_that_dies_in_start_up(text_file, tmp_path):
    """Everything cold: torchrun and ranks as a reader starts them."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2",
               load_chapter(CHAPTER).folder / "train.py", "--dp", "2",
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
