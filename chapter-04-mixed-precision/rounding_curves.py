"""What becomes of a training whose weights are kept in bfloat16? The same run four times; only the rounding of weights
differs.

    python rounding_curves.py        (in this folder; five minutes)

And all of it twice: with this chapter's learning rate, whose steps are larger than bfloat16's grid, and with one that
large models and fine-tuning use, whose steps are smaller. After each step every weight is rounded to a number that
bfloat16 has: to the nearest, by chance, or to the nearest with what was cut off remembered for the next step (Kahan).
All else is float32, so what the curves show is the rounding of weights and nothing else. Writes
results/rounding_curves.json and figures/rounding_curves.png.
"""
import itertools
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from cli import ArgumentParser, positive, run
from data import IGNORE, fetch, learned_text, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from model import CONFIGS, Transformer
from optimizer import adamw, schedule
from precision import round_stochastically
from results import FIGURES, write_results
from tokenizer import Tokenizer
from train import evaluate, loss_sum

RATES = 3e-3, 1e-4
COLOURS = {"float32": "#1f6f8b", "bfloat16, Kahan": "#7a5195", "bfloat16, stochastic": "#d9822b",
           "bfloat16, nearest": "#b23a48"}


def nearest(x):
    return x.bfloat16().float()


def keep(weight, before, lost, way):
    """Round a weight that a step has moved away from `before`. lost: what earlier roundings have cut off, for Kahan."""
    if way == "bfloat16, nearest":
        weight.copy_(nearest(weight))
    elif way == "bfloat16, stochastic":
        weight.copy_(round_stochastically(weight).float())
    elif way == "bfloat16, Kahan":
        move = weight - before + lost
        weight.copy_(nearest(before + move))
        lost.copy_(nearest(move - (weight - before)))


def train(way, rate, packs, tokenizer, val_documents):
    """(loss of each step, bits per byte on the validation documents) of the default configuration."""
    torch.manual_seed(0)
    model = Transformer(CONFIGS["small"])
    weights = list(model.parameters())
    lost, losses = [torch.zeros_like(weight) for weight in weights], []
    with torch.no_grad():
        for weight in weights:
            weight.copy_(nearest(weight))   # all four start on bfloat16's grid
    optimizer = adamw(model, rate)
    for step, pack in enumerate(tqdm(packs, desc=f"{rate:g}, {way}", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step / len(packs))
        batch = packed_sequence_collate_fn(pack)
        loss = loss_sum(model, batch) / (batch.targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        with torch.no_grad():
            for arguments in zip(weights, before, lost):
                keep(*arguments, way)
        losses.append(loss.item())
    return losses, evaluate(model, val_documents, tokenizer, 1024, "cpu")[1]


def draw(curves):
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    for axes, rate in zip(figure.subplots(1, 2, sharey=True), RATES):
        for way, colour in COLOURS.items():
            losses = torch.tensor(curves[rate, way])
            window = max(1, len(losses) // 20)
            mean = losses.unfold(0, window, 1).mean(-1)   # packs differ; their mean does less
            axes.plot(range(window, len(losses) + 1), mean, color=colour, label=way)
        axes.set(title=f"learning rate {rate:g}", xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel=f"nats per token, mean of {window} steps")
    figure.axes[0].legend(frameon=False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "rounding_curves.png")


def main():
    parser = ArgumentParser(description="One training run, four ways to round its weights.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--steps", type=positive(int), default=400, metavar="N", help="steps of each run")
    arguments = parser.parse_args()
    source = fetch(arguments.data)
    documents, val_documents = load_documents(source)
    tokenizer = Tokenizer.train(list(map(learned_text, documents)), CONFIGS["small"].vocab_size)
    windows, _ = tokenize(documents, tokenizer, 1024)
    packs = list(itertools.islice(training_packs(windows, 1024, 0), arguments.steps))
    curves, rows = {}, []
    for rate, way in itertools.product(RATES, COLOURS):
        curves[rate, way], bits = train(way, rate, packs, tokenizer, val_documents)
        rows.append({"rate": f"{rate:g}", "weights": way, "bits": bits})
        print("{rate:<8}{weights:<24}{bits:>10.4f} bits per byte".format(**rows[-1]))
    columns = {"rate": "learning rate", "weights": "weights", "bits": "bits per byte"}
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/rounding_curves.py", *sys.argv[1:]])
    print(write_results("rounding_curves", command, columns, rows, data=source))
    draw(curves)


if __name__ == "__main__":
    run(main)
