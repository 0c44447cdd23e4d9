"""Mixture of experts: many small MLPs in each layer, and every token goes through a few of them.

A dense model multiplies every token with every weight. Here a layer has E MLPs, the experts, and a router, one matrix,
which gives each a score for each token. The k best work on that token and the others do not: parameters grow with E,
arithmetic only with k (Shazeer et al. 2017). This is the layer of Qwen3-30B-A3B: a token meets 8 of 128 experts, 3.3 of
30.5 billion parameters.

A GPU wants few large matrix products, not one for each token and expert. So tokens are sorted: k copies of each, those
for expert 0 first, then those for expert 1. Now each expert finds its rows side by side, and computes them in one
product. No expert has a limit, and no token is dropped. At work one kernel computes the products of all experts
(torch.nn.functional.grouped_mm; Gale et al. 2022, MegaBlocks); here a loop does.

Expert parallel (Lepikhin et al. 2020, GShard): the experts, nearly all weights of the model, are dealt out over the
ranks of mesh.ep, and everything else stays as in data parallel. A rank sends each row to where its expert is, and gets
the result back: two all-to-alls forward, and two backward with the gradients. Their bytes, for a rank with T tokens, in
each layer, if all experts are equally busy:

    4 T k D (ep - 1) / ep numbers, and E (ep - 1) / ep whole numbers, to say how many rows will come

How large the experts are does not occur: that is why it pays. The router's weights never travel, they wait for the
result.

Letters, besides those of model.py: E num_experts, k num_experts_per_tok, n = E / ep experts of this rank, R rows.
"""
from dataclasses import replace

import torch
from torch import nn

from cli import InputError
from parallel.mesh import AllToAll, Group


class Push(torch.autograd.Function):
    """x as it is; back, a gradient that comes on top: that of a loss which is trained but never added up.

    gradient: a function, asked on the way back, when all layers have counted.
    """

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy + ctx.gradient(), None


class Routing:
    """What the routers of one pack have to know of it, and of each other.

    real (T,): False for tokens that only fill the pack up. counts: {layer: (E,)}, how many of the others each expert
    got.
    """

    def __init__(self, real):
        self.real, self.counts, self.total = real, {}, None

    def sum_up(self):
        """When all layers have counted: (E,), over the layers, also of other stages, and over the parts of the pack."""
        if self.total is None and self.counts:   # not when a layer is computed again
            layer = next(iter(self.counts))
            self.total = layer.cp.all_reduce(sum(self.counts.values()))
            # Later stages have not begun; it is needed on the way back.
            self.arriving = layer.pp.all_reduce(self.total, wait=False)


