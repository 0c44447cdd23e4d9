"""Context parallelism: the tokens of a pack are spread over the ranks of mesh.cp, and only attention has to know.
Why: what a layer leaves behind for its gradient grows with the tokens, and a document of a million fits on no device.
Norms, MLP, embedding and loss look at one token at a time: each rank computes its own. In attention a token looks at
all those before it in its document, wherever they are. Two ways to let it:

Ring attention (Liu et al. 2023). Each rank keeps its queries; keys and values travel round a ring. With n ranks that
takes n - 1 journeys, and while a rank computes with what it has, the next keys and values are on their way. Partial
results are merged by the logarithms of their sums of exp(score), as FlashAttention merges its tiles. On the way back
keys and values travel once more, and their gradients travel with them until they arrive at home.

Ulysses (Jacobs et al. 2023). One all-to-all turns "some tokens, all heads" into "all tokens, some heads", attention is
the ordinary one, and another all-to-all turns its result back.

Who has which tokens: the pack is cut into 2n equal chunks, and rank r has chunks r and 2n - 1 - r. Late tokens look at
more than early ones. With an early and a late chunk each, all ranks have the same to do in every step of the ring, if
the pack is one long document. Several documents are not balanced exactly, see the picture: sorted by length, as
training_packs() hands them out, long ones meet short ones; in another order the cut can make it worse than no cut.

What makes the ring short for packed documents: they lie end to end, so of two different chunks at most ONE document has
tokens in both, the one that goes over the end of the earlier chunk and reaches the later one. All its keys in the
earlier chunk are older than all its queries in the later: a full rectangle, without mask.

Shapes: as in model.py; T: the tokens of one rank, unless something is said.
"""
from bisect import bisect_right

import torch
import torch.nn.functional as F

from attention import packed_attention
from cli import InputError
from custom_ops import flash, flash_backward, stacks
from data import PackedBatch
from parallel.mesh import AllToAll


# ------------------------------------------------------------------------------------------------ who has which tokens

def chunks(tokens, cp, rank, how="zigzag"):
    """[(start, end), ...] of the tokens of a pack that a rank has."""
    assert tokens % (2 * cp) == 0, f"{tokens} tokens do not divide into 2 * {cp} chunks"
    size = tokens // (2 * cp)
    numbers = (rank, 2 * cp - 1 - rank) if how == "zigzag" else (2 * rank, 2 * rank + 1)
    return [(number * size, (number + 1) * size) for number in numbers]


def places(tokens, cp, rank, how="zigzag"):
    """Where in the pack the tokens of a rank are, (T,)."""
    return torch.cat([torch.arange(start, end) for start, end in chunks(tokens, cp, rank, how)])


def pieces(cu_seqlens, cp, rank):
    """cu_seqlens of what a rank has of the documents: cut at the ends of its chunks, each piece like a document of its
    own.
    """
    lengths = [cu_seqlens.clamp(start, end).unique().diff() for start, end in chunks(cu_seqlens[-1].item(), cp, rank)]
    return F.pad(torch.cat(lengths).cumsum(0, dtype=torch.int32), (1, 0))


def split(batch, group):
    """This rank's part of a PackedBatch. Its position_ids are those of the whole: a piece need not begin at 0."""
    here = places(len(batch.input_ids), group.size, group.rank)
    cu_seqlens = pieces(batch.cu_seqlens, group.size, group.rank)
    return PackedBatch(batch.input_ids[here], batch.targets[here], batch.position_ids[here], cu_seqlens,
                       cu_seqlens.diff().max().item())


def balance(cu_seqlens, cp, how="zigzag"):
    """Pairs of a query and a key that each rank has to compute, for how = "contiguous" or "zigzag"."""
    # A token: at itself too.
    looks_at = torch.cat([torch.arange(1, length + 1) for length in cu_seqlens.diff().tolist()])
    return [looks_at[places(len(looks_at), cp, rank, how)].sum().item() for rank in range(cp)]


# ------------------------------------------------------------------------------------- attention of a block, any device
#
# q (n, H, L, K); k and v (n, G, M, K) -> (n, H, L, K) and the log of the sum of exp of each row of scores (n, H, L),
# float32. On a CPU FlashAttention's operators. Elsewhere the formula, which holds the scores of a block in memory:
# right on any device, and slow. (PyTorch's fused kernels for CUDA return the same two things; their calls differ by
# version.)

def attention(q, k, v, causal):
    return flash(q, k, v, is_causal=causal) if q.is_cpu else plain_attention(q, k, v, causal)


