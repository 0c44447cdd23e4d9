"""Rotary embeddings: a token carries its position as the angle of clock hands, and attention reads the difference.

Attention by itself does not know how far apart two words are. Chapter 1 learned a vector for each of 64 positions;
there is none for the 65th. Here, the dimensions of a query or a key are taken in pairs, and each pair is turned by an
angle that grows with the position: the first pair fast, the last one hardly at all. Two clocks that were both turned by
the same amount differ as before, so a score depends on how far two tokens are apart, not on where they stand.

    python chapter-02-qwen3-packed/rope_demo.py

Shape letters: T positions, H heads (here 1), K width of a head: K / 2 pairs.
"""
import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from cli import run
from model import CONFIGS, rotary_angles, rotate
from results import FIGURES

K, THETA = CONFIGS["small"].head_dim, CONFIGS["small"].rope_theta
TEAL, ORANGE, VIOLET, GREY = "#1f6f8b", "#d9822b", "#7a5195", "#888888"


def check_equal(claim, ours, expected, tolerance):
    difference = (ours - expected).abs().max().item()
    print(f"    {claim:<66} largest difference {difference:.1e}")
    # Written as "not <=" because nan compares false with everything: a nan must fail too.
    assert not difference > tolerance and difference == difference, f"{claim}: {difference} > {tolerance}"


def turned(x, position_ids, dtype=torch.float32):
    """x (K,) as the query or key of each position: (T, K)."""
    cos, sin = rotary_angles(position_ids, len(x), THETA, dtype)                        # (T, 1, K/2)
    return rotate(x.expand(len(position_ids), 1, -1), cos, sin)[:, 0]                   # (T, K)


def frequencies(head_dim, theta):
    """Radians a token by which each pair turns, as the paper has it: theta^(-2i/K), in float64."""
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)   # (K/2,)


def as_complex(x):
    """A pair is dimension i of the first half and i of the second: the two parts of a complex number, (..., K/2)."""
    return torch.complex(*x.double().chunk(2, dim=-1))


def turned_as_complex(x, position_ids):
    """The same turn in one multiplication: by exp(i * angle), a number of length 1."""
    angles = position_ids[:, None] * frequencies(len(x), THETA)                         # (T, K/2)
    z = as_complex(x) * torch.polar(torch.ones_like(angles), angles)                    # (T, K/2)
    return torch.cat([z.real, z.imag], dim=-1)                                          # (T, K)


def score_by_distance(q, k, distances):
    """q . k from the distance alone: the sum over pairs of |q| |k| cos(angle between them + distance * frequency)."""
    between = as_complex(q) * as_complex(k).conj()                                      # (K/2,)
    angles = between.angle() + distances[:, None] * frequencies(len(q), THETA)          # (T, K/2)
    return (between.abs() * angles.cos()).sum(-1)                                       # (T,)


