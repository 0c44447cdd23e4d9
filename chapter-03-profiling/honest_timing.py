"""Measuring honestly: how a clock misleads, seen on this machine in less than 20 seconds.

Most speed-ups that never were came from one of four mistakes: the first, slow calls were counted; the clock was stopped
before the GPU had finished; two averages were compared while the machine did something else during one of them; two
things were changed at once. Against the third the test is cheap: compare a function with *itself*. Whatever "speed-up"
comes out is the error of the method.

    python honest_timing.py        (in this folder)
"""
import time
from statistics import mean, median, quantiles

import torch
from matplotlib.figure import Figure

from cli import run
from data import packed_sequence_collate_fn
from device import device_name
from model import CONFIGS, Transformer
from optimizer import adamw
from results import FIGURES
from train import loss_sum

DOCUMENTS, LENGTH = 2, 32   # a small batch, so that a thousand steps take seconds
REPETITIONS = 200           # of one step, to look at its noise
COMPARISONS = 100           # of the step with itself
EACH = 5                    # repetitions of A, and of B, in one comparison
WINNER = 0.03               # who is faster by so much is declared the winner
MATRIX = 512
TEAL, ORANGE, GREY, RED = "#1f6f8b", "#d9822b", "#888888", "#b23a48"


def synchronize(device):
    """Wait until the GPU has done all that it was given. A CPU's operators are done when they return."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_calls(function, repetitions, device):
    """Milliseconds of each of so many calls. The clock starts and stops only when the device is idle."""
    times = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def matmul(device):
    """One matrix multiplication, as a function without arguments."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    return lambda: a @ b


def training_step(device):
    """One step of the small model, always on the same batch, as a function without arguments."""
    torch.manual_seed(0)
    model = Transformer(CONFIGS["small"]).to(device)
    optimizer = adamw(model, 1e-4)
    ids = torch.randint(model.config.vocab_size, (DOCUMENTS, LENGTH + 1)).tolist()
    batch = packed_sequence_collate_fn([(row[:-1], row[1:]) for row in ids]).to(device)

    def step():
        optimizer.zero_grad()
        loss_sum(model, batch).backward()
        optimizer.step()
    return step


# --------------------------------------------------------------------------------------------- 1. warm-up

def show_warm_up(functions, device):
    """The first calls start threads, load libraries, choose kernels and ask for memory. Later ones find it all done."""
    print(f"\n1. Warm-up: milliseconds of a function's first calls\n\n    {'':<24}"
          + "".join(f"{f'call {i}':>10}" for i in range(1, 5)) + f"{'later':>10}{'1st / later':>14}")
    for name, function in functions.items():
        times = time_calls(function, 30, device)
        later = median(times[10:])
        print(f"    {name:<24}" + "".join(f"{t:>10.2f}" for t in (*times[:4], later)) + f"{times[0] / later:>13.1f}x")


# ----------------------------------------------------------------------------------------------- 2. noise

def show_noise(times):
    print(f"\n2. Noise: {len(times)} repetitions of the same training step, after warm-up, in milliseconds\n")
    rows = {"minimum": min(times), "median": median(times), "mean": mean(times),
            "95th percentile": quantiles(times, n=20)[-1], "maximum": max(times)}
    for name, value in rows.items():
        print(f"    {name:<18}{value:>8.2f}{value / rows['median'] - 1:>+9.1%} of the median")
    print("\n    Disturbances add time. A few slow steps drag the mean along, the median hardly notices them.")


# ------------------------------------------------------------------------------ 3. a function against itself

def one_after_the_other(times):
    """All of A first, then all of B: the ratio of their means. The way a comparison is usually made."""
    half = len(times) // 2
    return mean(times[:half]) / mean(times[half:])


def in_turns(times):
    """A, B, A, B, ...: each A beside the B that followed, and the median of these ratios."""
    return median(a / b for a, b in zip(times[::2], times[1::2]))


def compare_with_itself(times, compare, each):
    """The ratios that a comparison finds where there is no difference.

    Every step is the same step, so A and B are only names: cut the series into comparisons of 2 * each, and name the
    steps of each in the order of the method. Both methods so judge the very same minutes of the machine.
    """
    return [compare(times[end - 2 * each:end]) for end in range(2 * each, len(times) + 1, 2 * each)]


def error_of(ratios):
    """Nineteen of twenty ratios are not further from 1 than this."""
    return quantiles([abs(ratio - 1) for ratio in ratios], n=20, method="inclusive")[-1]


METHODS = {"all A, then all B; means": one_after_the_other, "in turns; median of ratios": in_turns}