def attention_backward(dy, q, k, v, out, log_sums, causal):
    """The parts of dq, dk and dv that belong to this block. out and log_sums are those of the whole row, not of the
    block.

    With them exp(score - log_sum) is a weight of the final softmax, whichever block it is in: nothing needs to be
    merged.
    """
    if q.is_cpu:
        return flash_backward(dy, q, k, v, out, log_sums.contiguous(), 0.0, causal)
    return plain_backward(dy, q, k, v, out, log_sums, causal)


def plain_scores(q, k, causal):
    """(n, G, H/G, L, M)."""
    scores = q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -torch.inf) if causal else scores


def plain_attention(q, k, v, causal):
    with torch.autocast(q.device.type, enabled=False):   # it would take the products in half precision again
        scores = plain_scores(q.float(), k.float(), causal)
        log_sums = scores.logsumexp(-1, keepdim=True)
        out = (scores - log_sums).exp() @ v.float().unsqueeze(2)                        # (n, G, H/G, L, K)
    return out.flatten(1, 2).to(q.dtype), log_sums.flatten(1, 2).squeeze(-1)


def plain_backward(dy, q, k, v, out, log_sums, causal):
    with torch.autocast(q.device.type, enabled=False):
        G, scale = k.shape[1], q.shape[-1] ** -0.5
        q, k, v, dy, out = (x.float() for x in (q, k, v, dy, out))
        weights = (plain_scores(q, k, causal) - log_sums.unflatten(1, (G, -1)).unsqueeze(-1)).exp()
        q, dy, out = (x.unflatten(1, (G, -1)) for x in (q, dy, out))                    # (n, G, H/G, L, K)
        along = (dy * out).sum(-1, keepdim=True)
        dscores = weights * (dy @ v.unsqueeze(2).transpose(-1, -2) - along) * scale     # (n, G, H/G, L, M)
        dq, dk, dv = dscores @ k.unsqueeze(2), dscores.mT @ q, weights.mT @ dy
    return dq.flatten(1, 2), dk.sum(2), dv.sum(2)   # a key serves H/G heads: the sum over them


# ------------------------------------------------------------------------------------------------------- ring attention

def rectangles(cu_seqlens, cp, rank, source):
    """Queries of `rank` that look at keys of `source` in an earlier chunk: [(rows, columns), ...], slices of their
    tokens.
    """
    bounds, found = cu_seqlens.tolist(), []
    size = bounds[-1] // (2 * cp)
    for i, (first_row, _) in enumerate(chunks(bounds[-1], cp, rank)):
        for j, (first_column, border) in enumerate(chunks(bounds[-1], cp, source)):
            document = bisect_right(bounds, border - 1)   # that of the last key
            start, end = bounds[document - 1], bounds[document]
            # The keys' chunk is the earlier one, and the document goes on into the other.
            if border <= first_row < end:
                found.append((slice(i * size, i * size + min(end - first_row, size)),
                              slice(j * size + max(start - first_column, 0), (j + 1) * size)))
    return found


def send_on(x, group):
    """Begin one journey: x to the next rank, and the previous one's to here. Returns a function that waits for that."""
    return group.exchange(x, to=(group.rank + 1) % group.size, source=(group.rank - 1) % group.size)


def travel(x, group):
    """Yields this rank's x, then that of the rank before it, and so on.

    While the caller uses one, the next is on its way.
    """
    for _ in range(group.size - 1):
        coming = send_on(x, group)
        yield x
        x = coming()
    yield x


def blocks(step, plan, of_queries, of_keys):
    """The blocks of one step of the ring: causal or not, and views (n, heads, tokens, K) of what is given as (T, heads,
    K).
    """
    cu_seqlens, others = plan
    if step == 0:   # its own keys: within each piece the ordinary causal attention
        for views in stacks(cu_seqlens, *of_queries, *of_keys):
            yield True, *views
    for rows, columns in others[step]:
        views = [x[rows] for x in of_queries] + [x[columns] for x in of_keys]
        yield False, *(x.transpose(0, 1).unsqueeze(0) for x in views)


