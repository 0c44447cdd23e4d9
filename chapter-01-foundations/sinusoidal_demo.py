"""Positions from a formula instead of a learned table: sines and cosines, as the first Transformer had them.

    python chapter-01-foundations/sinusoidal_demo.py     the formula at once, then nine runs, about twelve minutes;
                                                         results/positions.json, figures/positions.png

Attention does not see order: a token's query meets the same keys wherever they stand, and only the causal mask tells
the second token of a document from the first. model.py learns a vector for each of its 64 positions. Vaswani et al.
(2017) compute it: pair i of the dimensions is the hand of a clock that turns by 10,000^(-2i/D) radians a token, the
first pair fast, the last hardly at all, and sine and cosine say where the hand points. A formula gives two things for
free: a row for any position; and the row k tokens on is the same row turned, by a matrix that depends on k alone, so
that one matrix can find "the token before", wherever it is asked from.

Both tables, and none, train the default run of train.py, three seeds each. A run that is stopped goes on: what is
finished lies in --out. Shape letters: L positions, D width.
"""
import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from assert_equal import check_equal
from checkpoint import beside
from cli import ArgumentParser, run
from data import fetch, load_documents, padded_collate_fn, tokenize, train_tokenizer, training_windows
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from results import FIGURES, write_results
from train import evaluate, train_step
from training_state import fingerprint

STEPS, BATCH, LEARNING_RATE = 1500, 16, 3e-3   # those of train.py
SEEDS = (0, 1, 2)
T_95 = 4.303   # Student's t: the mean of three differences is known to 4.303 standard errors, in 95 of 100 cases


def frequencies(D):
    """Radians a token by which each pair of dimensions turns, (D/2,)."""
    return 10_000 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


def sinusoidal(L, D):
    """The table of Vaswani et al. 2017, section 3.5, (L, D): sines in the even columns, cosines in the odd ones."""
    angles = torch.arange(L)[:, None] * frequencies(D)                               # (L, D/2), float64
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()      # (L, D)


