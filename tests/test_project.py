"""project: the adjoint of combine_, with the same bits on every backend, in any number of threads."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import DISTS, DTYPES, check_backend, random_call

import zokernels
from zokernels.backends import sums


def run(buffers, parts, **kwargs):
    return [zokernels.project([b[p] for b, p in zip(buffers, parts, strict=True)], **kwargs)]


def random_project(rng, **fixed):
    buffers, parts, kwargs = random_call(rng, **fixed)
    return {
        "buffers": buffers,
        "parts": parts,
        **{k: kwargs[k] for k in ("seeds", "streams", "offsets", "dist")},
    }


def noise_of(seed, numel, stream, offset, dist):
    return zokernels.noise(numel, seed=seed, stream=stream, offset=offset, dist=dist).double()


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_inner_product(dtype, dist, cpu_backend, rng):
    shapes, streams, offsets = [(70, 90), (0,), (37,)], [1, 2, 3], [3, 0, 2**40]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    seeds = [rng.getrandbits(64) for _ in range(3)]
    got = zokernels.project(tensors, seeds, streams=streams, offsets=offsets, dist=dist)
    assert got.dtype is torch.float64
    assert got.shape == (3,)
    norm = sum(t.double().square().sum() for t in tensors).sqrt()
    for value, seed in zip(got, seeds, strict=True):
        z = [noise_of(seed, t.numel(), s, o, dist) for t, s, o in zip(tensors, streams, offsets, strict=True)]
        want = sum((t.double().flatten() * z).sum() for t, z in zip(tensors, z, strict=True))
        assert abs(value - want) < 1e-6 * norm


@functools.cache
def golden():
    """The sums of docs/contract.md for a tensor of three tiles, element by element in Python."""
    n, offset = 8000, 4090
    x = torch.randn(n, generator=torch.Generator().manual_seed(5))
    with zokernels.backend("reference"):
        z = zokernels.noise(n, seed=9, stream=4, offset=offset)
    fp32 = lambda v: torch.tensor(v, dtype=torch.float64).float().item()
    tiles = {}
    for at, (a, b) in enumerate(zip(x.tolist(), z.tolist(), strict=True)):
        i = offset + at
        tile = tiles.setdefault(i // 4096, {})
        key = (i // 128 % 32, i // 2 % 16)
        # Products of fp32 are exact in float64, and of these values the sum's second rounding changes
        # nothing.
        tile[key] = fp32(tile.get(key, 0.0) + a * b)
    totals = []
    for tile in tiles.values():
        level = [sum(tile.get((s, j), 0.0) for s in range(h, 32, 2)) for h in (0, 1) for j in range(16)]
        while len(level) > 1:
            level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
        totals += level
    return x, (totals[0] + totals[1]) + totals[2]


def test_the_order_is_as_documented(cpu_backend):
    x, want = golden()
    assert zokernels.project(x, 9, streams=4, offsets=4090).item() == want


@pytest.mark.parametrize("repeat", range(10))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_project(rng, max_size=9000 if repeat % 3 == 0 else 4100))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_at_every_small_size(cpu_kernel, dtype, dist, rng):
    for n in [*range(10), 127, 128, 129, 4095, 4096, 4097]:
        check_backend(run, random_project(rng, sizes=[n], dtype=dtype, dist=dist, count=2))


def test_many_tensors_and_threads(cpu_kernel, rng):
    sizes = [rng.randrange(0, 2000) for _ in range(20)] + [70_001]
    check_backend(run, random_project(rng, sizes=sizes, count=3), threads=(1, 2, 3))


def test_directions_in_several_passes_have_the_same_bits(rng):
    """A pass takes as many seeds as have room for their partial sums, and the passes give the same bits."""
    tensors, seeds = [torch.empty(9000), torch.empty(11)], torch.arange(5)
    widths, table = [], torch.rand(5, 2 * 5, dtype=torch.float64)  # two columns for each of the five tiles

    def kernel(partial, part):
        widths.append(len(part))
        partial.copy_(table[part])

    found = [
        sums.by_partial_sums(kernel, 2, tensors, seeds, [4000, 7], limit=8 * 10 * room)
        for room in (5, rng.randrange(1, 5), 0)
    ]
    assert widths[0] == 5
    assert widths[-5:] == [1] * 5
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], table.sum(1))


@pytest.mark.parametrize("dist", DISTS)
def test_neighbours_in_the_tree_add_up_to_the_bit(dist, cpu_backend, rng):
    """Halves of 2^m tiles add up to the bit.

    Elsewhere shards agree up to float64's rounding, and in the chains that are cut, up to fp32's.
    """
    x, args = torch.randn(8 * 4096), {"streams": 7, "dist": dist}
    whole = zokernels.project(x, [3, 4], **args)
    parts = [
        zokernels.project(part, [3, 4], offsets=4 * 4096 * i, **args) for i, part in enumerate(x.view(2, -1))
    ]
    assert torch.equal(parts[0] + parts[1], whole)
    cut = rng.randrange(1, x.numel())
    parts = [zokernels.project(x[a:b], [3, 4], offsets=a, **args) for a, b in ((0, cut), (cut, x.numel()))]
    cut_chains = slice(cut // 128 * 128, cut // 128 * 128 + 128)  # of eight fmas each
    for got, want, seed in zip(parts[0] + parts[1], whole, (3, 4), strict=True):
        products = x.double() * noise_of(seed, x.numel(), 7, 0, dist)
        assert abs(got - want) <= 2 * 8 * 2.0**-24 * products[cut_chains].abs().sum() + 1e-9


@pytest.mark.parametrize("dist", DISTS)
def test_is_the_adjoint_of_combine(dist, cpu_backend, rng):
    """<combine(0, c), x> = <c, project(x)>."""
    x, coeffs = torch.randn(5000), torch.randn(4)
    args = {"streams": 2, "offsets": rng.randrange(2**40), "dist": dist}
    seeds = [rng.getrandbits(64) for _ in range(4)]
    y = torch.zeros(5000)
    zokernels.combine_(y, seeds, coeffs, **args)
    left, right = (y.double() * x).sum(), (coeffs.double() * zokernels.project(x, seeds, **args)).sum()
    assert abs(left - right) < 1e-6 * y.norm() * x.norm()


def test_integers_and_signs_are_exact(cpu_backend):
    x = torch.randint(-50, 50, (30_000,)).float()
    z = noise_of(8, 30_000, 1, 0, "rademacher")
    assert zokernels.project(x, 8, streams=1, dist="rademacher").item() == (x.double() * z).sum()


def test_nothing_to_sum(cpu_backend):
    none = torch.empty(0)
    assert zokernels.project([], [1, 2], streams=[]).tolist() == [0, 0]
    assert zokernels.project([none, none], [1, 2], streams=[1, 2]).tolist() == [0, 0]
    assert zokernels.project(torch.ones(5), torch.empty(0, dtype=torch.int64), streams=1).shape == (0,)


def test_infinities_and_nan_reach_the_sum(cpu_backend):
    x = torch.ones(5000)
    x[4500] = float("inf")
    assert zokernels.project(x, 3, streams=1).isinf()
    x[4501] = float("nan")
    assert zokernels.project(x, 3, streams=1).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        args = random_project(rng, max_size=200_000 if repeat % 3 == 0 else 4100)
        with zokernels.backend(backend):
            check_backend(run, args, "cuda")
