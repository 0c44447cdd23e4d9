"""Pipeline parallel: each rank has some of the layers, and the packs of a step go through the ranks one after another.

    torchrun --nproc_per_node 4 train.py --pp 4 --accumulate 8        (in this folder)

A stage is what one rank has: a few layers, the first one the token table too, the last one the head. What goes over the
wire is the residual stream, (T, D) forward and its gradient back, once for each pack. No other cut sends so little,
which is why this one may cross from machine to machine. Its price is the bubble: while the first pack is on its way the
last stage has nothing to do, and while the last gradient is on its way back it is again idle. With p stages and m packs
(a step's packs are called microbatches here, as in the papers) a share (p - 1) / (m + p - 1) of all time is lost:
chapter 6's schedules.py has the picture, and schedules that lose less.

A schedule is a list for each rank: in which order it computes ("F", i) and ("B", i), forward and backward of microbatch
i. The runner below takes any such list. At work: torch.distributed.pipelining, which chapter 6's schedules.py shows to
do the same.

T, D: as in model.py; p: stages, in the code pp.size; m: microbatches of a step.
"""
import math
import time
from collections import deque

import torch
from torch import nn

from cli import InputError
from flops import weights


def stage_layers(num_layers, size, head=0.0):
    """Which layers each stage has: [(start, end), ...], end not included. Raises InputError if there are too few.

    All stages wait for the slowest, so it decides. head: how many layers the head costs; those the last stage is
    spared. The table costs nothing in time, one row is read for each token. What does not divide goes to later stages:
    the first one has the table to keep, and the most microbatches (one_f_one_b).
    """
    if num_layers < size:
        raise InputError(f"{num_layers} layers do not fill {size} pipeline stages; --pp {num_layers} is the most")
    if size == 1:
        return [(0, num_layers)]
    last = min(range(1, num_layers - size + 2),
               key=lambda last: max(math.ceil((num_layers - last) / (size - 1)), last + head))
    each, more = divmod(num_layers - last, size - 1)
    counts = [each] * (size - 1 - more) + [each + 1] * more + [last]
    return [(sum(counts[:rank]), sum(counts[:rank + 1])) for rank in range(size)]


def cut_stage(model, stage, size):
    """Take out of a labelled model, in place, what other stages have. Raises InputError if it has fewer layers than
    stages.

    A tied table is needed at both ends. First and last stage each keep one, and sum_tied makes both learn from both
    uses.
    """
    layers, costs = model.model.layers, weights(model.config)
    start, end = stage_layers(len(layers), size, costs["head"] * len(layers) / costs["linear"])[stage]
    # In the model these now count from 0; parameter.piece knows their true names.
    model.model.layers = layers[start:end]
    if size > 1 and model.config.tie_word_embeddings:
        model.lm_head.weight.piece.tied = True   # the same parameter as embed_tokens.weight, before one of them goes
    if stage > 0:
        model.model.embed_tokens = Received()
    if stage < size - 1:
        model.model.norm, model.lm_head = nn.Identity(), HandedOn()
        model.loss = lambda x, weight, targets: x


class Received(nn.Module):
    """In the place of the token table: x (T, D), what the stage before has made of the tokens."""
    x = None

    def forward(self, input_ids):
        return self.x


class HandedOn(nn.Identity):
    """In the place of the head."""
    weight = None


def keep_stage(model, mesh, schedule="1f1b"):
    """Make a labelled model this rank's stage of it: cut_stage with one stage for each rank of mesh.pp."""
    model.schedule = SCHEDULES[schedule]
    cut_stage(model, mesh.pp.rank, mesh.pp.size)


def sum_tied(parameters, mesh):
    """Sum the gradients of the tied table over the first and the last stage; the two tables then stay equal, bit for
    bit.

    Each sends the other its own, the size of the table (or of this rank's rows of it) once: what an all-reduce between
    two ranks sends too. One over all of pp would need as large a tensor of zeros in every stage between.
    """
    pp, back = mesh.pp, mesh.pp_back
    for parameter in parameters:
        if parameter.piece.tied:
            there, here, other = (pp, back, pp.size - 1) if pp.rank == 0 else (back, pp, 0)
            sending = there.send(parameter.grad, other)
            theirs = receive(here, torch.empty_like(parameter.grad), other)
            sending.wait()   # not before: it must go out as it was
            parameter.grad += theirs


# ------------------------------------------------------------------------------------------------------------ schedules

