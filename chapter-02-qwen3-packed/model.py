"""Qwen3 from raw nn.Module layers, on packed documents. Read from top to bottom: Attention, MLP, Block, Transformer.

Documents lie end to end in one row of T tokens: no batch dimension, no padding. The cumulative lengths cu_seqlens say
where each one begins and ends: documents of 3, 1 and 4 tokens give T = 8 and cu_seqlens = [0, 3, 4, 8].

Shape letters, used in every file of this chapter:
    T  tokens of all documents of a batch     D  hidden_size
    S  documents in the batch                 H  num_attention_heads
    V  vocab_size                             G  num_key_value_heads
                                              K  head_dim
"""
import inspect
import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from errors import InputError


@dataclass
class ModelConfig:
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384         # width of the MLP, 3 * hidden_size; 8/3 would cost what GPT-2's MLP of width 4 does
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2         # each serves num_attention_heads / num_key_value_heads query heads
    head_dim: int = 32                   # need not be hidden_size / num_attention_heads
    max_position_embeddings: int = 1024  # the longest document the model can see
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0         # base of the rotary wavelengths: the longer the documents, the larger
    tie_word_embeddings: bool = True
    eos_token_id: int | list | None = None   # for whoever generates from config.json alone: where to stop

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, (
            f"num_attention_heads {self.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {self.num_key_value_heads}")
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs"


def qwen3(**sizes):
    """What all dense Qwen3 models have in common."""
    return ModelConfig(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                       rope_theta=1_000_000.0, **sizes)


CONFIGS = {
    "small": ModelConfig(),
    "qwen3-0.6b": qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "qwen3-1.7b": qwen3(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "qwen3-4b": qwen3(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "qwen3-8b": qwen3(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                      tie_word_embeddings=False),
    "qwen3-14b": qwen3(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
                       tie_word_embeddings=False),
    "qwen3-32b": qwen3(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
                       tie_word_embeddings=False),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) * weight: LayerNorm without mean and bias (Zhang & Sennrich 2019). At work: nn.RMSNorm."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()   # in bfloat16 the factor would be off by up to half a percent, for all dimensions alike
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


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

    def forward(self, x, rotary, packing):
        """x (T, D); rotary: cos and sin of rotary_angles; packing: what packed_attention needs besides q, k and v."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                           # (T, G, K)
        # Norm first, then rotation. Afterwards the norm's weights would scale dimensions that the rotation has mixed.
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        mixed = packed_attention(q, k, v, *packing)                                     # (T, H, K)
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
        self.mlp = MLP(config)

    def forward(self, x, rotary, packing):
        x = x + self.self_attn(self.input_layernorm(x), rotary, packing)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Transformer(nn.Module):
    """Token ids in, a score for every possible next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
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

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen):
        """input_ids (T,) -> logits (T, V): at each position, scores for the token that comes next.

        position_ids (T,): each token's place in its document, from 0. cu_seqlens (S+1,) int32 and max_seqlen: where the
        documents lie, see packed_attention. Raises InputError if they do not fit together; on a GPU the values of
        cu_seqlens are not looked at, and of position_ids never more than the shape.
        """
        check_packing(input_ids, position_ids, cu_seqlens, max_seqlen)
        assert max_seqlen <= self.config.max_position_embeddings, (
            f"{max_seqlen} tokens do not fit into {self.config.max_position_embeddings} positions")
        x = self.model.embed_tokens(input_ids)                                          # (T, D)
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        # The stacks depend on the documents' lengths alone: planned here once for all layers.
        groups = None if varlen_obstacle(x.device, x.dtype) is None else group_by_length(cu_seqlens)
        for layer in self.model.layers:
            x = layer(x, rotary, (cu_seqlens, max_seqlen, groups))
        return self.lm_head(self.model.norm(x))                                         # (T, V)

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())   # a tied table is counted once

    def flops_per_token(self, cu_seqlens):
        """Training FLOPs for one token, the mean over a packed batch (Kaplan et al. 2020; PaLM, appendix B).

        A weight costs one multiplication and one addition forward and twice that backward: 6. Tables that are only
        looked up cost nothing. Q K^T and weights V cost 2 * 2 * L * H * K forward in each layer, for a token of a
        document of length L: 12 * L * H * K with backward. A document has L such tokens, so the mean L is sum(L^2) / T.
        This is the full count, as if every token looked at its whole document; causal attention needs half of it.
        """
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.dim() == 2]
        weights = sum(matrix.numel() for matrix in matrices) + self.lm_head.weight.numel()
        mean_length = cu_seqlens.diff().long().square().sum().item() / cu_seqlens[-1].item()
        width = self.config.num_attention_heads * self.config.head_dim
        return 6 * weights + 12 * self.config.num_hidden_layers * mean_length * width


