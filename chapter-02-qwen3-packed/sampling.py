"""How the next token is chosen from the model's scores.

temperature, top-k, top-p and min-p change how often less likely tokens are drawn; a penalty keeps a text from repeating
itself.
"""
from dataclasses import dataclass

import torch

from cli import InputError, in_range


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
        for name, kind, low, high in (("temperature", float, 0, 1e30), ("top_k", int, 1, 2 ** 31 - 1),
                                      ("top_p", float, 1e-30, 1),
                                      ("min_p", float, 1e-30, 1), ("repetition_penalty", float, 1e-3, 1e3),
                                      ("seed", int, 0, 2 ** 63 - 1)):
            value = getattr(self, name)
            if value is not None or name not in ("top_k", "top_p", "min_p"):
                value = in_range(f"--{name.replace('_', '-')}", value, kind, low, high)
                object.__setattr__(self, name, value)   # frozen against others


def next_token(logits, context, tokenizer, sampling, rng):
    """One token id from logits (V,), which it may change."""
    logits[tokenizer.vocab_size:] = float("-inf")   # spare rows of the embedding, never a target
    if not logits.max().isfinite():   # of a nan and others the largest is nan
        raise InputError("the model answers nan or inf instead of scores: its training diverged, or its weights are"
                         " damaged")
    penalize(logits, context, sampling.repetition_penalty)
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, rng, sampling.min_p)


def penalize(logits, context, penalty):
    """Make tokens that the text contains less likely: positive scores are divided, negative ones multiplied (Keskar et
    al. 2019).
    """
    if penalty != 1:
        seen = torch.tensor(list(set(context)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)


def sample(logits, temperature, top_k, top_p, rng, min_p=None):
    """One token id from logits (V,). temperature 0 takes the best; top_k keeps the k best, top_p (Holtzman et al. 2020)
    the fewest best tokens whose probabilities reach p, min_p those that are at least min_p times as likely as the best.
    """
    if temperature < 1e-30:   # 0, or so little that float32 cannot divide by it
        return logits.argmax().item()
    # The best score moves to 0 first: softmax does not mind, and dividing by a tiny temperature gives -inf, not nan.
    scores, ids = ((logits - logits.max()) / temperature).sort(descending=True)   # (V,), best first
    if min_p:
        scores[scores.exp() < min_p] = float("-inf")
    if top_k:
        scores[top_k:] = float("-inf")
    if top_p:
        probabilities = scores.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities    # the mass of all better tokens; 0 for the best
        scores[before >= top_p] = float("-inf")
    return ids[torch.multinomial(scores.softmax(dim=-1), 1, generator=rng)].item()
