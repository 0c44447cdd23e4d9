"""Attention within packed documents, for model.py: which kernel computes it, and where.

On a GPU varlen_attn, one kernel for all documents. Elsewhere scaled_dot_product_attention, one call for each document
length.
Shapes and letters: as in model.py.
"""
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 does not know grouped queries yet.
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def compute_dtype(device):
    """float32, but where varlen_attn can run: it knows no float32. What that changes is told in chapter 4."""
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def varlen_obstacle(device, dtype):
    """Why varlen_attn cannot serve here, or None if it can."""
    if device.type != "cuda":
        return "varlen_attn needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "varlen_attn needs an Ampere GPU or newer"
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"


def attention_path(device, dtype):
    """Which way packed_attention takes and why, in one line."""
    obstacle = varlen_obstacle(torch.device(device), dtype)
    if obstacle is None:
        return "attention by varlen_attn, one kernel for all documents"
    return f"attention by scaled_dot_product_attention, one call for each document length ({obstacle})"


def group_by_length(cu_seqlens):
    """Documents of equal length stack into a rectangle without any padding. This plans the stacks of a batch.

    Returns (shapes, order, back): the (documents, length) of each stack; the token that each place of the stacks takes,
    stack after stack (T,); and the place where each token went (T,).
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    stacks = [starts[lengths == length, None] + torch.arange(length, device=cu_seqlens.device)   # (documents, length)
              for length in lengths.unique().tolist()]
    order = torch.cat([stack.flatten() for stack in stacks])
    return [stack.shape for stack in stacks], order, order.argsort()


def grouped_attention(q, k, v, groups):
    """Causal attention within each document, one library call for each stack of group_by_length: sum(length^2) work."""
    shapes, order, back = groups
    sizes = [shape.numel() for shape in shapes]
    # index_select, not q[order]: on several threads the backward pass of the latter takes far longer.
    q, k, v = (x.index_select(0, order).split(sizes) for x in (q, k, v))
    mixed = []
    for shape, *stack in zip(shapes, q, k, v):
        stack = [x.unflatten(0, shape).transpose(1, 2) for x in stack]                  # (documents, H or G, length, K)
        out = F.scaled_dot_product_attention(*stack, is_causal=True, enable_gqa=True)
        mixed.append(out.transpose(1, 2).flatten(0, 1))                                 # (documents * length, H, K)
    return torch.cat(mixed).index_select(0, back)                                       # (T, H, K)


def packed_attention(q, k, v, cu_seqlens, max_seqlen, groups=None):
    """softmax(Q K^T / sqrt(K)) V within each document, every token looking at itself and those before it.

    q (T, H, K); k and v (T, G, K): query head h reads key-value head h // (H / G). cu_seqlens (S+1,) int32: document i
    is tokens cu_seqlens[i] to cu_seqlens[i+1] - 1. max_seqlen: the length of the longest one. groups: what
    group_by_length(cu_seqlens) returns, where it is known already. Returns (T, H, K).

    Chapter 1 wrote the formula out; here it is left to the library's fused kernels (Dao et al. 2022), which never hold
    the matrix of scores in memory.
    """
    if varlen_obstacle(v.device, v.dtype) is None:
        q, k = q.to(v.dtype), k.to(v.dtype)   # under autocast the norms return float32
        if not VARLEN_GQA:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))      # (T, H, K)
        # window_size: any number of tokens to the left, none to the right. That is causal.
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **VARLEN_GQA)
    return grouped_attention(q, k, v, groups or group_by_length(cu_seqlens))
