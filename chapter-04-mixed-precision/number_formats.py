"""What float32, tf32, bfloat16 and float16 can hold, and what they cannot.

Training with half the bits is fast, and most of what is odd about it (loss scaling, float32 master weights, float32
norms, float32 accumulation) is a remedy for one of three accidents: a number is rounded away because it is added to a
large one, it is too small and becomes zero, or too large and becomes infinite. This script lets each of them happen.

    python number_formats.py        (in this folder)
"""
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from cli import run
from data import IGNORE, fetch, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from model import CONFIGS, Transformer
from results import FIGURES
from tokenizer import Tokenizer

UPDATES, UPDATE = 1000, 0.001   # of a weight of 1.0, which should end at 2.0
WEIGHTS = 256                   # with stochastic rounding no two weights go the same way, so look at many
BATCH_TOKENS = 1024             # of the batch whose gradients are looked at, train.py's default
SCALES = (0, 16, 24)            # loss scales, as powers of two
TERMS = 4096                    # of a dot product
TEAL, ORANGE, VIOLET, GREY, RED = "#1f6f8b", "#d9822b", "#7a5195", "#888888", "#b23a48"


# ---------------------------------------------------------------------------------------------- 1. the formats

class Format(NamedTuple):
    exponent: int        # bits
    mantissa: int        # bits that are stored; the 1 in front of the point is not
    dtype: torch.dtype   # what holds it


FORMATS = {
    "float32": Format(8, 23, torch.float32),
    "tf32": Format(8, 10, torch.float32),   # no dtype: what a GPU's matrix units make of the float32 they are given
    "bfloat16": Format(8, 7, torch.bfloat16),
    "float16": Format(5, 10, torch.float16),
}


def limits(exponent, mantissa):
    """(largest, smallest normal, smallest subnormal, step at 1) of a format, from its numbers of bits.

    A number is +-1.mantissa * 2^(exponent - bias). An exponent of only ones means inf or nan. One of only zeros means
    0.mantissa * 2^(1 - bias): such subnormal numbers reach further down, and each halving costs a bit of precision.
    """
    bias = 2 ** (exponent - 1) - 1
    return (2 - 2.0 ** -mantissa) * 2.0 ** bias, 2.0 ** (1 - bias), 2.0 ** (1 - bias - mantissa), 2.0 ** -mantissa


def as_int(x):
    """The same bits as an integer: int32 of float32, int16 of the halves."""
    return x.view({4: torch.int32, 2: torch.int16}[x.itemsize])


def to_tf32(x):
    """The nearest number with 10 bits of mantissa instead of 23; of two equally near ones the even. float32 -> float32.

    Adding just under half of the last bit that stays carries into it if the rest is more than half, and adding its own
    value too carries exactly halves into odd numbers only.
    """
    bits = as_int(x)
    last = (bits >> 13) & 1
    rounded = (bits + 0x0FFF + last) & -0x2000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)   # a carry would make -0 of a nan


def hold(x, name):
    """What a format makes of float32 numbers, as float32."""
    return to_tf32(x) if name == "tf32" else x.to(FORMATS[name].dtype).float()


def bits_of(value, name):
    """The sign, the exponent and the mantissa of a Python number in a format, as text of zeros and ones."""
    exponent, mantissa, dtype = FORMATS[name]
    size = 1 + exponent + mantissa
    x = hold(torch.tensor(value), name).to(dtype)
    integer = as_int(x).item() >> (8 * x.itemsize - size)   # tf32: without the 13 bits that are zero
    text = f"{integer & (2 ** size - 1):0{size}b}"
    return text[0], text[1:1 + exponent], text[1 + exponent:]


def check_limits(name):
    """The formula beside torch.finfo, and beside the number whose last bit alone is 1."""
    dtype = FORMATS[name].dtype
    finfo = torch.finfo(dtype)
    smallest = as_int(torch.zeros((), dtype=dtype)).add(1).view(dtype).item()
    found, expected = limits(*FORMATS[name][:2]), (finfo.max, finfo.smallest_normal, smallest, finfo.eps)
    assert found == expected, f"{name}: {found} by the formula, {expected} by torch"


