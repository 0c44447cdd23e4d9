"""An engine around the cache: requests come and go, and every step computes whatever is due for all of them.

    python engine.py questions.txt --max-new-tokens 100        (in this folder; a prompt a line)

    engine = Engine(model, tokenizer, num_blocks=512)
    sequence = engine.add(prompt_ids, max_new_tokens=100)
    while engine.busy():
        for sequence, token in engine.step():
            ...

Static batching, as generate.py --prompts does it, waits until the last text of a batch has ended before the next batch
begins. Here a text that ends makes room in the very next step (continuous batching, Yu et al. 2022). Nothing of that
changes an answer: each is, token for token, what its prompt alone would have got.
"""
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import load_model
from cli import ArgumentParser, InputError, in_range, positive, run, seed, token_ids
from sampling import Sampling, next_token
from static_batching import read_prompts
from kv_cache import PagedCache
from quantized_cache import BITS, QuantizedPagedCache
from scheduler import Scheduler, Sequence
from small_batch_matmul import for_small_batches


class Engine:
    """model and tokenizer: of checkpoint.load_model. cache_bits: 8 or 4 for integers.

    The others: of PagedCache and Scheduler.
    """

    def __init__(self, model, tokenizer, num_blocks, block_size=16, max_tokens=512, max_sequences=16, prefix_cache=True,
                 cache_bits=None):
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("max_tokens", max_tokens),
                            ("max_sequences", max_sequences)):
            in_range(name, value, int, 1, 2 ** 31 - 1)
        weight = model.model.norm.weight
        self.model, self.tokenizer = model.eval(), tokenizer
        self.scheduler = Scheduler(num_blocks, block_size, max_tokens, max_sequences, prefix_cache)
        if cache_bits is None:
            self.cache = PagedCache(model.config, num_blocks, block_size, weight.device, weight.dtype)
        else:
            self.cache = QuantizedPagedCache(model.config, self.scheduler.pool, cache_bits, max_sequences,
                                             weight.device,
                                             weight.dtype)

    def add(self, prompt_ids, max_new_tokens, sampling=Sampling(), stop=(), samples=1, end_tokens=None):
        """Ask for an answer, or for several to the same prompt. Returns the Sequence, whose answer grows with the
        steps.

        The other samples turn up in what step() returns, with numbers from 1. end_tokens: those that end the answer,
        the tokenizer's own where it is None. Raises InputError for what can never fit, and for whatever a step could
        trip over: there it would stop everybody.
        """
        limit, vocab_size = self.model.config.max_position_embeddings, self.model.config.vocab_size
        prompt_ids = token_ids(prompt_ids, vocab_size)
        max_new_tokens = in_range("max_new_tokens", max_new_tokens, int, 1, 2 ** 31 - 1)
        samples = in_range("samples", samples, int, 1, 2 ** 31 - 1)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop texts {stop}: each must be a text that is not empty")
        if len(prompt_ids) + max_new_tokens > limit:
            raise InputError(f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones are more than the model's"
                             f" {limit} positions")
        ends = (self.tokenizer.end_of_text,
                self.tokenizer.end_of_turn) if end_tokens is None else token_ids(end_tokens, vocab_size)
        sequence = Sequence(prompt_ids, max_new_tokens, sampling, tuple(ends), stop, samples)
        sequence.rng = torch.Generator().manual_seed(sampling.seed)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence):
        if not sequence.finished:
            self.scheduler.finish(sequence, "cancelled")

    def busy(self):
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.no_grad()
    def step(self):
        """Compute one packed batch. Returns [(sequence, token)], what has been answered.

        A sequence whose scores are no numbers is finished ("nan"), without its blocks: the others go on. A step that
        fails, for want of memory or by Ctrl-C, has not been: whoever ran waits, as after a preemption, and the next
        step begins with that.
        """
        queue, before = [*self.scheduler.running, *self.scheduler.waiting], []
        try:
            chosen = self.scheduler.schedule()
            before += [(sequence, len(sequence.tokens), sequence.samples, sequence.rng.get_state())
                       for sequence, _ in chosen]
            return self.compute(chosen) if chosen else []
        except BaseException:
            for sequence, length, samples, rng in before:
                del sequence.tokens[length:]
                sequence.samples, sequence.finished = samples, ""
                sequence.rng.set_state(rng)
            written = [block for sequence in queue for block in sequence.table]
            self.scheduler.start_over(queue)
            self.cache.erase(written)   # in part only, maybe with what is no number
            raise

    def compute(self, chosen):
        """The step of these [(sequence, number of its pending tokens)]."""
        for source, target in self.scheduler.copies:
            self.cache.copy_block(source, target)
        counts = [count for _, count in chosen]
        input_ids = torch.tensor([token for sequence, count in chosen
                                  for token in sequence.tokens[sequence.computed:sequence.computed + count]])   # (T,)
        placed = self.cache.place([sequence.table for sequence, _ in chosen],
                                  [sequence.computed for sequence, _ in chosen], counts)
        logits = self.model(input_ids.to(self.cache.device), *placed, cache=self.cache).float().cpu()   # (S, V)
        answered = []
        for (sequence, count), scores in zip(chosen, logits):
            self.scheduler.advance(sequence, count)
            if not scores[:self.tokenizer.vocab_size].max().isfinite():
                # Or what is no number would still be there for who gets the blocks next. What others share is theirs.
                self.cache.erase([block for block in sequence.table if self.scheduler.pool.references[block] == 1])
                self.scheduler.finish(sequence, "nan", remember=False)
                continue
            if sequence.pending:
                continue   # only a part of its prompt: nobody has asked for these scores
            for one in [sequence, *self.fork(sequence)]:
                one.tokens.append(next_token(scores.clone(), one.tokens, self.tokenizer, one.sampling, one.rng))
                answered.append((one, one.tokens[-1]))
                self.check_end(one)
        return answered

    def fork(self, sequence):
        """The other samples of a prompt, once it is computed. Each has its own random generator."""
        others = []
        for number in range(1, sequence.samples):
            rng = torch.Generator().manual_seed(random.Random(f"{sequence.sampling.seed} {number}").getrandbits(31))
            other = replace(sequence, tokens=list(sequence.tokens), computed=0, table=[], hashes=[], samples=1,
                            number=number, rng=rng)
            self.scheduler.fork(sequence, other)
            others.append(other)
        sequence.samples = 1
        return others

    def check_end(self, sequence):
        text = self.tokenizer.decode(sequence.answer) if sequence.stop else ""
        if sequence.tokens[-1] in sequence.end_tokens:
            self.scheduler.finish(sequence, "end")
        elif any(stop in text for stop in sequence.stop):
            self.scheduler.finish(sequence, "stop")
        elif len(sequence.answer) >= sequence.max_new_tokens:
            self.scheduler.finish(sequence, "length")


