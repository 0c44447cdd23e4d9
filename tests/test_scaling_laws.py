"""Chapter 3's scaling_laws.py and pretrain_124m.py: the fit finds a law that is there, a run is what it says, and what
was killed goes on. What the runs teach is not tested: the command measures it.
"""
import json
import os
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import warm
from chapters import expect_error, load_chapter

chapter3 = load_chapter("chapter-03-profiling")
scaling, pretrain = chapter3.scaling_laws, chapter3.pretrain_124m
Law, Trial = scaling.Law, scaling.Trial
# Hoffmann et al. 2022, Besiroglu et al. 2024, and one of our size.
LAWS = [Law(1.69, 406.4, 0.34, 410.7, 0.28), Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658), Law(0.7, 60, 0.5, 400, 0.5)]


def sizes():
    """Parameters and tokens of the runs that are fitted."""
    return (np.array(values, dtype=float) for values in zip(*(
        (scaling.num_parameters(trial.config), trial.tokens) for trial in scaling.FITTED)))


# ---------------------------------------------------------------------------------------------------------- the fit

@pytest.mark.parametrize("law", LAWS)
def test_the_fit_finds_the_law_that_made_the_losses(law):
    N, D = sizes()
    found = scaling.fit(N, D, law(N, D))
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02), name
    assert found(1e9, 1e11) == pytest.approx(law(1e9, 1e11), rel=1e-3)   # far beyond what it was fitted to


def test_the_interval_holds_the_truth_and_narrows_with_the_noise(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 40)
    (N, D), law = sizes(), LAWS[2]
    noise = np.random.default_rng(1).standard_normal(len(N))
    widths = []
    for scale in (0.01, 0.001):
        draws = scaling.bootstrap(N, D, law(N, D) * (1 + scale * noise))
        low, high = scaling.interval([draw(1.5e6, 2.9e6) for draw in draws])
        assert low < law(1.5e6, 2.9e6) * (1 + 2 * scale) and high > law(1.5e6, 2.9e6) * (1 - 2 * scale)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_best_size_is_that_of_a_search():
    for law in LAWS:
        N = np.geomspace(1e5, 1e13, 100_001)
        assert law.best_parameters(1e21) == pytest.approx(N[law(N, 1e21 / 6 / N).argmin()], rel=1e-3)


def test_the_best_rate_is_where_a_parabola_is_lowest():
    rates = np.array([1, 2, 4, 8]) * 1e-3
    assert scaling.best_rate(rates, np.log(rates / 3e-3) ** 2 + 2) == pytest.approx(3e-3)
    assert scaling.best_rate(rates, rates) is None and scaling.best_rate(rates, -rates) is None   # who knows


# ---------------------------------------------------------------------------------------------------------- the runs

def test_the_runs_are_those_that_a_prediction_needs():
    """Four times the compute of the largest fitted run, and no run twice."""
    N, D = sizes()
    large = scaling.num_parameters(scaling.PREDICTED.config) * scaling.PREDICTED.tokens
    assert large >= 4 * (N * D).max()
    assert len(set(scaling.TRIALS)) == len(scaling.TRIALS) and scaling.PREDICTED not in scaling.FITTED
    assert replace(scaling.AGAIN[0], seed=0) in scaling.FITTED


def test_batch_and_rate_are_those_of_train(monkeypatch):
    """For the small model they are train.py's defaults, and a factor is a factor."""
    trial = Trial(128, 2, 1000)
    assert replace(trial.config, max_position_embeddings=1024) == chapter3.model.CONFIGS["small"]
    settings = scaling.settings_of(trial, "text")
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = chapter3.train.parse_arguments()
    assert (settings["batch_tokens"], settings["learning_rate"]) == (arguments.batch_tokens, arguments.learning_rate)
    other = scaling.settings_of(replace(trial, batch=0.5, rate=2), "text")
    assert other["batch_tokens"] * 2 == settings["batch_tokens"]
    assert other["learning_rate"] == 2 * settings["learning_rate"]


