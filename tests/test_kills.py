"""kill -9 at any instant of every script that writes: nothing lost, nothing half-written, nobody else's file touched.

    KILLS=1000 pytest tests/test_kills.py        so many in all, over all chapters; a handful if not given

A process is killed at its n-th operation on a file below its folder (Python's audit events name them all), or some
milliseconds later: then in the middle of a step, or of what Rust writes without telling Python. n is drawn, so that
start-up, loading, steps, saving, exporting and the end all get their share. What must hold after each kill and at the
end is in check() and the tests.
"""
import argparse
import collections
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import warm
from chapters import TRAINED, load_chapter, run_here, set_up
from test_elastic import torchrun   # noqa: F401, a fixture

KILLS = int(os.environ.get("KILLS", 0))
QUANTIZING = "chapter-07-quantization"
RANKS = [name for name in TRAINED if hasattr(load_chapter(name), "parallel")]
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def share(percent, handful):
    """How many of all kills a test gets."""
    return max(1, round(KILLS * percent / 100)) if KILLS else handful


# ------------------------------------------------------------------------------------------- the process to be killed

def make_small(patch, chapter):
    patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**TINY | chapter.sizes))


def arm(folder, log, n, delay):
    """Have this process note its operations on files below the folder in a log, and be killed at the n-th, `delay`
    seconds later.
    """
    notes, count = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), itertools.count(1)

    def watch(event, arguments):
        if not event.startswith(("open", "os.", "shutil.")) or not arguments:
            return
        path, inside = arguments[0], isinstance(arguments[-1],
                                                int) and arguments[-1] > 0 and event in ("os.remove", "os.rmdir")
        if not inside:   # else it is shutil.rmtree's, which names a file by its folder's number
            inside = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(folder))
        if inside:
            os.write(notes, f"{event} {path}\n".encode())
            if next(count) == n:
                # SIGALRM, which nobody here catches, ends a process as SIGKILL does, wherever it is.
                os.kill(os.getpid(), signal.SIGKILL) if not delay else signal.setitimer(signal.ITIMER_REAL, delay)
    sys.addaudithook(watch)


def main(folder, log, n, delay, name, script, *arguments):
    """What the process does: python tests/test_kills.py ..."""
    arm(folder, log, int(n), float(delay))
    chapter = load_chapter(name)
    module = getattr(chapter, script)
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch, module, *arguments)
        make_small(patch, chapter)
        module.run(module.main)


class Victim:
    """A script, run and killed again and again. counts: {phase: kills}; the operations of a run: to be known
    beforehand.
    """

    def __init__(self, folder, chapter, script, seed):
        self.folder, self.chapter, self.script = folder, chapter, script   # folder: where the script writes
        self.rng, self.counts, self.number = random.Random(seed), collections.Counter(), 0
        self.files = folder.parent / f"{script}-log", folder.parent / "output", folder.parent / "error"

    def kill(self, limit, *arguments, longest=0.05):
        """Run it and kill it at one of its first `limit` operations.

        Returns whether it was killed; else it came to its end.
        """
        log, *output = self.files
        log.unlink(missing_ok=True)
        delay = self.rng.choice([0, 0, self.rng.uniform(0, 0.003), self.rng.uniform(0, longest)])
        process = warm.start(__file__, self.folder, log, self.rng.randint(1, limit), delay,
                             self.chapter.folder.name, self.script,
                             *arguments, output=output, cwd=Path(__file__).parent)
        process.join(200)
        assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGALRM), (process.exitcode, output[1].read_text())
        if process.exitcode:
            self.counts[phase(self.folder, self.script, log.read_text().splitlines(), delay)] += 1
        return process.exitcode != 0

    def operations(self, *arguments):
        """How many operations on files a run has that nobody kills."""
        log, *output = self.files
        log.unlink(missing_ok=True)
        process = warm.start(__file__, self.folder, log, 0, 0, self.chapter.folder.name, self.script, *arguments,
                             output=output,
                             cwd=Path(__file__).parent)
        process.join(200)
        assert process.exitcode == 0, output[1].read_text()
        return len(log.read_text().splitlines())


