"""SwiGLU beside the GELU MLP: two matrices read the token, and their answers are multiplied.

In chapter 1's MLP a neuron sees one number, how far the token reaches in one direction, and bends it by GELU. Here it
sees two: SiLU of the one, the gate, decides by how much the other counts (Shazeer 2020; the gate of Dauphin et al. 2017
was a sigmoid). The third matrix is paid for by a smaller width. What can be proven and counted of this is here; which
of the two learns language better is a question for experiments.

    python chapter-02-qwen3-packed/gate_demo.py     seconds; writes figures/gate.png and results/gate_demo.json

Shape letters: T tokens, D width of a token, M width of the MLP.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cli import run
from model import CONFIGS, MLP
from results import FIGURES, write_results

T, D = 64, 768   # the width of GPT-2 124M, which 3 divides
TEAL, ORANGE, GREY = "#1f6f8b", "#d9822b", "#888888"


class GeluMLP(nn.Module):
    """GPT-2's, as in chapter 1, without the biases."""

    def __init__(self, size, width):
        super().__init__()
        self.up_proj = nn.Linear(size, width, bias=False)
        self.act_fn = nn.GELU(approximate="tanh")
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


def swiglu(size, width):
    """The MLP of model.py."""
    return MLP(replace(CONFIGS["small"], hidden_size=size, intermediate_size=width))


def check_equal(claim, ours, expected, tolerance):
    difference = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
    print(f"    {claim:<66} largest difference {difference:.1e}")
    # Written as "not <=" because nan compares false with everything: a nan must fail too.
    assert not difference > tolerance and difference == difference, f"{claim}: {difference} > {tolerance}"


def by_hand(x, dy, gate, up, down):
    """SwiGLU without torch's functions and without autograd: the output, and the gradients of x and the matrices.

    x and dy (T, D); gate and up (M, D); down (D, M).
    """
    a, b = x @ gate.T, x @ up.T                                                         # (T, M)
    s = 1 / (1 + torch.exp(-a))
    h = a * s * b                                                                       # (T, M)
    dh = dy @ down                                                                      # (T, M)
    da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s   # the branches scale each other's gradients too
    return h @ down.T, da @ gate + db @ up, da.T @ x, db.T @ x, dy.T @ h


def show_equality():
    print(f"1. SwiGLU of {T} random tokens, D = 48, M = 128, in float64. Output and all gradients:\n")
    mlp = swiglu(48, 128).double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    gate, up, down = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    x, dy = torch.randn(2, T, 48, dtype=torch.float64)
    x.requires_grad_()
    y = mlp(x)
    with torch.no_grad():
        expected, swapped = by_hand(x, dy, gate, up, down), by_hand(x, dy, up, gate, down)
    check_equal("the MLP of model.py = the formula, down(silu(gate) * up)",
                (y, *torch.autograd.grad(y, [x, gate, up, down], dy)), expected, 1e-10)
    # F.glu(first half, second half) = first * sigmoid(second)
    glu = (x @ gate.T) * F.glu(torch.cat([x @ up.T, x @ gate.T], dim=-1))
    check_equal("= the gate * F.glu, the sigmoid's gate of 2017", [y], [glu @ down.T], 1e-10)
    difference = (expected[0] - swapped[0]).abs().max().item()
    print(f"    {'gate and up swapped: another function, the same shapes':<66} largest difference {difference:.1e}")
    assert difference > 0.1, f"gate and up are interchangeable: {difference}"


def show_functions():
    z = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    tanh = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    scaled = F.silu(1.702 * z) / 1.702
    print("\n2. The curve is not what is new: SiLU is GELU with another scale, nearly.\n")
    check_equal("GELU's tanh form, written out = torch's", [F.gelu(z, approximate="tanh")], [tanh], 1e-12)
    check_equal("is nearly GELU, z * (share of a normal distribution below z)", [tanh], [F.gelu(z)], 1e-3)
    check_equal("so is silu(1.702 z) / 1.702", [scaled], [F.gelu(z)], 0.03)


