"""spread is one combine out of place for each direction, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import DISTS, DTYPES, check_backend, random_call

import zokernels


def run(buffer, part, out, **kwargs):
    """``out``: a buffer of K rows of the part's size, between sentinels at the alignment of ``buffer``."""
    x = buffer[part]
    count = kwargs["seeds"].numel()
    target = out[part.start : part.start + count * x.numel()].view(count, x.numel())
    zokernels.spread(target, x, **kwargs)
    return [out, buffer]


def random_spread(rng, **fixed):
    fixed.setdefault("sizes", [rng.randrange(4100)])
    buffers, parts, kwargs = random_call(rng, **fixed)
    count, n = kwargs["seeds"].numel(), parts[0].stop - parts[0].start
    kwargs = {k: kwargs[k] for k in ("seeds", "coeffs", "dist")}
    return {
        "buffer": buffers[0],
        "part": parts[0],
        "out": torch.full((count * n + 16,), 55.0, dtype=buffers[0].dtype),
        "stream": rng.getrandbits(56),
        "offset": rng.choice([0, rng.randrange(2**50), 8 * 2**32 - rng.randrange(n + 1), 2**63 - 1 - n]),
        **kwargs,
    }


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_follows_the_formula(dtype, dist, cpu_backend, rng):
    x = (torch.randn(30, 20) * 0.02).to(dtype)
    seeds, coeffs = [rng.getrandbits(64) for _ in range(3)], [1e-2, -3.0, 0.0]
    out = torch.empty(3, 30, 20, dtype=dtype)
    zokernels.spread(out, x, seeds, coeffs, stream=5, offset=11, dist=dist)
    for got, seed, c in zip(out, seeds, coeffs, strict=True):
        want = x.double() + c * zokernels.noise((30, 20), seed=seed, stream=5, offset=11, dist=dist).double()
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-7)


@pytest.mark.parametrize("repeat", range(12))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_spread(rng))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_at_every_small_size(cpu_kernel, dtype, dist, rng):
    for n in [*range(10), 63, 64, 65, 127, 128, 129, 4097]:
        check_backend(run, random_spread(rng, sizes=[n], dtype=dtype, dist=dist, count=2))


def test_threads(cpu_kernel, rng):
    args = random_spread(rng, sizes=[70_001], count=3)
    check_backend(run, args, threads=(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        with zokernels.backend(backend):
            check_backend(run, random_spread(rng), "cuda")
            check_backend(run, random_spread(rng, sizes=[rng.randrange(60000)]), "cuda")