def show_formats():
    print("1. Four formats. The exponent's bits buy range, those of the mantissa precision.\n\n"
          f"    {'':<10}{'sign':>5}{'exponent':>10}{'mantissa':>10}{'largest':>11}{'smallest':>11}{'subnormal':>11}"
          f"{'step at 1':>11}{'digits':>8}{'0.1 becomes':>14}")
    for name, (exponent, mantissa, _) in FORMATS.items():
        largest, smallest, subnormal, step = limits(exponent, mantissa)
        print(f"    {name:<10}{1:>5}{exponent:>10}{mantissa:>10}{largest:>11.2e}{smallest:>11.2e}{subnormal:>11.2e}"
              f"{step:>11.2e}{(mantissa + 1) * math.log10(2):>8.1f}{hold(torch.tensor(0.1), name):>14.10f}")
        if name != "tf32":
            check_limits(name)
    print("\n    0.1 in bits, and what they mean: 1.mantissa * 2^(exponent - bias)\n")
    for name, (exponent, mantissa, _) in FORMATS.items():
        sign, power, fraction = bits_of(0.1, name)
        bias = 2 ** (exponent - 1) - 1
        value = 1 + int(fraction, 2) / 2 ** mantissa
        print(f"    {name:<10}{sign} {power:>8} {fraction:<24}= {value:.7f} * 2^({int(power, 2)} - {bias})")


# ------------------------------------------------------------------------------------------------- 2. rounding

def count_until_stuck(dtype):
    """1.0 + 1.0 + ... until the next 1.0 changes nothing."""
    counter = torch.tensor(0.0, dtype=dtype)
    while counter + 1 != counter:
        counter += 1
    return int(counter)


def stochastic_round(x, generator=None):
    """float32 -> bfloat16: to one of the two neighbours, the nearer the likelier, so that the mean is x itself.

    bfloat16 is the upper half of a float32. Cutting the lower half off rounds towards zero. Add 16 random bits before,
    and a carry reaches the upper half in as many of 65,536 cases as the lower half says: for a number a quarter of the
    way from one neighbour to the next, in a quarter of them.
    """
    random = torch.randint(2 ** 16, x.shape, dtype=torch.int32, generator=generator, device=x.device)
    rounded = (as_int(x) + random) & -2 ** 16
    # A GPU's nan has bits 0x7fffffff: anything added makes it -0, and the accident goes unnoticed.
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).bfloat16()


# Four ways to add an update to weights (W,) again and again. Each yields the weights after every update, as float32.

def nearest(weight, update, steps):
    weight = weight.bfloat16()
    for _ in range(steps):
        weight = weight + update   # the sum itself is made in float32, and then rounded
        yield weight.float()


def stochastic(weight, update, steps):
    generator = torch.Generator().manual_seed(0)
    weight = weight.bfloat16()
    for _ in range(steps):
        weight = stochastic_round(weight.float() + update, generator)
        yield weight.float()


def kahan(weight, update, steps):
    """What rounding took from one update is kept, in bfloat16 too, and added to the next one (Kahan 1965)."""
    weight, lost = weight.bfloat16(), torch.zeros_like(weight, dtype=torch.bfloat16)
    for _ in range(steps):
        wanted = lost + update
        rounded = weight + wanted
        lost = wanted - (rounded - weight)   # by algebra this is 0. In bfloat16 it is what did not fit
        weight = rounded
        yield weight.float()


def in_float32(weight, update, steps):
    for _ in range(steps):
        weight = weight + update
        yield weight


MODES = {"bfloat16, to the nearest": (nearest, 2, RED), "bfloat16, stochastic": (stochastic, 2, VIOLET),
        "bfloat16, Kahan": (kahan, 4, ORANGE), "float32": (in_float32, 4, TEAL)}   # way, bytes a weight, colour