def multiplying_gates():
    """Two gated neurons whose sum is x[0] x[1]: silu(a) b - silu(-a) b = a b, for sigmoid(a) + sigmoid(-a) = 1."""
    mlp = swiglu(2, 2)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0], [-1, 0]]))
        mlp.up_proj.weight.copy_(torch.tensor([[0, 1.0], [0, -1]]))
        mlp.down_proj.weight.copy_(torch.tensor([[1.0, 1], [0, 0]]))
    return mlp


def multiplying_gelus(scale):
    """Four GELU neurons, by (a + b)^2 - (a - b)^2 = 4 a b: close to zero gelu(z) + gelu(-z) is sqrt(2 / pi) z^2."""
    mlp = GeluMLP(2, 4)
    with torch.no_grad():
        mlp.up_proj.weight.copy_(scale * torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]))
        mlp.down_proj.weight.copy_(math.sqrt(math.pi / 2) / 4 / scale ** 2 * torch.tensor([[1.0, 1, -1, -1], [0] * 4]))
    return mlp


@torch.no_grad()
def multiplication_error(mlp, dtype):
    """The largest error of x[0] * x[1], for numbers up to 3."""
    side = torch.linspace(-3, 3, 61).to(dtype)
    x = torch.cartesian_prod(side, side)                                                # (3721, 2)
    return (mlp.to(dtype)(x)[:, 0].double() - x.double().prod(-1)).abs().max().item()


def show_product():
    print("\n3. The product is new. The largest error where neurons multiply two numbers up to 3:\n")
    print(f"    {'':<46}{'float32':>10}{'bfloat16':>10}")
    rows = [("2 gated neurons, weights 1 in, 1 out", multiplying_gates)]
    rows += [(f"4 GELU neurons, weights {scale} in, {multiplying_gelus(scale).down_proj.weight.max():,.1f} out",
              lambda scale=scale: multiplying_gelus(scale)) for scale in (1, 0.1, 0.01)]
    for name, make in rows:
        errors = [multiplication_error(make(), dtype) for dtype in (torch.float32, torch.bfloat16)]
        print(f"    {name:<46}" + "".join(f"{error:>10.1e}" for error in errors))
        assert make is not multiplying_gates or errors[0] < 1e-5, f"gated neurons multiply with an error of {errors}"
    print("    Bent sums come near with small weights, and then lose it to rounding. The gate multiplies by itself.")


