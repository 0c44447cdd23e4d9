"""More parameters for the same arithmetic: does it pay? And what does it cost to give experts a limit?

    python chapter-06-parallelism/moe_demo.py        about ten minutes on two cores

small-moe beside the dense small: with as many steps, so that both do the same arithmetic for a token, and with as many
as the dense model's time allows. Then without the loss that keeps experts equally busy, and with a limit on the rows of
an expert. Three seeds of each; a seed gives all variants the same packs in the same order. One process, one thread, for
a run; --workers of them side by side. Times are measured before, a step of each variant in turn, and only their ratio
counts: from then on a run is a number of steps, so that a busy machine changes no result.

Writes results/moe_demo.json, results/moe_limits.json and figures/moe.png. --out keeps each run that has ended, and the
same command goes on behind it.

Letters as in parallel/experts.py; C is the capacity, the rows that an expert has room for.
"""
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import train
from checkpoint import beside
from cli import ArgumentParser, InputError, leave, positive, run
from data import fetch, load_documents
from device import keep_memory
from model import MLP
from optimizer import Optimizer, adamw, schedule
from parallel.experts import MoE, layers, load
from parallel.mesh import start_ranks
from results import FIGURES, write_results
from training_state import fingerprint, share_done

HERE = Path(__file__).resolve().parent
SEEDS = 3
T95 = 4.303      # of Student's t distribution with SEEDS - 1 degrees of freedom, for an interval of 95 %
ROUNDS = 40      # in which each variant makes a timed step, after WARM others
WARM = 5
POINTS = 100     # of a curve of the figure
COLOURS = ("#1f6f8b", "#d9822b", "#b23a48", "#6b4e9b", "#4f8a4c", "#8c8c88", "#c9a227", "#111111")


# ------------------------------------------------------------------------------------------------- a limit

class LimitedMoE(MoE):
    """Experts with room for C rows each; a row that comes later is dropped (Lepikhin et al. 2020, GShard; Fedus et al.
    2021, Switch).

    With a limit all shapes are known before the router has spoken: experts compute (E, C, D) in one product, ranks send
    blocks of one size, and no processor waits for counts. In return a busy expert drops rows, of which only the
    residual stream is left, and an idle one computes zeros.

    factor: of capacity, C = factor * k T / E rounded up. 1 is room for perfect balance. C grows with the pack, so a
    token's logits depend on how many others it was packed with, and one that is generated alone is never dropped.
    """

    def __init__(self, config, expert, factor):
        super().__init__(config, expert)
        self.factor = factor
        self.rows = self.dropped = 0   # so far

    def capacity(self, T):
        E, k = self.config.num_experts, self.config.num_experts_per_tok
        return min(T, math.ceil(self.factor * k * T / E))   # a token comes to an expert once

    def forward(self, x, routing=None):
        """x (T, D) -> (T, D). Which rows are dropped is decided in order of position, so no token knows a later one.

        Documents of a pack do know each other: a row that an earlier one brings may take the last room. If all first
        choices came before all second ones, as in GShard, a token could push out an earlier one's second choice, and
        that would know it: a model that reads ahead, with a loss that may be too good.
        """
        weights, chosen = self.route(x, routing)                                        # (T, k) each
        (T, k), E, C = chosen.shape, self.config.num_experts, self.capacity(len(x))
        experts = chosen.flatten()                                                      # (T k,), token after token
        came = F.one_hot(experts, E).cumsum(0)                                          # (T k, E), rows so far
        place = came.gather(1, experts[:, None]).squeeze(1) - 1                         # (T k,), of a row in its expert
        slots = torch.where(place < C, experts * C + place, E * C)   # (T k,); the last slot is for all that are dropped
        self.rows, self.dropped = self.rows + T * k, self.dropped + (place >= C).sum()
        rows = x.new_zeros(E * C + 1, x.shape[1]).index_copy(0, slots, x.repeat_interleave(k, 0))
        rows = rows[:-1].view(E, C, -1)                                                 # (E, C, D)
        results = torch.cat([expert(room) for expert, room in zip(self.experts.values(), rows)])        # (E C, D)
        results = F.pad(results, (0, 0, 0, 1)).index_select(0, slots)                   # (T k, D), zeros for a dropped
        return (results.view(T, k, -1) * weights[:, :, None].to(results.dtype)).sum(1)  # (T, D)


def limit(model, factor):
    """Give every layer of experts of a model a limit."""
    for block in model.model.layers:
        limited = LimitedMoE(model.config, MLP, factor)
        limited.load_state_dict(block.mlp.state_dict())
        block.mlp = limited


