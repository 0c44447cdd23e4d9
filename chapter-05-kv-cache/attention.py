"""Attention within packed documents, for model.py: which kernel computes it, and where.

On a GPU varlen_attn, one kernel for all documents. Elsewhere scaled_dot_product_attention, one call for each document
length.
Shapes and letters: as in model.py.
"""
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from custom_ops import grouped_attention, stacks

# torch 2.11 does not know grouped queries yet.
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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


def packed_attention(q, k, v, cu_seqlens, max_seqlen):
    """softmax(Q K^T / sqrt(K)) V within each document, every token looking at itself and those before it.

    q (T, H, K); k and v (T, G, K): query head h reads key-value head h // (H / G). cu_seqlens (S+1,) int32: document i
    is tokens cu_seqlens[i] to cu_seqlens[i+1] - 1. max_seqlen: the length of the longest one. Returns (T, H, K).

    Chapter 1 wrote the formula out; here it is left to the library's fused kernels (Dao et al. 2022), which never hold
    the matrix of scores in memory.
    """
    if varlen_obstacle(v.device, v.dtype) is None:
        q, k = q.to(v.dtype), k.to(v.dtype)   # under autocast the norms return float32
        if not VARLEN_GQA:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))      # (T, H, K)
        # window_size: any number of tokens to the left, none to the right. That is causal.
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **VARLEN_GQA)
    if v.is_cpu:
        return grouped_attention(q, k, v, cu_seqlens)[0]
    return torch.cat([
        F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
        for qkv in stacks(cu_seqlens, q, k, v)])
