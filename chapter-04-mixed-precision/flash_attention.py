"""Attention without its matrix of scores: the online softmax in blocks, forward and backward ("flash attention").

A document of L tokens has L * L scores in each head. Written as a formula, attention makes them all and keeps their
softmax for the way back: 4 GiB for one head of 32,768 tokens in float32, whose queries, 128 wide, take 16 MiB. But
nobody asked for the scores. What is wanted is one average of values for each query, and that can be taken piece by
piece.

    python flash_attention.py        (in this folder; about a minute)

Forward (Milakov & Gimelshein 2018; Rabe & Staats 2021). Of a query's scores s_j keep three things, over the keys so
far:

    m = max_j s_j        z = sum_j exp(s_j - m)        o = sum_j exp(s_j - m) v_j

When a block of keys brings a larger maximum n, all that was summed is relative to the wrong one, and one factor puts it
right: exp(s - n) = exp(s - m) exp(m - n). After the last block the output is o / z; and m + ln z, the logarithm of the
sum of exp(s_j), is all that has to be remembered of a row of L scores.

Backward (Dao et al. 2022). With that number a block of weights is made anew, already normalized: P = exp(S - (m + ln
z)).

    dv = P^T do      dP = do v^T      dS = P * (dP - delta)      dq = dS k / sqrt(K)      dk = dS^T q / sqrt(K)

delta is the trick. The softmax's gradient subtracts from a row of dP its average under the weights, sum_j P_j dP_j,
which runs over all blocks at once. But dP_j = do . v_j, so the sum is do . (sum_j P_j v_j) = do . out, known before any
block is.

The price is one product more, the scores a second time: seven in place of six. As Python the algorithm saves bytes. A
fused kernel also keeps each block in the processor's fastest memory, and so saves most of the time (Dao et al. 2022).
At work: F.scaled_dot_product_attention(q, k, v, is_causal=True), or varlen_attn for packed documents on a GPU.

Writes results/flash_attention.json and figures/flash_attention.png.

Shape letters: H heads, L tokens, K width of a head, R queries (rows) and C keys (columns) in a block of scores.
"""
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile

from cli import run
from device import device_name
from results import FIGURES, write_results

BLOCK = 64   # R and C; a kernel takes what fits into the processor's fastest memory
CHECKED = ((1, 64, 64), (100, 64, 64), (193, 32, 80), (300, 128, 48))   # L, R, C: no length is a multiple of its blocks
H, K = 2, 64                                                            # of what is measured
LENGTHS = (256, 512, 1024, 2048, 4096)
TEAL, ORANGE, GREY, RED = "#1f6f8b", "#d9822b", "#888888", "#b23a48"


# ----------------------------------------------------------------------------------------------- in blocks

def visible_blocks(L, query_block, key_block):
    """For each block of queries its slice, and the slices of the keys that it may see something of.

    A block of keys that begins after the last of these queries is all future, for all of them: it is never computed.
    """
    for start in range(0, L, query_block):
        queries = slice(start, min(start + query_block, L))
        yield queries, [slice(i, min(i + key_block, L)) for i in range(0, queries.stop, key_block)]


def block_scores(q, k, queries, keys):
    """The block of q k^T / sqrt(K) that belongs to two slices, (H, R, C); -inf where the key comes after the query."""
    scores = q[:, queries] @ k[:, keys].mT / math.sqrt(q.shape[-1])                     # (H, R, C)
    if keys.stop - 1 > queries.start:   # it meets the diagonal; all blocks before it are past through and through
        places = torch.arange(q.shape[1], device=q.device)
        scores = scores.masked_fill(places[keys] > places[queries, None], -math.inf)
    return scores


def add_block(state, scores, values):
    """Take a block of keys into the running average: scores (H, R, C), values (H, C, K).

    state, before and after: the largest score so far (H, R, 1), the sum of exp(score - largest) (H, R, 1), and the
    values weighted with the same exp(score - largest) (H, R, K). Chapter 1's softmax.py does this with one score at a
    time.
    """
    largest, total, weighted = state
    new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))                 # (H, R, 1)
    rescale = (largest - new_largest).exp()   # 1 unless the maximum rose; exp(-inf) = 0 the first time
    # Of a row that sees nothing of this block all weights are exp(-inf) = 0. Its largest score is a number all the
    # same, because the first block has key 0, which every query sees. In another order it could be -inf - (-inf) = nan.
    weights = (scores - new_largest).exp()                                              # (H, R, C)
    return new_largest, total * rescale + weights.sum(-1, keepdim=True), weighted * rescale + weights @ values


