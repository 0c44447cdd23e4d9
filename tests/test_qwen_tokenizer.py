"""Chapter 2's tokenizer: the files of a checkpoint folder, through tiktoken, give the ids that `transformers` gives."""
import itertools
import json
import shutil
import unicodedata

import pytest
from transformers import AutoTokenizer

from chapters import load_chapter

chapter2 = load_chapter("chapter-02-qwen3-packed")
TEXTS = ["the king's  speech\n\nIt'S 2024, isn't it?", "naïve cafe\u0301 日本語 🙂🏽", "  \t x \r\n\r\n y",
         "<|im_end|> typed", "\u2028\x85\x00",
         "a" * 50, " 1234567 3.14", ""]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n\n 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "<|im_end|> says who?"}, {"role": "assistant", "content": "né\n\nbis"}]


@pytest.fixture(scope="module")
def tokenizer(text_file):
    documents = text_file.read_text().split("\n\n") + TEXTS * 3
    return chapter2.tokenizer.Tokenizer.train(documents, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def marked(tokenizer):
    """A tokenizer with tokens that a text may contain; one of them begins like another."""
    marks = ["<think>", "</think>", "<tool", "<tool_call>"]
    special = tokenizer.special_tokens | {mark: tokenizer.vocab_size + i for i, mark in enumerate(marks)}
    return chapter2.tokenizer.Tokenizer(tokenizer.ranks, special, frozenset(marks))


def plain(tokenizer, text):
    """transformers' ids of a text in which special tokens are text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_transformers_opens_the_folder_and_gives_the_same_ids(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == plain(theirs, text) and tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.end_of_turn


def test_reload(tokenizer, folder, tmp_path):
    loaded = chapter2.tokenizer.load_tokenizer(folder)
    assert loaded.ranks == tokenizer.ranks and loaded.special_tokens == tokenizer.special_tokens
    contents = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: {"content": token["content"], "special": True} for token in contents["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(contents["model"]["vocab"]))
    merges = "\n".join(" ".join(m) for m in contents["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    loaded = chapter2.tokenizer.load_tokenizer(tmp_path)
    assert loaded.ranks == tokenizer.ranks and loaded.special_tokens == tokenizer.special_tokens


def test_conversations_equal_the_chat_template(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = CHAT[:3]   # without the typed <|im_end|>: transformers' template would let it end the turn
    for answer in (False, True):
        ids, counts = tokenizer.encode_conversation(messages, answer)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=True)["input_ids"]
        assert ids == expected and len(counts) == len(ids)


def test_only_what_the_assistant_says_is_learned(tokenizer):
    ids, counts = tokenizer.encode_conversation(CHAT)
    learned = [i for i, count in zip(ids, counts) if count]
    assert learned == [*tokenizer.encode("4"), tokenizer.end_of_turn, *tokenizer.encode("né\n\nbis"),
                       tokenizer.end_of_turn]
    assert ids.count(tokenizer.end_of_turn) == len(CHAT)   # one a message, whatever people type


@pytest.mark.parametrize("vocab", [{"!": True}, {"!": -1}, {"!": 2 ** 40}, {"!": 50}, {"!": None}], ids=str)
def test_ids_that_cannot_be_are_named(tokenizer, tmp_path, vocab):
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= vocab
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(chapter2.cli.InputError):
        chapter2.tokenizer.load_tokenizer(tmp_path)


def test_marks_in_a_text_become_their_tokens(marked, folder, tmp_path):
    """Before the text between them is normalized: a stroke after > would make one character of the two."""
    marked.save(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    theirs, loaded = AutoTokenizer.from_pretrained(tmp_path), chapter2.tokenizer.load_tokenizer(tmp_path)
    combining = ["", "\u0338", "\u0301\u0323", "\u20e3", "\u3099", "\u1161", " ", "\n"]
    texts = ["<think>\nwell, </think>\n\nyes <think>", "<tool_call><tool_calls><tool>", "<think\u0338>"]
    texts += [before + mark + after + mark for mark in (*marked.marks, "<|im_end|>", "<|endoftext|>")
              for after in combining
              for before in ("", "e", "\u0301", "\u1100")]
    for text in texts:
        ids = plain(theirs, text)
        assert marked.encode(text) == ids and loaded.encode(text) == ids, text
    assert marked.special_tokens["</think>"] in marked.encode("</think>\u0338")
    assert marked.decode(marked.encode(texts[0])) == texts[0]


# ------------------------------------------------------------------------------------------------ very long words

RUNS = [" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", " \n", "\u00a0 ", "\t\u3000", "a", "1", "!", "-=",
        "e\u0301", "\u0301", "🙂"]


@pytest.mark.parametrize("run", RUNS, ids=ascii)
def test_a_long_run_of_anything_is_what_transformers_makes_of_it(marked, tokenizer, folder, run, monkeypatch):
    """As long as both can; a million after that.

    What tiktoken refuses is split here, so that is tried at both lengths.
    """
    theirs = AutoTokenizer.from_pretrained(folder)
    for before, after in itertools.product(("", "x", "!", "\n "), ("", "x", "\nx", " ", "\u0338")):
        text = before + run * (3_000 // len(run)) + after
        expected = plain(theirs, text)
        assert tokenizer.encode(text) == expected
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encoding", Refuses(tokenizer.encoding))
            assert tokenizer.encode(text) == expected
    text = "x</think>" + run * (1_100_000 // len(run)) + "x"
    assert marked.decode(marked.encode(text)) == unicodedata.normalize("NFC", text)


class Refuses:
    """tiktoken's Encoding, for which every text is too long to split."""

    def __init__(self, encoding):
        self._encode_single_piece = encoding._encode_single_piece

    def encode(self, *_, **__):
        raise ValueError("Max stack size exceeded for backtracking")


def test_half_a_character_before_a_million_spaces(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d" + " " * 1_100_000)) == "a\ufffd" + " " * 1_100_000


@pytest.mark.parametrize("run", [" ", "ab", "\n"], ids=ascii)
def test_training_on_a_word_of_a_hundred_thousand_letters(run, tmp_path):
    """Merges of such words are as long as the words: nothing may look at every pair of their letters."""
    text = run * (100_000 // len(run))
    tokenizer = chapter2.tokenizer.Tokenizer.train([text, "x" + text + "y"], 400)
    tokenizer.save(tmp_path)
    assert max(map(len, tokenizer.ranks)) > 50_000
    assert len(chapter2.tokenizer.load_tokenizer(tmp_path).encode(text)) == len(tokenizer.encode(text)) < 30


# ------------------------------------------------------------------------------------------------ what is saved

def test_what_never_changes_is_computed_once(tokenizer, folder, tmp_path, monkeypatch):
    """Not for each checkpoint; and the merges of a file, 151,387 for Qwen, not even once."""
    trained = chapter2.tokenizer.Tokenizer(tokenizer.ranks, tokenizer.special_tokens)
    trained.save(tmp_path)
    loaded = chapter2.tokenizer.load_tokenizer(folder)
    monkeypatch.setattr(chapter2.tokenizer, "last_merge", None)   # cannot be called
    for again in (trained, loaded):
        again.save(tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_merges_of_long_tokens_are_those_of_the_training(tokenizer):
    """Each token is, by the merges before it, two tokens, and with its own merge it is one."""
    for token, rank in tokenizer.ranks.items():
        if len(token) > 1:
            older = {other: i for other, i in tokenizer.ranks.items() if i < rank}
            parts = [older[part] for part in chapter2.tokenizer.last_merge(token, tokenizer.ranks)]
            assert chapter2.bpe_from_scratch.encode_piece(token, older) == parts and len(parts) == 2
