"""Scaling laws: the loss of a large run, predicted from small ones before it is made.

    python chapter-03-profiling/scaling_laws.py      about 24 core-minutes: twelve minutes on two cores

A dozen small runs differ in parameters N and training tokens D. Their losses are fitted by the form of Hoffmann et al.
2022,

    L(N, D) = E + A / N^alpha + B / D^beta

E is what no model can know, the second term what N parameters miss, the third what D tokens do not teach. The fit then
predicts a run of four times the compute of the largest fitted one, and that run is made. A grid of widths, batches and
learning rates shows how the best of them move. Last comes what published coefficients say of 124 million parameters
and ten billion tokens.

No run sees a token twice, because the form knows nothing of repetition. Tiny Shakespeare has too few tokens for that,
so the text is the code of Python's own standard library. A run has a number of tokens, not of minutes, so it gives the
same loss at any speed. It is kept in --out when it has ended: the command can be killed and goes on. Writes
results/scaling_laws.json, scaling_fit.json, scaling_rates.json, scaling_recipe.json and figures/scaling_laws.png.
"""
import ast
import json
import multiprocessing
import os
import sys
import sysconfig
import textwrap
import time
import tokenize as python_code
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import train
from cli import ArgumentParser, InputError, positive, run
from data import fetch, load_documents, packed_sequence_collate_fn, split_documents, tokenize, training_packs
from device import keep_memory
from flops import num_parameters, total_flops
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from results import FIGURES, write_results
from tokenizer import Tokenizer
from training_state import fingerprint

CONTEXT = 256      # tokens of the longest window: the same whatever the batch
RESAMPLES = 500    # of the bootstrap
COLOURS = "#9bc4d4", "#1f6f8b", "#5b9279", "#7a5195", "#d9822b", "#b22222"
BESIDES = 300_000  # a token takes as long besides the matrices as so many parameters; only for the time left


@dataclass(frozen=True)
class Trial:
    """A training run. batch and rate: times what train.py takes for a model of this width."""
    width: int
    layers: int
    tokens: int
    batch: float = 1
    rate: float = 1
    seed: int = 0

    @property
    def config(self):
        heads = max(1, self.width // 32)
        return replace(CONFIGS["small"], hidden_size=self.width, intermediate_size=3 * self.width,
                       num_hidden_layers=self.layers, num_attention_heads=heads,
                       num_key_value_heads=max(1, heads // 2), max_position_embeddings=CONTEXT)

    @property
    def cost(self):
        return self.tokens * (num_parameters(self.config) + BESIDES)


FITTED = [Trial(width, layers, tokens)
          for width, layers, counts in ((64, 1, (450_000, 900_000, 1_800_000)), (64, 3, (450_000, 900_000, 1_800_000)),
                                        (128, 1, (450_000, 900_000)), (128, 2, (450_000, 900_000, 1_800_000)),
                                        (192, 2, (450_000, 900_000)))
          for tokens in counts]
PREDICTED = Trial(256, 2, 2_200_000)
AGAIN = [Trial(64, 3, 450_000, seed=seed) for seed in (1, 2)]   # how much of a loss is luck
GRID = [Trial(width, 2, 150_000, batch, rate) for width in (32, 64, 128, 256) for batch in (0.5, 1, 2)
        for rate in (0.5, 1, 2, 4) if batch == 1 or width in (32, 128)]
TRIALS = [*FITTED, PREDICTED, *AGAIN, *GRID]


# --------------------------------------------------------------------------------------------------------- the text

def source_code():
    """The functions of Python's standard library, each once. Its tests are left out: not every system installs them."""
    library, found = Path(sysconfig.get_path("stdlib")), set()
    for path in library.rglob("*.py"):
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(library).parts):
            continue
        with python_code.open(path) as file:   # in the encoding that the file names
            text = file.read()
        lines = text.splitlines()
        for place in ast.walk(ast.parse(text)):
            if isinstance(place, (ast.Module, ast.ClassDef)):   # a function inside a function is a part of it
                found |= {textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno])) for node in place.body
                          if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return sorted(found, key=fingerprint)   # mixed, so that the last tenth is like the rest


def load_text(source):
    """(training documents, validation documents)"""
    return split_documents(source_code(), source) if source == "python-source" else load_documents(source)


