"""Tensor parallel: every rank has a part of every matrix, and all work on the same tokens.

    torchrun --nproc_per_node 2 train.py --tp 2        (in this folder)

Take two matrices with something in between that looks at each number for itself: y = f(x A) B, as in an MLP. Give each
rank some columns of A. It then has those columns of x A, whole, and of f(x A) too: nobody had to ask anybody. Those
columns meet the same rows of B only, and what comes out has y's full shape, but is one term of it:

    y = f(x [A1 A2]) [B1] = f(x A1) B1 + f(x A2) B2
                     [B2]

One sum over the ranks for two matrices. Any other choice pays for each: cut A by rows, and x A has to be summed before
f. Attention is such a pair as well. What lies between q, k, v and o works on each head for itself, so a rank has whole
heads. (nn.Linear keeps a matrix transposed: the columns of A are rows of gate_proj.weight, dim 0, and the rows of B dim
1.)

On the way back it is the same picture from the other side: y's gradient is everyone's, x's gradient is a sum of what
each rank found. So each pair lies between two collectives that are each other's conjugates (parallel/mesh.py):

    plain                x -> Copy   -> pair -> Reduce  -> y    an all-reduce each way (Shoeybi et al. 2019)
    sequence parallel    x -> Gather -> pair -> Scatter -> y    all-gather, reduce-scatter each way (Korthikanti 2022)

An all-reduce is a reduce-scatter and an all-gather, so both send the same bytes. But between the pairs, where there are
only norms and sums, "plain" has every rank hold and compute the same for all tokens. Sequence parallel cuts the tokens
instead, and what is kept there for the gradients shrinks to 1 / n. That is why it is the default. (What Gather brings
is kept whole for the weights' gradients: two tensors (T, D) a layer. Megatron-LM gathers it again on the way back.)

The table of tokens is cut by rows, over the vocabulary, and the scores of the words that a rank has never leave it.

At work: parallelize_module, see split_with_torch.

Shape letters as in model.py; n: ranks of the group; T: tokens of the pack (with context parallelism, of the rank's part
of it).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel,
                                               parallelize_module)

from cli import InputError
from data import IGNORE
from linear_cross_entropy import CHUNK
from parallel.mesh import Copy, Gather, Reduce, Scatter, cut
from precision import compute_dtype


def check(config, size):
    """Raises InputError if a model cannot be cut into that many equal parts, and says which numbers can."""
    widths = {"query heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads,
              "columns of the MLP": config.intermediate_size}
    fits = [str(n) for n in range(1, min(widths.values()) + 1) if all(width % n == 0 for width in widths.values())]
    for what, width in widths.items():
        if width % size:
            raise InputError(f"--tp {size}: {width} {what} cannot be dealt to {size} ranks in equal parts;"
                             f" this model can be cut with --tp {' or '.join(fits)}")


def column_parallel(linear, group):
    """Keep this rank's part of what a linear layer puts out."""
    length = linear.weight.shape[0] // group.size
    linear.weight = cut(linear.weight, 0, group.rank * length, length)
    linear.out_features = length


def row_parallel(linear, group):
    """Keep what belongs to this rank's part of a linear layer's input.

    The output is then one term of a sum over the ranks.
    """
    length = linear.weight.shape[1] // group.size
    linear.weight = cut(linear.weight, 1, group.rank * length, length)
    linear.in_features = length


class TensorParallel(nn.Module):
    """A pair, attention or MLP, between its two collectives. x (T, D), with sequence parallelism (T/n, D), and so the
    result.
    """

    def __init__(self, inner, group, sequence):
        super().__init__()
        self.inner, self.group = inner, group
        self.enter, self.leave = (Gather, Scatter) if sequence else (Copy, Reduce)

    def forward(self, x, *rest):
        x = self.enter.apply(x, self.group)                                             # (T, D)
        return self.leave.apply(self.inner(x, *rest), self.group)                       # (T, D) or (T/n, D)


def vocabulary_part(size, group):
    """(first, last + 1) of the words of this rank: parts as equal as can be, for no vocabulary asks how many ranks
    there are.
    """
    return size * group.rank // group.size, size * (group.rank + 1) // group.size


