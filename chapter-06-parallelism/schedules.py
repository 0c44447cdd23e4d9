"""Pipeline schedules: what each stage does when, drawn; how much of the time is lost, on paper and on the clock.

    python schedules.py        (in this folder: about two minutes, in four processes that it starts itself)

A pipeline is full only in the middle of a step. What can be done about its two ends? More microbatches, which makes the
middle longer. Shorter stages, several on each rank, so that a rank's turn comes earlier (interleaved). Or a look at
what backward is: the gradient of the input, for which the stage before waits, and the gradient of the weights, for
which nobody does until the step ends, so that it can be done whenever there is nothing better to do (zero bubble, Qi et
al. 2023).

By hand, in parallel/pipeline.py, are GPipe and 1F1B. The others are the library's, torch.distributed.pipelining: their
order is read out of its own tables, played on paper (simulate), and run. The model's layers in its stages find the same
gradients as ours. On the clock, work is sleep: a forward of a fixed time in which nothing is computed, through the real
runner with real messages. So four stages can be timed on any machine, whatever its number of cores, and what is
measured is the schedule and not the model. It says nothing about the speed of a GPU.

p: ranks; m: microbatches; v: stages on each rank; actions: F forward, B backward, or its two parts, I (input) and W
(weights).
"""
import functools
import os
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from torch.distributed.pipelining import (PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B,
                                          ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)

from cli import run as run_script
from data import IGNORE, fill, packed_sequence_collate_fn
from model import ModelConfig, Transformer
from parallel.mesh import label, make_mesh
from parallel.pipeline import cut_stage, gpipe, keep_stage, one_f_one_b, run, run_stage
from results import FIGURES, write_results

P, M = 4, 8                                  # ranks and microbatches of the picture
TIMES = {"F": 1, "B": 2, "I": 1, "W": 1}     # backward has two matrix products where forward has one
UNIT = 0.05                                  # seconds, on the clock
BY_HAND = {"GPipe": gpipe, "1F1B": one_f_one_b}
LIBRARY = {"GPipe": (ScheduleGPipe, 1), "1F1B": (Schedule1F1B, 1), "interleaved 1F1B": (ScheduleInterleaved1F1B, 2),
           "zero bubble, ZB1P": (ScheduleInterleavedZeroBubble, 1),
           "zero bubble, ZBV": (ScheduleZBVZeroBubble, 2)}   # and v
# The share of all time that is lost, with TIMES. Each: what a rank waits / (what it works + what it waits)
FORMULA = {
    "GPipe": lambda p, m: (p - 1) / (m + p - 1),
    "1F1B": lambda p, m: (p - 1) / (m + p - 1),
    "interleaved 1F1B": lambda p, m: (p - 1) / (2 * m + p - 1),     # a turn takes 1 / v of the time; here v = 2
    "zero bubble, ZB1P": lambda p, m: (p - 1) / (3 * m + p - 1),    # waits F + I - W for each stage, not F + B
    "zero bubble, ZBV": lambda p, m: (p - 1) / (6 * m + p - 1),     # waits half an F, for the first forward
}


# ------------------------------------------------------------------------------------------------------------ on paper

def orders_by_hand(name, p, m):
    """What each rank does in which order: for each a list of (stage, action, microbatch)."""
    return [[(rank, action, i) for action, i in BY_HAND[name](rank, p, m)] for rank in range(p)]


def orders_of_library(name, p, m):
    """The same for what is not BY_HAND, from the tables of torch.distributed.pipelining."""
    schedule_class, v = LIBRARY[name]
    # Stages without layers and without ranks: of the stages a table needs only the numbers.
    stages = [SimpleNamespace(group_size=p, group_rank=0, num_stages=p * v, stage_index=i, submod=nn.Module())
              for i in range(v)]
    table = schedule_class(stages, m).pipeline_order
    return [[(action.stage_index, action.computation_type.value, action.microbatch_index)
             for action in table[rank] if action]
            for rank in range(p)]


def simulate(orders, times):
    """Play orders on paper. times: {action: its length}. Returns [(rank, stage, action, microbatch, start, end), ...].

    An action begins when its rank has done the one before it in the list and has what the action needs: the output of
    the stage before, or the gradient from the stage behind. Messages take no time. Raises ValueError if all ranks wait
    for each other.
    """
    last_stage = max(stage for order in orders for stage, *_ in order)
    done, events, now = {}, [], [0.0] * len(orders)
    waiting = [list(order) for order in orders]
    while any(waiting):
        before = len(done)
        for rank, order in enumerate(waiting):
            while order and (ready := ready_at(order[0], done, last_stage)) is not None:
                stage, action, i = order.pop(0)
                start = max(now[rank], ready)
                now[rank] = done[stage, action, i] = start + times[action]
                events.append((rank, stage, action, i, start, now[rank]))
        if len(done) == before:
            raise ValueError(f"all ranks wait: {[order[0] for order in waiting if order]}")
    return events


