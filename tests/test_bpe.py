"""bpe_from_scratch.py against the textbook's algorithm and against tiktoken, and the scripts as a reader runs them."""
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str   # GPT-2's, reformulated for speed

from chapters import chapter1

bpe = chapter1.bpe_from_scratch
demo = chapter1.tiktoken_demo

BYTES = [bytes([byte]) for byte in range(256)]
ALPHABETS = ["ab", "aab ", "a\u00e9\U0001f642 ", "it's 12\n ",
             "\u4f60\u597d\u0301x\u00a0", "\ud83d\ude42e ", "\u05e9\u0664,. \t"]


def to_tiktoken(ranks):
    return tiktoken.Encoding("test", pat_str=bpe.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def random_documents(rng):
    alphabet = rng.choice(ALPHABETS)
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(rng.randint(1, 12))]


def textbook(documents, num_merges):
    """BPE as its definition reads, on pairs of tokens and with every count made anew: (ranks, {piece: its tokens})."""
    frequency = Counter(piece for document in documents for piece in bpe.PIECES.findall(bpe.valid_unicode(document)))
    words = {piece: [bytes([byte]) for byte in piece.encode()] for piece in frequency}
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    for _ in range(num_merges):
        counts = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += frequency[piece]
        best = min(counts, key=lambda pair: (-counts[pair], b"".join(pair)), default=None)
        if best is None or counts[best] < 2:
            break
        assert b"".join(best) not in ranks, "two pairs spell the same token"
        ranks[b"".join(best)] = len(ranks)
        for word in words.values():
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [b"".join(best)]
                i += 1
    return ranks, words


# ---------------------------------------------------------------------------------------------------- train

def test_training_is_the_textbooks_and_cuts_pieces_as_encoding_does():
    rng = random.Random(0)
    for _ in range(300):
        documents, num_merges = random_documents(rng), rng.choice([0, 1, 5, 30, 1000])
        expected, words = textbook(documents, num_merges)
        ranks = bpe.train_bpe(documents, num_merges)
        assert list(ranks.items()) == list(expected.items()), (documents, num_merges)
        for piece, word in words.items():
            assert bpe.encode_piece(piece.encode(), ranks) == [ranks[token] for token in word], (documents, piece)


@pytest.mark.parametrize("documents, merges", [
    ([], []),
    (["abcd"], []),                        # nothing occurs twice
    (["abab"], [b"ab"]),
    (["aaa"], [b"aa"]),                    # in aaa, aa occurs twice
    (["xyab abxy"], [b"ab", b"xy"]),       # a tie: the bytes that sort first
    (["to to to"], [b"to", b" to"]),       # "to" 3 times, " t" only twice; then " to"
    (["1 2 1 2"], [b" 2"]),                # no merge across pieces
])
def test_training_by_hand(documents, merges):
    ranks = bpe.train_bpe(documents, 10)
    assert list(ranks) == BYTES + merges
    assert list(ranks.values()) == list(range(256 + len(merges)))


