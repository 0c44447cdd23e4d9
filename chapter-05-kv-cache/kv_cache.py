"""The keys and values of tokens that have been seen, kept, so that a new token costs one token's work and not the whole
text's.

A query looks at the keys and values of all tokens before it, and those never change: no token sees a later one. So they
are computed once and remembered (Pope et al. 2022). Two ways to lay them out, one interface for model.py:

    ContiguousCache   a row for each sequence, as long as the longest that may come. Simple; what a short text leaves
                      of its row is lost.
    PagedCache        blocks of a few tokens, and for each sequence a table of its blocks, as an operating system gives
                      a process pages of memory (Kwon et al. 2023). At most the last block of a sequence is partly
                      empty, and sequences that begin alike can have blocks in common.

The packed layout stays: a step is a packed batch of the tokens that are new, one or many for each sequence.

Shape letters besides those of model.py:
    T  new tokens of all sequences of a step      B  blocks of the longest sequence's table
    S  sequences of the step                      P  block_size, tokens in a block
    N  blocks in all                              L  tokens of one sequence, the new ones included
"""
import hashlib
import inspect
from collections import OrderedDict

import torch
from torch.nn.attention.varlen import varlen_attn

from attention import VARLEN_GQA, varlen_obstacle
from custom_ops import CHAPTER, flash

# torch 2.12 and newer: the kernel finds its way through the block table by itself.
VARLEN_PAGED = "block_table" in inspect.signature(varlen_attn).parameters


# ------------------------------------------------------------------------------------------------------ the memory