def ready_at(action, done, last_stage):
    """When what an action needs is there, or None while it is not. done: {action: when it ended}."""
    stage, kind, i = action
    needs = [(stage, "F", i)] if kind in "BI" else [(stage, "I", i)] if kind == "W" else []
    if kind == "F" and stage > 0:
        needs.append((stage - 1, "F", i))
    if kind in "BI" and stage < last_stage:
        needs.append((stage + 1, kind, i))
    return max((done[need] for need in needs), default=0.0) if all(need in done for need in needs) else None


def bubble(events):
    """The share of all ranks' time, from the first start to the last end, in which they do nothing."""
    starts, ends = [event[-2] for event in events], [event[-1] for event in events]
    ranks = len({event[0] for event in events})
    return 1 - (sum(ends) - sum(starts)) / ((max(ends) - min(starts)) * ranks)


def most_held(order, v):
    """The most microbatches whose activations a rank holds at a time, from F to B or W; a stage holds 1 / v of one."""
    held = peak = 0
    for _, action, _ in order:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[action]
        peak = max(peak, held)
    return peak / v


# --------------------------------------------------------------------------------------------- our layers, their engine

class Stage(nn.Module):
    """Some layers of our model, as PipelineStage wants them: tensors in, a tensor out, and a first dimension to cut m
    from.

    All microbatches must have the same T, so packs are filled (data.fill). Where documents begin is read off the
    positions: all inputs but the stream are given to each stage by keyword.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, position_ids):
        """x: token ids (1, T) on the first stage, (T, D) on others; position_ids (1, T).

        Returns (T, D), on the last (T, V).
        """
        position_ids = position_ids[0]                                                   # (T,)
        starts = F.pad((position_ids == 0).nonzero()[:, 0], (0, 1), value=len(position_ids))
        ids = x[0] if x.dtype == torch.long else position_ids   # of ids a later stage reads the shape only
        if x.dtype != torch.long:
            self.model.model.embed_tokens.x = x
        cu_seqlens = starts.int()                                                        # (S+1,)
        return self.model(ids, position_ids, cu_seqlens, cu_seqlens.diff().max().item())


def stages_of_rank(name, rank, p):
    """One after another round the ranks: 0 and 4 on the first of four.

    ZBV turns round at the last rank: there it is 0 and 7.
    """
    return [rank, 2 * p - 1 - rank] if "ZBV" in name else [rank + p * i for i in range(LIBRARY[name][1])]


def library_gradients(name, batches, mesh, targets):
    """{name: gradient} of this rank's stages, by torch.distributed.pipelining. batches: PackedBatches, all of the same
    T.
    """
    schedule_class, v = LIBRARY[name]
    own = stages_of_rank(name, mesh.pp.rank, mesh.pp.size)
    stages = []
    for stage in own:
        model = small_model()
        label(model, mesh)
        cut_stage(model, stage, mesh.pp.size * v)
        stages.append(PipelineStage(Stage(model), stage, mesh.pp.size * v, batches[0].input_ids.device,
                                    group=mesh.pp.pg))

    def loss(logits, right):   # plain: a split backward goes through it twice, and linear_cross_entropy scales in place
        return F.cross_entropy(logits, right[0], ignore_index=IGNORE, reduction="sum") / targets

    # scale_grads: True, the default, would divide by m, which is right only if each microbatch has a mean of its own.
    schedule = schedule_class(stages[0] if name in BY_HAND else stages, len(batches), loss, scale_grads=False)
    ids, right, positions = (torch.stack([getattr(batch, key) for batch in batches])                # (m, T) each
                             for key in ("input_ids", "targets", "position_ids"))
    schedule.step(*[ids] if 0 in own else [], position_ids=positions, target=right, return_outputs=False)
    return {parameter.piece.name: parameter.grad for stage in stages for parameter in stage.submod.parameters()}


def gradients_by_hand(name, batches, mesh, targets):
    """{name: gradient} of this rank's stage, by parallel/pipeline.py."""
    model = small_model()
    label(model, mesh)
    keep_stage(model, mesh, name.lower())

    def forward(batch):
        out = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets)
        return out / targets if out.dim() == 0 else out

    run_stage(model, batches, forward)
    return {parameter.piece.name: parameter.grad for parameter in model.parameters()}


def small_model():
    """Eight layers: two stages for each of four ranks.

    Its head is not tied: the library leaves it to you to sum a tied table.
    """
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
                                   num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                   tie_word_embeddings=False))


