"""Every chapter's train.py: the loop, its numbers, and a resume that continues bit for bit."""
import argparse
import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chapters import TRAINED, load_chapter, run_here

SETTINGS = {"documents": "", "data": "", "init": None}   # of a run that is saved without train.py
SUMMARY_KEYS = ("chapter config parameters data steps tokens wall_seconds tokens_per_second peak_memory_bytes val_loss "
                "val_bits_per_byte flops_per_token mfu device device_name dtype torch seed").split()


def weights(out):
    """All that is saved of a run in tensors, the optimizer's and the random state too."""
    return {name: value for path in (out / "checkpoint").glob("*.safetensors")
            for name, value in load_file(path).items()}


def assert_same_run(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between {a} and {b}"


def test_the_default_run_starts_and_resumes(chapter, tmp_path, text_file):
    """As a reader types it, in a process of its own; only the data and the budget are small."""
    done = chapter.run("train.py", "--data", text_file, "--steps", 4, "--out", tmp_path)
    assert "bits per byte" in done.stdout and chapter.filling in done.stderr and "4/4" in done.stderr
    device = next(line for line in done.stdout.splitlines() if line.startswith("device "))
    assert "attention" in device and "float" in device, device
    printed = run_here(chapter.train, "--data", text_file, "--steps", 6, "--out", tmp_path, "--resume")
    assert "resuming after step 4" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
    written = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "checkpoint", "tensorboard"} <= written


