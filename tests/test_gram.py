"""gram: inner products of directions, exact in any order; Span: linear algebra with coefficients."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DISTS
from torch import nn

import zokernels
from zokernels import span as spans
from zokernels.span import Span


def directions(seeds, sizes, streams, offsets, dist):
    """The directions as vectors, float64 [K, n]."""
    places = list(zip(sizes, streams, offsets, strict=True))
    rows = [[zokernels.noise(n, seed=k, stream=s, offset=o, dist=dist) for n, s, o in places] for k in seeds]
    return torch.stack([torch.cat(row).double() for row in rows])


@pytest.mark.parametrize("dist", DISTS)
def test_is_the_products(dist, cpu_backend, rng):
    sizes, streams, offsets = [9000, 0, 37], [1, 2, 3], [3, 0, 2**40]
    seeds = [rng.getrandbits(64) for _ in range(5)]
    got = zokernels.gram(seeds, sizes, streams=streams, offsets=offsets, dist=dist)
    z = directions(seeds, sizes, streams, offsets, dist)
    assert got.dtype is torch.float64
    if dist == "rademacher":
        assert torch.equal(got, z @ z.T)
        assert got.diagonal().tolist() == [9037] * 5
    else:
        units = (z * 2**17).round().long()
        exact = (units[:, None] * units).sum(-1)  # in integers
        assert torch.equal((got * 2**34).long(), exact)
        # Each z is rounded to a multiple of 2^-17, that is by at most 2^-18.
        sums = z.abs().sum(1)
        assert ((got - z @ z.T).abs() <= 2.0**-18 * (sums[:, None] + sums) + 9037 * 2.0**-36 + 1e-9).all()


@pytest.mark.parametrize("dist", DISTS)
def test_no_split_changes_a_bit(dist, cpu_backend, rng):
    """Of 64 directions 16,384 elements go through the scratch at a time, and in pieces of their own."""
    seeds, n, offset = torch.arange(-32, 32), 40_000, rng.randrange(2**50)
    whole = zokernels.gram(seeds, [n], streams=[4], offsets=[offset], dist=dist)
    with zokernels.backend("reference"):
        assert torch.equal(zokernels.gram(seeds, [n], streams=[4], offsets=[offset], dist=dist), whole)
    cuts = [0, *sorted(rng.randrange(n + 1) for _ in range(4)), n]
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    places = {"streams": [4] * 5, "offsets": [offset + a for a in cuts[:-1]]}
    assert torch.equal(zokernels.gram(seeds, sizes, **places, dist=dist), whole)


def test_diagonal_is_the_squared_norm(rng):
    seeds, sizes = [rng.getrandbits(64) for _ in range(3)], [5000, 70]
    got = zokernels.gram(seeds, sizes, streams=[1, 2]).diagonal()
    assert (got - zokernels.squared_norm(seeds, sizes, streams=[1, 2])).abs().max() < 5070 * 2.0**-17


def test_high_and_low_parts_are_the_sum():
    total = torch.zeros(2, 1, 1, dtype=torch.int64)
    z = torch.full((1, 8192), 6.5)
    for _ in range(3):
        spans._add_products(total, z, "normal")
    assert (int(total[0]) << 20) + int(total[1]) == 3 * 8192 * int(6.5 * 2**17) ** 2


def test_errors():
    for kwargs, message in [
        (dict(sizes=[-1], streams=[0]), "gram: sizes: expected integers >= 0"),
        (dict(sizes=[3], streams=[0, 1]), "gram: streams: expected 1 integers"),
        (dict(sizes=[3], streams=[0], dist="cauchy"), "gram: dist: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            zokernels.gram([1], **kwargs)
    assert zokernels.gram(torch.empty(0, dtype=torch.int64), [4], streams=[0]).shape == (0, 0)
    assert zokernels.gram([1, 2], [], streams=[]).tolist() == [[0, 0], [0, 0]]


@pytest.fixture
def layer():
    return nn.Linear(40, 30)


@pytest.mark.parametrize("dist", DISTS)
def test_span_is_linear_algebra_of_the_vectors(dist, cpu_backend, layer, rng):
    span = Span(layer.named_parameters(), [rng.getrandbits(64) for _ in range(6)], dist)
    z = directions(span.seeds, span.sizes, span.streams, [0, 0], dist)
    a, b = torch.randn(4, 6).double(), torch.randn(3, 6).double()
    u, v = a @ z, b @ z
    # Normal noise is rounded to multiples of 2^-17: what that can change in a Gram matrix, at most
    sums = 2.0**-18 * z.abs().sum(1) * (dist == "normal")
    bound = lambda x, y: ((x.abs() @ (sums[:, None] + sums + 1e-9)) * y.abs()).sum(-1)
    near = lambda got, want, most: (got - want).abs().le(most).all()
    assert near(span.dot(a, a[0]), u @ u[0], bound(a, a[0]))
    assert near(span.norm(a).square(), u.square().sum(1), bound(a, a))
    d = a[:, None] - b
    assert near(span.distances(a, b).square(), torch.cdist(u, v).square(), bound(d, d))
    assert (span.distances(a, a).diagonal() == 0).all()
    assert span.zeros(3).shape == (3, 6)
    assert len(span) == 6


@pytest.mark.parametrize("dist", DISTS)
def test_fit_is_least_squares(dist, cpu_backend, layer, rng):
    span = Span(layer.named_parameters(), [rng.getrandbits(64) for _ in range(6)], dist)
    z = directions(span.seeds, span.sizes, span.streams, [0, 0], dist)
    x = [torch.randn(30, 40), torch.randn(30)]
    flat = torch.cat([t.flatten() for t in x]).double()
    want = torch.linalg.lstsq(z.T, flat).solution
    torch.testing.assert_close(span.fit(x), want, rtol=1e-5, atol=1e-6)
    rest = [t.clone() for t in x]
    span.add_(rest, -span.fit(x))
    residual = span.project(rest)
    assert residual.abs().max() < 1e-5 * flat.norm() * z[0].norm()  # at right angles to every direction


def test_what_is_in_the_span_is_found(layer, rng):
    span = Span(layer.named_parameters(), range(8))
    coeffs = torch.randn(8).double()
    tensors = [torch.zeros_like(p) for p in layer.parameters()]
    span.add_(tensors, coeffs)
    torch.testing.assert_close(span.fit(tensors), coeffs, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"Span: tensors: expected tensors of \[1200, 30\] elements, got \[30\]"
    ):
        span.project(tensors[1:])
    with pytest.raises(ValueError, match="Span: tensors: expected at least one, got none"):
        Span([], [1])
