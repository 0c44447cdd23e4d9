"""Chapter 2's tokenizer: the files of a checkpoint folder, through tiktoken, give the ids that `transformers` gives."""
import json
import unicodedata

import pytest
from transformers import AutoTokenizer

from chapters import load_chapter

chapter2 = load_chapter("chapter-02-qwen3-packed")
TEXTS = ["the king's  speech\n\nIt'S 2024, isn't it?", "naïve cafe\u0301 日本語 🙂🏽", "  \t x \r\n\r\n y", "<|im_end|> typed", "\u2028\x85\x00",
         "a" * 50, " 1234567 3.14", ""]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n\n 2 + 2?"}, {"role": "assistant", "content": "4"},
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
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in contents["model"]["merges"]) + "\n")
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
    assert learned == [*tokenizer.encode("4"), tokenizer.end_of_turn, *tokenizer.encode("né\n\nbis"), tokenizer.end_of_turn]
    assert ids.count(tokenizer.end_of_turn) == len(CHAT)   # one a message, whatever people type


@pytest.mark.parametrize("vocab", [{"!": True}, {"!": -1}, {"!": 2 ** 40}, {"!": 50}, {"!": None}], ids=str)
def test_ids_that_cannot_be_are_named(tokenizer, tmp_path, vocab):
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= vocab
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(chapter2.errors.InputError):
        chapter2.tokenizer.load_tokenizer(tmp_path)


def test_marks_in_a_text_become_their_tokens(tokenizer, tmp_path):
    special = tokenizer.special_tokens | {"<think>": tokenizer.vocab_size, "</think>": tokenizer.vocab_size + 1}
    marked = chapter2.tokenizer.Tokenizer(tokenizer.ranks, special, frozenset({"<think>", "</think>"}))
    marked.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    text = "<think>\nwell, </think>\n\nyes <think>"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert special["</think>"] in ids
    for tokenizer in (marked, chapter2.tokenizer.load_tokenizer(tmp_path)):
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
