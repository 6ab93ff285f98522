"""fan_out_ is combine_ followed by two combines, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import DISTS, DTYPES, assert_same_bits, random_call

import zokernels


def composed(params, seed, coeff, kwargs):
    """theta, plus and minus by the reference's combine."""
    theta = [p.clone() for p in params]
    sides = {}
    where = {name: kwargs[name] for name in ("streams", "offsets", "dist")}
    with zokernels.backend("reference"):
        if kwargs["seeds"].numel() or kwargs["decay"] is not None:
            zokernels.combine_(theta, **kwargs)
        for sign in (1, -1):
            sides[sign] = [torch.empty_like(p) for p in params]
            zokernels.combine(sides[sign], theta, seed, sign * coeff, **where)
    return theta, sides[1], sides[-1]


def check(buffers, parts, kwargs, rng, device="cpu"):
    seed, coeff = rng.getrandbits(64), rng.choice([1e-3, -0.25])
    params = [b[p] for b, p in zip(buffers, parts, strict=True)]
    want = composed(params, seed, coeff, kwargs)
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    moved = [b.to(device) for b in buffers]
    theta = [b[p] for b, p in zip(moved, parts, strict=True)]
    # The sides lie at alignments of their own, between sentinels.
    outputs, shift = [], rng.choice([0, 0, 3])
    for _ in range(2):
        outputs.append([torch.full((p.numel() + 16,), 55.0, dtype=p.dtype, device=device) for p in params])
    plus, minus = (
        [o[shift : shift + p.numel()] for o, p in zip(out, params, strict=True)] for out in outputs
    )
    zokernels.fan_out_(theta, plus, minus, seed, coeff, **on_device)
    for name, got, expected in zip(("theta", "plus", "minus"), (theta, plus, minus), want, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"{name} {a.dtype} {kwargs}")
    for out in outputs:
        for o, p in zip(out, params, strict=True):
            assert (o[:shift] == 55).all()
            assert (o[shift + p.numel() :] == 55).all()


@pytest.mark.parametrize("repeat", range(8))
def test_equals_three_combines(cpu_backend, rng, repeat):
    for _ in range(4):
        buffers, parts, kwargs = random_call(rng)
        check(buffers, parts, kwargs, rng)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_long_aligned_tensors(cpu_kernel, rng, dtype, dist, count):
    sizes, offsets = [40000 + rng.randrange(100), 8192], [0, 8 * 2**32 - 4096]
    buffers, _, kwargs = random_call(rng, sizes=sizes, dtype=dtype, dist=dist, count=count, offsets=offsets)
    check(buffers, [slice(0, n) for n in sizes], kwargs, rng)


def test_theta_is_only_read_where_nothing_is_pending(cpu_backend):
    theta = torch.randn(100)
    version, before = theta._version, theta.clone()
    plus, minus = torch.empty(100), torch.empty(100)
    zokernels.fan_out_(theta, plus, minus, 5, 0.1, streams=2)
    assert theta._version == version
    assert torch.equal(theta, before)
    torch.testing.assert_close(
        plus - minus, 0.2 * zokernels.noise(100, seed=5, stream=2), rtol=1e-4, atol=1e-6
    )


def test_opcheck(cpu_backend):
    args = ([torch.randn(9)], [torch.empty(9)], [torch.empty(9)], torch.tensor([1]), torch.tensor([0.5]))
    pending = (
        torch.tensor([2]),
        torch.tensor([0.1]),
        [3],
        [8],
        "normal",
        torch.tensor([0.9]),
        torch.tensor([4]),
    )
    torch.library.opcheck(torch.ops.zokernels.fan_out_, (*args, *pending))


def test_errors():
    theta, other = torch.randn(9), torch.randn(9)
    for plus, minus, message in [
        (theta, other, "share no memory"),
        (other, other, "share no memory"),
        (other[:8], other, r"fan_out_: plus\[0\]: expected shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            zokernels.fan_out_(theta, plus, minus, 1, 0.1, streams=0)
    with pytest.raises(ValueError, match="fan_out_: seed: expected one value, got 2"):
        zokernels.fan_out_(theta, other, torch.empty(9), torch.tensor([1, 2]), 0.1, streams=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dist", DISTS)
def test_gpu(backend, dist, rng):
    for count in (0, 1, 2, 5):
        sizes = [100_000 + rng.randrange(100), 8192, *[rng.randrange(500) for _ in range(80)]]
        buffers, parts, kwargs = random_call(rng, sizes=sizes, dist=dist, count=count)
        with zokernels.backend(backend):
            check(buffers, parts, kwargs, rng, "cuda")
