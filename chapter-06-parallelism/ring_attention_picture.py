"""Who computes which pairs of a query and a key in ring attention (parallel/context.py).

    python ring_attention_picture.py        draws figures/ring_attention.png   (in this folder; a few seconds)
"""
import itertools

import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cli import run
from model import CONFIGS
from parallel.context import balance, places, ring_bytes, ulysses_bytes
from results import FIGURES

CP = 4
PACKS = {"one long document": [96], "five, sorted by length": [8, 9, 14, 19, 46],
         "five in another order": [8, 9, 46, 14, 19]}
COLOURS = ("#1f6f8b", "#d9822b", "#7a5195", "#b23a48")


def draw(ax, lengths, how):
    """The causal matrix: each pair of a query and a key that it may look at, in the colour of the rank that computes
    it.
    """
    T, size = sum(lengths), sum(lengths) // (2 * CP)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    pairs = (document[:, None] == document[None]).tril()
    owner = torch.empty(T, dtype=torch.long)
    for rank in range(CP):
        owner[places(T, CP, rank, how)] = rank
    colours = torch.tensor([to_rgb(colour) for colour in COLOURS])[owner][:, None]      # (T, 1, 3), one for each row
    ax.imshow(torch.where(pairs[..., None], colours, torch.tensor(0.955)), extent=(0, T, T, 0), interpolation="nearest")
    starts = range(0, T, size)
    for start in starts[1:]:
        ax.axhline(start, color="white", linewidth=0.8)
        ax.axvline(start, color="white", linewidth=0.8)
    for row, column in itertools.product(starts, starts):
        block = pairs[row:row + size, column:column + size]
        y, x = block.nonzero().float().mean(0).nan_to_num().round().int().tolist()
        if block[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].sum() == 9:   # room for a number
            step = (owner[row] - owner[column]).item() % CP
            ax.text(column + x + 0.5, row + y + 0.7, step, color="white", ha="center", va="center", size=11)
    ranks = [owner[start].item() for start in starts]
    ax.set_xticks([start + size / 2 for start in starts], ranks)
    ax.set_yticks([start + size / 2 for start in starts], ranks)
    for label, rank in zip(ax.get_yticklabels(), ranks):
        label.set(color=COLOURS[rank], weight="bold")
    ax.tick_params(length=0)


def draw_shares(ax, lengths, how):
    """In the empty corner above the diagonal: what each rank has to compute."""
    for rank, share in enumerate(shares(lengths, how)):
        ax.barh(rank, share, color=COLOURS[rank])
        ax.text(share + 0.01, rank, f"{share:.0%}", va="center", size=10)
    ax.set_title("share of the pairs", fontsize=11)
    ax.set(xlim=(0, 0.8), ylim=(CP - 0.4, -0.6), xticks=[], facecolor="none")
    ax.set_yticks(range(CP), [f"rank {rank}" for rank in range(CP)])
    ax.tick_params(length=0, labelsize=10)
    ax.spines[:].set_visible(False)


def shares(lengths, how):
    pairs = balance(torch.tensor([0, *lengths]).cumsum(0), CP, how)
    return [number / sum(pairs) for number in pairs]


def picture():
    with rc_context({"font.size": 12, "axes.titlesize": 13, "axes.titlelocation": "left", "axes.edgecolor": "white"}):
        figure = Figure(figsize=(9, 9.9), dpi=120, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)
        axes = figure.subplots(2, 2)
        for row, (name, lengths) in zip(axes, PACKS.items()):
            for ax, how in zip(row, ("contiguous", "zigzag")):
                draw(ax, lengths, how)
                draw_shares(ax.inset_axes((0.66, 0.62, 0.34, 0.28)), lengths, how)
                ax.set_title(f"{name}: {how}")
        for ax in axes[:, 0]:
            ax.set_ylabel("query: the rank that has it, and computes its row")
        for ax in axes[1]:
            ax.set_xlabel("key: the rank that it comes from")
        figure.suptitle("Four ranks. In a block: the step of the ring in which its keys are there", fontsize=13)
        figure.savefig(FIGURES / "ring_attention.png")


def main():
    print(f"{CP} ranks: the share of each in the pairs of a query and a key; the busiest one's over that of all in"
          " balance")
    for name, how in itertools.product(PACKS, ("contiguous", "zigzag")):
        found = shares(PACKS[name], how)
        print(f"    {name:<25}{how:<12}" + "".join(f"{share:>7.1%}" for share in found) + f"{max(found) * CP:>9.2f}")
    config, T = CONFIGS["qwen3-0.6b"], 131072
    sizes = config.num_key_value_heads, config.head_dim
    print(f"\nqwen3-0.6b, a pack of {T:,} tokens in bfloat16: MB that each rank sends in a layer and its way back")
    for cp in (2, 4, 8):
        by_ring, by_ulysses = ring_bytes(T, cp, *sizes, 2), ulysses_bytes(T, cp, config.num_attention_heads, *sizes, 2)
        print(f"    {cp} ranks    ring {sum(by_ring) / 1e6:>8,.0f}    Ulysses {sum(by_ulysses) / 1e6:>8,.0f}")
    picture()
    print("\nfigures/ring_attention.png")


if __name__ == "__main__":
    run(main)