def check_packing(input_ids, position_ids, cu_seqlens, max_seqlen):
    """A wrong cu_seqlens is no error by itself: documents would quietly read each other. So look, where it is cheap."""
    if input_ids.dim() != 1 or position_ids.shape != input_ids.shape:
        raise InputError(f"input_ids is {tuple(input_ids.shape)} and position_ids {tuple(position_ids.shape)};"
                         " both must be (T,)")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise InputError(f"cu_seqlens is {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}; it must be (S+1,), torch.int32")
    if not cu_seqlens.is_cpu:
        return   # to read it here, the program would have to wait for the GPU, in every step
    T, lengths = len(input_ids), cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T:
        raise InputError(f"cu_seqlens goes from {cu_seqlens[0]} to {cu_seqlens[-1]}; it must go from 0 to T = {T}")
    if lengths.min() < 1:
        raise InputError(f"cu_seqlens does not increase: document {lengths.argmin()} has {lengths.min()} tokens")
    if lengths.max() != max_seqlen:
        raise InputError(f"max_seqlen is {max_seqlen}, but the longest document has {lengths.max()} tokens")


# ------------------------------------------------------------------------------------------------ checkpoints

# A name on the Hugging Face hub can get new content at any time; a revision cannot. Give others as "name@revision".
REVISIONS = {
    "Qwen/Qwen3-0.6B": "c1899de289a04d12100db370d81485cdf75e47ca",
    "Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
    "Qwen/Qwen3-4B": "1cfa9a7208912126459214e8b04321603b3df60c",
    "Qwen/Qwen3-8B": "b968826d9c46dd6066d109eabc6255188de91218",
    "Qwen/Qwen3-14B": "40c069824f4251a91eefaf281ebe4c544efd3e18",
    "Qwen/Qwen3-32B": "9216db5781bf21249d130ec9da846c4624c16137",
}
# Settings of config.json that change what a Qwen3 computes, and the only value of each that this model knows.
SUPPORTED = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
             "use_sliding_window": False}


def checkpoint_folder(dir_or_hub_id):
    """The folder of a checkpoint: the given one, or where the hub's files are kept after a download."""
    if Path(dir_or_hub_id).is_dir():
        return Path(dir_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(dir_or_hub_id)):
        raise InputError(f"{dir_or_hub_id} is neither a folder nor a Hugging Face name such as Qwen/Qwen3-0.6B;"
                         f" to make a folder: python {Path(__file__).parent.name}/train.py")
    name, _, revision = str(dir_or_hub_id).partition("@")
    huggingface_hub.logging.set_verbosity_error()   # one error at the end, not a warning at each attempt
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or REVISIONS.get(name),
                                                      allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
    except (OSError, ValueError) as error:   # among them the hub's own: no such name, no such revision, no network
        raise InputError(f"there is no folder {dir_or_hub_id}, and the Hugging Face hub does not give {name} either"
                         f" ({str(error).splitlines()[0]}); without network, give a folder") from None


