"""Softmax turns scores into probabilities: all positive, summing to one.

A language model gives every token of its vocabulary a score, called a logit; softmax makes of the scores the
distribution from which the next token is drawn. Inside every attention layer it decides how much to look where. It is
one line of algebra, and the line as a textbook prints it returns nan for logits that real models produce. Here: the
definition, that trap and the way out, temperature, the logarithm that losses need, the gradient, and softmax in a
single pass, the idea inside flash attention.

    python chapter-01-foundations/softmax.py

Shape letters: V scores in a row (tokens of a vocabulary, or keys of an attention), D width of a value;
"..." stands for any leading dimensions.
"""
import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from assert_equal import check_equal
from cli import run
from results import FIGURES

# Scores for the word after "The cat sat on the". Quarters, so that adding 1000 to them below is exact in float32.
WORDS = ["mat", "floor", "sofa", "roof", "moon"]
LOGITS = torch.tensor([4.0, 3.0, 2.5, 1.0, -1.0])   # (V,)


def softmax_as_defined(x):
    """exp(x_i) / sum_j exp(x_j) over the last dimension: (..., V) -> (..., V). To read, not to use: it overflows."""
    exps = x.exp()
    return exps / exps.sum(dim=-1, keepdim=True)


def softmax(x, temperature=1.0):
    """Softmax of x / temperature over the last dimension: (..., V) -> (..., V). temperature > 0.

    The largest score is subtracted first. exp(x - m) is exp(x) / exp(m): numerator and denominator shrink by the same
    factor and the quotient stays, but now the largest exponent is 0, so that nothing overflows, and the sum is at
    least 1, so that nothing is divided by zero.
    """
    x = x / temperature
    exps = (x - x.max(dim=-1, keepdim=True).values).exp()
    return exps / exps.sum(dim=-1, keepdim=True)


def logsumexp(x):
    """ln sum_j exp(x_j) over the last dimension: (..., V) -> (...). A soft maximum, at most ln V above the largest."""
    m = x.max(dim=-1, keepdim=True).values                     # (..., 1)
    return (m + (x - m).exp().sum(dim=-1, keepdim=True).log()).squeeze(-1)


def log_softmax(x):
    """ln softmax(x) without passing through a probability that may have rounded to 0: (..., V) -> (..., V)."""
    x = x - x.max(dim=-1, keepdim=True).values
    return x - x.exp().sum(dim=-1, keepdim=True).log()


def softmax_jacobian(p):
    """d p_i / d x_j = p_i (1[i = j] - p_j), that is diag(p) - p p^T: (..., V) -> (..., V, V)."""
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def softmax_backward(p, grad):
    """That Jacobian times the gradient that arrives, without making V * V numbers: (..., V) -> (..., V)."""
    return p * (grad - (grad * p).sum(dim=-1, keepdim=True))


def online_softmax_average(scores, values):
    """softmax(scores) @ values in one pass: scores (V,), values (V, D) -> (D,) (Milakov & Gimelshein 2018).

    The plain way reads the scores three times: for the maximum, for the sum, for the quotients. Here each score is
    seen once and forgotten. The price: whenever a larger score turns up, everything summed so far was taken relative
    to the wrong maximum, and one multiplication puts it right.
    """
    largest = torch.tensor(-math.inf)
    total, weighted = torch.zeros(()), torch.zeros(values.shape[-1])
    for score, value in zip(scores, values):
        new_largest = torch.maximum(largest, score)
        rescale = (largest - new_largest).exp()   # 1 unless the maximum rose; exp(-inf) = 0 the first time
        weight = (score - new_largest).exp()
        total = total * rescale + weight
        weighted = weighted * rescale + weight * value
        largest = new_largest
    return weighted / total


def show_overflow():
    limit = math.log(torch.finfo(torch.float32).max)
    half = math.log(torch.finfo(torch.float16).max)
    print(f"\n2. The trap. exp(x) leaves float32 at x = {limit:.1f} (float16: {half:.1f}): inf/inf. Far below: 0/0.\n")
    print(f"    {'logits':<18}{'exp(x)':<26}{'as defined':<18}maximum subtracted")
    for pair in ([2, 1], [88, 87], [89, 88], [1000, 0], [-110, -111]):
        x = torch.tensor(pair, dtype=torch.float32)
        exps = ", ".join(f"{e:.2g}" for e in x.exp().tolist())
        naive, safe = (", ".join(f"{p:.3f}" for p in f(x).tolist()) for f in (softmax_as_defined, softmax))
        print(f"    {str(pair):<18}{exps:<26}{naive:<18}{safe}")
    shift = (softmax(LOGITS + 1000) - softmax(LOGITS)).abs().max().item()
    print(f"\n    Only differences of logits matter: softmax(x + 1000) - softmax(x) is at most {shift}.")


