"""The curve of a run, from what train.py recorded for TensorBoard: loss, validation, gradient and learning rate.

    python chapter-01-foundations/train.py
    python chapter-01-foundations/training_curve.py     some seconds; reads out/, writes figures/training_curve.png

TensorBoard draws the same while a run goes on: tensorboard --logdir chapter-01-foundations/out
"""
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from cli import ArgumentParser, InputError, run
from results import FIGURES

AROUND = 25   # steps on either side over which the line is a mean


def read_curves(out):
    """{name: (steps, values)} of all scalars that a run has recorded, the parts before and after a resume as one."""
    events = EventAccumulator(str(out / "tensorboard"), {SCALARS: 0})   # 0: each point, not a sample of them
    if (out / "tensorboard").is_dir():
        events.Reload()
    if "train/loss" not in events.Tags()["scalars"]:
        raise InputError(f"{out} holds no curves; train.py --out {out} records them")
    return {name: tuple(zip(*((event.step, event.value) for event in events.Scalars(name))))
            for name in events.Tags()["scalars"]}


def smooth(values):
    """The mean of each value that has AROUND neighbours on either side, and of these."""
    width = 2 * AROUND + 1
    return [sum(values[i:i + width]) / width for i in range(len(values) - width + 1)]


def draw(path, curves, vocab_size):
    fig = Figure(figsize=(10, 6.4), dpi=120, layout="constrained")
    axes = fig.subplot_mosaic([["loss", "loss"], ["validation", "rate"]], height_ratios=(1.3, 1))
    steps, losses = curves["train/loss"]
    ax = axes["loss"]
    ax.plot(steps, losses, color="#1f6f8b", alpha=0.3, linewidth=0.8)
    ax.plot(steps[AROUND:len(steps) - AROUND], smooth(losses), color="#1f6f8b", linewidth=2)
    ax.axhline(math.log(vocab_size), color="#888888", linestyle="dashed")
    ax.text(steps[-1], math.log(vocab_size) + 0.1, f"a uniform guess: ln {vocab_size:,} = {math.log(vocab_size):.2f}",
            color="#555555", ha="right", fontsize=12)
    ax.set_title(f"training loss, nats per token (thin: each step; thick: the mean of {2 * AROUND + 1})", fontsize=13)

    ax = axes["validation"]
    steps, bits = curves.get("validation/bits_per_byte_of_an_eighth", ((), ()))
    ax.plot(steps, bits, "o-", color="#b23a48")
    for step, value in zip(steps, bits):
        ax.annotate(f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=11)
    ax.margins(x=0.1, y=0.2)
    ax.set_title("bits per byte, an eighth of the validation text", fontsize=13)

    ax = axes["rate"]
    ax.semilogy(*curves["train/learning_rate"], color="#555555", linewidth=2)
    ax.semilogy(*curves["train/gradient_norm"], color="#d9822b", alpha=0.7, linewidth=0.8)
    for y, text, colour in ((0.55, "gradient norm, before clipping to 1", "#a85d0c"),
                            (0.04, "learning rate", "#555555")):
        ax.text(0.98, y, text, color=colour, ha="right", transform=ax.transAxes, fontsize=12)
    ax.set_title("gradient norm and learning rate", fontsize=13)
    for ax in axes.values():
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    fig.savefig(path)


def main():
    parser = ArgumentParser(description="Draw the curve of a run of train.py.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR",
                        help="folder that train.py wrote")
    out = parser.parse_args().out
    curves = read_curves(out)
    draw(FIGURES / "training_curve.png", curves, json.loads((out / "config.json").read_text())["vocab_size"])
    steps, losses = curves["train/loss"]
    print(f"steps {steps[0]:,} to {steps[-1]:,}: the loss goes from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"
          "\nAs a picture: figures/training_curve.png")


if __name__ == "__main__":
    run(main)
