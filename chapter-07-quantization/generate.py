"""A prompt in, text out, from the checkpoint that train.py wrote.

    python generate.py "ROMEO:" 200        (in this folder)
    python generate.py "ROMEO:" 200 --no-cache --timing
    python generate.py --interactive
    python generate.py --checkpoint Qwen/Qwen3-0.6B --chat "Why is the sky blue?"

Only the text goes to standard output. The first step computes the whole prompt ("prefill"), every other one a single token
("decode"): what the model needs of the tokens before it is in the cache. With --no-cache every new token runs the model over
the whole text again, as in all chapters before.
"""
import codecs
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bpe_from_scratch import valid_unicode
from checkpoint import load_model
from compiler import check_compiler
from data import packed_sequence_collate_fn, read_utf8
from errors import ArgumentParser, InputError, in_range, positive, run, seed, token_ids
from few_rows import SMALL, for_few_rows, one_token_attention
from kv_cache import ContiguousCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What a field means: see sample() and penalize()."""
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, kind, low, high in (("temperature", float, 0, 1e30), ("top_k", int, 1, 2 ** 31 - 1), ("top_p", float, 1e-30, 1),
                                      ("min_p", float, 1e-30, 1), ("repetition_penalty", float, 1e-3, 1e3), ("seed", int, 0, 2 ** 63 - 1)):
            value = getattr(self, name)
            if value is not None or name not in ("top_k", "top_p", "min_p"):
                value = in_range(f"--{name.replace('_', '-')}", value, kind, low, high)
                object.__setattr__(self, name, value)   # frozen against others


def generate(model, tokenizer, prompt_ids, max_new_tokens, cached=True, forward=None, **sampling):
    """Yield up to max_new_tokens token ids, each sampled given the prompt and those before it.

    An end-of-text token does not end the stream: what follows it is a new document, written with an empty context.
    The end of a turn does: after it, it is the user's turn. An answer to a turn ends at either, as Qwen's own configuration says.
    sampling: the fields of Sampling.
    """
    for step in generate_batch(model, tokenizer, [prompt_ids], max_new_tokens, Sampling(**sampling), cached, forward):
        yield from step.values()


@torch.no_grad()
def generate_batch(model, tokenizer, prompts, max_new_tokens, sampling=Sampling(), cached=True, forward=None):
    """generate() for several prompts of any lengths at a time. Yields for each step {number of the prompt: its token id}.

    forward: the compiled model, where there is one; it computes the steps of one token each.
    """
    prompts = [token_ids(prompt_ids, tokenizer.vocab_size) for prompt_ids in prompts]
    if not all(prompts):
        raise InputError("a prompt needs at least one token")
    max_new_tokens = in_range("max_new_tokens", max_new_tokens, int, 1, 2 ** 31 - 1)
    model.eval()
    weight, limit = model.model.norm.weight, model.config.max_position_embeddings
    # Of our own, so that sampling leaves the random state of training alone; one each, so that no text disturbs another.
    dice = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    contexts = dict(enumerate(prompts))
    answers = {row for row, context in contexts.items() if tokenizer.end_of_turn in context}   # each to a turn
    row_length = min(limit, max(map(len, prompts)) + max_new_tokens)
    cache = ContiguousCache(model.config, len(prompts), row_length, weight.device, weight.dtype) if cached else None
    if cached and forward is not None:
        cache.one_token_attention = one_token_attention(model.config.head_dim, weight)
    for _ in range(max_new_tokens):
        # Never trained on more than limit tokens: older ones drop out.
        windows = {row: context[-limit:] for row, context in contexts.items()}
        answered = {}
        for row, logits in zip(windows, last_logits(model, windows, cache, forward).float().cpu()):
            token = next_token(logits, windows[row], tokenizer, sampling, dice[row])
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
    device = model.model.norm.weight.device
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


def next_token(logits, context, tokenizer, sampling, dice):
    """One token id from logits (V,), which it may change."""
    logits[tokenizer.vocab_size:] = float("-inf")   # spare rows of the embedding, never a target
    if not logits.max().isfinite():   # of a nan and others the largest is nan
        raise InputError("the model answers nan or inf instead of scores: its training diverged, or its weights are damaged")
    penalize(logits, context, sampling.repetition_penalty)
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, dice, sampling.min_p)


def penalize(logits, context, penalty):
    """Make tokens that the text contains less likely: positive scores are divided, negative ones multiplied (Keskar et al. 2019)."""
    if penalty != 1:
        seen = torch.tensor(list(set(context)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)


def sample(logits, temperature, top_k, top_p, dice, min_p=None):
    """One token id from logits (V,). temperature 0 takes the best; top_k keeps the k best, top_p (Holtzman et al. 2020)
    the fewest best tokens whose probabilities reach p, min_p those that are at least min_p times as likely as the best."""
    if temperature < 1e-30:   # 0, or so little that float32 cannot divide by it
        return logits.argmax().item()
    # The best score moves to 0 first: softmax does not mind, and dividing by a tiny temperature gives -inf, not nan.
    scores = (logits - logits.max()) / temperature               # (V,)
    ids = torch.arange(len(scores))
    if min_p:
        scores[scores.exp() < min_p] = float("-inf")
    if top_k or top_p:   # only these need an order, and Qwen has 151,936 scores to sort
        scores, ids = scores.sort(descending=True)               # best first
        scores[top_k or len(scores):] = float("-inf")
    if top_p:
        probabilities = scores.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities    # the mass of all better tokens; 0 for the best
        scores[before >= top_p] = float("-inf")
    return ids[torch.multinomial(scores.softmax(dim=-1), 1, generator=dice)].item()


def stream(tokens, tokenizer, stop=()):
    """Write token ids to standard output as they come, up to the first of the texts in stop."""
    # A token may end in the middle of a UTF-8 character: the decoder holds incomplete bytes back until the rest arrives.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""   # not written yet, because it may be the beginning of a stop text
    for token in tokens:
        held += decoder.decode(tokenizer.tokens[token])
        found = [held.index(text) for text in stop if text in held]
        if found:
            print(held[:min(found)])
            return
        keep = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        print(held[:len(held) - keep], end="", flush=True)
        held = held[len(held) - keep:]
    print(held + decoder.decode(b"", final=True))


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
            gaps = sorted(after - before for before, after in itertools.pairwise(times))   # the first one may hold the compiling
            rest = f"; decode {len(gaps)} tokens, {gaps[len(gaps) // 2] * 1e3:.2f} ms each (median)" if gaps else ""
            print(f"prefill {self.prompt_tokens} tokens, {(times[0] - start) * 1e3:.1f} ms to the first token{rest}", file=sys.stderr)


def parse_arguments():
    parser = ArgumentParser(description="Continue a prompt with the model that train.py wrote.")
    number = positive(float)
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="the text to continue")
    parser.add_argument("tokens", nargs="?", type=positive(int), metavar="TOKENS", help="same as --max-new-tokens")
    parser.add_argument("--prompt", dest="prompt_flag", metavar="TEXT", help="same as PROMPT")
    parser.add_argument("--prompts", metavar="FILE", help="continue all lines of a file, together; - is standard input")
    parser.add_argument("--max-new-tokens", type=positive(int), default=200, metavar="N", help="tokens to write")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "out", metavar="DIR|HUB_ID",
                        help="folder that train.py wrote, or a Qwen3 of the Hugging Face hub")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question to a model that was trained to answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=positive(int), help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=number, help="sample from the fewest tokens that hold this probability")
    parser.add_argument("--min-p", type=number, help="sample from those at least so many times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=number, default=1.0, metavar="X", help="above 1: less of what was there")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole text again for each token")
    parser.add_argument("--compile", action="store_true", help="a faster step, after a minute of compiling")
    parser.add_argument("--timing", action="store_true", help="say on standard error what prefill and decode took")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    arguments = parser.parse_args()
    if (arguments.prompt != "") + (arguments.prompt_flag is not None) + arguments.interactive > 1:
        raise InputError("PROMPT, --prompt and --interactive each say what to continue; give one of them")
    if arguments.prompts is not None and (arguments.prompt or arguments.prompt_flag or arguments.interactive or arguments.timing):
        raise InputError("--prompts reads all prompts from a file; it goes with no other prompt, nor with --interactive or --timing")
    if arguments.compile and arguments.no_cache:
        raise InputError("--compile makes the step faster that computes one token; with --no-cache there is none")
    if "" in arguments.stop:
        raise InputError("--stop needs a text that is not empty")
    return arguments


def main():
    arguments = parse_arguments()
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p,
                        arguments.repetition_penalty, arguments.seed)
    if arguments.compile:
        check_compiler("cpu")
    model, tokenizer = load_model(arguments.checkpoint)
    for_few_rows(model, use_kernel=arguments.compile)
    forward = torch.compile(model, fullgraph=True, options=SMALL) if arguments.compile else None
    max_new_tokens = arguments.tokens or arguments.max_new_tokens

    def encode(prompt):
        if arguments.chat:
            return tokenizer.encode_conversation([{"role": "user", "content": prompt}], answer=True)[0]
        return [tokenizer.end_of_text, *tokenizer.encode(prompt)]

    def answer(prompt):
        prompt = valid_unicode(prompt)   # a terminal may hand over bytes that are no UTF-8
        prompt_ids = encode(prompt)
        if not arguments.chat:
            print(prompt, end="", flush=True)
        timing = Timing(len(prompt_ids))
        tokens = generate(model, tokenizer, prompt_ids, max_new_tokens, not arguments.no_cache, forward, **vars(sampling))
        stream(timing.watch(tokens), tokenizer, arguments.stop)
        if arguments.timing:
            timing.report()

    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
        answers = [[] for _ in prompts]
        for step in generate_batch(model, tokenizer, list(map(encode, prompts)), max_new_tokens, sampling,
                                   not arguments.no_cache, forward):
            for row, token in step.items():
                answers[row].append(token)
        for prompt, tokens in zip(prompts, answers):
            print(prompt, end="\n" if arguments.chat else "")
            stream(tokens, tokenizer, arguments.stop)
        return
    if not arguments.interactive:
        answer(arguments.prompt if arguments.prompt_flag is None else arguments.prompt_flag)
        return
    print("A prompt a line; end with Ctrl-D.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            answer(line.rstrip("\n"))
        except InputError as error:   # a bad prompt ends the answer, not the conversation
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