class VocabParallelEmbedding(nn.Module):
    """A table of which this rank has some rows.

    Finds those tokens and has zeros for the others; the sum over ranks has all.
    """

    def __init__(self, embedding, group, sequence):
        super().__init__()
        self.group, self.leave = group, Scatter if sequence else Reduce
        self.first, last = vocabulary_part(len(embedding.weight), group)
        self.weight = cut(embedding.weight, 0, self.first, last - self.first)

    def forward(self, input_ids):
        """input_ids (T,) -> (T, D), with sequence parallelism this rank's (T/n, D)."""
        rows = input_ids - self.first
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)                    # (T, D)
        return self.leave.apply(x.masked_fill(elsewhere[:, None], 0), self.group)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy.py over a table that is cut by rows: in chunks, gradients made on the way forward.

    A softmax over all words needs three numbers of each rank and token: the highest of its scores, the sum of its
    exp(score - highest), and the right word's score from the one that has it. From these everyone knows all of it:

        M = max of the highest        sum = sum of sums * exp(highest - M)        nats = log(sum) + M - score

    So 12 bytes a token and rank are sent instead of 4 V / n, all in one message for each chunk of tokens: messages that
    small cost what a message costs, whatever is in it. (Maximum first, then sum and score, would be two all-reduces.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, first, group, with_gradients):
        low = weight.to(x.dtype)                                                        # (V/n, D)
        exact = torch.float32 if x.dtype == torch.float16 else x.dtype   # both as in linear_cross_entropy.py
        nats = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=exact) if with_gradients else None
        dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, exact)) if with_gradients else None
        for start in range(0, len(x), CHUNK):
            chunk, right = x[start:start + CHUNK], targets[start:start + CHUNK, None]   # (C, D), (C, 1)
            counts = right != IGNORE
            row = right - first
            here = (row >= 0) & (row < len(weight))
            row = row.clamp(0, len(weight) - 1)   # an index; what is not here is not counted here
            logits = (chunk @ low.mT).float()                                           # (C, V/n)
            top, score = logits.amax(-1, keepdim=True), logits.gather(-1, row) * here   # (C, 1) each
            sums = logits.sub_(top).exp_().sum(-1, keepdim=True)                        # (C, 1)
            of_all = group.all_gather(torch.stack([top, sums, score])).unflatten(0, (-1, 3))   # (n, 3, C, 1)
            tops, sums, scores = of_all.unbind(1)                                       # (n, C, 1) each
            highest = tops.amax(0)                                                      # (C, 1)
            sums = (sums * (tops - highest).exp()).sum(0)                               # (C, 1)
            nats += ((sums.log() + highest - scores.sum(0)) * counts).sum()
            if with_gradients:
                # softmax - one_hot. logits are relative to this rank's highest score, sums to that of all.
                logits.mul_((top - highest).exp() / sums * counts).scatter_add_(-1, row, -(counts & here).float())
                logits = logits.to(exact)
                dx[start:start + CHUNK] = logits @ low.to(exact)
                if dweight.dtype == exact:
                    dweight.addmm_(logits.mT, chunk.to(exact))
                else:
                    dweight += logits.mT @ chunk
            del logits
        if with_gradients:
            ctx.save_for_backward(dx, dweight)
            ctx.dtypes = x.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx, dnats):
        """dx is what this rank's words make of it, one term of a sum: whoever gave x has to take the sum, see below."""
        dx, dweight = ctx.saved_tensors
        dweight.mul_(dnats)
        return (dx * dnats).to(ctx.dtypes[0]), dweight.to(ctx.dtypes[1]), None, None, None, None


class VocabParallelLoss:
    """In the place of linear_cross_entropy in a model: loss(x, weight, targets) -> nats over all targets, the same on
    each rank.

    x (T, D), with sequence parallelism (T/n, D); weight: this rank's words, (V/n, D), the first of which is number
    `first` of size.
    """

    def __init__(self, first, size, group, sequence):
        self.first, self.size, self.group, self.enter = first, size, group, Gather if sequence else Copy

    def __call__(self, x, weight, targets):
        # A target that is no word at all each rank would take for another's. Without memory and without waiting for a
        # GPU:
        F.nll_loss(x.new_zeros(1).expand(len(targets), self.size), targets, ignore_index=IGNORE, reduction="none")
        x, with_gradients = self.enter.apply(x.to(compute_dtype(x)), self.group), torch.is_grad_enabled()   # (T, D)
        with torch.autocast(x.device.type, enabled=False):
            return VocabParallelCrossEntropy.apply(x, weight, targets, self.first, self.group, with_gradients)


