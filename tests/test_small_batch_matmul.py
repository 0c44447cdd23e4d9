"""Chapter 7's small_batch_matmul.cpp with integer weights: equal to a product with the matrix that the integers stand
for.
"""
import os
import shutil

import pytest
import torch

import warm
from chapters import CHAPTERS_ROOT, ROOT, load_chapter

if CHAPTERS_ROOT != ROOT:   # a planted bug's C++ must not take the place of what the other tests have compiled
    os.environ["TORCH_EXTENSIONS_DIR"] = str(CHAPTERS_ROOT / "extensions")

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
chapter = load_chapter("chapter-07-quantization")
N, K = 36, 384


def random_layer(format, dtype, generator, out_features=N, in_features=K):
    """All integers occur in it, and scales that differ from group to group."""
    kind = chapter.quantized.Int8Linear if format.bits == 8 else chapter.quantized.Int4Linear
    layer = kind(in_features, out_features, format, dtype)
    layer.weight.random_(*((-128, 128) if format.bits == 8 else (0, 256)), generator=generator)
    layer.scale.data = torch.rand(layer.scale.shape, generator=generator).add(0.1).to(dtype)
    if not format.symmetric:
        layer.zero.random_(0, 16, generator=generator)
    return layer


def formats():
    Format = chapter.integers.Format
    return [Format(8), *(Format(4, group, symmetric) for group in (32, 64, 128, 192, 0) for symmetric in (True, False))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_products_are_those_of_the_matrix_they_stand_for(dtype):
    """For numbers of rows on both sides of every threshold."""
    generator = torch.Generator().manual_seed(0)
    for format in formats():
        layer = random_layer(format, dtype, generator)
        product = chapter.small_batch_matmul.integer_kernel(layer)
        layer.scale.data = layer.scale.data.double()   # so that the reference is exact
        weight = layer.dequantized()
        layer.scale.data = layer.scale.data.to(dtype)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 32):
            # A mean that is not zero: a wrong zero point shows.
            x = torch.randn(rows, K, generator=generator).to(dtype) + 0.5
            found, expected = product(x), x.double() @ weight.T
            assert found.dtype == dtype and found.shape == (rows, N) and found.is_contiguous()
            error = ((found.double() - expected).abs() / (x.double().abs() @ weight.abs().T)).max().item()
            assert error < (2e-5 if dtype == torch.float32 else 4e-3), (format, rows, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_products_hide_no_nan(dtype):
    """generate.py says that a model is damaged by the nan in its scores. Only the row that has it is touched."""
    for format in formats():
        x = torch.randn(5, K).to(dtype)
        x[1, 3], x[3, K - 1] = float("nan"), float("inf")
        layer = random_layer(format, dtype, torch.Generator().manual_seed(0))
        found = chapter.small_batch_matmul.integer_kernel(layer)(x)
        assert found[1].isnan().all() and not found[3].isfinite().any() and found[[0, 2, 4]].isfinite().all()


def test_operators_refuse_what_does_not_fit():
    """A wrong call is an error, not a read beyond the end of a tensor."""
    operators, x = chapter.small_batch_matmul.operators(), torch.randn(2, 64)
    w8, w4 = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 32, dtype=torch.uint8)
    for arguments in [(x, w8, torch.ones(1)), (x, w8, torch.ones(0)), (x, w8, torch.ones(4, 2)),
                      (x, w8[:0], torch.ones(0)),
                      (x, w8.float(), torch.ones(4)), (x, w8.unsqueeze(2), torch.ones(4))]:
        with pytest.raises(RuntimeError, match="small_batch_matmul"):
            operators.small_batch_int8(*arguments)
    for arguments in [(x, w4, torch.ones(1, 1)), (x, w4, torch.ones(1, 4)), (x, w4.float(), torch.ones(4, 1)),
                      (x, w4, torch.ones(4))]:
        with pytest.raises(RuntimeError, match="small_batch_matmul"):
            operators.small_batch_int4(*arguments, None)
    q, k = torch.randn(2, 4, 8), torch.randn(3, 5, 2, 8)
    table, ends = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), torch.tensor([7, 3], dtype=torch.int32)
    operators.one_token_attention(q, k, k, table, ends)
    for arguments in [(q, k, k, table - 1, ends), (q, k, k, table + 1, ends), (q, k, k, table, ends * 0),
                      (q, k, k, table, ends + 4),
                      (q, k, k, table[:, :0], ends), (q[0], k, k, table, ends),
                      (q, k, k, table, torch.stack([ends, ends], 1)[:, 0])]:
        with pytest.raises(RuntimeError, match="one_token_attention"):
            operators.one_token_attention(*arguments)


def test_x_may_be_a_view(dtype=torch.bfloat16):
    """Of every second row, of every second column."""
    generator = torch.Generator().manual_seed(0)
    product = chapter.small_batch_matmul.integer_kernel(random_layer(chapter.integers.Format(4, 32), dtype, generator))
    x = torch.randn(6, 2 * K, generator=generator).to(dtype)[::2, ::2]
    assert torch.equal(product(x), product(x.contiguous()))


