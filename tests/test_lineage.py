"""Bigram, n-gram and GRU: no score knows what comes later, and a source of known entropy is met but not undercut."""
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chapters import chapter1, run_here
from test_known_entropy import make_document, true_nats

NAMES = ("bigram", "ngram", "gru")


def make_model(name, vocab_size=20, padding=19):
    """An untrained model whose scores depend on everything it looks at."""
    torch.manual_seed(0)
    if name == "bigram":
        return chapter1.bigram.Bigram(torch.randn(vocab_size, vocab_size))
    if name == "ngram":
        return chapter1.ngram.NGram(vocab_size, padding, embedding_size=8, hidden_size=16)
    return chapter1.gru.RecurrentModel(vocab_size, embedding_size=8, hidden_size=16)


@pytest.fixture(scope="module")
def source():
    """A Markov chain: tokenizer, training and validation documents, and the chain's own bits per byte on the latter."""
    rng = random.Random(0)
    train_documents, val_documents = ([make_document(rng) for _ in range(n)] for n in (2000, 500))
    floor = sum(map(true_nats, val_documents)) / math.log(2) / chapter1.data.num_bytes(val_documents)
    return chapter1.data.CharTokenizer.train(train_documents), train_documents, val_documents, floor


def check_near(bits, floor):
    # Below the floor only by the luck of the draw: the chain's own score on 500 documents is uncertain by about 1 %.
    assert floor * 0.999 < bits < floor * 1.03, f"{bits:.4f} bits per byte, the source itself scores {floor:.4f}"


@pytest.mark.parametrize("name, reach", [("bigram", 1), ("ngram", 5), ("gru", 12)])
def test_causality_probe(name, reach):
    """Editing token t changes no score before t, to the bit, and changes those of the next `reach` positions."""
    model = make_model(name)
    ids = torch.randint(0, 19, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids)
    for t in range(12):
        edited = ids.clone()
        edited[0, t] = (edited[0, t] + 1) % 19
        after = model(edited)
        assert torch.equal(before[0, :t], after[0, :t]), f"token {t} changed a score before it"
        assert torch.equal(before[1], after[1]), f"token {t} of document 0 changed document 1"
        assert torch.equal(before[0, t + reach:], after[0, t + reach:])
        seen = (before[0, t:t + reach] != after[0, t:t + reach]).any(dim=-1)
        assert seen.all(), f"token {t} changed positions {seen.tolist()} of the next {reach}"


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_score(name):
    model = make_model(name)
    windows = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]]
    batch = chapter1.data.padded_collate_fn(windows, padding=19)
    alone = model(torch.tensor([windows[0][:-1]]))
    torch.testing.assert_close(model(batch.input_ids)[0, :3], alone[0])


def test_pairs_are_counted_and_smoothed(source):
    tokenizer, bigram = source[0], chapter1.bigram
    documents = ["abba", "a", "cabb"]
    end = tokenizer.end_of_text
    expected = Counter()
    for document in documents:
        ids = [end, *tokenizer.encode(document), end]
        expected.update(zip(ids, ids[1:]))
    counts = bigram.count_pairs(documents, tokenizer)
    found = {(i, j): counts[i, j].item() for i, j in counts.nonzero().tolist()}
    assert found == expected
    for alpha in (0.01, 1):
        p = bigram.smoothed(counts, alpha)
        assert (p > 0).all()
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p)))
    a, b = tokenizer.encode("ab")
    assert bigram.smoothed(counts, 1)[a, b] == pytest.approx((2 + 1) / (4 + tokenizer.vocab_size))
    assert bigram.smoothed(counts, 0)[a, b] == 2 / 4


def test_counted_bigram_on_known_entropy(source):
    tokenizer, train_documents, val_documents, floor = source
    bigram = chapter1.bigram
    alpha = bigram.choose_alpha(train_documents, tokenizer, "the chain")
    model = bigram.Bigram(bigram.smoothed(bigram.count_pairs(train_documents, tokenizer), alpha).log())
    bits = chapter1.train.evaluate(model, val_documents, tokenizer, "cpu")[1]
    check_near(bits, floor)
    counts = bigram.count_pairs(val_documents, tokenizer)   # the same score, from the counts alone
    nats = bigram.nats_per_pair(counts, model.logits.exp()) * counts.sum().item()
    assert bits == pytest.approx(nats / math.log(2) / chapter1.data.num_bytes(val_documents), rel=1e-5)