def phase(folder, script, lines, delay):
    """What a killed process was doing, by the last operation that it has noted."""
    if script != "train":
        return "some time later" if delay > 0.003 else "at an operation"
    begun, last = any("tensorboard" in line for line in lines), lines[-1].partition(str(folder))[2]
    if delay > 0.003:
        return "some time later"
    if "tensorboard" in last:
        return "beginning"
    if "checkpoint" in last or not last:   # nothing: shutil.rmtree in a checkpoint that has been replaced
        return "saving" if begun else "loading"
    return "exporting" if last.strip("/") else "start-up"


# ------------------------------------------------------------------------------------------- what must hold

INSIDE = ("checkpoint.tmp/model.safetensors", "checkpoint.old", "model.tmp/config.json", "config.json.tmp",
          "model.safetensors.tmp",
          "tokenizer.json.tmp", "probe.tmp", "checkpoint.bak/state.json", "tensorboard/notes.txt", "notes.old")


def plant(out, inside=()):
    """Files of somebody else, in a folder and beside it, with names that a program may take for its own: {path: what it
    holds}.
    """
    beside = (f"{out.name}.tmp/config.json", f"{out.name}.old/model.safetensors", f"{out.name}.bak",
              f"{out.name[:-1]}", "model.safetensors",
              "Qwen3-0.old/config.json", "Qwen3-0.tmp")   # the last two: of Qwen3-0.6B without its suffix
    strangers = {path: f"somebody's {path.name}".encode() for path in [out / name for name in inside]
                 + [out.parent / name for name in beside]}
    for path, content in strangers.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return strangers


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untouched(strangers):
    for path, content in strangers.items():
        assert path.is_file() and path.read_bytes() == content, f"{path} was changed"


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def same(first, second):
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def same_model(chapter, folder, other):
    """The model files of two folders hold the same."""
    for name in chapter.checkpoint.MODEL_FILES:
        if name.endswith(".json"):
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    first, header = tensors(folder / "model.safetensors")
    second, other_header = tensors(other / "model.safetensors")
    same(first, second)
    assert header == other_header


def saved_step(chapter, out):
    """Of the last complete checkpoint, which must open; -1 if there is none."""
    folder = chapter.checkpoint.complete_checkpoint(out)
    if not folder:
        return -1
    if hasattr(chapter, "parallel"):
        chapter.parallel.checkpoint.gather_model(folder)
        return chapter.parallel.checkpoint.read_state(folder)["step"]
    model, _ = chapter.checkpoint.load_model(folder)
    settings = json.loads((folder / "state.json").read_text())["settings"]
    budget = argparse.Namespace(steps=1, minutes=None, learning_rate=1e-3)
    return chapter.training_state.load_training_state(folder, chapter.make_optimizer(model), settings, budget)["step"]


def check(chapter, out, before, origins):
    """After a kill. before: the step saved at the kill before; origins: finished runs of which the files beside the
    checkpoint may be.

    Returns the step that is saved now.
    """
    step = saved_step(chapter, out)
    assert step >= before, f"step {before} was saved, and now {step}"
    if (out / "model.safetensors").exists():
        chapter.checkpoint.load_model(out)   # the weights know their tokenizer
        files = [name for name in chapter.checkpoint.MODEL_FILES if name.endswith(".json")]
        of = [[(out / name).read_bytes() == (origin / name).read_bytes() for origin in origins] for name in files]
        assert any(map(all, zip(*of))), f"{files} are not of one model: {of}"
    return step


# ------------------------------------------------------------------------------------------- training

FLAGS = {"chapter-01-foundations": [[], ["--tokenizer", "bpe"]],
         "chapter-04-mixed-precision": [[], ["--precision", "bf16-pure"], ["--precision", "fp16", "--accumulate", 2]],
         QUANTIZING: [[], ["--qat", "int8"]]}
