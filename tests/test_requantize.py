"""requantize: the reference against its formula, and every kernel against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import DISTS, add_extras, check_backend, placed, random_call

import zokernels
from zokernels.backends.reference.noise import uniform16
from zokernels.contract import DOMAIN_ROUNDING
from zokernels.quantize import pack_int4

BOUNDS = [(-127, 127), (-128, 127), (-8, 7), (0, 1), (100, 120)]


def run(buffers, parts, bounds, out, **kwargs):
    low, high = bounds
    if out is None:
        zokernels.requantize_(placed(buffers, parts), low=low, high=high, **kwargs)
        return buffers
    zokernels.requantize(placed(out, parts), placed(buffers, parts), low=low, high=high, **kwargs)
    return [*buffers, *out]


def random_requantize(rng, **fixed):
    extras = fixed.pop("extras", None)
    buffers, parts, kwargs = random_call(rng, dtype=torch.float32, **fixed)
    kwargs = add_extras(rng, parts, kwargs, curvature=False, extras=extras)
    coeffs = torch.randn(kwargs["coeffs"].shape) * rng.choice([0.1, 3.0, 100.0])
    if coeffs.numel() and rng.random() < 0.3:
        coeffs.view(-1)[rng.randrange(coeffs.numel())] = rng.choice(
            [float("inf"), -float("inf"), float("nan"), 1e30]
        )
    buffers = [torch.randint(-128, 128, b.shape).to(torch.int8) for b in buffers]
    out = rng.choice([None, [torch.full_like(b, 55) for b in buffers]])
    return {
        **kwargs,
        "buffers": buffers,
        "parts": parts,
        "bounds": rng.choice(BOUNDS),
        "out": out,
        "coeffs": coeffs,
    }


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_reference_follows_the_formula(dist, rounding, rng):
    n, offset, seed = 3000, 11, rng.getrandbits(62)
    q = torch.randint(-127, 128, (n,)).to(torch.int8)
    seeds, coeffs = [rng.getrandbits(64), rng.getrandbits(64)], [2.5, -0.7]
    z = [zokernels.noise(n, seed=s, stream=5, offset=offset, dist=dist).double() for s in seeds]
    exact = 0.5 * q.double() + 2.5 * z[0] - 0.7 * z[1]
    with zokernels.backend("reference"):
        zokernels.requantize_(
            q, seeds, coeffs, low=-60, high=50, streams=5, offsets=offset, dist=dist, decay=0.5,
            rounding=rounding,
            rounding_seed=seed,
        )  # fmt: skip
    u = uniform16(torch.tensor(seed), 5, 4, offset, n).double() / 65536 if rounding == "stochastic" else 0.5
    want = (exact + u).floor().clamp(-60, 50)
    # fp32 sums may lie on the other side of an integer
    edge = ((exact + u) - (exact + u).round()).abs() < 1e-4
    assert torch.equal(q.double()[~edge], want[~edge])
    assert edge.float().mean() < 0.02 or dist == "rademacher"
    assert q.min() >= -60
    assert q.max() <= 50


def test_ties_go_to_even(cpu_backend):
    every = torch.arange(-128, 128).to(torch.int8)
    q = every.clone()
    zokernels.requantize_(q, [], [], low=-128, streams=0, decay=0.5, rounding="nearest")
    assert torch.equal(q, (every.double() / 2).round().to(torch.int8))


def test_integers_never_move(cpu_backend, rng):
    every = torch.arange(-128, 128).to(torch.int8).repeat(5)
    q = every.clone()
    zokernels.requantize_(q, [], [], low=-128, streams=0, rounding_seed=rng.getrandbits(64))
    assert torch.equal(q, every)


def test_nan_becomes_low(cpu_backend):
    for rounding in ("nearest", "stochastic"):
        q = torch.ones(300, dtype=torch.int8)
        zokernels.requantize_(
            q, 1, float("nan"), low=-5, high=7, streams=0, rounding=rounding, rounding_seed=2
        )
        assert (q == -5).all()


def check_subnormal_sums(device: str) -> None:
    """theta + c z = +-1e-40 and the field is 0: the integer below -1e-40 is -1, where no subnormal is
    flushed to 0.
    """
    n, seed = 1 << 20, 77
    q = torch.zeros(n, dtype=torch.int8, device=device)
    zokernels.requantize_(
        q, 3, 1e-40, streams=5, dist="rademacher", rounding="stochastic", rounding_seed=seed
    )
    z = zokernels.noise(n, seed=3, stream=5, dist="rademacher")
    down = (uniform16(torch.tensor(seed), 5, DOMAIN_ROUNDING, 0, n) == 0) & (z < 0)
    assert down.sum() > 3
    assert torch.equal(q.cpu(), -down.to(torch.int8))


def test_subnormal_sums_are_rounded_down(cpu_backend):
    check_subnormal_sums("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_subnormal_sums_are_rounded_down_on_a_gpu(backend):
    with zokernels.backend(backend):
        check_subnormal_sums("cuda")


@pytest.mark.parametrize("repeat", range(15))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_requantize(rng))


@pytest.mark.parametrize("dist", DISTS)
def test_kernels_at_every_small_size(cpu_kernel, dist, rng):
    for n in [*range(18), 63, 64, 65, 127, 128, 129, 4097]:
        check_backend(run, random_requantize(rng, sizes=[n], dist=dist, count=1))


def test_many_tensors_and_threads(cpu_kernel, rng):
    args = random_requantize(rng, sizes=[rng.randrange(1, 2000) for _ in range(20)] + [70_001], count=1)
    check_backend(run, args, threads=(1, 3))


def packed_case(rng, device="cpu", more=0):
    """A call on packed integers, beside the same call on int8 ones: offsets, masks, rows of coefficients.

    The second tensor has ``more`` elements than the others."""
    sizes = [2 * rng.randrange(0, 100) for _ in range(3)]
    sizes[1] += more
    integers = [torch.randint(-8, 8, (n,), dtype=torch.int8, device=device) for n in sizes]
    coeffs = torch.randn(*rng.choice([(2,), (3, 2)])) * 3
    options = {"streams": [5, 6, 7], "offsets": [rng.randrange(2**40) for _ in sizes], "low": -7, "high": 7}
    options |= rng.choice([{}, {"decay": 0.75}]) | rng.choice([{}, {"dist": "rademacher"}])
    options |= rng.choice([{"rounding": "nearest"}, {"rounding_seed": rng.getrandbits(63)}])
    options |= rng.choice([{}, {"mask_seed": rng.getrandbits(63), "density": 0.6}])
    if rng.random() < 0.5:
        keep = [torch.rand(n) < 0.5 for n in sizes]
        pairs = zip(keep, options["offsets"], strict=True)
        options["masks"] = [zokernels.pack_mask(k, o).to(device) for k, o in pairs]
    seeds = [rng.getrandbits(63) for _ in range(2)]
    options["coeffs"], options["seeds"] = coeffs.to(device), torch.tensor(seeds, device=device)
    return integers, options


def check_packed(rng, device="cpu", more=0):
    integers, options = packed_case(rng, device, more)
    packed = [pack_int4(q) for q in integers]
    out = [torch.full_like(p, 0xAB) for p in packed]
    before = [p.clone() for p in packed]
    zokernels.requantize(out, packed, **options)
    assert all(map(torch.equal, packed, before))
    zokernels.requantize_(packed, **options)
    zokernels.requantize_(integers, **options)
    assert all(map(torch.equal, packed, map(pack_int4, integers)))
    assert all(map(torch.equal, out, packed))


@pytest.mark.parametrize("repeat", range(3))
def test_packed_integers_get_the_bits_of_int8(cpu_backend, rng, repeat):
    for _ in range(2):
        check_packed(rng)


def test_packed_integers_of_several_pieces(cpu_backend, rng):
    """Of 2^18 bytes each: 2^19 integers."""
    check_packed(rng, more=3 << 18)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_packed_integers_get_the_bits_of_int8_on_a_gpu(backend, rng):
    with zokernels.backend(backend):
        for _ in range(6):
            check_packed(rng, "cuda")


BAD_PACKED = {
    "bounds": ({"low": -9, "high": 7}, "low, high: expected -8 <= low < high <= 7 of packed integers"),
    "dtype": ({"params": [torch.zeros(4, dtype=torch.int8)]}, r"params\[1\]: expected dtype uint8"),
    "mask": ({"masks": [torch.zeros(1, dtype=torch.uint8)]}, r"masks\[0\]: expected 2 bytes for 16 elements"),
    "streams": ({"streams": [1, 2]}, "streams: expected 1 integers"),
    "coeffs": ({"coeffs": [1.0, 2.0]}, "coeffs: expected 1 values"),
    "out": (
        {"out": True},
        r"params\[0\]: expected tensors that share no memory within one call, got overlap with out\[0\]",
    ),
}


@pytest.mark.parametrize("bad", BAD_PACKED)
def test_packed_integers_are_checked_before_anything_is_written(bad):
    own, message = BAD_PACKED[bad]
    packed = torch.arange(8, dtype=torch.uint8)
    options = {"streams": 0, "low": -7, "high": 7, "rounding": "nearest"} | own
    params, coeffs = [packed, *options.pop("params", [])], options.pop("coeffs", [1.0])
    first = [[packed], params] if options.pop("out", False) else [params]
    operation = zokernels.requantize if len(first) == 2 else zokernels.requantize_
    with pytest.raises((ValueError, TypeError), match=message):
        operation(*first, [3], coeffs, **options)
    assert torch.equal(packed, torch.arange(8, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        args = random_requantize(rng, max_size=40000 if repeat % 3 == 0 else 4100)
        with zokernels.backend(backend):
            check_backend(run, args, "cuda")
