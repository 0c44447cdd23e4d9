"""The paged cache in integers: 8 or 4 bits a number, so that the same memory holds almost two or four times as many
tokens.

    python engine.py questions.txt --cache-bits 4        (in this folder)

With many texts, or long ones, the cache is larger than the model. Which of its numbers should share a scale? (KIVI, Liu
et al. 2024; KVQuant, Hooper et al. 2024.)

    keys      have a few channels that are large in every token. One scale for all channels of a token would be set by
              those, and of the others little would be left. So a scale for each channel, shared by a run of tokens.
    values    have no such channels, but some tokens are larger than others. So a scale for each token (and head).

A channel's scale needs several tokens at once, and an engine gets them one by one. But it has runs of tokens already:
the blocks. A block is rounded once, when it is full, and never again. A block that is not full waits in full precision,
in a "tail".

    What a token sees:   its own block in full precision, all blocks before it rounded.

This holds for every token, however its text came into the cache: in one chunk or in many, alone or in company, from a
shared beginning, or again after a preemption. Otherwise an answer would depend on who else is being served. It also
makes the loss easy to measure: rounded_attention() applies the rule to whole documents at once, without any cache.

Shape letters besides those of kv_cache.py:
    R  blocks that a step writes into, of all its sequences        M  tails
"""
import itertools

import torch

from cli import InputError
from integers import pack4, unpack4
from kv_cache import PagedCache, attention

BITS = (8, 4)
KEYS, VALUES = 1, 3   # the dimension of blocks (N, P, G, K) along which a scale is shared: tokens, channels


# ------------------------------------------------------------------------------------------------------ rounding

