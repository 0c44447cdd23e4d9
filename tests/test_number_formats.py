"""Chapter 4's number_formats.py: its roundings are right, bit for bit, and what it says of them is so."""
import math

import pytest
import torch
from torch.testing import assert_close

from chapters import load_chapter, run_here

formats = load_chapter("chapter-04-mixed-precision").number_formats
NAN_OF_A_GPU = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)   # to whose bits nothing can be added
SPECIAL = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), NAN_OF_A_GPU])


def of_all_sizes(n, seed=0):
    """Random float32 numbers, of any sign and any size, subnormal ones too: random bits."""
    bits = torch.randint(-2 ** 31, 2 ** 31, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    x = bits.view(torch.float32)
    return x[x.isfinite()]


def step_at(x, mantissa):
    """float64: the distance of a format's neighbours around x, for a format with the exponents of float32."""
    return 2.0 ** (x.double().abs().log2().floor().clamp(min=-126) - mantissa)


def test_runs_and_draws(tmp_path, monkeypatch, text_file):
    monkeypatch.setattr(formats, "FIGURES", tmp_path)   # leave the repository's figures as they are
    monkeypatch.setattr(formats, "fetch", lambda source: text_file)
    printed = run_here(formats)
    assert printed.startswith("1. ") and all(f"\n{number}. " in printed for number in range(2, 6))
    assert "stops at 256" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["number_formats.png", "rounding.png"]
    for path in tmp_path.iterdir():
        assert 5_000 < path.stat().st_size < 200_000, path


# ------------------------------------------------------------------------------------------------- the formats

@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_limits_and_bits_are_those_of_torch(name, monkeypatch):
    formats.check_limits(name)
    exponent, mantissa, _ = formats.FORMATS[name]
    assert formats.bits_of(1.0, name) == ("0", "0" + "1" * (exponent - 1), "0" * mantissa)
    monkeypatch.setitem(formats.FORMATS, name, formats.FORMATS[name]._replace(mantissa=9))   # the check can fail
    with pytest.raises(AssertionError, match="by torch"):
        formats.check_limits(name)


def test_bits_mean_the_number():
    for name, (exponent, mantissa, _) in formats.FORMATS.items():
        for value in (0.1, -math.pi, 1e-3, 1000.0):
            sign, power, fraction = formats.bits_of(value, name)
            assert (len(power), len(fraction)) == (exponent, mantissa)
            size = (1 + int(fraction, 2) / 2 ** mantissa) * 2.0 ** (int(power, 2) - 2 ** (exponent - 1) + 1)
            assert (-size if sign == "1" else size) == formats.hold(torch.tensor(value), name).item()


def test_tf32_rounds_to_ten_bits_ties_to_even():
    last, half, bit = 2 ** -10, 2 ** -11, 2 ** -23   # of tf32 at 1, half of that, and of float32
    exact = {1 + half - bit: 1, 1 + half: 1, 1 + half + bit: 1 + last, 1 + last: 1 + last,
             1 + last + half: 1 + 2 * last, 2 - half - bit: 2 - last, 2 - half: 2}
    given, expected = torch.tensor(list(exact)), torch.tensor(list(exact.values()))
    assert_close(formats.to_tf32(given), expected, atol=0, rtol=0)
    assert_close(formats.to_tf32(-given), -expected, atol=0, rtol=0)
    x = of_all_sizes(100_000)
    step = step_at(x, 10)
    exact = ((x.double() / step).round() * step).float()   # torch.round takes ties to even; 2^128 becomes inf
    assert_close(formats.to_tf32(x), exact, atol=0, rtol=0)
    inside = x[(x.abs() >= 2 ** -14) & (x.abs() < 65504)]   # float16 has as many bits of mantissa
    assert len(inside) > 5_000
    assert_close(formats.to_tf32(inside), inside.half().float(), atol=0, rtol=0)
    assert_close(formats.to_tf32(SPECIAL), SPECIAL, atol=0, rtol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- rounding

def test_counters_stop():
    assert formats.count_until_stuck(torch.bfloat16) == 256
    assert formats.count_until_stuck(torch.float16) == 2048


@pytest.mark.parametrize("value", [1.001, -1.001, 1.0077, 255.5, 2e-41])
def test_stochastic_rounding_is_unbiased(value):
    n = 200_000
    x = torch.full((n,), value)
    rounded = formats.stochastic_round(x, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    step = step_at(x, 7)[0].item()
    lower = math.floor(x[0].item() / step) * step
    assert set(rounded.double().tolist()) == {lower, lower + step}   # both neighbours, and nothing else
    up = (x[0].item() - lower) / step
    error = (rounded.double().mean() - x[0].double()).item() / step
    assert abs(error) < 4 * math.sqrt(up * (1 - up) / n), f"{error} of a step, four standard deviations are the bound"


def test_stochastic_rounding_takes_a_neighbour_and_leaves_what_fits():
    x = of_all_sizes(100_000)
    generator = torch.Generator().manual_seed(1)
    rounded, step = formats.stochastic_round(x, generator).double(), step_at(x, 7)
    neighbours = [(round_to(x.double() / step) * step).float().double() for round_to in (torch.floor, torch.ceil)]
    assert ((rounded == neighbours[0]) | (rounded == neighbours[1])).all()
    fits = torch.cat([x.bfloat16(), SPECIAL.bfloat16()])
    assert_close(formats.stochastic_round(fits.float(), generator), fits, atol=0, rtol=0, equal_nan=True)
    assert formats.stochastic_round(NAN_OF_A_GPU, generator).isnan().all()


def arrives(way, weights=1, update=0.001, steps=1000):
    return torch.stack(list(way(torch.ones(weights), update, steps)))   # (steps, W)


def test_updates_are_lost_to_the_nearest_and_arrive_by_kahan_and_in_float32():
    assert (arrives(formats.nearest) == 1).all()
    assert abs(arrives(formats.in_float32)[-1] - 2) < 1e-4
    kahan = arrives(formats.kahan)
    exact = 1 + 0.001 * torch.arange(1, 1001)
    assert_close(kahan, kahan.bfloat16().float(), atol=0, rtol=0)   # they are numbers of bfloat16, a step of 2^-7 apart
    assert (kahan[:, 0] - exact).abs().max() < 2 ** -7
    assert (arrives(formats.kahan, update=-0.0005)[:, 0] - (1 - 0.5 * (exact - 1))).abs().max() < 2 ** -7


def test_stochastic_updates_arrive_in_the_mean():
    paths = arrives(formats.stochastic, weights=1000)
    spread = paths[-1].std()
    assert 0.05 < spread < 0.12   # sqrt(1000 p (1 - p)) steps of 2^-7, with p = 0.128: 0.083
    assert abs(paths[-1].mean() - 2) < 4 * spread / math.sqrt(1000)
    assert abs(paths[499].mean() - 1.5) < 4 * spread / math.sqrt(1000)
    assert set((paths[0] * 128).tolist()) == {128, 129}


# ------------------------------------------------------------------------- underflow, overflow, accumulation

def test_shares_by_hand():
    values = torch.tensor([2.0 ** -26, -2.0 ** -25, 1.1 * 2.0 ** -25, 2.0 ** -24, 2.0 ** -14, -1.0, 65504.0, -65520.0])
    assert formats.shares(values, torch.float16, 1) == (2 / 8, 2 / 8, 1 / 8)   # 2^-25 is a tie: 0 is even
    assert formats.shares(values, torch.float16, 2.0 ** 16) == (0, 0, 3 / 8)
    assert formats.shares(values, torch.bfloat16, 1) == (0, 0, 0)


def test_shares_of_real_gradients_are_ordered(monkeypatch, text_file):
    monkeypatch.setattr(formats, "fetch", lambda source: text_file)
    gradients = formats.real_gradients()
    assert list(gradients) == ["weights", "activations", "logits"]
    pushed_up = (gradients["logits"] < 0).sum()   # of each token only the right answer
    assert 0.9 * formats.BATCH_TOKENS < pushed_up <= formats.BATCH_TOKENS
    for values in gradients.values():
        assert len(values) > 100_000 and values.dtype == torch.float32 and (values != 0).all()
        found = [formats.shares(values, torch.float16, 2.0 ** power) for power in (0, 8, 16, 24, 32)]
        zeros, coarse, infinite = zip(*found)
        assert list(zeros) == sorted(zeros, reverse=True)
        assert list(infinite) == sorted(infinite)
        assert zeros[0] > 10 * zeros[2] and infinite[0] == 0 < infinite[-1]
        assert all(formats.shares(values, torch.bfloat16, 2.0 ** power) == (0, 0, 0) for power in (0, 16, 24))


def test_overflow_on_the_way_to_a_finite_answer():
    x, logits = torch.full((1024,), 16.0), torch.tensor([12.0, 11.0, 10.0])
    assert formats.root_mean_square(x.half()).isinf()
    assert formats.root_mean_square(x) == formats.root_mean_square(x.bfloat16()) == 16
    assert formats.softmax_as_defined(logits.half())[0].isnan()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        assert_close(formats.softmax(logits.to(dtype)).float(), logits.softmax(0), atol=tolerance, rtol=0)


def test_sums_stop_in_an_accumulator_of_few_bits():
    ones = torch.ones(600)
    assert formats.running_sums(ones, torch.bfloat16).tolist() == [min(n, 256) for n in range(1, 601)]
    assert formats.running_sums(ones, torch.float32)[-1] == 600
    products = formats.dot_products()["all positive"]
    exact = products.double().sum()
    errors = [abs(formats.running_sums(products, dtype)[-1] / exact - 1)
              for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert errors[0] < 1e-5 and errors[2] > 0.5 and errors == sorted(errors)