NOTHING = torch.tensor(-math.inf), 0, 0   # the state before the first block


class FlashAttention(torch.autograd.Function):
    """Causal attention that keeps q, k, v, the output and one number a row. A kernel for bfloat16 sums in float32."""

    @staticmethod
    def forward(ctx, q, k, v, query_block, key_block):
        out, log_sums = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)               # (H, L, K), (H, L, 1)
        for queries, key_blocks in visible_blocks(q.shape[1], query_block, key_block):
            state = NOTHING
            for keys in key_blocks:
                state = add_block(state, block_scores(q, k, queries, keys), v[:, keys])
            largest, total, weighted = state
            out[:, queries] = weighted / total
            log_sums[:, queries] = largest + total.log()
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.blocks = query_block, key_block
        return out

    @staticmethod
    # log_sums has no gradient here, so a second derivative would be wrong. This makes it an error.
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, log_sums = ctx.saved_tensors
        delta = (dout * out).sum(-1, keepdim=True)                                      # (H, L, 1)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        for queries, key_blocks in visible_blocks(q.shape[1], *ctx.blocks):
            for keys in key_blocks:
                weights = (block_scores(q, k, queries, keys) - log_sums[:, queries]).exp()         # (H, R, C)
                dweights = dout[:, queries] @ v[:, keys].mT                                        # (H, R, C)
                dscores = weights * (dweights - delta[:, queries]) * scale                         # (H, R, C)
                dv[:, keys] += weights.mT @ dout[:, queries]
                dq[:, queries] += dscores @ k[:, keys]
                dk[:, keys] += dscores.mT @ q[:, queries]
        return dq, dk, dv, None, None


def flash_attention(q, k, v, query_block=BLOCK, key_block=BLOCK):
    """softmax(q k^T / sqrt(K)) v, every token looking at itself and those before it: q, k, v (H, L, K) -> (H, L, K)."""
    return FlashAttention.apply(q, k, v, query_block, key_block)


# ------------------------------------------------------------------------------- the formula, and the library's way

def plain_attention(q, k, v):
    """The same as the formula says it, with the whole matrix of scores."""
    L = q.shape[1]
    scores = q @ k.mT / math.sqrt(q.shape[-1])                                          # (H, L, L)
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)                # (L, L)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v                        # (H, L, K)


