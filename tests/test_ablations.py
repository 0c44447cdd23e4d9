"""Chapter 2's ablations.py: the model with switches is both chapters' model, pairs are pairs, and numbers are right.

Nothing here is trained for long: what a variant is worth is measured, not tested.
"""
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from chapters import chapter1, load_chapter, run_here
from test_known_entropy import make_document, true_nats

chapter2 = load_chapter("chapter-02-qwen3-packed")
ablations, runs, make_model = chapter2.ablations, chapter2.ablation_runs, chapter2.ablation_model.AblationTransformer
DEFAULT, STEPS = runs.default_variant()
TINY = replace(DEFAULT, vocab_size=264, hidden_size=32, intermediate_size=48, num_attention_heads=4,
               num_key_value_heads=2, head_dim=8, batch_tokens=256)
GPT = "chapter 1's GPT"


def variants(default):
    return {name: replace(default, **changes)
            for name, changes in (ablations.ladder(default) | ablations.toggles(default)).items()}


# What does not change the model or its batches cannot leak.
each_variant = pytest.mark.parametrize("variant", [
    pytest.param(variant, id=name) for name, variant in variants(TINY).items()
    if not re.search("rate|decay|z-loss|recipe", name)])


def random_batch(vocab_size, *lengths):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(vocab_size, (length + 1,), generator=generator).tolist() for length in lengths]
    return chapter2.data.packed_sequence_collate_fn([(ids[:-1], ids[1:]) for ids in draw])


def logits_and_gradients(model, batch):
    logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    chapter2.train.F.cross_entropy(logits, batch.targets, ignore_index=-100).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


# -------------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4, "head_dim": 16}])
def test_with_every_switch_as_it_is_it_is_this_chapters_model(changes):
    variant = replace(DEFAULT, **changes)
    sizes = {name: value for name, value in asdict(variant).items() if name in asdict(chapter2.model.ModelConfig())}
    theirs = chapter2.model.Transformer(chapter2.model.ModelConfig(**sizes))
    ours = make_model(variant, seed=1)
    ours.load_state_dict(theirs.state_dict())
    batch = random_batch(variant.vocab_size, 9, 1, 4, 9)
    for one, other in zip(logits_and_gradients(ours, batch), logits_and_gradients(theirs, batch)):
        assert_close(one, other, atol=0, rtol=0)


def test_with_chapter_1s_choices_it_is_chapter_1s_model():
    """At chapter 1's own sizes, on its padded batch; what a padded position says counts for nothing."""
    variant = variants(DEFAULT)[GPT]
    theirs = chapter1.model.Transformer(chapter1.model.ModelConfig(pad_token_id=variant.vocab_size - 1))
    ours = make_model(variant, seed=1)
    ours.load_state_dict(theirs.state_dict())
    windows = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    theirs_batch = chapter1.data.padded_collate_fn(windows, variant.vocab_size - 1)
    batch = runs.padded([(window[:-1], window[1:]) for window in windows])
    logits, gradients = logits_and_gradients(ours, batch)
    expected = theirs(theirs_batch.input_ids).flatten(0, 1)
    counts = theirs_batch.targets.flatten() != -100
    assert torch.equal(batch.targets, theirs_batch.targets.flatten())
    assert_close(logits[counts], expected[counts], atol=1e-5, rtol=1e-5)
    chapter1.train.F.cross_entropy(expected, theirs_batch.targets.flatten(), ignore_index=-100).backward()
    assert_close(gradients, {name: parameter.grad for name, parameter in theirs.named_parameters()}, atol=1e-6,
                 rtol=1e-4)


