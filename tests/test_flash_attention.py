"""Chapter 4's flash_attention.py: attention in blocks is attention, and never holds the matrix of scores."""
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chapters import load_chapter, run_here

chapter4 = load_chapter("chapter-04-mixed-precision")
flash = chapter4.flash_attention


def in_blocks(query_block, key_block):
    return lambda q, k, v: flash.flash_attention(q, k, v, query_block, key_block)


def random_inputs(H, L, K, dtype=torch.float32, seed=0):
    """q, k, v and the gradient that arrives at the output, (H, L, K) each."""
    return torch.randn(4, H, L, K, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours, theirs, **tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text: f"{name}: {text}")


# --------------------------------------------------------------------------------------------------- equality

@pytest.mark.parametrize("reference", ["plain_attention", "library_attention"])
@pytest.mark.parametrize("H, L, K, query_block, key_block", [
    (1, 1, 4, 1, 1), (2, 1, 8, 64, 64), (3, 2, 8, 1, 1), (2, 7, 8, 3, 2), (2, 16, 8, 4, 4), (1, 17, 8, 4, 8),
    (2, 33, 16, 8, 5),
    (2, 33, 16, 5, 8), (1, 40, 8, 1, 7), (1, 40, 8, 7, 1), (2, 64, 32, 64, 16), (2, 65, 32, 16, 64),
    (1, 130, 64, 64, 64)])
def test_attention_in_blocks_is_attention(reference, H, L, K, query_block, key_block):
    """Output and gradients, in float64, where nothing but a mistake is left of a difference."""
    inputs = random_inputs(H, L, K, torch.float64)
    assert_equal(flash.forward_backward(in_blocks(query_block, key_block), *inputs),
                 flash.forward_backward(getattr(flash, reference), *inputs), rtol=1e-10, atol=1e-12)


def test_attention_in_blocks_is_attention_in_float32():
    inputs = random_inputs(2, 100, 32)
    assert_equal(flash.forward_backward(flash.flash_attention, *inputs),
                 flash.forward_backward(flash.library_attention, *inputs), rtol=1e-4, atol=1e-5)