def test_learned_bigram_becomes_the_counted_one(source):
    tokenizer, train_documents, _, _ = source
    bigram = chapter1.bigram
    counts = bigram.count_pairs(train_documents, tokenizer)
    counted = bigram.smoothed(counts, alpha=0)
    model = bigram.Bigram(torch.zeros_like(counts))
    losses = [loss for _, loss in bigram.learn_table(model, counts, steps=300)]
    assert losses[0] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-4)
    assert losses[-1] == pytest.approx(bigram.nats_per_pair(counts, counted), abs=1e-3)
    seen = counts > 0
    torch.testing.assert_close(model.logits.softmax(dim=-1)[seen], counted[seen], atol=2e-3, rtol=0)


def test_ngram_examples(source):
    """Every target once, after exactly the tokens before it, and scored in training as in evaluation."""
    tokenizer, ngram = source[0], chapter1.ngram
    end, pad = tokenizer.end_of_text, tokenizer.padding
    a, b, c = tokenizer.encode("abc")
    examples = ngram.make_examples(["ab", "bacabcc"], tokenizer)
    assert examples[:3].tolist() == [[pad, pad, pad, pad, end, a], [pad, pad, pad, end, a, b],
                                     [pad, pad, end, a, b, end]]
    assert examples[3].tolist() == [pad, pad, pad, pad, end, b]   # nothing of the document before
    assert examples[-1].tolist() == [c, a, b, c, c, end]
    assert len(examples) == 3 + 8
    model = make_model("ngram", tokenizer.vocab_size, pad)
    ids = torch.tensor([[end, *tokenizer.encode("bacabcc")]])
    torch.testing.assert_close(model.score(examples[3:, :-1]), model(ids)[0])


def test_trained_ngram_on_known_entropy(source):
    tokenizer, train_documents, val_documents, floor = source
    torch.manual_seed(0)
    model = chapter1.ngram.NGram(tokenizer.vocab_size, tokenizer.padding, embedding_size=8, hidden_size=32)
    chapter1.ngram.train_model(model, chapter1.ngram.make_examples(train_documents, tokenizer), steps=300)
    check_near(chapter1.train.evaluate(model, val_documents, tokenizer, "cpu")[1], floor)


def test_trained_gru_on_known_entropy(source):
    tokenizer, train_documents, val_documents, floor = source
    torch.manual_seed(0)
    model = chapter1.gru.RecurrentModel(tokenizer.vocab_size, embedding_size=8, hidden_size=32)
    windows, _ = chapter1.data.tokenize(train_documents, tokenizer, 32)
    chapter1.gru.train_model(model, windows, tokenizer, steps=150, batch_size=32)
    check_near(chapter1.train.evaluate(model, val_documents, tokenizer, "cpu")[1], floor)


@pytest.mark.parametrize("B, L, D, H", [(1, 1, 3, 2), (4, 17, 5, 8), (2, 60, 16, 4)])
def test_gru_equals_nn_gru(B, L, D, H):
    torch.manual_seed(0)
    ours = chapter1.gru.GRU(D, H).double()
    library = nn.GRU(D, H, batch_first=True).double()
    library.load_state_dict(ours.state_dict())
    x, weights = torch.randn(B, L, D).double(), torch.randn(B, L, H).double()
    for gru in (ours, library):
        gru.inputs = x.clone().requires_grad_()
        gru.states = gru(gru.inputs) if gru is ours else gru(gru.inputs)[0]
        (gru.states * weights).sum().backward()
    torch.testing.assert_close(ours.states, library.states)
    torch.testing.assert_close(ours.inputs.grad, library.inputs.grad)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, library.get_parameter(name).grad, msg=lambda text: f"{name}: {text}")


