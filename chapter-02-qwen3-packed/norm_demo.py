"""LayerNorm and RMSNorm: what each takes from a token, what it leaves, and what that costs.

A norm gives every token the same length, so that no layer meets numbers of a size that it has not seen. LayerNorm,
which chapter 1 took from the library, subtracts the mean first (Ba et al. 2016); RMSNorm leaves it where it is (Zhang &
Sennrich 2019). Here both are written out, proven equal to the library's, and drawn. The bytes are counted, not timed.

    python chapter-02-qwen3-packed/norm_demo.py     seconds; writes figures/norm.png and results/norm_demo.json

Shape letters: T tokens, D width of a token. dy and dx: gradients of the output and of the input.
"""
import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cli import run
from model import CONFIGS, RMSNorm
from results import FIGURES, write_results

T, D, EPS = 1024, CONFIGS["small"].hidden_size, CONFIGS["small"].rms_norm_eps
TEAL, ORANGE, VIOLET, GREY = "#1f6f8b", "#d9822b", "#7a5195", "#888888"


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance) * weight + bias, written out."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)) + self.bias


def check_equal(claim, ours, expected, tolerance):
    difference = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
    print(f"    {claim:<66} largest difference {difference:.1e}")
    # Written as "not <=" because nan compares false with everything: a nan must fail too.
    assert not difference > tolerance and difference == difference, f"{claim}: {difference} > {tolerance}"