class PagedCache:
    """Room for num_blocks * block_size tokens. Who owns which block is not decided here, but by the BlockPool below."""

    def __init__(self, config, num_blocks, block_size, device="cpu", dtype=torch.float32):
        self.block_size, self.device = block_size, torch.device(device)
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)   # (N, P, G, K)
        self.layers = [LayerCache(self, torch.zeros(shape, device=device, dtype=dtype),
                                  torch.zeros(shape, device=device, dtype=dtype))
                                  for _ in range(config.num_hidden_layers)]

    def nbytes(self):
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def place(self, tables, lengths, counts):
        """Prepare a step: sequence i, whose blocks are tables[i], holds lengths[i] tokens and gets counts[i] new ones.

        Returns (position_ids, cu_seqlens, max_seqlen), as Transformer.forward takes them.
        """
        P, spans = self.block_size, list(zip(tables, lengths, counts))
        positions = torch.cat([torch.arange(length, length + count) for _, length, count in spans])   # (T,)
        # Token t of a sequence lies in slot t % P of its block number t // P.
        slots = torch.tensor([table[t // P] * P + t % P for table, length, count in spans
                              for t in range(length, length + count)])                  # (T,)
        width = max((length + count - 1) // P + 1 for _, length, count in spans)        # B
        # Filled up with a block of its own: of another's a nan would come through, added to the mask's minus infinity.
        table = torch.tensor([(table + table[:1] * width)[:width] for table in tables], dtype=torch.int32)   # (S, B)
        ends = torch.tensor([length + count for _, length, count in spans], dtype=torch.int32)         # (S,)
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)            # (S+1,)
        self.slots, self.table, self.ends, positions, cu_seqlens = (
            x.to(self.device, non_blocking=True) for x in (slots, table, ends, positions, cu_seqlens))
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max(counts)
        return positions, cu_seqlens, self.max_seqlen

    def erase(self, blocks):
        """A nan is not hidden by a mask: added to minus infinity it is a nan still."""
        for layer in self.layers:
            layer.k[blocks], layer.v[blocks] = 0, 0

    def copy_block(self, source, target):
        for layer in self.layers:
            layer.k[target], layer.v[target] = layer.k[source], layer.v[source]


class ContiguousCache(PagedCache):
    """A row of max_length tokens for each sequence: a paged cache whose only block of each sequence holds all of it."""

    def __init__(self, config, sequences, max_length, device="cpu", dtype=torch.float32):
        super().__init__(config, sequences, max_length, device, dtype)
        self.lengths = [0] * sequences   # tokens that each row holds

    def place(self, rows, counts):
        """Prepare a step in which rows[i] gets counts[i] new tokens. To empty a row, set its length to 0."""
        placed = super().place([[row] for row in rows], [self.lengths[row] for row in rows], counts)
        for row, count in zip(rows, counts):
            self.lengths[row] += count
        return placed


class LayerCache:
    """The keys and values of one layer, each (N, P, G, K), and attention that reads them."""

    def __init__(self, cache, k, v):
        self.cache, self.k, self.v = cache, k, v

    def attend(self, q, k, v):
        """In the place of packed_attention: remember the new keys and values, attend to all there are.

        q (T, H, K), k and v (T, G, K) of the new tokens only. Returns (T, H, K).
        """
        # First the writing, so that a token finds itself and its neighbours of the same step in the cache.
        self.k.flatten(0, 1).index_copy_(0, self.cache.slots, k.to(self.k.dtype))
        self.v.flatten(0, 1).index_copy_(0, self.cache.slots, v.to(self.v.dtype))
        table, ends, cu_seqlens = self.cache.table, self.cache.ends, self.cache.cu_seqlens
        q = q.to(self.k.dtype)
        # FlashAttention 2's pages.
        if VARLEN_PAGED and varlen_obstacle(self.k.device, self.k.dtype) is None and self.cache.block_size % 256 == 0:
            return varlen_attn(q, self.k, self.v, cu_seqlens, None, self.cache.max_seqlen,
                               table.shape[1] * self.k.shape[1], window_size=(-1, 0),
                               seqused_k=ends, block_table=table, **VARLEN_GQA)
        return cached_attention_operator(q, self.k, self.v, table, ends, cu_seqlens)


def cached_attention(q, k, v, table, ends, cu_seqlens):
    """Attention of the new tokens of each sequence to all of its tokens.

    q (T, H, K); k and v (N, P, G, K), the new tokens' already among them; table (S, B) int32, the blocks of each
    sequence; ends (S,) int32, its tokens; cu_seqlens (S+1,). Returns (T, H, K).
    """
    out, counts = torch.empty_like(q), cu_seqlens.diff().tolist()
    P, lengths = k.shape[1], ends.tolist()
    # Several sequences with one new token each, the usual case; the scheduler puts them first. One call for all, as a
    # rectangle.
    single = next((i for i, count in enumerate(counts) if count > 1), len(counts))
    if single == 1:
        single = 0
    if single:
        L = max(lengths[:single])
        keys, values = (read(x, table[:single, :(L - 1) // P + 1])[:, :L] for x in (k, v))   # (S, L, G, K)
        hidden = torch.arange(L, device=q.device) >= ends[:single, None]                     # (S, L)
        out[:single] = attention(q[:single, None], keys, values, hidden[:, None, None])[:, 0]
    for i, start in enumerate(cu_seqlens.tolist()[single:-1], start=single):
        new, L = slice(start, start + counts[i]), lengths[i]
        keys, values = (read(x, table[i:i + 1, :(L - 1) // P + 1])[:, :L] for x in (k, v))   # (1, L, G, K)
        # The last new token sees all L, the one before it L - 1: a causal mask, aligned at the right end. One token
        # needs none.
        hidden = None
        if counts[i] > 1:
            hidden = torch.ones(counts[i], L, dtype=torch.bool, device=q.device).triu(L - counts[i] + 1)
        out[new] = attention(q[None, new], keys, values, hidden)[0]
    return out


# Opaque to the compiler, as grouped_attention is. Nothing is to be differentiated here, so this plain registration will
# do.
library = torch.library.Library(CHAPTER, "FRAGMENT")
library.define("cached_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor ends, Tensor cu_seqlens) -> Tensor")
library.impl("cached_attention", cached_attention, "CompositeExplicitAutograd")
torch.library.register_fake(f"{CHAPTER}::cached_attention",
                            lambda q, k, v, table, ends, cu_seqlens: torch.empty_like(q), lib=library)
cached_attention_operator = getattr(torch.ops, CHAPTER).cached_attention.default


def read(x, table):
    """The blocks of a table (S, B) side by side: (S, B * P, G, K).

    One block in each row and all rows in order: no copy.
    """
    if table.shape[1] == 1:
        rows = table[:, 0].tolist()
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return x[rows[0]:rows[0] + len(rows)]
    return x.index_select(0, table.flatten()).unflatten(0, table.shape).flatten(1, 2)   # faster than x[table]


def attention(q, k, v, hidden):
    """q (S, n, H, K), k and v (S, L, G, K), hidden (S or 1, 1, n, L) or None, True where a key is not to be seen: (S,
    n, H, K).
    """
    mask = None
    if hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        mask = mask.expand(len(q), 1, q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cpu:
        return flash(q, k, v, attn_mask=mask)[0].transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------ who owns what

class BlockPool:
    """Which blocks are free, how many sequences use each of the others, and which hold text that may be wanted again.

    A full block is known by its content: the hash of its tokens and of all before them, for keys and values depend on
    those too. When nobody uses it any more it counts as free, but keeps its content until the room is needed. Of the
    free ones the longest unused goes first.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.clear()

    def clear(self):
        self.free = OrderedDict.fromkeys(range(self.num_blocks))   # the next to be given away first
        self.references = [0] * self.num_blocks                    # sequences that use the block
        self.hashes = [None] * self.num_blocks                     # what a full block is known by
        self.known = {}                                            # {hash: block}

    def take(self):
        """A free block, whose old content is forgotten."""
        block, _ = self.free.popitem(last=False)
        self.disown([block])   # or a later text would find under its hash what is no longer here
        self.references[block] = 1
        return block

    def share(self, block):
        """One more sequence uses the block."""
        self.free.pop(block, None)
        self.references[block] += 1

    def release(self, blocks):
        """A sequence is done with its blocks.

        The end of a text is given away before its beginning, which others may share.
        """
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)   # nobody can want it again

    def remember(self, block, hash):
        """The block is full and computed. Of two with the same content the first stays known."""
        if self.hashes[block] is None and hash not in self.known:
            self.known[hash] = block
            self.hashes[block] = hash

    def disown(self, blocks):
        """What the blocks hold is not to be found any more."""
        for block in blocks:
            if self.hashes[block] is not None:
                del self.known[self.hashes[block]]
                self.hashes[block] = None

    def block_hashes(self, tokens):
        """The hash of every full block of a text, each a continuation of the one before."""
        digest, P = hashlib.sha256(), self.block_size
        for start in range(0, len(tokens) - P + 1, P):
            digest.update(b"".join(token.to_bytes(4, "little") for token in tokens[start:start + P]))
            yield digest.copy().digest()

    def longest_prefix(self, tokens):
        """The known blocks with which a text begins. One token at least is left to compute: its scores are wanted."""
        blocks = []
        for hash in self.block_hashes(tokens[:-1]):
            if hash not in self.known:
                break
            blocks.append(self.known[hash])
        return blocks
