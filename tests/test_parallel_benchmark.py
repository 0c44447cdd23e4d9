"""Chapter 6's benchmark: the whole command with a tiny model.

What it counts is what the formulas say; time is not looked at.
"""
import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from chapters import expect_error, load_chapter, run_here

CHAPTER = load_chapter("chapter-06-parallelism")
benchmark = CHAPTER.benchmark_layouts
SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)


def work(chapter, results, arguments):
    """benchmark.work in a process that is a rank already. Returns what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(chapter.results, "RESULTS", Path(results))
        patch.setattr(chapter.benchmark_layouts.dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(chapter.benchmark_layouts.dist, "destroy_process_group", lambda *_: None)
        patch.setattr(chapter.benchmark_layouts.os, "cpu_count", lambda: 1)   # pytest's other workers want the rest
        patch.setattr(chapter.benchmark_layouts, "STEPS", 2)
        patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**SIZES))
        chapter.benchmark_layouts.work(torch.distributed.get_rank(), *arguments)
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(ranks, text_file, tmp_path_factory):
    """(what rank 0 printed, {way: its row}) of the command; the processes are those of the other tests."""
    results, printed = tmp_path_factory.mktemp("results"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHAPTER.model.CONFIGS, "small", CHAPTER.model.ModelConfig(**SIZES))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(benchmark.mp, "spawn",
                      lambda _, args, nprocs: printed.extend(ranks(nprocs, work, str(results), args)))
        run_here(benchmark, "--data", text_file, "--batch-tokens", "64", "--rounds", "1", "--device", "cpu")
    rows = json.loads((results / "ways_small_cpu_2.json").read_text())["rows"]
    return printed[0], {row["way"]: row for row in rows}


def test_every_way_finds_the_losses_of_one_process(finished):
    printed, rows = finished
    assert list(rows) == [way.name for way in benchmark.LAYOUTS]
    losses = {name: next([float(word) for word in line.split()[-3:]] for line in printed.splitlines()
                         if line.startswith(f"    {name} ")) for name in rows}
    expected = losses[benchmark.ONE]
    assert expected == sorted(set(expected), reverse=True)   # it learns
    for name, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-5), name


def test_bytes_and_memory_as_predicted(finished):
    _, rows = finished
    for name, row in rows.items():
        assert row["held"] == row["predicted"], name
        assert row["ms"] > 0 and row["tokens_per_second"] > 0
        if row["by"] != "torch":
            assert row["counted"] == row["formula"], name
        if benchmark.NET.is_file():   # other tests talk too, so it can only be more
            assert row["wire"] >= 0.999 * row.get("formula", 0), name
    assert rows["pipeline, 1F1B"]["peak"] < rows["pipeline, GPipe"]["peak"]
    assert rows["tensor parallel, sequence"]["peak"] < rows["tensor parallel, plain"]["peak"]


def test_more_stages_than_two():
    """Busiest is one in the middle, and fullest one with a table; with two all stages are ends."""
    config = CHAPTER.model.ModelConfig(num_hidden_layers=8, tie_word_embeddings=False)
    way = next(way for way in benchmark.LAYOUTS if way.name == "pipeline, 1F1B")
    sent, _ = benchmark.predict(way, config, 4, 8, 100)
    assert sent == 2 * 8 * 100 * config.hidden_size * 4 + 2 * 6   # x on and its gradient back; the loss and the norm


REFUSED = [(("--ranks", 1), ["--ranks 1"]), (("--batch-tokens", 1022), ["1022", "multiple of 4"]),
           (("--ranks", 4), ["2 key-value heads"]), (("--config", "small-moe"), ["small-moe"])]


@pytest.mark.parametrize("arguments, words", REFUSED)
def test_what_cannot_be_compared_is_refused(arguments, words, call):
    expect_error(call(benchmark, "--device", "cpu", *arguments), *words)


def test_a_gpu_for_each_rank(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    expect_error(call(benchmark, "--device", "cuda"), "--ranks 2", "here there are 1")