def dropped_share(model):
    """Rows dropped since this was last asked, divided by all. 0 where no expert has a limit."""
    limited = [layer for layer in layers(model) if isinstance(layer, LimitedMoE)]
    share = float(sum(layer.dropped for layer in limited) / max(1, sum(layer.rows for layer in limited)))
    for layer in limited:
        layer.rows = layer.dropped = 0
    return share


# ------------------------------------------------------------------------------------------------- a run

@dataclass(frozen=True)
class Variant:
    name: str
    config: str = "small-moe"
    factor: float | None = None   # of capacity; None: no limit
    balance: bool = True          # whether the loss is trained that keeps experts equally busy
    equal_time: bool = False      # as many steps as the dense model's time allows, instead of as many as it makes


DENSE, EXPERTS = Variant("dense", "small"), Variant("experts")
NO_BALANCE = Variant("experts, no balance loss", balance=False)
VARIANTS = [DENSE, EXPERTS, Variant("experts, in the time of dense", equal_time=True), NO_BALANCE,
            Variant("capacity factor 1", factor=1.0)]   # another factor: a line more


class Training:
    """What train.py's main() sets up and does in a step, for a variant. steps: None for as many as there."""

    def __init__(self, variant, source, steps, seed):
        steps = ["--steps", str(steps)] if steps else []
        sys.argv = ["train.py", "--config", variant.config, "--data", source, "--seed", str(seed), *steps,
                    "--precision", "fp32", "--device", "cpu"]
        self.arguments = train.parse_arguments()
        torch.manual_seed(seed)
        documents, self.validation = load_documents(source)
        self.model, self.tokenizer = train.start_new(self.arguments, documents, "cpu")
        if not variant.balance:
            self.model.config.router_aux_loss_coef = 0.0
        if variant.factor:
            limit(self.model, variant.factor)
        replicas = train.distribute(self.model, start_ranks("cpu", self.arguments), self.arguments)
        self.optimizer = Optimizer(self.model, adamw(replicas, self.arguments.learning_rate), replicas)
        with contextlib.redirect_stdout(None):   # what it prints would be printed for every run
            self.packs = train.load_packs(self.arguments, documents, self.tokenizer, self.model.config)
        self.state = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0}

    def step(self):
        batches = [train.next_batch(self.packs, self.arguments, self.model, self.state)
                   for _ in range(self.arguments.accumulate)]
        rate = self.arguments.learning_rate * schedule(share_done(self.arguments, self.state))
        train.train_step(self.model, self.optimizer, batches, rate)
        self.state["step"] += 1

    def bits(self):
        """Bits per byte of the validation documents."""
        return train.evaluate(self.model, self.validation, self.tokenizer, self.arguments.batch_tokens, "cpu")[1]


def complete_run(variant, source, steps, seed, path, seconds, done):
    """One run, in a process of its own: everything that is to be known of it goes to path.

    seconds: what a step takes, which is added to done, a multiprocessing.Value.
    """
    torch.set_num_threads(1)
    keep_memory()
    training, shares, dropped = Training(variant, source, steps, seed), [], []
    model, state = training.model, training.state
    for _ in range(steps):
        training.step()
        if layers(model):
            counts = load(model)                                                        # (layers, E)
            shares.append(counts / counts.sum(1, keepdim=True))
            dropped.append(dropped_share(model))
        with done.get_lock():
            done.value += seconds
    found = {"parameters": model.num_parameters(), "steps": steps, "mflops": state["flops"] / state["tokens"] / 1e6}
    if layers(model):
        curves = zip(torch.stack(shares).chunk(POINTS), torch.tensor(dropped).chunk(POINTS))
        found["load"], found["dropped"] = zip(*((part.mean(0).tolist(), drop.mean().item()) for part, drop in curves))
    if variant.factor:
        found["limited_bits"], found["limited_dropped"] = training.bits(), dropped_share(model)
        for layer in layers(model):   # room for all. As where a text is generated, a token at a time
            layer.factor = layer.config.num_experts / layer.config.num_experts_per_tok
    write_json(path, found | {"bits": training.bits()})


def write_json(path, content):
    """Renamed when it is complete: there is never half a file."""
    beside(path, "unfinished").write_text(json.dumps(content))
    os.replace(beside(path, "unfinished"), path)


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; remove it, and what it held is made again") from None


# ------------------------------------------------------------------------------------------------- all runs