@each_variant
def test_no_token_sees_a_later_one_nor_another_document(variant):
    model, batch = make_model(variant), random_batch(variant.vocab_size, 5, 4)
    model.eval()
    batch = runs.one_document(batch) if variant.across else batch

    def logits(ids):
        return model(ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    before = logits(batch.input_ids)
    for t in range(9):
        edited = batch.input_ids.clone()
        edited[t] = (edited[t] + 1) % variant.vocab_size
        changed = (logits(edited) != before).any(-1).tolist()
        end = 9 if t >= 5 or variant.across else 5
        assert changed == [t <= place < end for place in range(9)], f"token {t} changed {changed}"


@torch.no_grad()
def test_initial_weights_are_as_large_as_in_both_chapters_and_paired():
    arms = variants(DEFAULT)
    for ours, theirs in ((arms["default"], chapter2.model.Transformer(chapter2.model.CONFIGS["small"])),
                         (arms[GPT], chapter1.model.Transformer(chapter1.model.CONFIGS["small"]))):
        theirs = dict(theirs.named_parameters())
        for name, parameter in make_model(ours).named_parameters():
            if theirs[name].std() > 0:
                assert (parameter.std() / theirs[name].std()).item() == pytest.approx(1, abs=0.04), name
            else:
                assert torch.equal(parameter, theirs[name]), name
    first, other = (dict(make_model(DEFAULT, seed).named_parameters()) for seed in (0, 1))
    for name, variant in arms.items():
        for key, parameter in make_model(variant, 0).named_parameters():
            if key in first and parameter.shape == first[key].shape and parameter.dim() > 1:
                scale = parameter.std() / first[key].std()   # of another depth, or with another table
                assert_close(parameter, first[key] * scale, atol=1e-6, rtol=1e-4, msg=f"{name}: {key}")
                assert not torch.equal(parameter, other[key])


def test_models_of_another_depth_have_as_many_weights():
    counts = {name: make_model(variant).num_parameters() for name, variant in variants(DEFAULT).items()}
    for name in ("half the layers, wider", "twice the layers, narrower", "GELU, no gate", "squared ReLU, no gate"):
        assert counts[name] == pytest.approx(counts["default"], rel=0.005), name


def test_the_ladder_changes_one_choice_at_a_time_and_ends_at_the_default():
    rungs = list(ablations.ladder(DEFAULT).values())
    assert rungs[-1] == {}
    for before, after in itertools.pairwise(rungs):
        assert after.items() <= before.items()


# ------------------------------------------------------------------------------------------------------- the training

@pytest.fixture(scope="module")
def text(text_file):
    return runs.Text(text_file)


def test_parts_do_not_overlap_and_the_validation_part_is_that_of_every_chapter(text, text_file):
    train, validation = chapter2.data.load_documents(text_file)
    assert text.training + text.development == train and text.validation == validation
    assert len(text.development) == pytest.approx(len(train) / 10, abs=1)


def test_the_default_is_trained_as_train_py_does_it(text_file, tmp_path, monkeypatch):
    """From the same weights and with the same documents: the same bits per byte to the last digit."""
    monkeypatch.setitem(chapter2.model.CONFIGS, "small", chapter2.model.ModelConfig(vocab_size=300))
    run_here(chapter2.train, "--data", text_file, "--steps", 4, "--out", tmp_path / "out")
    text, variant = runs.Text(text_file), runs.default_variant()[0]
    text.training += text.development
    model = runs.new_model(text, variant, 0)
    torch.manual_seed(0)
    preset = replace(chapter2.model.CONFIGS["small"], vocab_size=model.config.vocab_size)
    model.load_state_dict(chapter2.model.Transformer(preset).state_dict())
    assert len(list(runs.training(text, variant, model, 0, 4))) == 4
    _, bits = chapter2.train.evaluate(model, text.validation, text.tokenizer(variant), variant.batch_tokens, "cpu")
    assert bits == json.loads((tmp_path / "out" / "summary.json").read_text())["val_bits_per_byte"]


def test_the_first_rung_is_trained_as_chapter_1_does_it(text, monkeypatch):
    variant = variants(TINY)[GPT]
    monkeypatch.setattr("sys.argv", ["train.py"])
    flags = chapter1.train.parse_arguments()
    model = runs.new_model(text, variant, 0)
    theirs = chapter1.model.Transformer(chapter1.model.ModelConfig(
        vocab_size=model.config.vocab_size, hidden_size=32, intermediate_size=128, pad_token_id=0))
    theirs.load_state_dict(model.state_dict())
    optimizer = chapter1.optimizer.Optimizer(theirs, chapter1.optimizer.adamw(theirs, flags.learning_rate))
    windows = [input_ids + targets[-1:] for input_ids, targets in text.windows(variant)]
    expected = []
    for step in range(12):   # into the second epoch
        chosen = chapter1.data.training_windows(windows, flags.batch_size, 3, step)
        expected.append(chapter1.train.train_step(
            theirs, optimizer, chapter1.data.padded_collate_fn(chosen, 0),
            flags.learning_rate * chapter1.optimizer.schedule(step / 12))["loss"].item())
    assert list(runs.training(text, variant, model, 3, 12)) == pytest.approx(expected, rel=1e-4)


def test_pairs_read_the_same_batches(text):
    one, other = (itertools.islice(runs.batches(variant, text.windows(variant), 5), 9)
                  for variant in (TINY, replace(TINY, norm="layer", dropout=0.1)))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, other))


