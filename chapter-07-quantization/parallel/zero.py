"""ZeRO: n ranks of data parallel hold everything n times. Hold it once (Rajbhandari et al. 2020).

A parameter trained by AdamW in float32 costs 16 bytes: 4 its weight, 4 its gradient, 8 the two moments. Each rank owns
some rows of every tensor. What it keeps of the others' rows is the stage:

    stage    weights    gradients    moments    a step sends the weights so many times, (n - 1) / n of them each time
      0        all        all          all      2            all-reduce
      1        all        all          own      2            an all-reduce in two halves, reduce-scatter and all-gather
      2        all        own          own      packs + 1    reduce-scatter as soon as a layer's gradients are made;
                                                             all-gather
      3        own        own          own      3 packs      all-gather before a layer's forward, again before its
                                                             backward; reduce-scatter

Stage 3 is what is called fully sharded data parallel. A layer's weights are together only while the layer computes.
What is gathered and freed together is a unit: each block is one; the rest (token table, last norm, head) is another,
the root, which is needed at both ends and stays from forward to the end of backward. Small units hold little, large
ones send large messages.

At work: torch.distributed.fsdp.fully_shard, FullySharded below. It gathers the next unit while this one computes, and
with MixedPrecisionPolicy(param_dtype=torch.bfloat16) sends half the bytes. Ours waits for each message. And under
autocast it saves less than it says: autograd keeps the bfloat16 copies that autocast made of the weights, from forward
to backward, unless --checkpointing full lets go of them.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cli import InputError
from parallel.mesh import Group, cut


class AfterBackward(torch.autograd.Function):
    """x as it is.

    On the way back, when the gradient of x is known, everything that was computed from x has had its turn.
    """

    @staticmethod
    def forward(ctx, x, done):
        ctx.done = done
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.done()
        return dx, None


def own_rows(parameter, group, view):
    """This rank's rows of a parameter, with their piece: of r rows ceil(r / n) for each rank, fewer or none for the
    last ones.

    view: whether they remain a part of the parameter's memory, or get their own.
    """
    rows = -(-len(parameter) // group.size)
    start = min(group.rank * rows, len(parameter))
    length = min(rows, len(parameter) - start)
    shard = cut(parameter, 0, start, length)
    shard.piece = replace(shard.piece, group=Group())   # nobody else has these
    if view:
        shard.data = parameter.data.narrow(0, start, length)
    return shard


class Unit:
    """Parameters that are gathered, reduced and freed together.

    All have the same group: a block with experts is two units.
    """

    def __init__(self, module, parameters, group, stage, is_root):
        self.whole, self.group, self.stage, self.is_root = parameters, group, stage, is_root
        self.shards = [own_rows(parameter, group, view=stage < 3) for parameter in parameters]
        # Numbers that each rank contributes to each parameter: collectives want equal parts, so that short ones are
        # padded.
        self.sizes = [-(-len(p) // group.size) * (p.numel() // len(p)) for p in parameters]
        self.gathered, self.in_backward = True, False
        if stage == 3:
            self.free()
        if stage >= 2:
            module.register_forward_pre_hook(self.before_forward)
            module.register_forward_hook(self.after_forward)

    @torch.no_grad()
    def gather(self):
        """All rows from all ranks: one message for all parameters."""
        if not self.gathered:
            for parameter in self.whole:
                parameter.untyped_storage().resize_(parameter.nbytes)
        own = torch.cat([F.pad(shard.flatten(), (0, size - shard.numel()))
                         for shard, size in zip(self.shards, self.sizes)])
        parts = self.group.all_gather(own).view(self.group.size, -1).split(self.sizes, dim=1)
        for parameter, part in zip(self.whole, parts):
            # Through .data: autograd, which has kept the parameter for the way back, is not to see that it is written
            # anew. Its values will be the same when it looks.
            parameter.data.copy_(part.reshape(-1, *parameter.shape[1:])[:len(parameter)])
        self.gathered = True

    def free(self):
        """Give the memory back but keep the tensors: whoever has one, autograd too, finds it filled again after
        gather().
        """
        for parameter in self.whole:
            parameter.untyped_storage().resize_(0)
        self.gathered = False

    @torch.no_grad()
    def reduce(self):
        """Add this rank's rows of the gradients, summed over all ranks, to .grad of its shards; drop the whole ones."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.whole]
        flat = torch.cat([F.pad(grad.flatten(), (0, self.group.size * size - grad.numel())).view(self.group.size, size)
                          for grad, size in zip(grads, self.sizes)], dim=1)
        parts = self.group.reduce_scatter(flat.flatten()).split(self.sizes)
        for parameter, shard, part in zip(self.whole, self.shards, parts):
            part = part[:shard.numel()].view_as(shard)
            shard.grad = part if shard.grad is None else shard.grad.add_(part)
            parameter.grad = None

    # What follows makes stages 2 and 3: when a unit is gathered, reduced and freed.

    def before_forward(self, module, arguments):
        if self.in_backward:
            # Activation checkpointing computes this layer again; its weights are here, and backward will free them.
            return
        if self.stage == 3 and not self.gathered:
            self.gather()
        if torch.is_grad_enabled() and not self.is_root:
            x, *rest = arguments
            return AfterBackward.apply(x, self.after_backward), *rest

    def after_forward(self, module, arguments, output):
        if self.in_backward:
            return
        if output.requires_grad:
            output.register_hook(self.before_backward)
        if self.stage == 3 and not (self.is_root and output.requires_grad):
            self.free()

    def before_backward(self, dy):
        self.in_backward = True
        if self.stage == 3 and not self.gathered:
            self.gather()
        if self.is_root:   # token ids have no gradient to wait for, but this is called at the very end
            torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)

    def after_backward(self):
        self.in_backward = False
        self.reduce()
        if self.stage == 3:
            self.free()


