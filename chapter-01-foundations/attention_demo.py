"""Attention: every token gathers from the tokens before it what it needs, and decides itself where to look.

A token asks (its query), every token shows what it has to offer (its key), and wherever the two match, the token's
content (its value) is copied over: softmax(Q K^T / sqrt(K)) V. It is the only place in a GPT where tokens meet. Here
it is computed three times, with loops, with matrices and by torch, all equal; two heads of a well-known circuit are set
by hand, so that one can watch a match; and then come the reason for the square root and two traps of masking.

    python chapter-01-foundations/attention_demo.py

Shape letters: B sentences, L tokens in the longest, H heads, K width of a head, D = H * K, V different words.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from assert_equal import check_equal
from cli import run
from results import FIGURES
from softmax import softmax

SENTENCE = "<s> the cat saw the dog and the cat".split()
PADDED = "<s> the dog slept (pad) (pad) (pad) (pad) (pad)".split()   # a shorter one, filled up to the same length


def attention_by_loops(q, k, v, mask):
    """Attention with pencil and paper: q, k, v (B, H, L, K), mask (B, 1, L, L) -> (B, H, L, K)."""
    B, H, L, K = q.shape
    output = torch.zeros_like(v)
    for b, h, query in itertools.product(range(B), range(H), range(L)):
        visible = [key for key in range(L) if mask[b, 0, query, key]]
        scores = [sum(q[b, h, query, d] * k[b, h, key, d] for d in range(K)) / math.sqrt(K) for key in visible]
        weights = softmax(torch.stack(scores))
        for weight, key in zip(weights, visible):
            output[b, h, query] += weight * v[b, h, key]
    return output


def attention(q, k, v, mask):
    """softmax(Q K^T / sqrt(K)) V (Vaswani et al. 2017).

    q, k, v (..., L, K); mask (..., L, L) is True where a query (row) may look at a key (column).
    Returns the output (..., L, K) and the weights (..., L, L). A query that may look at nothing becomes nan.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])   # (..., L, L)
    # exp(-inf) = 0: what is masked gets no weight and has no part in the sum.
    weights = softmax(scores.masked_fill(~mask, -math.inf))
    return weights @ v, weights


def attention_masked_too_late(q, k, v, mask):
    """The bug: weights are zeroed after the softmax, when masked tokens have already taken their share of the sum."""
    weights = softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])) * mask
    return weights @ v, weights


