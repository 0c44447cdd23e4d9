"""Nothing is lost between a file and the targets of a batch: documents of every chapter, tokenizers and windows of
chapter 1.

The batches of the later chapters are in test_packing.py, their tokenizer in test_qwen_tokenizer.py.
"""
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch

from chapters import chapter1

NASTY = ["naïve café", "日本語\ttab", "emoji 🙂🏽", "\u2028\x85 separators", "a\u0301 combining", "<|endoftext|>",
         " \n ", "\x00\x7f"]


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
    # JSON can say it, UTF-8 cannot.
    assert chapter.data.read_jsonl(tmp_path / "half.jsonl") == ["half \ufffd a character"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in NASTY) + "\n")
    assert chapter.data.read_jsonl(tmp_path / "a.jsonl") == [text.strip("\n") for text in NASTY]


TEXT = "one\ntwo\n\nthree\n"
LINES = '{"text": "one\\ntwo", "id": 7}\n\n{"text": "three", "meta": {"source": "x"}}\n'


def parquet(rows):
    """The bytes of a table of these rows."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


TABLE = parquet([{"text": "one\ntwo", "id": 7}, {"text": "three", "id": None}])


@pytest.mark.reaches("data.read_file", "formats")
@pytest.mark.parametrize("name, content", [
    ("a.txt", TEXT), ("A.TXT", TEXT), ("a.text", TEXT), ("a.md", TEXT), ("a.b.txt", TEXT),
    ("mark.txt", "\ufeff" + TEXT),
    ("spaces.txt", "one\ntwo\n  \nthree\n"), ("tab.txt", " \n\none\ntwo\n\t\n\u3000\u00a0\nthree\n \n"),
    ("windows.txt", TEXT.replace("\n", "\r\n")), ("windows_spaces.txt", "one\r\ntwo\r\n \r\nthree"),
    ("mac.txt", TEXT.replace("\n", "\r")),
    ("a.jsonl", LINES), ("A.JSONL", LINES), ("a.ndjson", LINES), ("a.NDJson", LINES),
    ("windows.jsonl", LINES.replace("\n", "\r\n")),
    ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0)), ("A.JSONL.GZ", gzip.compress(LINES.encode(), mtime=0)),
    ("windows.txt.gz", gzip.compress(TEXT.replace("\n", "\r\n").encode(), mtime=0)),
    ("a.parquet", TABLE), ("A.Parquet", TABLE), ("a.parquet.gz", gzip.compress(TABLE, mtime=0))])
def test_a_format_is_known_by_the_end_of_the_name(chapter, name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert chapter.data.read_file(path) == ["one\ntwo", "three"]


@pytest.mark.reaches("data.read_text", "formats")
def test_white_space_within_a_document_stays(chapter, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("  indented\n\tmore  \n\n\n \n    code:\n\ufeffx", encoding="utf-8")
    assert chapter.data.read_text(path) == ["  indented\n\tmore  ", "    code:\n\ufeffx"]


def refusal(chapter, path):
    """The one line that a file is refused with."""
    with pytest.raises(chapter.cli.InputError) as error:
        chapter.data.read_file(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message, message
    return message


@pytest.mark.reaches("data.read_file", "formats", "cli")
@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.json", "a.zip", "a.docx", "a.pdf", "a.html", "a.xml",
                                  "a.arrow", "a.txt.zst",
                                  "a.tar.gz", "a.csv.gz", "a.txt.bak", "a.py", "a.npy", "txt", "a.gz"])
def test_other_formats_are_refused_by_name(chapter, name, tmp_path):
    """Whatever is in them. As text this one could be trained on."""
    (tmp_path / name).write_text(TEXT * 100)
    named = {"txt": "without an ending", "a.gz": "without an ending", "a.tar.gz": ".tar", "a.csv.gz": ".csv",
             "a.TSV": ".tsv"}
    message = refusal(chapter, tmp_path / name)
    assert named.get(name, name[name.rindex("."):] if "." in name
                     else "") + " is not read" in message and "convert" in message


@pytest.mark.reaches("data.read_file", "formats", "cli")
@pytest.mark.parametrize("name, content, words", [
    ("no.txt.gz", TEXT.encode(), ["gzip"]),
    ("cut.txt.gz", gzip.compress(TEXT.encode() * 99, mtime=0)[:-9], ["damaged"]),
    ("bits.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:12] + b"\xff" * 40, ["damaged"]),
    ("latin1.txt.gz", gzip.compress("th\u00e9".encode("latin-1"), mtime=0), ["byte 2", "UTF-8"]),
    ("no.parquet", TEXT.encode(), ["Parquet"]), ("empty.parquet", b"", ["Parquet"]),
    ("cut.parquet", TABLE[:-20], ["Parquet"]),
    ("bits.parquet", TABLE[:4] + bytes(len(TABLE) // 2) + TABLE[4 + len(TABLE) // 2:], ["Parquet"]),
    ("no.parquet.gz", TABLE, ["gzip"]),
    ("columns.parquet", parquet([{"words": "a"}]), ["row 1", "text", "words"]),
    ("none.parquet", parquet([{"text": "a"}, {"text": None}]), ["row 2", "null"]),
    ("bytes.parquet", parquet([{"text": b"a"}]), ["row 1"]),
    ("array.jsonl", json.dumps([{"text": "a"}, {"text": "b"}]).encode(), ["line 1", "[{"]),
    ("pretty.jsonl", json.dumps({"text": "a"}, indent=2).encode(), ["line 1", "whole object"]),
    ("sharegpt.jsonl", b'{"conversations": [{"from": "human", "value": "x"}]}', ["line 1", "conversations", "from"]),
    ("null.jsonl", b'{"text": "a"}\n\n{"text": null}', ["line 3", "null"]),
    *[("deep.jsonl", b'{"text":' + b"[" * depth + b"]" * depth + b"}", ["line 1"]) for depth in (900, 990, 100_000)]])
def test_files_that_do_not_hold_what_their_name_says(chapter, name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refusal(chapter, tmp_path / name)
    assert all(word in message for word in words), message


def conversations(pairs):
    return [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in pairs]


SUMS = conversations((f"What is {i} + {i + 1}?", str(2 * i + 1)) for i in random.Random(0).sample(range(1000), 200))
WORDS = conversations((f"Spell the word number {i} of the song backwards, please.", f"It is {i} letters long.")
                      for i in range(200))
MIXED = random.Random(0).sample(SUMS + WORDS, 400)


@pytest.mark.reaches("validation")
@pytest.mark.parametrize("documents, words", [
    (SUMS[:1] * 60, ["100%"]), (["a text"] * 60, ["100%"]), (MIXED[:-20] + MIXED[:20], ["50%"]),
    (SUMS + WORDS, ["sorted"]), (WORDS + SUMS, ["sorted"]), (SUMS[:54] + WORDS[:6], ["sorted"]),
    (["x" * i for i in range(1, 2000)], ["sorted"]), (["x" * i for i in range(2000, 0, -1)], ["sorted"]),
    (MIXED, []), (SUMS, []), ([f"{i % 7} and {i}" for i in range(60)], [])])
def test_a_validation_part_that_is_no_test_is_told_of(chapter, documents, words, capsys):
    cut = len(documents) * 9 // 10
    chapter.validation.check_split(documents[:cut], documents[cut:])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines)), lines


@pytest.mark.reaches("data.load_documents")
def test_the_split_of_a_file_is_checked(chapter, tmp_path, text_file, capsys):
    chapter.data.load_documents(text_file)
    assert capsys.readouterr().out == ""
    path = tmp_path / "same.txt"
    path.write_text("\n\n".join(["the same speech"] * 60))
    chapter.data.load_documents(path)
    assert "100% of the validation documents" in capsys.readouterr().out


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
    with pytest.raises(chapter.cli.InputError):
        chapter.data.fetch("wikitext-2")
