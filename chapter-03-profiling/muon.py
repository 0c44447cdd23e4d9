"""Muon (Jordan et al. 2024): a step in which all directions of a matrix are equally long.

    python muon.py             (in this folder; about twelve minutes on two cores; writes results/muon.json)
    python muon.py --tune      the rates, one run each, about ten minutes; writes results/muon_rates.json

The gradient of a matrix is dominated by few directions: some of its singular values are a hundred times larger than
most, and a step along it changes little else. Muon keeps the singular vectors and makes all singular values about 1.
For tables and vectors this means nothing, they stay with AdamW.

Trains the default model with both, three seeds each. Every run that has ended is kept in --out, so a command that was
killed goes on where it was.
"""
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from cli import ArgumentParser, positive, run
from data import fetch, learned_text, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from device import keep_memory
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from results import FIGURES, write_results
from tokenizer import Tokenizer
from train import evaluate, train_step
from training_state import fingerprint

BATCH_TOKENS = 512
STEPS = 2400              # of AdamW, the default run's
ADAMW_RATE = 3e-3         # the default run's
RATE, MATRIX_RATE = 8e-3, 0.01   # of AdamW beside Muon, and of Muon: see --tune
SHARES = 1.0, 0.75, 0.6   # Muon's steps, as shares of AdamW's


# ----------------------------------------------------------------------------------------------- the optimizer

def orthogonalize(matrix, steps=5):
    """matrix (M, N) -> a matrix with its singular vectors and all singular values near 1, by Newton-Schulz iterations.

    x -> a x + b (x x^T) x + c (x x^T)^2 x does to each singular value s what the polynomial a s + b s^3 + c s^5 does to
    a number, and needs no singular value decomposition. These coefficients make small values grow fastest. In return
    they end anywhere between 0.7 and 1.2 instead of at 1, which does no harm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix   # x x^T is then the smaller of the two products
    x = x / x.norm().clamp(min=1e-7)                                # a singular value above 1.2 would grow for ever
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """For the matrices inside the layers. At work: torch.optim.Muon, which is this but for the precision.

    The library's orthogonalizes in bfloat16, the fast format of GPUs; a processor without it takes twenty times as
    long for that.
    """

    def __init__(self, params, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(mean, group["momentum"]))   # Nesterov: one step ahead
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # An orthogonal (M, N) with M > N makes its outputs sqrt(N / M) as large as a square one.
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


class MuonAndAdamW(Optimizer):
    """Muon for the matrices inside the layers, the chapter's AdamW for everything else. Steps as Optimizer does."""

    def __init__(self, model, rate, matrix_rate):
        matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
        chosen = set(map(id, matrices))
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        super().__init__(model, adamw(torch.nn.ParameterList(others), rate))
        self.muon, self.ratio = Muon(matrices), matrix_rate / rate

    def zero_grad(self):
        self.inner.zero_grad()
        self.muon.zero_grad()

    def step(self, learning_rate):
        norm = super().step(learning_rate)   # clips the gradients of all parameters
        self.muon.param_groups[0]["lr"] = learning_rate * self.ratio
        self.muon.step()
        return norm


# ---------------------------------------------------------------------------------------------------- the runs

def train(texts, matrix_rate, rate, steps, seed, tune):
    """One run -> {"bits": bits per byte, "seconds": of its steps, "losses": one for each step}.

    texts: the documents to learn from and those to validate on. matrix_rate: None for AdamW alone. tune: learn nine
    tenths of the documents to learn from, and validate on the last.
    """
    torch.manual_seed(seed)
    documents, val_documents = texts
    if tune:
        documents, val_documents = documents[:len(documents) * 9 // 10], documents[len(documents) * 9 // 10:]
    tokenizer = Tokenizer.train(list(map(learned_text, documents)), CONFIGS["small"].vocab_size)
    windows, _ = tokenize(documents, tokenizer, BATCH_TOKENS)
    model = Transformer(CONFIGS["small"])
    optimizer = MuonAndAdamW(model, rate, matrix_rate) if matrix_rate else Optimizer(model, adamw(model, rate))
    losses, start = [], time.perf_counter()
    packs = itertools.islice(training_packs(windows, BATCH_TOKENS, seed), steps)
    for step, pack in enumerate(tqdm(packs, total=steps, unit="step", leave=False)):
        report = train_step(model, optimizer, packed_sequence_collate_fn(pack), rate * schedule(step / steps))
        losses.append(report["loss"].item())
    seconds = time.perf_counter() - start
    return {"bits": evaluate(model, val_documents, tokenizer, BATCH_TOKENS, "cpu")[1], "seconds": seconds,
            "losses": losses}


def kept(out, texts, *settings):
    """What train(texts, *settings) returns: made now, or read from `out`, where an earlier command has left it."""
    path = out / ("-".join(map(str, (fingerprint(texts), *settings))) + ".json")
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".unfinished")
        part.write_text(json.dumps(train(texts, *settings)))
        os.replace(part, path)   # the whole run, or none of it
    return json.loads(path.read_text())


