"""combine against the reference, bit for bit, and the reference against its formula."""

from __future__ import annotations

import fractions

import pytest
import torch
from helpers import (
    DISTS,
    DTYPES,
    STATE_DTYPES,
    add_extras,
    assert_same_bits,
    check_backend,
    placed,
    random_call,
    random_values,
    reference_result,
    rounding_bound,
)

import zokernels
from zokernels.backends.reference.combine import fma
from zokernels.contract import philox4x32


def test_reference_fma_rounds_once(rng):
    """The reference's fma equals exact rational arithmetic, also where float64 alone would round twice."""
    a, b, c = (random_values(3000, torch.float32, rng) for _ in range(3))
    # Halfway cases: c decides on which side of a rounding boundary the sum lies, far below float64's last
    # bit.
    a[:1000], b[:1000] = 1.0 + 2.0**-23 * torch.randint(0, 2**23, (1000,)), 1.0 + 2.0**-23
    c[:1000] = a[:1000] * 2.0**-40 * torch.randn(1000)
    got = fma(a, b, c)
    for i in range(3000):
        x, y, z = a[i].item(), b[i].item(), c[i].item()
        if not all(map(torch.isfinite, (a[i], b[i], c[i]))):
            continue
        exact = fractions.Fraction(x) * fractions.Fraction(y) + fractions.Fraction(z)
        if not torch.isfinite(got[i]):
            assert abs(exact) > torch.finfo(torch.float32).max
            continue
        error = abs(fractions.Fraction(got[i].item()) - exact)
        for direction in (float("inf"), float("-inf")):
            neighbour = torch.nextafter(got[i], torch.tensor(direction))
            if torch.isfinite(neighbour):
                assert error <= abs(fractions.Fraction(neighbour.item()) - exact)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_follows_the_formula(dtype, dist, rng):
    theta = (torch.randn(1000) * 0.02).to(dtype)
    seeds, coeffs = [rng.getrandbits(64), rng.getrandbits(64)], [1e-2, -3e-3]
    z = [zokernels.noise(1000, seed=s, stream=5, offset=11, dist=dist).double() for s in seeds]
    coeffs = torch.tensor(coeffs)  # fp32
    terms = [0.5 * theta.double(), *(c.double() * noise for c, noise in zip(coeffs, z, strict=True))]
    want = sum(terms)
    with zokernels.backend("reference"):
        zokernels.combine_(theta, seeds, coeffs, streams=5, offsets=11, dist=dist, decay=0.5)
    # A product and two fmas in fp32, and the rounding to dtype.
    bound = rounding_bound(want, dtype, sum(t.abs() for t in terms), 3)
    assert ((theta.double() - want).abs() <= bound).all()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dist", DISTS)
def test_large_outputs(cpu_kernel, one_thread, rng, dist):
    """Outputs of 8 MiB and more, which are written past the caches, have the bits of a call in place."""
    dtype = rng.choice(DTYPES)
    n, offset = 2**23 // dtype.itemsize + 10000 + rng.randrange(1000), rng.choice([0, 8 * 2**32 - 4096])
    theta = (torch.randn(n, generator=torch.Generator().manual_seed(rng.getrandbits(60))) * 0.02).to(dtype)
    where = dict(streams=rng.getrandbits(56), offsets=offset, dist=dist)
    out, plus, minus = (torch.full((n + 16,), 55.0, dtype=dtype) for _ in range(3))
    zokernels.combine(out[:n], theta, 11, 1e-3, **where)
    zokernels.fan_out_(theta, plus[:n], minus[:n], 11, 1e-3, **where)
    for got, coeff in ((out, 1e-3), (plus, 1e-3), (minus, -1e-3)):
        want = theta.clone()
        zokernels.combine_(want, 11, coeff, **where)
        assert_same_bits(got[:n], want, f"{cpu_kernel} {dtype} {coeff}")
        assert (got[n:] == 55).all()


