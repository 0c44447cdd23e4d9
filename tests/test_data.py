"""Nothing is lost between a file and the targets of a batch: documents of every chapter, tokenizers and windows of chapter 1.

The batches of the later chapters are in test_packing.py, their tokenizer in test_qwen_tokenizer.py.
"""
import json

import pytest
import torch

from chapters import chapter1

NASTY = ["naïve café", "日本語\ttab", "emoji 🙂🏽", "\u2028\x85 separators", "a\u0301 combining", "<|endoftext|>", " \n ", "\x00\x7f"]


@pytest.fixture(scope="module")
def tokenizers():
    documents = ["the cat sat on the mat", "the hat"] + NASTY
    return chapter1.data.CharTokenizer.train(documents), chapter1.data.BPETokenizer.train(documents, 300)


def test_tokenizers_round_trip_and_reload(tokenizers, tmp_path):
    for tokenizer in tokenizers:
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = chapter1.data.load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded.vocab_size == tokenizer.vocab_size and loaded.tokens == tokenizer.tokens
        for text in NASTY + ["the cat"]:
            ids = tokenizer.encode(text)
            assert loaded.encode(text) == ids and tokenizer.decode(ids) == text
            assert max(ids, default=0) < tokenizer.end_of_text < tokenizer.padding == tokenizer.vocab_size - 1


def test_text_never_becomes_a_special_token(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")


def test_bpe_is_trained_to_the_size_asked_for(text_file):
    train, _ = chapter1.data.load_documents(text_file)
    assert chapter1.data.BPETokenizer.train(train, 320).vocab_size == 320


def test_every_target_counts_once(tokenizers):
    """Documents cut into windows and padded: the targets, joined again, are the documents and their ends."""
    char, _ = tokenizers
    documents = ["the cat", "the cat sat on the mat" * 3, "", "a"]
    windows, cut = chapter1.data.tokenize(documents, char, max_length=10)
    assert cut == 1 and max(len(window) for window in windows) == 11
    batch = chapter1.data.padded_collate_fn(windows, char.padding)
    targets = batch.targets[batch.targets != chapter1.data.IGNORE]
    assert char.decode(targets.tolist()) == "".join(document + "\n\n" for document in documents)
    assert torch.equal(batch.targets == chapter1.data.IGNORE, batch.input_ids == char.padding)
    # an input is the target before it, or an end of text where a document begins
    for window in windows:
        assert window[0] == char.end_of_text or len(window) <= 11


def test_a_window_follows_on_from_the_one_before(tokenizers):
    char, _ = tokenizers
    windows, _ = chapter1.data.tokenize(["the cat sat on the mat"], char, max_length=4)
    assert [window[0] for window in windows[1:]] == [window[-1] for window in windows[:-1]]


def test_every_window_once_an_epoch_and_a_new_order_each():
    windows = [[i] for i in range(13)]
    stream = [w[0] for step in range(26) for w in chapter1.data.training_windows(windows, 4, seed=3, step=step)]
    epochs = [stream[i:i + 13] for i in range(0, 104, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert stream != [w[0] for step in range(26) for w in chapter1.data.training_windows(windows, 4, seed=4, step=step)]


def test_split_is_at_the_document_boundary_nearest_to_a_tenth(chapter):
    documents = [f"{i:08d}" for i in range(100)]   # 10 bytes each with its blank line
    train, validation = chapter.data.split_documents(documents, "x")
    assert (train, validation) == (documents[:90], documents[90:])
    assert chapter.data.num_bytes(validation) == 98


def test_documents_of_a_text_file_and_of_a_jsonl_file(chapter, tmp_path):
    text = "one\ntwo\n\nthree\n\n\n\nfour\n"
    (tmp_path / "a.txt").write_text(text)
    assert chapter.data.read_text(tmp_path / "a.txt") == ["one\ntwo", "three", "four"]
    (tmp_path / "half.jsonl").write_text('{"text": "half \\ud83d a character"}')
    assert chapter.data.read_jsonl(tmp_path / "half.jsonl") == ["half \ufffd a character"]   # JSON can say it, UTF-8 cannot
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in NASTY) + "\n")
    assert chapter.data.read_jsonl(tmp_path / "a.jsonl") == [text.strip("\n") for text in NASTY]


def test_tiny_shakespeare_is_cut_where_the_standard_split_is(chapter, tmp_path):
    """The last tenth of the bytes; here on a file with the same kind of boundaries."""
    documents = ["x" * n for n in range(3, 200)]
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(documents))
    train, validation = chapter.data.load_documents(path)
    assert train + validation == documents
    assert abs(chapter.data.num_bytes(validation) - path.stat().st_size * 0.1) <= 100   # half of the longest document


@pytest.mark.reaches("data.python_docs", "data.load_documents", "data.num_bytes")
def test_python_docs_is_there_without_network(chapter, monkeypatch):
    documents = chapter.data.python_docs()
    monkeypatch.setattr(chapter.data, "python_docs", lambda: documents)
    train, validation = chapter.data.load_documents("python-docs")
    assert train + validation == documents and chapter.data.num_bytes(train) > 500_000
    assert len(set(documents)) == len(documents)


def test_offline_tinyshakespeare_falls_back_in_one_line(chapter, monkeypatch, capfd, tmp_path):
    (tmp_path / "download.py").write_text("import sys; print('error: no network', file=sys.stderr); sys.exit(2)")
    monkeypatch.setattr(chapter.data, "DATA", tmp_path)
    assert chapter.data.fetch("tinyshakespeare") == "python-docs"
    assert len(capfd.readouterr().out.splitlines()) == 1
    with pytest.raises(chapter.errors.InputError):
        chapter.data.fetch("wikitext-2")
