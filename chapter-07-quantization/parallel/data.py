"""Data parallel: every rank has the whole model and other documents; before the optimizer steps, gradients are summed
over all.

Each way below computes the same numbers and sends the same bytes, 2 (n - 1) / n of the gradients. What differs is the
waiting:

    naive        after backward, one all-reduce for each gradient: hundreds of small messages, and each pays for its
                 start
    bucketed     after backward, one for each 25 MB of gradients: few starts, but the processors are idle meanwhile
    Overlapped   one for each 25 MB as soon as backward has made them, while it goes on (Li et al. 2020, PyTorch's DDP)

Summed and not averaged: the loss of a pack is a sum of nats, and train.py divides it by the targets of the whole step,
all ranks and packs. So ranks whose packs hold few targets count for as much as they hold. An average of the ranks'
means would not do that.

At work: torch.nn.parallel.DistributedDataParallel, or, as soon as memory is short, fully_shard (parallel/zero.py).
"""
from dataclasses import dataclass, replace

import torch

from data import IGNORE, fill
from flops import total_flops
from parallel.mesh import Group, round_up
from parallel.zero import FullySharded, Zero

# bytes. Smaller ones pay for more starts; of a larger one the first gradient waits longer for the last.
BUCKET = 25 << 20


def gradient(parameter):
    """Its gradient; zeros if it has none on this rank.

    The others have one to sum, and would wait for this rank's for ever.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def naive(parameters):
    """Sum the gradients over the ranks that hold the same weights, one by one."""
    for parameter in parameters:
        parameter.piece.group.all_reduce(gradient(parameter))


@dataclass
class Bucket:
    """Parameters of one group whose gradients travel together."""
    group: Group
    parameters: list
    missing: int = 0              # gradients that backward has yet to make
    flat: torch.Tensor = None     # the gradients end to end, while they travel
    work: object = None

    def begin(self):
        self.flat = torch.cat([gradient(parameter).flatten() for parameter in self.parameters])
        self.work = self.group.all_reduce(self.flat, wait=False)

    def finish(self):
        if self.work is not None:   # None in a group of one
            self.work.wait()
        for parameter, total in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            parameter.grad.copy_(total.view_as(parameter))
        self.flat = self.work = None


def make_buckets(parameters, limit=BUCKET):
    """Parameters as buckets of at most `limit` bytes (a larger tensor is alone), each of one group: experts have
    another.

    From the last parameter to the first, because that is about the order in which backward makes gradients.
    """
    full, filling = [], {}
    for parameter in reversed(list(parameters)):
        group = parameter.piece.group
        bucket = filling.get(group)
        if bucket and sum(p.nbytes for p in bucket.parameters) + parameter.nbytes > limit:
            full.append(filling.pop(group))
        filling.setdefault(group, Bucket(group, [])).parameters.append(parameter)
    return full + list(filling.values())


def bucketed(parameters, limit=BUCKET):
    """The same sums in few large messages."""
    for bucket in make_buckets(parameters, limit):
        bucket.begin()
        bucket.finish()


class Overlapped:
    """The same sums, begun while backward goes on.

    A step: before_backward for each pack, finish, optimizer.step, after_step.
    """

    def __init__(self, model, limit=BUCKET):
        self.model = model
        self.buckets = make_buckets(model.parameters(), limit)
        self.sync = False     # whether this backward is the step's last: before it gradients only add up
        self.begun = 0        # buckets
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                # A tied table has one gradient, which comes once, when all that use it have had their turn.
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self.made(bucket))

    def parameters(self):
        """What the optimizer is to update."""
        return list(self.model.parameters())

    def before_backward(self, last):
        """Say before each backward whether it is the last of the step."""
        self.sync = last
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def made(self, bucket):
        if not self.sync:
            return
        bucket.missing -= 1
        # In the buckets' order, whichever is complete first. Backward may go another way on another rank (an expert
        # without tokens has no gradient there), and ranks that sum different buckets with each other get nonsense, or
        # wait for ever.
        while self.begun < len(self.buckets) and self.buckets[self.begun].missing == 0:
            self.begin_next()

    def begin_next(self):
        self.buckets[self.begun].begin()
        self.begun += 1

    def finish(self):
        """After the last backward: all gradients are the sums over all ranks.

        Before anything else is said in these groups: what other ranks have begun already, this rank may only begin
        here.
        """
        while self.begun < len(self.buckets):   # those with a gradient that never came
            self.begin_next()
        for bucket in self.buckets:
            bucket.finish()
        self.begun, self.sync = 0, False

    def after_step(self):
        """Every rank has made the same step with the same gradients: the weights are equal already."""


# What keeps the ranks together: make(model, mesh) for each choice of train.py --zero.
MODES = {
    "0": lambda model, mesh: Overlapped(model),
    "1": lambda model, mesh: Zero(model, stage=1),
    "2": lambda model, mesh: Zero(model, stage=2),
    "3": lambda model, mesh: Zero(model, stage=3),
    "torch": FullySharded,
}


# ------------------------------------------------------------------------------------------------ who gets which pack
#
# Packs have about equally many tokens but not equally much work: attention costs sum(length^2), and one document of
# 4,096 tokens costs it 64 times as much as 64 documents of 64. The optimizer steps when the slowest rank is ready; the
# others wait.

def share_out(packs, cost, ranks):
    """The packs of a step, equally many for each rank: [[its packs], ...]. cost: how long each pack takes, in any unit.

    The most expensive first, each to the rank that has least to do so far (longest processing time first, Graham 1969).
    So a rank gets its packs in the order of their cost, and those that the ranks compute at the same time are about
    equal: in ZeRO 3 ranks wait for each other in every layer. Depends on nothing but its arguments: every rank finds
    the same without asking.
    """
    assert len(packs) % ranks == 0, f"{len(packs)} packs cannot be shared out equally to {ranks} ranks"
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(packs)), key=lambda i: -cost[i]):
        rank = min((r for r in range(ranks) if len(shares[r]) < len(packs) // ranks), key=lambda r: load[r])
        shares[rank].append(packs[i])
        load[rank] += cost[i]
    return shares


def own_batches(batches, model):
    """Of a step's batches those of this rank, filled up so that they can be cut."""
    costs = [total_flops(model.config, batch.cu_seqlens) for batch in batches]
    return fill_up(share_out(batches, costs, model.mesh.dp.size)[model.mesh.dp.rank], model.mesh)


def validation_batches(batches, mesh):
    """The same for validation, which computes each document once."""
    # As many for each rank, because the ranks wait for each other: where they do not come out even, packs without a
    # target.
    none = replace(batches[0], targets=torch.full_like(batches[0].targets, IGNORE))
    batches = batches + [none] * (-len(batches) % mesh.dp.size)
    return fill_up(batches[mesh.dp.rank::mesh.dp.size], mesh)


def fill_up(batches, mesh):
    return [fill(batch, round_up(len(batch.targets), mesh)) for batch in batches]


def imbalance(shares):
    """What the busiest rank has to do, over the mean: 1.25 says that a fifth of all ranks' time is spent waiting.

    shares: the costs of each rank's packs, such as share_out(cost, cost, ranks).
    """
    load = list(map(sum, shares))
    return max(load) * len(load) / sum(load)