def forward_and_backward(norm, x, dy):
    """The output (T, D), the gradient of the input (T, D), and those of the parameters (D,)."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y, [x, *norm.parameters()], dy)


def projected(dy, x, weight, eps, mean_too):
    """dx by the formula: what dy says along the output is taken out, then all is divided by the length.

    The output has a fixed length, so pulling at it along its own direction does nothing. With mean_too (LayerNorm)
    nothing is left along (1, ..., 1) either.
    """
    x = x - x.mean(-1, keepdim=True) if mean_too else x
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)                        # (T, 1)
    y, g = x * scale, dy * weight                                                       # (T, D)
    g = g - g.mean(-1, keepdim=True) if mean_too else g
    return scale * (g - y * (g * y).mean(-1, keepdim=True))                             # (T, D)


def show_equalities():
    print(f"1. {T:,} random tokens of D = {D}, some short enough for eps to count. Output and all gradients:\n")
    size = torch.logspace(-3.5, 1, T)[:, None]                                          # (T, 1)
    x, dy = size * (torch.randn(T, D) + 1), torch.randn(T, D)                           # a mean as large as the spread
    norms = (RMSNorm(D, EPS), nn.RMSNorm(D, EPS)), (LayerNorm(D, EPS), nn.LayerNorm(D, EPS))
    for ours, library in norms:
        for parameter in ours.parameters():   # left at 1 and 0 a forgotten one would not show
            nn.init.normal_(parameter)
        library.load_state_dict(ours.state_dict())
        # dy times the size, because the gradient of a short token is as much longer, and so is its rounding.
        outcomes = [forward_and_backward(norm, x, dy * size) for norm in (ours, library)]
        check_equal(f"{type(ours).__name__} written out = nn.{type(ours).__name__}", *outcomes, 1e-3)
    return [ours for ours, _ in norms]


def show_the_mean():
    print("\n2. LayerNorm is RMSNorm of what is left without the mean, and a matrix can leave it out in advance:\n")
    h, matrix = torch.randn(T, D), torch.randn(D, D) / math.sqrt(D)
    x = h @ matrix.T + 1                                                                # (T, D)
    rms_norm, layer_norm = RMSNorm(D, EPS), nn.LayerNorm(D, EPS)
    expected = layer_norm(x)
    check_equal("LayerNorm(x) = RMSNorm(x - mean)", [rms_norm(x - x.mean(-1, keepdim=True))], [expected], 1e-4)
    centred = matrix - matrix.mean(0)   # each column without its mean
    check_equal("LayerNorm(W h + 1) = RMSNorm(centred W h)", [rms_norm(h @ centred.T)], [expected], 1e-4)
    print("    So a trained GPT with LayerNorm can be rewritten with RMSNorm and says the same (Jiang et al. 2023).")

    print("\n3. A token of spread 1 and some mean. What reaches the next layer, and in how many directions of"
          f" D = {D}\n   it can still move:\n")
    print(f"    {'mean':>8}{'LayerNorm: mean, spread':>28}{'RMSNorm: mean, spread':>28}")
    spread = nn.functional.layer_norm(torch.randn(D), (D,))
    for mean in (0, 1, 3, 10):
        both = [norm(spread + mean) for norm in (layer_norm, rms_norm)]
        print(f"    {mean:>8}" + "".join(f"{y.mean().abs():>18.2f}, {y.std(correction=0):>8.2f}" for y in both))
    ranks = [free_directions(norm) for norm in (layer_norm, rms_norm)]
    print(f"    directions{ranks[0]:>26}{ranks[1]:>28}")
    assert ranks == [D - 2, D - 1], f"LayerNorm leaves {ranks[0]} directions of {D}, RMSNorm {ranks[1]}"
    print("    That is the price: a large mean crowds out the rest. Nothing but training keeps it small.")


def free_directions(norm):
    """In how many directions the output moves when the input does: the rank of the Jacobian."""
    jacobian = torch.autograd.functional.jacobian(norm, torch.randn(D))                 # (D, D)
    return torch.linalg.matrix_rank(jacobian, rtol=1e-4).item()


def show_gradients(rms_norm, layer_norm):
    print("\n4. The gradient is projected: nothing of it along the token, for LayerNorm nothing along (1, ..., 1)"
          " either.\n")
    x, dy = torch.randn(T, D) + 1, torch.randn(T, D)
    for norm, mean_too in ((rms_norm, False), (layer_norm, True)):
        name = type(norm).__name__
        dx = forward_and_backward(norm, x, dy)[1]
        check_equal(f"{name}: dx = the projection", [dx], [projected(dy, x, norm.weight, norm.eps, mean_too)], 1e-4)
        check_equal(f"{name}: dx . x = 0", [(dx * x).sum(-1)], [torch.zeros(T)], 1e-3)
        print(f"    {f'{name}: sum of dx':<66} at most            {dx.sum(-1).abs().max():.1e}")
        far = forward_and_backward(norm, 10 * x, dy)[1]
        check_equal(f"{name}: ten times the token, a tenth of its gradient", [10 * far], [dx], 1e-4)


class Traffic(TorchDispatchMode):
    """Counts operators, and the bytes that they read and write as if nothing stayed in a cache."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:   # another shape of the same bytes
            self.operators += 1
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes())   # a mean that is expanded is read once
                              for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def traffic(norm):
    """A row of the table: what one norm of x (T, D) runs, reads, writes and keeps for the backward pass.

    In passes: one is x read or written once, rounded, for a mean of each token is a hundredth of x.
    """
    x, dy, kept = torch.randn(T, D, requires_grad=True), torch.randn(T, D), {}
    with Traffic() as forward, torch.autograd.graph.saved_tensors_hooks(
            lambda saved: kept.update({saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes()}) or saved,
            lambda saved: saved):
        y = norm(x)
    with Traffic() as backward:
        torch.autograd.grad(y, [x, *norm.parameters()], dy)
    return {"operators": forward.operators + backward.operators, "forward": round(forward.bytes / x.nbytes),
            "backward": round(backward.bytes / x.nbytes), "kept": round(sum(kept.values()) / x.nbytes)}


def show_traffic():
    print("\n5. Bytes, in passes over the tensor: x read or written once is one. kept: tensors that backward needs.\n")
    norms = {"LayerNorm, written out": LayerNorm(D, EPS), "RMSNorm, written out (model.py)": RMSNorm(D, EPS),
             "LayerNorm, the library's": nn.LayerNorm(D, EPS), "RMSNorm, the library's, on a CPU": nn.RMSNorm(D, EPS)}
    columns = {"norm": "norm", "parameters": "parameters", "operators": "operators", "forward": "passes forward",
               "backward": "passes backward", "kept": "tensors kept"}
    rows = [{"norm": name, "parameters": sum(parameter.numel() for parameter in norm.parameters())} | traffic(norm)
            for name, norm in norms.items()]
    print(f"    {'':<33}" + "".join(f"{key:>12}" for key in list(columns)[1:]))
    for row in rows:
        print(f"    {row['norm']:<33}" + "".join(f"{row[key]:>12}" for key in list(columns)[1:]))
    return columns, rows