def main():
    parser = ArgumentParser(description="Answer all prompts of a file, each as soon as there is room.")
    parser.add_argument("prompts", metavar="FILE", help="a prompt a line; - reads standard input")
    parser.add_argument("--max-new-tokens", type=positive(int), default=100, metavar="N", help="tokens of each answer")
    parser.add_argument("--cache-tokens", type=positive(int), default=8192, metavar="N",
                        help="room in the cache, for all together")
    parser.add_argument("--cache-bits", type=int, choices=BITS,
                        help="the cache in integers; in full precision if not given")
    parser.add_argument("--max-sequences", type=positive(int), default=16, metavar="N",
                        help="texts that are written at a time")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "out", metavar="DIR|HUB_ID",
                        help="as in generate.py")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same texts")
    arguments = parser.parse_args()
    sampling = Sampling(temperature=arguments.temperature, seed=arguments.seed)
    prompts = read_prompts(arguments.prompts)
    model, tokenizer = load_model(arguments.checkpoint)
    try:
        block_size = 32 if arguments.cache_bits else 16   # the keys of a block share scales: the larger, the fewer
        engine = Engine(for_small_batches(model), tokenizer, -(-arguments.cache_tokens // block_size), block_size,
                        max_sequences=arguments.max_sequences, cache_bits=arguments.cache_bits)
    except (RuntimeError, MemoryError):
        raise InputError(f"a cache for {arguments.cache_tokens} tokens does not fit into memory; lower"
                         " --cache-tokens") from None
    prompt_of = {engine.add([tokenizer.end_of_text, *tokenizer.encode(prompt)], arguments.max_new_tokens,
                            sampling): prompt
                 for prompt in prompts}
    start, tokens = time.perf_counter(), 0
    while engine.busy():
        for sequence, _ in engine.step():
            tokens += 1
            if sequence.finished:
                print(f"{prompt_of[sequence]}{tokenizer.decode(sequence.answer)}\n", flush=True)
    if any(sequence.finished == "nan" for sequence in prompt_of):
        raise InputError("the model answers nan or inf instead of scores to some prompts: its weights are damaged")
    seconds = time.perf_counter() - start
    print(f"{len(prompts)} texts, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s",
          file=sys.stderr)


if __name__ == "__main__":
    run(main)
