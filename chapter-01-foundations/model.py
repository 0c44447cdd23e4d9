"""A GPT from raw nn.Module layers, in the classical (GPT-2) form. Read from top to bottom: Attention, MLP, Block,
Transformer.

Shape letters, used in every file of this chapter:
    B  batch: documents side by side          D  hidden_size
    L  length of the longest of them          H  num_attention_heads
    V  vocab_size                             K  head_dim = D / H
"""
import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class ModelConfig:
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512         # width of the MLP, by custom 4 * hidden_size
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 64    # the longest sequence the model can see
    pad_token_id: int | None = None      # the filler that makes documents of a batch equally long; None: there is none
    dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        assert self.hidden_size % self.num_attention_heads == 0, (
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")


CONFIGS = {
    "small": ModelConfig(),
    "gpt2-124m": ModelConfig(
        vocab_size=50257, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=1024, dropout=0.1),
}


class Attention(nn.Module):
    """Multi-head causal self-attention, softmax(Q K^T / sqrt(K)) V written out (Vaswani et al. 2017)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask):
        """x (B, L, D); mask, broadcastable to (B, H, L, L), is True where a query (row) may look at a key (column)."""
        B, L, D = x.shape
        # Every head is a slice of the projection; moving H in front of L lets one matmul serve all heads.
        q = self.q_proj(x).view(B, L, self.num_heads, self.head_dim).transpose(1, 2)   # (B, H, L, K)
        k = self.k_proj(x).view(B, L, self.num_heads, self.head_dim).transpose(1, 2)   # (B, H, L, K)
        v = self.v_proj(x).view(B, L, self.num_heads, self.head_dim).transpose(1, 2)   # (B, H, L, K)

        # Dot products of K independent terms have variance K; dividing by sqrt(K) keeps the softmax out of saturation.
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)                     # (B, H, L, L)
        # Mask before the softmax, not after: a weight zeroed afterwards has already taken its share of the sum,
        # and through that share a later token would leak into an earlier one.
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = self.dropout(scores.softmax(dim=-1))
        mixed = weights @ v                                                             # (B, H, L, K)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, L, D))                      # (B, L, D)


class MLP(nn.Module):
    """Two linear layers around a GELU: each position thinks for itself."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = nn.GELU(approximate="tanh")   # the tanh form is GPT-2's own
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Block(nn.Module):
    """One layer. x + f(norm(x)), twice: the sum leaves gradients an unobstructed path to the first layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class Transformer(nn.Module):
    """Token ids in, a score for every possible next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            embed_positions=nn.Embedding(config.max_position_embeddings, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=nn.LayerNorm(config.hidden_size),
        ))
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_word_embeddings:
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
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "model.embed_tokens.weight":
                nn.init.normal_(parameter, std=self.config.hidden_size ** -0.5)
            elif "norm" not in name:   # LayerNorm weights stay at 1
                nn.init.normal_(parameter, std=0.02)

    def attention_mask(self, input_ids):
        """True where a query may look at a key: at or before itself, and not at padding. Returns (B, 1, L, L)."""
        L = input_ids.shape[1]
        causal = torch.ones(L, L, dtype=torch.bool, device=input_ids.device).tril()    # (L, L), row = query
        if self.config.pad_token_id is None:
            return causal[None, None]                                                   # (1, 1, L, L)
        is_token = input_ids != self.config.pad_token_id                                # (B, L)
        # A query always sees itself, padding included: a row with nothing to look at would be 0/0 = nan.
        itself = torch.eye(L, dtype=torch.bool, device=input_ids.device)
        return (causal & (is_token[:, None, :] | itself))[:, None]                      # (B, 1, L, L)

    def forward(self, input_ids):
        """input_ids (B, L) -> logits (B, L, V): at each position, scores for the token that comes next."""
        L = input_ids.shape[1]
        assert L <= self.config.max_position_embeddings, (
            f"{L} tokens do not fit into {self.config.max_position_embeddings} positions")
        positions = torch.arange(L, device=input_ids.device)
        x = self.model.embed_tokens(input_ids) + self.model.embed_positions(positions)  # (B, L, D)
        x = self.dropout(x)
        mask = self.attention_mask(input_ids)
        for layer in self.model.layers:
            x = layer(x, mask)
        return self.lm_head(self.model.norm(x))                                         # (B, L, V)

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())   # a tied table is counted once

    def flops_per_position(self, L):
        """Training FLOPs for one position of a sequence of L (Kaplan et al. 2020; PaLM, appendix B).

        A weight costs one multiplication and one addition forward and twice that backward: 6. Tables that are only
        looked up cost nothing. Q K^T and weights V cost 2 * 2 * L * D forward in each layer: 12 * L * D with backward.
        """
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.dim() == 2]
        weights = sum(matrix.numel() for matrix in matrices) + self.lm_head.weight.numel()
        return 6 * weights + 12 * self.config.num_hidden_layers * L * self.config.hidden_size