class RingAttention(torch.autograd.Function):
    """q (T, H, K), k and v (T, G, K) of this rank -> (T, H, K). plan: see ring()."""

    @staticmethod
    def forward(ctx, q, k, v, plan, group):
        out = q.new_zeros(q.shape, dtype=torch.float32)
        log_sums = q.new_full((*q.shape[:2], 1), -torch.inf, dtype=torch.float32)
        for step, kv in enumerate(travel(torch.stack([k, v]), group)):                  # (2, T, G, K)
            for causal, rows, o, l, *columns in blocks(step, plan, (q, out, log_sums), kv):
                part, sums = attention(rows, *columns, causal)
                both = torch.logaddexp(l, sums.unsqueeze(-1))
                o.mul_((l - both).exp()).add_(part * (sums.unsqueeze(-1) - both).exp())
                l.copy_(both)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.plan, ctx.group = plan, group
        return out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, out, log_sums = ctx.saved_tensors
        dy, group = dy.contiguous(), ctx.group
        dq = torch.zeros_like(q, dtype=torch.float32)
        home = k.new_zeros(2, *k.shape, dtype=torch.float32)   # of its own keys and values
        for step, kv in enumerate(travel(torch.stack([k, v]), group)):
            dkv = torch.zeros_like(home) if step else home
            for causal, g, rows, o, l, to_q, *columns, to_k, to_v in blocks(
                    step, ctx.plan, (dy, q, out, log_sums, dq), (*kv, *dkv)):
                parts = attention_backward(g, rows, *columns, o, l.squeeze(-1), causal)
                for target, part in zip((to_q, to_k, to_v), parts):
                    target.add_(part)
            if step > 1:
                dkv += coming()   # what the ranks before this one found for the same keys
            if step > 0:
                coming = send_on(dkv, group)
        if group.size > 1:
            home += coming()   # the keys are one journey from home now, and their gradients have made it
        return dq.to(q.dtype), *home.to(k.dtype), None, None


def ring(batch, group):
    """attend for Transformer.forward: packed_attention of documents that are spread over the ranks of a group.

    batch: the PackedBatch before split(). One call for each batch: several can be under way in a pipeline, and a layer
    that is computed again for its gradient must find the plan of its own.
    """
    cu_seqlens = batch.cu_seqlens.cpu()   # its values are looked at here, once, and in no layer
    sources = [(group.rank - step) % group.size for step in range(group.size)]
    plan = (pieces(cu_seqlens, group.size, group.rank),
            [rectangles(cu_seqlens, group.size, group.rank, source) for source in sources])
    return lambda q, k, v: RingAttention.apply(q, k, v, plan, group)


# -------------------------------------------------------------------------------------------------------------- Ulysses

def share(batch, group):
    """(this rank's part of a PackedBatch, the attention for it): alone the whole batch and None, the attention of all
    chapters.
    """
    return (split(batch, group), ring(batch, group)) if group.size > 1 else (batch, None)


def check_heads(heads, kv_heads, cp):
    if heads % cp or kv_heads % cp:
        raise InputError(f"Ulysses deals out heads: {heads} query and {kv_heads} key-value heads do not divide by"
                         f" {cp} ranks; take ring attention or fewer ranks")


def ulysses(batch, group):
    """attend for Transformer.forward, as ring(), by two all-to-alls. batch: on the model's device.

    Raises InputError where heads do not divide by the ranks.
    """
    n, whole = group.size, batch.cu_seqlens
    # Of the ranks' tokens.
    order = torch.cat([places(len(batch.input_ids), n, rank) for rank in range(n)]).to(whole.device)
    back = order.argsort()   # to that of the documents

    def attend(q, k, v):
        check_heads(q.shape[1], k.shape[1], n)
        T, sizes = len(q), [x.shape[1] // n for x in (q, k, v)]
        parts = torch.cat([x.unflatten(1, (n, -1)) for x in (q, k, v)], dim=2)          # (T, n, (H + 2G) / n, K)
        rows = AllToAll.apply(parts.transpose(0, 1).flatten(0, 1), group, [T] * n, [T] * n)   # (n T, (H + 2G) / n, K)
        q, k, v = rows[back].split(sizes, dim=1)
        mixed = packed_attention(q, k, v, whole, batch.max_seqlen)                      # (n T, H / n, K)
        mixed = AllToAll.apply(mixed[order], group, [T] * n, [T] * n)
        return mixed.unflatten(0, (n, T)).transpose(0, 1).flatten(1, 2)                 # (T, H, K)
    return attend


# ----------------------------------------------------------------------------------------------------- counted on paper

def ring_bytes(tokens, cp, kv_heads, head_dim, size=4):
    """Bytes that each rank sends in one layer, (forward, backward). tokens: of the whole pack; size: bytes of a number.

    Keys and values, n - 1 journeys; backward once more, together with their gradients, which are summed on the way, in
    float32.
    """
    numbers = (cp - 1) * 2 * tokens // cp * kv_heads * head_dim
    return numbers * size, numbers * (size + 4)


def ulysses_bytes(tokens, cp, heads, kv_heads, head_dim, size=4):
    """The same for Ulysses: q, k, v there and the result back, of each what is not its own; backward as much."""
    numbers = (cp - 1) * (tokens // cp) * (2 * heads + 2 * kv_heads) // cp * head_dim
    return numbers * size, numbers * size