@pytest.mark.parametrize("repeat", range(12))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(5):
        buffers, parts, kwargs = random_call(rng)
        want = reference_result(buffers, parts, kwargs)
        got = [b.clone() for b in buffers]
        zokernels.combine_([b[p] for b, p in zip(got, parts, strict=True)], **kwargs)
        for a, b in zip(got, want, strict=True):  # the whole buffers: neighbours are not written
            assert_same_bits(a, b, f"{cpu_kernel} {a.dtype} {kwargs}")


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_at_every_alignment_and_small_size(cpu_kernel, dtype, dist, rng):
    for n in [*range(18), 31, 63, 64, 65, 127, 128, 129, 255, 4095, 4096, 4097, 4100]:
        begin, offset = rng.randrange(9), rng.choice([0, rng.randrange(9), 4096 * 8 - 5])
        buffers, _, kwargs = random_call(rng, sizes=[n], dtype=dtype, dist=dist, count=1, offsets=[offset])
        parts = [slice(begin, begin + n)]
        want = reference_result(buffers, parts, kwargs)
        zokernels.combine_(buffers[0][parts[0]], **kwargs)
        assert_same_bits(buffers[0], want[0], f"n {n}, begin {begin}, offset {offset}")


def run(buffers, parts, **kwargs):
    zokernels.combine_(placed(buffers, parts), **kwargs)
    return buffers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_follows_the_formula_with_extras(dtype, rng):
    """Masks, curvature and coefficients of each tensor, in float64."""
    sizes, offsets = [700, 9], [13, 8 * 2**32 - 100]
    theta = [(torch.randn(n) * 0.02).to(dtype) for n in sizes]
    keep = [torch.rand(n) < 0.5 for n in sizes]
    h = [(torch.rand(n) + 0.1).to(rng.choice(STATE_DTYPES)) for n in sizes]
    h = [x.to(h[0].dtype) for x in h]
    seeds, coeffs = [rng.getrandbits(64), rng.getrandbits(64)], torch.tensor([[1e-2, -3e-3], [0.5, 0.25]])
    want, bounds = [], []
    for i, t in enumerate(theta):
        z = [
            zokernels.noise(t.numel(), seed=s, stream=i, offset=offsets[i]).double() / h[i].double().sqrt()
            for s in seeds
        ]
        terms = [0.5 * t.double(), coeffs[i, 0].double() * z[0], coeffs[i, 1].double() * z[1]]
        want.append(terms[0] + torch.where(keep[i], terms[1] + terms[2], 0.0))
        # A product and two fmas in fp32; before them, a root and a quotient.
        bounds.append(rounding_bound(want[i], dtype, sum(term.abs() for term in terms), 5))
    masks = [zokernels.pack_mask(k, o) for k, o in zip(keep, offsets, strict=True)]
    with zokernels.backend("reference"):
        zokernels.combine_(
            theta, seeds, coeffs, streams=[0, 1], offsets=offsets, decay=0.5, masks=masks, curvature=h
        )
    for got, expected, bound in zip(theta, want, bounds, strict=True):
        assert ((got.double() - expected).abs() <= bound).all()


def test_reference_mask_seed_keeps_the_fields_below(rng):
    """Domain 3: 16 bits an element; two masks keep what both keep."""
    n, offset, seed = 1000, rng.randrange(2**40), rng.getrandbits(63)
    blocks = range(offset >> 3, (offset + n + 7) >> 3)
    words = [
        w for b in blocks for w in philox4x32((b & 2**32 - 1, b >> 32, 7, 3), (seed & 2**32 - 1, seed >> 32))
    ]
    fields = torch.tensor([f for w in words for f in (w & 0xFFFF, w >> 16)])[offset & 7 :][:n]
    other = torch.rand(n) < 0.5
    for density in (0.0, 0.25, 0.7, 1.0):
        for masks, keep in (
            (None, fields < round(65536 * density)),
            (other, (fields < round(65536 * density)) & other),
        ):
            theta = torch.zeros(n)
            with zokernels.backend("reference"):
                packed = None if masks is None else zokernels.pack_mask(masks, offset)
                zokernels.combine_(
                    theta, 5, 1.0, streams=7, offsets=offset, masks=packed, mask_seed=seed, density=density
                )
            assert torch.equal(theta != 0, keep)  # no z is zero


