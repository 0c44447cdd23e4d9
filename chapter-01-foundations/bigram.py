"""The bigram model: look at the last token only, and ask what followed it in the training text.

    python chapter-01-foundations/bigram.py                     half a minute
    python chapter-01-foundations/bigram.py --tokenizer char    a few seconds; draws the table, figures/bigram.png

The oldest language model there is (Markov 1913, Shannon 1948), made twice. Counted: one pass over the text. Learned: a
table of logits that begins at zero and goes down the gradient of the cross-entropy. They come out the same, because
that loss is smallest where the probabilities are the frequencies. This is the bridge to everything after: with five
tokens of context the table would have a million times a billion rows, nearly none of them ever seen, and counting ends.
Gradient descent does not need the table. It works for any function that turns a context into logits.

It also shows, in the smallest setting there is, why fitting the training text perfectly is not the goal.

Shape letters: V vocab_size, B documents in a batch, L their length.
"""
import math
import time
from types import SimpleNamespace

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from assert_equal import check_equal
from cli import ArgumentParser, run
from data import fetch, load_documents, split_documents, train_tokenizer
from generate import generate
from model import CONFIGS
from results import FIGURES
from train import evaluate

ALPHAS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STEPS = 1000
FREQUENT = 20   # a pair seen so often is one whose probability the text really tells
SHOWN = 60      # characters in the picture


class Bigram(nn.Module):
    """A table of logits, one row for each last token, in the same form as model.py: evaluate and generate fit it too.
    """

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)                            # (V, V), row = last token, column = next
        self.config = SimpleNamespace(max_position_embeddings=256)    # what evaluate and generate cut texts to

    def forward(self, input_ids):
        return self.logits[input_ids]                                 # (B, L) -> (B, L, V)


def count_pairs(documents, tokenizer):
    """How often each token follows each other one, document ends included: (V, V), row = the one before."""
    V, end = tokenizer.vocab_size, tokenizer.end_of_text
    pairs = []
    for document in documents:
        ids = torch.tensor([end, *tokenizer.encode(document), end])
        pairs.append(ids[:-1] * V + ids[1:])   # one number for each pair, so that bincount can count them
    return torch.bincount(torch.cat(pairs), minlength=V * V).view(V, V).float()


def smoothed(counts, alpha):
    """Counts to probabilities of the next token, (V, V): as if every pair had been seen alpha times more.

    Without it one unseen pair in the validation text, and there are thousands, has probability 0 and costs infinitely
    many bits.
    """
    counts = counts + alpha
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1e-30)   # a row never seen stays 0 where alpha is 0


def nats_per_pair(counts, probabilities):
    """Mean of -ln p over all pairs that were counted."""
    seen = counts > 0   # 0 * log 0 would be nan
    return -(counts[seen] * probabilities[seen].log()).sum().item() / counts.sum().item()


def choose_alpha(documents, tokenizer, source):
    """Count nine tenths of the training documents and try each alpha on the rest.

    Validation must not choose anything.
    """
    counts, held_out = (count_pairs(part, tokenizer) for part in split_documents(documents, source))
    return min(ALPHAS, key=lambda alpha: nats_per_pair(held_out, smoothed(counts, alpha)))


def learn_table(model, counts, steps, learning_rate=0.3):
    """The same table by gradient descent: all pairs in every step, Adam, the learning rate falling to zero.

    Yields (step, loss before it in nats per token). Equal pairs have equal losses, so the count matrix stands for the
    whole text, and a step over 400,000 tokens costs one softmax of a (V, V) table.
    """
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps + 1):
        loss = -(counts * model.logits.log_softmax(dim=-1)).sum() / counts.sum()
        yield step, loss.item()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def show_followers(counts, counted, learned, tokenizer):
    print("\nWhat follows, by counting (by gradient descent):")
    for before in counts.sum(dim=1).argsort(descending=True)[:4].tolist():
        best = counts[before].argsort(descending=True)[:4].tolist()
        followers = "  ".join(f"{tokenizer.decode([i])!r} {counted[before, i]:.3f} ({learned[before, i]:.3f})"
                              for i in best)
        print(f"    {tokenizer.decode([before])!r:<8}{followers}")


