"""Documents, tokenizers and padded batches.

A document is a piece of text that stands by itself: a speech, a docstring, an article. Documents differ in length by
nature. This chapter pads them into a rectangle (B, L), and reports how much of the rectangle is padding.
"""
import ast
import functools
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from bpe_from_scratch import PIECES, SPLIT_PATTERN, train_bpe, valid_unicode
from cli import InputError
from formats import ending, excerpt, json_lines, read_utf8, table_rows
from validation import check_split

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = ("tinyshakespeare", "wikitext-2", "python-docs")
IGNORE = -100   # a target that does not count: the default ignore_index of torch's cross_entropy


# ------------------------------------------------------------------------------------------------ documents

def fetch(source):
    """Download a named dataset if it is not here yet. Returns source, or its stand-in when there is no network."""
    if source in ("tinyshakespeare", "wikitext-2"):
        done = subprocess.run([sys.executable, DATA / "download.py", source], stdout=subprocess.DEVNULL)
        if done.returncode != 0 and source == "tinyshakespeare":
            print("No Tiny Shakespeare without network: training on python-docs, the text that comes with Python.")
            return "python-docs"
        if done.returncode != 0:
            raise InputError(f"{source} could not be downloaded; --data python-docs needs no network")
    return source


def load_documents(source):
    """Read the documents of a fetched name or of a file.

    source: one of NAMES, or a file in one of the formats of formats.py. Returns (training documents, validation
    documents), two lists of what read_document() makes. Raises InputError if there is too little.
    """
    if source == "wikitext-2":   # comes with a split of its own, and published numbers use it
        return tuple(read_jsonl(DATA / "wikitext-2" / f"{part}.jsonl") for part in ("train", "validation"))
    documents = python_docs() if source == "python-docs" else read_file(source)
    train_documents, val_documents = split_documents(documents, source)
    check_split(train_documents, val_documents)
    return train_documents, val_documents


def read_file(source):
    path = DATA / "tinyshakespeare.txt" if source == "tinyshakespeare" else Path(source)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--data {source}: {problem}; give a .txt or .jsonl file, or one of {', '.join(NAMES)}")
    readers = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".parquet": read_parquet}
    return readers.get(ending(path), read_text)(path)


def read_text(path):
    """Documents of a text file: whatever stands between blank lines, which may hold white space."""
    text = re.sub(r"^[^\S\n]+$", "", read_utf8(path), flags=re.MULTILINE)
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def read_jsonl(path):
    """Documents of a .jsonl file, one a line."""
    return read_documents(path, json_lines(path))


def read_parquet(path):
    """Documents of a .parquet file, one a row."""
    return read_documents(path, table_rows(path))


def read_documents(path, objects):
    documents = []
    for place, contents in objects:
        try:
            documents.append(read_document(contents))
        except (InputError, RecursionError) as error:
            raise InputError(f"{path}, {place}: {error}") from None
    return [document for document in documents if document]


def read_document(contents):
    """The "text" of a line or a row, a str. What else it may hold, an id or a source, only describes it."""
    if not isinstance(contents, dict) or not isinstance(contents.get("text"), str):
        raise InputError(f'expected {{"text": "..."}}, found {excerpt(contents)}')
    return valid_unicode(contents["text"]).strip("\n")


def python_docs():
    """The text that every Python carries: its language reference and the docstrings of its standard library."""
    import pydoc_data.topics
    documents = set(pydoc_data.topics.topics.values())
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documents.add(ast.get_docstring(node) or "")
    documents = {document.strip() for document in documents} - {""}
    # Ordered by hash: the same on every run, and the validation split at the end is like the rest.
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def num_bytes(documents):
    """UTF-8 bytes of a list of documents; what the document-end token stands for, the blank line between, counts too.
    """
    return len("\n\n".join(documents).encode())


def split_documents(documents, source, fraction=0.1):
    """The last `fraction` of the bytes, cut at the nearest document boundary, are for validation."""
    sizes = [len(document.encode()) + 2 for document in documents]
    goal = sum(sizes) * (1 - fraction)
    before = [0, *torch.tensor(sizes).cumsum(0).tolist()]   # bytes before each boundary
    cut = min(range(len(before)), key=lambda i: abs(before[i] - goal))
    if not 0 < cut < len(documents):
        raise InputError(f"{source}: {len(documents)} document(s), {sum(sizes)} bytes are too little text to keep"
                         " a tenth for validation; give more documents (in a text, blank lines separate them)")
    return documents[:cut], documents[cut:]


