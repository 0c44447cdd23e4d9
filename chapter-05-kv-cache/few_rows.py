"""Matrix products with few rows, as decoding needs them: what counts is how fast the weights are read.

    python few_rows.py        (in this folder: GB/s of each way, beside what the memory gives)

A new token is one row: each weight is read from memory, used for one multiplication and one addition, and not needed again
before the next token. The arithmetic would be done in a fraction of the time that the reading takes. Libraries are made
for many rows. With one row in bfloat16, and with any number of them on a processor that has no bfloat16 arithmetic, what
nn.Linear calls can be many times slower than the memory.
"""
import time

import torch
import torch.nn.functional as F
from torch import nn

from errors import run
from flops import bandwidth_ceiling

# AVX-512 or AMX instructions for bfloat16. Without them a product of several rows is cheaper in float32, the conversion
# of the weights included.
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def linear(x, weight):
    """x (T, in) times weight (out, in), transposed: (T, out), by whichever call reads the weights fastest."""
    if x.is_cpu and weight.dtype == torch.bfloat16:
        if len(x) == 1:
            return torch.mv(weight, x[0])[None]   # a kernel of its own, made to read a matrix once
        if not HAS_BFLOAT16:
            return (x.float() @ weight.float().T).to(x.dtype)
    return F.linear(x, weight)


class FewRows(nn.Linear):
    """nn.Linear for generation; no gradients needed."""

    def forward(self, x):
        return linear(x, self.weight)


def for_few_rows(model):
    """Let a model's linear layers compute so. Same weights, same names; returns the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRows   # only the method changes, and nothing has to be copied
    return model


# ------------------------------------------------------------------------------------------------------ measuring

WAYS = {"nn.Linear": F.linear,
        "torch.mv, row by row": lambda x, weight: torch.stack([torch.mv(weight, row) for row in x]),
        "in float32, converted": lambda x, weight: (x.float() @ weight.float().T).to(x.dtype),
        "this chapter": linear}


def bytes_per_second(way, rows, weights):
    """Of reading the weights once, all of them together larger than any cache."""
    x, times = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype), []
    for _ in range(4):
        start = time.perf_counter()
        for weight in weights:
            way(x, weight)
        times.append(time.perf_counter() - start)
    return sum(weight.nbytes for weight in weights) / min(times)


def main():
    print(f"the memory gives {bandwidth_ceiling('cpu') / 1e9:.1f} GB/s (reading and writing together)\n")
    print(f"{'GB/s of weights, rows:':<36}" + "".join(f"{rows:>8}" for rows in (1, 2, 4, 16)))
    for dtype, number in ((torch.float32, 16), (torch.bfloat16, 32)):
        weights = [(torch.randn(3072, 1024) * 0.02).to(dtype) for _ in range(number)]
        for name, way in WAYS.items():
            print(f"{str(dtype).removeprefix('torch.'):<10}{name:<26}"
                  + "".join(f"{bytes_per_second(way, rows, weights) / 1e9:>8.2f}" for rows in (1, 2, 4, 16)), flush=True)


if __name__ == "__main__":
    run(main)
