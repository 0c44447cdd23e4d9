"""Cross-entropy: how surprised a model is by what really came next. The one number that training makes smaller.

The loss of one token is -ln p, where p is the probability the model had given to the token that came. Certain and right
costs 0; one in a million costs 13.8. This file builds the loss label by label, carries it from nats to bits per byte
(the unit in which every chapter of this repository reports), shows its gradient, what padding does to it when one
divides by the wrong count, and the floor below which no honest model gets.

    python chapter-01-foundations/cross_entropy_loss.py

Shape letters: N tokens (a batch (B, L) flattened), V size of the vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from assert_equal import check_equal
from cli import run
from results import FIGURES
from softmax import log_softmax, softmax

IGNORE = -100   # a target that does not count (padding); the default ignore_index of F.cross_entropy

# A document of five tokens, the last being its end, padded to eight positions; and a model's scores for each of them.
TEXT = "Fee fi fo fum"
VOCAB = ["Fee", " fi", " fo", " fum", "<end>"]
TARGETS = torch.tensor([0, 1, 2, 3, 4, IGNORE, IGNORE, IGNORE])   # (N,)
LOGITS = torch.tensor([   # (N, V), a row for each position, a column for each token of VOCAB
    [4.0, 1.0, 1.0, 0.5, 0.0],     # the beginning: "Fee" is likely
    [0.0, 3.0, 1.5, 1.5, -1.0],
    [0.0, 1.0, 1.5, 1.5, 0.0],     # " fo" or " fum"? undecided
    [0.0, 0.0, 2.5, 0.5, 0.0],     # wrong: expects " fo" again
    [0.0, 0.0, 0.0, 0.0, 5.0],     # sure that this is the end
    *[[0.0] * 5] * 3])
COIN = torch.tensor([0.8, 0.2])   # a source of known entropy: p(heads), p(tails)


def token_nats(logits, targets):
    """-ln p(target) at every position, 0 where the target is IGNORE: logits (N, V), targets (N,) -> (N,)."""
    counted = targets != IGNORE
    index = targets.where(counted, 0)   # -100 is not a row of anything; what stands here instead is dropped below
    nats = -log_softmax(logits).gather(1, index[:, None]).squeeze(1)
    return nats.where(counted, 0)


def cross_entropy(logits, targets):
    """Mean nats of the targets that count: logits (N, V), targets (N,) -> scalar; nan (0/0) if none counts.

    The trap is the divisor. Divided by N, padding included, loss and gradient shrink with every padding token: the run
    looks better than it is, and a batch weighs the less the more it is padded.
    """
    return token_nats(logits, targets).sum() / (targets != IGNORE).sum()


def cross_entropy_gradient(logits, targets):
    """d cross_entropy / d logits = (p - onehot(target)) / counted tokens, 0 in ignored rows: (N, V)."""
    counted = targets != IGNORE
    onehot = F.one_hot(targets.where(counted, 0), logits.shape[1])
    return (softmax(logits) - onehot) * counted[:, None] / counted.sum()


def bits_per_byte(nats, num_bytes):
    """All nats spent on a text, in bits, for each of its UTF-8 bytes: the same scale for every tokenizer."""
    return nats / math.log(2) / num_bytes


def expected_bits(p, q):
    """-sum p log2 q: bits per token that a model believing q spends on a source p, on average. (V,), (V,) -> scalar.

    With q = p it is the entropy of the source. Every other q costs more, by the divergence KL(p || q).
    """
    return -(p * q.log2()).sum()


def show_labels():
    nats = token_nats(LOGITS, TARGETS)
    print(f"1. Label by label. What the model gave to the token that came, in {TEXT!r}.\n")
    print(f"    {'target':<10}{'bytes':>6}{'p(target)':>11}{'nats = -ln p':>14}{'bits = -log2 p':>16}")
    for target, loss in zip(TARGETS.tolist(), nats.tolist()):
        if target == IGNORE:
            print(f"    {'(padding)':<10}{'-':>6}{'-':>11}{'ignored':>14}{'ignored':>16}")
        else:
            size = 0 if VOCAB[target] == "<end>" else len(VOCAB[target].encode())
            print(f"    {VOCAB[target]:<10}{size:>6}{math.exp(-loss):>11.3f}{loss:>14.3f}{loss / math.log(2):>16.3f}")
    total, size = nats.sum().item(), len(TEXT.encode())
    print(f"    {'total':<10}{size:>6}{'':>11}{total:>14.3f}{total / math.log(2):>16.3f}\n")
    check_equal("cross_entropy = F.cross_entropy, padding ignored", cross_entropy(LOGITS, TARGETS),
                F.cross_entropy(LOGITS, TARGETS, ignore_index=IGNORE))
    mean = cross_entropy(LOGITS, TARGETS).item()
    print(f"    loss {mean:.3f} nats per token; perplexity exp(loss) = {math.exp(mean):.2f}, a choice among so many")
    print(f"    bits per byte {total:.3f} / ln 2 / {size} = {bits_per_byte(total, size):.3f}")
    # A character model reads 13 characters and the end. Let it be exactly as good: the same total.
    print(f"    The same {total:.3f} nats spent by a character model on 14 tokens: loss {total / 14:.3f}, perplexity"
          f" {math.exp(total / 14):.2f}, bits per\n    byte still {bits_per_byte(total, size):.3f}."
          " The losses of two tokenizers do not compare; their bits per byte do.")


def show_padding():
    print("\n2. The divisor. The same document, padded further and further.\n")
    print(f"    {'positions':>9}{'/ counted tokens':>19}{'/ all positions':>18}")
    for length in (5, 8, 16, 32):
        logits = F.pad(LOGITS[:5], (0, 0, 0, length - 5))
        targets = F.pad(TARGETS[:5], (0, length - 5), value=IGNORE)
        print(f"    {length:>9}{cross_entropy(logits, targets):>19.3f}{token_nats(logits, targets).mean():>18.3f}")


def show_coin():
    """Predict 10,000 flips of a biased coin with several beliefs q; returns the losses seen, [(q, bits)]."""
    floor = expected_bits(COIN, COIN)
    flips = torch.multinomial(COIN, 10_000, replacement=True, generator=torch.Generator().manual_seed(0))   # 0 is heads
    print(f"\n5. The floor. A coin with p(heads) = {COIN[0]:.1f} has {floor:.3f} bits of entropy. No q does better.\n")
    print(f"    {'q(heads)':>8}{'expected bits':>15}{'- entropy = KL':>16}{'on 10,000 flips':>17}")
    seen = []
    for q_heads in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
        q = torch.tensor([q_heads, 1 - q_heads])
        bits = token_nats(q.log().expand(len(flips), 2), flips) / math.log(2)   # ln q is a logit whose softmax is q
        expected = expected_bits(COIN, q)
        print(f"    {q_heads:>8}{expected:>15.3f}{expected - floor:>16.3f}{bits.mean():>17.3f}")
        seen.append((q_heads, bits.mean().item()))
    error = token_nats(COIN.log().expand(len(flips), 2), flips).std() / math.log(2) / len(flips) ** 0.5
    print(f"\n    The floor holds on average; the standard error of 10,000 flips is {error:.3f} bits. A loss so far"
          " under the floor\n    is luck; one much farther under is a leak: the model has seen what it was to predict.")
    return seen


def draw(path, seen):
    """Left: the loss of a token against its probability. Right: the coin's cross-entropy against the model's belief."""
    fig = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    left, right = fig.subplots(1, 2)
    grid = torch.linspace(0.005, 0.995, 199)
    left.plot(grid, -grid.log2(), color="#1f6f8b")
    for target, nats in zip(TARGETS[:5].tolist(), token_nats(LOGITS, TARGETS).tolist()):
        point = (math.exp(-nats), nats / math.log(2))
        left.plot(*point, "o", color="#d9822b")
        left.annotate(VOCAB[target].strip(), point, (5, 6), textcoords="offset points", fontsize=11)
    left.set(title="Loss of one token", xlabel="probability given to the token that came", ylabel="bits",
             xlim=(0, 1.12), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1], ylim=(0, 7.8))
    floor = expected_bits(COIN, COIN)
    expected = [expected_bits(COIN, torch.stack([q, 1 - q])) for q in grid]
    right.plot(grid, expected, color="#1f6f8b", label="expected loss")
    right.plot(*zip(*seen), "o", color="#d9822b", label="loss on 10,000 flips")
    right.axhline(floor, color="#888888", linestyle="--")
    right.text(0.02, floor - 0.05, f"entropy of the coin: {floor:.3f}", color="#555555", va="top", fontsize=10)
    right.annotate("", (0.5, floor), (0.5, 1), arrowprops=dict(arrowstyle="<->", color="#b23a48"))
    right.text(0.48, (1 + floor) / 2, "the price of\n'fair': KL(p || q)", color="#b23a48", ha="right", va="center")
    right.set(title=f"A coin with p(heads) = {COIN[0]:.1f}", xlabel="q(heads), what the model believes",
              ylabel="bits per flip", ylim=(0.5, 2.5))
    right.legend(frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def main():
    show_labels()
    show_padding()

    print("\n3. The gradient: (p - onehot) / counted tokens. Rows sum to 0: what the target gains, the others pay.\n")
    gradient = cross_entropy_gradient(LOGITS, TARGETS)
    print(f"    {'target':<10}" + "".join(f"{token:>9}" for token in VOCAB))
    for target, row in zip(TARGETS[:5].tolist(), gradient.tolist()):
        print(f"    {VOCAB[target]:<10}" + "".join(f"{entry:>9.3f}" for entry in row))
    logits = LOGITS.clone().requires_grad_()
    F.cross_entropy(logits, TARGETS, ignore_index=IGNORE).backward()
    check_equal("(p - onehot) / counted = autograd", gradient, logits.grad)

    print("\n4. A model that knows nothing gives every token 1/V and pays ln V. Where a fresh model must start.\n")
    for name, V in (("a coin", 2), ("bytes", 256), ("this chapter's BPE", 1024), ("GPT-2", 50257)):
        loss = cross_entropy(torch.zeros(1, V), torch.tensor([0])).item()
        print(f"    {name:<20} V = {V:>6,}   {loss:>6.3f} nats = {loss / math.log(2):>6.3f} bits = log2 V")

    draw(FIGURES / "cross_entropy.png", show_coin())
    print("\nAt work: F.cross_entropy(logits, targets), which ignores -100 and divides by the counted tokens."
          "\nBoth curves as a picture: figures/cross_entropy.png")


if __name__ == "__main__":
    run(main)