def test_a_run_counts_what_it_does(text_file):
    train_documents, val_documents = chapter3.data.load_documents(text_file)
    tokenizer = chapter3.make_tokenizer(train_documents)
    windows, _ = chapter3.data.tokenize(train_documents, tokenizer, scaling.CONTEXT)
    trial, reported = Trial(32, 1, 1500), []
    settings = scaling.settings_of(trial, "text") | {"batch_tokens": 256}
    text = tokenizer, windows, val_documents
    result = scaling.train_and_validate(trial, settings, *text, reported.append)
    config = replace(trial.config, vocab_size=tokenizer.vocab_size)
    packs, packs_of_data = [], chapter3.data.training_packs(windows, 256, 0)
    while sum(cu[-1].item() for cu in packs) < 1500:
        packs.append(chapter3.data.packed_sequence_collate_fn(next(packs_of_data)).cu_seqlens)
    assert result["flops"] == sum(chapter3.flops.total_flops(config, cu_seqlens) for cu_seqlens in packs)
    assert result["tokens"] == sum(reported) == sum(cu[-1].item() for cu in packs)
    assert result["parameters"] == chapter3.model.Transformer(config).num_parameters()   # a tied table counts once
    assert scaling.train_and_validate(trial, settings, *text, reported.append) == result   # to the last digit


def test_other_settings_are_another_file(tmp_path):
    """A kept run is not taken for one of another text, size, seed, batch, rate or another code."""
    trial = Trial(64, 1, 1000)
    files = {scaling.kept(tmp_path, scaling.settings_of(*of)) for of in (
        (trial, "text"), (trial, "other"), *((replace(trial, **change), "text") for change in (
            {"width": 128}, {"layers": 2}, {"tokens": 999}, {"seed": 1}, {"batch": 2}, {"rate": 2})))}
    assert len(files) == 8


def test_too_little_text_and_a_damaged_run_are_one_line(text_file, tmp_path, call):
    flags = "--data", text_file, "--out", tmp_path
    expect_error(call(scaling, *flags), "none of them twice")
    documents = scaling.fingerprint(sum(chapter3.data.load_documents(text_file), []))
    path = scaling.kept(tmp_path, scaling.settings_of(scaling.PREDICTED, documents))
    path.write_text("")
    expect_error(call(scaling, *flags), path, "remove it")


def test_the_code_of_the_library_is_enough_and_mixed():
    documents = scaling.source_code()
    assert len(set(documents)) == len(documents) > 5_000
    assert sum(len(document.encode()) for document in documents) > 3 * scaling.PREDICTED.tokens
    assert all(document.lstrip().startswith(("def ", "async def ")) for document in documents)


# ------------------------------------------------------------------------------------------------------- the command

COMMAND = """
import os, sys
sys.path.insert(0, os.getcwd())   # where the processes that it starts look, too
import scaling_laws as s
from pathlib import Path
small = [(32, 1), (64, 1), (32, 2)]
s.FITTED = [s.Trial(*shape, tokens) for shape in small for tokens in (600, 1200, 2400)]
s.PREDICTED = s.Trial(64, 2, 4000)
s.AGAIN = [s.Trial(32, 1, 600, seed=1)]
s.GRID = [s.Trial(width, 1, 300, batch, rate) for width in (32, 128) for batch in (0.5, 1, 2) for rate in (1, 2, 4)
          if width == 128 or batch == 1]
s.TRIALS = [*s.FITTED, s.PREDICTED, *s.AGAIN, *s.GRID]
s.RESAMPLES = 20
s.FIGURES = s.write_results.__globals__["RESULTS"] = Path(sys.argv[1])
s.FIGURES.mkdir(exist_ok=True)
sys.argv[1:] = sys.argv[2:]
s.run(s.main)
"""


