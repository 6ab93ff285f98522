"""squared_norm: the same integer sum on every backend, in any split."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DISTS, check_backend, random_call

import zokernels


def run(seeds, sizes, **kwargs):
    return [torch.ops.zokernels.squares(seeds, sizes, **kwargs)]


def random_squares(rng, **fixed):
    _, parts, kwargs = random_call(rng, **fixed)
    return {
        **{k: kwargs[k] for k in ("seeds", "streams", "offsets", "dist")},
        "sizes": [p.stop - p.start for p in parts],
    }


@pytest.mark.parametrize("dist", DISTS)
def test_is_the_squared_norm(dist, cpu_backend, rng):
    sizes, streams, offsets = [5000, 0, 37], [1, 2, 3], [3, 0, 2**40]
    seeds = [rng.getrandbits(64) for _ in range(3)]
    got = zokernels.squared_norm(seeds, sizes, streams=streams, offsets=offsets, dist=dist)
    assert got.dtype is torch.float64
    for value, seed in zip(got, seeds, strict=True):
        z = [
            zokernels.noise(n, seed=seed, stream=s, offset=o, dist=dist).double()
            for n, s, o in zip(sizes, streams, offsets, strict=True)
        ]
        exact = torch.cat(z).square().sum().item()
        assert abs(value.item() - exact) < 5037 * 2.0**-20
        if dist == "rademacher":
            assert value.item() == 5037


@pytest.mark.parametrize("repeat", range(12))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_squares(rng))


def test_kernels_at_every_small_size(cpu_kernel, rng):
    for n in [*range(18), 63, 64, 65, 127, 128, 129, 4097]:
        check_backend(run, random_squares(rng, sizes=[n], dist="normal", count=2))


def test_split_anywhere_equals_whole(cpu_backend, rng):
    seeds, n, offset = torch.tensor([1, 2]), 4000, rng.randrange(2**50)
    whole = zokernels.squared_norm(seeds, [n], streams=[4], offsets=[offset])
    cuts = [0, *sorted(rng.randrange(n + 1) for _ in range(5)), n]
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    parts = zokernels.squared_norm(seeds, sizes, streams=[4] * 6, offsets=[offset + a for a in cuts[:-1]])
    assert torch.equal(parts, whole)


def test_many_tensors_and_threads(cpu_kernel, rng):
    args = random_squares(
        rng, sizes=[rng.randrange(1, 2000) for _ in range(20)] + [70_001], dist="normal", count=2
    )
    check_backend(run, args, threads=(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        args = random_squares(rng, max_size=40000 if repeat % 3 == 0 else 4100)
        with zokernels.backend(backend):
            check_backend(run, args, "cuda")