STEPS = 8


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """With other characters than text_file, so that all tokenizers differ."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("\n\n".join(f"{i}: {'xyz+-' * (i % 7 + 1)}" for i in range(200)))
    return path


def test_training(chapter, text_file, other_text, tmp_path, monkeypatch, record_property):
    """Runs that are killed several times, in a new folder or in that of another model, end as the one that nobody
    kills.
    """
    make_small(monkeypatch, chapter)
    kills, victims = share(9, 2), []
    options = FLAGS.get(chapter.folder.name, [[]])
    for episode in itertools.count():
        left = kills - sum(victim.counts.total() for victim in victims)
        if left <= 0:
            break
        flags = ["--data", text_file, *chapter.quick, *options[episode % len(options)], "--steps", STEPS,
                 "--save-every", 1]
        whole = tmp_path / f"whole{episode % len(options)}"
        if not whole.exists():
            run_here(chapter.train, *flags, "--out", whole)
        folder = tmp_path / str(episode)
        out, used = folder / "out", episode % 3 == 1
        if used:   # holds another model, which a run without --resume replaces
            run_here(chapter.train, "--data", other_text, *chapter.quick, "--steps", 1, "--out", out)
            run_here(chapter.train, "--data", other_text, *chapter.quick, "--steps", 1, "--out", tmp_path / "other")
        strangers = plant(out, INSIDE)
        victim, step = Victim(out, chapter, "train", f"{chapter.folder.name} {episode}"), -1
        victims.append(victim)
        for _ in range(min(left, 6)):
            mine = not used or saved_data(chapter, out) == str(text_file)
            killed = victim.kill(90, *flags, "--out", out, *["--resume"] * mine)
            step = check(chapter, out, step if mine else -1, [whole] + [tmp_path / "other"] * used)
            untouched(strangers)
            if not killed:
                break
        resume = ["--resume"] if not used or saved_data(chapter, out) == str(text_file) else []
        run_here(chapter.train, *flags, "--out", out, *resume)
        untouched(strangers)
        for path in strangers:
            path.unlink()
        same(saved_tensors(whole), saved_tensors(out))
        same_model(chapter, out, whole)
        first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, out))
        assert all(first[key] == second[key] for key in ("tokens", "steps", "val_bits_per_byte", "flops_per_token"))
        assert {path.name for path in contents(out) if "tfevents" not in path.name} \
            == {path.name for path in contents(whole) if "tfevents" not in path.name}
        assert not any(path.is_file() for path in folder.iterdir() if path.name not in ("train-log", "output", "error"))
    record(record_property, chapter, "train", victims)


def saved_tensors(out):
    return {name: value for path in (out / "checkpoint").glob("*.safetensors")
            for name, value in load_file(path).items()}


def saved_data(chapter, out):
    """--data of the run whose checkpoint is there."""
    folder = chapter.checkpoint.complete_checkpoint(out)
    return folder and json.loads((folder / "state.json").read_text())["settings"]["data"]


def record(record_property, chapter, script, victims):
    """For the lines at the end, see conftest.py."""
    counts = sum((victim.counts for victim in victims), collections.Counter())
    record_property("kills", (f"{chapter.folder.name} {script}", dict(counts)))


# ------------------------------------------------------------------------------------------ quantize.py and generate.py

METHODS = [["int8"], ["int4-gptq", "--group", 16], ["int8-outliers"], ["int4-awq", "--group", 16]]


def test_quantizing(text_file, tmp_path, monkeypatch, record_property):
    """The folder is what it was, or all of the new model; the source and others' files are what they were."""
    chapter = load_chapter(QUANTIZING)
    make_small(monkeypatch, chapter)
    source = tmp_path / "source"
    run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 1, "--out", source)
    flags = [["--checkpoint", source, "--data", text_file, "--calibration-tokens", 300, "--method", *method]
             for method in METHODS]
    whole = [tmp_path / f"whole{i}" for i in range(len(flags))]
    for command, folder in zip(flags, whole):
        run_here(chapter.quantize, *command, "--out", folder)
    kills, victims, before = share(14, 3), [], contents(source)
    for episode in itertools.count():
        left = kills - sum(victim.counts.total() for victim in victims)
        if left <= 0:
            break
        chosen, earlier = episode % len(flags), (episode + 1) % len(flags)
        out = tmp_path / str(episode) / ("Qwen3-0.6B-int4" if episode % 2 else "out")
        replaces = episode % 3 == 1
        if replaces:
            run_here(chapter.quantize, *flags[earlier], "--out", out)
        strangers = plant(out)
        victim = Victim(out, chapter, "quantize", f"quantize {episode}")
        victims.append(victim)
        counted = out.with_name("count")
        limit = Victim(counted, chapter, "quantize", 0).operations(*flags[chosen], "--out", counted)
        for _ in range(min(left, 6)):
            killed = victim.kill(limit, *flags[chosen], "--out", out, longest=0.5)
            found = [folder for folder in [whole[chosen]] + [whole[earlier]] * replaces
                     if is_same_model(chapter, out, folder)]
            assert found or not (out
                                 / "model.safetensors").exists(), f"{out} holds neither model: {contents(out).keys()}"
            untouched(strangers | before)
            if not killed:
                break
        run_here(chapter.quantize, *flags[chosen], "--out", out)
        untouched(strangers | before)
        same_model(chapter, out, whole[chosen])
        assert {path.name for path in out.iterdir()} == {path.name for path in whole[chosen].iterdir()}
        left = {path.name for path in out.parent.iterdir()} - {"quantize-log", "output", "error", "count", out.name}
        assert left == {path.relative_to(out.parent).parts[0] for path in strangers}
    record(record_property, chapter, "quantize", victims)


