"""The neural n-gram model: the last few tokens through a small network (Bengio et al. 2003).

    python chapter-01-foundations/ngram.py                      with --tokenizer char a window is five characters

A table of what follows every five tokens would have a million times a billion rows, and nearly every row would be
empty: two contexts that mean the same but differ in one token share nothing. Here each token is first replaced by a
vector that is learned, and a network reads the vectors side by side. Tokens that behave alike get vectors that lie
close, and then what was learned from one context holds for its neighbours too. That is the embedding, and every model
since has one.

It looks at a window and nowhere else. What stands six tokens back does not exist; gru.py does something about that.

Shape letters: B documents in a batch, L their length, V vocab_size, N window, D embedding, E examples.
"""
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cli import ArgumentParser, run
from data import fetch, load_documents, shuffled, train_tokenizer
from generate import generate
from model import CONFIGS
from optimizer import adamw, schedule
from train import evaluate

WINDOW = 5


class NGram(nn.Module):
    """Embeddings of N tokens side by side -> hidden layer -> logits."""

    def __init__(self, vocab_size, padding, embedding_size=64, hidden_size=128):
        super().__init__()
        self.padding = padding
        self.config = SimpleNamespace(max_position_embeddings=256)   # what evaluate and generate cut texts to
        self.embed_tokens = nn.Embedding(vocab_size, embedding_size)
        self.hidden = nn.Linear(WINDOW * embedding_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size)
        # torch draws embeddings from N(0, 1). Summed over N * D inputs that saturates tanh, where its gradient is 0.
        nn.init.normal_(self.embed_tokens.weight, std=0.1)

    def score(self, windows):
        """The N tokens before each target (..., N) -> its logits (..., V)."""
        x = self.embed_tokens(windows).flatten(-2)      # (..., N * D): the place in the window is the place in x
        return self.lm_head(self.hidden(x).tanh())      # (..., V)

    def forward(self, input_ids):
        """input_ids (B, L) -> logits (B, L, V), as model.py does it: evaluate and generate fit this model too."""
        # Position t must see tokens t-N+1 .. t. Before the document there are none, and padding says so.
        padded = F.pad(input_ids, (WINDOW - 1, 0), value=self.padding)   # (B, N - 1 + L)
        return self.score(padded.unfold(1, WINDOW, 1))                   # (B, L, N) -> (B, L, V)


def make_examples(documents, tokenizer):
    """Every target with the N tokens before it: (E, N + 1), the target last.

    A window has the same size everywhere, so nothing needs to be padded but the beginning of a document, and examples
    of any documents can share a batch. train.py cannot do that.
    """
    end, examples = tokenizer.end_of_text, []
    for document in documents:
        ids = [tokenizer.padding] * (WINDOW - 1) + [end, *tokenizer.encode(document), end]
        examples.append(torch.tensor(ids).unfold(0, WINDOW + 1, 1))   # a view: neighbours share their tokens
    return torch.cat(examples)


def train_model(model, examples, steps, batch_size=512, learning_rate=1e-2):
    """Minibatches of examples in random order, AdamW and the schedule of train.py."""
    optimizer = adamw(model, learning_rate)
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step / steps)
        start = step * batch_size % len(examples)
        order = shuffled(len(examples), 0, step * batch_size // len(examples))
        batch = examples[order[start:start + batch_size]]                     # (B, N + 1); fewer at the end of an epoch
        loss = F.cross_entropy(model.score(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def show_neighbours(model, tokenizer, examples):
    """Tokens whose embeddings point the same way as that of a frequent one: what the model holds to be alike."""
    vectors = F.normalize(model.embed_tokens.weight, dim=-1)                  # (V, D)
    frequency = examples[:, -1].bincount(minlength=tokenizer.vocab_size)      # (V,)
    words = [i for i in frequency.argsort(descending=True).tolist() if tokenizer.tokens[i].strip().isalpha()]
    if tokenizer.kind == "bpe":
        words = [i for i in words if len(tokenizer.tokens[i].strip()) > 1][:300]   # rarer ones have hardly been moved
    print("\nTokens with the most similar embeddings (cosine):")
    for i in words[:30:5]:
        cosines = vectors[words] @ vectors[i]
        best = cosines.argsort(descending=True)[1:5].tolist()                 # the first is the token itself
        print(f"    {tokenizer.decode([i])!r:<9}"
              + "  ".join(f"{tokenizer.decode([words[j]])!r} {cosines[j]:.2f}" for j in best))


def run_model(source, kind):
    """Train, score, sample. source: a fetched name or a file; kind: of the tokenizer.

    Returns the row for lineage.py, with a sample.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    train_documents, val_documents = load_documents(source)
    tokenizer = train_tokenizer(kind, train_documents, val_documents, CONFIGS["small"].vocab_size)
    examples = make_examples(train_documents, tokenizer)
    model = NGram(tokenizer.vocab_size, tokenizer.padding)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(examples):,} examples of {WINDOW} tokens and the one that follows; {parameters:,} parameters")

    train_model(model, examples, steps=1500)
    _, bits = evaluate(model, val_documents, tokenizer, "cpu")
    seconds = time.perf_counter() - start
    show_neighbours(model, tokenizer, examples)
    sample = tokenizer.decode(generate(model, tokenizer, [], 300))[:300]
    print(f"\nA sample:\n\n{sample}\n")
    print(f"n-gram: {bits:.4f} bits per byte on the validation documents, {seconds:.0f} s, {parameters:,} parameters")
    return {"model": "n-gram", "parameters": parameters, "context": str(WINDOW), "seconds": seconds,
            "val_bits_per_byte": bits, "sample": sample}


def main():
    parser = ArgumentParser(description="Train a network on windows of a few tokens.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    arguments = parser.parse_args()
    run_model(fetch(arguments.data), arguments.tokenizer)


if __name__ == "__main__":
    run(main)
