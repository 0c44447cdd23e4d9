"""Two operators with their gradients written out: attention within each document, and RMSNorm.

Chapter 2 left this to autograd: about a dozen nodes for each stack of equal documents, about fifteen stacks in each
layer. torch.compile cannot follow that: a loop whose length depends on the batch would have to be compiled anew for
every batch. A custom operator is opaque: one node for autograd, one call for the compiler, whatever happens inside.

RMSNorm needs nothing of the kind, the compiler can follow it. But autograd, which knows no formula, only steps, goes
over its input about thirty times and keeps two tensors for it. On paper the gradient is short.

T, H, G, K: as in model.py.
"""
from pathlib import Path

import torch

# Operators are registered by name, in every chapter another.
CHAPTER = Path(__file__).resolve().parent.name.replace("-", "_")

# What scaled_dot_product_attention calls on a CPU. Called directly, because the way back needs what they return besides
# the result: for each row of scores the logarithm of the sum of exp(scores).
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def stacks(cu_seqlens, *tensors):
    """Neighbours of equal length stack into a rectangle without padding and without copying.

    Yields views (documents, heads, length, K) of the tensors (T, heads, K), stack after stack. The fewer the better:
    training_packs sorts the documents of a pack by length.
    """
    lengths, counts = cu_seqlens.diff().unique_consecutive(return_counts=True)
    start = 0
    for n, length in zip(counts.tolist(), lengths.tolist()):
        # as_strided: one call for each view instead of a split, an unflatten and a transpose
        yield [x.as_strided((n, x.shape[1], length, x.shape[2]),
                            (length * x.stride(0), x.stride(1), x.stride(0), x.stride(2)),
                            x.storage_offset() + start * x.stride(0)) for x in tensors]
        start += n * length


@torch.library.custom_op(f"{CHAPTER}::grouped_attention", mutates_args=())
def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                      cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Causal attention within each document, sum(length^2) work: [(T, H, K), log of the sum of each row (T, H, 1)]."""
    out, log_sums = torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
    for *qkv, o, l in stacks(cu_seqlens, q, k, v, out, log_sums):
        mixed, sums = flash(*qkv, is_causal=True)
        o.copy_(mixed)
        l.copy_(sums[..., None])
    return [out, log_sums]


@torch.library.custom_op(f"{CHAPTER}::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                               log_sums: torch.Tensor, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of q, k and v."""
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for g, *qkv, o, l, dq, dk, dv in stacks(cu_seqlens, dy, q, k, v, out, log_sums, *grads):
        for target, source in zip((dq, dk, dv), flash_backward(g, *qkv, o, l.squeeze(-1).contiguous(), 0.0, True)):
            target.copy_(source)
    return grads


# What the compiler has to know: the shapes of the results.
grouped_attention.register_fake(
    lambda q, k, v, cu_seqlens: [torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)])
grouped_attention_backward.register_fake(
    lambda dy, q, k, v, out, log_sums, cu_seqlens: [torch.empty_like(x) for x in (q, k, v)])


def save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def backward(ctx, grads):
    return *grouped_attention_backward(grads[0], *ctx.saved_tensors), None


grouped_attention.register_autograd(backward, setup_context=save_for_backward)


# ------------------------------------------------------------------------------------------------------------ RMSNorm

class RMSNormalize(torch.autograd.Function):
    """weight * y with y = x / sqrt(mean(x^2) + eps), over the last dimension.

    y does not change with the length of x. So of the gradient that reaches y, the part along y itself is taken away,
    and what is left is divided by x's length as x was: dx = (dy - y * mean(dy * y)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()   # in bfloat16 the factor would be off by up to half a percent, for all dimensions alike
        factor = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = (y * factor).to(x.dtype)
        ctx.save_for_backward(y, weight, factor)
        return weight * y

    @staticmethod
    def backward(ctx, dout):
        y, weight, factor = ctx.saved_tensors
        dy = (dout * weight).float()
        along = (dy * y).mean(-1, keepdim=True)
        dx = dy.addcmul(y, along, value=-1) * factor
        return dx.to(y.dtype), (dout * y).flatten(0, -2).sum(0), None
