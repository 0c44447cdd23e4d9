"""Which sequences compute how many tokens in the next step, and which blocks of the cache they use.

A sequence is a list of tokens, of which the first `computed` are in the cache. What is not is pending: the whole prompt
at first, then one token at a time. So there is no phase for prompts and another for answers, only more or fewer pending
tokens (as in vLLM's scheduler), and everything else follows from four rules:

    continue   Sequences that run get their pending tokens first, the oldest before the others, so that an answer never
               stops for somebody else's prompt.
    admit      What is left of max_tokens goes to those that wait, first come, first served. A prompt that does not fit
               comes in chunks (Agrawal et al. 2023).
    preempt    When no block is free, the youngest that runs gives up its blocks and waits in front; later it computes
               its tokens again. The oldest is never given up, so it ends, and then the next is the oldest: nobody
               starves.
    share      A sequence begins with the blocks that are known already from texts that began alike. Who is to write
               into a block that others use too gets a copy of it first.
"""
from collections import deque
from dataclasses import dataclass, field

from cli import InputError
from kv_cache import BlockPool


@dataclass(eq=False)   # two sequences with the same tokens are still two
class Sequence:
    tokens: list                # the prompt, then what has been answered
    max_new_tokens: int
    sampling: object = None     # a sampling.Sampling
    end_tokens: tuple = ()      # those that end the answer, and belong to it
    stop: tuple = ()            # texts that end the answer; the token that completes one is the last
    samples: int = 1            # answers wanted to the same prompt
    number: int = 0             # which of them this is
    prompt_length: int = 0
    computed: int = 0           # tokens that are in the cache
    table: list = field(default_factory=list)   # blocks
    hashes: list = field(default_factory=list)   # of its full blocks
    finished: str = ""          # why: "length", "end", "stop", "cancelled", "nan"
    preemptions: int = 0
    rng: object = None

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def pending(self):
        return len(self.tokens) - self.computed

    @property
    def answer(self):
        return self.tokens[self.prompt_length:]


class Scheduler:
    """max_tokens: the most that a step computes; max_sequences: the most that run at a time."""

    def __init__(self, num_blocks, block_size, max_tokens=512, max_sequences=16, prefix_cache=True):
        self.pool = BlockPool(num_blocks, block_size)
        self.max_tokens, self.max_sequences, self.prefix_cache = max_tokens, max_sequences, prefix_cache
        self.waiting, self.running = deque(), []   # running: in the order of admission
        self.copies = []                           # (source, target) of blocks to be copied before the step

    def add(self, sequence):
        room = self.pool.num_blocks * self.pool.block_size
        wanted = len(sequence.tokens) + sequence.max_new_tokens
        if not sequence.tokens:
            raise InputError("a prompt needs at least one token")
        if wanted > room:
            raise InputError(f"{len(sequence.tokens)} prompt tokens and {sequence.max_new_tokens} new ones do not fit"
                             f" into the {room} tokens of the cache; ask for fewer or make it larger")
        self.waiting.append(sequence)

    def schedule(self):
        """[(sequence, number of its pending tokens to compute now)]: those with one token first, as the cache wants
        them.
        """
        chosen, budget, self.copies = [], self.max_tokens, []
        for sequence in list(self.running):
            count = min(sequence.pending, budget)
            if count and sequence in self.running and self.reserve_or_preempt(sequence, count):
                chosen.append((sequence, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_sequences:
            count = self.admit(self.waiting[0], budget)
            if not count:
                break   # who comes after does not overtake
            chosen.append((self.waiting[0], count))
            self.running.append(self.waiting.popleft())
            budget -= count
        return sorted(chosen, key=lambda pair: pair[1] > 1)

    def admit(self, sequence, budget):
        """Find a waiting sequence its blocks. Returns how many tokens it may compute now, 0 if it has to wait on."""
        pool = self.pool
        known = pool.longest_prefix(sequence.tokens) if self.prefix_cache else []
        needed = -(-len(sequence.tokens) // pool.block_size) - len(known)
        unused = sum(pool.references[block] == 0 for block in known)   # count as free, but this sequence takes them
        if needed > len(pool.free) - unused:
            return 0
        for block in known:
            pool.share(block)
        sequence.table, sequence.computed = known, len(known) * pool.block_size
        count = min(sequence.pending, budget)
        self.reserve(sequence, count)
        return count

    def reserve(self, sequence, count):
        """Blocks to write `count` more tokens into, or False and nothing is changed."""
        pool, P = self.pool, self.pool.block_size
        first, missing = sequence.computed // P, -(-(sequence.computed + count) // P) - len(sequence.table)
        shared = first < len(sequence.table) and pool.references[sequence.table[first]] > 1
        if missing + shared > len(pool.free):
            return False
        if shared:   # copy on write: the others go on reading the block as it was
            source, target = sequence.table[first], pool.take()
            self.copies.append((source, target))
            pool.release([source])
            sequence.table[first] = target
        sequence.table += [pool.take() for _ in range(missing)]
        return True

    def reserve_or_preempt(self, sequence, count):
        while not self.reserve(sequence, count):
            youngest = self.running.pop()
            self.forget(youngest)
            youngest.preemptions += 1
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def forget(self, sequence):
        """Give back all blocks. What is known of them can be found again as long as nobody needs the room."""
        self.pool.release(sequence.table)
        sequence.table, sequence.computed, sequence.hashes = [], 0, []

    def start_over(self, queue):
        """Nobody knows any more what the blocks hold: all of these sequences, in this order, wait with none."""
        self.pool.clear()
        for sequence in queue:
            sequence.table, sequence.computed, sequence.hashes = [], 0, []
        self.waiting, self.running = deque(queue), []

    def advance(self, sequence, count):
        """`count` tokens have been computed: blocks that they filled are known from now on."""
        P = self.pool.block_size
        sequence.computed += count
        if self.prefix_cache and sequence.computed // P > len(sequence.hashes):
            sequence.hashes = list(self.pool.block_hashes(sequence.tokens[:sequence.computed]))
            for block, hash in zip(sequence.table, sequence.hashes):
                self.pool.remember(block, hash)

    def fork(self, sequence, other):
        """`other`, a copy of a sequence whose prompt is computed, goes on from there with the same blocks."""
        if len(self.running) == self.max_sequences:
            self.waiting.appendleft(other)   # its blocks are known, or it computes them again
            return
        for block in sequence.table:
            self.pool.share(block)
        other.table, other.computed, other.hashes = list(sequence.table), sequence.computed, list(sequence.hashes)
        self.running.insert(self.running.index(sequence) + 1, other)   # as old as the one it comes from

    def finish(self, sequence, reason, remember=True):
        """remember=False: what its blocks hold must not be found again."""
        sequence.finished = reason
        if sequence in self.running:
            self.running.remove(sequence)
            if not remember:
                self.pool.disown(sequence.table)
            self.forget(sequence)
        else:
            self.waiting.remove(sequence)