def prepare(train_documents):
    """(tokenizer, windows to train on)"""
    tokenizer = Tokenizer.train(train_documents[::4], CONFIGS["small"].vocab_size)
    windows, _ = tokenize(train_documents, tokenizer, CONTEXT)
    tokens, longest = sum(len(targets) for _, targets in windows), max(trial.tokens for trial in TRIALS)
    if tokens < longest:
        raise InputError(f"--data has {tokens:,} tokens to train on, but the longest run reads {longest:,} and none"
                         " of them twice; give more text")
    return tokenizer, windows


# --------------------------------------------------------------------------------------------------------- the runs

def defaults(config):
    """(tokens of a batch, learning rate) that train.py takes for this model."""
    with patch.object(sys, "argv", ["train.py"]), patch.dict(CONFIGS, small=config):
        arguments = train.parse_arguments()
    return arguments.batch_tokens, arguments.learning_rate


def settings_of(trial, documents):
    """All that the loss depends on. documents: their fingerprint."""
    batch_tokens, learning_rate = defaults(trial.config)
    code = [Path(__file__).with_name(name).read_text() for name in ("model.py", "data.py", "optimizer.py", "train.py")]
    # Nothing is read twice, so nothing is learned by heart: a stronger decay, which would prevent it, only costs.
    return asdict(trial) | {"batch_tokens": round(batch_tokens * trial.batch),
                            "learning_rate": learning_rate * trial.rate, "weight_decay": 0.1, "context": CONTEXT,
                            "documents": documents, "code": fingerprint(code), "torch": torch.__version__}


def kept(out, settings):
    """The file of a run that has ended. Other settings are another file."""
    return out / f"{fingerprint(settings)}.json"


def train_and_validate(trial, settings, tokenizer, windows, val_documents, report):
    """What is kept of a run. report(tokens) is called after each step."""
    torch.manual_seed(trial.seed)
    config = replace(trial.config, vocab_size=tokenizer.vocab_size)
    model = Transformer(config)
    optimizer = Optimizer(model, adamw(model, settings["learning_rate"], settings["weight_decay"]))
    tokens = flops = 0
    packs = training_packs(windows, settings["batch_tokens"], trial.seed)
    while tokens < trial.tokens:
        batch = packed_sequence_collate_fn(next(packs))
        train.train_step(model, optimizer, batch, settings["learning_rate"] * schedule(tokens / trial.tokens))
        tokens += len(batch.targets)
        flops += total_flops(config, batch.cu_seqlens)
        report(len(batch.targets))
    _, bits = train.evaluate(model, val_documents, tokenizer, 1024, "cpu")
    return {"parameters": num_parameters(config), "tokens": tokens, "flops": flops, "bits": bits}


def load_runs(out, documents):
    """{trial: what is kept of it} of the runs that have ended."""
    found = {}
    for trial in TRIALS:
        path = kept(out, settings_of(trial, documents))
        if path.is_file():
            try:
                found[trial] = json.loads(path.read_text())
            except ValueError:
                raise InputError(f"{path} is damaged; remove it, and the run is made again") from None
    return found


def work(trials, done, out, documents, text):
    """A process that makes one run after the other, in one thread: two such processes beat two threads."""
    torch.set_num_threads(1)
    keep_memory()
    parent = multiprocessing.parent_process()

    def report(tokens):
        with done.get_lock():
            done.value += tokens / trial.tokens * trial.cost
        if not parent.is_alive():
            sys.exit(1)   # the command was killed, and may have been started again

    for trial in iter(trials.get, None):
        started, settings = time.process_time(), settings_of(trial, documents)
        result = train_and_validate(trial, settings, *text, report)
        path = kept(out, settings)
        path.with_suffix(".part").write_text(json.dumps(
            result | {"settings": settings, "cpu_seconds": time.process_time() - started}, indent=2))
        os.replace(path.with_suffix(".part"), path)   # complete or not at all


