"""Chapter 6's train.py in every layout: the same losses, gradient norms and weights as chapter 5's, whatever is cut.

accumulate x dp is 4 in all of them, so that all take the same steps: packs of different lengths, shared out over the
ranks.
"""
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from chapters import load_chapter, run_here
from ranks import CHAPTER

SIZES = dict(vocab_size=301, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=8,
             num_key_value_heads=4,
             head_dim=8)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
STEPS = 4

BEFORE = "chapter-05-kv-cache"
LAYOUTS = ["--dp 1", "--dp 2", "--cp 2", "--pp 2", "--pp 2 --schedule gpipe", "--tp 2"]
LAYOUTS += [f"--dp 2 --zero {stage}" for stage in (1, 2, 3)]
LAYOUTS += ["--dp 2 --zero torch", "--cp 2 --zero 3", "--dp 2 --precision bf16"]
LAYOUTS += ["--dp 4 --zero 3", "--tp 4", "--cp 4", "--pp 4", "--dp 2 --tp 2", "--dp 2 --pp 2",
            "--dp 2 --cp 2 --zero 3", "--tp 2 --pp 2",
            "--dp 2 --pp 2 --zero torch", "--cp 2 --tp 2", "--cp 2 --pp 2 --zero 1", "--dp 2 --tp 2 --zero 3",
            "--dp 2 --pp 2 --zero 2 --checkpointing full"]
MIXED = ["--dp 1", "--dp 2", "--dp 2 --ep 2", "--dp 4 --ep 2 --zero 3", "--dp 4 --ep 4", "--dp 2 --ep 2 --pp 2",
         "--cp 2 --zero 3"]


def world(layout):
    """Ranks that a layout needs."""
    words = layout.split()
    sizes = [int(words[words.index(flag) + 1]) for flag in ("--dp", "--cp", "--pp", "--tp") if flag in words]
    return torch.tensor(sizes).prod().item()


def flags(layout):
    words = layout.split()
    dp = int(words[words.index("--dp") + 1]) if "--dp" in words else 1
    return [*words, "--accumulate", str(4 // dp)]


class Recorder:
    """In the place of tensorboard's writer: remembers the scalars."""
    scalars = []

    def __init__(self, *_, **__):
        Recorder.scalars = []

    def add_scalar(self, name, value, step):
        Recorder.scalars.append((name, step, float(value)))

    def __getattr__(self, name):
        return lambda *_, **__: None


class Stopped(BaseException):
    """Ends a run after its first checkpoint."""


def train(chapter, size, sizes, stop, *arguments):
    """In a rank: train.py with the model of these sizes; with stop only up to its first checkpoint.

    Returns [(name, step, value)].
    """
    with pytest.MonkeyPatch.context() as patch:
        if size > 1:   # this process is a rank already
            rank = torch.distributed.get_rank()
            patch.setattr(chapter.parallel.mesh, "join", lambda *_: None)
            patch.setattr(chapter.parallel.mesh, "tell_when_ended", lambda: None)
            patch.setattr(chapter.parallel.mesh.atexit, "register", lambda *_: None)
            for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost",
                                "MASTER_PORT": 0}.items():
                patch.setenv(name, str(value))
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(chapter.progress, "SummaryWriter", Recorder)
        patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**sizes))
        if stop:
            save = chapter.train.save_checkpoint

            def last(*args):
                save(*args)
                raise Stopped
            patch.setattr(chapter.train, "save_checkpoint", last)
        try:
            run_here(chapter.train, *arguments)
        except Stopped:
            assert stop
    return Recorder.scalars


def run(ranks, layout, sizes, text_file, out, *more, stop=False, chapter=CHAPTER):
    """(losses, gradient norms) of a run of STEPS steps."""
    size = world(layout)
    arguments = ["--data", str(text_file), "--batch-tokens", "100", "--steps", str(STEPS), "--out", str(out),
                 *flags(layout), *more]
    if size > 1:
        scalars = ranks(size, train, size, sizes, stop, *arguments)[0]
    else:
        scalars = train(load_chapter(chapter), size, sizes, stop, *arguments)
    return [[value for name, _, value in scalars if name == f"train/{what}"] for what in ("loss", "gradient_norm")]


@pytest.fixture(scope="module")
def reference(ranks, text_file, tmp_path_factory):
    """One process, and as long as there are no experts, the chapter before: {kind of model: (losses, norms, folder,
    sizes)}.
    """
    found = {}
    for name, sizes in (("dense", SIZES), ("untied", SIZES | {"tie_word_embeddings": False}), ("mixed", SIZES | MOE)):
        out = tmp_path_factory.mktemp(name)
        flags, chapter = ("--dp 1", CHAPTER) if name == "mixed" else ("", BEFORE)
        found[name] = *run(ranks, flags, sizes, text_file, out, chapter=chapter), out, sizes
    return found