def draw_map(ax, norm, title):
    """Tokens of two numbers (small) and where the norm puts them (large). The colour: which of the two is larger."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(5)).clamp(-2, 2) * 1.5   # (40, 2)
    y = norm(x).detach()
    for (x0, x1), (y0, y1) in zip(x.tolist(), y.tolist()):
        colour = TEAL if x1 > x0 else ORANGE
        ax.plot([x0, y0], [x1, y1], color="#cccccc", linewidth=1, zorder=1)
        ax.plot(x0, x1, "o", color=colour, markersize=4)
        ax.plot(y0, y1, "o", color=colour, markersize=9, markeredgecolor="black", markeredgewidth=0.8)
    ax.set_title(title, fontsize=13)
    square(ax)


def square(ax):
    ax.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal", xticks=[], yticks=[])
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)


def draw_gradients(ax):
    """-dx, the way a step would move a token, where the output is pulled to the right, at three lengths."""
    angles = torch.arange(0, 2 * math.pi, math.pi / 6)
    norm = RMSNorm(2, EPS)
    for radius, colour in ((1, TEAL), (2, ORANGE), (3, VIOLET)):
        x = radius * torch.stack([angles.cos(), angles.sin()], dim=-1)                  # (12, 2)
        step = -forward_and_backward(norm, x, torch.tensor([-1.0, 0.0]).expand_as(x))[1]
        ax.add_patch(Circle((0, 0), radius, fill=False, color="#cccccc"))
        ax.scatter(*x.T, color=colour, s=14)
        ax.quiver(*x.T, *step.T, color=colour, angles="xy", scale_units="xy", scale=2, width=0.008)
    ax.set_title("Backward through RMSNorm: a pull to the right\nturns a token, the less the longer it is", fontsize=13)
    square(ax)


def draw_traffic(ax, rows):
    for y, row in enumerate(rows):
        ax.barh(y, row["forward"], height=0.45, color=TEAL, label="forward" if y == 0 else None)
        ax.barh(y, row["backward"], left=row["forward"], height=0.45, color=ORANGE,
                label="backward" if y == 0 else None)
        ax.text(0.3, y - 0.36, row["norm"], fontsize=12, va="center")
        ax.text(row["forward"] + row["backward"] + 0.3, y, f"{row['forward'] + row['backward']:.0f}", fontsize=12,
                va="center")
    ax.set(ylim=(len(rows) - 0.5, -0.7), yticks=[])
    ax.set_title("Bytes: x read or written, times", fontsize=13)
    ax.legend(fontsize=12, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.28))
    ax.spines[["top", "right"]].set_visible(False)


def draw(path, rows):
    fig = Figure(figsize=(10, 9.4), dpi=120, layout="constrained")
    (rms, layer), (gradients, bytes_) = fig.subplots(2, 2)
    draw_map(rms, RMSNorm(2, EPS), "RMSNorm, D = 2: the length goes,\nthe direction stays")
    draw_map(layer, nn.LayerNorm(2, EPS), "LayerNorm, D = 2: the mean goes too,\nwhich of the two is larger stays")
    draw_gradients(gradients)
    draw_traffic(bytes_, rows)
    fig.savefig(path)


def main():
    torch.manual_seed(0)
    norms = show_equalities()
    show_the_mean()
    show_gradients(*norms)
    columns, rows = show_traffic()
    draw(FIGURES / "norm.png", rows)
    print(f"\nAs a picture: figures/norm.png; as a table:"
          f" {write_results('norm_demo', 'python chapter-02-qwen3-packed/norm_demo.py', columns, rows)}")


if __name__ == "__main__":
    run(main)