@pytest.mark.parametrize("repeat", range(20))
def test_kernels_equal_reference_with_extras(cpu_kernel, rng, repeat):
    for _ in range(5):
        buffers, parts, kwargs = random_call(rng)
        check_backend(run, {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs)})


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extras_at_every_alignment_and_small_size(cpu_kernel, dtype, dist, rng):
    for n in [*range(10), 63, 64, 65, 127, 128, 129, 4097]:
        begin, offset = rng.randrange(9), rng.choice([rng.randrange(140), 8 * 2**32 - n // 2, 2**63 - 1 - n])
        buffers, _, kwargs = random_call(rng, sizes=[n], dtype=dtype, dist=dist, count=2, offsets=[offset])
        parts = [slice(begin, begin + n)]
        kwargs |= {
            "masks": [zokernels.pack_mask(torch.rand(n) < 0.5, offset)],
            "mask_seed": 3,
            "density": 0.8,
        }
        check_backend(run, {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs)})


def test_dropped_elements_keep_their_bits(cpu_backend, rng):
    """A dropped element keeps its bits even if the coefficient is infinite or NaN."""
    theta = random_values(500, torch.bfloat16, rng)
    keep, before = torch.rand(500) < 0.5, theta.clone()
    coeffs = torch.tensor([float("inf"), float("nan")])
    zokernels.combine_(theta, [1, 2], coeffs, streams=0, masks=zokernels.pack_mask(keep))
    assert_same_bits(theta[~keep], before[~keep])
    assert theta[keep].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_of_curvature_gives_nan_whatever_its_payload(dtype, cpu_backend):
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for rounding in ("nearest", "stochastic"):
        theta = torch.ones(200, dtype=dtype)
        zokernels.combine_(
            theta, 1, 0.1, streams=0, curvature=payloads.repeat(50), rounding=rounding, rounding_seed=5
        )
        assert theta.isnan().all()


def test_threads_with_extras(cpu_kernel, rng):
    sizes = [rng.randrange(1, 3000) for _ in range(20)] + [70_001]
    buffers, parts, kwargs = random_call(rng, sizes=sizes, count=1)
    args = {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs)}
    check_backend(run, args, threads=(1, 3))


def test_many_tensors_and_threads(cpu_kernel, rng):
    """Threads share the elements of a tensor, and the result must not depend on how."""
    sizes = [rng.randrange(1, 3000) for _ in range(60)] + [200_001, 77_777]
    rng.shuffle(sizes)
    buffers, parts, kwargs = random_call(rng, sizes=sizes, count=1)
    want = reference_result(buffers, parts, kwargs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            got = [b.clone() for b in buffers]
            zokernels.combine_([b[p] for b, p in zip(got, parts, strict=True)], **kwargs)
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a, b, f"{count} threads {kwargs['dist']}")
    finally:
        torch.set_num_threads(threads)


def test_out_of_place_equals_in_place(cpu_backend, rng):
    for _ in range(10):
        buffers, parts, kwargs = random_call(rng)
        want = reference_result(buffers, parts, kwargs)
        params = [b[p].clone() for b, p in zip(buffers, parts, strict=True)]
        kept = [p.clone() for p in params]
        out = [torch.full_like(p, 77.0) for p in params]
        zokernels.combine(out, params, **kwargs)
        for o, w, p, k, part in zip(out, want, params, kept, parts, strict=True):
            assert_same_bits(o, w[part])
            assert_same_bits(p, k)


def test_split_anywhere_equals_whole(cpu_backend, rng):
    """A shard that passes its offset computes what the unsharded parameter computes."""
    buffers, _, kwargs = random_call(rng, sizes=[4000], offsets=[0])
    whole, pieces = buffers[0].clone()[:4000], buffers[0].clone()[:4000]
    zokernels.combine_(whole, **kwargs)
    cuts = sorted(rng.randrange(4001) for _ in range(5))
    for begin, end in zip([0, *cuts], [*cuts, 4000], strict=True):
        zokernels.combine_(pieces[begin:end], **{**kwargs, "offsets": begin})
    assert_same_bits(pieces, whole)


