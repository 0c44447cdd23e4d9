"""A prompt in, text out, from the checkpoint that train.py wrote.

    python generate.py "ROMEO:" 200        (in this folder)
    python generate.py "ROMEO:" 200 --no-cache --timing
    python generate.py --interactive
    python generate.py --checkpoint Qwen/Qwen3-0.6B --chat "Why is the sky blue?"

Only the text goes to standard output. The first step computes the whole prompt ("prefill"), every other one a single
token ("decode"): what the model needs of the tokens before it is in the cache. With --no-cache every new token runs the
model over the whole text again, as in all chapters before.
"""
import codecs
import sys
from pathlib import Path

import torch

from bpe_from_scratch import valid_unicode
from checkpoint import load_model
from cli import ArgumentParser, InputError, positive, run, seed
from compiler import check_compiler
from sampling import Sampling
from small_batch_matmul import SMALL, for_small_batches
from static_batching import Timing, generate_batch, read_prompts


def generate(model, tokenizer, prompt_ids, max_new_tokens, cached=True, forward=None, **sampling):
    """Yield up to max_new_tokens token ids, each sampled given the prompt and those before it.

    An end-of-text token does not end the stream: what follows it is a new document, written with an empty context.
    The end of a turn does: after it, it is the user's turn. An answer to a turn ends at either, as Qwen's own
    configuration says.
    sampling: the fields of Sampling.
    """
    for step in generate_batch(model, tokenizer, [prompt_ids], max_new_tokens, Sampling(**sampling), cached, forward):
        yield from step.values()


def stream(tokens, tokenizer, stop=()):
    """Write token ids to standard output as they come, up to the first of the texts in stop."""
    # A token may end in the middle of a UTF-8 character: the decoder holds incomplete bytes back until the rest
    # arrives.
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
    parser.add_argument("--chat", action="store_true",
                        help="the prompt is a question to a model that was trained to answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=positive(int), help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=number, help="sample from the fewest tokens that hold this probability")
    parser.add_argument("--min-p", type=number, help="sample from those at least so many times as likely as the"
                                                     " likeliest")
    parser.add_argument("--repetition-penalty", type=number, default=1.0, metavar="X",
                        help="above 1: less of what was there")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text; may be repeated")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole text again for each token")
    parser.add_argument("--compile", action="store_true", help="a faster step, after a minute of compiling")
    parser.add_argument("--timing", action="store_true", help="say on standard error what prefill and decode took")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    arguments = parser.parse_args()
    if (arguments.prompt != "") + (arguments.prompt_flag is not None) + arguments.interactive > 1:
        raise InputError("PROMPT, --prompt and --interactive each say what to continue; give one of them")
    if arguments.prompts is not None and (arguments.prompt or arguments.prompt_flag or arguments.interactive
                                          or arguments.timing):
        raise InputError("--prompts reads all prompts from a file; it goes with no other prompt, nor with"
                         " --interactive or --timing")
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
    for_small_batches(model, use_kernel=arguments.compile)
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
        tokens = generate(model, tokenizer, prompt_ids, max_new_tokens, not arguments.no_cache, forward,
                          **vars(sampling))
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