def draw_temperatures(path):
    """Bars of the same five logits at three temperatures."""
    fig = Figure(figsize=(8, 2.9), dpi=120, layout="constrained")
    for ax, T, color in zip(fig.subplots(1, 3, sharey=True), (0.25, 1.0, 4.0), ("#d9822b", "#1f6f8b", "#7a5195")):
        p = softmax(LOGITS, T)
        bits = -(p * p.log2()).sum().item()
        ax.barh(WORDS, p.tolist(), color=color)
        for row, share in enumerate(p.tolist()):
            ax.text(share + 0.02, row, f"{share:.1%}", va="center", fontsize=10)
        ax.set(title=f"T = {T:g}  (entropy {bits:.2f} bits)", xlim=(0, 1.25), xticks=[0, 0.5, 1], xlabel="probability")
        ax.spines[["top", "right"]].set_visible(False)
    ax.invert_yaxis()   # shared: the likeliest word on top in all three
    fig.suptitle("The same logits at three temperatures: sharper, as they are, flatter")
    fig.savefig(path)


def main():
    print('1. The definition. "The cat sat on the ..."\n')
    print(f"    {'word':<8}{'logit':>7}{'exp(logit)':>13}{'probability':>14}")
    for word, x, e, p in zip(WORDS, LOGITS, LOGITS.exp(), softmax_as_defined(LOGITS)):
        print(f"    {word:<8}{x:>7.2f}{e:>13.2f}{p:>14.3f}")
    print(f"    {'sum':<15}{LOGITS.exp().sum():>13.2f}{softmax_as_defined(LOGITS).sum():>14.3f}\n")
    check_equal("softmax = torch.softmax", softmax(LOGITS), torch.softmax(LOGITS, dim=-1))

    show_overflow()

    print("\n3. The logarithm. A loss is -ln p, and p of a hopeless token rounds to 0. Never take log(softmax(x)).\n")
    x = torch.tensor([0.0, -50.0, -200.0])
    for name, result in (("log(softmax(x))", softmax(x).log()), ("log_softmax(x)", log_softmax(x))):
        print(f"    {name:<18}{result.tolist()}")
    check_equal("log_softmax = torch's", log_softmax(LOGITS), F.log_softmax(LOGITS, dim=-1))
    check_equal("logsumexp = torch.logsumexp", logsumexp(LOGITS), LOGITS.logsumexp(dim=-1))

    print("\n4. The gradient. Raise one logit: its own p gains p(1 - p), every other p_j pays p p_j; the sum is 1.\n")
    jacobian = softmax_jacobian(softmax(LOGITS))
    for word, row in zip(WORDS, jacobian.tolist()):
        print(f"    {word:<8}" + "".join(f"{entry:>8.3f}" for entry in row) + f"   row sum {abs(sum(row)):.3f}")
    check_equal("diag(p) - p p^T = autograd", jacobian, torch.autograd.functional.jacobian(softmax, LOGITS))
    x = LOGITS.clone().requires_grad_()
    grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    torch.softmax(x, dim=-1).backward(grad)
    check_equal("p * (g - p.g) = autograd", softmax_backward(softmax(LOGITS), grad), x.grad)

    print("\n5. One pass. softmax(scores) @ values over 1,000 scores, each seen once, none kept.\n")
    generator = torch.Generator().manual_seed(0)
    scores, values = 5 * torch.randn(1000, generator=generator), torch.randn(1000, 4, generator=generator)
    check_equal("online average = softmax(scores) @ values", online_softmax_average(scores, values),
                torch.softmax(scores, dim=-1) @ values, tolerance=1e-5)

    draw_temperatures(FIGURES / "softmax.png")
    print("\nAt work: torch.softmax and F.log_softmax, which subtract the maximum. F.cross_entropy has the logarithm\n"
          "inside, and F.scaled_dot_product_attention has flash kernels that make one pass.\n"
          "Temperature as a picture: figures/softmax.png")


if __name__ == "__main__":
    run(main)
