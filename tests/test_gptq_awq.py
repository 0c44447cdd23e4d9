"""Chapter 7: GPTQ, AWQ and SmoothQuant, equal to the plain way of computing what they promise, in float64."""
import functools

import pytest
import torch

from chapters import load_chapter
from weights import far_from_initial

chapter7 = load_chapter("chapter-07-quantization")
Format = chapter7.integers.Format
FORMATS = [Format(4, 32), Format(4, 16, symmetric=False), Format(4), Format(4, 0, symmetric=False), Format(8)]


def correlated(T, K, seed=0):
    """Inputs (T, K) that resemble each other, some far larger than others, as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(T, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    return (few + torch.randn(T, K, generator=generator)) * torch.randn(K, generator=generator).exp()


def make_weight(N, K, seed=1):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def to_nearest(weight, format, dtype=torch.float32):
    scale, zero = chapter7.integers.choose_scale(weight, format, dtype)
    return chapter7.integers.to_integers(weight, scale, zero, format), scale, zero


def output_error(weight, quantized, x):
    """The sum of squares by which the outputs differ."""
    change = weight.double() - chapter7.integers.from_integers(*quantized).double()
    return (x.double() @ change.T).square().sum().item()


def one_column_after_the_other(weight, x, scale, zero, format, damping=0.01):
    """Optimal brain quantization: round a column, then let least squares choose all columns that are left, anew each
    time.

    The damping is written as what it means: K more tokens, one for each input alone. Returns integers (N, K).
    """
    N, K = weight.shape
    x, weight = x.double(), weight.double()
    order = x.square().sum(0).argsort(descending=True, stable=True).tolist()
    x = torch.cat([x, torch.eye(K, dtype=torch.double) * (damping * x.square().sum(0).mean()).sqrt()])
    scale = scale.double().repeat_interleave(K // scale.shape[1], 1)
    zero = torch.zeros_like(scale) if zero is None else zero.double().repeat_interleave(K // zero.shape[1], 1)
    outputs, wanted, integers = x @ weight.T, weight.clone(), torch.empty(N, K)
    for n, j in enumerate(order):
        integers[:, j] = (wanted[:, j] / scale[:, j] + zero[:, j]).round().clamp(format.smallest, format.largest)
        wanted[:, j] = (integers[:, j] - zero[:, j]) * scale[:, j]
        done, left = order[:n + 1], order[n + 1:]
        if left:
            wanted[:, left] = torch.linalg.lstsq(x[:, left], outputs - x[:, done] @ wanted[:, done].T).solution.T
    return integers


def rounded(weight, format):
    return chapter7.integers.rounded(weight.float(), format).double()


def clipped_directly(weight, x, format, steps=10):
    """Each group of each row on its own."""
    result, size = weight.clone(), format.group or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        columns = slice(start, start + size)
        for n, row in enumerate(weight[:, columns]):
            low, high = (-row.abs().max(), row.abs().max()) if format.symmetric else (row.min(), row.max())
            attempts = [row.clamp(low * (1 - i / steps / 2), high * (1 - i / steps / 2)) for i in range(steps)]
            errors = [((rounded(attempt[None], format) - row) @ x[:, columns].T).square().sum().item()
                      for attempt in attempts]
            result[n, columns] = attempts[errors.index(min(errors))]
    return result


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_is_least_squares_after_each_column(format):
    weight, x = make_weight(24, 96), correlated(300, 96)
    integers, scale, zero = chapter7.gptq.gptq(weight, x.T @ x, format, block=40)   # 96 is no multiple of it
    differ = (integers != one_column_after_the_other(weight, x, scale, zero, format)).sum().item()
    assert differ == 0, f"{differ} of {integers.numel()} integers differ"
    plain = to_nearest(weight, format)
    assert integers.dtype == plain[0].dtype and integers.shape == plain[0].shape and scale.shape == plain[1].shape
    size_of_inputs = x.double().square().sum(0)
    size_of_inputs += 0.01 * size_of_inputs.mean()
    expected = clipped_directly(weight.double(), size_of_inputs.sqrt().diag(), format)   # as if each came alone
    expected_scale, expected_zero = chapter7.integers.choose_scale(expected, format)
    torch.testing.assert_close(scale, expected_scale)
    assert (zero is None) == format.symmetric and (zero is None or torch.equal(zero, expected_zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_halves_the_error_of_outputs(format, dtype):
    weight, x = make_weight(48, 160), correlated(400, 160)
    ours, plain = chapter7.gptq.gptq(weight, x.T @ x, format, dtype), to_nearest(weight, format, dtype)
    assert ours[1].dtype == dtype
    assert output_error(weight, ours, x) < 0.5 * output_error(weight, plain, x)


@pytest.mark.parametrize("T", [0, 1, 20])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_gptq_with_fewer_tokens_than_inputs(T, size):
    """A sum of products that has no Cholesky factor. Weights of inputs never seen go to the nearest integer."""
    weight, x, format = make_weight(16, 64), size * correlated(T, 64), Format(4, 32)
    x[:, 10:20] = 0
    ours, plain = chapter7.gptq.gptq(weight, x.T @ x, format), to_nearest(weight, format)
    nearest = chapter7.integers.to_integers(weight, *ours[1:], format)
    assert torch.equal(ours[0][:, 10:20], nearest[:, 10:20])
    assert T > 0 or torch.equal(ours[0], nearest)
    assert output_error(weight, ours, x) <= output_error(weight, plain, x)


# ------------------------------------------------------------------------------------------------- AWQ and SmoothQuant

HEADS = [(4, 4), (4, 2), (6, 1)]
# Layers with the same inputs.
SHARED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


def make_block(heads=4, key_value_heads=2, seed=0):
    """A Block far from its initial values, so that a missing term shows, and what to call it with: x (T, D) and two
    documents.
    """
    config = chapter7.model.ModelConfig(hidden_size=64, intermediate_size=96, num_attention_heads=heads,
                                        num_key_value_heads=key_value_heads, head_dim=16)
    torch.manual_seed(seed)
    block = far_from_initial(chapter7.model.Block(config))
    T, positions = 60, torch.cat([torch.arange(40), torch.arange(20)])
    x = torch.randn(T, 64) * torch.randn(64).exp()
    rotary = chapter7.model.rotary_angles(positions, 16, 10000.0, torch.float32)
    attend = functools.partial(chapter7.attention.packed_attention,
                               cu_seqlens=torch.tensor([0, 40, 60], dtype=torch.int32), max_seqlen=40)
    return block, (x, rotary, attend)


class Seen:
    """What quantize.py's Statistics know of inputs x (T, K)."""

    def __init__(self, x):
        self.x, self.tokens, self.products = x, len(x), x.T @ x
        self.mean, self.largest = x.abs().mean(0), x.abs().amax(0)