def show_counter():
    stuck = count_until_stuck(torch.bfloat16)
    around = (as_int(torch.tensor(stuck).bfloat16()) + torch.arange(-2, 3, dtype=torch.int16)).view(torch.bfloat16)
    others = {name: 2 ** (FORMATS[name].mantissa + 1) for name in ("float16", "float32")}
    print(f"\n2. Rounding: a bfloat16 counter to which 1.0 is added stops at {stuck}.\n\n"
          f"    Its neighbours: {', '.join(f'{x:.0f}' for x in around.tolist())}. From {stuck} on the step is 2, and"
          f"\n    {stuck + 1} is halfway between two numbers. A tie goes to the one whose last bit is 0: {stuck}."
          f"\n    That is 2^8: seven bits of mantissa and the 1 that is not stored. In the same way float16 stops at"
          f"\n    {others['float16']:,} and float32 at {others['float32']:,}.")


def show_weights(paths):
    """paths: {way: (updates, W) weights after each update}."""
    step = limits(*FORMATS["bfloat16"][:2])[3]
    print(f"\n    A weight of 1.0 that receives {UPDATES:,} updates of {UPDATE}. In bfloat16 the step at 1 is"
          f"\n    {step:.4f}: an update is {UPDATE / step:.2f} of a step, and what is under half is rounded away.\n\n"
          f"    {'':<28}{'bytes':>6}" + "".join(f"{f'after {n:,}':>13}" for n in (1, 100, UPDATES)))
    for name, path in paths.items():
        print(f"    {name:<28}{MODES[name][1]:>6}" + "".join(f"{path[n - 1].mean():>13.4f}" for n in (1, 100, UPDATES)))
    last = paths["bfloat16, stochastic"][-1]
    print(f"\n    Stochastic rounding: the mean of {WEIGHTS} weights. A single one is off by {last.std():.2f} (standard"
          "\n    deviation): the error has become noise. Kahan: 2 of the 4 bytes hold what was lost so far.")


# ---------------------------------------------------------------------------------- 3. underflow, loss scaling

def real_gradients():
    """float32 gradients of the small model at its initialization, on one packed batch, without those that are zero.

    {"weights": (n,), "activations": (n,), "logits": (n,)}. Activations are what linear layers return, those of the last
    one are the logits. Backward begins with the latter and ends with the weights.
    """
    documents, _ = load_documents(fetch("tinyshakespeare"))
    tokenizer = Tokenizer.train(documents, CONFIGS["small"].vocab_size)
    windows, _ = tokenize(documents, tokenizer, BATCH_TOKENS)
    batch = packed_sequence_collate_fn(next(training_packs(windows, BATCH_TOKENS, seed=0)))
    torch.manual_seed(0)
    model = Transformer(replace(CONFIGS["small"], vocab_size=tokenizer.vocab_size))
    parts = {"weights": [], "activations": [], "logits": []}

    def remember(module, _, output_gradients):
        parts["logits" if module is model.lm_head else "activations"].append(output_gradients[0])

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(remember)
    logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)   # (T, V)
    F.cross_entropy(logits, batch.targets, ignore_index=IGNORE).backward()
    parts["weights"] = [parameter.grad for parameter in model.parameters()]
    gradients = {kind: torch.cat([part.flatten() for part in tensors]) for kind, tensors in parts.items()}
    return {kind: values[values != 0] for kind, values in gradients.items()}


def shares(values, dtype, scale):
    """Of values, none of them 0, times scale: which shares become (zero, subnormal, infinite) in dtype?"""
    held = (values * scale).to(dtype).float().abs()
    subnormal = (held > 0) & (held < torch.finfo(dtype).smallest_normal)
    return tuple(chosen.float().mean().item() for chosen in (held == 0, subnormal, held.isinf()))