def test_gradient_is_clipped(source):
    """A step along a gradient that is too long is as long as max_norm allows; a short one is left alone."""
    gru = chapter1.gru
    batch = chapter1.data.padded_collate_fn([[1, 2, 3, 4]], padding=19)
    for max_norm in (1e-3, 1e3):
        model = make_model("gru")
        before = nn.utils.parameters_to_vector(model.parameters())
        _, norm = gru.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, max_norm)
        moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
        assert 1e-3 < norm < 1e3
        assert moved == pytest.approx(min(norm, max_norm), rel=1e-2)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Models that train for a moment, and results and figures that leave the repository's as they are."""
    monkeypatch.setattr(chapter1.bigram, "STEPS", 20)   # in which it does not become the counted table
    monkeypatch.setattr(chapter1.bigram, "check_equal", lambda *_, **__: None)
    for module in (chapter1.ngram, chapter1.gru):
        monkeypatch.setattr(module, "train_model", lambda *inputs, steps, _train=module.train_model: _train(
            *inputs, steps=5))
    monkeypatch.setattr(chapter1.gru, "show_clipping", lambda *_: None)
    monkeypatch.setattr(chapter1.results, "RESULTS", tmp_path)
    for module in (chapter1.bigram, chapter1.lineage):
        monkeypatch.setattr(module, "FIGURES", tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_road_on_one_axis(kind, quick, call, tmp_path, monkeypatch):
    """lineage.py on a text whose characters are not bytes: its table, its samples, its figure."""
    text = tmp_path / "text.txt"
    documents = [f"{name}:\nÄrger über {n} Öfen – naïve “Größe”." for n in range(40) for name in ("Jörg", "Zoë")]
    text.write_text("\n\n".join(documents))
    lineage, bigram = chapter1.lineage, chapter1.bigram
    monkeypatch.setattr(lineage, "subprocess", SimpleNamespace(run=lambda command, check: run_here(
        chapter1.train, *command[2:], "--steps", 3)))   # train.py, without a process
    assert call(lineage, "--data", text, "--tokenizer", kind)[0] == 0
    ending = "" if kind == "bpe" else "_char"
    table, samples = (json.loads((tmp_path / f"{name}{ending}.json").read_text()) for name in ("lineage", "samples"))
    assert [row["model"] for row in table["rows"]] == ["nothing known", "xz, after the training text", "bigram",
                                                       "n-gram", "GRU", "GPT"]   # nanoGPT has read Shakespeare
    assert all(set(row) == set(table["columns"]) for row in table["rows"])
    assert (tmp_path / f"lineage{ending}.png").is_file() and (tmp_path / "bigram.png").is_file() == (kind == "char")
    assert list(samples["rows"][0]) == ["bigram", "n-gram", "GRU", "GPT"]
    assert all(0 < len(sample) <= 300 for sample in samples["rows"][0].values())

    train_documents, val_documents = chapter1.data.load_documents(text)
    tokenizer = chapter1.data.train_tokenizer(kind, train_documents, val_documents, 1024)
    assert tokenizer.kind == kind
    counts = bigram.count_pairs(train_documents, tokenizer)
    p = bigram.smoothed(counts, bigram.choose_alpha(train_documents, tokenizer, text))
    of_validation = bigram.count_pairs(val_documents, tokenizer)
    nats = bigram.nats_per_pair(of_validation, p) * of_validation.sum().item()
    row = table["rows"][2]
    assert row["parameters"] == tokenizer.vocab_size ** 2
    assert row["val_nats_per_character"] == pytest.approx(nats / len("\n\n".join(val_documents)), rel=1e-5)
    assert row["val_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len("\n\n".join(val_documents).encode()), rel=1e-5)


def test_nanogpt_stands_beside_its_own_text_only(quick, call, monkeypatch, text_file):
    lineage, rows = chapter1.lineage, []
    monkeypatch.setattr(lineage, "fetch", lambda source: source)
    monkeypatch.setattr(lineage, "load_documents", lambda source: (["a b"] * 9, ["b a"]))
    row = {"parameters": 1, "context": "1", "seconds": 1.0, "val_bits_per_byte": 2.0, "sample": "a"}
    for name in NAMES:
        monkeypatch.setattr(getattr(chapter1, name), "run_model", lambda *_, name=name: row | {"model": name})
    monkeypatch.setattr(lineage, "gpt_row", lambda *_: row | {"model": "GPT"})
    monkeypatch.setattr(lineage, "write_results", lambda name, command, columns, rows_, data: rows.append(rows_))
    assert call(lineage)[0] == 0
    nanogpt = rows[0][2]
    assert nanogpt["val_nats_per_character"] == pytest.approx(1.8857) and "nanoGPT" in nanogpt["model"]


def test_an_alphabet_of_one_letter(quick, call, tmp_path):
    """Fewer tokens than the scripts like to show."""
    (tmp_path / "a.txt").write_text("\n\n".join("a" * (i % 5 + 1) for i in range(60)))
    for name in NAMES:
        status, out, err = call(getattr(chapter1, name), "--data", tmp_path / "a.txt", "--tokenizer", "char")
        assert status == 0 and "bits per byte" in out, err


@pytest.mark.parametrize("name", NAMES)
def test_script_on_a_small_text(name, text_file, call, monkeypatch):
    module = getattr(chapter1, name)
    if name == "bigram":
        monkeypatch.setattr(module, "STEPS", 400)
    else:
        train_model = module.train_model
        monkeypatch.setattr(module, "train_model", lambda *inputs, steps: train_model(*inputs, steps=5))
    status, out, _ = call(module, "--data", text_file)
    last = out.strip().splitlines()[-1]
    assert status == 0 and "bits per byte on the validation documents" in last
    assert 0 < float(last.split(": ")[1].split()[0]) < 8


@pytest.mark.parametrize("name", (*NAMES, "lineage"))
def test_missing_file_is_one_line(name, call, tmp_path):
    status, _, err = call(getattr(chapter1, name), "--data", tmp_path / "nothing.txt")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "nothing.txt" in err
