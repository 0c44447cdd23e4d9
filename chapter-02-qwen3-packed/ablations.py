"""Which of the changes from GPT to Qwen3 is it? One change at a time, then what else could be otherwise.

    python ablations.py --calibrate      (in this folder; minutes: the time of a step of each variant)
    python ablations.py                  two to three hours on two cores; may be killed and started again at any time

A ladder leads from chapter 1's GPT to this chapter's default, one rung for each change, and each rung is compared with
the one before. Then each of two dozen switches is turned around the default. Every variant is trained twice, on the
same text as the default and for the same time, with several seeds. A seed gives a variant and what it is compared with
the same order of the data and, where the shapes agree, the same initial weights: only the differences of such pairs
count.

Time is a number of steps here. What a step costs is measured once, each variant in turns with the default, and a run
for the same time has that many times fewer steps. So nothing depends on how busy the machine is while it trains.
The last tenth of the training documents is kept apart, to compare variants on; the validation documents choose nothing.

Each finished run is a file in --out, named by all that determines it. Writes results/ablation_ladder.json,
results/ablations.json, results/ablation_budgets.json, figures/ablations.png and figures/ablation_curves.png.
"""
import itertools
import math
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from ablation_runs import Text, calibrate, compute_all, default_variant, plan, read_json
from cli import ArgumentParser, InputError, positive, run
from data import fetch
from results import FIGURES, write_results

EARLY = ("hashed bigram table", "token table begins at 0.02", "dropout 0.1", "learning rate x 2")   # at a third, too


# ---------------------------------------------------------------------------------------------------- variants

def ladder(default):
    """{name: changes of the default}: chapter 1's GPT, and one of its choices after the other taken back.

    Both chapters have the same tokenizer here, and the library's attention. Tied tables and the initial weights they
    have in common.
    """
    left = dict(norm="layer", mlp="gelu", intermediate_size=4 * default.hidden_size, positions="learned",
                num_key_value_heads=default.num_attention_heads, qk_norm=False, bias=True, batch_windows=16,
                max_position_embeddings=64, learning_rate=3e-3, weight_decay=0.1, schedule="tenth")
    rungs = {"chapter 1's GPT": (), "+ RMSNorm": ("norm",), "+ SwiGLU": ("mlp", "intermediate_size"),
             "+ rotary positions": ("positions",), "+ grouped heads": ("num_key_value_heads",),
             "+ QK-norm": ("qk_norm",), "+ no biases": ("bias",),
             "+ whole documents, packed": ("batch_windows", "max_position_embeddings"),
             "+ the default's recipe": ("learning_rate", "weight_decay", "schedule")}
    arms = {}
    for name, taken_back in rungs.items():
        left = {key: value for key, value in left.items() if key not in taken_back}
        arms[name] = left
    return arms


