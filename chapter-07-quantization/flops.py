"""What a training step has to do, counted on paper, and what this machine can do, measured: FLOPs, bytes, ceilings.

    python flops.py                        the small model and this machine   (in this folder)
    python flops.py --config qwen3-0.6b --batch-tokens 4096

A step cannot be faster than its arithmetic at the machine's best rate, nor than its memory traffic at the machine's
best bandwidth. Which of the two binds is what a roofline shows (Williams et al. 2009). The share of the first limit
that a step reaches is its model FLOPs utilization, MFU (Chowdhery et al. 2022, appendix B).

The counts come from the configuration and cu_seqlens alone; tests/test_profiling.py holds them against torch's own
counter.
"""
import functools
import time

import torch

from cli import ArgumentParser, positive, run
from device import device_name
from model import CONFIGS


# ------------------------------------------------------------------------------------------------ counted on paper

def weights(config, experts=None):
    """Numbers in the matrices that every token is multiplied with: {"linear": all layers together, "head": the last}.

    experts: how many of each layer count; None: as many as work on a token.
    """
    D, K = config.hidden_size, config.head_dim
    attention = 2 * D * K * (config.num_attention_heads + config.num_key_value_heads)   # q and o; k and v
    mlp = 3 * D * config.intermediate_size                                              # gate, up, down
    if config.num_experts:
        # The router.
        mlp = 3 * D * config.moe_intermediate_size * (experts or config.num_experts_per_tok) + D * config.num_experts
    return {"linear": config.num_hidden_layers * (attention + mlp), "head": config.vocab_size * D}


def step_flops(config, cu_seqlens):
    """FLOPs of one training step: {part: (forward, backward)}. The full count: as if attention were not causal.

    A weight multiplies and adds once for each token forward, and twice backward: for the gradient of its input and for
    its own. A pair of tokens of one document meets twice in each head forward, in Q K^T and in weights V; backward,
    four times.
    """
    T, pairs = cu_seqlens[-1].item(), cu_seqlens.diff().long().square().sum().item()
    forward = {part: 2 * T * number for part, number in weights(config).items()}
    forward["attention"] = 4 * pairs * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return {part: (flops, 2 * flops) for part, flops in forward.items()}


def total_flops(config, cu_seqlens):
    """FLOPs of one training step."""
    return sum(map(sum, step_flops(config, cu_seqlens).values()))


def num_parameters(config):
    """All that the optimizer updates, norms included; a tied head is counted once."""
    norms = config.num_hidden_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return weights(config, config.num_experts)["linear"] + norms + tables


def step_bytes(config, T, size=4):
    """Bytes a step must move if nothing that follows each other is fused: {part: bytes}. size: bytes of a number.

    Matrices: each product reads its two inputs and writes its result. Elementwise: every tensor that a norm, a
    rotation, the gate, a sum or the loss reads or writes, each as often as plain PyTorch does. The optimizer reads
    weight, gradient and two moments and writes three of them.
    """
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    H, G, V, N = config.num_attention_heads, config.num_key_value_heads, config.vocab_size, config.num_hidden_layers
    matrices = [(D, H * K), (D, G * K), (D, G * K), (H * K, D), (D, F), (D, F), (F, D)] * N + [(D, V)]
    matmul = sum(3 * (a * b + T * (a + b)) for a, b in matrices)      # forward, and two products backward
    # Of experts all are read, whoever works on a token.
    matmul += 3 * (weights(config, config.num_experts)["linear"] - weights(config)["linear"])
    # Passes over a tensor of the given width, forward and backward together, reads and writes: see the README.
    norm, rotation, gate, residual = 22, 20, 12, 6
    elementwise = N * T * (norm * (2 * D + (H + G) * K) + rotation * (H + G) * K + gate * F + 2 * residual * D)
    loss = 10 * T * V
    return {"matmul": size * matmul, "norms and elementwise": size * elementwise, "loss": size * loss,
            "optimizer": 4 * 7 * num_parameters(config)}


# ------------------------------------------------------------------------------------------------------- measured

def best_time(work, device, seconds=0.3):
    """Seconds of the fastest of several runs: the ceiling is what the machine can do, not what it did on average."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()   # or the clock measures how fast Python can ask
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def gemm_ceiling(device, dtype):
    """FLOP/s of a large matrix multiplication, the best that this machine does with torch."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / best_time(lambda: a @ b, device)


@functools.cache
def bandwidth_ceiling(device):
    """Bytes/s of copying a tensor that no cache holds: read and written."""
    a = torch.zeros(64 * 2 ** 20, device=device)   # 256 MiB
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_time(lambda: b.copy_(a), device)


def read_ceiling(device):
    """Bytes/s of reading a tensor that no cache holds: a sum of all its elements."""
    a = torch.zeros(64 * 2 ** 20, device=device)   # 256 MiB
    return a.nbytes / best_time(a.sum, device)


def main():
    parser = ArgumentParser(description="Count a training step on paper and measure this machine's ceilings.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="tokens per step")
    parser.add_argument("--length", type=positive(int), default=64, metavar="L", help="tokens of each document")
    arguments = parser.parse_args()
    config, T = CONFIGS[arguments.config], arguments.batch_tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens = torch.tensor([*range(0, T, arguments.length), T], dtype=torch.int32)

    print(f"{device_name(device)}: ceilings")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        print(f"    matrix multiplication, {name:<10}{gemm_ceiling(device, dtype) / 1e9:>12,.0f} GFLOP/s")
    print(f"    memory, copied            {bandwidth_ceiling(device) / 1e9:>12,.1f} GB/s\n")
    print(f"one step of {arguments.config}, {T:,} tokens in documents of {arguments.length}"
          f"{'':<8}GFLOPs    at the ceiling, ms")
    for part, flops in step_flops(config, cu_seqlens).items():
        print(f"    {part:<24}{sum(flops) / 1e9:>40.3f}{sum(flops) / gemm_ceiling(device, torch.float32) * 1e3:>18.2f}")
    print(f"    {'':<24}{'MB moved':>40}")
    for part, size in step_bytes(config, T).items():
        print(f"    {part:<24}{size / 1e6:>40.1f}{size / bandwidth_ceiling(device) * 1e3:>18.2f}")


if __name__ == "__main__":
    run(main)