def test_what_the_switches_of_the_training_do(text):
    for name, end in (("constant", 1.0), ("linear", 0.0), ("tenth", 0.1)):
        assert [runs.SCHEDULES[name](share) for share in (0.025, 0.05, 1)] == pytest.approx([0.5, 1, end], abs=1e-6)
    assert runs.linear(0.525) == pytest.approx(0.5)
    losses = {weight: list(runs.training(text, replace(TINY, z_loss=weight), runs.new_model(text, TINY, 0), 0, 9))
              for weight in (0.0, 1e-30, 10.0)}
    assert losses[1e-30] == pytest.approx(losses[0.0], rel=1e-5)
    assert losses[10.0][0] == pytest.approx(losses[0.0][0]) and losses[10.0][-1] > losses[0.0][-1] + 1e-3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(Text of a Markov chain, its own bits per byte on the development part)."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("source") / "chain.jsonl"
    path.write_text("\n".join(json.dumps({"text": make_document(rng)}) for _ in range(2500)))
    text = runs.Text(path)
    nats = sum(map(true_nats, text.development))
    return text, nats / math.log(2) / chapter2.data.num_bytes(text.development)


@each_variant
def test_no_variant_scores_below_the_entropy_of_a_source(variant, source):
    text, floor = source
    variant = replace(variant, learning_rate=1e-2)
    model = runs.new_model(text, variant, 0)
    for _ in runs.training(text, variant, model, 0, 40):
        pass
    tokenizer = text.tokenizer(variant)
    _, bits = chapter2.train.evaluate(model, text.development, tokenizer, variant.batch_tokens, "cpu")
    assert floor * 0.995 < bits < floor * 1.6, f"{bits:.4f} bits per byte, the source itself scores {floor:.4f}"


# ------------------------------------------------------------------------------------------------------ budgets

def test_equal_text_and_equal_time_by_hand():
    class Epochs:
        def steps_of_an_epoch(self, variant):
            return {"default": 100, "half the tokens": 200}[variant]
    for variant, ratio, expected in (
            ("default", 1.0, (600, 600, 200)),
            ("default", 1.5, (600, 400, 200)),          # dearer steps, fewer of them
            ("default", 1.02, (600, 600, 200)),         # one run for both
            ("half the tokens", 0.6, (1200, 1000, 400)),
            ("half the tokens", 0.5, (1200, 1200, 400))):
        steps = runs.plan_steps(Epochs(), variant, "default", 600, ratio)
        assert (steps["text"], steps["time"], steps["third"]) == expected


def test_the_clock_of_a_step_does_not_see_a_disturbance(monkeypatch):
    """Steps of the variant take twice as long; from time to time something takes ten times as long."""
    clock, costs = [0.0], {"variant": 2.0, "default": 1.0}
    rng = random.Random(0)

    def training(text, variant, *_):
        while True:
            clock[0] += costs[variant] * (10 if rng.random() < 0.05 else 1)
            yield 1.0
    monkeypatch.setattr(runs, "training", training)
    monkeypatch.setattr(runs, "new_model", lambda *_: None)
    monkeypatch.setattr(runs.time, "process_time", lambda: clock[0])
    assert runs.step_time_ratio(None, "variant", "default") == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------------ statistics

