"""Chapter 3's record.py: a record is the first thing to distrust. No score knows its token or a later one, each token
counts once, none scores below a source's entropy, and a killed run goes on.
"""
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from chapters import load_chapter, run_here
from test_known_entropy import make_document, true_nats
from test_train import SUMMARY_KEYS

chapter3 = load_chapter("chapter-03-profiling")
record = chapter3.record
V = 61
# What is published, and the ladder's arms that compute something else, in a small model.
RECIPES = {name: replace(recipe, hidden_size=32, num_hidden_layers=2, head_dim=16, window=16, batch_tokens=64)
           for name, recipe in {"83 seconds": record.SHORT, "5 minutes": record.LONG,
                                "apart": replace(record.SHORT, apart=True),
                                "no row before": replace(record.SHORT, previous=0.0)}.items()}


def make_model(recipe, vocab_size=V):
    torch.manual_seed(0)
    model = recipe.model(vocab_size)
    for parameter in model.parameters():   # so that what a score should not see would change it visibly
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


IDS = torch.randint(1, V, (60,), generator=torch.Generator().manual_seed(1)).tolist()
IDS[20] = IDS[41] = 0   # ends of documents


def scores(model, recipe, ids):
    return record.log_probabilities(model, ids, recipe.window, 0 if recipe.apart else None)


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


def test_causality_probe(recipe):
    """Editing token t changes no score of a token before it, to the bit, and for some t those behind it."""
    model = make_model(recipe)
    before, changed = scores(model, recipe, IDS), 0
    for t in range(60):
        edited = IDS[:t] + [IDS[t] % (V - 1) + 1] + IDS[t + 1:]
        if recipe.apart and IDS[t] == 0:
            continue   # documents of other lengths take another way, with other roundings
        after = scores(model, recipe, edited)
        assert torch.equal(before[:max(0, t - 1)], after[:max(0, t - 1)]), f"token {t} changed a score before it"
        changed += not torch.equal(before[t:t + 5], after[t:t + 5])
    assert changed > 50


def test_the_scores_of_all_tokens_at_a_place_are_probabilities(recipe):
    """They sum to 1 only where no score has seen its own token. Of two models averaged as of one."""
    models = [make_model(recipe), make_model(recipe)]
    torch.nn.init.normal_(models[1].model.embed_tokens.weight)
    for t in (1, 16, 17, 40):   # within windows and on both sides of where they meet
        total = sum(record.average([scores(model, recipe, IDS[:t] + [token] + IDS[t + 1:]) for model in models])
                    [t - 1].exp() for token in range(V))
        torch.testing.assert_close(total, torch.tensor(1.0))


def test_documents_apart_do_not_see_each_other():
    recipe = RECIPES["apart"]
    model, ids = make_model(recipe), [0, 5, 6, 7, 0, 8, 9, 0]
    alone = scores(model, recipe, [0, 8, 9, 0])
    torch.testing.assert_close(scores(model, recipe, ids)[-3:], alone)
    assert not torch.allclose(scores(model, RECIPES["83 seconds"], ids)[-3:], alone)