def make(trials, workers, out, documents, text):
    """Make those of the runs that have not ended, by so many processes. Returns load_runs()."""
    found = load_runs(out, documents)
    # The longest first, so that no process ends long after the others.
    missing = sorted((trial for trial in trials if trial not in found), key=lambda trial: -trial.cost)
    spawn = multiprocessing.get_context("spawn")
    queue, done, total = spawn.SimpleQueue(), spawn.Value("d", 0), sum(trial.cost for trial in missing)
    for trial in [*missing, *[None] * workers]:
        queue.put(trial)
    processes = [spawn.Process(target=run, args=(partial(work, queue, done, out, documents, text),), daemon=True)
                 for _ in missing[:workers]]
    for process in processes:
        process.start()
    with tqdm(total=100, desc=f"{len(missing)} runs", disable=not missing,
              bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left") as bar:
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            bar.update(min(100, 100 * done.value / total) - bar.n)
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise InputError(f"a process ended with status {failed[0]}; the same command goes on: the runs that have ended"
                         f" are kept in {out}")
    return load_runs(out, documents)


# --------------------------------------------------------------------------------------------------------- the fit

@dataclass
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta"""
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, N, D):
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def best_parameters(self, C):
        """N of the lowest loss among all N and D of C = 6 N D FLOPs (Hoffmann et al. 2022, equation 4)."""
        scale = (self.alpha * self.A / self.beta / self.B) ** (1 / (self.alpha + self.beta))
        return scale * (C / 6) ** (self.beta / (self.alpha + self.beta))


def fit(N, D, L):
    """The Law of the smallest squared relative error at runs of N parameters, D tokens, loss L: arrays of one length.

    For given exponents the Law is linear in E, A and B, and least squares gives them at once. So only the two exponents
    are searched, on a grid that closes in: no beginning to choose, no valley that a descent would end in too early.
    """
    N, D, L = (np.asarray(values, dtype=np.float64) for values in (N, D, L))
    n, d = N.mean(), D.mean()   # powers of numbers near 1
    center, reach = np.array([0.8, 0.8]), 0.75
    for _ in range(10):
        steps = np.linspace(-reach, reach, 21)
        exponents = np.maximum(0.02, center + np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2))   # (G, 2)
        terms = np.stack([np.ones((len(exponents), len(N))), (N / n) ** -exponents[:, :1],
                          (D / d) ** -exponents[:, 1:]], -1) / L[:, None]                               # (G, runs, 3)
        transposed = terms.swapaxes(1, 2)
        solved = np.linalg.pinv(transposed @ terms, hermitian=True) @ transposed.sum(-1, keepdims=True)  # (G, 3, 1)
        errors = np.square((terms @ solved)[..., 0] - 1).sum(-1)                                        # (G,)
        errors[(solved < 0).any((1, 2))] = np.inf   # a size that harms or a loss below nothing is no law
        best = errors.argmin()
        center, reach = exponents[best], reach / 3
    (E, A, B), (alpha, beta) = solved[best, :, 0].tolist(), center.tolist()
    return Law(E, A * n ** alpha, alpha, B * d ** beta, beta)


def bootstrap(N, D, L):
    """The Laws of RESAMPLES draws of as many runs as there are, with replacement."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(N), size=(RESAMPLES, len(N)))
    return [fit(N[draw], D[draw], L[draw]) for draw in draws]


def interval(values):
    """Nine of ten lie between the two."""
    return [float(value) for value in np.quantile(values, (0.05, 0.95))]


def best_rate(rates, losses):
    """Where the parabola through the lowest loss and its neighbours is lowest, over the logarithm of the rate.

    None if the lowest loss is at an end of the grid.
    """
    i = int(np.argmin(losses))
    if i in (0, len(rates) - 1):
        return None
    x = np.log(rates[i - 1:i + 2])
    a, b, _ = np.polyfit(x - x[1], losses[i - 1:i + 2], 2)
    return float(np.exp(x[1] - b / (2 * a)))


# ------------------------------------------------------------------------------------------------ tables and figure

def arrays(found, trials):
    """Parameters, tokens and bits per byte of these trials: what fit() takes."""
    return (np.array([found[trial][key] for trial in trials], dtype=np.float64)
            for key in ("parameters", "tokens", "bits"))


def write_runs(found, law, **source):
    rows = []
    for trial in sorted(FITTED, key=lambda trial: found[trial]["flops"]) + AGAIN + [PREDICTED]:
        made = found[trial]
        expected = law(made["parameters"], made["tokens"])
        name = "predicted" if trial == PREDICTED else f"seed {trial.seed}, not fitted" if trial.seed else "fitted"
        rows.append({"run": name, "width": trial.width, "layers": trial.layers, "parameters": made["parameters"],
                     "tokens": made["tokens"], "tflops": made["flops"] / 1e12, "bits": made["bits"], "law": expected,
                     "error": 100 * (made["bits"] / expected - 1)})
    columns = {"run": "run", "width": "width", "layers": "layers", "parameters": "parameters", "tokens": "tokens",
               "tflops": "TFLOPs", "bits": "bits per byte", "law": "by the law", "error": "difference, %"}
    print(write_results("scaling_laws", columns=columns, rows=rows, **source))


def write_fit(found, law, draws, **source):
    made = found[PREDICTED]
    N, D, bits = made["parameters"], made["tokens"], made["bits"]
    rows = [{"what": what, "value": value(law),
             "interval": "{:.3f} to {:.3f}".format(*interval(list(map(value, draws))))}
            for what, value in (
                ("E, bits per byte that no model saves", lambda law: law.E),
                ("A / N^alpha, bits per byte that the large run's size costs", lambda law: law.A / N ** law.alpha),
                ("B / D^beta, bits per byte that its tokens cost", lambda law: law.B / D ** law.beta),
                ("alpha, exponent of the parameters", lambda law: law.alpha),
                ("beta, exponent of the tokens", lambda law: law.beta),
                ("the best size grows with compute to the power of", lambda law: law.beta / (law.alpha + law.beta)),
                ("parameters that are best for the large run's 6 N D, in millions",
                 lambda law: law.best_parameters(6 * N * D) / 1e6),
                ("the large run, predicted, bits per byte", lambda law: law(N, D)))]
    luck = [found[trial]["bits"] for trial in [*AGAIN, replace(AGAIN[0], seed=0)]]
    rows += [{"what": "the large run, made, bits per byte", "value": bits, "interval": ""},
             {"what": "difference, %", "value": 100 * (bits / law(N, D) - 1), "interval": ""},
             {"what": "its compute, times the largest fitted", "interval": "",
              "value": made["flops"] / max(found[trial]["flops"] for trial in FITTED)},
             {"what": "largest difference of three seeds, bits per byte", "value": max(luck) - min(luck),
              "interval": ""}]
    columns = {"what": "what", "value": "value", "interval": "nine of ten resamples"}
    print(write_results("scaling_fit", columns=columns, rows=rows, **source))


def rate_rows(found):
    """A row for each width and batch of GRID: the losses over the rates, and the best rate between them."""
    rows = []
    for width, batch in dict.fromkeys((trial.width, trial.batch) for trial in GRID):
        trials = [trial for trial in GRID if (trial.width, trial.batch) == (width, batch)]
        rates = [found[trial]["settings"]["learning_rate"] for trial in trials]
        losses = [found[trial]["bits"] for trial in trials]
        best = best_rate(rates, losses)
        rows.append({"width": width, "batch": found[trials[0]]["settings"]["batch_tokens"],
                     "taken": f"{rates[0] / trials[0].rate:.2g}", "lowest": min(losses),
                     "best": f"{best:.2g}" if best else f"{rates[int(np.argmin(losses))]:.2g}, the end of the grid",
                     **{f"x{trial.rate:g}": loss for trial, loss in zip(trials, losses)}})
    return rows


def write_rates(found, **source):
    columns = {"width": "width", "batch": "tokens a step", "taken": "`train.py`'s rate"}
    columns |= {f"x{rate:g}": f"bits at times {rate:g}" for rate in sorted({trial.rate for trial in GRID})}
    columns |= {"best": "best rate", "lowest": "lowest bits"}
    print(write_results("scaling_rates", columns=columns, rows=rate_rows(found), **source))


def draw_law(axes, found, law, draws):
    shapes = dict.fromkeys((trial.width, trial.layers) for trial in [*FITTED, PREDICTED])
    for shape, colour in zip(shapes, COLOURS):
        trials = [trial for trial in [*FITTED, PREDICTED] if (trial.width, trial.layers) == shape]
        N, D, bits = arrays(found, trials)
        flops = found[trials[0]]["flops"] / D[0]   # of a token
        line = np.geomspace(1.5e5, 6e6)
        axes.plot(line * flops, law(N[0], line), color=colour, linewidth=1)
        axes.plot(D * flops, bits, "*" if PREDICTED in trials else "o", color=colour,
                  markersize=14 if PREDICTED in trials else 6, label=f"{N[0] / 1e6:.2f} million parameters")
    low, high = interval([resampled(N[0], D[0]) for resampled in draws])
    axes.plot([D[0] * flops] * 2, [low, high], color="black", linewidth=2, label="predicted: nine of ten resamples")
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of the run")
    axes.set_ylabel("bits per byte")
    axes.set_title("Dots are fitted, lines are the law, the star was made after it had been predicted")
    axes.legend(frameon=False)


def draw_rates(axes, found, title, curves):
    """curves: {label: trials}"""
    for (label, trials), colour in zip(curves.items(), COLOURS):
        axes.plot([found[trial]["settings"]["learning_rate"] for trial in trials],
                  [found[trial]["bits"] for trial in trials], "o-", color=colour, label=label)
    low, high = axes.get_xlim()
    axes.set_xscale("log")
    axes.set_xticks([tick for tick in 0.0005 * 2.0 ** np.arange(9) if low < tick < high], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("highest learning rate")
    axes.set_ylabel("bits per byte")
    axes.set_title(title)
    axes.legend(frameon=False)


def draw(found, law, draws):
    figure = Figure(figsize=(9, 8), dpi=110, layout="constrained")
    axes = figure.subplot_mosaic([["law", "law"], ["widths", "batches"]])
    draw_law(axes["law"], found, law, draws)
    widths = {f"width {width}": [trial for trial in GRID if (trial.width, trial.batch) == (width, 1)]
              for width in dict.fromkeys(trial.width for trial in GRID)}
    batches = {trials[0].batch: trials for trials in
               ([trial for trial in GRID if (trial.width, trial.batch) == (128, batch)] for batch in (0.5, 1, 2))}
    draw_rates(axes["widths"], found, f"{GRID[0].tokens:,} tokens, the batch of train.py", widths)
    draw_rates(axes["batches"], found, f"{GRID[0].tokens:,} tokens, width 128", {
        f"{found[trials[0]]['settings']['batch_tokens']} tokens a step": trials for trials in batches.values()})
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "scaling_laws.png")


def main():
    parser = ArgumentParser(description="Predict the loss of a large run from small ones, then make it: about 24"
                                        " core-minutes; ended runs are kept, the same command goes on.")
    parser.add_argument("--data", default="python-source", metavar="NAME|PATH",
                        help="python-source, the code of the standard library, or as in train.py")
    parser.add_argument("--workers", type=positive(int), default=os.cpu_count(), metavar="N",
                        help="processes of one thread that train side by side")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out-scaling", metavar="DIR",
                        help="where the runs that have ended are kept")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = fetch(arguments.data)
    train_documents, val_documents = load_text(source)
    documents = fingerprint(train_documents + val_documents)
    ended = len(load_runs(arguments.out, documents))
    print(f"{ended} of {len(TRIALS)} runs are in {arguments.out}")
    text = (*prepare(train_documents), val_documents[::5]) if ended < len(TRIALS) else None
    found = make(FITTED + AGAIN, arguments.workers, arguments.out, documents, text)
    N, D, bits = arrays(found, FITTED)
    law, draws = fit(N, D, bits), bootstrap(N, D, bits)
    large = num_parameters(PREDICTED.config), PREDICTED.tokens
    print("{:,} parameters, {:,} tokens: {:.3f} bits per byte predicted, {:.3f} to {:.3f}".format(
        *large, law(*large), *interval([resampled(*large) for resampled in draws])))
    found = make([PREDICTED] + GRID, arguments.workers, arguments.out, documents, text)   # only now
    print(f"{sum(made['cpu_seconds'] for made in found.values()) / 60:.1f} core-minutes in all")
    command = "python chapter-03-profiling/scaling_laws.py" + "".join(f" {argument}" for argument in sys.argv[1:])
    record = {"command": command, "data": source}
    write_runs(found, law, **record)
    write_fit(found, law, draws, **record)
    write_rates(found, **record)
    draw(found, law, draws)


if __name__ == "__main__":
    run(main)
