"""A prompt in, text out, from the checkpoint that train.py wrote.

    python generate.py "ROMEO:" 200        (in this folder)
    python generate.py --interactive

Only the text goes to standard output. Every new token runs the model over the whole text again; chapter 5 ends that
waste.
"""
import codecs
import sys
from pathlib import Path

import torch

from bpe_from_scratch import valid_unicode
from checkpoint import load_model
from cli import ArgumentParser, InputError, in_range, positive, run, seed, token_ids
from sampling import Sampling, next_token


@torch.no_grad()
def generate(model, tokenizer, prompt_ids, max_new_tokens, **sampling):
    """Yield max_new_tokens token ids, each sampled given the prompt and those before it.

    An end-of-text token does not end the stream: what follows it is a new document, written with an empty context.
    sampling: the fields of Sampling.
    """
    sampling = Sampling(**sampling)
    context = [tokenizer.end_of_text, *token_ids(prompt_ids, tokenizer.vocab_size)]
    model.eval()
    device = next(model.parameters()).device
    # Of our own, so that sampling leaves the random state of training alone.
    rng = torch.Generator().manual_seed(sampling.seed)
    for _ in range(in_range("max_new_tokens", max_new_tokens, int, 1, 2 ** 31 - 1)):
        window = context[-model.config.max_position_embeddings:]   # learned positions end here: older tokens drop out
        logits = model(torch.tensor([window], device=device))[0, -1].float().cpu()   # (V,)
        token = next_token(logits, window, tokenizer, sampling, rng)
        context = [token] if token == tokenizer.end_of_text else context + [token]
        yield token


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
    parser.add_argument("--max-new-tokens", type=positive(int), default=200, metavar="N", help="tokens to write")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "out", metavar="DIR",
                        help="folder that train.py wrote")
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
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    arguments = parser.parse_args()
    if (arguments.prompt != "") + (arguments.prompt_flag is not None) + arguments.interactive > 1:
        raise InputError("PROMPT, --prompt and --interactive each say what to continue; give one of them")
    if "" in arguments.stop:
        raise InputError("--stop needs a text that is not empty")
    return arguments


def main():
    arguments = parse_arguments()
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p,
                        arguments.repetition_penalty, arguments.seed)
    model, tokenizer = load_model(arguments.checkpoint)
    max_new_tokens = arguments.tokens or arguments.max_new_tokens

    def answer(prompt):
        prompt = valid_unicode(prompt)   # a terminal may hand over bytes that are no UTF-8
        tokens = generate(model, tokenizer, tokenizer.encode(prompt), max_new_tokens, **vars(sampling))
        print(prompt, end="", flush=True)
        stream(tokens, tokenizer, arguments.stop)

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