def test_lists_and_numbers_are_accepted(cpu_backend):
    theta = torch.randn(3, 5)
    want = torch.empty_like(theta)
    zokernels.combine(want, theta, torch.tensor([7]), torch.tensor([0.25]), streams=[3])
    zokernels.combine_(theta, 7, 0.25, streams=3)
    assert torch.equal(theta, want)
    zokernels.combine_([], [], [], streams=[])
    zokernels.combine_([torch.empty(0), torch.empty(0)], 1, 0.5, streams=[0, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_coefficient_gives_nan_whatever_its_payload(dtype, cpu_backend):
    """A NaN whose bits are all set, as NVIDIA's arithmetic makes them, must not carry over into a zero."""
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for i in range(len(payloads)):
        for rounding in ("nearest", "stochastic"):
            options = {"streams": 0, "rounding": rounding, "rounding_seed": 5}
            theta, decayed = torch.ones(200, dtype=dtype), torch.ones(200, dtype=dtype)
            zokernels.combine_(theta, torch.tensor([1]), payloads[i : i + 1], **options)
            zokernels.combine_(decayed, [], [], decay=payloads[i : i + 1], **options)
            assert theta.isnan().all()
            assert decayed.isnan().all()


def test_parameters_that_require_grad(cpu_backend):
    theta = torch.nn.Parameter(torch.randn(10))
    before, version = theta.detach().clone(), theta._version
    zokernels.combine_([theta], 1, 0.5, streams=[0])
    assert theta.requires_grad
    assert theta._version > version  # autograd notices that saved tensors are stale
    torch.testing.assert_close(theta.detach(), before + 0.5 * zokernels.noise(10, seed=1))


@pytest.mark.large
def test_more_than_2_31_elements(cpu_kernel):
    n = 2**31 + 5
    theta = torch.zeros(n, dtype=torch.bfloat16)
    zokernels.combine_(theta, 9, 1.0, streams=4)
    for at in (0, 2**31 - 3):
        want = torch.zeros(8, dtype=torch.bfloat16)
        zokernels.combine_(want, 9, 1.0, streams=4, offsets=at)
        assert_same_bits(theta[at : at + 8], want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(12))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(5):
        buffers, parts, kwargs = random_call(rng, max_size=40000 if repeat % 3 == 0 else 4100)
        want = reference_result(buffers, parts, kwargs)
        got = [b.cuda() for b in buffers]
        kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        with zokernels.backend(backend):
            zokernels.combine_([b[p] for b, p in zip(got, parts, strict=True)], **kwargs)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, f"{backend} {a.dtype} {kwargs}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_large(backend, dtype, dist, rng):
    sizes = [rng.randrange(1, 3000) for _ in range(120)] + [3_000_001]
    buffers, parts, kwargs = random_call(
        rng, sizes=sizes, dtype=dtype, dist=dist, count=rng.choice([1, 2, 7])
    )
    with zokernels.backend("cpu"):
        want = [b.clone() for b in buffers]
        zokernels.combine_([b[p] for b, p in zip(want, parts, strict=True)], **kwargs)
    got = [b.cuda() for b in buffers]
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with zokernels.backend(backend):
        zokernels.combine_([b[p] for b, p in zip(got, parts, strict=True)], **kwargs)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b, f"{backend} {kwargs}")


@pytest.mark.gpu
def test_gpu_does_not_wait_for_the_host():
    theta = torch.randn(100_000, device="cuda")
    zokernels.combine_(theta, 1, 0.5, streams=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        zokernels.combine_(theta, [1, 2], [0.5, 0.25], streams=0, decay=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(12))
def test_gpu_equals_reference_with_extras(backend, rng, repeat):
    for _ in range(5):
        buffers, parts, kwargs = random_call(rng, max_size=40000 if repeat % 3 == 0 else 4100)
        args = {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs)}
        with zokernels.backend(backend):
            check_backend(run, args, "cuda")