def cost(mlp):
    """Of one MLP: parameters, and of a token: FLOPs forward and the numbers that autograd keeps for the way back."""
    x, weights, kept = torch.randn(T, D, requires_grad=True), {p.data_ptr() for p in mlp.parameters()}, {}
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(
            lambda saved: kept.update({saved.data_ptr(): saved.numel()}) or saved, lambda saved: saved):
        mlp(x)
    return {"parameters": sum(parameter.numel() for parameter in mlp.parameters()),
            "mflops": counter.get_total_flops() / T / 1e6,
            "kept": sum(count for pointer, count in kept.items() if pointer not in weights) // T}


def show_widths():
    print(f"\n4. Two matrices of width 4 D are 8 D^2 weights; so are three of width 8/3 D. D = {D}:\n")
    mlps = [("GELU, 4 D", GeluMLP(D, 4 * D)), ("SwiGLU, 4 D", swiglu(D, 4 * D)), ("SwiGLU, 3 D", swiglu(D, 3 * D)),
            ("SwiGLU, 8/3 D", swiglu(D, 8 * D // 3))]
    rows = [{"mlp": name, "width": mlp.down_proj.in_features} | cost(mlp) for name, mlp in mlps]
    columns = {"mlp": "MLP", "width": "width", "parameters": "parameters", "mflops": "MFLOPs per token, forward",
               "kept": "numbers kept per token"}
    print(f"    {'':<14}" + "".join(f"{key:>12}" for key in list(columns)[1:]))
    for row in rows:
        print(f"    {row['mlp']:<14}" + "".join(f"{row[key]:>12,}" for key in list(columns)[1:]))
    assert rows[0]["parameters"] == rows[-1]["parameters"] and rows[0]["mflops"] == rows[-1]["mflops"], rows
    widths = [f"{name} {config.intermediate_size / config.hidden_size:.3g}" for name, config in CONFIGS.items()]
    print(f"    In D, the widths of model.py: {', '.join(widths)}")
    return columns, rows


def draw_functions(ax):
    z = torch.linspace(-4, 3, 141)
    for name, curve, colour, y in (("ReLU", F.relu(z), GREY, 2.6), ("GELU", F.gelu(z), TEAL, 2.2),
                                   ("SiLU", F.silu(z), ORANGE, 1.8)):
        ax.plot(z, curve, color=colour, linewidth=2.5)
        ax.text(-3.8, y, name, color=colour, fontsize=13)
    ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    ax.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    ax.set_title("The curves: little difference", fontsize=13)
    ax.spines[["top", "right"]].set_visible(False)


def draw_matrices(ax, rows):
    """Each matrix as a rectangle D wide and M high, to scale."""
    left, (gelu, *_, paper) = 0, rows
    for row, count, colour in ((gelu, 2, TEAL), (paper, 3, ORANGE)):
        height = row["width"] / D
        for name in ("gate", "up", "down")[-count:]:
            ax.add_patch(Rectangle((left, 0), 1, height, facecolor=colour, edgecolor="white", linewidth=3))
            ax.text(left + 0.5, height / 2, name, color="white", fontsize=13, ha="center", va="center")
            left += 1
        label = f"{row['mlp']}\n{row['parameters']:,} weights"
        ax.text(left - count / 2, height + 0.1, label, fontsize=12, ha="center")
        left += 0.7
    ax.set(xlim=(-0.2, left - 0.5), ylim=(0, 5), xticks=[], yticks=range(5))
    ax.set_ylabel("width of the MLP, in D", fontsize=12)
    ax.set_title("Two matrices or three: equal areas", fontsize=13)
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def draw_neuron(ax, function, title):
    """What one neuron says, of two projections a and b of the token."""
    side = torch.linspace(-3, 3, 121)
    heights = function(side[None], side[:, None]).expand(121, 121)                      # row b, column a
    ax.contourf(side, side, heights, levels=torch.linspace(-9, 9, 37), cmap="RdBu_r")
    ax.contour(side, side, heights, levels=range(-8, 9), colors="black", linewidths=0.7)
    ax.set_title(title, fontsize=13)
    ax.set_xlabel("a", fontsize=12)
    ax.set_ylabel("b", fontsize=12)
    ax.set(aspect="equal", xticks=(-3, 0, 3), yticks=(-3, 0, 3))


def draw(path, rows):
    fig = Figure(figsize=(10, 9.4), dpi=120, layout="constrained")
    (functions, matrices), (gelu, gated) = fig.subplots(2, 2)
    draw_functions(functions)
    draw_matrices(matrices, rows)
    draw_neuron(gelu, lambda a, b: F.gelu(a), "A neuron of GELU(a): blind to b")
    draw_neuron(gated, lambda a, b: F.silu(a) * b, "A neuron of SiLU(a) b: a opens, b passes")
    fig.savefig(path)


def main():
    torch.manual_seed(0)
    show_equality()
    show_functions()
    show_product()
    columns, rows = show_widths()
    draw(FIGURES / "gate.png", rows)
    print(f"\nAs a picture: figures/gate.png; as a table:"
          f" {write_results('gate_demo', 'python chapter-02-qwen3-packed/gate_demo.py', columns, rows)}")


if __name__ == "__main__":
    run(main)