def test_the_kernel_computes_the_layers_that_fit():
    Format, quantized, small_batch_matmul = chapter.integers.Format, chapter.quantized, chapter.small_batch_matmul
    generator = torch.Generator().manual_seed(0)
    fit = [random_layer(format, torch.float32, generator) for format in formats()]
    other = [random_layer(Format(4, 96), torch.float32, generator),
             quantized.W8A8Linear(K, N, Format(8), torch.float32),
             random_layer(Format(8), torch.float32, generator, out_features=6),
             random_layer(Format(8), torch.float32, generator, in_features=96),
             random_layer(Format(8), torch.float16, generator)]
    small_batch_matmul.for_small_batches(torch.nn.ModuleList(fit + other), use_kernel=True)
    assert [layer.few for layer in fit] == [small_batch_matmul.FEW] * len(fit)
    assert [layer.few for layer in other] == [0] * len(other)
    x = torch.randn(small_batch_matmul.FEW + 1, K, generator=generator)
    for layer in fit:
        few, many = layer(x[:-1]), layer(x)
        assert not torch.equal(few, many[:-1])   # rounded in another order: both ways have been taken
        torch.testing.assert_close(few, many[:-1], rtol=1e-3, atol=1e-3 * many.std().item())
    layer.weight = torch.zeros_like(layer.weight)   # loaded from a file, say
    layer.zero = torch.zeros_like(layer.zero)
    assert not layer(x[:1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H, G, K, P, length", [(4, 2, 32, 64, 40), (4, 2, 32, 5, 40), (16, 8, 128, 16, 1),
                                                (3, 3, 8, 512, 300)])
def test_attention_of_one_token_is_that_of_the_softmax(dtype, H, G, K, P, length):
    """For sequences of different lengths, with blocks in any order; what lies behind a sequence's end is not read."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length, 1, (length + 1) // 2]
    width = (length - 1) // P + 1
    k, v = torch.randn(2, 3 * width + 2, P, G, K, generator=generator).to(dtype)
    table = torch.randperm(3 * width + 2, generator=generator)[:3 * width].view(3, width).int()
    q, expected = 3 * torch.randn(3, H, K, generator=generator).to(dtype), []   # far from uniform
    for row, blocks, n in zip(q.double(), table, lengths):
        keys, values = (x[blocks].flatten(0, 1)[:n].double().repeat_interleave(H // G, dim=1)
                        for x in (k, v))   # (n, H, K)
        weights = torch.einsum("hk,nhk->hn", row, keys).div(K ** 0.5).softmax(-1)
        expected.append(torch.einsum("hn,nhk->hk", weights, values))
    for x in (k, v):
        for blocks, n in zip(table, lengths):
            for t in range(n, width * P):
                x[blocks[t // P], t % P] = float("nan")
    attention = chapter.small_batch_matmul.one_token_attention(K, q)
    found = attention(q, k, v, table, torch.tensor(lengths, dtype=torch.int32))
    assert found.dtype == dtype
    tolerances = {torch.float32: dict(rtol=1e-4, atol=1e-5), torch.bfloat16: dict(rtol=1e-2, atol=1e-2)}[dtype]
    torch.testing.assert_close(found.double(), torch.stack(expected), **tolerances)


def test_attention_of_one_token_hides_no_nan():
    """generate.py says that a model is damaged by the nan in its scores."""
    k, v, q = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 8)
    k[1, 1] = float("nan")
    table, ends = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([3, 3], dtype=torch.int32)
    found = chapter.small_batch_matmul.one_token_attention(8, q)(q, k, v, table, ends)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_attention_of_one_token_is_left_to_torch_where_it_does_not_fit():
    assert chapter.small_batch_matmul.one_token_attention(12, torch.zeros(1)) is None
    assert chapter.small_batch_matmul.one_token_attention(16, torch.zeros(1, dtype=torch.float16)) is None


COMPILED = """
import torch
from benchmark_decode import GREEDY, build
from static_batching import generate_batch
from model import ModelConfig
from small_batch_matmul import FEW

class Words:
    vocab_size, end_of_text, end_of_turn = 97, 96, 95

def answers(model, forward=None):
    prompts = [list(range(5)), list(range(9, 18))]   # of different lengths
    return [list(step.items()) for step in generate_batch(model, Words, prompts, 12, GREEDY, True, forward)]

model = build(ModelConfig(vocab_size=100, hidden_size=64, intermediate_size=128), (4, 32), "cpu", torch.float32)
layers = [module for module in model.modules() if hasattr(module, "few")]
assert len(layers) == 15 and all(layer.few == FEW for layer in layers)
by_kernel = answers(model)
for layer in layers:
    layer.few = 0
assert answers(model) == by_kernel   # of the matrices that the integers stand for
for layer in layers:
    layer.few = FEW
forward = torch.compile(model, fullgraph=True)
assert answers(model, forward) == by_kernel and answers(model, forward) == by_kernel
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1   # all steps have the same shapes
"""


def test_compiled_decode_of_integers_gives_the_same_tokens(compiled_kernels):
    """In a process of its own: the compiler looks modules up by their names."""
    done = warm.run("-c", COMPILED, cwd=chapter.folder, env=os.environ
                    | {"TORCHINDUCTOR_CACHE_DIR": str(compiled_kernels)})
    assert done.returncode == 0, done.stderr
