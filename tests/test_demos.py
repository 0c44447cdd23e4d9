"""Chapter 2's pictures: packing_demo.py and its like run, and their own checks can fail."""
import pytest
import torch
from torch.testing import assert_close

from chapters import load_chapter

chapter2 = load_chapter("chapter-02-qwen3-packed")
packing, rope, gqa = chapter2.packing_demo, chapter2.rope_demo, chapter2.gqa_demo
norm, gate = chapter2.norm_demo, chapter2.gate_demo


@pytest.fixture
def offline(monkeypatch, text_file):
    """packing_demo on a small text."""
    monkeypatch.setattr(packing, "fetch", lambda source: text_file)


@pytest.mark.parametrize("name, figures", [
    ("packing_demo", ["padding_map", "packed_batch"]), ("rope_demo", ["rope"]), ("gqa_demo", ["gqa"]),
    ("norm_demo", ["norm"]), ("gate_demo", ["gate"])])
def test_script_runs_and_draws(name, figures, tmp_path, monkeypatch, capsys, offline):
    script = getattr(chapter2, name)
    monkeypatch.setattr(script, "FIGURES", tmp_path)   # leave the repository's figures as they are, and its results
    monkeypatch.setattr(chapter2.results, "RESULTS", tmp_path / "results")
    script.main()
    drawn = list(tmp_path.glob("*.png"))
    assert sorted(path.stem for path in drawn) == sorted(figures)
    for path in drawn:
        assert 5_000 < path.stat().st_size < 200_000, path
    assert f"figures/{figures[0]}.png" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- packing_demo.py

def test_counts_by_hand(monkeypatch):
    monkeypatch.setattr(packing, "B", 2)
    assert packing.filled_up([3, 5, 4, 1, 2]) == [5, 5, 4, 4, 2]
    assert packing.pairs([3, 5, 2]) == 9 + 25 + 4
    config = chapter2.model.ModelConfig(vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    weights = 3 * (8 * 8 + 8 * 4 * 2 + 8 * 8 + 3 * 8 * 12) + 10 * 8
    linear, attention = packing.training_flops(chapter2.model.Transformer(config), [3, 5])
    assert linear == pytest.approx(6 * weights * 8)
    assert attention == 12 * 3 * 2 * 4 * (9 + 25)
    parts = packing.flops_per_useful_token(chapter2.model.Transformer(config), [3, 5], [5, 5])
    assert parts == pytest.approx([part / 8 / 1e6 for part in (
        6 * weights * 8, 12 * 24 * 34, 6 * weights * 2, 12 * 24 * (50 - 34))])


def test_mask_is_read_off_attention_and_a_leak_shows(monkeypatch):
    batch = chapter2.data.packed_sequence_collate_fn([([7, 8], [8, 9]), ([5], [6])])
    assert packing.who_sees_whom(batch).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    attention = packing.packed_attention
    one_document = torch.tensor([0, 3], dtype=torch.int32)
    monkeypatch.setattr(packing, "packed_attention", lambda q, k, v, *_: attention(q, k, v, one_document, 3))
    with pytest.raises(AssertionError, match="packed_attention"):
        packing.check_mask(batch, packing.who_sees_whom(batch))


# ------------------------------------------------------------------------------------------------- rope_demo.py

def test_check_equal_fails_on_a_difference_and_on_nan():
    rope.check_equal("equal", torch.ones(2), torch.ones(2), 1e-6)
    for wrong in (1.1, float("nan")):
        with pytest.raises(AssertionError):
            rope.check_equal("different", torch.tensor([1.0, wrong]), torch.ones(2), 1e-6)


@pytest.mark.parametrize("bug", ["neighbours are pairs", "turned backwards", "a reflection", "positions count double"])
def test_rope_proofs_turn_red(bug, monkeypatch):
    rotate, angles = rope.rotate, rope.rotary_angles

    def neighbours(x, cos, sin):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    def reflection(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, a * sin - b * cos], dim=-1)

    name, wrong = {"neighbours are pairs": ("rotate", neighbours),
                   "turned backwards": ("rotate", lambda x, cos, sin: rotate(x, cos, -sin)),
                   "a reflection": ("rotate", reflection),
                   "positions count double": ("rotary_angles", lambda positions, *rest: angles(2 * positions, *rest)),
                   }[bug]
    monkeypatch.setattr(rope, name, wrong)
    with pytest.raises(AssertionError, match="rotate ="):
        rope.show_equalities(*torch.randn(2, rope.K), torch.tensor([0, 50]), torch.arange(20))


def test_a_score_depends_on_the_distance_only():
    q, k = torch.randn(2, rope.K, generator=torch.Generator().manual_seed(0))
    distances = torch.tensor([0, 1, 5])
    near, far = ((rope.turned(q, start + distances) * rope.turned(k, start.expand(3))).sum(-1)
                 for start in torch.tensor([0, 700]))
    assert_close(near, far, atol=1e-3, rtol=0)
    assert_close(near, rope.score_by_distance(q, k, distances).float(), atol=1e-3, rtol=0)
    assert (near - rope.score_by_distance(q, k, -distances)).abs()[1:].min() > 0.1   # before is not behind


def test_wavelengths_by_hand():
    assert_close(rope.wavelengths(4, 100.0), 2 * torch.pi * torch.tensor([1.0, 10.0]))


# -------------------------------------------------------------------------------------------------- gqa_demo.py

def test_who_reads_what():
    assert gqa.reads(16) == list(range(16))
    assert gqa.reads(8) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert gqa.reads(1) == [0] * 16
    assert gqa.bytes_per_token(8, 28) == 114_688   # of Qwen3 0.6B: 112 KiB