def show_underflow(gradients):
    print("\n3. Underflow: real gradients, computed in float32, and what would be left of them in 16 bits. A loss times"
          "\n   a scale makes every gradient larger by it; they are divided by it before the update. A power of two"
          "\n   changes exponents only, so nothing is rounded.\n\n"
          f"    {'':<21}{'float16:':>13}{'':>22}{'bfloat16:':>13}\n"
          f"    {'gradients of':<14}{'scale':>7}" + 2 * f"{'zero':>13}{'subnormal':>11}{'infinite':>11}")
    for kind, values in gradients.items():
        for power in SCALES:
            found = (*shares(values, torch.float16, 2.0 ** power), *shares(values, torch.bfloat16, 2.0 ** power))
            print(f"    {kind:<14}{f'2^{power}':>7}"
                  + "".join(f"{share:>{width}.3%}" for share, width in zip(found, (13, 11, 11) * 2)))
    largest = {kind: values.abs().max().item() for kind, values in gradients.items()}
    fits = math.floor(math.log2(torch.finfo(torch.float16).max / max(largest.values())))
    logit = math.log2(1 / CONFIGS["qwen3-0.6b"].vocab_size / 4096)
    counts = ", ".join(f"{len(gradients[kind]):,} of {kind}, up to {largest[kind]:.1e}" for kind in gradients)
    print(f"\n    {counts}."
          f"\n    Subnormal: there, but with fewer bits. Infinite: 2^{fits} is the largest scale here without a single"
          "\n    one, and a single one spoils the step. Nobody knows that scale in advance, and it changes: a gradient"
          "\n    scaler tries larger ones, skips a step that overflows, and goes back. bfloat16 has float32's exponents"
          "\n    and needs no scale.\n"
          "\n    Backward begins at the logits: p / T for a token that is wrong, of which the model believes with"
          "\n    probability p that it comes next. V tokens share p = 1. If all are equally likely, Qwen3 0.6B has"
          f"\n    1 / (V T) = 2^{logit:.0f} at T = 4,096. float16 ends at 2^-24: without a scale all of them are 0.")


# ------------------------------------------------------------------------------------------------- 4. overflow

def root_mean_square(x):
    return (x.square().sum() / len(x)).sqrt()


def softmax_as_defined(x):
    """exp(x_i) / sum_j exp(x_j). To read, not to use."""
    exps = x.exp()
    return exps / exps.sum()


def softmax(x):
    """The same quotients, but the largest exponent is 0, so that nothing overflows."""
    return softmax_as_defined(x - x.max())


def show_overflow():
    x, logits = torch.full((1024,), 16.0), torch.tensor([12.0, 11.0, 10.0])
    rows = {"sum of the squares of 1,024 times 16": lambda dtype: x.to(dtype).square().sum(),
            "their root mean square": lambda dtype: root_mean_square(x.to(dtype)),
            "    made in float32, then rounded": lambda dtype: root_mean_square(x.to(dtype).float()).to(dtype),
            "e^12": lambda dtype: logits.to(dtype).exp()[0],
            "softmax(12, 11, 10), as defined, first": lambda dtype: softmax_as_defined(logits.to(dtype))[0],
            "    maximum subtracted": lambda dtype: softmax(logits.to(dtype))[0]}
    names = ("float32", "bfloat16", "float16")
    print("\n4. Overflow: the answers are finite, but on the way to them something is beyond float16's 65,504.\n\n"
          f"    {'':<40}" + "".join(f"{name:>14}" for name in names))
    for label, compute in rows.items():
        print(f"    {label:<40}" + "".join(f"{compute(FORMATS[name].dtype).item():>14,.6g}" for name in names))
    print("\n    In float32 none of this is near a limit. So norms, softmax and the loss stay in it, whatever the rest"
          "\n    is computed in.")


# --------------------------------------------------------------------------------------------- 5. accumulation

def running_sums(products, dtype):
    """float32 products (n,) added one after the other in an accumulator of dtype: all its values, as float32, (n,)."""
    total, totals = torch.tensor(0.0), []
    for product in products:
        total = (total + product).to(dtype).float()
        totals.append(total)
    return torch.stack(totals)


