"""Numbers as small integers: a scale that many of them share, and a few bits for each.

    python integers.py        (in this folder: draws figures/integers.png)

A weight matrix (N, K) makes N outputs of K inputs. Each weight w becomes an integer q with w ~ q * scale. What costs
quality is the rounding, at most half a scale, so everything here is about keeping scales small:

    absmax      the largest magnitude becomes the largest integer; zero stays zero. For weights, which are about as
                often negative.
    zero point  smallest and largest value become the smallest and largest integer, and some integer in between means
                zero.
    groups      a scale not for the whole row but for every 128 or 32 neighbours: one outlier then spoils only its own
                group.

The scale is rounded to the dtype it is kept in before the integers are chosen, so that they make up for its error.

Shape letters besides those of model.py, here and in the other files of quantization:
    N  outputs of a matrix, its rows        K  its inputs (not head_dim)
"""
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from cli import run
from results import FIGURES


@dataclass(frozen=True)
class Format:
    """How a weight matrix is written in integers."""
    bits: int                # 8 or 4
    group: int = 0           # neighbours of a row that share a scale; 0: all of it
    symmetric: bool = True   # absmax; False: zero point

    @property
    def largest(self):
        """The largest integer. Symmetric formats leave -128 or -8 unused, so that w and -w round alike."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2 ** self.bits - 1

    @property
    def smallest(self):
        return -self.largest if self.symmetric else 0


def grouped(weight, group):
    """(N, K) -> (N, K / group, group)."""
    return weight.unflatten(-1, (-1, group or weight.shape[-1]))


def choose_scale(weight, format, dtype=torch.float32):
    """weight (N, K), float -> scale (N, K / group) of dtype, and zero (N, K / group) uint8, the integer that means 0.0,
    or None.
    """
    groups = grouped(weight.float(), format.group)
    if format.symmetric:
        spread, zero = groups.abs().amax(-1), None
    else:
        # Zero is within: padding and pruned weights stay exact.
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        spread = high - low
    scale = (spread / format.largest).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))   # a group of zeros
    if not format.symmetric:
        zero = (-low / scale.float()).round().clamp(0, format.largest).to(torch.uint8)
    return scale, zero


def to_integers(weight, scale, zero, format):
    """weight (N, K) -> the nearest integers (N, K), int8, without zero point; uint8 with one."""
    integers = (grouped(weight.float(), format.group) / scale.float()[..., None]).round_()
    if zero is not None:
        integers += zero[..., None]
    return integers.clamp_(format.smallest, format.largest).flatten(-2).to(torch.int8 if zero is None else torch.uint8)


def from_integers(integers, scale, zero=None):
    """The weight (N, K) that integers (N, K), scale and zero (N, K / group) stand for, in scale's dtype."""
    values = integers.unflatten(-1, (scale.shape[-1], -1)).to(torch.float32)
    if zero is not None:
        values -= zero[..., None].float()
    return (values * scale[..., None].float()).flatten(-2).to(scale.dtype)


def rounded(weight, format):
    """The weight that is left of (N, K) when it has been through the integers of a format. Same dtype."""
    scale, zero = choose_scale(weight, format, weight.dtype)
    return from_integers(to_integers(weight, scale, zero, format), scale, zero)