def draw_table(path, counts, counted, tokenizer):
    """The counted table as a picture: the characters that occur most often, in the order of the alphabet."""
    shown = counts.sum(dim=1).argsort(descending=True)[:SHOWN].sort().values   # (S,)
    names = [tokenizer.decode([i]) for i in shown.tolist()]
    names = [{" ": "\u2423", "\n": "\u21b5", "\n\n": "\u00b6"}.get(name, name) for name in names]
    fig = Figure(figsize=(10, 9), dpi=120, layout="constrained")
    fig.get_layout_engine().set(h_pad=0.1)
    ax = fig.subplots()
    teal = LinearSegmentedColormap.from_list("teal", ["#f7f7f4", "#1f6f8b", "#0b2f3d"])
    # Of its square root, or one would see little beside the few pairs that are nearly certain.
    image = ax.imshow(counted[shown][:, shown].sqrt().numpy(), cmap=teal, vmin=0, vmax=1)
    ax.set_xticks(range(len(shown)), names, fontsize=10)
    ax.set_yticks(range(len(shown)), names, fontsize=10)
    ax.tick_params(length=0, labeltop=True, labelright=True)
    ax.set_xlabel("the next character   (\u2423 space, \u21b5 end of a line, \u00b6 end of a document)", fontsize=13)
    ax.set_ylabel("the last character", fontsize=13)
    shares = (0, 0.01, 0.1, 0.25, 0.5, 1)
    bar = fig.colorbar(image, ax=ax, shrink=0.5, pad=0.02, ticks=[share ** 0.5 for share in shares])
    bar.ax.set_yticklabels([f"{share:.0%}" for share in shares], fontsize=11)
    FIGURES.mkdir(exist_ok=True)
    fig.savefig(path)


def run_model(source, kind):
    """Count, score, learn, compare. source: a fetched name or a file; kind: of the tokenizer.

    Returns the row for lineage.py, with a sample.
    """
    start = time.perf_counter()
    train_documents, val_documents = load_documents(source)
    tokenizer = train_tokenizer(kind, train_documents, val_documents, CONFIGS["small"].vocab_size)
    alpha = choose_alpha(train_documents, tokenizer, source)
    counts = count_pairs(train_documents, tokenizer)
    model = Bigram(smoothed(counts, alpha).log())
    _, bits = evaluate(model, val_documents, tokenizer, "cpu")
    seconds = time.perf_counter() - start   # the learned table is for comparison only
    print(f"{counts.sum():,.0f} pairs counted; {(counts > 0).sum():,} of {counts.numel():,} possible ones occur."
          f" alpha {alpha} is best on the held-out tenth of the training documents.")

    table = Bigram(torch.zeros_like(counts))
    progress = {}   # step -> (training nats per token, validation bits per byte)
    for step, loss in tqdm(learn_table(table, counts, STEPS), total=STEPS + 1, unit="step", dynamic_ncols=True):
        if step in (0, 5, 10, 15, 20, 50, 100, STEPS):
            progress[step] = loss, evaluate(table, val_documents, tokenizer, "cpu")[1]
    learned = table.logits.detach().softmax(dim=-1)
    counted = smoothed(counts, alpha=0)
    print("\nThe learned table        training, nats per token   validation, bits per byte")
    for step, (loss, validation) in progress.items():
        print(f"    after {step:>4} steps {loss:>24.4f}{validation:>28.4f}")
    print(f"counted, alpha {alpha:<5} {nats_per_pair(counts, smoothed(counts, alpha)):>23.4f}{bits:>28.4f}")
    print(f"counted, alpha 0 {nats_per_pair(counts, counted):>27.4f}{math.inf:>28}\n"
          "Training loss only falls, towards that of the counts without smoothing. Validation is best long before: a\n"
          "table that has not yet learned that a pair never occurs still keeps something for it. Stopping early"
          " smooths.\n")
    often = min(FREQUENT, int(counts.max()))
    frequent = counts >= often
    check_equal(f"learned = counted, {frequent.sum():,} pairs seen {often} times or more", learned[frequent],
                counted[frequent], tolerance=1e-3)
    check_equal("training loss of both", torch.tensor(progress[STEPS][0]), torch.tensor(nats_per_pair(counts, counted)),
                tolerance=1e-3)
    show_followers(counts, counted, learned, tokenizer)
    if kind == "char":
        draw_table(FIGURES / "bigram.png", counts, counted, tokenizer)
        print("\nThe table as a picture: figures/bigram.png")
    sample = tokenizer.decode(generate(model, tokenizer, [], 300))[:300]
    print(f"\nA sample of the counted table:\n\n{sample}\n")
    print("At work: counting, while the context is one or two tokens; nothing is faster. Beyond that, learning.")
    print(f"bigram: {bits:.4f} bits per byte on the validation documents, {seconds:.0f} s, {counts.numel():,}"
          " parameters")
    return {"model": "bigram", "parameters": counts.numel(), "context": "1", "seconds": seconds,
            "val_bits_per_byte": bits, "sample": sample}


def main():
    parser = ArgumentParser(description="Count pairs of tokens, and learn the same table by gradient descent.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    arguments = parser.parse_args()
    run_model(fetch(arguments.data), arguments.tokenizer)


if __name__ == "__main__":
    run(main)