QUANTILES = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 10: 2.26216}   # of Student's t, 97.5 %, by pairs


@pytest.mark.parametrize("pairs", QUANTILES)
def test_the_interval_is_that_of_the_textbook(pairs):
    rng = random.Random(pairs)
    differences = [rng.gauss(0.01, 0.02) for _ in range(pairs)]
    mean, half, _ = ablations.paired(differences)
    error = statistics.stdev(differences) / pairs ** 0.5
    assert mean == pytest.approx(sum(differences) / pairs)
    assert half == pytest.approx(QUANTILES[pairs] * error, rel=1e-4)
    shifted = [difference - mean + QUANTILES[pairs] * error for difference in differences]
    assert ablations.paired(shifted)[2] == pytest.approx(0.05, abs=1e-4)   # the interval just touches zero


def test_p_where_it_is_known():
    assert ablations.paired([0.0, 2.0])[2] == pytest.approx(0.5, abs=1e-4)         # t = 1 of one degree of freedom
    assert ablations.paired([0.0, 0.0, 0.0]) == pytest.approx((0, 0, 1), abs=1e-4)
    assert ablations.paired([1.0, 1.0, 1.0]) == pytest.approx((1, 0, 0), abs=1e-4)
    assert ablations.paired([-1.0, 1.0, -1.0, 1.0])[2] == pytest.approx(1, abs=1e-4)


def test_luck_alone_passes_one_time_in_twenty():
    """Differences of nothing: the interval holds zero in 95 of 100 cases, whatever the number of pairs."""
    rng = random.Random(0)
    for pairs in (2, 3, 5):
        outside = 0
        for _ in range(400):
            mean, half, p = ablations.paired([rng.gauss(0, 1) for _ in range(pairs)])
            assert (abs(mean) > half) == (p < 0.05)
            outside += abs(mean) > half
        assert 8 <= outside <= 34   # 20 expected, standard deviation 4.4


def test_holm_by_hand():
    assert ablations.holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.5}) == pytest.approx(
        {"b": 0.04, "a": 0.09, "c": 0.09, "d": 0.5})
    assert ablations.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


# ------------------------------------------------------------------------------------------------- all of it

NAMES = f"LayerNorm,dropout 0.1,{GPT},+ RMSNorm"


@pytest.fixture
def campaign(monkeypatch, tmp_path, text_file, call):
    """campaign(flags...) runs ablations.py with a tiny model -> what it printed. Results and figures go to tmp_path."""
    monkeypatch.setitem(chapter2.model.CONFIGS, "small", chapter2.model.ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8))
    monkeypatch.setattr(chapter2.results, "RESULTS", tmp_path)
    monkeypatch.setattr(ablations, "FIGURES", tmp_path)
    monkeypatch.setattr(runs, "ROUNDS", 1)
    monkeypatch.setattr(runs, "EACH", 1)

    def start(*flags):
        status, out, err = call(ablations, "--data", text_file, "--out", tmp_path / "runs", "--steps", 4, "--seeds", 2,
                                "--workers", 1, "--arms", NAMES, *flags)
        assert status == 0, err
        return out
    return start


def outcome(folder):
    return {path.name: path.read_text() for path in folder.glob("[!.]*.json")}


def test_tables_and_figures_are_written(campaign, tmp_path):
    out = campaign()
    files = ("ablation_ladder.json", "ablations.json", "ablation_budgets.json")
    assert all(str(tmp_path / file) in out for file in files)
    ladder, switches, budgets = (json.loads((tmp_path / file).read_text())["rows"] for file in files)
    assert [row["change"] for row in ladder] == [GPT, "+ RMSNorm", list(ablations.ladder(DEFAULT))[-1]]
    assert [row["change"] for row in switches] == ["default", "LayerNorm", "dropout 0.1"]
    assert [row["change"] for row in budgets] == ["dropout 0.1"]
    assert ladder[0]["text_p"] == ladder[2]["text_p"] == "" != ladder[1]["text_p"]   # the rung before was not trained
    for row in (ladder[1], *switches[1:]):
        for budget in ("text", "time"):
            assert 0 <= row[f"{budget}_p"] <= 1 and row[f"{budget}_half"] >= 0 and row[f"{budget}_validation"] > 0
    assert switches[1]["text_difference"] == pytest.approx(switches[1]["text_bits"] - switches[0]["text_bits"])
    for figure in ("ablations.png", "ablation_curves.png"):
        assert 5_000 < (tmp_path / figure).stat().st_size < 300_000