def dot_products():
    """Products of two bfloat16 vectors, exact in float32 (8 + 8 bits are 16): {what they are: (TERMS,)}."""
    torch.manual_seed(0)
    pairs = {"all positive": torch.rand(2, TERMS), "both signs": torch.randn(2, TERMS)}
    return {name: pair.bfloat16().float().prod(dim=0) for name, pair in pairs.items()}


def show_accumulation(sums):
    """sums: {what the products are: {name of the accumulator, or "exact": (TERMS,) running sums}}."""
    names = list(next(iter(sums.values())))
    print(f"\n5. Accumulation: a dot product of {TERMS:,} bfloat16 numbers with {TERMS:,} others, its sum kept in\n\n"
          f"    {'':<16}" + "".join(f"{name:>14}" for name in names))
    for label, accumulators in sums.items():
        print(f"    {label:<16}" + "".join(f"{total[-1]:>14.3f}" for total in accumulators.values()))
    print("\n    The larger the sum, the coarser its step, until the products fall through. With both signs it"
          "\n    stays smaller and errs all the same. So a matrix unit multiplies 16 bits, adds up in float32, and"
          "\n    rounds once.")


# ----------------------------------------------------------------------------------------------------- drawing

def draw_layout(ax):
    """Each format as a row of bits, 0.1 written in it."""
    for y, name in enumerate(FORMATS):
        exponent, mantissa, _ = FORMATS[name]
        largest, _, subnormal, _ = limits(exponent, mantissa)
        x = 0
        for part, colour in zip(bits_of(0.1, name), (GREY, ORANGE, TEAL)):
            for bit in part:
                ax.add_patch(Rectangle((x, y), 0.88, 0.4, color=colour, linewidth=0))
                ax.text(x + 0.44, y + 0.21, bit, color="white", fontsize=8, ha="center", va="center")
                x += 1
        ax.text(0, y - 0.1, f"{name}: 1 + {exponent} + {mantissa}", fontsize=12)
        ax.text(32, y - 0.1, f"$2^{{{math.log2(subnormal):.0f}}}$ to $2^{{{math.log2(largest):.0f}}}$,"
                f" step at 1: $2^{{{-mantissa}}}$", fontsize=11, ha="right")
    for x, label, colour in ((0, "sign", GREY), (4, "exponent", ORANGE), (13, "mantissa", TEAL)):
        ax.text(x, 3.8, label, fontsize=13, color=colour, weight="bold")
    ax.set_title("Where the bits go (here: 0.1)", fontsize=14, loc="left")
    ax.set(xlim=(-0.2, 32.2), ylim=(3.95, -0.45))
    ax.axis("off")


def draw_gradients(ax, gradients, power):
    """Histograms of log2 of the gradients times 2^power, over what float16 does with them."""
    low, high, bins = -45, 20, 130
    inside = ax.get_xaxis_transform()   # x in data, y from 0 to 1
    largest, smallest, subnormal, _ = map(math.log2, limits(*FORMATS["float16"][:2]))
    for start, end, colour, label in (
            (low, subnormal - 1, RED, "float16: zero"), (subnormal - 1, smallest, ORANGE, "subnormal"),
            (smallest, largest, "white", "normal"), (largest, high, RED, "inf")):
        ax.axvspan(start, end, color=colour, alpha=0.18, linewidth=0)
        ax.text((start + end) / 2, 0.965, label, fontsize=11, ha="center", va="top", transform=inside)
    ax.annotate("", (low, 0.83), (high, 0.83), xycoords=inside, arrowprops=dict(arrowstyle="<->", color=GREY))
    ax.text(high - 1, 0.81, "bfloat16 holds all this", fontsize=11, color="#555555", ha="right", va="top",
            transform=inside)
    for (kind, values), colour in zip(gradients.items(), (TEAL, VIOLET, GREY)):
        counts = torch.histc(values.abs().log2() + power, bins, low, high) / len(values)
        ax.stairs(counts, torch.linspace(low, high, bins + 1), fill=True, color=colour, alpha=0.55)
        peak = low + (counts.argmax().item() + 0.5) * (high - low) / bins
        ax.text(peak, counts.max().item() * 1.05, kind, fontsize=11, color=colour, ha="center")
    ax.set_title("Gradients of the loss" + f" times $2^{{{power}}}$" * (power > 0), fontsize=13, loc="left")
    ax.set(xlim=(low, high), yticks=[])
    ax.set_ylim(0, ax.get_ylim()[1] * 1.5)
    ax.spines[["top", "right", "left"]].set_visible(False)