@pytest.mark.parametrize("bug", ["heads take turns", "documents are one"])
def test_gqa_proof_turns_red(bug, monkeypatch):
    attention = gqa.packed_attention

    def turns(q, k, v, *packing):
        k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1) for x in (k, v))
        return attention(q, k, v, *packing)

    def one_document(q, k, v, *packing):
        return attention(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))

    monkeypatch.setattr(gqa, "packed_attention", turns if bug == "heads take turns" else one_document)
    with pytest.raises(AssertionError, match="must read head"):
        gqa.show_equality()


# ------------------------------------------------------------------------------------------------- norm_demo.py

def test_norms_are_those_of_torch():
    norm.show_equalities()
    norm.show_the_mean()


@pytest.mark.parametrize("bug", ["variance", "no eps", "eps behind the root", "no mean of squares", "no bias"])
def test_norm_proof_turns_red(bug, monkeypatch):
    def rms(x, eps):
        return x.square().mean(-1, keepdim=True).add(eps).sqrt()

    wrong = {"variance": lambda self, x: self.weight * x / rms(x - x.mean(-1, keepdim=True), self.eps),
             "no eps": lambda self, x: self.weight * x / rms(x, 0),
             "eps behind the root": lambda self, x: self.weight * x / (rms(x, 0) + self.eps),
             "no mean of squares": lambda self, x: self.weight * x / x.norm(dim=-1, keepdim=True),
             "no bias": lambda self, x: torch.layer_norm(x, x.shape[-1:], self.weight, 0 * self.bias, self.eps)}
    monkeypatch.setattr(norm.LayerNorm if bug == "no bias" else norm.RMSNorm, "forward", wrong[bug])
    with pytest.raises(AssertionError, match="Norm written out = nn."):
        norm.show_equalities()


@pytest.mark.parametrize("mean_too, wrong", [(True, False), (False, True)])
def test_each_norm_has_its_own_projection(mean_too, wrong):
    layer = norm.nn.LayerNorm(norm.D) if mean_too else norm.nn.RMSNorm(norm.D, norm.EPS)
    x, dy = torch.randn(2, 5, norm.D) + 1
    dx = norm.forward_and_backward(layer, x, dy)[1]
    assert_close(dx, norm.projected(dy, x, layer.weight, layer.eps, mean_too))
    assert (dx - norm.projected(dy, x, layer.weight, layer.eps, wrong)).abs().max() > 0.01


def test_what_is_left_to_move():
    assert norm.free_directions(norm.RMSNorm(norm.D, norm.EPS)) == norm.D - 1
    assert norm.free_directions(norm.LayerNorm(norm.D, norm.EPS)) == norm.D - 2
    assert norm.free_directions(torch.nn.Identity()) == norm.D


def test_traffic_by_hand():
    x = torch.randn(10, 8)
    with norm.Traffic() as traffic:
        x.view(8, 10).t()                               # nothing moves
        y = x * 2                                       # x, y
        y += x.mean(-1, keepdim=True)                   # x and the means; y, the means, y
    assert (traffic.operators, traffic.bytes) == (3, 4 * (160 + 90 + 170))
    row = norm.traffic(torch.nn.Tanh())                 # forward x, y; backward dy, y, dx; keeps y
    assert row == {"operators": 2, "forward": 2, "backward": 3, "kept": 1}


# ------------------------------------------------------------------------------------------------- gate_demo.py

def test_the_gated_mlp_is_the_formula():
    gate.show_equality()


@pytest.mark.parametrize("bug", ["gate and up swapped", "GELU", "a sum"])
def test_gate_proof_turns_red(bug, monkeypatch):
    silu = torch.nn.functional.silu
    inside = {"gate and up swapped": lambda self, x: self.gate_proj(x) * silu(self.up_proj(x)),
              "GELU": lambda self, x: torch.nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x),
              "a sum": lambda self, x: silu(self.gate_proj(x)) + self.up_proj(x)}[bug]
    monkeypatch.setattr(gate.MLP, "forward", lambda self, x: self.down_proj(inside(self, x)))
    with pytest.raises(AssertionError, match="the MLP of model.py = the formula"):
        gate.show_equality()


def test_two_gates_multiply_and_gelus_come_near():
    x = torch.tensor([[2.0, -3.0], [0.0, 5.0], [-1.5, -1.5]])
    assert_close(gate.multiplying_gates()(x)[:, 0], torch.tensor([-6.0, 0.0, 2.25]))
    errors = [gate.multiplication_error(gate.multiplying_gelus(scale), torch.float32) for scale in (1, 0.1)]
    assert errors[0] > 1 and errors[1] < errors[0] / 10
    gelus, gates = gate.multiplying_gelus(0.01), gate.multiplying_gates()
    assert gate.multiplication_error(gelus, torch.bfloat16) > 5 * gate.multiplication_error(gates, torch.bfloat16)


def test_costs_by_hand():
    M = 32   # a token of D numbers; the MLP keeps it, and of M each: what is bent, bent, and their like in the gate
    plain = gate.cost(gate.GeluMLP(gate.D, M))
    assert plain == {"parameters": 2 * gate.D * M, "mflops": 4 * gate.D * M / 1e6, "kept": gate.D + 2 * M}
    gated = gate.cost(gate.swiglu(gate.D, M))
    assert gated == {"parameters": 3 * gate.D * M, "mflops": 6 * gate.D * M / 1e6, "kept": gate.D + 4 * M}
