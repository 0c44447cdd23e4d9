"""Several texts at a time, with the cache: the batch ends when its last text has ended ("static batching").

The first step computes all prompts ("prefill"), every other one a token of each text ("decode"). engine.py lets texts
come and go.
"""
import itertools
import sys
import time

import torch

from bpe_from_scratch import valid_unicode
from cli import InputError, in_range, token_ids
from data import packed_sequence_collate_fn
from formats import read_utf8
from kv_cache import ContiguousCache
from sampling import Sampling, next_token


@torch.no_grad()
def generate_batch(model, tokenizer, prompts, max_new_tokens, sampling=Sampling(), cached=True, forward=None):
    """generate() for several prompts of any lengths at a time. Yields for each step {number of the prompt: its token
    id}.

    forward: the compiled model, where there is one; it computes the steps of one token each.
    """
    prompts = [token_ids(prompt_ids, tokenizer.vocab_size) for prompt_ids in prompts]
    if not all(prompts):
        raise InputError("a prompt needs at least one token")
    max_new_tokens = in_range("max_new_tokens", max_new_tokens, int, 1, 2 ** 31 - 1)
    model.eval()
    weight, limit = model.lm_head.weight, model.config.max_position_embeddings
    # Of our own, so that sampling leaves the random state of training alone; one each, so that no text disturbs
    # another.
    rng = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    contexts = dict(enumerate(prompts))
    answers = {row for row, context in contexts.items() if tokenizer.end_of_turn in context}   # each to a turn
    row_length = min(limit, max(map(len, prompts)) + max_new_tokens)
    cache = ContiguousCache(model.config, len(prompts), row_length, weight.device, weight.dtype) if cached else None
    for _ in range(max_new_tokens):
        # Never trained on more than limit tokens: older ones drop out.
        windows = {row: context[-limit:] for row, context in contexts.items()}
        answered = {}
        for row, logits in zip(windows, last_logits(model, windows, cache, forward).float().cpu()):
            token = next_token(logits, windows[row], tokenizer, sampling, rng[row])
            if token == tokenizer.end_of_turn or token == tokenizer.end_of_text and row in answers:
                del contexts[row]
                continue
            contexts[row] = [token] if token == tokenizer.end_of_text else contexts[row] + [token]
            if cached and (token == tokenizer.end_of_text or len(contexts[row]) > limit):
                cache.lengths[row] = 0   # another text, or every token has moved to another position
            answered[row] = token
        yield answered
        if not contexts:
            return


def last_logits(model, windows, cache, forward=None):
    """windows: {row: tokens}. The logits that follow the last token of each, (S, V)."""
    device = model.lm_head.weight.device
    if cache is None:
        batch = packed_sequence_collate_fn([(window, window) for window in windows.values()]).to(device)
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)   # (T, V)
        return logits[batch.cu_seqlens[1:] - 1]
    new = [window[cache.lengths[row]:] for row, window in windows.items()]
    placed = cache.place(list(windows), [len(tokens) for tokens in new])
    input_ids = torch.tensor([token for tokens in new for token in tokens], device=device)        # (T,)
    if forward is None or len(input_ids) > len(windows):
        forward = model
    return forward(input_ids, *placed, cache=cache)


def read_prompts(path):
    """The prompts of a file, one a line; - is standard input."""
    text = sys.stdin.read() if str(path) == "-" else read_utf8(path)
    prompts = [valid_unicode(line) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompt; one is expected on each line")
    return prompts


class Timing:
    """Notes when each token comes."""

    def __init__(self, prompt_tokens):
        self.prompt_tokens, self.times = prompt_tokens, [time.perf_counter()]

    def watch(self, tokens):
        for token in tokens:
            self.times.append(time.perf_counter())
            yield token

    def report(self):
        start, *times = self.times
        if times:
            # The first one may hold the compiling.
            gaps = sorted(after - before for before, after in itertools.pairwise(times))
            rest = f"; decode {len(gaps)} tokens, {gaps[len(gaps) // 2] * 1e3:.2f} ms each (median)" if gaps else ""
            print(f"prefill {self.prompt_tokens} tokens, {(times[0] - start) * 1e3:.1f} ms to the first token{rest}",
                  file=sys.stderr)