def draw_formats(path, gradients):
    fig = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = fig.subplot_mosaic([["layout", "plain"], ["layout", "scaled"]], width_ratios=[5, 6])
    draw_layout(axes["layout"])
    draw_gradients(axes["plain"], gradients, 0)
    draw_gradients(axes["scaled"], gradients, 16)
    axes["plain"].tick_params(labelbottom=False)
    axes["scaled"].set_xlabel("log2 |gradient|", fontsize=12)
    fig.savefig(path)


def draw_weights(ax, paths):
    n = torch.arange(1, UPDATES + 1)
    for name, path in paths.items():
        ax.plot(n, path.mean(dim=1), color=MODES[name][2], linewidth=2.5)
    for single in paths["bfloat16, stochastic"].T[:8]:
        ax.plot(n, single, color=VIOLET, linewidth=0.7, alpha=0.5)
    ax.text(0, 1.9, "float32, Kahan,\nstochastic mean", color=TEAL, fontsize=11)
    ax.text(UPDATES, 1.25, "stochastic,\neight weights", color=VIOLET, fontsize=11, ha="right")
    ax.text(UPDATES, 1.02, "to the nearest", color=RED, fontsize=11, ha="right")
    ax.set_title(f"1.0 + {UPDATES:,} times {UPDATE}", fontsize=13, loc="left")
    ax.set_xlabel("update", fontsize=12)


def draw_first_weights(ax, paths, shown=40):
    for name, path in paths.items():
        line = torch.cat([torch.ones(1), path[:shown, 0]])
        ax.step(torch.arange(shown + 1), line, where="post", color=MODES[name][2], linewidth=2, label=name)
    ax.set_title(f"One weight, the first {shown}", fontsize=13, loc="left")
    ax.set_xlabel("update", fontsize=12)
    ax.set_ylim(top=1 + 1.45 * shown * UPDATE)
    ax.legend(fontsize=11, loc="upper left", frameon=False, borderpad=0)


def draw_sums(ax, sums):
    for name, colour in (("float32", TEAL), ("float16", ORANGE), ("bfloat16", RED)):
        ax.plot(torch.arange(1, TERMS + 1), sums[name], color=colour, linewidth=2)
        ax.text(TERMS * 1.02, sums[name][-1], name, color=colour, fontsize=11, va="center")
    ax.set_title(f"The sum of {TERMS:,} products", fontsize=13, loc="left")
    ax.set_xlabel("products added", fontsize=12)


def draw_rounding(path, paths, sums):
    fig = Figure(figsize=(10, 3.9), dpi=120, layout="constrained")
    weights, first, accumulators = axes = fig.subplots(1, 3)
    draw_weights(weights, paths)
    draw_first_weights(first, paths)
    draw_sums(accumulators, sums)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def main():
    show_formats()
    show_counter()
    paths = {name: torch.stack(list(way(torch.ones(WEIGHTS), UPDATE, UPDATES))) for name, (way, _, _) in MODES.items()}
    show_weights(paths)
    gradients = real_gradients()
    show_underflow(gradients)
    show_overflow()
    sums = {label: {"exact": products.double().cumsum(0)} | {
        name: running_sums(products, FORMATS[name].dtype) for name in ("float32", "float16", "bfloat16")}
        for label, products in dot_products().items()}
    show_accumulation(sums)
    FIGURES.mkdir(exist_ok=True)
    draw_formats(FIGURES / "number_formats.png", gradients)
    draw_rounding(FIGURES / "rounding.png", paths, sums["all positive"])
    print("\nFigures: figures/number_formats.png, figures/rounding.png")


if __name__ == "__main__":
    run(main)