def split(model, mesh, sequence=True):
    """Cut a whole model, labelled by parallel.mesh.label, in place: this rank keeps its part. sequence: cut also the
    tokens between.

    The norms stay whole on all ranks. But q_norm and k_norm see this rank's heads only, and the others, with sequence,
    its tokens only; so of their gradients each rank finds one term of a sum. They are marked piece.partial, for
    sum_partial.
    """
    group = mesh.tp
    if group.size == 1:
        return
    check(model.config, group.size)
    partial = [model.model.norm] if sequence else []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            column_parallel(linear, group)
        for linear in (attention.o_proj, mlp.down_proj):
            row_parallel(linear, group)
        layer.self_attn, layer.mlp = TensorParallel(attention, group, sequence), TensorParallel(mlp, group, sequence)
        partial += [attention.q_norm, attention.k_norm]
        partial += [layer.input_layernorm, layer.post_attention_layernorm] if sequence else []
    for norm in partial:
        norm.weight.piece.partial = True
    model.model.embed_tokens = VocabParallelEmbedding(model.model.embed_tokens, group, sequence)
    size = len(model.lm_head.weight)
    first, last = vocabulary_part(size, group)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = cut(model.lm_head.weight, 0, first, last - first)
    model.tie_weights()
    model.loss = VocabParallelLoss(first, size, group, sequence)


@torch.no_grad()
def sum_partial(parameters, mesh):
    """After backward: sum the gradients that each rank of tp has only a part of.

    They are small, so all in one message.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.piece.partial and parameter.grad is not None]
    if mesh.tp.size > 1 and gradients:
        flat = mesh.tp.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def bytes_sent(config, T, size, sequence=True, width=4):
    """Bytes that a rank sends over tp for one pack of T tokens, forward and backward, and for sum_partial once after
    it.

    width: bytes of a number within the layers, 4 or under autocast 2. Without checkpointing; "full" goes forward twice.
    """
    stream = T * config.hidden_size
    layers = 8 * config.num_hidden_layers * stream * width   # two pairs; each way an all-reduce, which counts twice
    table = 2 * stream * 4                                   # the embedding, in the weights' own float32
    loss = 2 * stream * width + size * 3 * T * 4             # its x, and the three numbers of each rank
    norms = 2 * config.num_hidden_layers * config.head_dim
    if sequence:
        norms += (2 * config.num_hidden_layers + 1) * config.hidden_size
    return (layers + table + loss + 2 * norms * 4) * (size - 1) // size


# ------------------------------------------------------------------------------------------------------------- at work

def split_with_torch(model, device_mesh):
    """The same plan, sequence parallel, by torch's own engine. device_mesh: of one dimension. Cuts a whole model in
    place.

    Every parameter becomes a DTensor: one tensor, of which each rank has a part, and which knows how it is cut. What
    Piece and sum_partial do above it does by itself: the gradients of the norms come out as Partial, and whoever reads
    them, the optimizer or clip_grad_norm_, gets the sum. full_tensor() puts one together.
    """
    tokens, all_tokens = Shard(0), Replicate()
    others = None, None   # what attention is given besides x is no tensor that is cut
    # Named for one use: it is any dimension that is cut.
    heads = SequenceParallel(sequence_dim=1, use_local_output=True)
    norm = SequenceParallel(sequence_dim=0, use_local_output=True)
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=tokens)
    layer = {
        "input_layernorm": norm, "post_attention_layernorm": norm,
        "self_attn": PrepareModuleInput(input_layouts=(tokens, *others), desired_input_layouts=(all_tokens, *others)),
        "self_attn.q_proj": column, "self_attn.k_proj": column, "self_attn.v_proj": column, "self_attn.o_proj": row,
        "self_attn.q_norm": heads, "self_attn.k_norm": heads,
        "mlp": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=all_tokens),
        "mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row}
    parallelize_module(model, device_mesh, {
        "model.embed_tokens": RowwiseParallel(input_layouts=all_tokens, output_layouts=tokens),
        "model.norm": SequenceParallel(sequence_dim=0),
        "lm_head": ColwiseParallel(), **{f"model.layers.*.{name}": style for name, style in layer.items()}})
    model.tie_weights()   # each of the two got a new parameter

    def loss(x, weight, targets):
        # Gathers the logits. Inside of `with loss_parallel():` cross_entropy does without, and so must backward() be.
        logits = F.linear(x.redistribute(placements=[all_tokens]), weight)               # (T, V), cut by words
        return F.cross_entropy(logits.full_tensor().float(), targets, ignore_index=IGNORE, reduction="sum")
    model.loss = loss