def test_training_does_not_depend_on_the_hash_seed():
    program = ("from bpe_from_scratch import train_bpe; import random; rng = random.Random(0);"
               "print(list(train_bpe([''.join(rng.choices('abcdef ', k=3000))], 200)))")
    outputs = {subprocess.run([sys.executable, "-c", program], cwd=chapter1.folder, capture_output=True, check=True,
                              env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in "012"}
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


# ----------------------------------------------------------------------------------------- encode and decode

@pytest.fixture(scope="module")
def hard_ranks():
    """Ranks whose merges run through the hard texts themselves; others would leave those as single bytes."""
    ranks = bpe.train_bpe(2 * demo.HARD_TEXT + ALPHABETS * 5, 1000)
    assert len(ranks) > 380
    return ranks


def assert_same(text, ranks, encoding):
    ours, theirs = bpe.encode(text, ranks), encoding.encode_ordinary(text)
    assert ours == theirs, f"{text!r}\nfrom scratch {ours}\ntiktoken     {theirs}"
    assert bpe.decode(ours, ranks) == encoding.decode_bytes(theirs) == bpe.valid_unicode(text).encode()


def test_equals_tiktoken_on_hard_texts(hard_ranks):
    encoding, rng = to_tiktoken(hard_ranks), random.Random(0)
    characters = "".join(demo.HARD_TEXT + ALPHABETS)
    for text in demo.HARD_TEXT + ["".join(rng.choices(characters, k=60)) for _ in range(500)]:
        assert_same(text, hard_ranks, encoding)


def test_equals_tiktoken_on_every_document_of_a_corpus():
    from pydoc_data.topics import topics   # Python's language reference
    documents = list(topics.values())
    ranks = bpe.train_bpe(documents, 700)
    encoding = to_tiktoken(ranks)
    for document in documents:
        assert_same(document, ranks, encoding)


def test_equals_tiktoken_for_ranks_that_no_training_gives():
    """Two pairs with the same bytes, tokens that no merge reaches, bytes in another order: still the same ids."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = ["".join(rng.choices("abc", k=rng.randint(2, 6))).encode() for _ in range(30)]
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(rng.sample(BYTES, 256) + tokens))}
        encoding = to_tiktoken(ranks)
        for text in [token.decode() for token in tokens] + ["".join(rng.choices("abc ", k=60))]:
            assert_same(text, ranks, encoding)


@pytest.mark.parametrize("run", [" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", " \n", "a", "7", "-="], ids=ascii)
def test_a_million_of_anything(run, hard_ranks):
    """tiktoken refuses to split a million white spaces.

    What is split by regex instead gives the same ids where both can.
    """
    tokenizer = chapter1.data.BPETokenizer(list(hard_ranks))
    for before, after in itertools.product(("", "x", " ", "!\ud83d"), ("", "x", "\nx")):
        text = before + run * (3_000 // len(run)) + after
        pieces = bpe.PIECES.findall(bpe.valid_unicode(text))
        assert tokenizer.encode(text) == [i for piece in pieces for i in tokenizer.encoding._encode_single_piece(piece)]
    text = "x" + run * (1_100_000 // len(run)) + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("run", [" ", "ab"])
def test_training_on_a_word_of_a_million_letters(run):
    ranks = bpe.train_bpe([run * (1_000_000 // len(run))], 1000)
    assert list(ranks)[256] == (2 * run.encode())[:2] and len(list(ranks)[-1]) == 2 ** 19


def test_split_pattern_is_that_of_gpt2():
    rng = random.Random(0)
    characters = "".join(demo.HARD_TEXT + ALPHABETS) + "'s're'll'VE_aZ09\u00e9\u00df \n\n  !"
    for _ in range(2000):
        text = bpe.valid_unicode("".join(rng.choices(characters, k=20)))
        assert bpe.PIECES.findall(text) == regex.findall(r50k_pat_str, text), text


def test_pieces_end_where_tiktokens_end():
    """Every character that Python knows, after a letter, a digit and a symbol. regex and tiktoken bring tables of
    their own, which differ on the characters of the newest Unicode versions; Python's are older."""
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    for before in "a1!":
        # Where a whole piece is in the ranks, it becomes one token: so one token means one piece.
        tokens = dict.fromkeys(BYTES + [(before + c).encode() for c in known])
        encoding = to_tiktoken({token: rank for rank, token in enumerate(tokens)})
        for c in known:
            one = len(bpe.PIECES.findall(before + c)) == 1
            assert one == (len(encoding.encode_ordinary(before + c)) == 1), (before, c, f"U+{ord(c):04X}")


def test_any_bytes_come_back(hard_ranks):
    rng = random.Random(0)
    cases = [rng.randbytes(rng.randint(0, 60)) for _ in range(300)] + BYTES
    cases += ["\u4f60\U0001f642 x".encode()[start:] for start in range(9)]   # begins inside a character
    cases += ["\u4f60\U0001f642".encode()[:end] for end in range(7)]         # ends inside one
    cases += [b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xff\xfe"]   # forbidden in UTF-8
    for data in cases:
        assert bpe.decode(bpe.encode_bytes(data, hard_ranks), hard_ranks) == data
    for text in demo.HARD_TEXT:
        assert bpe.encode_bytes(bpe.valid_unicode(text).encode(), hard_ranks) == bpe.encode(text, hard_ranks)


def test_surrogates(hard_ranks):
    def encode(text):
        return bpe.decode(bpe.encode(text, hard_ranks), hard_ranks).decode()

    assert encode("\ud83d\ude42") == "\U0001f642"
    assert encode("a\ud83d b\ude42\ud83d") == "a\ufffd b\ufffd\ufffd"
    assert encode("\ufeffa") == "\ufeffa"   # UTF-16's byte order mark is a character of the text


# ------------------------------------------------------------------------------------------------ the scripts

def test_bpe_demo_runs_and_draws(text_file, tmp_path):
    shutil.copytree(chapter1.folder, tmp_path / "chapter", ignore=shutil.ignore_patterns("out*", "*.png"))
    (tmp_path / "chapter" / "figures").mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "download.py").write_text("")   # "already here"
    shutil.copy(text_file, tmp_path / "data" / "tinyshakespeare.txt")
    script = tmp_path / "chapter" / "bpe_demo.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0 and "merge     1 " in done.stdout, done.stdout + done.stderr
    assert 5_000 < (tmp_path / "chapter" / "figures" / "bpe_compression.png").stat().st_size < 200_000


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("network", [True, False])
def test_tiktoken_demo_with_and_without_network(network, text_file, tmp_path, monkeypatch, capsys, hard_ranks):
    def get_encoding(name):
        if not network:
            raise ConnectionError(f"no {name} without network")
        return to_tiktoken(hard_ranks)

    path = tmp_path / "play.txt"
    path.write_text(text_file.read_text().replace("o", "\u00f6"), encoding="utf-8")   # bytes and characters differ
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(demo, "fetch", lambda source: path)
    monkeypatch.setattr(chapter1.results, "RESULTS", tmp_path)
    demo.main()
    assert ("skipped gpt2 and cl100k_base" in capsys.readouterr().out) == (not network)
    rows = json.loads((tmp_path / "tokenizers.json").read_text())["rows"]
    assert [row.get("vocabulary") for row in rows[3:]] == [len(hard_ranks) if network else None] * 2

    training, held_out = chapter1.data.load_documents(path)
    ranks = bpe.train_bpe(training, 1024)
    ratio = sum(len(text.encode()) for text in held_out) / sum(len(bpe.encode(text, ranks)) for text in held_out)
    assert [row["bytes_per_token"] for row in rows[:3]] == [ratio] * 3