def library_attention(q, k, v):
    """torch's fused kernel.

    Without a dimension for the batch, a CPU would take the formula, and its memory, instead.
    """
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def forward_backward(attention, q, k, v, dout):
    """(out, dq, dk, dv), (H, L, K) each, when the gradient dout arrives at the output."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def show_equality():
    print("1. Largest differences from the formula and from F.scaled_dot_product_attention:\n")
    print(f"    {'L':>5}{'R x C':>10}   {'beside':<14}" + "".join(f"{name:>10}" for name in ("out", "dq", "dk", "dv")))
    for L, R, C in CHECKED:
        inputs = torch.randn(4, 3, L, 32)   # q, k, v, dout of three heads
        ours = forward_backward(lambda q, k, v: flash_attention(q, k, v, R, C), *inputs)
        for name, attention in (("the formula", plain_attention), ("the library", library_attention)):
            theirs = forward_backward(attention, *inputs)
            differences = [(a - b).abs().max().item() for a, b in zip(ours, theirs)]
            print(f"    {L:>5}{f'{R} x {C}':>10}   {name:<14}" + "".join(f"{d:>10.1e}" for d in differences))
            assert max(differences) < 1e-5, f"L = {L}, blocks of {R} x {C}: not {name}'s result, {differences}"


# --------------------------------------------------------------------------------------------------- one row

def running_row(scores, values, block):
    """The state after each block of one query's scores (L,), values (L,): (largest, rescale, total, weighted) numbers.
    """
    state = NOTHING
    for s, v in zip(scores.split(block), values.split(block)):
        before, state = state, add_block(state, s[None], v[:, None])
        largest, total, weighted = (x.item() for x in state)
        yield largest, math.exp(before[0].item() - largest), total, weighted


def show_row():
    scores, values = torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    print("\n2. One query, four keys in two blocks. The second brings a larger maximum, so what the first had summed"
          "\n   relative to its own is multiplied by exp(3 - 5):\n")
    print(f"    {'scores':<10}{'values':<10}{'m':>8}{'rescale':>10}{'z':>10}{'o':>10}{'o / z':>10}")
    for i, (m, rescale, z, o) in enumerate(running_row(scores, values, 2)):
        s, v = (" ".join(f"{x:g}" for x in row.split(2)[i]) for row in (scores, values))
        print(f"    {s:<10}{v:<10}{m:>8.1f}{rescale:>10.4f}{z:>10.4f}{o:>10.4f}{o / z:>10.4f}")
    average = (scores.softmax(0) @ values).item()
    print(f"    {'all four at once: softmax(scores) @ values':<58}{average:>10.4f}")
    assert math.isclose(o / z, average, rel_tol=1e-6), f"in blocks {o / z}, at once {average}"


# ------------------------------------------------------------------------------------------------------- memory

def plain_bytes(H, L, K):
    """The formula's peak in float32, on paper. It comes in the softmax's gradient.

    Then there are three matrices (H, L, L), the weights, their gradient and that of the scores; the mask, a byte for
    each pair; and six tensors (H, L, K): q, k, v, out, dout and dv.
    """
    return 4 * (3 * H * L * L + 6 * H * L * K) + L * L


def blocks_bytes(H, L, K, R, C):
    """The peak of flash_attention in float32, on paper. It comes in the backward pass, in every block.

    Eight tensors (H, L, K): q, k, v, out and the gradient of each; two numbers a row, log_sums and delta; and five
    blocks of scores, because Python holds the last block's weights until this one's take their name.
    """
    return 4 * (8 * H * L * K + 2 * H * L + 5 * H * R * C)


def peak_bytes(attention, H, L, K):
    """The most bytes that torch held at any moment of a forward and backward pass, inputs and gradients included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(attention, *torch.randn(4, H, L, K))
    with tempfile.TemporaryDirectory() as folder:   # only the trace has the running sum
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    sums = [event["args"] for event in events if event.get("name") == "[memory]"]
    # What an earlier profile saw begin and not end is still in the sum.
    before = sums[0]["Total Allocated"] - sums[0]["Bytes"]
    return max(now["Total Allocated"] for now in sums) - before


def measure():
    """One row for each length, in MiB."""
    print(f"\n3. The most that torch holds during forward and backward, MiB (H = {H}, K = {K}, float32):\n")
    print(f"    {'L':>5}{'the formula':>13}{'predicted':>11}{'in blocks':>12}{'predicted':>11}{'the library':>13}"
          f"{'formula / blocks':>18}")
    rows = []
    for L in LENGTHS:
        sizes = (peak_bytes(plain_attention, H, L, K), plain_bytes(H, L, K), peak_bytes(flash_attention, H, L, K),
                 blocks_bytes(H, L, K, min(BLOCK, L), min(BLOCK, L)), peak_bytes(library_attention, H, L, K))
        plain, predicted, blocks, blocks_predicted, library = (size / 2 ** 20 for size in sizes)
        rows.append({"length": L, "plain_mib": plain, "plain_predicted_mib": predicted, "blocks_mib": blocks,
                     "blocks_predicted_mib": blocks_predicted, "library_mib": library})
        print(f"    {L:>5}{plain:>13.2f}{predicted:>11.2f}{blocks:>12.2f}{blocks_predicted:>11.2f}{library:>13.2f}"
              f"{plain / blocks:>17.1f}x")
    return rows


# ------------------------------------------------------------------------------------------------------- drawing

