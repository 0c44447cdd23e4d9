"""SmoothQuant and AWQ: before a layer is rounded, make its columns easier to round.

A product does not change when a column of the weight is multiplied by s and the input that meets it is divided by s.
But the rounding does: a column that has become large among its neighbours is rounded more finely in proportion, and an
input that has become small no longer makes the scale of its token coarse. Dividing the input costs nothing when the
model runs: what makes the input is divided beforehand, a norm's weight or the rows of another matrix. Of these each row
has its own scale, so its rounding stays as it was.

    SmoothQuant  (Xiao et al. 2022, arXiv:2211.10438)  8 bit inputs: the inputs hand over some of their size to the
                                                       weights.
    AWQ          (Lin et al. 2023, arXiv:2306.00978)   4 bit weights: those that meet large inputs matter most and are
                                                       scaled up. Then the few that make a group's scale large are
                                                       clipped.

Shape letters: see model.py and integers.py.
"""
from collections import namedtuple

import torch

from integers import grouped, rounded

# before: the module whose outputs, divided, are the inputs of the linear layers `after`. name: of their statistics.
# Of an input that several heads read there are copies: H / G in a row, each head_dim wide.
Site = namedtuple("Site", "before after name copies width", defaults=[1, 1])


def sites(block):
    """The four places of a Block, without experts, where the inputs of linear layers can be divided."""
    attention, mlp = block.self_attn, block.mlp
    return [Site(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], "self_attn.q_proj"),
            Site(attention.v_proj, [attention.o_proj], "self_attn.o_proj",
                 attention.q_proj.out_features // attention.v_proj.out_features, attention.head_dim),
            Site(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], "mlp.gate_proj"),
            Site(mlp.up_proj, [mlp.down_proj], "mlp.down_proj")]


def copies(site, vector):
    """One number for each input (K,) -> (outputs of `before` / width, copies, width).

    Along the middle all must be equal.
    """
    return vector.unflatten(0, (-1, site.copies, site.width))


def equal(site, s):
    """(K,) -> (K,): one factor, the geometric mean, for all copies of an input."""
    return copies(site, s.log()).mean(1, keepdim=True).exp().expand(-1, site.copies, -1).flatten()


@torch.no_grad()
def fold(site, s):
    """Multiply the columns of the layers after a site by s (K,), and divide what comes out of the module before it."""
    for layer in site.after:
        layer.weight *= s
    once = copies(site, s)[:, 0].flatten()
    weight = site.before.weight   # of a norm (D,), of a linear layer (outputs, inputs)
    weight /= once if weight.dim() == 1 else once[:, None]


@torch.no_grad()
def smoothquant(block, statistics, format, alpha=0.5):
    """Balance inputs and weights, in place: s = largest |x| ^ alpha / largest |w| ^ (1 - alpha) for each input.

    statistics: {name: .largest (K,), of |x| over the calibration text}. alpha: how much of their size the inputs hand
    over.
    """
    for site in sites(block):
        x = statistics[site.name].largest
        w = torch.stack([layer.weight.abs().amax(0) for layer in site.after]).amax(0)
        s = x ** alpha / w ** (1 - alpha)
        fold(site, equal(site, torch.where((x > 0) & (w > 0), s, 1.0)))


@torch.no_grad()
def awq(block, statistics, format, grid=20):
    """Scale up the weights that meet large inputs, then clip those that stick out, in place.

    statistics: {name: .mean (K,), of |x|, and .products (K, K), the sum of x x^T, over the calibration text}.
    """
    for site in sites(block):
        seen = statistics[site.name]
        s = best_factors(site, seen, format, grid)
        fold(site, s)
        for layer in site.after:
            layer.weight.copy_(clipped(layer.weight, seen.products / s / s[:, None], format))


def best_factors(site, seen, format, grid):
    """(K,): mean |x| ^ ratio, with that ratio from 0 (all factors are 1) to almost 1 that hurts the site's outputs
    least.
    """
    weight = torch.cat([layer.weight for layer in site.after])
    # Of the largest, or a product of two factors would leave float32. At least something: inputs may always be 0, one
    # or all of them.
    mean = (seen.mean / seen.mean.max().clamp(min=1e-30)).clamp(min=1e-4)
    candidates = [equal(site, mean ** (i / grid)) for i in range(grid)]
    # The smallest as far below 1 as the largest above.
    candidates = [s / (s.max() * s.min()).sqrt() for s in candidates]
    errors = torch.stack([output_error(rounded(weight * s, format) / s - weight, seen.products) for s in candidates])
    return candidates[errors.argmin()]


def output_error(difference, products):
    """The sum of squares of what a change of the weight (N, K) does to a layer's outputs, over all the calibration
    text.

    sum over x of |d x|^2 = sum over rows d of d (sum of x x^T) d^T: the inputs themselves need not be kept.
    """
    return (difference @ products * difference).sum()


def clipped(weight, products, format, steps=10):
    """The weight (N, K) with the largest of each group drawn in: they become wrong, all others are rounded more finely.

    By how much, down to half of the largest, each group decides for itself: as if the others were not rounded at all.
    """
    groups = grouped(weight, format.group)                                                  # (N, K / group, group)
    size = groups.shape[-1]
    own = torch.stack([products[i:i + size, i:i + size] for i in range(0, len(products), size)])
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if format.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best, least = groups, torch.inf
    for step in range(steps):
        share = 1 - step / steps / 2
        attempt = groups.clamp(low * share, high * share)
        change = grouped(rounded(attempt.flatten(-2), format), format.group) - groups
        # output_error of each group.
        error = (torch.einsum("ngk,gkl->ngl", change, own) * change).sum(-1, keepdim=True)
        best, least = torch.where(error < least, attempt, best), error.clamp(max=least)
    return best.flatten(-2)