def is_same_model(chapter, folder, other):
    try:
        same_model(chapter, folder, other)
    except (AssertionError, FileNotFoundError):
        return False
    return True


def test_generating_writes_nothing(chapter, trained, tmp_path, record_property):
    before = contents(trained)
    victim = Victim(trained, chapter, "generate", chapter.folder.name)
    victim.files = tmp_path / "log", tmp_path / "output", tmp_path / "error"
    for _ in range(share(0.7, 1)):
        victim.kill(4, "ROMEO:", 50, "--checkpoint", trained, longest=0.3)
    assert contents(trained) == before
    record(record_property, chapter, "generate", [victim])


# ------------------------------------------------------------------------------------------- several ranks

LAYOUTS = ["--dp 2 --zero 3", "--pp 2 --accumulate 2", "--tp 2", "--dp 2 --precision bf16-pure"]
# Runs in each rank before train.py: the one that is chosen for this start arms itself.
ARMED = """
import test_kills
victims = {victims}
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if start < len(victims) and rank == victims[start][0]:
    test_kills.arm({out!r}, {out!r} + f".log{{start}}", *victims[start][1:])
"""


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name, torchrun, text_file, tmp_path, record_property, monkeypatch):
    """torchrun starts all ranks again when one is killed, and at the end there is what a run without a kill leaves."""
    chapter, victims = load_chapter(name), []
    monkeypatch.setenv("CHAPTER", name)
    kills = share(7, 0)
    if not kills:
        pytest.skip("a few ranks are killed in test_elastic.py, and here with KILLS=1000")
    for episode in itertools.count():
        left = kills - sum(victim.counts.total() for victim in victims)
        if left <= 0:
            break
        layout = LAYOUTS[episode % len(LAYOUTS)].split()
        flags = ["--data", text_file, "--batch-tokens", 128, "--save-every", 1, "--steps", STEPS, *layout]
        whole, out = tmp_path / f"whole{episode % len(LAYOUTS)}", tmp_path / str(episode) / "out"
        runs = [] if whole.exists() else [torchrun(2, *flags, "--out", whole)]
        victim, strangers = Victim(out, chapter, "train", f"{name} {episode}"), plant(out, INSIDE)
        victims.append(victim)
        # A save is some forty operations of rank 0, and one of rank 1.
        plan = [(rank, victim.rng.randint(1, (60, 2)[rank]),
                 victim.rng.choice([0, victim.rng.uniform(0, (0.05, 0.3)[rank])]))
                for rank in victim.rng.choices([0, 1], k=6)]
        runs.append(torchrun(2, *flags, "--out", out, "--resume", restarts=len(plan),
                             broken=ARMED.format(victims=plan, out=str(out))))
        for run in runs:
            run.process.join(900)   # six starts more than the others have
            assert run.end() == 0, run.text(1)
        untouched(strangers)
        for path in strangers:
            path.unlink()
        assert saved_step(chapter, out) == STEPS
        same(saved_tensors(whole), saved_tensors(out))
        same_model(chapter, out, whole)
        assert {path.name for path in contents(out) if "tfevents" not in path.name} \
            == {path.name for path in contents(whole) if "tfevents" not in path.name}
        for start, (_, n, delay) in enumerate(plan):
            lines = Path(f"{out}.log{start}").read_text().splitlines() if Path(f"{out}.log{start}").exists() else []
            if len(lines) >= n:   # else it had ended before
                victim.counts[phase(out, "train", lines, delay)] += 1
    record(record_property, chapter, "torchrun", victims)


if __name__ == "__main__":
    main(*sys.argv[1:])