def test_a_killed_command_goes_on_and_makes_no_run_twice(text_file, tmp_path):
    out = tmp_path / "out"
    # Enough tokens for the longest run.
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text() + "\n\n" + text_file.read_text()[::-1])
    flags = "-c", COMMAND, tmp_path / "results", "--data", text, "--out", out, "--workers"
    process = warm.start(*flags, 2, output=(tmp_path / "out.txt", tmp_path / "err.txt"), cwd=chapter3.folder)
    while len(list(out.glob("*.json"))) < 3:
        assert process.exitcode is None, (tmp_path / "err.txt").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}

    done = warm.run(*flags, 1, cwd=chapter3.folder)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(kept) == 9 + 1 + 1 + 12
    runs, fit, rates = (json.loads((tmp_path / "results" / f"scaling_{name}.json").read_text())["rows"]
                        for name in ("laws", "fit", "rates"))
    assert [row["run"] for row in runs][-2:] == ["seed 1, not fitted", "predicted"] and len(runs) == 11
    assert {row["bits"] for row in runs} <= {run["bits"] for run in kept}
    assert done.stdout.index("bits per byte predicted") < done.stdout.index("core-minutes in all")
    assert len(rates) == 4 and (tmp_path / "results" / "scaling_laws.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------- pretrain_124m.py

def test_the_plan_is_arithmetic():
    rows = dict(pretrain.plan(1e10))
    assert rows["parameters, millions"] * 1e6 == chapter3.model.Transformer(pretrain.CONFIG).num_parameters()
    assert 123 < rows["parameters, millions"] < 125
    # 6 N D, and attention on top of it
    assert 6 * 0.1236 * 1e10 / 1e9 < rows["FLOPs of the run, 10^18"] < 1.3 * 6 * 0.1236 * 1e10 / 1e9
    assert rows["nats a token by Hoffmann et al. 2022"] == pytest.approx(3.06, abs=0.01)
    assert rows["hours on one A100 at 40% of 312 TFLOP/s"] == pytest.approx(
        rows["FLOPs of the run, 10^18"] * 1e18 / (0.4 * 312e12) / 3600)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder of three Parquet files with 250 texts, a tiny model, and tokens that need no network."""
    rng = random.Random(0)
    words = "the king and queen of night speak softly to a fool who would not hear them again".split()
    found = [f"{number} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for number in range(250)]
    (tmp_path / "web" / "sample").mkdir(parents=True)
    for name, part in (("a", found[:100]), ("b", found[100:110]), ("c", found[110:])):
        pyarrow.parquet.write_table(pyarrow.table({"text": part, "url": [""] * len(part)}),
                                    tmp_path / "web" / "sample" / f"{name}.parquet", row_group_size=30)
    tokenizer = chapter3.make_tokenizer(found)
    monkeypatch.setattr(pretrain, "gpt2_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(pretrain, "CONFIG", chapter3.model.ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, max_position_embeddings=64, **chapter3.sizes))
    monkeypatch.setattr(pretrain, "CHUNK", 40)
    monkeypatch.setattr(pretrain, "VALIDATION", 20)
    return SimpleNamespace(folder=tmp_path / "web", texts=found, tokenizer=tokenizer)


def test_texts_begin_anywhere_and_none_is_lost(web):
    for start in (0, 1, 29, 30, 99, 100, 105, 110, 249, 250):
        assert list(pretrain.texts(web.folder, start)) == web.texts[start:]


def test_packs_go_on_from_any_place_and_every_token_comes_once(web):
    packs = list(pretrain.stream_packs(web.folder, web.tokenizer, 256, [20, 0]))
    windows, _ = chapter3.data.tokenize(web.texts[20:], web.tokenizer, 64)
    assert sorted(window for chosen, _ in packs for window in chosen) == sorted(windows)
    for number in (0, 3, 10, len(packs) - 1):
        assert list(pretrain.stream_packs(web.folder, web.tokenizer, 256, packs[number][1])) == packs[number + 1:]


def test_resumed_equals_all_at_once(web, tmp_path, call):
    flags = "--data", web.folder, "--batch-tokens", 256, "--save-every", 4, "--learning-rate", 1e-3
    assert call(pretrain, *flags, "--tokens", 3000, "--out", tmp_path / "whole")[0] == 0
    save_checkpoint = pretrain.save_checkpoint

    def save_and_end(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "save_checkpoint", save_and_end)
        assert call(pretrain, *flags, "--tokens", 3000, "--out", tmp_path / "halves")[0] == 130
    status, printed, _ = call(pretrain, *flags, "--tokens", 3000, "--out", tmp_path / "halves", "--resume")
    assert status == 0 and "resuming after step 4" in printed
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "halves")]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] >= 3000


def test_text_that_ends_too_early_is_one_line(web, tmp_path, call):
    flags = "--batch-tokens", 256, "--tokens", 1e9, "--out", tmp_path / "out"
    expect_error(call(pretrain, "--data", web.folder, *flags), "none is read twice", "--tokens")
