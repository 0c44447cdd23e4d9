"""Padding drawn, and what takes its place: the same documents as padded rectangles and as packed rows.

A matrix is a rectangle, documents are not. Filled up to the longest of sixteen, most of a batch of whole documents is
nothing, and nothing costs as much to compute as text does. Laid end to end, documents need no filling; the price is
bookkeeping, cu_seqlens, and attention that respects it. This script counts and draws both, then takes a packed batch of
three short documents apart. Every number comes from real documents and the chapter's own code.

    python chapter-02-qwen3-packed/packing_demo.py

Shape letters: B documents in a padded batch, L tokens of its longest, T tokens in a packed batch, S documents in it.
"""
import itertools

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attention import packed_attention
from cli import run
from data import fetch, load_documents, pack, packed_sequence_collate_fn, shuffled, tokenize, training_packs
from model import CONFIGS, Transformer
from results import FIGURES
from tokenizer import Tokenizer

CONFIG = "small"
B = 16          # documents in a batch of chapter 1
BUDGET = 1024   # tokens in a batch, and the longest document that stays whole
SHORT = 64      # chapter 1 cuts documents so short. It hides some of the padding, and all that is further away
LINES = ["to be", "or not", "that is the question"]
TEAL, ORANGE, VIOLET, GREY, RED = "#1f6f8b", "#d9822b", "#7a5195", "#888888", "#b23a48"
PALE_TEAL = "#7fb3c4"


# ------------------------------------------------------------------------------------------------- counting

def padded_batches(lengths):
    return [lengths[i:i + B] for i in range(0, len(lengths), B)]


def filled_up(lengths):
    """What a padded batch computes: every document is as long as the longest of its B."""
    return [max(batch) for batch in padded_batches(lengths) for _ in batch]


def pairs(lengths):
    """Query and key meet this often: sum(len^2). As everywhere in this chapter, the full count; causal needs half."""
    return sum(length ** 2 for length in lengths)