class Zero:
    """ZeRO by hand. A step: before_backward for each pack, finish, optimizer.step, after_step; as
    parallel.data.Overlapped.

    The optimizer gets .parameters(), this rank's rows, and so keeps moments of these only.
    """

    def __init__(self, model, stage):
        self.stage = stage
        blocks = list(model.model.layers)
        of_blocks = {parameter for block in blocks for parameter in block.parameters()}
        root = [parameter for parameter in model.parameters() if parameter not in of_blocks]
        self.units = []
        for module, parameters in [(model, root), *((block, list(block.parameters())) for block in blocks)]:
            for group in dict.fromkeys(parameter.piece.group for parameter in parameters):
                same = [parameter for parameter in parameters if parameter.piece.group is group]
                self.units.append(Unit(module, same, group, stage, is_root=module is model))
        shard_of = {parameter: shard for unit in self.units for parameter, shard in zip(unit.whole, unit.shards)}
        self.shards = [shard_of[parameter] for parameter in model.parameters()]

    def parameters(self):
        """What the optimizer is to update: this rank's rows of each parameter, in the model's order.

        Some may have none.
        """
        return self.shards

    def before_backward(self, last):
        """Nothing depends on it here: stage 1 waits for finish(), the others reduce in every backward, to hold less."""

    def finish(self):
        """After the last backward: .grad of parameters() is the sum over all ranks and packs."""
        if self.stage == 1:
            for unit in self.units:
                unit.reduce()

    def after_step(self):
        """After the optimizer's step the others need the new rows; in stage 3 they fetch them when they compute."""
        if self.stage < 3:
            for unit in self.units:
                unit.gather()


def bytes_per_parameter(stage, ranks):
    """Bytes that a rank holds of weights, gradients and AdamW's moments, for each parameter of the model, all in
    float32.
    """
    weights, gradients, moments = 4, 4, 8
    return (weights / (ranks if stage >= 3 else 1) + gradients / (ranks if stage >= 2 else 1)
            + moments / (ranks if stage >= 1 else 1))


def step_bytes(stage, ranks, blocks, root, packs=1):
    """Bytes that a rank sends in a step of so many packs. blocks, root: bytes of their weights (of rows that divide by
    ranks).
    """
    times = {0: 2 * (blocks + root), 1: 2 * (blocks + root), 2: (packs + 1) * (blocks + root),
             3: packs * (3 * blocks + 2 * root)}
    return times[stage] * (ranks - 1) / ranks


# ----------------------------------------------------------------------------------------------------- the library's

def shard_with_torch(model, mesh):
    """fully_shard on each block and on the rest: stage 3 by the library, gradients summed, in float32 whatever they
    are.

    Where experts are spread over ranks, those of a layer are a unit of their own, shared with fewer ranks.
    """
    if mesh.device_mesh is None:
        raise InputError("--zero torch shares a model among ranks, which torchrun starts; this process is alone, so"
                         " leave it out")

    def options(group):
        return dict(mesh=DeviceMesh.from_group(group.pg, mesh.device_mesh.device_type),
                    mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for block in model.model.layers:
        if hasattr(block.mlp, "experts"):
            fully_shard(list(block.mlp.experts.values()), **options(mesh.expert_data))
        fully_shard(block, **options(mesh.data))
    fully_shard(model, **options(mesh.data))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)   # the default is the number of ranks: a mean
            # A factor goes into NCCL's sum otherwise; gloo can only sum.
            module.set_force_sum_reduction_for_comms(True)


class FullySharded:
    """The library's stage 3 behind the same methods.

    Its parameters are DTensors, tensors that know their mesh and what part of them is here. parameters() are these
    parts, in the same memory: what the optimizer does to one it does to the other.
    """

    def __init__(self, model, mesh):
        pieces = {name: parameter.piece for name, parameter in model.named_parameters()}
        shard_with_torch(model, mesh)
        self.whole, self.shards = list(model.parameters()), []
        for name, parameter in model.named_parameters():
            shard, piece = nn.Parameter(parameter.detach().to_local()), pieces[name]
            rows = -(-len(parameter) // piece.group.size)   # as in own_rows
            start = min(piece.group.rank * rows, len(parameter))
            shard.piece = replace(piece, offset=(piece.offset[0] + start, *piece.offset[1:]), group=Group())
            self.shards.append(shard)

    def parameters(self):
        return self.shards

    def before_backward(self, last):
        """It reduces in every backward. model.set_requires_gradient_sync(last) would keep whole gradients until the
        last.
        """

    def finish(self):
        for parameter, shard in zip(self.whole, self.shards):
            shard.grad, parameter.grad = parameter.grad.to_local(), None

    def after_step(self):
        """The next forward fetches the new rows."""
