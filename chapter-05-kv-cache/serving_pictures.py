"""Two pictures of the engine at work: who owns which block of the cache, and who has which place in the batch.

    python serving_pictures.py        (in this folder; a few seconds)

Twelve requests of very different lengths come to the real engine, one after the other. The model's weights are random:
who gets a block or a place does not depend on what is answered.

figures/block_map.png: the blocks of the paged cache over time, in the colours of their owners. After a while those of a
text lie anywhere, which does no harm: its table finds them. Below, the share of the slots given away that hold no
token: in a contiguous cache, whose rows are all as long as the longest request, and in blocks, where only the last of a
sequence has something empty. The cache is too small on purpose: once the youngest sequence is preempted.

figures/timeline.png: the same requests with static batching, in words: take the next S that have come, compute all
their prompts in one step, then a token for each in every step until the longest answer ends; only then the next S. With
continuous batching the place of an answer that has ended goes to the next request. G is there twice: it was preempted.

Time is counted in steps, the same on every machine, and something is ignored: a step with a hundred tokens of a prompt
takes longer than one with a token for each sequence, and attention to a long text longer than to a short one. The
engine computes at most MAX_TOKENS in a step; static batching is allowed all its prompts in one.
"""
from collections import namedtuple
from itertools import groupby

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from cli import run
from engine import Engine
from model import CONFIGS, Transformer
from results import FIGURES
from scheduler import Scheduler

NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS, S = 22, 8, 32, 4   # S: sequences that run at a time
# When it comes (step), tokens of its prompt and of its answer, and how many of the prompt others begin with too.
Request = namedtuple("Request", "name arrival prompt answer prefix")
REQUESTS = [Request(name, *numbers) for name, numbers in zip("ABCDEFGHIJKL", (
    (0, 24, 38, 16), (0, 10, 6, 0), (0, 27, 12, 16), (0, 7, 20, 0), (2, 22, 5, 16), (4, 76, 9, 0),
    (6, 12, 30, 0), (9, 30, 7, 16), (14, 5, 24, 0), (18, 19, 8, 16), (22, 9, 16, 0), (26, 33, 10, 16)))]
TEAL, ORANGE, GREY, RED = "#1f6f8b", "#d9822b", "#888888", "#b23a48"
COLOUR = dict(zip("ABCDEFGHIJKL-", (TEAL, ORANGE, "#7a5195", "#6a994e", "#b5838d", "#3d5a98", "#c9a227", "#2a9d8f",
                                    "#a0522d", "#8d99ae", "#c65f8a", "#4a4e69", "#e4e4e4")))   # "-": free, remembered