def as_in_the_paper(L, D):
    """The same table number by number: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(the same)."""
    return torch.tensor([[(math.cos if d % 2 else math.sin)(pos / 10_000 ** (d // 2 * 2 / D)) for d in range(D)]
                         for pos in range(L)])


def shift(k, D):
    """The matrix (D, D) that turns each pair by k tokens: row @ shift(k, D) is the row k positions on."""
    cos, sin = (k * frequencies(D)).cos(), (k * frequencies(D)).sin()                # (D/2,)
    return torch.block_diag(*[torch.tensor([[c, -s], [s, c]]) for c, s in zip(cos.tolist(), sin.tolist())])


class FixedPositions(nn.Module):
    """Takes the place of embed_positions in model.py: a table that nobody trains."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, positions):
        return self.table[positions]   # (L,) -> (L, D)


# The paper multiplies a token's vector by sqrt(D) before it adds the table. In model.py that vector has length 1, as if
# divided by sqrt(D), so the table is divided too. Undivided, its rows of length sqrt(D/2) = 8 drown the tokens.
TABLES = {"sinusoidal": lambda L, D: sinusoidal(L, D) / math.sqrt(D), "none": torch.zeros}


def show_formula(L, D):
    table = sinusoidal(L, D)
    print(f"1. The table of {L} positions, {D} numbers each.\n")
    check_equal("with tensors = the paper's formula, number by number", table, as_in_the_paper(L, D))
    for k in (1, 10):
        check_equal(f"rows turned by one matrix = the rows {k} positions on", table[:-k] @ shift(k, D), table[k:], 1e-5)
    distances = torch.arange(L)[:, None] - torch.arange(L)                           # (L, L)
    check_equal("row . row = the sum over pairs of cos(distance * frequency)", table @ table.T,
                (distances[..., None] * frequencies(D)).cos().sum(-1).float(), 1e-4)
    turns = (frequencies(D) * L / (2 * math.pi) >= 1).sum()
    print(f"\n    {turns} of {D // 2} pairs turn round at least once in {L} tokens; the others only tell far from near."
          f"\n    Length of a row: {table[0].norm():.2f}. Of a token's vector before training: 1.00; of a learned"
          f" position's: {0.02 * math.sqrt(D):.2f}.\n")


def make_model(name, tokenizer, seed):
    """The model that train.py would train, with the positions of this name. All other weights begin the same."""
    torch.manual_seed(seed)
    config = replace(CONFIGS["small"], vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.padding)
    model = Transformer(config)
    if name in TABLES:
        table = TABLES[name](config.max_position_embeddings, config.hidden_size)
        model.model["embed_positions"] = FixedPositions(table)
    return model


def train_model(name, seed, train_documents, val_documents, tokenizer, bar):
    """One run. Returns what is kept of it, as JSON can hold it."""
    model = make_model(name, tokenizer, seed)
    L, D = model.config.max_position_embeddings, model.config.hidden_size
    windows, _ = tokenize(train_documents, tokenizer, L)
    optimizer = Optimizer(model, adamw(model, LEARNING_RATE))
    for step in range(STEPS):
        batch = padded_collate_fn(training_windows(windows, BATCH, seed, step), tokenizer.padding)
        train_step(model, optimizer, batch, LEARNING_RATE * schedule(step / STEPS))
        bar.update()
    _, bits = evaluate(model, val_documents, tokenizer, "cpu")
    table = model.model.embed_positions(torch.arange(L)).tolist()
    longer = None
    if name in TABLES:   # a formula has rows for positions that no training has seen
        model.config = replace(model.config, max_position_embeddings=2 * L)
        model.model["embed_positions"] = FixedPositions(TABLES[name](2 * L, D))
        _, longer = evaluate(model, val_documents, tokenizer, "cpu")
    return {"parameters": model.num_parameters(), "bits": bits, "bits_longer": longer, "table": table}


def finished_runs(source, out):
    """{(name, seed): what is kept of the run}: read from `out` where it is finished, else trained."""
    out.mkdir(parents=True, exist_ok=True)
    train_documents, val_documents = load_documents(source)
    tokenizer = train_tokenizer("bpe", train_documents, val_documents, CONFIGS["small"].vocab_size)
    text = fingerprint(train_documents + val_documents)
    files = {(name, seed): out / f"{name}-{seed}-{STEPS}-{text}.json"
             for seed in SEEDS for name in ("learned", *TABLES)}
    done = sum(path.exists() for path in files.values())
    with tqdm(total=len(files) * STEPS, initial=done * STEPS, unit="step", dynamic_ncols=True) as bar:
        for (name, seed), path in files.items():
            if not path.exists():
                kept = train_model(name, seed, train_documents, val_documents, tokenizer, bar)
                bar.write(f"{name}, seed {seed}: {kept['bits']:.4f} bits per byte")
                beside(path, "unfinished").write_text(json.dumps(kept))
                os.replace(beside(path, "unfinished"), path)   # a file that is there is complete
    return {key: json.loads(path.read_text()) for key, path in files.items()}


def compare(runs):
    """The rows of the table: means over the seeds, and the difference to learned positions of the same seed."""
    rows = []
    for name in ("learned", *TABLES):
        bits, longer = ([runs[name, seed][key] for seed in SEEDS] for key in ("bits", "bits_longer"))
        row = {"positions": name, "parameters": runs[name, 0]["parameters"], "bits": statistics.mean(bits),
               "difference": "", "interval": "", "longer": "has no rows" if None in longer else statistics.mean(longer)}
        if name in TABLES:
            pairs = [value - runs["learned", seed]["bits"] for value, seed in zip(bits, SEEDS)]
            row |= {"difference": f"{statistics.mean(pairs):+.4f}",
                    "interval": f"± {T_95 * statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}"}
        rows.append(row)
    return rows


def draw(path, tables):
    """tables: {title: (L, D)}. Above each table itself, below how much its rows are alike."""
    fig = Figure(figsize=(10, 7.6), dpi=120, layout="constrained")
    colours = LinearSegmentedColormap.from_list("signed", ["#b23a48", "#f7f7f4", "#1f6f8b"])
    for (above, below), (title, table) in zip(fig.subplots(2, 2, height_ratios=(1, 1.6)).T, tables.items()):
        largest = table.abs().quantile(0.99).item()
        above.imshow(table.numpy(), cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
        above.set_title(title, fontsize=14)
        above.set_xlabel("dimension", fontsize=12)
        alike = cosine_similarity(table[:, None], table, dim=-1)                     # (L, L)
        image = below.imshow(alike.numpy(), cmap=colours, vmin=-1, vmax=1)
        below.set_xlabel("position", fontsize=12)
        for ax in (above, below):
            ax.set_ylabel("position", fontsize=12)
    fig.colorbar(image, ax=below, shrink=0.8).set_label("cosine between two rows", fontsize=12)
    FIGURES.mkdir(exist_ok=True)
    fig.savefig(path)


def main():
    parser = ArgumentParser(description="Compute sinusoidal positions, and compare them with learned ones.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "positions", metavar="DIR",
                        help="where finished runs are kept")
    arguments = parser.parse_args()
    source = fetch(arguments.data)
    L, D = CONFIGS["small"].max_position_embeddings, CONFIGS["small"].hidden_size
    show_formula(L, D)
    runs = finished_runs(source, arguments.out)
    columns = {"positions": "positions", "parameters": "parameters", "bits": "bits per byte, mean of three seeds",
               "difference": "difference to learned", "interval": "95 % interval",
               "longer": f"read in windows of {2 * L} tokens"}
    print(write_results("positions", "python chapter-01-foundations/sinusoidal_demo.py", columns, compare(runs),
                        data=source))
    draw(FIGURES / "positions.png", {"sinusoidal": sinusoidal(L, D),
                                     "learned, after training": torch.tensor(runs["learned", 0]["table"])})
    print("Both tables as a picture: figures/positions.png")


if __name__ == "__main__":
    run(main)
