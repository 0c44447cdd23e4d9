"""Qwen3 from raw nn.Module layers, on packed documents. Read from top to bottom: Attention, MLP, Block, Transformer.

Documents lie end to end in one row of T tokens: no batch dimension, no padding. The cumulative lengths cu_seqlens say
where each one begins and ends: documents of 3, 1 and 4 tokens give T = 8 and cu_seqlens = [0, 3, 4, 8].

Shape letters, used in every file of this chapter:
    T  tokens of all documents of a batch     D  hidden_size
    S  documents in the batch                 H  num_attention_heads
    V  vocab_size                             G  num_key_value_heads
                                              K  head_dim
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from attention import packed_attention
from cli import InputError
from custom_ops import RMSNormalize
from linear_cross_entropy import linear_cross_entropy
from parallel.experts import MoE, Routing
from parallel.mesh import ALONE
from precision import compute_dtype
from recompute import RUN


@dataclass
class ModelConfig:
    vocab_size: int = 1024
    hidden_size: int = 128
    # Width of the MLP, 3 * hidden_size; 8/3 would cost what GPT-2's MLP of width 4 does.
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2         # each serves num_attention_heads / num_key_value_heads query heads
    head_dim: int = 32                   # need not be hidden_size / num_attention_heads
    max_position_embeddings: int = 1024  # the longest document the model can see
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0         # base of the rotary wavelengths: the longer the documents, the larger
    tie_word_embeddings: bool = True
    eos_token_id: int | list | None = None   # for whoever generates from config.json alone: where to stop
    num_experts: int = 0                 # in every layer instead of its MLP (parallel/experts.py); 0: a dense model
    num_experts_per_tok: int = 2         # that work on each token
    moe_intermediate_size: int = 192     # width of one expert
    norm_topk_prob: bool = True          # whether their weights are made to sum to 1
    router_aux_loss_coef: float | int = 0.001   # of the loss that keeps experts equally busy; may be 0

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, (
            f"num_attention_heads {self.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {self.num_key_value_heads}")
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs"
        assert not self.num_experts or self.num_experts_per_tok <= self.num_experts, (
            f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}")


def qwen3(**sizes):
    """What all dense Qwen3 models have in common."""
    return ModelConfig(**{"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
                          "max_position_embeddings": 40960,
                          "rope_theta": 1_000_000.0} | sizes)


CONFIGS = {
    "small": ModelConfig(),
    "small-moe": ModelConfig(num_experts=8, router_aux_loss_coef=0.02),   # two experts are as much work as small's MLP
    "qwen3-0.6b": qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "qwen3-1.7b": qwen3(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "qwen3-4b": qwen3(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "qwen3-8b": qwen3(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                      tie_word_embeddings=False),
    "qwen3-14b": qwen3(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
                       tie_word_embeddings=False),
    "qwen3-32b": qwen3(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
                       tie_word_embeddings=False),
    "qwen3-30b-a3b": qwen3(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
                           num_key_value_heads=4, tie_word_embeddings=False, num_experts=128, num_experts_per_tok=8,
                           moe_intermediate_size=768),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) * weight: LayerNorm without mean and bias (Zhang & Sennrich 2019). At work: nn.RMSNorm."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # Cast here, once: autocast would do it anew for each matrix product that reads this.
        return RMSNormalize.apply(x, self.weight, self.eps).to(compute_dtype(x))


def rotary_angles(position_ids, head_dim, theta, dtype):
    """cos and sin of the angle by which each pair of dimensions turns at each position, each (T, 1, K/2).

    Pair i turns by theta^(-2i/K) radians a token: the first like a second hand, the last hardly at all in a document.
    """
    frequencies = 1 / theta ** (torch.arange(0, head_dim, 2, device=position_ids.device) / head_dim)   # (K/2,)
    # In float32 whatever the model's dtype: bfloat16 cannot even count to 300.
    angles = position_ids[:, None, None].float() * frequencies                          # (T, 1, K/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (T, H or G, K) (Su et al. 2021).

    Turn a query by m steps and a key by n, and m and n enter their dot product as m - n only: attention sees distances.
    A pair is one dimension of the first half and its twin of the second, not two neighbours as in the paper. Both work,
    but weights trained with one are useless with the other.
    """
    a, b = x.chunk(2, dim=-1)                                                           # (T, H, K/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)                    # (T, H, K)