@torch.no_grad()
def observe(block, arguments):
    seen = {}
    hooks = [layer.register_forward_pre_hook(lambda module, inputs,
                                             name=name: seen.__setitem__(name, Seen(inputs[0].clone())))
             for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)]
    outputs = block(*arguments)
    for hook in hooks:
        hook.remove()
    return seen, outputs


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_scaled_block_computes_the_same(method, heads, monkeypatch):
    block, arguments = make_block(*heads)
    seen, before = observe(block, arguments)
    weights = {name: parameter.clone() for name, parameter in block.named_parameters()}
    # It does change the weights.
    monkeypatch.setattr(chapter7.awq_smoothquant, "clipped", lambda weight, products, format: weight)
    getattr(chapter7.awq_smoothquant, method)(block, seen, Format(4, 32))
    after = observe(block, arguments)[1]
    assert (after - before).abs().max() < 1e-5 * before.abs().max(), (after - before).abs().max()
    same = [name for name, parameter in block.named_parameters() if torch.equal(parameter, weights[name])]
    # Everything else had a part in it.
    assert sorted(same) == ["self_attn.k_norm.weight", "self_attn.q_norm.weight"], same


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_smoothquant_balances_inputs_and_weights(heads):
    """Largest input / s = largest weight * s, as alpha = 1/2 wants it.

    Of heads that share s: in their geometric mean.
    """
    block, arguments = make_block(*heads)
    seen, _ = observe(block, arguments)
    largest = {names: torch.cat([block.get_submodule(name).weight for name in names]).abs().amax(0).double()
               for names in SHARED}
    first = {names[0]: block.get_submodule(names[0]).weight.double() for names in SHARED}
    chapter7.awq_smoothquant.smoothquant(block, seen, Format(8))
    for names in SHARED:
        s = (block.get_submodule(names[0]).weight / first[names[0]]).median(0).values   # the same for every row
        ratio = (seen[names[0]].largest / s) / (largest[names] * s)
        if names == ("self_attn.o_proj",):
            shared = [x.view(heads[1], heads[0] // heads[1], 16) for x in (ratio, s)]
            assert (shared[1].amax(1) / shared[1].amin(1) < 1 + 1e-5).all(), "a value head is divided by several s"
            ratio = shared[0].log().mean(1).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0, msg=names[0])


def factors_directly(x, weights, format, grid=20):
    """The scales (K,) that AWQ is after, from the inputs themselves, and the errors of the whole grid."""
    candidates, errors = [], []
    for i in range(grid):
        s = x.abs().mean(0) ** (i / grid)
        candidates.append(s / (s.max() * s.min()).sqrt())
        products = (((x / candidates[-1]) @ rounded(weight * candidates[-1], format).T, x @ weight.T)
                    for weight in weights)
        errors.append(sum((found - exact).square().sum().item() for found, exact in products))
    return candidates[errors.index(min(errors))], errors


@pytest.mark.parametrize("format", [Format(4, 32), Format(4, 16, symmetric=False), Format(4)], ids=str)
def test_awq_finds_what_a_search_with_all_inputs_finds(format):
    block, arguments = make_block(4, 4)
    seen, _ = observe(block, arguments)
    before = {name: layer.weight.double() for name, layer in block.named_modules()
              if isinstance(layer, torch.nn.Linear)}
    chapter7.awq_smoothquant.awq(block, seen, format)
    chosen, drawn_in = [], 0
    for names in SHARED:
        x = seen[names[0]].x.double()
        s, errors = factors_directly(x, [before[name] for name in names], format)
        assert min(errors) < errors[0], f"{names}: scaling does not help, this test shows nothing"
        scaled = (before[names[0]] * s)[:8]   # some rows will do
        expected = clipped_directly(scaled, x / s, format)
        ours = block.get_submodule(names[0]).weight[:8].double()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=names[0])
        chosen.append(errors.index(min(errors)))
        drawn_in += (expected != scaled).sum().item()
    assert len(set(chosen)) > 1 and drawn_in > 20, (chosen, drawn_in)   # not by chance always the same


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_an_input_that_is_always_zero(method):
    block, arguments = make_block()
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0
        block.mlp.up_proj.weight[5] = 0
        block.self_attn.o_proj.weight[:, 7] = 0
    seen, before = observe(block, arguments)
    getattr(chapter7.awq_smoothquant, method)(block, seen, Format(4, 32))
    after = observe(block, arguments)[1]
    assert all(parameter.isfinite().all() for parameter in block.parameters())
    assert method == "awq" or (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (after - before).square().mean() < 0.1 * before.square().mean()   # AWQ clips
