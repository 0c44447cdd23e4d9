"""Matrix products with few rows, as decoding needs them: what counts is how fast the weights are read.

    python small_batch_matmul.py        (in this folder: GB/s of each way, beside what the memory gives)

A new token is one row: each weight is read from memory, used for one multiplication and one addition, and not needed
again before the next token. With sixteen texts there are sixteen rows, and still nearly all of the time should go into
reading. Libraries are made for hundreds of rows. On a CPU with a few of them what nn.Linear calls is several times
slower than the memory. Two cures: to ask for the same product in another order or dtype, which needs nothing but torch;
and small_batch_matmul.cpp, a page of C++ that reads the weights as fast as the memory gives them. It is used where
for_small_batches(model, use_kernel=True) asks for it. At work, on a GPU: leave it to torch.compile, whose matrix
products for one row do the same.
"""
import contextlib
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout   # torch stands on it, so it is there
from torch import nn
from torch.utils import cpp_extension

from cli import InputError, run
from compiler import NEEDED, check_compiler
from custom_ops import CHAPTER
from flops import read_ceiling
from results import write_results

# AVX-512 or AMX instructions for bfloat16. Without them a product of several rows is cheaper in float32, the conversion
# of the weights included.
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
FEW = 32   # rows up to which the kernel is faster than a library that is made for many


def weights_first(x, weight):
    """(weight x^T)^T instead of x weight^T: the same sums, but the library cuts the long side of the weights into
    tiles.
    """
    return (weight @ x.T).T.contiguous()


def in_float32(x, weight):
    return weights_first(x.float(), weight.float()).to(x.dtype)


def linear(x, weight):
    """x (T, in), weight (out, in) -> x weight^T (T, out), by the call of torch that reads the weights fastest."""
    if x.is_cpu and weight.dtype == torch.float32:
        return weights_first(x, weight)
    # For one row, or two, torch has a kernel that needs no such instructions.
    if x.is_cpu and not HAS_BFLOAT16 and len(x) > 2:
        return in_float32(x, weight)
    return F.linear(x, weight)


@contextlib.contextmanager
def alone_in(folder):
    """Of several processes that compile into a folder one works, and the others wait.

    This lock ends with its process.
    """
    lock = FileLock(folder / "compiling")
    try:
        held = lock.acquire(timeout=2)
    except Timeout:
        print(f"waiting for another process that compiles the same; it holds {lock.lock_file}", file=sys.stderr)
        held = lock.acquire()
    with held:
        yield


@functools.cache
def kernel():
    """small_batch_matmul.cpp as an operator; compiled when it is first needed, which takes some ten seconds, and kept
    on disk.
    """
    name = f"{CHAPTER}_small_batch"
    check_compiler("cpu")
    # Where ninja is: the library looks on the path only.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    try:
        folder = Path(cpp_extension._get_build_directory(name, False))
        with alone_in(folder):
            # The library's own, which outlives a compilation that was killed.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(name, [str(Path(__file__).parent / "small_batch_matmul.cpp")], is_python_module=False,
                               extra_cflags=["-O3", "-march=native", "-ffast-math", "-fopenmp", f"-DLIBRARY={CHAPTER}"],
                               extra_ldflags=["-fopenmp"])
    except OSError as error:
        raise InputError(f"small_batch_matmul.cpp cannot be compiled in {error.filename}: {error.strerror};"
                         " TORCH_EXTENSIONS_DIR=DIR in the environment chooses another folder") from None
    except (RuntimeError, subprocess.CalledProcessError) as error:
        problem = next((line for line in str(error).splitlines()[1:] if "rror" in line), error)
        raise InputError(f"small_batch_matmul.cpp cannot be compiled by {os.environ['CXX']} ({problem}); it needs"
                         f" {NEEDED}; without --compile it is not used") from None
    # What torch.compile has to know: the shape of the result.
    torch.library.register_fake(f"{CHAPTER}::small_batch_matmul")(lambda x, weight: x.new_empty(len(x), len(weight)))
    return getattr(torch.ops, CHAPTER).small_batch_matmul.default


class FewRows(nn.Linear):
    """nn.Linear without bias, for generation; no gradients needed."""

    def forward(self, x):
        return linear(x, self.weight)


class FewRowsByKernel(nn.Linear):
    def forward(self, x):
        return self.product(x, self.weight) if len(x) <= FEW else linear(x, self.weight)


def for_small_batches(model, use_kernel=False):
    """Let a model's linear layers use the products above. Same weights, same names; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fits = (module.in_features % 64 == 0 and module.out_features % 4 == 0 and module.weight.is_cpu
                    and module.weight.dtype in (torch.float32, torch.bfloat16))
            # Only the method changes, and nothing has to be copied.
            module.__class__ = FewRows
            if use_kernel and fits:
                module.__class__, module.product = FewRowsByKernel, kernel()
    return model


# ------------------------------------------------------------------------------------------------------ measuring

ROWS = (1, 2, 4, 8, 16, 64)


def bytes_per_second(way, rows, weights):
    """Of reading all the weights once. Together they are larger than any cache."""
    x, times = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype), []
    for _ in range(8):
        start = time.perf_counter()
        for weight in weights:
            way(x, weight)
        times.append(time.perf_counter() - start)
    return sum(weight.nbytes for weight in weights) / min(times)


def main():
    ceiling, table = read_ceiling("cpu"), []
    ways = {"nn.Linear": F.linear, "weights first": weights_first, "weights first, in float32": in_float32,
            "small_batch_matmul.cpp": kernel()}
    print(f"reading alone: {ceiling / 1e9:.1f} GB/s\n\n{'GB/s of weights; rows:':<36}"
          + "".join(f"{rows:>7}" for rows in ROWS))
    for dtype, number in ((torch.float32, 16), (torch.bfloat16, 32)):
        weights = [(torch.randn(3072, 1024) * 0.02).to(dtype) for _ in range(number)]   # of Qwen3 0.6B's MLP
        for name, way in ways.items():
            if name == "weights first, in float32" and dtype == torch.float32:
                continue
            row = {"dtype": str(dtype).removeprefix("torch."), "way": name}
            row |= {str(rows): bytes_per_second(way, rows, weights) / 1e9 for rows in ROWS}
            print(f"{row['dtype']:<10}{name:<26}" + "".join(f"{row[str(rows)]:>7.1f}" for rows in ROWS), flush=True)
            table.append(row)
    table.append({"dtype": "", "way": "reading alone"} | {str(rows): ceiling / 1e9 for rows in ROWS})
    columns = {"dtype": "dtype", "way": "GB/s of weights"} | {str(rows): f"{rows} rows" for rows in ROWS}
    command = f"python {Path(__file__).resolve().parent.name}/small_batch_matmul.py"
    print(write_results("small_batch_matmul", command, columns, table))


if __name__ == "__main__":
    run(main)