def training_flops(model, lengths):
    """FLOPs of training on sequences of these lengths, the two terms of model.flops_per_token: linear and attention."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)   # a padded batch is B documents of L tokens
    config = model.config
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs(lengths)
    return model.flops_per_token(cu_seqlens) * sum(lengths) - attention, attention


def flops_per_useful_token(model, lengths, computed):
    """MFLOPs for each real token: useful linear, useful attention, linear on padding, attention on padding."""
    useful, all_of_it = training_flops(model, lengths), training_flops(model, computed)
    return [flops / sum(lengths) / 1e6 for flops in (*useful, *(a - u for a, u in zip(all_of_it, useful)))]


def show_epoch(model, short, whole, rows):
    """One epoch, five ways. short, whole: lengths of its windows of at most SHORT and BUDGET; rows: of packed rows."""
    ways = {f"padded, cut at {SHORT} (chapter 1)": filled_up(short),
            f"padded, cut at {BUDGET:,}": filled_up(whole),
            "padded after sorting by length": filled_up(sorted(whole)),
            "packed, one T x T mask": rows,
            "packed, each document alone": whole}
    print(f"\n    {'':<32}{'positions':>11}{'padding':>10}{'pairs':>15}{'MFLOPs per token':>19}")
    for name, computed in ways.items():
        flops = sum(training_flops(model, computed)) / sum(whole) / 1e6
        padding = 1 - sum(whole) / sum(computed)
        print(f"    {name:<32}{sum(computed):>11,}{padding:>10.1%}{pairs(computed):>15,}{flops:>19.2f}")
    print(f"\n    pairs: how often a query meets a key. MFLOPs: of training {CONFIG!r}, for each real token: 6 FLOPs"
          "\n    for each weight and position, 12 * layers * H * K * L for attention. Sorting saves nearly as much, but"
          "\n    then a step sees documents of one length only, and steps differ in their number of tokens.")


def show_budgets(documents, tokenizer):
    """What the packer leaves unused of an epoch's batches."""
    print("\n2. The packer takes whole documents. What it leaves empty of its budget is not computed, only not used:\n")
    print(f"    {'budget':>10}{'batches':>10}{'documents each':>17}{'left over':>12}")
    for budget in (512, 1024, 2048, 4096):
        windows, _ = tokenize(documents, tokenizer, min(budget, BUDGET))
        batches = -(-sum(len(ids) for ids, _ in windows) // budget)
        chosen = list(itertools.islice(training_packs(windows, budget, seed=0), batches))
        used = sum(len(ids) for batch in chosen for ids, _ in batch)
        print(f"    {budget:>10,}{batches:>10,}{sum(map(len, chosen)) / batches:>17.1f}"
              f"{1 - used / budget / batches:>12.3%}")


def who_sees_whom(batch):
    """(T, T), True where the query of the row sees the key of the column: asked of packed_attention itself.

    If all scores are equal, a token's weights are equal for all that it sees and 0 elsewhere. Values that are the rows
    of an identity matrix make these weights the output.
    """
    same = torch.zeros(len(batch.input_ids), 1, 8)                                    # (T, 1, K)
    weights = packed_attention(same, same, torch.eye(len(same))[:, None], batch.cu_seqlens, batch.max_seqlen)
    return weights[:, 0] > 0                                                          # (T, T)


def check_mask(batch, seen):
    """The same from the definition: a token sees a token of the same document that does not come later."""
    place = torch.arange(len(batch.input_ids))
    document = torch.searchsorted(batch.cu_seqlens, place, right=True)                # (T,), 1, 1, 2, 2, 2, ...
    expected = (document[:, None] == document) & (place[:, None] >= place)            # (T, T)
    different = (seen != expected).sum().item()
    print(f"    what packed_attention sees = same document and not later: {different} of {seen.numel()} pairs differ")
    assert different == 0, f"packed_attention\n{seen.int()}\nfrom cu_seqlens\n{expected.int()}"


def show_anatomy(tokenizer):
    batch = packed_sequence_collate_fn(tokenize(LINES, tokenizer, BUDGET)[0])
    print(f"\n3. A packed batch of S = {len(LINES)} documents: {', '.join(map(repr, LINES))}\n")
    for name in ("input_ids", "position_ids", "targets", "cu_seqlens"):
        print(f"    {name:<14}" + "".join(f"{i:>5}" for i in getattr(batch, name).tolist()))
    print(f"    {'max_seqlen':<14}{batch.max_seqlen:>5}\n")
    seen = who_sees_whom(batch)
    check_mask(batch, seen)
    return batch, seen


# -------------------------------------------------------------------------------------------------- drawing

def draw_padding_map(path, lengths, rows, parts):
    """lengths: documents of some padded batches; rows: lengths in each packed row; parts: {way: MFLOPs, 4 of them}."""
    fig = Figure(figsize=(10, 8.2), dpi=120, layout="constrained")
    fig.get_layout_engine().set(h_pad=0.15)
    ax, costs = fig.subplots(2, 1, height_ratios=[3, 1])
    left, gap = 0, 60
    for number, batch in enumerate(padded_batches(lengths), start=1):
        L = max(batch)
        ax.add_patch(Rectangle((left, 0), L, B, facecolor="#e4e4e0", edgecolor="#bdbdb8", hatch="////", linewidth=0))
        ax.barh(range(B), batch, left=left, height=0.8, align="edge", color=TEAL)
        label = f"batch {number}: ({B}, {L})\n{1 - sum(batch) / B / L:.0%} padding"
        ax.text(left, -0.5, label, fontsize=12, va="bottom")
        left += L + gap
    ax.text(0, -3.2, f"Padded: {len(lengths)} documents, one a line; grey is computed and thrown away", fontsize=14)

    top = B + 3.4
    title = f"Packed: the same {len(lengths)} documents at the same scale, rows of at most {BUDGET:,} tokens"
    ax.text(0, top - 0.6, title, fontsize=14)
    shades = itertools.cycle([TEAL, PALE_TEAL])
    for y, row in enumerate(rows):
        starts = [0, *itertools.accumulate(row)]
        colours = [next(shades) for _ in row]
        ax.barh([top + y] * len(row), row, left=starts[:-1], height=0.8, align="edge", color=colours)
        free = BUDGET - starts[-1]
        ax.add_patch(Rectangle((starts[-1], top + y), free, 0.8, fill=False, edgecolor=GREY, linestyle=":"))
        ax.text(BUDGET + 12, top + y + 0.4, f"{len(row)} documents, {free} free", fontsize=12, va="center")
    ax.set(xlim=(0, max(left - gap, BUDGET * 1.27)), ylim=(top + len(rows), -3.8))
    ax.axis("off")

    names = ["linear layers", "attention", "linear layers on padding", "attention on padding"]
    hatch = dict(edgecolor=GREY, hatch="////", linewidth=0)
    styles = [dict(facecolor=TEAL), dict(facecolor=PALE_TEAL), dict(facecolor="#e4e4e0", **hatch),
              dict(facecolor="#c4c4be", **hatch)]
    left = torch.zeros(len(parts))
    for name, style, widths in zip(names, styles, zip(*parts.values())):
        costs.barh(list(parts), widths, left=left, label=name, **style)
        left += torch.tensor(widths)
    for y, total in enumerate(left.tolist()):
        costs.text(total + left.max().item() / 100, y, f"{total:.1f}", fontsize=12, va="center")
    title = f"Training MFLOPs for each useful token, model {CONFIG!r}, the whole epoch"
    costs.set_title(title, fontsize=14, loc="left")
    costs.set(xlim=(0, left.max().item() * 1.06))
    costs.tick_params(labelsize=12)
    costs.invert_yaxis()
    costs.spines[["top", "right"]].set_visible(False)
    costs.legend(fontsize=12, loc="lower right", ncols=2, frameon=False)
    fig.savefig(path)


def readable(tokenizer, i):
    """A token as text, a leading blank made visible."""
    return "end" if i == tokenizer.end_of_text else tokenizer.decode([i]).replace(" ", "␣")


def draw_packed_batch(path, batch, seen, tokenizer):
    """Above, the batch as it is stored; below, in the same columns, who sees whom."""
    T, bounds = len(batch.input_ids), batch.cu_seqlens.tolist()
    fig = Figure(figsize=(10, 9.2), dpi=120, layout="constrained")
    ax = fig.subplots()
    ids, targets = batch.input_ids.tolist(), batch.targets.tolist()
    strips = {"text": [readable(tokenizer, i) for i in ids], "input_ids": ids,
              "position_ids": batch.position_ids.tolist(), "targets": targets,
              "targets, text": [readable(tokenizer, i) for i in targets]}
    top = len(strips) + 1.5   # of the mask
    ax.add_patch(Rectangle((0, top), T, T, facecolor="#ededea", linewidth=0))
    for (start, end), colour in zip(itertools.pairwise(bounds), (TEAL, ORANGE, VIOLET)):
        length = end - start
        ax.add_patch(Rectangle((start, 0), length, len(strips), color=colour, alpha=0.2, linewidth=0))
        ax.add_patch(Rectangle((start, top + start), length, length, facecolor="white", edgecolor=colour, linewidth=2))
        ax.text(end - 0.15, top + start + 0.5, f"{length}²", fontsize=13, color=colour, ha="right", va="center")
        for row, column in seen[start:end].nonzero().tolist():   # of all columns: a leak would show
            ax.add_patch(Rectangle((column + 0.05, top + start + row + 0.05), 0.9, 0.9, color=colour, linewidth=0))
        if length == batch.max_seqlen:
            ax.annotate("", (start, top - 0.45), (end, top - 0.45), arrowprops=dict(arrowstyle="<->", color=RED))
            ax.text((start + end) / 2, top - 0.6, f"max_seqlen {length}", fontsize=12, color=RED, ha="center")
    for bound in bounds:
        ax.plot([bound, bound], [-0.4, len(strips)], color=RED, linewidth=2)
        ax.text(bound, -0.5, bound, fontsize=13, color=RED, ha="center")
    ax.text(-0.2, -0.5, "cu_seqlens", fontsize=12, color=RED, ha="right")
    for y, (name, row) in enumerate(strips.items()):
        for x, entry in enumerate([name, *row]):
            ax.text(x - 0.5 if x else -0.2, y + 0.5, entry, fontsize=12, ha="center" if x else "right", va="center")
    for y, text in enumerate(strips["text"]):
        ax.text(-0.2, top + y + 0.5, text, fontsize=12, ha="right", va="center")
    ax.text(T - 0.15, top + bounds[-2] + 2.5, "comes later: masked", fontsize=12, color=VIOLET, ha="right", va="center")
    ax.text((bounds[-2] + T) / 2, top + bounds[-2] / 2, "another document:\nnever computed", fontsize=13, ha="center",
            va="center", color="#555555")
    lengths = batch.cu_seqlens.diff().tolist()
    squares = " + ".join(f"{length}²" for length in lengths)
    ax.text(0, top + T + 0.8, f"Row: who looks. Column: at whom. In the blocks {squares} = {pairs(lengths)} pairs,"
            f" not {T}² = {T * T}.", fontsize=13)
    ax.set(xlim=(-2.1, T + 0.2), ylim=(top + T + 1, -1.1))
    ax.axis("off")
    fig.savefig(path)


def main():
    source = fetch("tinyshakespeare")
    documents, _ = load_documents(source)
    tokenizer = Tokenizer.train(documents, CONFIGS[CONFIG].vocab_size)
    model = Transformer(CONFIGS[CONFIG])
    windows, cut = tokenize(documents, tokenizer, BUDGET)
    short_windows, _ = tokenize(documents, tokenizer, SHORT)
    order = shuffled(len(windows), seed=0, epoch=0)
    whole = [len(windows[i][0]) for i in order]
    short = [len(short_windows[i][0]) for i in shuffled(len(short_windows), seed=0, epoch=0)]
    rows = [[len(ids) for ids, _ in chosen] for chosen in pack(windows, BUDGET, order)]

    print(f"1. {source}, one epoch: {len(documents):,} documents, {sum(whole):,} tokens; {cut:,} documents of more than"
          f"\n   {BUDGET:,} tokens are cut. Batches of {B} documents, or of {BUDGET:,} tokens.")
    show_epoch(model, short, whole, list(map(sum, rows)))
    show_budgets(documents, tokenizer)
    batch, seen = show_anatomy(tokenizer)

    drawn = whole[:3 * B]   # the first three batches
    drawn_rows = [[len(ids) for ids, _ in chosen] for chosen in pack(windows, BUDGET, order[:len(drawn)])]
    draw_padding_map(FIGURES / "padding_map.png", drawn, drawn_rows, {
        f"padded,\n{SHORT} tokens": flops_per_useful_token(model, short, filled_up(short)),
        "padded,\nwhole": flops_per_useful_token(model, whole, filled_up(whole)),
        "packed,\nwhole": flops_per_useful_token(model, whole, whole)})
    draw_packed_batch(FIGURES / "packed_batch.png", batch, seen, tokenizer)
    print("\nFigures: figures/padding_map.png, figures/packed_batch.png")


if __name__ == "__main__":
    run(main)
