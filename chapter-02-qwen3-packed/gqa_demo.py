"""Grouped-query attention: several query heads read the same keys and values.

While a model writes, it keeps the keys and values of all tokens so far. For long texts that is more than the weights,
and all of it is read again for every new token. So the query heads share: 16 of them, 8 heads of keys and values
(Ainslie et al. 2023). With a head of its own for each it is multi-head attention; with one for all, multi-query
(Shazeer 2019). Here is what that saves, and which head reads which, where most mistakes are made.

    python chapter-02-qwen3-packed/gqa_demo.py

Shape letters: T tokens, H query heads, G heads of keys and values, K width of a head.
"""
import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attention import packed_attention
from cli import run
from model import CONFIGS, Transformer
from results import FIGURES

CONFIG = CONFIGS["qwen3-0.6b"]
H, K = CONFIG.num_attention_heads, CONFIG.head_dim
CHOICES = {H: "multi-head", CONFIG.num_key_value_heads: "grouped, Qwen3", 1: "multi-query"}   # by G
TEXTS = (4096, CONFIG.max_position_embeddings)   # tokens
LENGTHS = (5, 1, 9, 3)   # documents of the packed batch
TEAL, ORANGE, RED = "#1f6f8b", "#d9822b", "#b23a48"
HEIGHT = (len(CHOICES) - 0.4, -0.55)   # of both halves of the figure, so that their lines meet


def difference(ours, theirs):
    return (ours - theirs).abs().max().item()


def ordinary_attention(q, k, v, cu_seqlens):
    """Attention with as many keys and values as queries, all (T, H, K), written out; document by document."""
    mixed = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        scores = torch.einsum("qhk,thk->hqt", q[start:end], k[start:end]) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)                     # (H, length, length)
        mixed.append(torch.einsum("hqt,thk->qhk", weights, v[start:end]))               # (length, H, K)
    return torch.cat(mixed)                                                             # (T, H, K)


def reads(groups):
    """Which key-value head each query head reads, asked of packed_attention itself: a list of H numbers.

    One token can only copy its value. If head g of the values is all zeros but for a one at place g, the place of the
    one in the output tells which it was.
    """
    q, k = torch.zeros(1, H, groups), torch.zeros(1, groups, groups)                    # T = 1
    copied = packed_attention(q, k, torch.eye(groups)[None], torch.tensor([0, 1], dtype=torch.int32), 1)   # (1, H, G)
    return copied[0].argmax(-1).tolist()


def bytes_per_token(groups, layers=1):
    """Keys and values of one token in bfloat16."""
    return 2 * groups * K * 2 * layers


def show_equality():
    print(f"1. {H} query heads on documents of {', '.join(map(str, LENGTHS))} tokens: packed_attention beside ordinary"
          "\n   attention with keys and values copied in two ways. Largest differences:\n")
    print(f"    {'G':>4}{'repeat_interleave: 0 0 1 1':>30}{'repeat: 0 1 0 1':>20}")
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    for groups in (16, 8, 4, 2, 1):
        q = torch.randn(sum(LENGTHS), H, K)                                             # (T, H, K)
        k, v = torch.randn(2, sum(LENGTHS), groups, K)                                  # (T, G, K) each
        ours = packed_attention(q, k, v, cu_seqlens, max(LENGTHS))                      # (T, H, K)
        neighbours, turns = (
            difference(ours, ordinary_attention(q, copy(k), copy(v), cu_seqlens))
            for copy in (lambda x: x.repeat_interleave(H // groups, dim=1), lambda x: x.repeat(1, H // groups, 1)))
        print(f"    {groups:>4}{neighbours:>30.1e}{turns:>20.1e}")
        assert neighbours < 1e-5, f"G = {groups}: query head h must read head h // (H / G); difference {neighbours}"
        assert (turns > 0.1) == (1 < groups < H), f"G = {groups}: the two ways to share differ by {turns}"
    print("    Neighbours share a head; they do not take turns. The wrong way has the right shape and trains as well,"
          "\n    but published weights make no sense in it. A test with G = H or G = 1 alone cannot see it.")


def show_memory():
    with torch.device("meta"):   # only to count
        weights = 2 * Transformer(CONFIG).num_parameters()
    print("\n2. Keys and values to keep of one text, qwen3-0.6b in bfloat16:\n")
    print(f"    {'':<16}{'G':>4}{'a token and layer':>20}" + "".join(f"{f'{length:,} tokens':>18}" for length in TEXTS))
    for groups, name in CHOICES.items():
        size = bytes_per_token(groups, CONFIG.num_hidden_layers) / 1e9
        print(f"    {name:<16}{groups:>4}{bytes_per_token(groups):>14,} bytes"
              + "".join(f"{length * size:>15.2f} GB" for length in TEXTS))
    print(f"    The weights take {weights / 1e9:.2f} GB. It matters most when the model writes (chapter 5): then all of"
          "\n    this is read again for every token.")
    return weights


def draw_heads(ax):
    """Query heads above, the keys and values below; a line from each query head to what it reads."""
    for y, (groups, name) in enumerate(CHOICES.items()):
        ax.text(0, y - 0.42, f"{name}: H = {H}, G = {groups}", fontsize=13, va="center")
        for head, group in enumerate(reads(groups)):
            colour = (TEAL, ORANGE)[group % 2]
            ax.plot([head + 0.5, (group + 0.5) * H / groups], [y - 0.1, y + 0.14], color=colour, linewidth=1.5)
            ax.add_patch(Rectangle((head + 0.1, y - 0.27), 0.8, 0.16, fill=False, edgecolor=colour, linewidth=1.5))
        for group in range(groups):
            corner = ((group + 0.5) * H / groups - 0.4, y + 0.13)
            ax.add_patch(Rectangle(corner, 0.8, 0.16, color=(TEAL, ORANGE)[group % 2]))
        ax.text(-0.2, y - 0.19, "query", fontsize=12, ha="right", va="center")
        ax.text(-0.2, y + 0.21, "key, value", fontsize=12, ha="right", va="center")
    ax.set(xlim=(-3, H), ylim=HEIGHT)
    ax.axis("off")


def draw_memory(ax, weights):
    longest = TEXTS[-1]
    for y, groups in enumerate(CHOICES):
        size = longest * bytes_per_token(groups, CONFIG.num_hidden_layers) / 1e9
        ax.barh(y, size, height=0.4, color=TEAL)
        ax.text(0.1, y - 0.42, f"{bytes_per_token(groups):,} bytes a token and layer", fontsize=12, va="center")
        ax.text(size + 0.1, y, f"{size:.1f}", fontsize=12, va="center")
    size, y = weights / 1e9, len(CHOICES) - 0.6
    ax.barh(y, size, height=0.2, color=RED)
    ax.text(size + 0.1, y, f"{size:.1f}: the model's weights", fontsize=12, va="center")
    ax.set(ylim=HEIGHT, yticks=[], xlim=(0, 11))
    ax.set_xlabel(f"GB to keep for a text of {longest:,} tokens", fontsize=12)
    ax.spines[["top", "right"]].set_visible(False)


def main():
    torch.manual_seed(0)
    show_equality()
    weights = show_memory()
    fig = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    heads, memory = fig.subplots(1, 2, width_ratios=[3, 2])
    draw_heads(heads)
    draw_memory(memory, weights)
    fig.savefig(FIGURES / "gqa.png")
    print("\nWho reads what, and the bytes, as a picture: figures/gqa.png")


if __name__ == "__main__":
    run(main)
