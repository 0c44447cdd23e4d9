"""A prompt in, text out, from the checkpoint that train.py wrote.

    python generate.py "ROMEO:" 200        (in this folder)
    python generate.py --interactive
    python generate.py --checkpoint Qwen/Qwen3-0.6B --chat "Why is the sky blue?"

Only the text goes to standard output. Every new token runs the model over the whole text again; chapter 5 ends that waste.
"""
import codecs
import sys
from pathlib import Path

import torch

from bpe_from_scratch import valid_unicode
from checkpoint import load_model
from data import packed_sequence_collate_fn
from errors import ArgumentParser, InputError, in_range, positive, run, seed, token_ids


def check_sampling(temperature, top_k, top_p, seed):
    """The settings of sample() and a seed, as plain numbers."""
    return (in_range("--temperature", temperature, float, 0, 1e30),
            None if top_k is None else in_range("--top-k", top_k, int, 1, 2 ** 31 - 1),
            None if top_p is None else in_range("--top-p", top_p, float, 1e-30, 1),
            in_range("--seed", seed, int, 0, 2 ** 63 - 1))


@torch.no_grad()
def generate(model, tokenizer, prompt_ids, max_new_tokens, temperature=0.8, top_k=None, top_p=None, seed=0):
    """Yield up to max_new_tokens token ids, each sampled given the prompt and those before it.

    An end-of-text token does not end the stream: what follows it is a new document, written with an empty context.
    The end of a turn does: after it, it is the user's turn. An answer to a turn ends at either, as Qwen's own configuration says.
    """
    temperature, top_k, top_p, seed = check_sampling(temperature, top_k, top_p, seed)
    context = token_ids(prompt_ids, tokenizer.vocab_size)
    if not context:
        raise InputError("a prompt needs at least one token")
    model.eval()
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(seed)   # of our own, so that sampling leaves the random state of training alone
    ends = {tokenizer.end_of_turn, tokenizer.end_of_text} if tokenizer.end_of_turn in context else {tokenizer.end_of_turn}
    for _ in range(in_range("max_new_tokens", max_new_tokens, int, 1, 2 ** 31 - 1)):
        window = context[-model.config.max_position_embeddings:]   # never trained on more: older tokens drop out
        batch = packed_sequence_collate_fn([(window, window)]).to(device)
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)[-1].float().cpu()   # (V,)
        logits[tokenizer.vocab_size:] = float("-inf")   # spare rows of the embedding, never a target
        if not logits.max().isfinite():   # of a nan and others the largest is nan
            raise InputError("the model answers nan or inf instead of scores: its training diverged, or its weights are damaged")
        token = sample(logits, temperature, top_k, top_p, dice)
        if token in ends:
            return
        context = [token] if token == tokenizer.end_of_text else context + [token]
        yield token


def sample(logits, temperature, top_k, top_p, dice):
    """One token id from logits (V,). temperature 0 takes the best; top_k keeps the k best, top_p (Holtzman et al. 2020)
    the fewest best tokens whose probabilities reach p."""
    if temperature < 1e-30:   # 0, or so little that float32 cannot divide by it
        return logits.argmax().item()
    # The best score moves to 0 first: softmax does not mind, and dividing by a tiny temperature gives -inf, not nan.
    scores, ids = ((logits - logits.max()) / temperature).sort(descending=True)   # (V,), best first
    if top_k:
        scores[top_k:] = float("-inf")
    if top_p:
        probabilities = scores.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities    # the mass of all better tokens; 0 for the best
        scores[before >= top_p] = float("-inf")
    return ids[torch.multinomial(scores.softmax(dim=-1), 1, generator=dice)].item()


def stream(tokens, tokenizer):
    """Write token ids to standard output as they come."""
    # A token may end in the middle of a UTF-8 character: the decoder holds incomplete bytes back until the rest arrives.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        print(decoder.decode(tokenizer.tokens[token]), end="", flush=True)
    print(decoder.decode(b"", final=True))


def parse_arguments():
    parser = ArgumentParser(description="Continue a prompt with the model that train.py wrote.")
    number = positive(float)
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="the text to continue")
    parser.add_argument("tokens", nargs="?", type=positive(int), metavar="TOKENS", help="same as --max-new-tokens")
    parser.add_argument("--prompt", dest="prompt_flag", metavar="TEXT", help="same as PROMPT")
    parser.add_argument("--max-new-tokens", type=positive(int), default=200, metavar="N", help="tokens to write")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "out", metavar="DIR|HUB_ID",
                        help="folder that train.py wrote, or a Qwen3 of the Hugging Face hub")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question to a model that was trained to answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=positive(int), help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=number, help="sample from the fewest tokens that hold this probability")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    arguments = parser.parse_args()
    if (arguments.prompt != "") + (arguments.prompt_flag is not None) + arguments.interactive > 1:
        raise InputError("PROMPT, --prompt and --interactive each say what to continue; give one of them")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    return arguments


def main():
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.checkpoint)

    def answer(prompt):
        prompt = valid_unicode(prompt)   # a terminal may hand over bytes that are no UTF-8
        if arguments.chat:
            prompt_ids, _ = tokenizer.encode_conversation([{"role": "user", "content": prompt}], answer=True)
        else:
            prompt_ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
            print(prompt, end="", flush=True)
        tokens = generate(model, tokenizer, prompt_ids, arguments.tokens or arguments.max_new_tokens,
                          arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        stream(tokens, tokenizer)

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
