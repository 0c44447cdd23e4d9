"""Activation checkpointing: forget what a layer computed, and compute it again when its gradient is due.

A layer leaves behind for its gradient about 25 numbers for each one that it hands on (chapter 4's memory.py lists
them). Kept is only what it was given; on the way back the layer runs once more, and its memory is needed for one layer
at a time (Chen et al. 2016). "full" pays a forward pass, a third of the arithmetic. "selective" keeps the results of
the matrix products and of attention and recomputes what lies between, norms, rotations and the gate: it saves four
tenths of the memory and costs hardly any arithmetic (Korthikanti et al. 2022 choose by the same reasoning, with other
sizes).

Recompute below is the whole idea. train.py uses torch.utils.checkpoint, which also restores random states and takes any
arguments.
"""
import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from custom_ops import CHAPTER


class Recompute(torch.autograd.Function):
    """function(x, *weights), of which autograd remembers nothing but its arguments."""

    @staticmethod
    def forward(ctx, function, x, *weights):
        ctx.function = function
        ctx.autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        ctx.save_for_backward(x, *weights)
        return function(x)   # inside a Function autograd is off: the layer leaves nothing behind

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        x = x.detach().requires_grad_()
        # The way back runs outside of "with autocast": without this the layer would come out in another precision.
        with torch.enable_grad(), torch.autocast(x.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, (x, *weights), dy)


def recompute(layer, x, *arguments):
    """layer(x, *arguments) by the function above. The weights are named so that autograd asks for their gradients."""
    return Recompute.apply(lambda x: layer(x, *arguments), x, *layer.parameters())


EXPENSIVE = {torch.ops.aten.mm.default, getattr(torch.ops, CHAPTER).grouped_attention.default}


def keep_what_is_expensive(context, operator, *arguments, **keywords):
    varlen = "varlen_attn" in operator.name()
    return CheckpointPolicy.MUST_SAVE if varlen or operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


# How to run a layer, for each choice of train.py --checkpointing: run(layer, *arguments).
RUN = {
    "none": lambda layer, *arguments: layer(*arguments),
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=functools.partial(
        create_selective_checkpoint_contexts, keep_what_is_expensive)),
}