class Attention(nn.Module):
    """Grouped-query causal self-attention: several query heads share one key and value head (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        # After these, how large a score can get depends on two learned vectors only, not on every weight before them.
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, rotary, attend):
        """x (T, D); rotary: cos and sin of rotary_angles; attend(q, k, v): attention of this batch, see Transformer."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, G, K)
        # Norm first, then rotation. Afterwards the norm's weights would scale dimensions that the rotation has mixed.
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        mixed = attend(q, k, v)                                                         # (T, H, K)
        return self.o_proj(mixed.flatten(-2))                                           # (T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): one branch decides by how much the other one counts. Each position thinks for itself."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = nn.SiLU()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. x + f(norm(x)), twice: the sum leaves gradients an unobstructed path to the first layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, MLP) if config.num_experts else MLP(config)

    def forward(self, x, rotary, attend, *routing):
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        x = x + self.mlp(self.post_attention_layernorm(x), *routing)
        return x


class Transformer(nn.Module):
    """Token ids in, a score for every possible next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mesh = ALONE             # until parallel.mesh.label gives it another
        self.checkpointing = "none"   # or "full" or "selective", see recompute.py
        self.precision = "fp32"       # in which numbers train.py lets it compute, see precision.py
        self.loss = linear_cross_entropy   # of x (T, D), the head's weight and targets
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            # One table reads tokens and scores them (Press & Wolf 2017): V * D parameters saved.
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self):
        """GPT-2's initialization: N(0, 0.02), the layers that write into the residual stream scaled down by its depth.

        One change: the token table begins at 1 / sqrt(D), so that a token's row has length 1 at any width. With 0.02 it
        would be short at our width and the first hundred steps would only grow it; a short run ends visibly better so.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            elif name == "model.embed_tokens.weight":
                nn.init.normal_(parameter, std=self.config.hidden_size ** -0.5)
            elif "norm" not in name:   # RMSNorm weights stay at 1
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, targets=None, cache=None, attend=None):
        """input_ids (T,) -> logits (T, V): at each position, scores for the token that comes next.

        With targets (T,) instead the nats over all of them, a scalar, and the logits are never held whole.

        With a cache (kv_cache.py) the documents are sequences that go on: these tokens are their new ones, and
        position_ids count on from where they were. Returns the logits of each one's last token only, (S, V).

        attend: attend(q, k, v) of documents spread over several devices (parallel/context.py); a cache has its own.
        position_ids (T,): each token's place in its document, from 0. cu_seqlens (S+1,) int32 and max_seqlen: where the
        documents lie, see packed_attention. Raises InputError if they do not fit together; on a GPU the values of
        cu_seqlens are not looked at, and of position_ids never more than the shape.
        """
        if not torch.compiler.is_compiling():   # to look at values would interrupt the compiled program
            check_packing(input_ids, position_ids, cu_seqlens, max_seqlen)
        assert max_seqlen <= self.config.max_position_embeddings, (
            f"{max_seqlen} tokens do not fit into {self.config.max_position_embeddings} positions")
        x = self.model.embed_tokens(input_ids)                                          # (T, D)
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, compute_dtype(x))
        routing = [Routing(position_ids >= 0)] if self.config.num_experts else []   # -1 where data.fill fills up
        attend = attend or partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        for i, layer in enumerate(self.model.layers):
            if cache is not None:
                attend = cache.layers[i].attend
            x = RUN[self.checkpointing](layer, x, rotary, attend, *routing)
        for pack in routing:
            pack.sum_up()
        if cache is not None:
            x = x[cu_seqlens[1:] - 1]                                                   # (S, D)
        x = self.model.norm(x)                                                          # (T, D), with a cache (S, D)
        if targets is not None:
            return self.loss(x, self.lm_head.weight, targets)
        return self.lm_head(x)                                                          # (T, V)

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())   # a tied table is counted once


def check_packing(input_ids, position_ids, cu_seqlens, max_seqlen):
    """A wrong cu_seqlens is no error by itself: documents would quietly read each other. So look, where it is cheap."""
    if input_ids.dim() != 1 or position_ids.shape != input_ids.shape:
        raise InputError(f"input_ids is {tuple(input_ids.shape)} and position_ids {tuple(position_ids.shape)};"
                         " both must be (T,)")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise InputError(f"cu_seqlens is {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}; it must be (S+1,), torch.int32")
    if not cu_seqlens.is_cpu or isinstance(cu_seqlens, FakeTensor):
        return   # to read it here, the program would have to wait for the GPU, in every step; a fake has no values
    T, lengths = len(input_ids), cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T:
        raise InputError(f"cu_seqlens goes from {cu_seqlens[0]} to {cu_seqlens[-1]}; it must go from 0 to T = {T}")
    if lengths.min() < 1:
        raise InputError(f"cu_seqlens does not increase: document {lengths.argmin()} has {lengths.min()} tokens")
    if lengths.max() != max_seqlen:
        raise InputError(f"max_seqlen is {max_seqlen}, but the longest document has {lengths.max()} tokens")