def small_batches(m, T=24):
    """Packs of two documents, filled to T."""
    torch.manual_seed(0)
    documents = [[(torch.randint(64, (length,)).tolist(), torch.randint(64, (length,)).tolist())
                  for length in (5 + i % 3, 9 + i)]
                 for i in range(m)]
    return [fill(packed_sequence_collate_fn(pack), T) for pack in documents]


def largest_difference(mesh, m=M):
    """{(schedule, by whom): largest difference of a gradient from one process's, relative to the largest of its
    parameter}.
    """
    batches, one = small_batches(m), small_model()
    targets = sum((batch.targets != IGNORE).sum() for batch in batches)
    for batch in batches:
        (one(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen,
             batch.targets) / targets).backward()
    expected = {name: parameter.grad for name, parameter in one.named_parameters()}
    found = {(name, "hand"): gradients_by_hand(name, batches, mesh, targets) for name in BY_HAND}
    found |= {(name, "library"): library_gradients(name, batches, mesh, targets) for name in LIBRARY}
    return {key: max(((grad - expected[name]).abs().max() / expected[name].abs().max()).item()
                     for name, grad in grads.items())
            for key, grads in found.items()}


# --------------------------------------------------------------------------------------------------------- on the clock

class Sleep(torch.autograd.Function):
    """x again, after a while; and its gradient, after a while."""

    @staticmethod
    def forward(ctx, x, weight, stage, i):
        ctx.stage, ctx.i = stage, i
        stage.sleep("F", i)
        return x + 0

    @staticmethod
    def backward(ctx, dout):
        ctx.stage.i = ctx.i
        ctx.stage.sleep("I" if ctx.stage.split else "B", ctx.i)
        return dout, None, None, None


class SleepingStage(nn.Module):
    """A stage that takes its time and no core. events: a list, gets (stage, action, microbatch, start, end) in seconds.
    """

    def __init__(self, number, v, split, events):
        super().__init__()
        self.number, self.v, self.split, self.events = number, v, split, events
        self.weight = nn.Parameter(torch.zeros(()))   # or the first stage would have no gradient to compute

    def sleep(self, action, i):
        start = time.perf_counter()
        time.sleep(TIMES[action] * UNIT / self.v)
        self.events.append((self.number, action, i, start, time.perf_counter()))

    def forward(self, x, i):
        return Sleep.apply(x, self.weight, self, int(i))

    def weights_later(self):
        """What PipelineStage calls after I: it is to return what it will call for W."""
        return functools.partial(self.sleep, "W", self.i)


def clock_by_hand(name, m, mesh, events):
    """Returns a function that runs a step; events gets what this rank did."""
    stage = SleepingStage(mesh.pp.rank, 1, False, [])

    def forward(i, x):
        out = stage(torch.zeros(1, 1) if x is None else x, i)
        return out.sum() if mesh.pp.rank == mesh.pp.size - 1 else out

    def step():
        record = []
        run(BY_HAND[name](mesh.pp.rank, mesh.pp.size, m), mesh, range(m), forward, lambda i: torch.empty(1, 1),
            record=record)
        events.extend((mesh.pp.rank, *action) for action in record)
    return step


def clock_library(name, m, mesh, events):
    schedule_class, v = LIBRARY[name]
    own = stages_of_rank(name, mesh.pp.rank, mesh.pp.size)
    modules = [SleepingStage(number, v, "zero" in name, events) for number in own]
    stages = [PipelineStage(module, module.number, mesh.pp.size * v, torch.device("cpu"), group=mesh.pp.pg,
                            dw_builder=module.weights_later if module.split else None) for module in modules]
    schedule = schedule_class(stages[0] if name in BY_HAND else stages, m, lambda out, target: out.sum())
    x, numbers = torch.zeros(m, 1), torch.arange(m)
    return lambda: schedule.step(*[x] if 0 in own else [], i=numbers, target=x, return_outputs=False)


def measure(name, by, m, mesh, steps=3):
    """Events of the shortest of some steps, of all ranks, on rank 0: as simulate returns them, in seconds."""
    events, all_events = [], [None] * mesh.pp.size
    step = (clock_by_hand if by == "hand" else clock_library)(name, m, mesh, events)
    step()   # the first one also opens the connections, and the library's finds out its shapes
    tries = []
    for _ in range(steps):
        events.clear()
        dist.barrier()
        step()
        dist.all_gather_object(all_events, events)
        tries.append([(rank, *event) for rank, own in enumerate(all_events) for event in own])
    return min(tries, key=lambda events: max(event[-1] for event in events) - min(event[-2] for event in events))


# ---------------------------------------------------------------------------------------------------------- the picture

