"""Rounding: to nearest even as IEEE defines it, and stochastic with exactly the right probability."""

from __future__ import annotations

import math

import largest_cases
import pytest
import torch
from helpers import assert_same_bits, random_values

import zokernels
from zokernels import _host
from zokernels.backends.reference.rounding import round_stochastic

HALVES = [torch.bfloat16, torch.float16]


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The two values of ``dtype`` around x: x truncated, and the next one away from zero."""
    nearest = torch.tensor(x).to(dtype)
    if abs(nearest.double().item()) > abs(x):
        nearest = torch.nextafter(nearest, torch.zeros((), dtype=dtype))
    away = torch.nextafter(nearest, torch.tensor(math.copysign(float("inf"), x), dtype=dtype))
    return nearest.double().item(), away.double().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_probability_is_the_dropped_fraction(dtype, rng):
    """Over all 65536 fields, the count of roundings away from zero is the dropped fraction, exactly.

    fp16 uses 13 bits of the field, so its fraction is resolved to 2^-13.
    """
    fields = torch.arange(65536)
    scales = [1.0, 0.02, 1e-3, 300.0] + (
        [2.0**-14, 3e-5, 2e-6, 5e-8, 1e-9] if dtype is torch.float16 else [1e-30, 1e-39]
    )
    for scale in scales:
        for _ in range(4):
            x = torch.tensor(rng.gauss(0, 1) * scale)
            toward, away = neighbours(x.item(), dtype)
            rounded = round_stochastic(x.expand(65536).contiguous(), fields, dtype).double()
            assert set(rounded.tolist()) <= {toward, away}, (x, toward, away)
            share = (rounded == away).double().mean().item()
            fraction = (x.double().item() - toward) / (away - toward)
            resolution = 2**-13 if dtype is torch.float16 else 0
            assert abs(share - fraction) <= resolution, (x.item(), share, fraction)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_representable_values_never_move(dtype, cpu_backend, rng):
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    got = every.clone()
    zokernels.combine_(got, [], [], streams=1, rounding="stochastic", rounding_seed=rng.getrandbits(64))
    assert_same_bits(got, every)
    zokernels.combine_(got, 3, 0.0, streams=1, rounding="stochastic", rounding_seed=rng.getrandbits(64))
    assert torch.equal(got.nan_to_num(0), every.nan_to_num(0))  # 0 * z may turn -0 to 0, no more


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_frequencies_lie_within_exact_bounds(dtype, cpu_kernel, rng):
    """A tensor of one value, moved by less than its last bit: a binomial count, bounded at 1e-12 by
    Hoeffding.
    """
    n = 1 << 18
    theta = torch.full((n,), 1.0, dtype=dtype)
    fraction = rng.choice([1 / 8, 1 / 3, 7 / 10])
    step = torch.finfo(dtype).eps
    zokernels.combine_(
        theta,
        [],
        [],
        streams=2,
        decay=1.0 + fraction * step,
        rounding="stochastic",
        rounding_seed=rng.getrandbits(64),
    )
    moved = theta > 1
    assert set(theta.tolist()) == {1.0, 1.0 + step}
    expected = torch.tensor(1.0 + fraction * step).double().sub(1).item() / step  # as fp32 holds the decay
    bound = math.sqrt(n * math.log(2 / 1e-12) / 2)
    assert abs(moved.sum().item() - n * expected) < bound + n * 2**-13
    # And neighbours are unrelated: pairs that both moved are binomial too.
    pairs = (moved[::2] & moved[1::2]).sum().item()
    assert abs(pairs - n / 2 * expected**2) < bound + n * 2**-13


def test_at_the_largest_finite_values(cpu_backend):
    largest_cases.check()


def test_small_updates_are_not_lost(cpu_kernel, rng):
    """A thousand bf16 updates of relative size 1e-5: nearest loses them all, stochastic keeps their sum.

    The mean over the elements, divided by the growth that the steps so far should give, is a martingale.  A
    step moves an element by a unit in the last place or not at all: a variance of at most that unit times the
    update. Freedman's inequality then bounds the mean, with a probability of 1e-12 to be outside."""
    n = 4096
    decay = torch.tensor(1 + 1e-5).item()  # as fp32 holds it
    nearest, stochastic = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    for step in range(1000):
        zokernels.combine_(nearest, [], [], streams=0, decay=decay)
        seed = zokernels.derive_seed(rng.getrandbits(64), step)
        zokernels.combine_(
            stochastic, [], [], streams=0, decay=decay, rounding="stochastic", rounding_seed=seed
        )
    assert torch.equal(nearest, torch.ones(n, dtype=torch.bfloat16))
    grown = stochastic.double().mean().item()
    unit, expected = torch.finfo(torch.bfloat16).eps, decay**1000
    assert stochastic.max() < 2  # so that the unit is that of every step
    variance, largest, logarithm = 1000 * unit * 2 * (decay - 1) / n, unit / n, math.log(2 / 1e-12)
    bound = largest * logarithm / 3 + math.sqrt((largest * logarithm / 3) ** 2 + 2 * variance * logarithm)
    bound += 1000 * 2.0**-24 * 2  # the accumulator's own rounding to fp32
    assert abs(grown - expected) < bound * expected
    assert bound * expected < (expected - 1) / 2  # so that the test can fail


def test_portable_half_conversion(rng):
    x = random_values(20000, torch.float32, rng)
    x[:4000] = torch.randn(4000) * torch.exp2(torch.randint(-28, 17, (4000,)).float())
    exact = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).float()
    halfway = (exact[:-1] + exact[1:]) / 2
    for value in torch.cat([x[:8000], exact[::7], halfway[::7]]).tolist():
        want = torch.tensor(value).half()
        if math.isnan(value):
            assert _host.to_half(value) & 0x7FFF > 0x7C00
        else:
            assert _host.to_half(value) == want.view(torch.int16).item() & 0xFFFF, value


def test_rounding_bits_are_not_noise_bits():
    """One seed may serve noise and rounding, since their counters lie in different domains."""
    from zokernels.backends.reference.noise import uniform16

    seed = torch.tensor(1234)
    rounding = uniform16(seed, 5, 4, 0, 1 << 16).double()
    z = zokernels.noise(1 << 16, seed=1234, stream=5).double()
    centred = (rounding - rounding.mean()) / rounding.std()
    assert abs((centred * z).mean().item()) * 256 < 6
    assert abs((centred * z.pow(2)).mean().item()) / math.sqrt(2) * 256 < 6
