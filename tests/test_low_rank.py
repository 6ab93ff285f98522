"""low_rank: the reference against matrix products in float64, and every kernel against the reference, bit
for bit.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, check_backend, random_values, rounding_bound

import zokernels


def run(params, out, left, right, coeffs, **kwargs):
    if out is None:
        zokernels.low_rank_(params, left, right, coeffs, **kwargs)
        return params
    zokernels.low_rank(out, params, left, right, coeffs, **kwargs)
    return [*out, *params]


def random_low_rank(rng, shapes=None, dtype=None, count=None):
    """Arguments of run; parameters, at any alignment, are views into buffers."""
    dtype = dtype or rng.choice(DTYPES)
    count = rng.choice([0, 1, 2, 7]) if count is None else count
    shapes = shapes or [
        (rng.randrange(60), *rng.choice([(rng.randrange(5),), (rng.randrange(300),), (3, 17)]))
        for _ in range(rng.randrange(1, 4))
    ]
    params, left, right = [], [], []
    for m, *rest in shapes:
        n, rank = torch.Size(rest).numel(), rng.choice([0, 1, 2, 8, 19])
        begin = rng.randrange(9)
        params.append(random_values(m * n + 8, dtype, rng)[begin : begin + m * n].view(m, *rest))
        left.append(random_values(count * m * rank, torch.float32, rng).view(count, m, rank))
        right.append(random_values(count * n * rank, torch.float32, rng).view(count, n, rank))
    coeffs = torch.randn(count) if rng.random() < 0.5 else torch.randn(len(shapes), count)
    offsets = [
        rng.choice([0, rng.randrange(2**50), 8 * 2**32 - rng.randrange(p.numel() + 1), 2**63 - 1 - p.numel()])
        for p in params
    ]
    return {
        "params": params,
        "out": rng.choice([None, [torch.full_like(p, 55.0) for p in params]]),
        "left": left,
        "right": right,
        "coeffs": coeffs,
        "streams": [rng.getrandbits(56) for _ in shapes],
        "offsets": offsets,
        "decay": rng.choice([None, 1.0, 0.97]),
        "rounding": rng.choice(["nearest", "stochastic"]),
        "rounding_seed": rng.getrandbits(64),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_follows_the_formula(dtype, rng):
    shapes, ranks = [(31, 70), (5, 4, 3)], [4, 2]
    params = [torch.randn(*s).to(dtype) for s in shapes]
    left = [torch.randn(2, p.shape[0], r) for p, r in zip(params, ranks, strict=True)]
    right = [torch.randn(2, p[0].numel(), r) for p, r in zip(params, ranks, strict=True)]
    coeffs = torch.randn(2, 2)
    want, bounds = [], []
    for i, p in enumerate(params):
        added = lambda c, x, y, p=p: (
            (c.double()[:, None, None] * (x.double() @ y.double().mT)).sum(0).view_as(p)
        )
        want.append(0.5 * p.double() + added(coeffs[i], left[i], right[i]))
        magnitude = 0.5 * p.double().abs() + added(coeffs[i].abs(), left[i].abs(), right[i].abs())
        # In fp32: for each column of the factors an fma; then a product, and an fma for each of two
        # directions.
        bounds.append(rounding_bound(want[i], dtype, magnitude, 3 + ranks[i]))
    with zokernels.backend("reference"):
        zokernels.low_rank_(params, left, right, coeffs, streams=[1, 2], decay=0.5)
    for got, expected, bound in zip(params, want, bounds, strict=True):
        assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("repeat", range(15))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_low_rank(rng))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_length(cpu_kernel, dtype, rng):
    """Rows of all lengths, so that a row ends anywhere in a tile and a tile anywhere in a row."""
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 127, 128, 129, 1000):
        check_backend(run, random_low_rank(rng, shapes=[(rng.randrange(1, 20), n)], dtype=dtype, count=2))


def test_threads(cpu_kernel, rng):
    args = random_low_rank(rng, shapes=[(400, 301), (3, 5), (1, 70000), (20000, 2)], count=1)
    check_backend(run, args, threads=(1, 3))


def test_a_nan_of_a_factor_gives_nan_whatever_its_payload(cpu_backend):
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        theta = torch.ones(3, 100, dtype=dtype)
        zokernels.low_rank_(theta, payloads.view(1, 3, 1), torch.ones(1, 100, 1), 1.0, streams=0)
        assert theta.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        with zokernels.backend(backend):
            check_backend(run, random_low_rank(rng), "cuda")
            check_backend(run, random_low_rank(rng, shapes=[(300, 257), (64, 128)]), "cuda")