def show_comparisons(times):
    print(f"\n3. The step against itself, {len(times) // (2 * EACH)} times, {EACH} repetitions each: who 'wins'?\n\n"
          f"    {'':<30}{f'winner by > {WINNER:.0%}':>18}{'largest':>10}{'19 of 20 within':>18}")
    for name, compare in METHODS.items():
        ratios = compare_with_itself(times, compare, EACH)
        wrong = mean(abs(ratio - 1) > WINNER for ratio in ratios)
        largest = max(ratios, key=lambda ratio: abs(ratio - 1))
        print(f"    {name:<30}{wrong:>18.0%}{largest:>9.2f}x{error_of(ratios):>17.1%}")
    print("\n4. One change at a time, and none smaller than the error. Repeating each so often, in turns, 19 of"
          "\n   20 comparisons that should say 1.000 are within\n")
    for each in (EACH, 2 * EACH, 4 * EACH, 8 * EACH):
        print(f"    {each:>5} repetitions: 1 +- {error_of(compare_with_itself(times, in_turns, each)):.3f}")


# ------------------------------------------------------------------------------------- 5. asynchronous devices

def show_asynchronous(device):
    print("\n5. Asynchronous devices: a GPU's operator returns when it is in the queue, long before it is done\n")
    if device != "cuda":
        print("    There is no CUDA GPU here, so nothing to show: on a CPU an operator is done when it returns.")
        return
    a = torch.randn(8192, 8192, device=device)
    time_calls(lambda: a @ a, 5, device)   # warm-up
    launch, whole = [], []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        launch.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - start) * 1e3)
    print(f"    clock stopped without synchronize   {median(launch):>10.3f} ms   measures the launch"
          f"\n    clock stopped after synchronize     {median(whole):>10.3f} ms   measures the multiplication")


# ------------------------------------------------------------------------------------------------- drawing

def draw_steps(ax, side, times):
    """The repetitions in their order, and at the side how often which time occurs."""
    top = quantiles(times, n=50)[-1] * 1.1
    shown = [t for t in times if t <= top]
    ax.scatter(range(1, len(times) + 1), [min(t, top) for t in times], s=9, color=TEAL, linewidths=0)
    ax.set_title(f"The same step, {len(times)} times", fontsize=14, loc="left")
    ax.set_xlabel("repetition", fontsize=12)
    ax.set_ylabel(f"milliseconds ({len(times) - len(shown)} slower ones at the edge)", fontsize=12)
    side.hist(shown, bins=40, orientation="horizontal", color=TEAL)
    side.set_xticks([])
    side.set_title(f"median {median(times):.1f}", fontsize=12, color=ORANGE, loc="left")
    for axis in (ax, side):
        axis.axhline(median(times), color=ORANGE, linewidth=2)
        axis.spines[["top", "right"]].set_visible(False)


def draw_comparisons(ax, times):
    """Each comparison's ratio as a point; what is outside the grey band is a winner that does not exist."""
    ax.axvspan(1 - WINNER, 1 + WINNER, color="#ededea", linewidth=0)
    ax.axvline(1, color=GREY, linewidth=1)
    spread = torch.rand(len(times), generator=torch.Generator().manual_seed(0)).tolist()
    for y, ((name, compare), colour) in enumerate(zip(METHODS.items(), (RED, TEAL))):
        ratios = compare_with_itself(times, compare, EACH)
        heights = [y + 0.15 + 0.5 * s for s in spread[:len(ratios)]]   # only so that points do not hide each other
        ax.scatter(ratios, heights, s=16, color=colour, alpha=0.6, linewidths=0)
        wrong = sum(abs(ratio - 1) > WINNER for ratio in ratios)
        ax.text(0.02, y, f"{name}: {wrong} of {len(ratios)} wrong", fontsize=12, color=colour, va="center",
                transform=ax.get_yaxis_transform())
    ax.set_title("The step against itself: A / B, truth 1", fontsize=14, loc="left")
    ax.set_xlabel(f"A / B from {EACH} repetitions each; grey: less than {WINNER:.0%}", fontsize=12)
    ax.set(ylim=(1.8, -0.15), yticks=[])
    ax.spines[["top", "right", "left"]].set_visible(False)


def draw(path, times):
    fig = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    steps, side, comparisons = fig.subplots(1, 3, width_ratios=[5, 1.6, 6])
    side.sharey(steps)
    side.tick_params(labelleft=False)
    draw_steps(steps, side, times[:REPETITIONS])
    draw_comparisons(comparisons, times)
    FIGURES.mkdir(exist_ok=True)
    fig.savefig(path)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}, torch {torch.__version__}")
    step = training_step(device)
    show_warm_up({f"matmul {MATRIX} x {MATRIX}": matmul(device), "training step": step}, device)
    times = time_calls(step, max(REPETITIONS, 2 * EACH * COMPARISONS), device)
    show_noise(times[:REPETITIONS])
    show_comparisons(times)
    show_asynchronous(device)
    draw(FIGURES / "honest_timing.png", times)
    print("\nThe noise and the comparisons as a picture: figures/honest_timing.png")


if __name__ == "__main__":
    run(main)