@pytest.mark.parametrize("window", (1, 2, 3, 4, 7, 64))
def test_each_token_counts_once_with_three_quarters_of_a_window_before_it(window):
    for n in (*range(window, 3 * window + 2), 1000):
        places, counted = record.scoring_windows(n, window), []
        for i, (start, scored) in enumerate(places):
            assert 0 <= start and start + window <= n
            assert scored == 0 if i == 0 else scored >= window - max(1, window // 4)
            counted += range(start + scored, start + window)
        assert counted == list(range(n))


def test_an_epoch_has_each_window_once():
    """And the windows of the next are cut elsewhere. A rest that is shorter than a batch is left out."""
    recipe, ids = RECIPES["83 seconds"], list(range(1000))
    batches = record.training_batches(ids, recipe, 0, None)
    epochs = [[next(batches) for _ in range(15)] for _ in range(2)]
    inputs = [torch.cat([batch.input_ids for batch in epoch]) for epoch in epochs]
    targets = torch.cat([batch.targets for batch in epochs[0]])
    assert torch.equal(targets, inputs[0] + 1) and len(set(inputs[0].tolist())) == 15 * 64
    assert set(inputs[0].tolist()) != set(inputs[1].tolist()) and not torch.equal(*inputs)


@pytest.mark.parametrize("H, G", ((4, 2), (3, 3), (4, 1)))
def test_window_attention_equals_packed_attention(H, G):
    torch.manual_seed(0)
    q, k, v = (torch.randn(24, heads, 8, requires_grad=True) for heads in (H, G, G))
    cu_seqlens, dy = torch.arange(0, 25, 8, dtype=torch.int32), torch.randn(24, H, 8)
    results = []
    for out in (record.window_attention(q, k, v, 8), record.packed_attention(q, k, v, cu_seqlens, 8)):
        results.append([out, *torch.autograd.grad(out, (q, k, v), dy)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_its_additions_it_is_the_chapters_model():
    recipe = replace(RECIPES["no row before"], dropout=0.0)
    model = make_model(recipe)
    reference = chapter3.model.Transformer(model.config)
    missing = reference.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == ["previous"] and not missing.missing_keys
    ids = torch.randint(0, V, (32,))
    for lengths in ([16, 16], [5, 27]):
        packed = (torch.cat([torch.arange(n) for n in lengths]), torch.tensor([0, *lengths]).cumsum(0).int(),
                  max(lengths))
        torch.testing.assert_close(model(ids, *packed), reference(ids, *packed), rtol=1e-4, atol=1e-5)


def test_no_score_below_the_entropy_and_two_trained_models_near_it():
    """See test_known_entropy.py. The documents are independent: to see the one before must not help either."""
    rng = random.Random(0)
    train_documents, val_documents = ([make_document(rng) for _ in range(n)] for n in (2000, 500))
    floor = sum(map(true_nats, val_documents)) / math.log(2) / chapter3.data.num_bytes(val_documents)
    tokenizer = chapter3.make_tokenizer(train_documents, vocab_size=264)
    train_ids, val_ids = (record.running_text(part, tokenizer) for part in (train_documents, val_documents))
    recipe = replace(RECIPES["5 minutes"], window=32, batch_tokens=640)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = recipe.model(tokenizer.vocab_size)
        optimizers, batches = record.Optimizers(model, recipe), record.training_batches(train_ids, recipe, seed, None)
        for step in range(200):
            batch = next(batches)
            (chapter3.train.loss_sum(model, batch) / len(batch.targets)).backward()
            optimizers.step(step / 200)
        found.append(record.log_probabilities(model, val_ids, recipe.window, None))
    bits = record.bits_per_byte(record.average(found), val_documents)
    assert floor * 0.999 < bits < floor * 1.03, f"{bits:.4f} bits per byte, the source itself scores {floor:.4f}"


# ---------------------------------------------------------------------------------------------------- whole runs

# record.py with a model that takes a hundredth of the time, saved five times a second.
SMALL = """import record
record.SAVE_SECONDS = 0.2
record.SHORT.hidden_size, record.SHORT.num_hidden_layers, record.SHORT.vocab_size = 32, 1, 300
record.run(record.main)"""


def saved_steps(out):
    return [json.loads(record.read_tensors(path)[1]["state"])["step"]
            for path in sorted((out / "checkpoint").glob("model-*.safetensors"))]


def test_killed_half_way_then_continued(text_file, tmp_path):
    """Its two processes end with it. The time that is used up counts, and repeated once more it has nothing to do."""
    command = [sys.executable, "-c", SMALL, "--minutes", "0.1", "--data", text_file, "--out", tmp_path]
    where = {"cwd": chapter3.folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **where)
    while len(saved_steps(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1)
    left = saved_steps(tmp_path)
    time.sleep(1)
    assert saved_steps(tmp_path) == left, "a model goes on although its run is dead"
    subprocess.run(command, check=True, **where)
    assert all(after > before for before, after in zip(left, saved_steps(tmp_path)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS and summary["steps"] == sum(saved_steps(tmp_path))
    assert summary["wall_seconds"] < 2 * 6
    subprocess.run(command, check=True, **where)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["val_loss"] == summary["val_loss"] and again["steps"] == summary["steps"]


def test_what_is_published_is_the_mean_of_three_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter3.results, "RESULTS", tmp_path)
    for minutes in record.MINUTES:
        for number in range(3):
            out = tmp_path / f"{minutes:g}-minutes-{number}"
            out.mkdir()
            (out / "summary.json").write_text(json.dumps(
                {"parameters": 10, "tokens": 20, "wall_seconds": 60 * minutes, "val_bits_per_byte": 2 + 0.1 * number}))
    run_here(record, "--publish", "--out", tmp_path)
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["wall_seconds"] for row in rows] == pytest.approx([60 * minutes for minutes in record.MINUTES])
    # Student's t of two degrees of freedom times the standard error, 4.303 * 0.1 / sqrt(3)
    assert all(row["bits"] == pytest.approx(2.1) and row["half"] == pytest.approx(0.2484, abs=1e-4) for row in rows)


def test_the_ladder_scores_no_validation_document(text_file, tmp_path, monkeypatch):
    small = replace(record.SHORT, hidden_size=32, num_hidden_layers=1, vocab_size=300, batch_tokens=256)
    for name, module in chapter3.modules.items():   # a process gets its work by the names of functions
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(record, "SHORT", small)
    monkeypatch.setattr(record, "LADDER", {0.02: {"the recipe": {}, "apart": {"apart": True}}})
    monkeypatch.setattr(chapter3.results, "RESULTS", tmp_path)
    train_documents, _ = chapter3.data.load_documents(text_file)
    given = []
    train_models = record.train_models
    monkeypatch.setattr(record, "train_models", lambda recipe, seeds, documents, *rest: (
        given.append(documents) or train_models(recipe, seeds, documents, *rest)))
    for _ in range(2):   # the second time everything is there
        run_here(record, "--ladder", "--minutes", 0.02, "--data", text_file, "--out", tmp_path)
    first, apart = json.loads((tmp_path / "record_ladder_0.02.json").read_text())["rows"]
    assert all(learned + held_out == train_documents for learned, held_out in given)
    assert first["worse"] == 0 and first["pair"] < first["bits"] and apart["name"] == "apart" and apart["worse"] != 0