def gpipe(rank, size, m):
    """All forwards, then all backwards (Huang et al. 2019).

    Every stage has to keep the activations of all m microbatches.
    """
    return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]


def one_f_one_b(rank, size, m):
    """Backward as soon as there is one to do (PipeDream-Flush, Narayanan et al. 2021). The same bubble, less memory.

    A stage runs ahead by as many microbatches as there are stages behind it; from then on each forward is followed by a
    backward, and never more than size - rank microbatches are kept. With one stage this is gradient accumulation.
    """
    ahead = min(size - 1 - rank, m)
    steady = [action for i in range(m - ahead) for action in (("F", ahead + i), ("B", i))]
    return [("F", i) for i in range(ahead)] + steady + [("B", i) for i in range(m - ahead, m)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


# --------------------------------------------------------------------------------------------------------------- runner

def receive(group, tensor, source):
    group.receive(tensor, source).wait()
    return tensor


def run_stage(model, batches, forward, before_last_backward=lambda: None):
    """run() for the model that keep_stage has left: forward(batch) calls it. Under torch.no_grad() forwards only."""
    mesh = model.mesh

    def with_x(batch, x):
        if x is not None:
            model.model.embed_tokens.x = x
        return forward(batch)

    def empty(batch):
        T = len(batch.input_ids) // mesh.cp.size // mesh.tp.size
        # Not weight.new_empty: where fully_shard has cut it that would be a DTensor too.
        weight = next(model.parameters())
        return torch.empty(T, model.config.hidden_size, dtype=weight.dtype, device=weight.device)
    order = [("F", i) for i in range(len(batches))]
    if torch.is_grad_enabled():
        schedule = getattr(model, "schedule", one_f_one_b)   # with one stage each is gradient accumulation
        order = schedule(mesh.pp.rank, mesh.pp.size, len(batches))
    return run(order, mesh, batches, with_x, empty, before_last_backward)


def run(order, mesh, batches, forward, empty, before_last_backward=lambda: None, record=None):
    """Run this rank's part of a step. Returns the sum of all losses, on every stage; gradients are left in the
    parameters.

    order: [("F" or "B", i), ...], as gpipe or one_f_one_b gives it; without any "B", for validation, under
    torch.no_grad().
    batches: all microbatches, the same on each stage. forward(batch, x): what this stage makes of x (T, D), which on
    the first is None; on the last it is the loss, a scalar, already divided by what it is to be divided by.
    empty(batch): a tensor to receive x into. before_last_backward(): called when the gradients of all microbatches but
    one are summed up: from here on data parallelism may send those that are complete. record: a list, gets (kind, i,
    start, end) of each action, in seconds.

    A send only begins here. To wait until it is received would be a deadlock: a stage that sends forward and its
    neighbour that sends back would wait for each other. For the same reason gradients have a group of their own,
    mesh.pp_back: over NCCL what two ranks send each other in one group happens in one order, and the two directions
    have no order that both keep to.
    """
    pp, back = mesh.pp, mesh.pp_back
    first, last = pp.rank == 0, pp.rank == pp.size - 1
    alive, sending, losses = {}, deque(), []
    for kind, i in order:
        if kind == "F":
            x = None if first else receive(pp, empty(batches[i]), pp.rank - 1).requires_grad_()
            start = time.perf_counter()
            out = forward(batches[i], x)
            losses.append(out.detach().float() if last else torch.zeros((), device=out.device))
            sent = None if last else pp.send(out.detach(), pp.rank + 1)
            if torch.is_grad_enabled():
                alive[i] = x, out, sent
            elif sent:
                sending.append((sent, out))   # nobody will ask for it again
        else:
            x, out, sent = alive.pop(i)
            dout = None if last else receive(back, torch.empty_like(out), pp.rank + 1)
            start = time.perf_counter()
            if not last:
                sent.wait()   # at once: its gradient would not be here otherwise
            if (kind, i) == order[-1]:
                before_last_backward()
            torch.autograd.backward(out, dout)
            if not first:
                sending.append((back.send(x.grad, pp.rank - 1), x))   # x: not to be freed before it is sent
        if record is not None:
            record.append((kind, i, start, time.perf_counter()))
        if len(sending) > pp.size:   # the oldest has long been received, and may be freed
            sending.popleft()[0].wait()
    for sent in [sent for sent, _ in sending] + [sent for _, _, sent in alive.values() if sent]:
        sent.wait()
    return pp.all_reduce(torch.stack(losses).sum())
