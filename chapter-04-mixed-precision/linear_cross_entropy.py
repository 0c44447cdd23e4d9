"""The loss without the logits: softmax, loss and both gradients for a few tokens at a time.

    python linear_cross_entropy.py        (in this folder: equality, memory and time of three ways)

At Qwen3's vocabulary the logits of 4,096 tokens are 2.5 GB, and plain PyTorch holds three such tensors: logits, their
log-softmax, and their gradient. Nobody needs them whole. A chunk of tokens has its loss, the gradient of that loss with
respect to its logits is softmax - one_hot, and once that has been multiplied into the two gradients that are wanted,
the chunk can go. It has to be done on the way forward, while the logits are there; the way back only scales.

At work: torch.nn.functional.linear_cross_entropy (torch 2.13), which works in chunks where it is given options and
holds all logits where it is not, or Liger's kernel on a GPU (Hsu et al. 2024).

T, D, V: as in model.py; C: tokens of a chunk.
"""
import time

import torch
import torch.nn.functional as F

from cli import run
from data import IGNORE
from memory_counter import Held
from precision import compute_dtype

CHUNK = 256   # tokens. Fewer save little more, and the matrix products become too thin to be fast


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        # Under autocast x is bfloat16 and the weight, which must remember small steps, float32.
        low = weight.to(x.dtype)
        # float16 would lose softmax / V; where x is float16 the gradients are made in float32.
        exact = torch.float32 if x.dtype == torch.float16 else x.dtype
        nats = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=exact) if with_gradients else None
        dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, exact)) if with_gradients else None
        for start in range(0, len(x), CHUNK):
            chunk, right = x[start:start + CHUNK], targets[start:start + CHUNK, None]    # (C, D), (C, 1)
            counts = right != IGNORE
            logits = (chunk @ low.mT).float()                                            # (C, V)
            logits.sub_(logits.amax(-1, keepdim=True))   # as in chapter 1's softmax.py, and in the logits' own memory
            # Where F.cross_entropy raises, so does this: after the clamp below any negative target would be word 0.
            scores = -F.nll_loss(logits, right[:, 0], ignore_index=IGNORE, reduction="none")[:, None]   # (C, 1)
            right = right.clamp(min=0)   # an index; what stands there is not counted
            sums = logits.exp_().sum(-1, keepdim=True)                                   # (C, 1)
            nats += ((sums.log() - scores) * counts).sum()
            if with_gradients:
                # Their gradient, softmax - one_hot. What does not count is divided by sum / 0, and that makes it 0.
                logits.div_(sums / counts).scatter_add_(-1, right, -counts.float())
                logits = logits.to(exact)
                dx[start:start + CHUNK] = logits @ low.to(exact)
                if dweight.dtype == exact:
                    dweight.addmm_(logits.mT, chunk.to(exact))   # no (V, D) besides
                else:
                    dweight += logits.mT @ chunk
            del logits   # or it would live beside the next chunk's
        if with_gradients:
            ctx.save_for_backward(dx, dweight)
            ctx.dtypes = x.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx, dnats):
        dx, dweight = ctx.saved_tensors
        dweight.mul_(dnats)   # in place: at scale it is half a gigabyte
        return (dx * dnats).to(ctx.dtypes[0]), dweight.to(ctx.dtypes[1]), None, None


def linear_cross_entropy(x, weight, targets):
    """Nats over all targets, a scalar: cross_entropy(x @ weight.T, targets, ignore_index=IGNORE, reduction="sum").

    x (T, D), weight (V, D), targets (T,). Holds (C, V) numbers instead of (T, V). Raises IndexError where a target
    is neither a row of weight nor IGNORE; on a GPU, which nobody waits for here, that ends the program.
    """
    # Inside the function autograd is always off; whether anybody wants gradients has to be asked here.
    x, with_gradients = x.to(compute_dtype(x)), torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):   # it would cast what is float32 on purpose
        return LinearCrossEntropy.apply(x, weight, targets, with_gradients)


# ------------------------------------------------------------------------------------------------ three ways compared

def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORE, reduction="sum")


def library(x, weight, targets):
    options = torch.nn.LinearCrossEntropyOptions()   # without any it makes all logits
    return F.linear_cross_entropy(x, weight, targets, ignore_index=IGNORE, reduction="sum", options=options)


def measure(loss_of, x, weight, targets):
    """(loss, its gradients, most MiB that torch held besides the inputs, seconds)."""
    with Held() as held:
        loss = loss_of(x, weight, targets)
        gradients = torch.autograd.grad(loss, (x, weight))
    start = time.perf_counter()
    torch.autograd.grad(loss_of(x, weight, targets), (x, weight))
    return loss.detach(), gradients, held.peak / 2 ** 20, time.perf_counter() - start


def main():
    T, D, V = 2048, 256, 32768
    torch.manual_seed(0)
    x, weight = torch.randn(T, D, requires_grad=True), (0.02 * torch.randn(V, D)).requires_grad_()
    targets = torch.randint(V, (T,))
    targets[::7] = IGNORE
    print(f"{T:,} tokens, {D} dimensions, {V:,} words: the logits are {T * V * 4 / 2 ** 20:,.0f} MiB,"
          f" the two gradients {(T + V) * D * 4 / 2 ** 20:,.0f} MiB\n")
    expected = None
    for name, loss_of in {"plain": plain, "in chunks, by hand": linear_cross_entropy,
                          "F.linear_cross_entropy": library}.items():
        if name.startswith("F.") and not hasattr(F, "linear_cross_entropy"):
            print(f"{name:<26} needs torch 2.13")
            continue
        loss, gradients, peak, seconds = measure(loss_of, x, weight, targets)
        expected = expected or (loss, gradients)
        worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(gradients, expected[1]))
        print(f"{name:<26}{loss.item():>14.3f} nats   {peak:>7,.0f} MiB   {seconds:>6.2f} s   gradients differ by"
              f" {worst:.1e}")
        assert worst < 1e-4 and (loss - expected[0]).abs() < 1e-5 * expected[0], f"{name} is not equal: {worst}"


if __name__ == "__main__":
    run(main)