def test_summary_has_the_keys_that_all_chapters_share(chapter, trained, text_file):
    summary = json.loads((trained / "summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS
    assert summary["chapter"] == chapter.folder.name and summary["data"] == str(text_file) and summary["steps"] == 3
    assert summary["val_bits_per_byte"] > 0 and summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 1e7
    model, tokenizer = chapter.checkpoint.load_model(trained)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    _, val_documents = chapter.data.load_documents(text_file)
    assert summary["val_bits_per_byte"] == pytest.approx(chapter.evaluate(model, val_documents, tokenizer)[1], rel=0.01)


def test_tensorboard_holds_scalars_samples_and_hyperparameters(chapter, tmp_path, text_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 4, "--save-every", 2, "--out", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    tags = events.Tags()
    assert "sample/text_summary" in tags["tensors"] and "_hparams_/experiment" in events.summary_metadata


@pytest.mark.reaches("progress")
def test_curves_go_on_where_the_run_does(chapter, tmp_path):
    """A run that was killed in step 6 and goes on after step 4, the last that was saved: each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for done, end in ((0, 6), (4, 8)):
        with chapter.progress.Progress(tmp_path, 8, done) as progress:
            for step in range(done + 1, end + 1):
                progress.step(step, {}, {"loss": 10 * done + step})
        progress.writer.close()
        time.sleep(0 if done else 1.1)   # of two files of the same second one does not know which is the later one
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 45), (6, 46), (7, 47), (8, 48)]


def test_bits_per_byte_counts_every_token_and_byte_once(chapter, text_file):
    """evaluate() against one document at a time, without padding, packing or batches."""
    documents = chapter.data.read_text(text_file)[:40] + ["".join(random.Random(0).choices("xyz?! 0123", k=300))]
    tokenizer = chapter.make_tokenizer(documents)
    model = chapter.make_model(tokenizer, max_position_embeddings=64)
    assert len(tokenizer.encode(documents[-1])) > 64   # longer than the context
    nats = tokens = 0
    for document in documents:
        ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(document), tokenizer.end_of_text])
        for start in range(0, len(ids) - 1, 64):
            inputs, targets = ids[:-1][start:start + 64], ids[1:][start:start + 64]
            nats -= chapter.logits(model, inputs.tolist()).log_softmax(-1).gather(1, targets[:, None]).sum().item()
            tokens += len(targets)
    assert tokens == sum(len(tokenizer.encode(document)) + 1 for document in documents)
    per_token, bits = chapter.evaluate(model, documents, tokenizer)
    assert per_token == pytest.approx(nats / tokens, rel=1e-5)
    size = len("\n\n".join(documents).encode())
    assert bits == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)


def test_schedule(chapter):
    values = [chapter.train.schedule(i / 1000) for i in range(1000)]
    assert 0 < values[0] < 0.05 and max(values) == pytest.approx(1) and values[50] == pytest.approx(1)
    assert values[50:] == sorted(values[50:], reverse=True) and values[-1] == pytest.approx(chapter.last_rate, abs=1e-3)


def test_weight_decay_is_for_matrices_only(chapter, text_file):
    model = chapter.make_model(chapter.make_tokenizer(chapter.data.read_text(text_file)))
    groups = chapter.train.adamw(model, 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [chapter.weight_decay, 0.0]
    assert all(parameter.dim() == 2 for parameter in groups[0]["params"])
    assert all(parameter.dim() == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


class Killed(BaseException):
    """Ends a run where kill -9 would: no handler may catch it on the way."""


# Chapter 1 alone has dropout: a random state that training itself depends on.
RUNS = [pytest.param(name, {}, (), id=name) for name in TRAINED]
RUNS += [pytest.param(name, {"dropout": 0.2}, (), id=f"{name}-dropout") for name in TRAINED
         if name.startswith("chapter-01")]
# From chapter 4 on rounding is random, and a scale and packs in flight have to be remembered. Packs are small there: a
# CPU needs long for products of few bits.
RUNS += [pytest.param(name, {}, flags, id=f"{name}-{flags[1]}") for name in TRAINED
         if hasattr(load_chapter(name), "precision")
         for flags in (("--precision", "bf16-pure", "--batch-tokens", 128),
                       ("--precision", "fp16", "--batch-tokens", 128, "--accumulate", 2, "--checkpointing",
                        "selective"))]


@pytest.mark.parametrize("name, changes, flags", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(name, changes, flags, tmp_path, text_file, monkeypatch):
    """N steps = k steps, killed, resumed: weights, optimizer, order of the data and random state.

    Three kills in a row.
    """
    chapter = load_chapter(name)
    monkeypatch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**{
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        **chapter.sizes, **changes}))
    text = tmp_path / "play.txt"   # so short that the order of the data changes on the way
    text.write_text("\n\n".join(chapter.data.read_text(text_file)[:50]))
    run = ["--data", text, *chapter.quick, *flags, "--steps", 24, "--save-every", 4]
    run_here(chapter.train, *run, "--out", tmp_path / "whole")
    adamw = chapter.train.adamw
    for attempt, survives in enumerate([6, 9, 5, 99]):
        def dying(*args):
            optimizer, steps = adamw(*args), []

            def count(*_):
                steps.append(1)
                if len(steps) > survives:
                    raise Killed
            optimizer.register_step_pre_hook(count)
            return optimizer
        monkeypatch.setattr(chapter.train, "adamw", dying)
        try:
            run_here(chapter.train, *run, "--out", tmp_path / "killed", "--resume")
        except Killed:
            assert attempt < 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "killed"))
    assert all(whole[key] == killed[key] for key in ("tokens", "steps", "val_bits_per_byte", "flops_per_token"))
    _, tokenizer = chapter.checkpoint.load_model(tmp_path / "whole")
    epoch = sum(len(tokenizer.encode(document)) + 1 for document in chapter.data.load_documents(text)[0])
    assert whole["tokens"] > 1.2 * epoch


def test_a_resume_with_a_larger_budget_says_how_the_learning_rate_jumps(chapter, tmp_path, text_file):
    run = ["--data", text_file, *chapter.quick, "--learning-rate", 3e-3, "--out", tmp_path]
    run_here(chapter.train, *run, "--steps", 6)
    assert "jumps" not in run_here(chapter.train, *run, "--steps", 6, "--resume")
    printed = run_here(chapter.train, *run, "--steps", 12, "--resume")
    line = next(line for line in printed.splitlines() if "jumps" in line)
    before, now = (3e-3 * chapter.train.schedule(share) for share in (1, 6 / 12))
    assert f"from {before:.2g} to {now:.2g}" in line and "100% to 50%" in line
    assert now == pytest.approx({0.0: 0.0016, 0.1: 0.0018}[chapter.last_rate], rel=0.03)


def test_a_run_that_diverges_keeps_the_checkpoint_before(chapter, tmp_path, text_file, monkeypatch):
    run = ["--data", text_file, *chapter.quick, "--save-every", 2, "--out", tmp_path]
    run_here(chapter.train, *run, "--steps", 2)
    clip = getattr(torch.nn.utils, chapter.clip)
    monkeypatch.setattr(torch.nn.utils, chapter.clip,
                        lambda parameters, limit, *norm: clip(parameters, float("nan"), *norm))
    with pytest.raises(chapter.cli.InputError, match="diverged"):
        run_here(chapter.train, *run, "--steps", 4, "--resume")
    monkeypatch.undo()
    run_here(chapter.train, *run, "--steps", 4, "--resume")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4


def killed_at_every_instant(monkeypatch, operations, folder, save, found):
    """Kill save(out, step) before each of its operations on the disk in turn: found(out) is the old step or the new."""
    outcomes = []
    for survives in range(100):
        out = folder / str(survives)
        save(out, 1)
        calls = []
        with monkeypatch.context() as patch:
            for owner, name in operations:
                def counting(*args, _real=getattr(owner, name), **kwargs):
                    calls.append(1)
                    if len(calls) > survives:
                        raise Killed
                    return _real(*args, **kwargs)
                patch.setattr(owner, name, counting)
            try:
                save(out, 2)
                finished = True
            except BaseException as error:   # DCP wraps even this
                assert "Killed" in repr(error)
                finished = False
        outcomes.append(found(out))
        save(out, 3)   # and the next save is not confused by what the killed one left behind
        assert found(out) == 3
        if finished:
            break
    assert finished and outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2 and len(outcomes) > 10


def test_a_complete_checkpoint_exists_at_every_instant(chapter, tmp_path, text_file, monkeypatch):
    """Kill save_checkpoint before each operation on the disk in turn: what is found is whole, and either old or new."""
    checkpoint = chapter.checkpoint
    if "model.safetensors" not in chapter.saved:
        pytest.skip("test_sharded_checkpoint.py has one of its own")
    tokenizer = chapter.make_tokenizer(chapter.data.read_text(text_file))
    model = chapter.make_model(tokenizer, num_hidden_layers=1)
    optimizer, state = chapter.make_optimizer(model), chapter.training_state
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.inner.step()   # now it has moments to save

    def save(out, step):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        state.save_checkpoint(out, model, tokenizer, optimizer, {"step": step, "settings": SETTINGS})

    def found(out):
        folder = checkpoint.complete_checkpoint(out)
        loaded, _ = checkpoint.load_model(folder)
        step = state.load_training_state(folder, chapter.make_optimizer(loaded), SETTINGS,
                                         argparse.Namespace(steps=3, minutes=None))["step"]
        assert loaded.model.norm.weight[0] == step, "weights and state are of different steps"
        return step

    operations = [(module, "save_file") for module in (checkpoint, state, getattr(chapter, "pretrained", None))
                  if hasattr(module, "save_file")]
    operations += [(checkpoint.os, "fsync"), (checkpoint.os, "replace"), (Path, "rename"), (Path, "write_text"),
                   (Path, "mkdir"), (checkpoint.shutil, "rmtree"), (checkpoint.shutil, "copyfile")]
    killed_at_every_instant(monkeypatch, operations, tmp_path, save, found)