def turned_neighbours(x, position_ids):
    """The paper's own layout: a pair is two neighbours, 0 and 1, 2 and 3, ... (T, K)."""
    z = torch.view_as_complex(x.double().view(-1, 2)) * torch.polar(
        torch.ones(len(position_ids), len(x) // 2, dtype=torch.float64),
        position_ids[:, None] * frequencies(len(x), THETA))                             # (T, K/2)
    return torch.view_as_real(z).flatten(1)                                             # (T, K)


def wavelengths(head_dim, theta):
    """Tokens in which each pair turns once, read off the model's own angles at position 1, (K/2,)."""
    cos, sin = rotary_angles(torch.tensor([1]), head_dim, theta, torch.float32)         # (1, 1, K/2)
    return 2 * math.pi / torch.atan2(sin, cos).flatten()


def show_equalities(q, k, starts, distances):
    """q stands `distance` after k; k stands at each of starts. Returns the scores, one row (T,) for each start."""
    positions = torch.arange(CONFIGS["small"].max_position_embeddings)
    print(f"1. Queries and keys of K = {K} random numbers, theta {THETA:,.0f}, at positions 0 to {positions[-1]}.\n")
    check_equal("rotate = multiplication by complex numbers of length 1", turned(q, positions),
                turned_as_complex(q, positions), 1e-3)
    check_equal("lengths stay: a rotation neither adds nor takes", turned(q, positions).norm(dim=-1), q.norm(), 1e-5)
    scores = []
    for start in starts:
        score = (turned(q, start + distances) * turned(k, start.expand_as(distances))).sum(-1)   # (T,)
        scores.append(score)
        check_equal(f"q . k of keys at {start} = the formula, which has only m - n", score,
                    score_by_distance(q, k, distances), 1e-3)
    halves = torch.arange(K).view(2, -1).T.flatten()   # 0, K/2, 1, K/2 + 1, ...: twins become neighbours
    check_equal("pairs of halves = pairs of neighbours, dimensions put in order", turned(q, positions)[:, halves],
                turned_neighbours(q[halves], positions), 1e-3)
    print("    Without that order it is another model: who converts a checkpoint reorders its rows of q and k.")
    return scores


def show_precision():
    print("\n2. Trap: angles in bfloat16, which has 8 significant bits. How far off are they, in radians, at worst?\n")
    print(f"    {'position':>12}{'float32':>12}{'bfloat16':>12}")
    for position in (10, 100, 1000, 10_000):
        exact = position * frequencies(K, THETA)
        errors = [(torch.tensor(position, dtype=dtype) * frequencies(K, THETA).to(dtype) - exact).abs().max()
                  for dtype in (torch.float32, torch.bfloat16)]
        print(f"    {position:>12,}{errors[0]:>12.1e}{errors[1]:>12.1e}")
    print("    A whole turn is 6.28. model.py makes the angles in float32 and casts only their cos and sin.")


def show_wavelengths():
    print("\n3. Tokens for one turn. A pair slower than the context never says the same twice in a document.\n")
    print(f"    {'':<12}{'pairs':>7}{'theta':>12}{'first pair':>12}{'last pair':>12}{'context':>10}"
          f"{'slower pairs':>14}")
    curves = []
    for name in ("small", "qwen3-0.6b"):
        config = CONFIGS[name]
        waves = wavelengths(config.head_dim, config.rope_theta)
        context = config.max_position_embeddings
        print(f"    {name:<12}{len(waves):>7}{config.rope_theta:>12,.0f}{waves[0]:>12.2f}{waves[-1]:>12,.0f}"
              f"{context:>10,}{(waves > context).sum():>14}")
        curves.append((name, config, waves))
    return curves


def draw_clocks(ax, pairs, positions):
    """One row of clocks for each pair, one column for each position. At position 0 the hand points to the right."""
    right = torch.cat([torch.ones(K // 2), torch.zeros(K // 2)])
    hands = as_complex(turned(right, positions))                                        # (T, K/2)
    for y, pair in enumerate(pairs):
        for x, hand in enumerate(hands[:, pair].tolist()):
            ax.add_patch(Circle((x, y), 0.42, facecolor="#ededea", linewidth=0))
            ax.plot([x, x + 0.4 * hand.real], [y, y + 0.4 * hand.imag], color=TEAL, linewidth=3)
        label = f"pair {pair}\n{wavelengths(K, THETA)[pair]:,.0f} tokens a turn"
        ax.text(-0.7, y, label, fontsize=12, ha="right", va="center")
    ax.set(xlim=(-3.1, len(positions) - 0.5), ylim=(-0.5, len(pairs) - 0.5), aspect="equal", yticks=[])
    ax.set_xticks(range(len(positions)), positions.tolist(), fontsize=12)
    ax.set_title("Position, as the clocks of four of the 16 pairs tell it", fontsize=14)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def draw_scores(ax, q, k, starts, distances, scores):
    ax.plot(distances, score_by_distance(q, k, distances), color=GREY, linewidth=1.5)
    for i, (start, score, colour) in enumerate(zip(starts, scores, (TEAL, ORANGE, VIOLET))):
        shown = slice(i, None, len(starts))   # in turns, or the last would cover the others
        ax.plot(distances[shown], score[shown], "o", color=colour, markersize=5, label=f"key at {start}")
    ax.set_title("q . k of one query and one key", fontsize=14)
    ax.set_xlabel("distance m - n (line: the formula)", fontsize=12)
    ax.set(ylim=(scores[0].min().item() - 5, scores[0].max().item() + 1))
    ax.legend(fontsize=12, loc="lower center", ncols=3, frameon=False, handletextpad=0, columnspacing=0.8)


def draw_wavelengths(ax, curves):
    for (name, config, waves), colour, (x, y) in zip(curves, (ORANGE, TEAL), ((0.97, 1.5e3), (0.68, 1e6))):
        ax.semilogy(torch.arange(len(waves)) / len(waves), waves, ".-", color=colour)
        ax.text(x, y, f"theta {config.rope_theta:,.0f}", color=colour, fontsize=12, ha="right")
        context = config.max_position_embeddings
        ax.axhline(context, color=colour, linestyle="--", linewidth=1)
        ax.text(0, context * 1.3, f"{name}: {context:,}", color=colour, fontsize=12)
    ax.set_title("tokens for one turn (dashed: the context)", fontsize=14)
    ax.set_xlabel("pair, from the first to the last", fontsize=12)
    ax.set_xticks([])


def draw(path, q, k, starts, distances, scores, curves):
    fig = Figure(figsize=(10, 8.6), dpi=120, layout="constrained")
    axes = fig.subplot_mosaic([["clocks", "clocks"], ["scores", "wavelengths"]])
    draw_clocks(axes["clocks"], (K // 2 - 1, 6, 3, 0), torch.arange(9))
    draw_scores(axes["scores"], q, k, starts.tolist(), distances, scores)
    draw_wavelengths(axes["wavelengths"], curves)
    fig.savefig(path)


def main():
    torch.manual_seed(0)
    q, k = torch.randn(2, K)
    starts, distances = torch.tensor([0, 300, 900]), torch.arange(64)
    scores = show_equalities(q, k, starts, distances)
    show_precision()
    curves = show_wavelengths()
    draw(FIGURES / "rope.png", q, k, starts, distances, scores, curves)
    print("\nThe clocks, the scores and the wavelengths as a picture: figures/rope.png")


if __name__ == "__main__":
    run(main)