def test_a_run_is_made_once_and_goes_on_where_it_was(campaign, tmp_path, monkeypatch):
    campaign()
    before, files = outcome(tmp_path), outcome(tmp_path / "runs")
    lost = sorted(set(files) - {"calibration.json"})[3]
    (tmp_path / "runs" / lost).unlink()
    computed, compute = [], runs.compute
    monkeypatch.setattr(runs, "compute", lambda text, each, tell: (computed.append(each), compute(text, each, tell)))
    campaign()
    assert [each.path.name for each in computed] == [lost]
    assert outcome(tmp_path / "runs") == files and outcome(tmp_path) == before
    campaign("--seeds", 3)
    assert len(computed) > 1 and all(each.seed == 2 for each in computed[1:])
    assert files.items() <= outcome(tmp_path / "runs").items()


def test_results_of_earlier_calls_stay_in_the_tables(campaign, tmp_path):
    campaign()
    campaign("--arms", "LayerNorm")
    assert len(json.loads((tmp_path / "ablations.json").read_text())["rows"]) == 3


def test_calibrate_measures_anew_and_trains_nothing(campaign, tmp_path):
    assert re.search(r"1\.000  default", campaign("--calibrate"))
    assert list(outcome(tmp_path / "runs")) == ["calibration.json"] and not outcome(tmp_path)
    before = outcome(tmp_path / "runs")
    campaign("--calibrate")
    assert outcome(tmp_path / "runs") != before


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"default": 1.')
    with pytest.raises(chapter2.cli.InputError, match="a.json is damaged .*delete it"):
        runs.read_json(tmp_path / "a.json")
    assert runs.read_json(tmp_path / "b.json") == {}


def test_a_killed_worker_is_one_line(monkeypatch):
    def start_worker(text, first_run):
        ours, theirs = runs.multiprocessing.Pipe()
        theirs.close()
        return ours
    monkeypatch.setattr(runs, "start_worker", start_worker)
    with pytest.raises(chapter2.cli.InputError, match="a process was killed.*kept"):
        runs.compute_all(None, ["a run", "another"], 2, None)


def test_killed_with_its_workers_then_continued(text_file, tmp_path, monkeypatch):
    """kill -9 in the middle: its processes end too, and what two processes then finish is what one would have made."""
    flags = ["--data", text_file, "--steps", 3, "--seeds", 2, "--arms", "LayerNorm"]
    for module, name, value in ((chapter2.results, "RESULTS", tmp_path), (ablations, "FIGURES", tmp_path),
                                (runs, "ROUNDS", 1), (runs, "EACH", 1)):
        monkeypatch.setattr(module, name, value)
    run_here(ablations, *flags, "--workers", 1, "--out", tmp_path / "runs")
    expected = outcome(tmp_path / "runs")

    # A copy of the folder: what it writes is not the repository's.
    copy = shutil.copytree(chapter2.folder, tmp_path / "chapter", ignore=shutil.ignore_patterns("out*", "results"))
    folder = copy / "out" / "ablations"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "runs" / "calibration.json", folder)
    command = [sys.executable, copy / "ablations.py", *map(str, flags), "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(outcome(folder)) > 1)
    process.kill()
    process.wait()
    wait_until(lambda: not group_lives(process.pid))
    found = outcome(folder)
    assert len(found) < len(expected) and not (copy / "results").exists()
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert found.items() <= outcome(folder).items() and outcome(folder) == expected


def wait_until(true, seconds=200):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def group_lives(number):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, 0)
        return True
