"""Byte pair encoding at work: which merges are learned, how a sentence is cut, how far to go.

    python bpe_demo.py        (in this folder; draws figures/bpe_compression.png)
"""
import statistics
import time
from collections import Counter

from matplotlib.figure import Figure

from bpe_from_scratch import PIECES, decode, encode, encode_bytes, encode_piece, train_bpe
from cli import run
from data import fetch, load_documents
from results import FIGURES


def first_merges(ranks, num_merges):
    """The ranks as they were after num_merges: training longer only appends."""
    return {token: rank for token, rank in ranks.items() if rank < 256 + num_merges}


def token_counts(pieces, ranks):
    """How often each token id occurs in a text, given as a Counter of its pieces."""
    counts = Counter()
    for piece, frequency in pieces.items():
        for rank in encode_piece(piece.encode(), ranks):
            counts[rank] += frequency
    return counts


def show_merges(ranks):
    """Merges early and late, each with the two tokens it joins: what its bytes were cut into before it existed."""
    tokens = list(ranks)
    for start in (0, 60, 250, 1000, 4000):
        print()
        for token in tokens[256 + start:256 + start + 4]:
            number = ranks[token] - 256
            left, right = (repr(tokens[i])[1:] for i in encode_piece(token, first_merges(ranks, number)))
            print(f"    merge {number + 1:>5,}   {left:>12} + {right:<10} -> {repr(token)[1:]:<16} id {ranks[token]}")


def show_cuts(sentence, ranks):
    for num_merges in (0, 64, 256, 1024):
        fewer = first_merges(ranks, num_merges)
        tokens = [decode([i], fewer).decode(errors="replace") for i in encode(sentence, fewer)]
        print(f"    {num_merges:>5} merges {len(tokens):>4} tokens   {'|'.join(tokens)}")


def show_compression(training, held_out, ranks):
    """Print bytes per token as the merges grow. Returns rows (vocabulary, training, held out, uses of a new token)."""
    parts = (training, held_out)
    pieces = [Counter(piece for document in part for piece in PIECES.findall(document)) for part in parts]
    sizes = [sum(len(document.encode()) for document in part) for part in parts]
    print(f"    {'':>7}{'':>12}{'bytes per token':>22}{'a merged token occurs':>26}")
    print(f"    {'merges':>7}{'vocabulary':>12}{'training':>12}{'held out':>10}{'(median, in training)':>26}")
    rows = []
    for num_merges in (0, 64, 256, 1024, 4096, len(ranks) - 256):
        fewer = first_merges(ranks, num_merges)
        counts = [token_counts(counted, fewer) for counted in pieces]
        ratios = [size / count.total() for size, count in zip(sizes, counts)]
        uses = statistics.median([counts[0][i] for i in range(256, len(fewer))]) if num_merges else None
        print(f"    {num_merges:>7,}{len(fewer):>12,}{ratios[0]:>12.2f}{ratios[1]:>10.2f}"
              + (f"{uses:>20,.0f} times" if num_merges else ""))
        rows.append((len(fewer), *ratios, uses))
    return rows


def draw_compression(rows, path):
    """Bytes per token against the size of the vocabulary, on the text that was trained on and on held-out text."""
    vocabulary, training, held_out, uses = zip(*rows)
    fig = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    ax = fig.subplots()
    ax.plot(vocabulary, training, "o-", color="#1f6f8b")
    ax.plot(vocabulary, held_out, "o-", color="#d9822b")
    ax.text(vocabulary[-1] * 1.08, training[-1], "training text", color="#1f6f8b", va="center")
    ax.text(vocabulary[-1] * 1.08, held_out[-1], "held-out text", color="#d9822b", va="center")
    for size, ratio, n in list(zip(vocabulary, training, uses))[1:]:
        ax.annotate(f"{n:,.0f}x", (size, ratio), (-6, 6), textcoords="offset points", ha="right", color="#888888")
    ax.text(215, 3.6, "grey: how often a merged token\noccurs in the training text (median)", color="#888888",
            va="center")
    ax.set(xscale="log", xlim=(195, vocabulary[-1] * 2.4), ylim=(0.8, 4.1), xlabel="vocabulary (256 bytes + merges)",
           ylabel="bytes per token", title="More merges: shorter sequences, and less text to learn each token from")
    ax.set_xticks(vocabulary, [f"{size:,}" for size in vocabulary])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def main():
    training, held_out = load_documents(fetch("tinyshakespeare"))
    size = sum(len(document.encode()) for document in training)
    start = time.perf_counter()
    first = train_bpe(training, num_merges=1024)
    seconds = time.perf_counter() - start
    ranks = train_bpe(training, num_merges=size)   # all there are: every merge shortens the text
    assert list(ranks)[:len(first)] == list(first), "longer training changed the first merges"
    print(f"\n1. Training. {len(training):,} documents, {size:,} bytes: 1,024 merges take {seconds:.2f} seconds."
          f"\n   After {len(ranks) - 256:,} merges no two neighbours occur together twice. Old merges and young ones:")
    show_merges(ranks)

    lines = [line for document in held_out for line in document.splitlines()]
    sentence = min(lines, key=lambda line: abs(len(line) - 48))   # as long as fits below
    print("\n2. Encoding. A sentence that was not in the training text, after the first merges:\n")
    show_cuts(sentence, ranks)

    print("\n3. How far to go? Short sequences are cheap, but what hardly occurs is hardly learned:\n")
    rows = show_compression(training, held_out, ranks)
    draw_compression(rows, FIGURES / "bpe_compression.png")

    print("\n4. Any bytes come back, UTF-8 or not:\n")
    for data in (b"na\xc3\xafve \xf0\x9f\x99\x82", bytes([0, 200, 255, 128])):
        ids = encode_bytes(data, ranks)
        assert decode(ids, ranks) == data, (decode(ids, ranks), data)
        print(f"    {str(data):<38} -> {ids}")
    print("\nAt work: tiktoken to encode (tiktoken_demo.py: the same ids, faster), Hugging Face tokenizers to train.\n"
          "Bytes per token as a picture: figures/bpe_compression.png")


if __name__ == "__main__":
    run(main)