COLORS = {"F": "#1f6f8b", "B": "#d9822b", "I": "#d9822b", "W": "#7a5195"}
NOTHING = "#e8e8e8"


def draw(rows, path):
    """rows: [(title, events), ...], all drawn on one scale of time. Pale: the second stage of a rank."""
    figure = Figure(figsize=(9, 1.3 * len(rows) + 0.5), dpi=110, layout="constrained")
    longest = max(max(event[-1] for event in events) - min(event[-2] for event in events) for _, events in rows)
    for axes, (title, events) in zip(figure.subplots(len(rows), 1, sharex=True), rows):
        begin = min(event[-2] for event in events)
        axes.barh(range(P), max(event[-1] for event in events) - begin, height=1, color=NOTHING)
        for rank, stage, action, i, start, end in events:
            axes.barh(rank, end - start, left=start - begin, height=0.92, color=COLORS[action],
                      alpha=0.5 if stage >= P else 1,
                      edgecolor="white", linewidth=0.6)
            axes.text((start + end) / 2 - begin, rank, i, ha="center", va="center", fontsize=7,
                      color="black" if stage >= P else "white")
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set(xlim=(0, longest), ylim=(P - 0.5, -0.5), yticks=range(P), xticks=[])
        axes.set_yticks(range(P), [f"rank {rank}" for rank in range(P)], fontsize=8.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    parts = {"forward": "F", "backward, or its part that is waited for": "B", "gradient of the weights": "W"}
    figure.legend(handles=[*(Patch(color=COLORS[action], label=text) for text, action in parts.items()),
                           Patch(color=NOTHING, label="nothing: the bubble")],
                  loc="outside lower center", ncols=4, fontsize=9, frameon=False, title_fontsize=9,
                  title="pale: the second stage of a rank; the numbers are microbatches")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


# ----------------------------------------------------------------------------------------------------------------- main

CASES = [("GPipe", "hand", M), ("GPipe", "library", M), *(("1F1B", "hand", m) for m in (4, M, 32)),
         ("1F1B", "library", M),
         *((name, "library", M) for name in list(LIBRARY)[2:])]


def paper(name, by, m):
    """(orders, events) on paper."""
    v = LIBRARY[name][1]
    orders = orders_by_hand(name, P, m) if name in BY_HAND else orders_of_library(name, P, m)
    return orders, simulate(orders, {action: length / v for action, length in TIMES.items()})


def work(rank, file):
    """One of the four processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=P)
    mesh = make_mesh(pp=P)
    differences = largest_difference(mesh)
    everyone = [None] * P
    dist.all_gather_object(everyone, differences)
    measured = {case: measure(*case, mesh) for case in CASES}
    if rank == 0:
        show({key: max(own[key] for own in everyone) for key in differences}, measured)
    sys.stdout.flush()
    os._exit(0)   # why not as Python ends: parallel.mesh.start_ranks


def show(differences, measured):
    print(f"gradients of {P} ranks against one process, largest relative difference:")
    for (name, by), difference in differences.items():
        print(f"  {name:18} by {by:8} {difference:.1e}")
        assert difference < 1e-4, f"{name} by {by}: {difference}"
    rows, pictures = [], []
    print(f"\n{P} ranks{'m':>21}{'most held':>12}{'bubble: formula':>19}{'simulated':>12}{'measured':>11}")
    for (name, by, m), events in measured.items():
        orders, on_paper = paper(name, by, m)
        row = {"schedule": name, "by": by, "stages": LIBRARY[name][1], "microbatches": m,
               "held": max(most_held(order, LIBRARY[name][1]) for order in orders),
               "formula": 100 * FORMULA[name](P, m),
               "simulated": 100 * bubble(on_paper), "measured": 100 * bubble(events)}
        rows.append(row)
        print(f"{name:18} {by:8}{m:3}{row['held']:12.1f}{row['formula']:18.1f}%{row['simulated']:11.1f}%"
              f"{row['measured']:10.1f}%")
        if m == M and (by == "hand" or name not in BY_HAND):
            pictures.append((f"{name}: bubble {row['formula']:.1f} % by the formula, {row['measured']:.1f} % measured;"
                             f" activations of {row['held']:g} microbatches at most", events))
    columns = {"schedule": "schedule", "by": "by", "stages": "stages per rank", "microbatches": "microbatches",
               "held": "held at most", "formula": "bubble by the formula, %", "simulated": "simulated, %",
               "measured": "measured, %"}
    print(write_results("pipeline", "python chapter-06-parallelism/schedules.py", columns, rows))
    draw(pictures, FIGURES / "pipeline.png")
    print(FIGURES / "pipeline.png")


def main():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(os.path.join(folder, "store"),), nprocs=P)


if __name__ == "__main__":
    run_script(main)