def read_config(path):
    """config.json, as transformers 4 or 5 writes it, -> ModelConfig. Raises InputError for what this model is not."""
    try:
        saved = json.loads(path.read_text())
        ropes = [dict(saved.get(key) or {}) for key in ("rope_scaling", "rope_parameters")]   # transformers 4, 5, or one added to the other
        found = {"model_type": None, "rope_theta": (ropes[0] | ropes[1]).get("rope_theta"), "eos_token_id": None} | saved
        found |= {"rope_type": {rope.get("rope_type", rope.get("type", "default")) for rope in ropes},
                  "layer_types": set(saved.get("layer_types") or ()) | {"full_attention"}}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a configuration: {error}") from None
    known = SUPPORTED | {"rope_type": {"default"}, "layer_types": {"full_attention"}, "quantization_config": None}
    for key, value in known.items():
        if found.get(key, value) != value:
            raise InputError(f"{path}: {key} is {found[key]!r}; this chapter's model knows only {value!r}")
    for field in fields(ModelConfig):
        value = found.get(field.name)
        is_number = field.type in (int, float) and type(value) in (int, field.type) and 0 < value < 2 ** 31
        if not is_number and (field.type in (int, float) or not isinstance(value, field.type)):
            raise InputError(f"{path}: {field.name} is missing, of the wrong kind, not above zero or too large: {value!r}")
    try:
        return ModelConfig(**{field.name: found[field.name] for field in fields(ModelConfig)})
    except (AssertionError, ZeroDivisionError) as error:
        raise InputError(f"{path}: {error}") from None


def tensor_files(folder):
    """{name of a tensor: the file that holds it}, for one model.safetensors or an index of several files."""
    index = folder / "model.safetensors.index.json"
    path = folder / "model.safetensors"   # where there are both, the single file counts, as in transformers
    path = index if index.is_file() and not path.is_file() else path
    try:
        if path == index:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with open(path, "rb"), safe_open(path, framework="pt") as file:   # safe_open calls missing what we are not allowed to read
            return dict.fromkeys(file.keys(), path)
    except FileNotFoundError:
        raise InputError(f"{folder} has neither model.safetensors nor {index.name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_tensor(path, name, device, dtype):
    """One tensor of a safetensors file, copied out of it.

    A file that is open is mapped into memory, and what has been read of it stays there. Closing it after each tensor is
    what keeps the peak at the size of the model instead of twice that.
    """
    try:
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise InputError(f"{path}: {name} is {tensor.dtype}; this model computes with 16 bits or more, no integers")
            tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file, {name} cannot be read: {error}") from None
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():   # no mask as large as the tensor
        raise InputError(f"{path}: {name} holds nan or inf: its training diverged, or the file is damaged")
    return tensor


def load_pretrained(dir_or_hub_id, device="cpu", dtype=None):
    """A checkpoint folder or a name on the Hugging Face hub -> Transformer, in the file's dtype unless one is given.

    Raises InputError that names what differs: another architecture, missing or unknown tensors, wrong shapes.
    """
    folder = checkpoint_folder(dir_or_hub_id)
    with torch.device("meta"):   # shapes without memory; the file's tensors then take the place of the model's own
        model = Transformer(read_config(folder / "config.json"))
    expected, files = model.state_dict(), tensor_files(folder)
    head = None
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head = files.pop("lm_head.weight", None)   # Qwen's own files hold the tied table twice
    for what, names in {"missing": expected.keys() - files.keys(), "unknown": files.keys() - expected.keys()}.items():
        if names:
            raise InputError(f"{folder}: {len(names)} {what} tensors, the first is {min(names)}")
    table = "model.embed_tokens.weight"
    if head and not torch.equal(read_tensor(head, "lm_head.weight", device, dtype),
                                read_tensor(files[table], table, device, dtype)):
        raise InputError(f"{head}: lm_head.weight is not {table}, but config.json says tie_word_embeddings")
    weights = {}
    for name in expected:
        weight = weights[name] = read_tensor(files[name], name, device, dtype)
        dtype = dtype or weight.dtype   # one for all: that of the first
        if weight.shape != expected[name].shape:
            raise InputError(f"{files[name]}: {name} is {tuple(weight.shape)},"
                             f" config.json says {tuple(expected[name].shape)}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def save_pretrained(model, folder, remarks={}):
    """Write config.json and model.safetensors, a folder that load_pretrained and transformers open.

    remarks: {name: text} to keep in the header of model.safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]   # the same table as embed_tokens: stored once
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", **remarks})
    config = {"architectures": ["Qwen3ForCausalLM"], **SUPPORTED, **asdict(model.config)}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": model.config.rope_theta}   # for transformers 5
    config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")   # safetensors lets nobody but the owner read it