def compare(arguments, texts):
    """The rows of results/muon.json; the runs of one seed side by side in time, so that a slow minute hits all."""
    ways = {"AdamW": (None, ADAMW_RATE, arguments.steps)}
    ways |= {f"Muon, {share:.0%} of the steps": (MATRIX_RATE, RATE, round(share * arguments.steps)) for share in SHARES}
    runs = {way: [] for way in ways}
    for seed, (way, settings) in itertools.product(range(arguments.seeds), ways.items()):
        runs[way].append(kept(arguments.out, texts, *settings, seed, False))
        print(f"{way}, seed {seed}: {runs[way][-1]['bits']:.4f} bits per byte")
    rows = []
    for way, (_, _, steps) in ways.items():
        bits, seconds = ([found[key] for found in runs[way]] for key in ("bits", "seconds"))
        ratios = [mine["seconds"] / base["seconds"] for mine, base in zip(runs[way], runs["AdamW"])]
        rows.append({"way": way, "steps": steps, "ms": 1000 * statistics.median(seconds) / steps,
                     "time": statistics.median(ratios), "bits": statistics.mean(bits),
                     "spread": statistics.stdev(bits) if len(bits) > 1 else ""})
    return rows, runs


def draw(runs):
    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for way, colour in zip(runs, ("#888888", "#1f6f8b", "#d1495b", "#edae49")):
        losses = torch.tensor([found["losses"] for found in runs[way]]).mean(0)
        window = max(1, len(losses) // 20)
        axes.plot(range(window, len(losses) + 1), losses.unfold(0, window, 1).mean(-1), color=colour, label=way)
    axes.set(xlabel="step", ylabel="training loss, nats per token", ylim=(None, 5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "muon.png")


def tune(arguments, texts):
    """The rows of results/muon_rates.json: one seed, and documents that neither training nor validation has."""
    grid = [(None, rate) for rate in (1.5e-3, 3e-3, 6e-3)]
    grid += [(0.01, RATE), (0.02, RATE), (0.04, RATE), (MATRIX_RATE, 4e-3), (MATRIX_RATE, 1.2e-2)]
    rows = []
    for matrix_rate, rate in grid:
        found = kept(arguments.out, texts, matrix_rate, rate, arguments.steps, 0, True)
        rows.append({"way": "Muon" if matrix_rate else "AdamW", "matrix_rate": matrix_rate or rate, "rate": rate,
                     "bits": found["bits"]})
        print("{way:<8}{matrix_rate:>8g}{rate:>8g}{bits:>10.4f} bits per byte".format(**rows[-1]))
    return rows


def main():
    parser = ArgumentParser(description="Muon against AdamW: about twelve minutes on two cores (--tune: ten).")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--steps", type=positive(int), default=STEPS, metavar="N", help="steps of AdamW")
    parser.add_argument("--seeds", type=positive(int), default=3, metavar="N", help="runs of each")
    parser.add_argument("--tune", action="store_true", help="one run for each of a few learning rates instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "muon", metavar="DIR",
                        help="where the runs are kept")
    arguments = parser.parse_args()
    keep_memory()
    source = fetch(arguments.data)
    texts = load_documents(source)
    command = " ".join(["python chapter-03-profiling/muon.py", *sys.argv[1:]])
    if arguments.tune:
        columns = {"way": "optimizer", "matrix_rate": "rate of the matrices", "rate": "rate of the rest",
                   "bits": "bits per byte, held-out training documents"}
        print(write_results("muon_rates", command, columns, tune(arguments, texts), data=source))
    else:
        rows, runs = compare(arguments, texts)
        columns = {"way": "optimizer", "steps": "steps", "ms": "ms/step", "time": "times AdamW's seconds",
                   "bits": "bits per byte, mean", "spread": "standard deviation"}
        print(write_results("muon", command, columns, rows, data=source))
        draw(runs)


if __name__ == "__main__":
    run(main)