def pack4(integers):
    """Two integers of 4 bits in a byte: (N, K) -> (N, K / 2) uint8. Byte j holds number 2j in its low half and 2j + 1
    in its high.

    Those without zero point, -7 to 7, are stored as 1 to 15: 8 means zero, so reading need not care about signs.
    """
    unsigned = integers if integers.dtype == torch.uint8 else (integers + 8).to(torch.uint8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def unpack4(packed):
    """(N, K / 2) -> (N, K) uint8, 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------------------ the picture

TEAL, ORANGE, RED, GRAY = "#1f6f8b", "#d9822b", "#b23a48", "#888888"


def draw_grid(axes, values, format, title):
    """Values on a line, and what each becomes on the line below."""
    after = rounded(values[None], format)[0]
    scale, zero = choose_scale(values[None], format)
    first = 0 if zero is None else zero[0, 0].item()
    grid = (torch.arange(format.smallest, format.largest + 1) - first) * scale[0, 0]
    axes.vlines(grid, -0.12, 0.12, color=GRAY, linewidth=1)
    for before, now in zip(values.tolist(), after.tolist()):
        axes.plot([before, now], [1, 0], color=GRAY, linewidth=0.6)
    axes.plot(values, torch.ones(len(values)), "o", color=TEAL, markersize=4)
    axes.plot(after, torch.zeros(len(values)), "o", color=ORANGE, markersize=4)
    error = (after - values).square().mean().sqrt().item()
    axes.set(title=f"{title}: {len(grid)} integers, error {error:.3f}", yticks=[0, 1], ylim=(-0.4, 1.4))
    axes.set_yticklabels(["integers", "weights"])


def draw_errors(axes, row, formats):
    """|error| of each weight of a row, under several formats."""
    for (name, format), color in zip(formats.items(), (RED, TEAL)):
        errors = (rounded(row[None], format)[0] - row).abs()
        axes.plot(errors, ".", color=color, markersize=3)
        axes.annotate(f"{name}: mean {errors.mean():.3f}", (0.02, 0.93 if color == RED else 0.85),
                      xycoords="axes fraction", color=color, fontsize=9)
    axes.set(title="groups: one large weight (number 40) and its neighbours", xlabel="number of the weight in its row",
             ylabel="rounding error",
             ylim=(0, 0.85))


def draw_outliers(axes, x):
    """Largest |x| of each input over some tokens, and the half step of one scale for all of them."""
    largest = x.abs().amax(0)
    axes.bar(range(len(largest)), largest, color=[RED if value > 6 * x.square().mean().sqrt() else TEAL
                                                  for value in largest], width=1)
    half = (x.abs().amax(1) / 127 / 2).mean().item()
    axes.set(title="outliers: inputs of a layer", xlabel="number of the input", ylabel="largest |x|")
    without = x[:, largest < 6 * x.square().mean().sqrt()]
    finer = (without.abs().amax(1) / 127 / 2).mean().item()
    axes.annotate(f"8 bits for all of a token:\nerror up to {half:.3f};\nwithout the red ones\nup to {finer:.3f}",
                  (53, 0.75 * largest.max()), ha="center",
                  fontsize=9)


def main():
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(24, generator=rng)
    row = torch.randn(256, generator=rng)
    row[40] = 9
    x = torch.randn(64, 128, generator=rng)
    x[:, [17, 90]] *= 15
    figure = Figure(figsize=(10, 6.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, 2)
    draw_grid(axes[0, 0], weights, Format(4), "absmax")
    draw_grid(axes[0, 1], weights.abs() + 0.2, Format(4, symmetric=False), "zero point")
    draw_errors(axes[1, 0], row, {"one scale for the row": Format(4), "one for each 32": Format(4, 32)})
    draw_outliers(axes[1, 1], x)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "integers.png")
    print(f"{FIGURES / 'integers.png'}\n\n{'bits a weight':<44}{'bits':>6}   root mean square error of 4,096 normal"
          " numbers")
    values = torch.randn(16, 256, generator=rng)
    for name, format in {"8, one scale for the row": Format(8), "4, one scale for the row": Format(4),
                         "4, groups of 128": Format(4, 128),
                         "4, groups of 32": Format(4, 32), "4, groups of 32, zero point": Format(4, 32, False)}.items():
        # A scale of 16 bits, a zero point of 8.
        bits = format.bits + (16 + (0 if format.symmetric else 8)) / (format.group or 256)
        print(f"{name:<44}{bits:>6.2f}   {(rounded(values, format) - values).square().mean().sqrt():.4f}")


if __name__ == "__main__":
    run(main)