ENDED = {"facecolor": "white", "edgecolor": "#b0b0b0", "hatch": "///", "linewidth": 0}
STYLE = {"figure.dpi": 120, "figure.constrained_layout.use": True, "font.size": 12, "axes.titlesize": 14,
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


# --------------------------------------------------------------------------------------------- watching and counting

# One step: {name: Running} of all that have blocks, and the free blocks whose content can still be found.
Moment = namedtuple("Moment", "running remembered")
# Its blocks, its tokens in the cache when the step is done, and whether it is still at its prompt (or once more).
Running = namedtuple("Running", "table held prefilling")


class Watched(Scheduler):
    """The chapter's scheduler, with a record of every step. names: {sequence: name of its request}."""

    def schedule(self):
        chosen = super().schedule()
        counts = dict(chosen)
        running = {self.names[one]: Running(list(one.table), one.computed + counts.get(one, 0), one.pending > 1)
                   for one in self.running}
        self.moments.append(Moment(running, {block for block in self.pool.free if self.pool.hashes[block] is not None}))
        return chosen


def watch(requests):
    """Let the engine answer them. Returns a Moment for each step."""
    torch.manual_seed(0)
    config = CONFIGS["small"]
    engine = Engine(Transformer(config), config, NUM_BLOCKS, BLOCK_SIZE)   # of a tokenizer it needs the vocab_size only
    engine.scheduler = scheduler = Watched(NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS, S)
    scheduler.moments, scheduler.names, coming = [], {}, list(requests)
    prefix, *own = torch.randint(config.vocab_size, (1 + len(requests), 100)).tolist()
    while coming or engine.busy():
        while coming and coming[0].arrival <= len(scheduler.moments):
            request = coming.pop(0)
            prompt = prefix[:request.prefix] + own.pop()[request.prefix:request.prompt]
            scheduler.names[engine.add(prompt, request.answer, end_tokens=())] = request.name   # none ends early
        engine.step() if engine.busy() else scheduler.schedule()   # nobody there: a step goes by
    return scheduler.moments


def empty_slots(running, block_size):
    """(slots without a token, all slots) of the blocks that somebody owns."""
    filled = {}   # a block that several own is one block all the same
    for table, held, _ in running.values():
        for i, block in enumerate(table):
            filled[block] = max(filled.get(block, 0), min(block_size, held - i * block_size))
    return len(filled) * block_size - sum(filled.values()), len(filled) * block_size


def continuous_places(moments):
    """{(place, step): (name, "prefill" or "decode")}. Who begins to run gets the first place that is empty."""
    cells, taken = {}, {}
    for step, (running, _) in enumerate(moments):
        taken = {name: place for name, place in taken.items() if name in running}
        taken |= zip(sorted(running.keys() - taken.keys()), sorted(set(range(S)) - set(taken.values())))
        for name, place in taken.items():
            cells[place, step] = name, "prefill" if running[name].prefilling else "decode"
    return cells


def static_places(requests):
    """The same with static batching; "ended" where a place waits for the longest answer of its batch."""
    cells, now, coming = {}, 0, list(requests)
    while coming:
        batch = [request for request in coming[:S] if request.arrival <= now]
        steps = max((request.answer for request in batch), default=1)
        cells |= {(place, now + i): (request.name, "prefill" if i == 0 else "decode" if i < request.answer else "ended")
                  for place, request in enumerate(batch) for i in range(steps)}
        now, coming = now + steps, coming[len(batch):]
    return cells


# ------------------------------------------------------------------------------------------------------------ drawing

def runs(cells):
    """(start, length, cell) of each stretch of equal cells, empty ones left out."""
    for cell, group in groupby(range(len(cells)), key=cells.__getitem__):
        steps = list(group)
        if cell:
            yield steps[0], len(steps), cell


def draw_blocks(ax, moments):
    for block in range(NUM_BLOCKS):
        owners = ["".join(name for name, one in running.items() if block in one.table) or "-" * (block in remembered)
                  for running, remembered in moments]
        for start, length, names in runs(owners):
            ax.add_patch(Rectangle((start, block), length, 1, facecolor=COLOUR[names[0]], edgecolor="white",
                                   linewidth=names != "-", hatch="//" if len(names) > 1 else None))
            if length > 1 and len(names) == 1:
                ax.text(start + 0.9, block + 0.5, names.strip("-"), color="w", weight="bold", ha="center", va="center")
    for step in range(1, len(moments)):
        for name, (lost, _, _) in moments[step - 1].running.items():
            back = next((later for later in range(step, len(moments)) if name in moments[later].running), step)
            if back > step:   # no more there, and there again later
                ax.vlines([step] * len(lost), lost, [block + 1 for block in lost], color=RED, linewidth=6)
                ax.vlines(step, -0.3, max(lost), color=RED, linewidth=1.5, linestyle="--")
                ax.text(step, -0.5, f"no block free: {name}, the youngest, gives up its {len(lost)} until step {back}",
                        color=RED)
    ax.legend(loc="lower left", handles=[Patch(facecolor=TEAL, edgecolor="white", hatch="//", label="several owners"),
                                         Patch(facecolor=COLOUR["-"], label="free, remembered"),
                                         Patch(facecolor="white", edgecolor=GREY, label="free")])
    ax.set(xlim=(0, len(moments)), ylim=(NUM_BLOCKS, 0), yticks=range(0, NUM_BLOCKS, 5), ylabel="number of the block",
           title=f"Who owns which block ({NUM_BLOCKS} blocks of {BLOCK_SIZE} tokens, requests A to L)\n")


def draw_empty(ax, label, counts, colour):
    """counts: (empty, all slots) of each step. Draws their shares; prints the mean over all slots of all steps."""
    shares, (empty, slots) = [empty / max(slots, 1) for empty, slots in counts], map(sum, zip(*counts))
    print(f"{label:<22}{empty / slots:.1%} of {slots:,} slots given away held no token")
    ax.stairs(shares, color=colour, linewidth=2, baseline=None)
    ax.text(len(shares) / 2, max(shares) + 0.03, f"{label}: {empty / slots:.0%} on average", color=colour)


def draw_places(ax, label, cells):
    steps, answers = 1 + max(step for _, step in cells), sum(request.answer for request in REQUESTS)
    print(f"{label:<22}{steps} steps; {answers / S / steps:.1%} of {S} x {steps} places gave a token")
    for place in range(S):
        for start, length, (name, kind) in runs([cells.get((place, step)) for step in range(steps)]):
            style = {"facecolor": COLOUR[name], "edgecolor": "white", "alpha": 0.45 if kind == "decode" else 1}
            ax.add_patch(Rectangle((start, place + 0.06), length, 0.88, **(ENDED if kind == "ended" else style)))
            if kind == "decode":
                ax.text(start + length / 2, place + 0.5, name, weight="bold", ha="center", va="center_baseline")
    ax.set(xlim=(0, steps), ylim=(S, 0), yticks=[], ylabel=f"{S} places",   # x is shared: the last, longest one decides
           title=f"{label}: {steps} steps; {answers / S / steps:.0%} of {S} x {steps} places gave a token")


@rc_context(STYLE)
def main():
    moments, longest = watch(REQUESTS), max(request.prompt + request.answer for request in REQUESTS)
    FIGURES.mkdir(exist_ok=True)
    fig = Figure(figsize=(10, 8))
    blocks, empty = fig.subplots(2, 1, sharex=True, height_ratios=(2.8, 1))
    draw_blocks(blocks, moments)
    # A row of a contiguous cache: a block, shared with nobody, that would hold the longest request.
    rows = [{name: one._replace(table=[name]) for name, one in running.items()} for running, _ in moments]
    draw_empty(empty, f"Rows of {longest} tokens", [empty_slots(row, longest) for row in rows], ORANGE)
    draw_empty(empty, f"Blocks of {BLOCK_SIZE} tokens", [empty_slots(one.running, BLOCK_SIZE) for one in moments], TEAL)
    empty.set(title="Slots given away that hold no token", xlabel="steps of the engine", ylim=(-0.02, 1),
              yticks=[0, 0.5, 1], yticklabels=["0", "50%", "100%"])
    fig.savefig(FIGURES / "block_map.png")
    fig = Figure(figsize=(10, 5.8))
    continuous, static = fig.subplots(2, 1, sharex=True)
    draw_places(continuous, "Continuous batching", continuous_places(moments))
    draw_places(static, "Static batching", static_places(REQUESTS))
    continuous.legend(loc="right", handles=[Patch(facecolor="#555555", label="computes its prompt"),
                                            Patch(facecolor="#c0c0c0", label="a token a step"),
                                            Patch(label="ended, the place stays empty", **ENDED)])
    static.set_xlabel("steps")
    fig.savefig(FIGURES / "timeline.png")
    print("As pictures: figures/block_map.png and figures/timeline.png")


if __name__ == "__main__":
    run(main)