def toggles(default):
    """{name: changes of the default}, each by itself. What the default has already is left out."""
    ungated = {"intermediate_size": default.intermediate_size * 3 // 2}   # two matrices, the same number of weights
    heads, T, rate = default.num_attention_heads, default.batch_tokens, default.learning_rate
    changes = {
        "LayerNorm": {"norm": "layer"},
        "GELU, no gate": {"mlp": "gelu", **ungated},
        "squared ReLU, no gate": {"mlp": "squared relu", **ungated},
        "learned positions": {"positions": "learned",
                              "max_position_embeddings": min(T, default.max_position_embeddings)},
        "no positions": {"positions": "none"},
        "every head its own keys and values": {"num_key_value_heads": heads},
        "one key-value head": {"num_key_value_heads": 1},
        "no QK-norm": {"qk_norm": False},
        "biases": {"bias": True},
        "tables not tied": {"tie_word_embeddings": False},
        "token table begins at 0.02": {"table_std": 0.02},
        "logit cap 15": {"logit_cap": 15.0},
        "z-loss 1e-4": {"z_loss": 1e-4},
        "hashed bigram table": {"bigram_rows": 4096},
        "half the layers, wider": same_weights(default, default.num_hidden_layers // 2),
        "twice the layers, narrower": same_weights(default, default.num_hidden_layers * 2),
        "vocabulary / 2": {"vocab_size": default.vocab_size // 2},
        "vocabulary x 2": {"vocab_size": default.vocab_size * 2},
        "documents not kept apart": {"across": True},
        "tokens a step / 2": {"batch_tokens": T // 2},
        "tokens a step x 2": {"batch_tokens": T * 2, "max_position_embeddings": T},
        "learning rate / 2": {"learning_rate": rate / 2},
        "learning rate x 2": {"learning_rate": rate * 2},
        "learning rate stays": {"schedule": "constant"},
        "learning rate linear to zero": {"schedule": "linear"},
        "learning rate down to a tenth": {"schedule": "tenth"},
        "no weight decay": {"weight_decay": 0.0},
        "weight decay 0.1": {"weight_decay": 0.1},
        "dropout 0.1": {"dropout": 0.1},
    }
    return {"default": {}} | {name: change for name, change in changes.items() if replace(default, **change) != default}


def same_weights(default, layers):
    """Sizes of a model of so many layers with as many weights as the default. The shape of its layers stays as well."""
    def outside_mlp(layers, width, head_dim):
        """Weights of the token table and of attention."""
        heads = default.num_attention_heads + default.num_key_value_heads
        return width * (default.vocab_size + layers * 2 * heads * head_dim)

    def candidate(head_dim):
        width = default.hidden_size * head_dim // default.head_dim
        mlp = round((weights - outside_mlp(layers, width, head_dim)) / (layers * 3 * width))
        return {"num_hidden_layers": layers, "hidden_size": width, "head_dim": head_dim, "intermediate_size": mlp}

    weights = (outside_mlp(default.num_hidden_layers, default.hidden_size, default.head_dim)
               + default.num_hidden_layers * 3 * default.hidden_size * default.intermediate_size)
    slimness = default.intermediate_size / default.hidden_size
    return min(map(candidate, range(2, 4 * default.head_dim, 2)),
               key=lambda sizes: abs(sizes["intermediate_size"] / sizes["hidden_size"] - slimness))


# ---------------------------------------------------------------------------------------------------- statistics

def paired(differences):
    """(mean, half the 95 % confidence interval, p of no difference) by Student's t of the differences of pairs.

    t = sqrt(n) tan(angle) with an angle of density cos(angle)^(n-1) has Student's distribution of n degrees of freedom.
    """
    degrees = len(differences) - 1
    angles = np.linspace(0, np.pi / 2, 10_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.append(0, (density[1:] + density[:-1]).cumsum())   # trapezoids
    below /= below[-1]                                            # probability of a smaller |angle|
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = error * math.sqrt(degrees) * math.tan(np.interp(0.95, below, angles))
    p = 1 - np.interp(math.atan2(abs(mean), error * math.sqrt(degrees)), angles, below)
    return mean, half, float(p)


def holm(ps):
    """Holm's correction: with twenty variants one would pass p < 0.05 by luck. {name: p} -> {name: p}."""
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        highest = max(highest, min(1.0, ps[name] * (len(ps) - rank)))
        corrected[name] = highest
    return corrected


# ------------------------------------------------------------------------------------------------------- report

COLUMNS = {"change": "change", "parameters": "parameters", "step_time": "time of a step",
           "text_bits": "same text: bits per byte", "text_difference": "difference", "text_half": "± 95 %",
           "text_p": "p (Holm)",
           "time_bits": "same time: bits per byte", "time_difference": "difference", "time_half": "± 95 %",
           "time_p": "p (Holm)",
           "text_validation": "validation, same text", "time_validation": "validation, same time"}


def mean_of(outcomes, part):
    return statistics.fmean(outcome[part] for outcome in outcomes)


def differences(outcomes, others):
    return [one["development"] - other["development"] for one, other in zip(outcomes, others)]


def table(names, base_of, found, ratios):
    """Rows of a results file. found: {(name, budget): outcomes, by seed}; base_of: {name: what it is compared with}."""
    rows = {name: {"change": name, "step_time": ratios[name], "parameters": found[name, "text"][0]["parameters"]}
            for name in names}
    for budget in ("text", "time"):
        compared = {name: paired(differences(found[name, budget], found[base_of[name], budget]))
                    for name in names if name in base_of}
        corrected = holm({name: p for name, (_, _, p) in compared.items()})
        for name, row in rows.items():
            mean, half, _ = compared.get(name, ("", "", ""))
            row |= {f"{budget}_bits": mean_of(found[name, budget], "development"),
                    f"{budget}_difference": mean, f"{budget}_half": half, f"{budget}_p": corrected.get(name, ""),
                    f"{budget}_validation": mean_of(found[name, budget], "validation")}
    return list(rows.values())


def budgets_table(names, found):
    """What a third of the budget says about a variant, and what all of it."""
    rows = []
    for name in names:
        row = {"change": name}
        for budget in ("third", "text"):
            mean, half, _ = paired(differences(found[name, budget], found["default", budget]))
            row |= {budget: mean, f"{budget}_half": half}
        rows.append(row)
    return rows


def draw_intervals(tables):
    """One line for each difference: the mean and the interval, at the same text and for the same time."""
    rows = [(title, row) for title, table in tables.items() for row in table if row["text_difference"] != ""]
    means = [abs(row[f"{budget}_difference"]) for _, row in rows for budget in ("text", "time")]
    reach = min(1.2 * max(means), 5 * statistics.median(means)) + 1e-3   # a huge one would make all others dots
    figure = Figure(figsize=(9, 1.4 + 0.24 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle("filled: p (Holm) < 0.05; grey: the interval holds zero", fontsize=10)
    for axes, budget in zip(figure.subplots(1, 2, sharey=True), ("text", "time")):
        for y, (title, row) in enumerate(rows):
            mean, half, p = (row[f"{budget}_{what}"] for what in ("difference", "half", "p"))
            colour = "#8a8a86" if abs(mean) <= half else "#1f6f8b" if mean < 0 else "#b23a48"
            axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, markersize=5, linewidth=1.5,
                          markerfacecolor=colour if p < 0.05 else "white")
            if abs(mean) > reach:
                axes.text(math.copysign(reach, mean), y, f"{mean:+.2f}", color=colour, va="center",
                          ha="left" if mean < 0 else "right")
            if y and rows[y - 1][0] != title:
                axes.axhline(y - 0.5, color="#c9c9c4", linewidth=0.8)
        axes.axvline(0, color="#444441", linewidth=0.8)
        axes.set(title=f"the same {budget}", xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("bits per byte, difference (left is better)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#ededea")
        axes.set_axisbelow(True)
    figure.axes[0].set_yticks(range(len(rows)), [row["change"] for _, row in rows])
    figure.savefig(FIGURES / "ablations.png")


def draw_curves(names, found):
    """Loss against the default's over the run, pair by pair on the same batches, the mean over seeds."""
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(names, ("#1f6f8b", "#d9822b", "#7a5195", "#b23a48")):
        gaps = np.mean([np.subtract(one["losses"], other["losses"])
                        for one, other in zip(found[name, "text"], found["default", "text"])], axis=0)
        axes.plot((np.arange(len(gaps)) + 0.5) / len(gaps), gaps, color=colour, label=name)
    axes.axhline(0, color="#444441", linewidth=0.8)
    axes.set(xlabel="share of the run", ylabel="training loss against the default (nats)", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(FIGURES / "ablation_curves.png")


def report(found, ladder_names, toggle_names, ratios, source):
    """Write tables and figures of the variants whose runs are all there, of earlier calls too."""
    done = {name for name in [*ladder_names, *toggle_names] if {(name, "text"), (name, "time")} <= found.keys()}
    rungs = [name for name in ladder_names if name in done]
    switches = [name for name in toggle_names if name in done]
    early = [name for name in EARLY if name in done and {(name, "third"), ("default", "third")} <= found.keys()]
    before = {name: base for base, name in itertools.pairwise(ladder_names) if {base, name} <= done}
    tables = {"ladder": table(rungs, before, found, ratios),
              "switches": table(switches, dict.fromkeys(switches[1:], "default"), found, ratios)}
    command = " ".join(["python chapter-02-qwen3-packed/ablations.py", *sys.argv[1:]])
    FIGURES.mkdir(exist_ok=True)
    for name, rows in (("ablation_ladder", tables["ladder"]), ("ablations", tables["switches"])):
        if len(rows) > 1:
            print(write_results(name, command, COLUMNS, rows, data=source))
    if any(len(rows) > 1 for rows in tables.values()):
        draw_intervals(tables)
    if early:
        columns = {"change": "change", "third": "difference at a third of the text", "third_half": "± 95 %",
                   "text": "difference at all of it", "text_half": "± 95 %"}
        print(write_results("ablation_budgets", command, columns, budgets_table(early, found), data=source))
        draw_curves(early, found)


def parse_arguments():
    parser = ArgumentParser(description="Train variants of the default run, and compare. All of them with three seeds"
                                        " take two to three hours on two cores; --calibrate takes some minutes.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--arms", metavar="A,B", help="only these variants, by the names in the table, and the default")
    parser.add_argument("--seeds", type=positive(int), default=3, metavar="N",
                        help="pairs of each comparison, 2 or more")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="steps of the default (None: as in train.py)")
    parser.add_argument("--workers", type=positive(int), default=os.cpu_count(), metavar="N",
                        help="runs at the same time, each in a process of one thread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "ablations", metavar="DIR",
                        help="where finished runs are kept")
    parser.add_argument("--calibrate", action="store_true",
                        help="measure what a step takes, anew, and no more; the machine should be quiet")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        raise InputError("--seeds 1 is one pair, and no interval; take 2 or more")
    return arguments


def choose(arms, names):
    """The names that --arms gives, and the default."""
    names = [name.strip() for name in names.split(",")] if names is not None else list(arms)
    for name in names:
        if name not in arms:
            raise InputError(f"--arms {name}: there is no such variant; there are: {', '.join(arms)}")
    return [name for name in arms if name in (*names, "default")]


def main():
    arguments = parse_arguments()
    default, steps = default_variant()
    rungs, switches = ladder(default), toggles(default)
    arms = {name: replace(default, **changes) for name, changes in (rungs | switches).items()}
    chosen = choose(arms, arguments.arms)
    source = fetch(arguments.data)
    text = Text(source)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ratios = calibrate(text, arms, chosen, default, arguments.out / "calibration.json", arguments.calibrate)
    if arguments.calibrate:
        print("\n".join(f"{ratios[name]:8.3f}  {name}" for name in chosen))
        return

    plans = plan(text, arms, default, arguments.steps or steps, ratios, arguments.seeds, arguments.out)
    wanted = [key for key in plans if key[0] in chosen and (key[1] != "third" or key[0] in (*EARLY, "default"))]
    # One seed after the other: who looks in between has all variants, with fewer seeds.
    runs = {plans[key][seed].path: (plans[key][seed], ratios[key[0]])
            for seed in range(arguments.seeds) for key in wanted}   # a run that serves twice is here once
    left = {path: pair for path, pair in runs.items() if not path.exists()}
    print(f"{len(chosen)} variants, {len(runs)} runs, {len(runs) - len(left)} of them done")
    with tqdm(total=math.ceil(sum(each.steps * ratio for each, ratio in left.values())), disable=not left, smoothing=0,
              bar_format="{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left") as bar:
        compute_all(text, [each for each, _ in left.values()], arguments.workers,
                    lambda each, number: bar.update(number * left[each.path][1]))
    found = {key: [read_json(each.path) for each in group] for key, group in plans.items()
             if all(each.path.exists() for each in group)}
    report(found, list(rungs), list(switches), ratios, source)


if __name__ == "__main__":
    run(main)