RISING = torch.arange(1, 51)
STEPS = {"rising": RISING, "falling": RISING.flip(0), "below zero, rising": -RISING.flip(0),
         "below zero, falling": -RISING}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-2), (torch.float64, 1e-9)])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_large_scores_do_not_overflow(steps, dtype, tolerance):
    """Scores of thousands. Rising along the row, each block brings a new maximum; falling, the first one had it. Below
    zero every exp() alone would be 0."""
    q, k, v, dout = random_inputs(2, len(steps), 16, dtype)
    inputs = q.abs() * 20, k.abs() * steps[:, None], v, dout
    assert (inputs[0] @ inputs[1].mT / 4).abs().max() > 2000
    ours = flash.forward_backward(in_blocks(8, 8), *inputs)
    assert all(x.isfinite().all() for x in ours)
    assert_equal(ours, flash.forward_backward(flash.library_attention, *inputs), rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences():
    q, k, v, _ = random_inputs(2, 5, 3, torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(in_blocks(2, 3), inputs)


def test_a_second_derivative_is_refused():
    """The output's gradient depends on the output, so torch would ask for one; without a word it would be wrong."""
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(1, 5, 4).unbind())
    gradient, = torch.autograd.grad(flash.flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_comes_later_changes_no_bit():
    q, k, v, _ = random_inputs(2, 30, 8)
    before = flash.flash_attention(q, k, v, 8, 4)
    for t in (1, 7, 8, 29):
        edited = [x.clone() for x in (q, k, v)]
        for x in edited:
            x[:, t:] += 100
        after = flash.flash_attention(*edited, 8, 4)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


# ------------------------------------------------------------------------------------------------------ blocks

@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_the_running_average_ends_as_the_softmax(block):
    scores, values = torch.randn(2, 13, generator=torch.Generator().manual_seed(0)).double() * 5
    *_, (largest, _, total, weighted) = flash.running_row(scores, values, block)
    assert largest == scores.max()
    assert largest + math.log(total) == pytest.approx(scores.logsumexp(0).item())
    assert weighted / total == pytest.approx((scores.softmax(0) @ values).item())


@pytest.mark.parametrize("L, query_block, key_block", [(1, 1, 1), (12, 4, 4), (13, 4, 4), (13, 3, 5),
                                                       (13, 5, 3), (9, 20, 2)])
def test_blocks_are_those_that_the_mask_leaves_something_of(L, query_block, key_block):
    visible = torch.ones(L, L, dtype=torch.bool).tril()
    found = [(queries, keys) for queries, key_blocks in flash.visible_blocks(L, query_block, key_block)
             for keys in key_blocks]
    expected = [(queries, keys) for queries in cut(L, query_block) for keys in cut(L, key_block)
                if visible[queries, keys].any()]
    assert found == expected


def cut(L, block):
    return [slice(start, min(start + block, L)) for start in range(0, L, block)]


def test_hidden_blocks_cost_nothing():
    """Two products for a visible block forward, five backward; none for the others."""
    H, L, K, block = 2, 80, 8, 16
    with FlopCounterMode(display=False) as counter:
        flash.forward_backward(in_blocks(block, block), *random_inputs(H, L, K))
    rows = L // block
    assert counter.get_total_flops() == (2 + 5) * rows * (rows + 1) // 2 * 2 * H * block * block * K


# ------------------------------------------------------------------------------------------------------ memory

class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned, views included."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def test_no_matrix_of_scores_is_ever_made():
    """Neither forward nor backward, nor of one head, nor of a mask."""
    H, L, K = 2, 128, 8
    inputs = random_inputs(H, L, K)
    with LargestResult() as plain:
        flash.forward_backward(flash.plain_attention, *inputs)
    with LargestResult() as ours:
        flash.forward_backward(in_blocks(16, 16), *inputs)
    assert plain.numel == H * L * L
    assert ours.numel == H * L * K < L * L


def test_only_a_number_a_row_is_kept_besides_inputs_and_output():
    kept = []
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(2, 48, 8).unbind())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        flash.flash_attention(q, k, v, 16, 16)
    assert kept == 4 * [(2, 48, 8)] + [(2, 48, 1)]


def test_peaks_are_as_predicted():
    H, K = 2, 32
    measured = {}
    for L in (192, 384):
        for name, attention, predicted in (
                ("plain", flash.plain_attention, flash.plain_bytes(H, L, K)),
                ("blocks", in_blocks(32, 32), flash.blocks_bytes(H, L, K, 32, 32))):
            measured[name, L] = flash.peak_bytes(attention, H, L, K)
            assert measured[name, L] == pytest.approx(predicted, rel=0.02), (name, L)
    assert measured["plain", 384] > 3.5 * measured["plain", 192]
    assert measured["blocks", 384] < 2 * measured["blocks", 192]


def test_the_library_is_measured_with_its_fused_kernel():
    """On a CPU scaled_dot_product_attention has one for four dimensions only: the comparison must not be with the
    formula.
    """
    H, L, K = 2, 512, 32
    assert flash.peak_bytes(flash.library_attention, H, L, K) < flash.plain_bytes(H, L, K) / 2


def test_the_script_runs_writes_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(flash, "LENGTHS", (64, 128))
    monkeypatch.setattr(flash, "FIGURES", tmp_path)
    monkeypatch.setattr(chapter4.results, "RESULTS", tmp_path)
    printed = run_here(flash)
    assert all(f"\n{number}. " in printed for number in (1, 2, 3))
    result = json.loads((tmp_path / "flash_attention.json").read_text())
    assert [row["length"] for row in result["rows"]] == [64, 128]
    assert all(row.keys() == result["columns"].keys() and min(row.values()) > 0 for row in result["rows"])
    assert 5_000 < (tmp_path / "flash_attention.png").stat().st_size < 200_000
