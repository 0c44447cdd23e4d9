"""Documents and packed batches.

A document is a piece of text that stands by itself: a speech, a docstring, an article, a conversation. Documents differ
in length by nature. This chapter lays them end to end in one row of T tokens. There is no padding.
"""
import ast
import hashlib
import itertools
import random
import re
import subprocess
import sys
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bpe_from_scratch import valid_unicode
from cli import InputError
from conversations import read_conversation
from formats import ending, excerpt, json_lines, read_utf8, table_rows
from validation import check_split

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = ("tinyshakespeare", "wikitext-2", "python-docs")
IGNORE = -100   # a target that does not count: the default ignore_index of torch's cross_entropy
LOOKAHEAD = 256   # windows among which the packer looks for one that fits


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
    """The "text" of a line or a row, a str, or its conversation, a list of messages.

    What else it may hold only describes it.
    """
    if isinstance(contents, dict) and "messages" in contents:
        return read_conversation(contents)
    if not isinstance(contents, dict) or not isinstance(contents.get("text"), str):
        raise InputError('expected {"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}, found '
                         + excerpt(contents))
    return valid_unicode(contents["text"]).strip("\n")


def learned_text(document):
    """What the model is trained to write, in the tokenizer's form: a text, or what the assistant says in a
    conversation.
    """
    said = [document] if isinstance(document, str) else [m["content"] for m in document if m["role"] == "assistant"]
    return unicodedata.normalize("NFC", "\n\n".join(said))


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
    return len("\n\n".join(map(learned_text, documents)).encode())


def split_documents(documents, source, fraction=0.1):
    """The last `fraction` of the bytes, cut at the nearest document boundary, are for validation."""
    sizes = [len(learned_text(document).encode()) + 2 for document in documents]
    goal = sum(sizes) * (1 - fraction)
    before = [0, *torch.tensor(sizes).cumsum(0).tolist()]   # bytes before each boundary
    cut = min(range(len(before)), key=lambda i: abs(before[i] - goal))
    if not 0 < cut < len(documents):
        raise InputError(f"{source}: {len(documents)} document(s), {sum(sizes)} bytes are too little text to keep"
                         " a tenth for validation; give more documents (in a text, blank lines separate them)")
    return documents[:cut], documents[cut:]


# -------------------------------------------------------------------------------------------------- batches

@dataclass
class PackedBatch:
    input_ids: torch.Tensor      # (T,), document after document
    targets: torch.Tensor        # (T,), the token that follows each input; IGNORE where it does not count
    position_ids: torch.Tensor   # (T,), each token's place in its document, from 0
    cu_seqlens: torch.Tensor     # (S+1,) int32, where the documents begin and, last, T
    max_seqlen: int              # tokens of the longest document

    def to(self, device):
        return PackedBatch(self.input_ids.to(device), self.targets.to(device), self.position_ids.to(device),
                           self.cu_seqlens.to(device), self.max_seqlen)


def tokenize(documents, tokenizer, max_length):
    """Documents as windows (input_ids, targets) of at most max_length tokens, every id but the first a target once.

    A text is framed by end-of-text on both sides: the model must learn to begin one and when to stop. A conversation
    has a frame of its own, and only what the assistant says is a target; the others are IGNORE. A longer document is
    cut into windows; none is dropped but those in which the assistant says nothing. Returns (windows, number of
    documents cut).
    """
    windows, cut = [], 0
    for document in documents:
        if isinstance(document, str):
            ids = [tokenizer.end_of_text, *tokenizer.encode(document), tokenizer.end_of_text]
            counts = [True] * len(ids)
        else:
            ids, counts = tokenizer.encode_conversation(document)
        input_ids, targets = ids[:-1], [i if count else IGNORE for i, count in zip(ids[1:], counts[1:])]
        cut += len(input_ids) > max_length
        windows += [(input_ids[start:start + max_length], targets[start:start + max_length])
                    for start in range(0, len(input_ids), max_length)]
    return [window for window in windows if set(window[1]) != {IGNORE}], cut


def packed_sequence_collate_fn(documents):
    """Lay documents (input_ids, targets), two lists each, end to end. Returns a PackedBatch."""
    lengths = [len(input_ids) for input_ids, _ in documents]
    return PackedBatch(
        input_ids=torch.tensor([i for input_ids, _ in documents for i in input_ids]),    # (T,)
        targets=torch.tensor([i for _, targets in documents for i in targets]),          # (T,)
        position_ids=torch.cat([torch.arange(length) for length in lengths]),            # (T,)
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),             # (S+1,)
        max_seqlen=max(lengths))


def fill(batch, budget):
    """Make a PackedBatch exactly budget tokens long, by documents of one token that do not count.

    torch.compile makes a program for the sizes that it sees. With T always the same, one program serves for every step.
    """
    missing = budget - len(batch.input_ids)
    ends = batch.cu_seqlens[-1] + torch.arange(1, missing + 1, dtype=torch.int32)
    return PackedBatch(
        input_ids=F.pad(batch.input_ids, (0, missing)),                                  # (budget,)
        targets=F.pad(batch.targets, (0, missing), value=IGNORE),                        # (budget,)
        position_ids=F.pad(batch.position_ids, (0, missing), value=-1),   # (budget,), where no document has a token
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),                                  # (S + missing + 1,)
        max_seqlen=batch.max_seqlen)


def shuffled(n, seed, epoch):
    # Seeded by text: torch's CPU generator reads only 32 bits of a seed, so packing two numbers into one would lose
    # one.
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def pack(windows, budget, order):
    """Yield lists of whole windows that have together at most budget tokens.

    order: indices into windows, in the order in which they are to come. One that finds no room waits and is first in
    the next list; shorter ones behind it take the room that is left. No window may have more than budget tokens.
    """
    order, queue = iter(order), []
    while queue := queue + list(itertools.islice(order, LOOKAHEAD - len(queue))):
        room, chosen, waiting = budget, [], []
        while queue and not waiting:   # as long as all have found room there may be more of it
            for i in queue:
                if len(windows[i][0]) <= room:
                    chosen.append(windows[i])
                    room -= len(windows[i][0])
                else:
                    waiting.append(i)
            queue = waiting or list(itertools.islice(order, LOOKAHEAD))
        yield chosen


def training_packs(windows, budget, seed):
    """pack() without end: every window once an epoch, in an order that each epoch shuffles anew.

    It depends on nothing but its arguments. A resumed run makes it anew and skips the packs it has had.
    """
    epochs = (shuffled(len(windows), seed, epoch) for epoch in itertools.count())
    for chosen in pack(windows, budget, itertools.chain.from_iterable(epochs)):
        yield sorted(chosen, key=lambda window: len(window[0]))   # neighbours of equal length share a call of attention