def to_integers(x, bits, dim):
    """x, float -> integers, uint8, with x ~ integers * scale + low; scale and low, of x's dtype, have size 1 in dim.

    integers.py has an integer that means zero. Here integer 0 means the smallest number instead: a channel of keys may
    lie far from zero in every token, and a range that has to reach zero would be mostly empty.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))   # bfloat16 would be too coarse for the differences
    low = exact.amin(dim, keepdim=True).to(x.dtype)
    scale = ((exact.amax(dim, keepdim=True) - low) / (2 ** bits - 1)).to(x.dtype)
    scale = torch.where(scale == 0, 1, scale)   # all alike; a nan stays one
    return ((exact - low) / scale).round_().clamp_(0, 2 ** bits - 1).to(torch.uint8), scale, low


def from_integers(integers, scale, low):
    return torch.addcmul(low, integers.to(scale.dtype), scale)   # rounded once; a product and then a sum would be twice


class QuantizedBlocks:
    """The keys or the values of one layer: full blocks as integers, the others in tails. Each block is (P, G, K)."""

    def __init__(self, shape, bits, dim, num_tails, device, dtype):
        self.bits, self.dim = bits, dim
        shared = [1 if i == dim else size for i, size in enumerate(shape)]
        self.integers = torch.zeros(*shape[:3], shape[3] * bits // 8, device=device,
                                    dtype=torch.uint8)   # (N, P, G, K or K/2)
        # Keys (N, 1, G, K), values (N, P, G, 1)
        self.scale = torch.zeros(shared, device=device, dtype=dtype)
        self.low = torch.zeros(shared, device=device, dtype=dtype)
        self.tails = torch.zeros(num_tails, *shape[1:], device=device, dtype=dtype)     # (M, P, G, K)

    def write(self, blocks, x):
        """Round full blocks x (len(blocks), P, G, K)."""
        integers, scale, low = to_integers(x, self.bits, self.dim)
        if self.bits == 4:
            integers = pack4(integers.flatten(0, 2)).unflatten(0, integers.shape[:3])
        self.integers[blocks], self.scale[blocks], self.low[blocks] = integers, scale, low

    def read(self, table):
        """The blocks of a table (S, B) side by side, as numbers again: (S, B * P, G, K)."""
        integers, scale, low = (x.index_select(0, table.flatten()) for x in (self.integers, self.scale, self.low))
        x = from_integers(unpack4(integers) if self.bits == 4 else integers, scale, low)
        return x.unflatten(0, table.shape).flatten(1, 2)


# ------------------------------------------------------------------------------------------------------ the memory

class QuantizedPagedCache(PagedCache):
    """In the place of PagedCache. pool: the scheduler's BlockPool; max_sequences: the most that run at a time.

    A token of Qwen3 0.6B, 114,688 bytes in bfloat16, takes 61,824 with 8 bits (53.9 %) and 33,152 with 4 (28.9 %),
    where a block is of 32 tokens: besides integers, for each head a scale and a smallest number of 2 bytes for each
    token's values, and for each of the 128 channels of a block's keys. The tails come on top: a block in full precision
    for each sequence.
    """

    def __init__(self, config, pool, bits, max_sequences, device="cpu", dtype=torch.float32):
        if bits not in BITS:
            raise InputError(f"a cache cannot have {bits} bits; take {' or '.join(map(str, BITS))}, or None for full"
                             " precision")
        self.pool, self.block_size, self.device = pool, pool.block_size, torch.device(device)
        self.num_tails, self.tail_of = max_sequences, {}   # {block: its tail}
        shape = (pool.num_blocks, pool.block_size, config.num_key_value_heads, config.head_dim)   # (N, P, G, K)
        self.layers = [QuantizedLayerCache(self, QuantizedBlocks(shape, bits, KEYS, max_sequences, device, dtype),
                                           QuantizedBlocks(shape, bits, VALUES, max_sequences, device, dtype))
                       for _ in range(config.num_hidden_layers)]

    def stores(self):
        return [store for layer in self.layers for store in (layer.k, layer.v)]

    def nbytes(self):
        return sum(x.nbytes for store in self.stores() for x in (store.integers, store.scale, store.low, store.tails))

    def place(self, tables, lengths, counts):
        P, placed = self.block_size, super().place(tables, lengths, counts)
        self.spans = list(zip(lengths, counts))
        # The blocks that a step writes into are first laid out in full precision, side by side: R rows of P tokens.
        touched = [table[length // P:(length + count - 1) // P + 1]
                   for table, length, count in zip(tables, lengths, counts)]
        row_of = {block: row for row, block in enumerate(itertools.chain.from_iterable(touched))}
        self.first_rows = [row_of[own[0]] for own in touched] + [len(row_of)]
        begun = {own[0]: self.tail_of[own[0]] for own, length in zip(touched, lengths) if length % P}
        self.give_tails(row_of, [own[-1] for own, (length, count) in zip(touched, self.spans) if (length + count) % P])
        unfinished = {block: self.tail_of[block] for block in row_of if block in self.tail_of}
        full = {block: block for block in row_of if block not in self.tail_of}
        # Each (2, n): tails or blocks, and their rows.
        self.begun, self.unfinished, self.full = (
            torch.tensor([list(places.values()), [row_of[block] for block in places]],
                         dtype=torch.int64).to(self.device)
            for places in (begun, unfinished, full))
        shifts = torch.tensor([row * P - length // P * P for row, length in zip(self.first_rows, lengths)])
        self.slots = placed[0] + shifts.repeat_interleave(torch.tensor(counts)).to(self.device)   # (T,), of R * P
        return placed

    def give_tails(self, touched, unfinished):
        """Tails for the unfinished blocks. Free are those of blocks that nobody uses any more, and of the step's own,
        which it reads before it writes. Every other belongs to the last block of a sequence that runs but is not in
        this step: there are enough.
        """
        self.tail_of = {block: tail for block, tail in self.tail_of.items()
                        if self.pool.references[block] and block not in touched}
        free = sorted(set(range(self.num_tails)) - set(self.tail_of.values()))
        self.tail_of |= zip(unfinished, free)

    def erase(self, blocks):
        """Integers are never nan, but scales may be.

        Of tails, nobody reads a token that he or whom he copies has not written.
        """
        for store in self.stores():
            store.scale[blocks], store.low[blocks] = 0, 0

    def copy_block(self, source, target):
        """Only a block that is not full is ever copied, so only a tail.

        The next step reads it for both, and then writes two.
        """
        self.tail_of[target] = self.tail_of[source]


class QuantizedLayerCache:
    """The keys and values of one layer, and attention that reads them."""

    def __init__(self, cache, k, v):
        self.cache, self.k, self.v = cache, k, v

    def remember(self, store, x):
        """Write the step's new keys or values (T, G, K).

        Returns the blocks they belong to in full precision (R, P, G, K).
        """
        cache = self.cache
        rows = store.tails.new_zeros(cache.first_rows[-1], *store.tails.shape[1:])
        rows[cache.begun[1]] = store.tails[cache.begun[0]]
        rows.flatten(0, 1).index_copy_(0, cache.slots, x.to(rows.dtype))
        store.write(cache.full[0], rows[cache.full[1]])
        store.tails[cache.unfinished[0]] = rows[cache.unfinished[1]]
        return rows

    def attend(self, q, k, v):
        """As LayerCache.attend: q (T, H, K), k and v (T, G, K) of the new tokens only. Returns (T, H, K)."""
        cache, P, first_rows = self.cache, self.cache.block_size, self.cache.first_rows
        k_rows, v_rows = self.remember(self.k, k), self.remember(self.v, v)
        q = q.to(k_rows.dtype)
        out, starts = torch.empty_like(q), itertools.accumulate([count for _, count in cache.spans], initial=0)
        single = next((i for i, (_, count) in enumerate(cache.spans) if count > 1), len(cache.spans))
        if single:
            out[:single] = self.attend_single(q[:single], k_rows, v_rows, single)
        for i, ((length, count), start) in enumerate(zip(cache.spans, starts)):
            if count > 1:
                # What this step has filled is rounded by now.
                before = cache.table[i:i + 1, :(length + count - 1) // P]
                own = slice(first_rows[i], first_rows[i + 1])
                keys, values = ((store.read(before)[0], rows[own].flatten(0, 1)[:length % P + count])
                                for store, rows in ((self.k, k_rows), (self.v, v_rows)))
                out[start:start + count] = attend_to_both(q[start:start + count], keys, values, length, P)
        return out

    def attend_single(self, q, k_rows, v_rows, S):
        """One new token each of S sequences, q (S, H, K), as a rectangle: each one's last block replaces its integers.
        """
        cache, P = self.cache, self.cache.block_size
        longest = max(length + 1 for length, _ in cache.spans[:S])
        table, ends = cache.table[:S, :(longest - 1) // P + 1], cache.ends[:S]
        last = torch.arange(S, device=q.device), (ends - 1) // P

        def read(store, rows):
            x = store.read(table)                                                       # (S, B * P, G, K)
            x.unflatten(1, (-1, P))[last] = rows[:S]   # a sequence with one new token has one row, and these come first
            return x[:, :longest]
        hidden = torch.arange(longest, device=q.device) >= ends[:, None]                # (S, L)
        return attention(q[:, None], read(self.k, k_rows), read(self.v, v_rows), hidden[:, None, None])[:, 0]


def attend_to_both(q, keys, values, start, P):
    """The rule, for neighbouring tokens of one text: each looks at its own block in full precision, at those before it
    rounded.

    q (n, H, K), the first of them at position `start`. keys and values are pairs: (rounded, those from the text's
    beginning; full, those from the beginning of the block that position `start` is in).
    """
    mine = torch.arange(start, start + len(q), device=q.device)[:, None]                # (n, 1)
    rounded = torch.arange(len(keys[0]), device=q.device)
    full = torch.arange(len(keys[1]), device=q.device) + start // P * P
    hidden = torch.cat([rounded // P >= mine // P, (full // P != mine // P) | (full > mine)], dim=1)
    return attention(q[None], torch.cat(keys)[None], torch.cat(values)[None], hidden[None, None])[0]


# ------------------------------------------------------------------------------------------------------ without a cache

def rounded_attention(cu_seqlens, bits, block_size):
    """What Transformer.forward takes as attend= to see the documents of a batch as a quantized cache would."""

    def rounded(x, dim):
        blocks = x.unflatten(0, (-1, block_size)) if len(x) else x[:, None]   # (n, P, G, K)
        return from_integers(*to_integers(blocks, bits, dim)).flatten(0, 1)

    def attend(q, k, v):
        q, k = q.to(v.dtype), k.to(v.dtype)   # under autocast the norms return float32
        out = torch.empty_like(q)
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            n = (end - start - 1) // block_size   # blocks that a later token sees
            keys, values = ((rounded(x[start:start + n * block_size], dim), x[start:end])
                            for x, dim in ((k, KEYS), (v, VALUES)))
            out[start:end] = attend_to_both(q[start:end], keys, values, 0, block_size)
        return out
    return attend