def step_seconds(source, steps):
    """{name of a variant: (seconds of a step, the same divided by the dense model's)}, the medians of ROUNDS.

    In each round every variant makes a step, on the same pack: a slow second falls on all.
    """
    variants = [variant for variant in VARIANTS if not variant.equal_time]
    trainings, rounds = [Training(variant, source, steps, seed=0) for variant in variants], []
    for _ in tqdm(range(WARM + ROUNDS), desc="timing", unit="round", dynamic_ncols=True):
        times = []
        for training in trainings:
            start = time.perf_counter()
            training.step()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    rounds = rounds[WARM:]
    return {variant.name: (median(times[i] for times in rounds), median(times[i] / times[0] for times in rounds))
            for i, variant in enumerate(variants)}


def prepare(arguments):
    """The settings of all runs: those that OUT/settings.json holds, or new ones, with the times of a step."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = str(fetch(arguments.data))
    settings = {"documents": fingerprint(load_documents(source)), "--steps": arguments.steps,
                "programs": fingerprint([file.read_text() for file in sorted(HERE.glob("**/*.py"))])}
    path = arguments.out / "settings.json"
    saved = read_json(path) if path.is_file() else {}
    for name, value in settings.items() if saved else ():
        if saved.get(name) != value:
            raise InputError(f"{arguments.out} has runs with {name} {saved.get(name)}, this command has {value}; repeat"
                             " the first command or choose another --out")
    if not saved:
        training = Training(DENSE, source, arguments.steps, seed=0)
        steps = training.arguments.steps
        saved = settings | {"steps": steps, "tokens": training.arguments.batch_tokens * training.arguments.accumulate,
                            "seconds": step_seconds(source, steps)}
        write_json(path, saved)
    return source, saved


def plan_runs(settings, out):
    """[(variant, seed, steps, seconds of a step, where it is kept)], all variants of a seed before the next seed."""
    runs = []
    for seed in range(SEEDS):
        for variant in VARIANTS:
            seconds, ratio = step_time(variant, settings)
            steps = max(1, round(settings["steps"] / ratio)) if variant.equal_time else settings["steps"]
            runs.append((variant, seed, steps, seconds, out / f"{variant.name}, seed {seed}.json"))
    return runs


def step_time(variant, settings):
    return settings["seconds"][EXPERTS.name if variant.equal_time else variant.name]


def complete_all(runs, source, workers):
    """Make the runs that are not kept yet, each in a process of its own, which keeps it and ends."""
    context = multiprocessing.get_context("spawn")
    waiting, processes = [run for run in runs if not run[-1].is_file()], []
    total, missing = (sum(steps * seconds for _, _, steps, seconds, _ in some) for some in (runs, waiting))
    done = context.Value("d", total - missing)   # core-seconds
    with tqdm(total=total, initial=done.value, desc="training", dynamic_ncols=True,
              bar_format="{l_bar}{bar}| {n:.0f} of {total:.0f} core-seconds [{elapsed}<{remaining}]") as bar:
        while waiting or processes:
            while waiting and len(processes) < workers:
                variant, seed, steps, seconds, path = waiting.pop(0)
                work = functools.partial(complete_run, variant, source, steps, seed, path, seconds, done)
                processes.append(context.Process(target=run, args=(work,), daemon=True))
                processes[-1].start()
            wait([process.sentinel for process in processes], timeout=1)
            bar.update(done.value - bar.n)
            if any(process.exitcode for process in processes):
                leave(2)   # it has said why; the others end with this process
            processes = [process for process in processes if process.exitcode is None]


# ------------------------------------------------------------------------------------------------- what is shown

def difference(found, others):
    """Of the bits per byte of the same seeds: the mean, and half the width of the interval of 95 %."""
    pairs = [one["bits"] - other["bits"] for one, other in zip(found, others)]
    return mean(pairs), T95 * stdev(pairs) / math.sqrt(len(pairs))


def signed(middle, half):
    return f"{middle:+.4f} ± {half:.4f}".replace("-", "\N{MINUS SIGN}")


def write_tables(runs, settings, command, source):
    """results/moe_demo.json and results/moe_limits.json. runs: {variant: what each seed's run has kept}"""
    learning, limits = [], []
    for variant, found in runs.items():
        seconds, ratio = step_time(variant, settings)
        bits = f"{mean(one['bits'] for one in found):.4f}"
        learning.append({"variant": variant.name, "parameters": found[0]["parameters"], "mflops": found[0]["mflops"],
                         "milliseconds": f"{1000 * seconds:.1f}", "ratio": f"{ratio:.2f}", "steps": found[0]["steps"],
                         "bits": bits, "dense": signed(*difference(found, runs[DENSE])) if variant != DENSE else ""})
        if variant.config == DENSE.config or variant.equal_time:
            continue
        load = torch.tensor([one["load"] for one in found])                             # (seeds, points, layers, E)
        busiest = load[:, -POINTS // 10:].amax(-1).mean().item() * load.shape[-1]
        limits.append({"variant": variant.name, "ratio": f"{ratio:.2f}", "busiest": f"{busiest:.2f}",
                       "dropped": f"{mean(mean(one['dropped']) for one in found):.1%}", "bits": bits,
                       "experts": signed(*difference(found, runs[EXPERTS])) if variant != EXPERTS else ""})
        if variant.factor:
            limits[-1] |= {"limited_bits": f"{mean(one['limited_bits'] for one in found):.4f}",
                           "limited_dropped": f"{mean(one['limited_dropped'] for one in found):.1%}"}
    columns = {"variant": "variant", "parameters": "parameters", "mflops": "MFLOPs a token",
               "milliseconds": "ms a step", "ratio": "times dense", "steps": "steps", "bits": "bits per byte",
               "dense": "minus dense"}
    print(write_results("moe_demo", command, columns, learning, data=source))
    columns = {"variant": "variant", "ratio": "step, times dense", "busiest": "busiest expert, times the mean",
               "dropped": "rows dropped in training", "bits": "bits per byte", "experts": "minus experts",
               "limited_dropped": "rows dropped in validation, with the limit", "limited_bits": "bits per byte with it"}
    print(write_results("moe_limits", command, columns, limits, data=source))


def draw(runs, settings):
    """figures/moe.png: who got how much, with and without the balance loss; what was dropped; and what came of it."""
    figure = Figure(figsize=(10, 9.5), dpi=120, layout="constrained")
    depth, experts = len(runs[EXPERTS][0]["load"][0]), len(runs[EXPERTS][0]["load"][0][0])
    axes = figure.subplots(depth + 1, 2)
    for column, variant in enumerate((EXPERTS, NO_BALANCE)):
        load = 100 * torch.tensor(runs[variant][0]["load"])                             # (points, layers, E)
        for layer, ax in enumerate(axes[:depth, column]):
            lines = ax.plot(torch.linspace(0, settings["steps"], len(load)), load[:, layer])
            for line, colour in zip(lines, COLOURS):
                line.set_color(colour)
            ax.axhline(100 / experts, color="black", linestyle="--", linewidth=1)
            ax.set_title(f"layer {layer}, {'with' if variant.balance else 'without'} the balance loss", fontsize=13)
            ax.set_ylabel("% of the rows, by expert", fontsize=12)
    for row in axes[:depth]:
        row[0].sharey(row[1])
    left, right = axes[depth]
    for variant, colour in zip([variant for variant in runs if variant.factor], COLOURS):
        dropped = 100 * torch.tensor(runs[variant][0]["dropped"])
        left.plot(torch.linspace(0, settings["steps"], len(dropped)), dropped, color=colour, label=variant.name)
    left.set_title("rows dropped, %", fontsize=13)
    left.legend(fontsize=12, frameon=False)
    left.set_ylim(bottom=0)
    for ax in axes.flat[:-1]:
        ax.set_xlabel("step", fontsize=12)
    names = [variant for variant in runs if variant != DENSE]
    for y, variant in enumerate(names):
        middle, half = difference(runs[variant], runs[DENSE])
        right.errorbar(middle, y, xerr=half, color=COLOURS[0], marker="o", capsize=4)
        right.text(0.02, y - 0.2, variant.name, fontsize=12, transform=right.get_yaxis_transform())
    right.axvline(0, color="black", linestyle="--", linewidth=1)
    right.set(yticks=[], ylim=(len(names) - 0.5, -0.8))
    right.set_title("bits per byte minus dense, 95 %", fontsize=13)
    figure.savefig(FIGURES / "moe.png")


def main():
    parser = ArgumentParser(description="Train small-moe beside small, then without its balance loss and with a limit."
                                        " About ten minutes on two cores.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="of a run (None: as many as train.py makes)")
    parser.add_argument("--workers", type=positive(int), default=2, metavar="N", help="runs side by side")
    parser.add_argument("--out", type=Path, default=HERE / "out-moe", metavar="DIR", help="where runs are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, settings = prepare(arguments)
    plan = plan_runs(settings, arguments.out)
    complete_all(plan, source, arguments.workers)
    runs = {variant: [read_json(path) for other, *_, path in plan if other == variant] for variant in VARIANTS}
    steps = f" --steps {arguments.steps}" if arguments.steps else ""
    write_tables(runs, settings, f"python {HERE.name}/moe_demo.py{steps}", source)
    draw(runs, settings)


if __name__ == "__main__":
    run(main)