class MoE(nn.Module):
    """Takes the place of an MLP. expert: a class, of which expert(config) makes an MLP of width
    config.intermediate_size.
    """

    def __init__(self, config, expert):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        narrow = replace(config, intermediate_size=config.moe_intermediate_size)
        # By name, not a list: a rank that has only experts 4 to 7 still calls them 4 to 7, as checkpoints do.
        self.experts = nn.ModuleDict({str(i): expert(narrow) for i in range(config.num_experts)})
        self.ep = self.cp = self.pp = Group()   # see spread
        self.loss_scale = 1.0         # see scale_balance
        self.load = None              # (E,): how many of this rank's tokens each expert got, the last time

    def forward(self, x, routing=None):
        """x (T, D) -> (T, D). routing: of the pack; None where there is no layer but this one and no token that fills
        up.
        """
        weights, chosen = self.route(x, routing)                                        # (T, k) each
        order = chosen.flatten().argsort(stable=True)                                   # (T k,), expert after expert
        tokens = order // chosen.shape[1]   # (T k,), which token each row is
        rows = self.compute(x.index_select(0, tokens), self.load)                       # (T k, D)
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        return rows.new_zeros(x.shape).index_add(0, tokens, rows)                       # (T, D)

    def route(self, x, routing=None):
        """Which experts each token of x (T, D) takes and how much of each: weights and numbers of experts, each (T, k).
        """
        probabilities = self.gate(x).softmax(-1, dtype=torch.float32)                   # (T, E)
        chosen = probabilities.detach().topk(self.config.num_experts_per_tok).indices   # (T, k)
        self.load = chosen.flatten().bincount(minlength=self.config.num_experts)        # (E,)
        if self.training and torch.is_grad_enabled() and self.config.router_aux_loss_coef > 0:
            routing = routing or Routing(x.new_ones(len(x), dtype=torch.bool))
            routing.counts[self] = chosen[routing.real].flatten().bincount(minlength=self.config.num_experts)   # (E,)
            probabilities = Push.apply(probabilities, lambda: self.balance_gradient(routing))
        weights = probabilities.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def balance_gradient(self, routing):
        """(T, E): the gradient of the load-balancing loss for the probabilities of each token (Fedus et al. 2021,
        Switch).

        An expert that gets more tokens learns more, becomes better, gets still more; the others wither. The loss
        against it,

            balance = E * sum over e of f_e P_e,    f_e: tokens that expert e gets, divided by all tokens
                                                    P_e: mean probability of e over the tokens

        is smallest, k, where all are equal. f is counted and has no gradient; through P it pushes down the probability
        of whoever has more than its share. To the loss of a step, a mean over targets, comes coefficient * balance, a
        mean over the tokens that the routers see, targets or not, and over the layers: as in transformers, and so the
        coefficient means the same. d / d probability is coefficient * E * f_e / (tokens of the step * layers).

        As there, f is of all layers together. It is of one pack: no rank knows the packs of others.
        """
        routing.sum_up()   # where Transformer.forward has not
        if routing.arriving:
            routing.arriving.wait()
        f = self.config.num_experts_per_tok * routing.total / routing.total.sum()       # (E,)
        config = self.config
        factor = self.loss_scale * config.router_aux_loss_coef * config.num_experts / config.num_hidden_layers
        return factor * f * routing.real[:, None]

    def compute(self, rows, counts):
        """rows (R, D) sorted by expert, of which counts (E,) are for each -> what the experts make of them, in the same
        order.
        """
        n = len(self.experts)
        come = self.ep.all_to_all(counts, [n] * self.ep.size,
                                  [n] * self.ep.size)   # (ep n,): from each rank, for each expert
        # Python cuts tensors, so it must know these numbers: a GPU is waited for here, in every layer.
        send, receive, sizes = counts.view(-1, n).sum(1).tolist(), come.view(-1, n).sum(1).tolist(), come.tolist()
        # Now sorted by the rank that sent them, and only then by expert.
        rows = AllToAll.apply(rows, self.ep, send, receive)
        parts, results = rows.split(sizes), [None] * len(sizes)
        for i, expert in enumerate(self.experts.values()):
            # Also where no rows have come: its weights then get a gradient of zeros, which data parallel waits for.
            results[i::n] = expert(torch.cat(parts[i::n])).split(sizes[i::n])
        return AllToAll.apply(torch.cat(results), self.ep, receive, send)


def layers(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def check(config, ep, tp):
    """Raises InputError where the experts of this model cannot be dealt out so."""
    if ep > 1 and not config.num_experts:
        raise InputError(f"--ep {ep}: this model has no experts; use --ep 1, or a model with experts, such as"
                         " small-moe")
    if config.num_experts and tp > 1:
        raise InputError(f"--tp {tp}: experts are cut by --ep, not by --tp; use --tp 1")
    if config.num_experts % ep:
        raise InputError(f"--ep {ep}: {config.num_experts} experts do not divide by {ep} ranks")


def spread(model, mesh):
    """Leave each rank of mesh.ep its E / ep experts of every layer, after parallel.mesh.label.

    Without experts: nothing to do.
    """
    check(model.config, mesh.ep.size, mesh.tp.size)
    for layer in layers(model):
        layer.ep, layer.cp, layer.pp = mesh.ep, mesh.cp, mesh.pp
        n = len(layer.experts) // mesh.ep.size
        for i in range(len(layer.experts)):
            if i // n != mesh.ep.rank:
                del layer.experts[str(i)]


def scale_balance(model, factor):
    """What a loss is multiplied with before backward() the balance must be too, and it does not pass there.

    train.py calls this before the first pack of each step. factor: 1 / tokens of the step, those that fill up left out,
    times the scale of float16. Not 1 / targets: routers see the tokens that are no targets too.
    """
    for layer in layers(model):
        layer.loss_scale = factor


def load(model):
    """(layers, E): the tokens that each expert got from this rank's last pack.

    Largest / mean = 1 is perfect balance.
    """
    return torch.stack([layer.load for layer in layers(model)])


def report(model):
    """What train.py shows of a step, {name: number}: in each layer what the busiest and the idlest expert got of this
    rank's last pack, divided by the mean. 1 and 1 is perfect balance. Nothing of a model without experts.
    """
    shares = [(layer.load / layer.load.float().mean()).tolist() for layer in layers(model)]
    return {f"{name}_expert_of_layer_{i}": extreme(share) for i, share in enumerate(shares)
            for name, extreme in (("busiest", max), ("idlest", min))}