def draw_blocks(ax, number=6, size=8, outlined=3):
    """Which blocks are computed, and the running statistics of the last query of the orange row."""
    for y, (_, seen) in enumerate(visible_blocks(number * size, size, size)):
        for x in range(number):
            if x < len(seen):
                ax.add_patch(Rectangle((x, y), 0.96, 0.96, color=ORANGE if y == outlined else TEAL,
                                       alpha=0.45, linewidth=0))
            elif y != outlined:
                ax.add_patch(Rectangle((x, y), 0.96, 0.96, fill=False, edgecolor=GREY, linestyle=":"))
        # Masked inside its block.
        ax.add_patch(Polygon([(y, y), (y + 1, y), (y + 1, y + 1)], color="white", linewidth=0))
    scores, values = torch.randn(2, (outlined + 1) * size, generator=torch.Generator().manual_seed(18))
    for x, (largest, _, total, _) in enumerate(running_row(2 * scores, values, size)):
        ax.text(x + 0.47, outlined + 0.5, f"m {largest:.1f}\nz {total:.1f}", fontsize=12, ha="center", va="center")
    ax.text(outlined + 1.1, outlined + 0.48, "out = o / z\nkept: m + ln z", fontsize=12, color=ORANGE, va="center")
    ax.text(4.48, 1.48, "all future:\nnever made", fontsize=13, color=GREY, ha="center", va="center",
            backgroundcolor="white")
    ax.set_title("Blocks of scores: made, used, forgotten", fontsize=14, loc="left")
    ax.set_xlabel("keys; m, z and o go on from block to block", fontsize=12)
    ax.set_ylabel("queries", fontsize=12)
    ax.set(xlim=(0, number), ylim=(number, 0), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


def draw_memory(ax, rows):
    """Points are measured, lines predicted; a slope on logarithmic axes is an exponent."""
    L, *columns = zip(*(row.values() for row in rows))
    plain, plain_predicted, blocks, blocks_predicted, library = columns
    for sizes, predicted, colour in (
            (plain, plain_predicted, RED), (blocks, blocks_predicted, TEAL), (library, None, ORANGE)):
        ax.loglog(L, sizes, "o", color=colour)
        if predicted:
            ax.loglog(L, predicted, color=colour)
    ax.text(L[-2], plain[-2] * 0.6, "  the formula", color=RED, fontsize=13)
    ax.text(L[-2], library[-2] * 1.4, "the library", color=ORANGE, fontsize=13, ha="right")
    ax.text(L[-2], blocks[-2] * 0.6, "  in blocks", color=TEAL, fontsize=13)
    for start, slope in ((plain[0] * 2.5, 2), (blocks[0] * 0.25, 1)):
        end = start * (L[-1] / L[0]) ** slope
        ax.loglog([L[0], L[-1]], [start, end], ":", color=GREY)
        ax.text(L[-1], end, f" slope {slope}", color=GREY, fontsize=12, va="center")
    ax.set_xticks(L, [f"{length:,}" for length in L])
    ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    ax.minorticks_off()
    ax.set_title("The most MiB that torch holds", fontsize=14, loc="left")
    ax.set_xlabel("L, tokens; points: measured, lines: predicted", fontsize=12)
    ax.spines[["top", "right"]].set_visible(False)


def draw(path, rows):
    fig = Figure(figsize=(10, 4.7), dpi=120, layout="constrained")
    blocks, memory = fig.subplots(1, 2)
    draw_blocks(blocks)
    draw_memory(memory, rows)
    FIGURES.mkdir(exist_ok=True)
    fig.savefig(path)


def main():
    torch.manual_seed(0)
    print(f"on {device_name()}, torch {torch.__version__}\n")
    show_equality()
    show_row()
    rows = measure()
    columns = {"length": "tokens", "plain_mib": "the formula, MiB", "plain_predicted_mib": "predicted",
               "blocks_mib": "in blocks, MiB", "blocks_predicted_mib": "predicted", "library_mib": "the library, MiB"}
    print()
    command = f"python {Path(__file__).resolve().parent.name}/flash_attention.py"
    print(write_results("flash_attention", command, columns, rows))
    draw(FIGURES / "flash_attention.png", rows)
    print("At work: F.scaled_dot_product_attention(q, k, v, is_causal=True), or varlen_attn for packed documents"
          " on a GPU."
          "\nThe blocks and the bytes as a picture: figures/flash_attention.png")


if __name__ == "__main__":
    run(main)