def check(ranks, layout, kind, reference, text_file, out):
    losses, norms, expected, sizes = reference[kind]
    found = run(ranks, layout, sizes, text_file, out)
    loose = 100 if "bf16" in layout else 1
    assert len(losses) == STEPS
    assert found[0] == pytest.approx(losses, rel=1e-5 * loose), layout
    assert found[1] == pytest.approx(norms, rel=1e-4 * loose), layout
    bits = [json.loads((folder / "summary.json").read_text())["val_bits_per_byte"] for folder in (expected, out)]
    assert bits[1] == pytest.approx(bits[0], rel=1e-4 * loose)
    if loose == 1:
        whole, mine = (load_file(folder / "model.safetensors") for folder in (expected, out))
        assert whole.keys() == mine.keys()
        for name in whole:   # AdamW divides by the gradient's size: where that is next to nothing its rounding counts
            assert (whole[name] - mine[name]).abs().max() < 2e-4, f"{layout}: {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_steps(layout, ranks, reference, text_file, tmp_path):
    check(ranks, layout, "dense", reference, text_file, tmp_path)


@pytest.mark.parametrize("layout", MIXED[1:])
def test_and_with_experts(layout, ranks, reference, text_file, tmp_path):
    check(ranks, layout, "mixed", reference, text_file, tmp_path)


@pytest.mark.parametrize("layout", ["--pp 2", "--tp 2", "--dp 2 --tp 2 --zero 3"])
def test_and_with_a_head_of_its_own(layout, ranks, reference, text_file, tmp_path):
    check(ranks, layout, "untied", reference, text_file, tmp_path)


@pytest.mark.parametrize("first, second", [("--dp 2 --tp 2", "--dp 2"), ("--dp 4 --zero 3", "--dp 2 --zero 3"),
                                           ("--tp 2 --pp 2", "--dp 1"),
                                           ("--dp 1", "--dp 2 --pp 2"), ("--dp 2 --zero 1", "--cp 2"),
                                           ("--dp 2", "--dp 2 --zero 1"),
                                           ("--cp 2", "--dp 2 --zero 2")])
def test_a_run_goes_on_in_another_layout(first, second, ranks, reference, text_file, tmp_path):
    losses, norms, _, sizes = reference["dense"]
    before = run(ranks, first, sizes, text_file, tmp_path, "--save-every", "2", stop=True)
    after = run(ranks, second, sizes, text_file, tmp_path, "--resume")
    assert len(before[0]) == len(after[0]) == 2
    assert before[0] + after[0] == pytest.approx(losses, rel=1e-5)
    assert before[1] + after[1] == pytest.approx(norms, rel=1e-4)


def saved(chapter, *arguments):
    """In a rank: train(), and {piece: its bytes} of the last checkpoint."""
    held = {}
    save = chapter.train.save_checkpoint

    def remember(out, model, tokenizer, optimizer, state):
        held.update({(p.piece.name, p.piece.offset, p.shape): p.detach().view(torch.int16).numpy().tobytes()
                     for p in optimizer.parameters})
        save(out, model, tokenizer, optimizer, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter.train, "save_checkpoint", remember)
        train(chapter, *arguments)
    return held


@pytest.mark.parametrize("first, second", [("--pp 2", "--dp 2"), ("--dp 2 --zero 1", "--cp 2")])
def test_replicas_round_alike_after_any_resume(first, second, ranks, text_file, tmp_path):
    """bf16-pure rounds by chance, and ranks of another layout have drawn differently."""
    sizes = SIZES | {"tie_word_embeddings": False}
    common = ["--data", str(text_file), "--batch-tokens", "100", "--steps", "4", "--save-every", "2", "--out",
              str(tmp_path),
              "--precision", "bf16-pure", "--resume"]
    ranks(2, train, 2, sizes, True, *common, *flags(first))
    one, other = ranks(2, saved, 2, sizes, False, *common, *flags(second))
    assert one.keys() == other.keys() and all(one[piece] == other[piece] for piece in one)


def test_ranks_that_would_round_differently_are_refused(ranks, text_file, tmp_path):
    with pytest.raises(AssertionError, match="InputError: --precision bf16-pure rounds by chance"):
        ranks(2, train, 2, SIZES, False, "--data", str(text_file), "--out", str(tmp_path), "--tp", "2",
              "--precision", "bf16-pure")