def split_heads(x, num_heads):
    """(B, L, D) -> (B, H, L, K): a head is a slice of the width; H in front lets one matmul serve all heads."""
    B, L, D = x.shape
    return x.view(B, L, num_heads, D // num_heads).transpose(1, 2)


def masks(lengths):
    """For sentences of these lengths, padded to the longest: causal, padding and both, (B, 1, L, L) each."""
    B, L = len(lengths), max(lengths)
    causal = torch.ones(B, 1, L, L, dtype=torch.bool).tril()           # a query sees itself and the past
    is_token = torch.arange(L) < torch.tensor(lengths)[:, None]        # (B, L)
    padding = is_token[:, None, None, :].expand(B, 1, L, L)            # whoever asks: a padding key is never seen
    return causal, padding, causal & padding


def induction_heads(tokens, sharpness=20.0):
    """Two heads, set by hand, that continue a repetition: "cat saw ... cat" -> "saw" (Olsson et al. 2022).

    Returns the attention weights of both, (L, L) each, the distribution of the next token, (L, V), and its V words.
    """
    words = sorted(set(tokens))
    L, causal = len(tokens), masks([len(tokens)])[0][0, 0]
    token = F.one_hot(torch.tensor([words.index(word) for word in tokens])).float()   # (L, V), what stands here
    position = torch.eye(L)                                                           # (L, L), where it stands

    # Head 1. Query: the position before mine. Key: my position. Value: my token. Now each place knows its predecessor.
    query = sharpness * math.sqrt(L) * position[[0, *range(L - 1)]]
    before, weights_before = attention(query, position, token, causal)               # (L, V), (L, L)

    # Head 2. Query: my token. Key: the token before me. They match where something followed an earlier copy of me.
    # One more dimension, half a match with "<s>", gives a query that finds nothing a place to look: an attention sink.
    query = sharpness * math.sqrt(len(words) + 1) * F.pad(token, (0, 1), value=0.5)   # (L, V + 1)
    key = torch.cat([before, position[:, :1]], dim=1)                                 # (L, V + 1)
    says, weights = attention(query, key, token, causal)                              # (L, V), (L, L)
    return weights_before, weights, says, words


def show_induction():
    print("\n3. Two heads set by hand. Head 1 tells each token who stands before it. Head 2 looks for what came after"
          "\n   an earlier copy of the token that asks, and says it; where there is none, it looks at <s>.\n")
    *heads, says, words = induction_heads(SENTENCE)
    print(f"    {'token':<8}{'head 1 looks at':<18}{'head 2 looks at':<18}{'says next'}")
    for i, token in enumerate(SENTENCE):
        seen = [" ".join(f"{SENTENCE[j]}[{j}]" for j in range(len(SENTENCE)) if head[i, j] > 0.01) for head in heads]
        answer = ", ".join(f"{word} {p:.2f}" for word, p in zip(words, says[i]) if p > 0.01)
        print(f"    {token:<8}{seen[0]:<18}{seen[1]:<18}{answer}")
    return heads


def show_scaling():
    print("\n4. Why sqrt(K). The sum of K terms of variance 1 has standard deviation sqrt(K). A query meets 16 keys:\n")
    print(f"    {'':>25}{'largest weight':>24}{'gradient let through':>24}")
    print(f"    {'K':>5}{'std':>10}{'sqrt(K)':>10}" + f"{'plain':>14}{'/ sqrt(K)':>10}" * 2)
    curves = []
    for K in (1, 4, 16, 64, 256, 1024):
        q, k = torch.randn(500, 1, K), torch.randn(500, 16, K)         # 500 such queries
        scores = (q * k).sum(dim=-1)                                   # (500, 16)
        weights = [softmax(scores), softmax(scores / math.sqrt(K))]
        largest = [p.max(dim=-1).values.mean().item() for p in weights]
        gradient = [1 - (p ** 2).sum(dim=-1).mean() for p in weights]  # trace of the Jacobian diag(p) - p p^T
        print(f"    {K:>5}{scores.std():>10.2f}{math.sqrt(K):>10.2f}{largest[0]:>14.2f}{largest[1]:>10.2f}"
              f"{gradient[0]:>14.2f}{gradient[1]:>10.2f}")
        curves.append((K, *largest))
    return curves


def show_traps(q, k, v, causal):
    print("\n5. Trap: masking after the softmax. Edit the last token; how far does an earlier output move?\n")
    edit = F.pad(torch.ones(1, k.shape[-1]), (0, 0, k.shape[-2] - 1, 0))   # (L, K), zero but for the last row
    for name, rule in (("masked before", attention), ("masked after", attention_masked_too_late)):
        change = (rule(q, k + edit, v + edit, causal)[0] - rule(q, k, v, causal)[0])[..., :-1, :].abs().max()
        print(f"    {name:<16}{change:.4f}")
    print("    Masked after, the future shows in the present: training can use it, generation does not have it.")

    print("\n6. Trap: a query that may look at nothing, as in a sentence padded on the left. Its row is 0/0.\n")
    left_padded = causal.clone()
    left_padded[..., 0] = False
    itself = torch.eye(q.shape[-2], dtype=torch.bool)
    for name, output in (("written out", attention(q, k, v, left_padded)[0]),
                         ("torch", F.scaled_dot_product_attention(q, k, v, attn_mask=left_padded)),
                         ("may see itself", attention(q, k, v, left_padded | itself)[0])):
        print(f"    {name:<16}" + ", ".join(f"{x:.3f}" for x in output[0, 0, 0, :4]))
    print("    One nan spreads to every parameter. torch puts 0; model.py lets each query, padding too, see itself.")


def draw(path, pictures, curves):
    fig = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    axes = fig.subplots(2, 3).flatten()
    fig.suptitle("Row: the token that looks.   Column: the token it looks at.")
    teal = LinearSegmentedColormap.from_list("teal", ["#f1f1ee", "#1f6f8b"])
    for ax, (title, words, weights) in zip(axes, pictures):
        ax.imshow(weights.numpy(), cmap=teal, vmin=0, vmax=1)
        ax.set_xticks(range(len(words)), words, rotation=90)
        ax.set_yticks(range(len(words)), words)
        for i in range(1, len(words)):
            ax.axhline(i - 0.5, color="white", linewidth=1)
            ax.axvline(i - 0.5, color="white", linewidth=1)
        ax.set_title(title, fontsize=12)
    K, plain, scaled = zip(*curves)
    axes[5].semilogx(K, plain, "o-", color="#b23a48")
    axes[5].semilogx(K, scaled, "o-", color="#1f6f8b")
    axes[5].text(60, 0.7, "q . k", color="#b23a48", fontsize=12)
    axes[5].text(60, 0.29, "q . k / sqrt(K)", color="#1f6f8b", fontsize=12)
    axes[5].set(title="largest of 16 random weights", xlabel="K, width of a head", ylim=(0, 1))
    fig.savefig(path)


def main():
    torch.manual_seed(0)
    B, L, H, D = 2, len(SENTENCE), 2, 16
    causal, padding, both = masks([L, PADDED.index("(pad)")])          # (B, 1, L, L)
    x = torch.randn(B, L, D)                                           # embeddings of the two sentences
    q, k, v = (split_heads(x @ torch.randn(D, D) / math.sqrt(D), H) for _ in range(3))   # (B, H, L, K)

    print(f"1. Three masks for {' '.join(PADDED)!r}. Row: who looks. Column: at whom.\n")
    print("    causal      padding     both")
    for rows in zip(*(mask[1, 0].tolist() for mask in (causal, padding, both))):
        print("    " + "   ".join("".join(".#"[seen] for seen in row) for row in rows))

    print("\n2. Two sentences, two heads, three ways.\n")
    for name, mask in (("causal", causal), ("causal and padding", both)):
        output, _ = attention(q, k, v, mask)
        check_equal(f"{name}: matrices = loops", output, attention_by_loops(q, k, v, mask))
        # A trap of names: True means "may look" here, and "may not look" in the masks of nn.MultiheadAttention.
        check_equal(f"{name}: matrices = F.scaled_dot_product_attention", output,
                    F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    heads, curves = show_induction(), show_scaling()
    show_traps(q, k, v, causal)
    draw(FIGURES / "attention.png", [
        ("causal: not the future", PADDED, causal[1, 0]), ("padding: not the filler", PADDED, padding[1, 0]),
        ("both", PADDED, both[1, 0]), ("head 1: the token before me", SENTENCE, heads[0]),
        ("head 2: what followed my twin", SENTENCE, heads[1])], curves)
    print("\nAt work: F.scaled_dot_product_attention(q, k, v, is_causal=True), which runs in one pass where it can.\n"
          "Masks and heads as a picture: figures/attention.png")


if __name__ == "__main__":
    run(main)
