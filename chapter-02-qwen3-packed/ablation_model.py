"""A transformer with a switch for each choice that ablations.py asks about: between chapter 1's GPT and this chapter's
Qwen3, and beside it.

model.py has none of these switches and is the one to read. Here are its parts again with the alternatives beside them,
under the same parameter names. With every switch as it is this is the model of model.py; with the ladder's first rung
(ablations.py) it is chapter 1's: tests/test_ablations.py compares logits and gradients. Shapes and letters: as in
model.py.
"""
import math
import random
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attention import group_by_length, packed_attention
from model import ModelConfig, RMSNorm, check_packing, rotary_angles, rotate

ACTIVATIONS = {"swiglu": F.silu, "gelu": partial(F.gelu, approximate="tanh"),
               "squared relu": lambda x: F.relu(x).square()}   # So et al. 2021


@dataclass
class AblationConfig(ModelConfig):
    norm: str = "rms"                 # or "layer", with its bias
    mlp: str = "swiglu"               # or "gelu", "squared relu": two matrices, no gate
    positions: str = "rotary"         # or "learned", "none"
    qk_norm: bool = True
    bias: bool = False                # of the linear layers
    table_std: float | None = None    # of the token table at the start; None: 1 / sqrt(D)
    dropout: float = 0.0              # of the embedding and of what each layer adds to it
    logit_cap: float | None = None    # logits go through cap * tanh(logits / cap) (Gemma 2)
    bigram_rows: int = 0              # rows of a second table, looked up by a token and the one before it


def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads,
                                                                 config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rotary, attend):
        """rotary: cos and sin, or None where positions are not rotary."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))              # (T, H, K)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))              # (T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, G, K)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.o_proj(attend(q, k, v).flatten(-2))                                 # (T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.act_fn = ACTIVATIONS[config.mlp]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        # Not on attention's weights, where chapter 1 has it too: packed_attention never holds them.
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, attend):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, attend))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class AblationTransformer(nn.Module):
    """seed: of the initial weights. A weight's values depend on the seed, its name and its shape alone, so two variants
    begin with the same weights wherever they have them in common."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=make_norm(config),
        ))
        if config.positions == "learned":
            self.model["embed_positions"] = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.bigram_rows:
            self.model["embed_bigrams"] = nn.Embedding(config.bigram_rows, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.init_weights(seed)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed):
        """As model.py and chapter 1 have it; the table of bigrams begins at zero, that is, without a word to say."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
            elif name == "model.embed_tokens.weight":
                std = self.config.table_std or self.config.hidden_size ** -0.5
            elif name.endswith("bias") or "bigrams" in name:
                std = 0.0
            elif "norm" in name:   # its weight stays at 1
                continue
            else:
                std = 0.02
            own = torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(32))
            nn.init.normal_(parameter, std=std, generator=own)

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen):
        """As the Transformer of model.py: input_ids (T,) -> logits (T, V)."""
        check_packing(input_ids, position_ids, cu_seqlens, max_seqlen)
        x = self.model.embed_tokens(input_ids)                                          # (T, D)
        if self.config.bigram_rows:
            x = x + self.model.embed_bigrams(hash_bigrams(input_ids, position_ids, self.config.bigram_rows))
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(position_ids)
        x, rotary = self.dropout(x), None
        if self.config.positions == "rotary":
            rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        attend = partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
                         groups=group_by_length(cu_seqlens))
        for layer in self.model.layers:
            x = layer(x, rotary, attend)
        logits = self.lm_head(self.model.norm(x))                                       # (T, V)
        if self.config.logit_cap:
            logits = self.config.logit_cap * torch.tanh(logits / self.config.logit_cap)
        return logits

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())   # a tied table is counted once


def hash_bigrams(input_ids, position_ids, rows):
    """(T,) row numbers of each token with the one before it in its document; the first has none before it."""
    before = torch.where(position_ids == 0, 0, input_ids.roll(1) + 1)
    return (before * 1_000_003 + input_ids * 8191) % rows
