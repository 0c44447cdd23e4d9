"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round the columns of a weight one by one, each making up for those
before it.

To the nearest integer is the best choice for a weight alone. But inputs resemble each other: where x1 is nearly x2, a
w1 that had to be rounded up is made good by a w2 rounded down. With d the weight minus what it is rounded to, the error
of one row's output over all calibration tokens is

    sum over x of (d x)^2 = d H d^T = |d R|^2        H = sum of x x^T (K, K) = R R^T, R upper triangular

and number j of d R holds d_j and the d of the columns before it, none after. So column by column: the d before are
settled, and

    d_j R_jj + sum over i < j of d_i R_ij            is zero for the weight w_j + sum over i < j of d_i R_ij / R_jj

of which we take the nearest integer. The paper puts it the other way round: each error is passed on to the columns
after it, through the inverse of H. These are the same numbers, with less to compute (Chen et al. 2025,
arXiv:2507.18553).

Shape letters: see integers.py.
"""
from dataclasses import replace

import torch

from awq_smoothquant import clipped
from integers import choose_scale, from_integers, to_integers


@torch.no_grad()
def gptq(weight, products, format, dtype=torch.float32, damping=0.01, block=128):
    """weight (N, K), products (K, K) -> integers (N, K), scale and zero (N, K / group), as integers.py has them.

    products: the sum of x x^T over the calibration tokens; damping: see damped(). Scales are chosen beforehand, for
    weights that are clipped as AWQ's, but as if inputs had nothing in common: for what they have, later columns make
    up. Columns that meet the largest inputs go first, while most others are left to do so.
    """
    K, H = weight.shape[1], damped(products, damping)
    scale, zero = choose_scale(clipped(weight.float(), H.diagonal().diag(), format), format, dtype)
    order = H.diagonal().argsort(descending=True, stable=True)
    # Its L is lower triangular: from the other end, upper.
    R = torch.linalg.cholesky(H[order][:, order].flip(0, 1)).flip(0, 1)
    share = R / R.diagonal()   # R_ij / R_jj, what column j takes over from the error of column i
    weight = weight.float().T[order]                                                        # (K, N)
    integers = torch.empty_like(weight, dtype=torch.int8 if zero is None else torch.uint8)
    errors = torch.empty_like(weight)
    column = replace(format, group=0)
    # What comes from before the block in one product: far faster than column by column.
    for start in range(0, K, block):
        stop = min(start + block, K)
        wanted = weight[start:stop] + share[:start, start:stop].T @ errors[:start]
        for j, k in enumerate(order[start:stop].tolist(), start):
            group = k // (format.group or K)
            numbers = scale[:, group, None], None if zero is None else zero[:, group, None]
            best = wanted[j - start] + share[start:j, j] @ errors[start:j]                  # (N,)
            integers[j] = to_integers(best[:, None], *numbers, column)[:, 0]
            errors[j] = weight[j] - from_integers(integers[j][:, None], *numbers)[:, 0].float()
    return integers[order.argsort()].T.contiguous(), scale, zero


def damped(products, damping):
    """H (K, K): products with a mean of 1 on the diagonal, and damping more.

    So what happened to be alike in the calibration text is relied on less. And R exists, even with fewer tokens than
    inputs: 0.01 is far more than what rounding can have done to the sums in float32. An input that was never seen
    shares nothing with others.
    """
    H = products / products.diagonal().mean().clamp(min=1e-30)
    H.diagonal().add_(damping)
    return H