# ----------------------------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """Text <-> token ids: what the character and the BPE tokenizer share.

    tokens: the ordinary tokens as bytes, in the order of their ids. Two special ids follow them: the end of a
    document, which stands for the blank line between documents, and padding.
    """

    def __init__(self, tokens):
        self.end_of_text, self.padding = len(tokens), len(tokens) + 1
        self.tokens = tokens + [b"\n\n", b""]
        self.vocab_size = len(self.tokens)

    def decode(self, ids):
        # A token may end in the middle of a UTF-8 character, so join the bytes before decoding them.
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    def save(self, path):
        # JSON holds text, not bytes; latin-1 maps each byte to the character of the same number, and back.
        tokens = [token.decode("latin-1") for token in self.tokens[:-2]]
        Path(path).write_text(json.dumps({"kind": self.kind, "tokens": tokens}))


class CharTokenizer(Tokenizer):
    """One token for each character of the alphabet."""
    kind = "char"

    def __init__(self, tokens):
        super().__init__(tokens)
        self.ids = {token.decode(): i for i, token in enumerate(tokens)}

    @classmethod
    def train(cls, documents):
        return cls([character.encode() for character in sorted(set("".join(documents)))])

    def encode(self, text):
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            raise InputError(f"the character tokenizer does not know {unknown}: its alphabet is that of its training"
                             " text; leave them out, or train with --tokenizer bpe, which knows every byte")
        return [self.ids[character] for character in text]


class BPETokenizer(Tokenizer):
    """Byte pair encoding, trained by bpe_from_scratch.py; tiktoken applies it, in Rust (tiktoken_demo.py compares)."""
    kind = "bpe"

    def __init__(self, tokens):
        super().__init__(tokens)
        self.encoding = tiktoken.Encoding(
            "chapter-01", pat_str=SPLIT_PATTERN, mergeable_ranks={token: i for i, token in enumerate(tokens)},
            special_tokens={})

    @classmethod
    def train(cls, documents, vocab_size):
        ranks = train_bpe(documents, vocab_size - 256 - 2)   # 256 bytes and 2 special tokens need no merge
        return cls(sorted(ranks, key=ranks.get))

    def encode(self, text):
        try:
            return self.encoding.encode(text, disallowed_special=())
        except ValueError:   # a million white spaces in a row are too many for tiktoken to split, though not to merge
            pieces = PIECES.findall(valid_unicode(text))
            return [i for piece in pieces for i in self.encoding._encode_single_piece(piece)]


def train_tokenizer(kind, train_documents, val_documents, vocab_size):
    """A tokenizer of kind "bpe" or "char" for these documents."""
    if kind == "bpe":
        return BPETokenizer.train(train_documents, vocab_size)
    # The alphabet of both: a character that occurs in validation alone has no byte to fall back to.
    return CharTokenizer.train(train_documents + val_documents)


def load_tokenizer(path):
    """The tokenizer that Tokenizer.save wrote. Raises InputError for a damaged file."""
    try:
        saved = json.loads(Path(path).read_text())
        kind = {"char": CharTokenizer, "bpe": BPETokenizer}[saved["kind"]]
        return kind([token.encode("latin-1") for token in saved["tokens"]])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a tokenizer of this chapter ({error})") from None


# -------------------------------------------------------------------------------------------------- batches

@dataclass
class PaddedBatch:
    input_ids: torch.Tensor   # (B, L), padding at the right
    targets: torch.Tensor     # (B, L), the token that follows each input; IGNORE where the input is padding

    def to(self, device):
        return PaddedBatch(self.input_ids.to(device), self.targets.to(device))


def tokenize(documents, tokenizer, max_length):
    """Documents as token sequences of at most max_length + 1 ids, every one but the first being a target once.

    A document is framed by end-of-text on both sides: the model must learn to begin one and when to stop. A longer one
    is cut into windows that overlap by one id, so that no target is lost. Returns (windows, number of documents cut).
    """
    windows, cut = [], 0
    for document in documents:
        ids = [tokenizer.end_of_text, *tokenizer.encode(document), tokenizer.end_of_text]
        cut += len(ids) > max_length + 1
        windows += [ids[start:start + max_length + 1] for start in range(0, len(ids) - 1, max_length)]
    return windows, cut


def padded_collate_fn(windows, padding):
    """Put windows of different lengths side by side and fill up with padding. Returns a PaddedBatch."""
    L = max(len(window) for window in windows) - 1
    input_ids = torch.full((len(windows), L), padding)   # (B, L)
    targets = torch.full((len(windows), L), IGNORE)      # (B, L)
    for row, window in enumerate(windows):
        input_ids[row, :len(window) - 1] = torch.tensor(window[:-1])
        targets[row, :len(window) - 1] = torch.tensor(window[1:])
    return PaddedBatch(input_ids, targets)


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    # Seeded by text: torch's CPU generator reads only 32 bits of a seed, so packing two numbers into one would lose
    # one.
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def training_windows(windows, batch_size, seed, step):
    """The batch_size windows of a step: every window once an epoch, in an order that each epoch shuffles anew.

    A pure function of (seed, step): there is no iterator whose position a resumed run would have to restore.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [windows[shuffled(len(windows), seed, i // len(windows))[i % len(windows)]] for i in positions]
