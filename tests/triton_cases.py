"""Cases for the triton backend in Triton's interpreter, run by test_triton.py in one process of their own.

The interpreter must be asked for before Triton is imported, and the compile tests need the compiler, so both
cannot live in one process.  ``python triton_cases.py`` reads questions from standard input, each a line of
JSON with the arguments of :func:`run`, and answers each with a line of JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import empty_cases
import largest_cases
from stream_cases import RUNS as STREAM_RUNS

SEED = 0  # the seed of the case, which `run` sets
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
DTYPES = ("float32", "bfloat16", "float16")
PROGRAM = 16384  # so many logical indices has one program

CASES: dict[str, Callable[[], None]] = {}


def case(name: str, *args):
    def register(function):
        CASES[name] = lambda: function(*args)
        return function

    return register


def bits(x):
    """Integers with the bits of ``x``, in which all NaNs are the same."""
    import torch

    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def random_seeds(k):
    import torch

    return torch.randint(-(2**63), 2**63 - 1, (k,))


def slid(values, slides, dtype):
    """Puts ``values`` into buffers of a sentinel value; returns the buffers and the views that hold the
    values.

    A kernel must leave the neighbours of its tensors alone.
    """
    import torch

    buffers = [torch.full((s + v.numel() + 16,), 7.0).to(dtype) for s, v in zip(slides, values, strict=True)]
    views = [b[s : s + v.numel()] for b, s, v in zip(buffers, slides, values, strict=True)]
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    return buffers, views


def assert_same(ours, theirs, note):
    import torch

    def as_bits(x):
        return bits(x) if x.is_floating_point() else x

    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        wrong = (as_bits(a) != as_bits(b)).nonzero().flatten()
        if wrong.numel():
            at = int(wrong[0])
            raise AssertionError(
                f"{wrong.numel()} of {note(i)} differ, first at {at}: "
                f"{a.flatten()[at].item()!r} instead of {b.flatten()[at].item()!r}"
            )
        assert torch.equal(as_bits(a), as_bits(b))


def random_terms(
    sizes, offsets, dist, *, k=1, decay=None, rounding=None, masks=None, density=None, each=False
):
    """Random terms without curvature.  ``masks`` is the share of elements that packed masks keep."""
    import torch

    import zokernels
    from zokernels.backends.terms import KEEP_ALL, Terms

    packed = None
    if masks is not None:
        packed = [zokernels.pack_mask(torch.rand(n) < masks, o) for n, o in zip(sizes, offsets, strict=True)]
    return Terms(
        random_seeds(k),
        (torch.randn(len(sizes), k) if each else torch.randn(k)) * 0.3,
        [int(s) for s in torch.randint(0, 2**56, (len(sizes),))],
        offsets,
        dist,
        None if decay is None else torch.tensor([decay]),
        None if rounding is None else torch.tensor([rounding]),
        packed,
        None if density is None else random_seeds(1),
        KEEP_ALL if density is None else round(density * KEEP_ALL),
    )


def cycled(slides, sizes):
    return [slides[i % len(slides)] for i in range(len(sizes))]


def positive(shape, dtype):
    """Positive values of many magnitudes, for curvatures and second moments."""
    import torch

    return torch.exp2(torch.empty(shape).uniform_(-60, 20)).to(dtype)


def check(
    dtype, dist, sizes, offsets, *, slides=(0,), fill=None, in_place=True, curvature=None, bounds=None,
    **options
):  # fmt: skip
    """Checks that Triton equals the reference on tensors at all alignments, and leaves their neighbours
    alone.

    With ``bounds`` the operation is requantize instead of combine.
    """
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    dtype = getattr(torch, dtype)
    terms = random_terms(sizes, offsets, dist, **options)
    slides = cycled(slides, sizes)
    if curvature is not None:
        terms = terms._replace(curvature=[positive(n, getattr(torch, curvature)) for n in sizes])
    values = [torch.randn(n) if fill is None else fill(n) for n in sizes]
    values = [(v if bounds is None else (v * 60).clamp(*bounds)).to(dtype) for v in values]
    results = []
    for name in ("triton", "reference"):
        buffers, out = slid(values, slides, dtype)
        theta = out if in_place else [v.clone() for v in values]
        if bounds is None:
            get(name).combine(out, theta, terms)
        else:
            get(name).requantize(out, theta, *bounds, terms)
        if not in_place:
            assert_same(theta, values, lambda i: f"theta {i}")
        results.append(buffers)
    assert_same(
        *results, lambda i: f"{sizes[i]} elements of tensor {i} (offset {offsets[i]}, slide {slides[i]})"
    )


#: The number of state tensors and the hyper values of each rule.
RULES = {
    "momentum": (1, [0.01, 0.9, 0.1, 0.5]),
    "adam": (2, [0.01, 0.9, 0.1, 0.99, 0.01, 0.5, 1.5, 1e-6]),
    "adam_window": (0, [0.5, 1e-6]),
    "sign": (0, [0.01, 0.25]),
    "hizoo": (1, [0.95, 0.05]),
}


def check_update(rule, dtype, state, sizes, offsets, dist="normal", *, slides=(0,), **options):
    """The same as check, for update.  The second state and that of hizoo are positive."""
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    dtype, state = getattr(torch, dtype), getattr(torch, state)
    states, values = RULES[rule]
    if rule == "hizoo":
        options["k"] = 1
    terms = random_terms(sizes, offsets, dist, **options)
    hyper = torch.tensor(values + ([0.1, 0.3, 0.05][: terms.seeds.numel()] if rule == "adam_window" else []))
    slides = cycled(slides, sizes)
    theta = [torch.randn(n).to(dtype) for n in sizes]
    first = [positive(n, state) if rule == "hizoo" else torch.randn(n).to(state) for n in sizes]
    second = [positive(n, state) for n in sizes]
    results = []
    for name in ("triton", "reference"):
        buffers, views = zip(*(slid(*group) for group in (
            (theta, slides, dtype), (first, slides, state), (second, slides, state),
        )), strict=True)  # fmt: skip
        get(name).update(
            views[0], views[1] if states else [], views[2] if states > 1 else [], rule, hyper, terms
        )
        results.append([buffer for group in buffers for buffer in group])
    groups = ("theta", "first", "second")
    assert_same(*results, lambda i: f"{rule}: {groups[i // len(sizes)]} of tensor {i % len(sizes)}")


@case("philox: Random123 known answers")
def _():
    global philox, tl  # a kernel can use globals, but no variables of a closure
    import torch
    import triton
    import triton.language as tl

    from zokernels.backends.triton.philox import philox

    @triton.jit
    def kernel(out, counter, key):
        c0, c1 = tl.load(counter).to(tl.uint32), tl.load(counter + 1).to(tl.uint32)
        c2, c3 = tl.load(counter + 2).to(tl.uint32), tl.load(counter + 3).to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, tl.load(key))
        tl.store(out, w0.to(tl.int64))
        tl.store(out + 1, w1.to(tl.int64))
        tl.store(out + 2, w2.to(tl.int64))
        tl.store(out + 3, w3.to(tl.int64))

    for kat in GOLDEN["philox_kat"]:
        counter = torch.tensor([int(c, 16) for c in kat["counter"]])
        k0, k1 = (int(k, 16) for k in kat["key"])
        out = torch.zeros(4, dtype=torch.int64)
        kernel[(1,)](out, counter, torch.tensor([(k1 - (k1 >> 31 << 32)) << 32 | k0]))
        got = [f"{w & 0xFFFFFFFF:08x}" for w in out.tolist()]
        assert got == kat["out"], f"expected {kat['out']}, got {got}"


@case("golden: normal", "normal")
@case("golden: rademacher", "rademacher")
def _(dist):
    import torch

    import zokernels

    for vector in GOLDEN[dist]:
        with zokernels.backend("triton"):
            z = zokernels.noise(
                vector["n"],
                seed=int(vector["seed"], 16),
                stream=vector["stream"],
                offset=vector["offset"],
                dist=dist,
            )
        if dist == "normal":
            got = [f"{b & 0xFFFFFFFF:08x}" for b in z.view(torch.int32).tolist()]
        else:
            got = "".join("+" if x == 1 else "-" if x == -1 else "?" for x in z.tolist())
        assert got == vector["z"], f"{vector}: got {got}"


@case("golden: derive_seed")
def _():
    import torch

    import zokernels

    for vector in GOLDEN["derive_seed"]:
        run_seed = torch.tensor(zokernels.contract.seed_to_int64(int(vector["run_seed"], 16)))
        with zokernels.backend("triton"):
            seed = zokernels.derive_seed(run_seed, vector["step"], vector["k"])
        got = f"{seed.item() & (2**64 - 1):016x}"
        assert got == vector["seed"], f"{vector}: got {got}"


@case("derive_seed: equals reference")
def _():
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    run_seed, step = (torch.randint(-(2**63), 2**63 - 1, (3, 50)) for _ in range(2))
    k = torch.randint(0, 2**32, (3, 50))
    assert torch.equal(
        get("triton").derive_seed(run_seed, step, k), get("reference").derive_seed(run_seed, step, k)
    )
    empty = torch.empty(0, dtype=torch.int64)
    assert get("triton").derive_seed(empty, empty, empty).shape == (0,)


# Small tensors take the masked path alone; together they go through the pointer table.
_SIZES, _OFFSETS = [1, 0, 300, 21], [5, 0, 2**33 + 8, 16380]
for _dist in ("normal", "rademacher"):
    for _dtype in DTYPES:
        for _rounding in (None, 11):
            _name = f"{_dist} {_dtype} {'nearest' if _rounding is None else 'stochastic'}"

            @case(f"edges: {_name}", _dist, _dtype, _rounding)
            def _(dist, dtype, rounding):
                check(dtype, dist, _SIZES, _OFFSETS, k=2, decay=0.9, rounding=rounding)

    for _k in (0, 1, 2, 7):

        @case(f"directions: {_dist} K={_k}", _dist, _k)
        def _(dist, k):
            check("bfloat16", dist, [130], [2**35 + 3], k=k)

    @case(f"alignment: {_dist}", _dist)
    def _(dist):
        # Every slide of the pointer against an offset that is a multiple of eight, and one that is not.
        check("bfloat16", dist, [23] * 8, [16 + (i % 3 == 1) for i in range(8)], slides=range(8))
        check("float32", dist, [23] * 4, [16, 16, 19, 16], slides=range(4))

    @case(f"offsets: {_dist}", _dist)
    def _(dist):
        # 2^35 is where block_hi of the normals steps, 2^39 where that of the Rademacher blocks does.
        offsets = [2**35 - 5, 2**39 - 9, 2**32 - 1, 2**63 - 1 - 40]
        check("float32", dist, [40] * 4, offsets)

    @case(f"out of place: {_dist}", _dist)
    def _(dist):
        check("bfloat16", dist, [100, 33], [0, 4], in_place=False, slides=(8, 1))


@case("tails: rademacher")
def _():
    sizes = [0, 1, 2, 7, 8, 9, 15, 17, 4095, 4096, 4097, 4100]
    check("bfloat16", "rademacher", sizes, [0] * len(sizes))


@case("tails: normal")
def _():
    sizes = [2, 7, 9, 17, 1025]
    check("float32", "normal", sizes, [0] * len(sizes))


# A whole program takes the path without masks: PROGRAM elements from a multiple of PROGRAM, with an edge on
# both sides.
for _dtype in DTYPES:

    @case(f"whole program: normal {_dtype}", _dtype)
    def _(dtype):
        check(dtype, "normal", [PROGRAM + 24], [PROGRAM - 8], rounding=None if dtype == "float16" else 5)

    @case(f"whole program: rademacher {_dtype}", _dtype)
    def _(dtype):
        check(dtype, "rademacher", [PROGRAM + 24], [2**39 + PROGRAM - 8], k=2, decay=0.99, rounding=9)


@case("whole program: normal, run-time K")
def _():
    check("bfloat16", "normal", [PROGRAM], [0], k=3)


@case("whole program: rademacher, run-time K")
def _():
    check("bfloat16", "rademacher", [PROGRAM, PROGRAM + 9], [0, 2**33 - PROGRAM], k=3)


# Masks, curvature and coefficients of each tensor: alone, in tables, at edges and in whole programs.
_OPTIONS = {
    "masks": dict(masks=0.6),
    "density": dict(density=0.3),
    "masks and density": dict(masks=0.6, density=0.7, decay=0.9, rounding=3),
    "curvature": dict(curvature="float32"),
    "curvature bf16, masks": dict(curvature="bfloat16", masks=0.5, rounding=3),
    "coeffs": dict(each=True, decay=0.9),
}
for _dist in ("normal", "rademacher"):
    for _name, _options in _OPTIONS.items():

        @case(f"{_name}: {_dist}", _dist, _options)
        def _(dist, options):
            check("bfloat16", dist, _SIZES, _OFFSETS, k=2, slides=(0, 1), **options)
            check("float32", dist, [45], [2**33 + 4], k=3, **options)

        @case(f"{_name}: whole program, {_dist}", _dist, _options)
        def _(dist, options):
            check("bfloat16", dist, [PROGRAM + 24, PROGRAM], [PROGRAM - 8, 2**40], k=1, **options)

    @case(f"requantize: {_dist}", _dist)
    def _(dist):
        check("int8", dist, _SIZES, _OFFSETS, k=2, bounds=(-127, 127), decay=0.9, rounding=3)
        check("int8", dist, _SIZES, _OFFSETS, k=1, bounds=(-128, 127), each=True, slides=(0, 3))
        check("int8", dist, [PROGRAM + 24], [PROGRAM - 8], k=1, bounds=(-7, 6), rounding=3, density=0.5)
        check("int8", dist, [60], [0], k=1, bounds=(-7, 6), decay=float("nan"))
        check("int8", dist, [60], [0], k=1, bounds=(-128, 127), decay=float("inf"), rounding=3)


@case("requantize: ties to even")
def _():
    for rounding in (None, 3):
        check("int8", "normal", [400], [0], k=0, bounds=(-127, 127), decay=0.5, rounding=rounding)


for _rule in RULES:

    @case(f"update {_rule}: edges", _rule)
    def _(rule):
        check_update(rule, "bfloat16", "float32", _SIZES, _OFFSETS, k=2, decay=0.9, rounding=3, slides=(0, 1))
        check_update(rule, "float32", "bfloat16", [45], [2**33 + 4], k=3, rounding=3, each=True, masks=0.5)
        check_update(rule, "float16", "bfloat16", [1, 50], [0, 8], "rademacher", density=0.4, each=True)

    @case(f"update {_rule}: whole program", _rule)
    def _(rule):
        check_update(rule, "bfloat16", "float32", [PROGRAM + 24], [PROGRAM - 8], "rademacher", decay=0.9)
        check_update(rule, "bfloat16", "bfloat16", [PROGRAM + 8, 8], [0, 8], k=1, masks=0.5, rounding=3)


for _dist in ("normal", "rademacher"):

    @case(f"spread: {_dist}", _dist)
    def _(dist):
        import torch

        from zokernels.backends import get
        from zokernels.backends.triton import spread

        torch.manual_seed(SEED)
        for dtype, n, offset, k in (
            ("bfloat16", 41, 2**33 + 4, 3),
            ("float32", PROGRAM + 16, PROGRAM - 8, 2),
        ):
            terms = random_terms([n], [offset], dist, k=k)
            x = torch.randn(n).to(getattr(torch, dtype))
            results = []
            spread.BUSY = 1024 if n < PROGRAM else 2  # one program for each direction, or one for all
            for name in ("triton", "reference"):
                buffers, (out,) = slid([torch.zeros(k * n)], [0], x.dtype)
                get(name).spread(out.view(k, n), x, terms)
                results.append(buffers)
            assert_same(*results, lambda i, n=n: f"{n} elements")

    @case(f"project: {_dist}", _dist)
    def _(dist):
        import torch

        import zokernels

        torch.manual_seed(SEED)
        for dtype, sizes, offsets, k in (
            ("bfloat16", _SIZES, [5, 0, 2**33 + 8, 16343], 2),
            ("float16", [70, 400], [2**35 - 40, 2**40 - 205], 1),
            # A whole program with an edge on both sides; of normals it takes the interpreter half a minute.
            ("float32", [65536 + 228 if dist == "rademacher" else 228], [2**16 - 128], 1),
        ):
            terms = random_terms(sizes, offsets, dist, k=k)
            slides = cycled((0, 1), sizes)
            _, x = slid([torch.randn(n) for n in sizes], slides, getattr(torch, dtype))
            args = (x, terms.seeds, terms.streams, offsets, dist)
            sums = []
            for name in ("triton", "reference"):
                with zokernels.backend(name):
                    sums.append(torch.ops.zokernels.project(*args))
            assert torch.equal(*sums), (dtype, sums)

    @case(f"squares: {_dist}", _dist)
    def _(dist):
        import torch

        from zokernels.backends import get

        torch.manual_seed(SEED)
        for sizes, offsets in ((_SIZES, _OFFSETS), ([PROGRAM + 100], [2**35 - 77])):
            terms = random_terms(sizes, offsets, dist, k=2)
            args = (terms.seeds, sizes, terms.streams, offsets, dist)
            ours, theirs = (get(name).squares(*args) for name in ("triton", "reference"))
            assert torch.equal(ours, theirs), (ours, theirs)


def check_low_rank(dtype, shapes, ranks, offsets, *, slides=(0,), **options):
    """As check, for low_rank in place; tiny factors make products that underflow."""
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    dtype = getattr(torch, dtype)
    sizes = [m * n for m, n in shapes]
    terms = random_terms(sizes, offsets, "normal", **options)
    k = terms.seeds.numel()
    factor = lambda rows, rank: torch.randn(k, rows, rank) * positive((k, rows, 1), torch.float32)
    left = [factor(m, rank) for (m, _), rank in zip(shapes, ranks, strict=True)]
    right = [factor(n, rank) for (_, n), rank in zip(shapes, ranks, strict=True)]
    values = [torch.randn(n).to(dtype) for n in sizes]
    results = []
    for name in ("triton", "reference"):
        buffers, views = slid(values, cycled(slides, sizes), dtype)
        views = [view.view(shape) for view, shape in zip(views, shapes, strict=True)]
        get(name).low_rank(views, views, left, right, terms)
        results.append(buffers)
    assert_same(*results, lambda i: f"matrix {i} of shape {shapes[i]}, rank {ranks[i]}")


@case("low rank")
def _():
    check_low_rank(
        "bfloat16", [(3, 5), (70, 72), (0, 8), (9, 8)], [2, 3, 1, 4], [5, 0, 0, 2**33 + 8], k=2, decay=0.9
    )
    check_low_rank("float32", [(65, 130)], [5], [0], rounding=3)
    check_low_rank("float16", [(7, 24), (5, 8)], [0, 1], [0, 0], each=True, k=3)


@case("low rank: stochastic")
def _():
    check_low_rank("bfloat16", [(67, 72), (2, 8)], [3, 1], [2**35 - 64, 8], rounding=3, k=2, each=True)
    check_low_rank("float16", [(9, 70), (3, 16)], [2, 2], [2**33 + 5, 0], rounding=3, slides=(0, 1))


@case("low rank, linear")
def _():
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    for dtype, m, n, rank, rows, factors, with_bias, add in (
        (torch.float32, 9, 70, 3, [2, 0, 17], 3, True, True),
        (torch.bfloat16, 72, 5, 1, [16], 1, False, False),
        (torch.float16, 70, 130, 2, [1, 3, 2, 1], 2, True, False),
    ):
        total, members = sum(rows), len(rows)
        values = torch.randn(total, m).to(dtype), torch.randn(total, n).to(dtype)
        left, right = torch.randn(members, m, rank), torch.randn(factors, n, rank)
        coeffs, bias = torch.randn(members), torch.randn(1, m) if with_bias else None
        results = []
        for name in ("triton", "reference"):
            out = values[0].clone()
            get(name).low_rank_linear(out, values[1], left, right, coeffs, rows, bias, add)
            results.append([out])
        assert_same(*results, lambda i, dtype=dtype: f"out in {dtype}")


@case("quantized linear")
def _():
    import torch

    from zokernels.backends import get
    from zokernels.quantize import pack_int4

    torch.manual_seed(SEED)
    for dtype, rows, outputs, groups, size, packed, x_bits, with_bias in (
        (torch.float32, 5, 9, 3, 33, True, 24, True),
        (torch.bfloat16, 1, 17, 1, 70, False, 24, False),
        (torch.float16, 4, 8, 2, 64, False, 8, True),
        (torch.bfloat16, 6, 3, 2, 5, True, 8, False),
        (torch.float32, 2, 3, 1, 0, False, 24, True),
    ):
        x, scale = torch.randn(rows, groups * size).to(dtype), torch.rand(outputs, groups).to(dtype)
        if size:
            x[0, 1], x[-1] = float("nan") if rows > 1 else 3.0, x[-1] * 2.0**-20
        weight = torch.randint(-8 if packed else -128, 8 if packed else 128, (outputs, groups * size)).to(
            torch.int8
        )
        weight = pack_int4(weight) if packed else weight
        bias = torch.randn(outputs) if with_bias else None
        results = [
            [get(name).quantized_linear(x, weight, scale, bias, x_bits)] for name in ("triton", "reference")
        ]
        assert_same(*results, lambda i, dtype=dtype: f"y in {dtype}")


def check_fan_out(dtype, dist, sizes, offsets, *, slides=(0,), **options):
    """As check, for fan_out: theta, plus and minus."""
    import torch

    from zokernels.backends import get

    torch.manual_seed(SEED)
    dtype = getattr(torch, dtype)
    terms = random_terms(sizes, offsets, dist, **options)
    values, slides = [torch.randn(n).to(dtype) for n in sizes], cycled(slides, sizes)
    empty = [torch.zeros(n) for n in sizes]
    side = random_seeds(1), torch.tensor([0.3])
    results = []
    for name in ("triton", "reference"):
        theta, plus, minus = (slid(group, slides, dtype) for group in (values, empty, empty))
        get(name).fan_out(theta[1], plus[1], minus[1], *side, terms)
        results.append(theta[0] + plus[0] + minus[0])
    names = ("theta", "plus", "minus")
    assert_same(*results, lambda i: f"{names[i // len(sizes)]} of tensor {i % len(sizes)}")


for _dist in ("normal", "rademacher"):

    @case(f"fan_out: {_dist}", _dist)
    def _(dist):
        check_fan_out("bfloat16", dist, _SIZES, _OFFSETS, k=2, decay=0.9, rounding=3, slides=(0, 1))
        check_fan_out("float32", dist, [45], [2**33 + 4], k=0)
        check_fan_out("float16", dist, [PROGRAM + 8], [PROGRAM - 8], k=0, decay=0.9)


def _extremes(n):
    """NaN, infinities, zeros, subnormals, the largest values and powers of two down to the last subnormal."""
    import torch

    inf, nan = float("inf"), float("nan")
    special = [nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-45, 3.3895e38, -3.3895e38, 65504.0, -65504.0]
    values = torch.tensor(special + [s * 2.0**-e for e in range(10, 28) for s in (1, -1, 1.37)])
    return values.repeat(-(-n // values.numel()))[:n]


for _dtype in DTYPES:

    @case(f"extremes: {_dtype}", _dtype)
    def _(dtype):
        for rounding in (None, 3):
            check(dtype, "normal", [200], [0], k=0, fill=_extremes, rounding=rounding)
            check(dtype, "rademacher", [200], [0], k=1, decay=1.1e-4, fill=_extremes, rounding=rounding)
            large = lambda n: _extremes(n) * 1e4
            check(dtype, "rademacher", [200], [0], k=1, decay=1e-8, fill=large, rounding=rounding)


def _zeros(tensors, rng):
    """Three in five elements become 0 or -0."""
    import torch

    for t in tensors:
        draw = torch.tensor([rng.random() for _ in range(t.numel())]).view(t.shape)
        t[draw < 0.3], t[(draw >= 0.3) & (draw < 0.6)] = 0.0, -0.0


def check_rows(args, note):
    """Triton equals reference on rows of matrices."""
    from helpers import moved
    from test_rows import run

    import zokernels

    results = []
    for name in ("triton", "reference"):
        with zokernels.backend(name):
            results.append(run(**moved(args, "cpu")))
    assert_same(*results, lambda i: f"tensor {i} of {note}, rows {args['rows']}, {args['dist']}")


def check_zeros(rng, **fixed):
    """On rows of matrices and whole tensors where much is 0 or -0, a step size, too."""
    from test_rows import random_rows

    args = random_rows(rng, **fixed)
    _zeros([*args["buffers"], *args.get("first", ()), *args.get("second", ()), args["coeffs"]], rng)
    if "hyper" in args and rng.random() < 0.5:
        _zeros([args["hyper"]], rng)
    check_rows(args, fixed)


for _rule in (None, *RULES):

    @case(f"zeros: {_rule or 'combine'}", _rule)
    def _(rule):
        import random

        rng = random.Random(f"{SEED} {rule}")
        for _ in range(4 if rule is None else 1):
            check_zeros(rng, rule=rule)


for _width in (40, 512, 4096, PROGRAM + 8):

    @case(f"rows: of {_width}", _width)
    def _(width):
        """Whole programs of aligned rows, edges, and rows that are not aligned."""
        import random

        from test_rows import large_rows

        rng = random.Random(f"{SEED} {width}")
        for dist in ("normal", "rademacher"):
            check_rows(large_rows(rng, width, PROGRAM, plain=True, dist=dist, count=1), dist)
        if width > 500:  # the reference runs row by row
            rule = rng.choice([None, *RULES])
            check_rows(large_rows(rng, width, PROGRAM // 2, rule), rule)
            check_rows(large_rows(rng, width + rng.randrange(1, 8), PROGRAM // 4), "unaligned")


@case("zeros: fan_out")
def _():
    """0 z and -0 z on either side of a weight that is 0 or -0."""
    import torch

    from zokernels.backends import get

    for c in (0.0, -0.0):
        theta, results = torch.tensor([0.0, -0.0, 1.0] * 40), []
        terms = random_terms([120], [0], "normal", k=0)
        for name in ("triton", "reference"):
            out = [torch.full_like(theta, 7.0) for _ in range(2)]
            get(name).fan_out(
                [theta.clone()], [out[0]], [out[1]], torch.tensor([5]), torch.tensor([c]), terms
            )
            results.append(out)
        assert_same(*results, lambda i: f"{('plus', 'minus')[i]} of c = {c}")  # noqa: B023


@case("more than 2^31 elements")
def _():
    """Programs 2^18 and 2^18 + 1 of a tensor of 2^32 + 16404 elements, of which only the last 16404 exist."""
    import torch
    import triton.language as tl

    from zokernels.backends import get
    from zokernels.backends.terms import KEEP_ALL, Terms
    from zokernels.backends.triton.combine import combine_table_kernel

    skipped, n = 2**32, PROGRAM + 20
    ours, theirs = (torch.linspace(-1, 1, n).bfloat16() for _ in range(2))
    seeds, coeffs = torch.tensor([SEED]), torch.tensor([0.1])
    address = ours.data_ptr() - skipped * ours.element_size()
    rows = torch.tensor([[-skipped // PROGRAM, 0, skipped + n, 0, 9, address, address, 0, 0]])
    owner = torch.zeros(2, dtype=torch.int32)
    for domain, dist in ((1, "normal"), (2, "rademacher")):
        combine_table_kernel[(2,)](
            rows, owner, seeds, coeffs, 1, None, None, None, KEEP_ALL, DOMAIN=domain, K=1, ALIGNED=True,
            DTYPES=(tl.bfloat16, tl.bfloat16, None, None), WIDTH=9, EACH=False,
        )  # fmt: skip
        get("reference").combine([theirs], [theirs], Terms(seeds, coeffs, [9], [skipped], dist, None, None))
        assert torch.equal(bits(ours), bits(theirs)), dist


def _upper_bits(name):
    import stream_cases

    import zokernels

    with zokernels.backend("triton"):
        stream_cases.check(name, stream_cases.STREAMS[::4])  # of five: the interpreter is slow


for _name in STREAM_RUNS:
    case(f"upper bits of streams: {_name}", _name)(_upper_bits)


for _dist in ("normal", "rademacher"):

    @case(f"offsets of 32 bits: {_dist}", _dist)
    def _(dist):
        """The interpreter keeps arguments in [2^31, 2^32) apart."""
        import torch

        import zokernels

        for offset in (2**31 - 100, 2**31, 2**31 + 100, 2**32 - 5000, 2**32 - 8, 2**32 + 8):
            draw = lambda: zokernels.noise(200, seed=7, stream=1, offset=offset, dist=dist)  # noqa: B023
            with zokernels.backend("triton"):
                ours = draw()
            assert torch.equal(ours, draw()), offset


@case("table: built once for the same addresses, offsets and streams")
def _():
    import torch

    from zokernels.backends.triton import table

    cpu = torch.device("cpu")
    rows = ((1, 0, 5, 0, 1, 64, 64), (4, 1, 40000, 16383, 2, 128, 256))
    first = table.table_of(cpu, rows)
    assert first.rows.tolist() == [[0, 0, 5, 0, 1, 64, 64], [1, 1, 40000, 16383, 2, 128, 256]], first.rows
    assert first.owner.tolist() == [0, 1, 1, 1, 1], first.owner
    assert table.table_of(cpu, rows) is first
    assert table.table_of(cpu, ((1, 0, 5, 0, 3, 64, 64), rows[1])) is not first
    for i in range(table.KEPT):
        table.table_of(cpu, ((1, 0, 1, 0, 0, i, i),))
    assert len(table._tables) == table.KEPT
    assert table.table_of(cpu, rows) is not first


for _op in ("encode", "decode", "decode_fan_out"):
    for _wire in ("bf16", "fp16", "fp8", "int8"):

        @case(f"wire: {_op} {_wire}", _op, _wire)
        def _(op, wire):
            import random

            import test_wire
            import torch
            from helpers import check_backend

            import zokernels

            rng = random.Random(SEED)
            run, arguments = test_wire.CASES[op]
            with zokernels.backend("triton"):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    sizes = [0, 33, rng.randrange(300)]
                    check_backend(
                        run, arguments(rng, wire=wire, dtype=dtype, sizes=sizes, count=rng.choice((0, 1)))
                    )
                whole = {
                    "sizes": [PROGRAM],
                    "offsets": [PROGRAM * rng.randrange(100)],
                    "count": rng.choice((0, 1)),
                }
                check_backend(run, arguments(rng, wire=wire, aligned=True, **whole))


@case("an exception between two launches, in place")
def _():
    """Weights of two alignments take two launches; after the first one every use is an error."""
    import torch

    import zokernels
    from zokernels.backends.triton import combine
    from zokernels.optim import ZOSGD

    class Preempted(Exception):
        pass

    def raises(use, kind):
        try:
            with zokernels.backend("triton"):
                use()
        except kind as error:
            return str(error)
        raise AssertionError(f"no {kind.__name__}")

    weights = torch.ones(17)
    params = [torch.nn.Parameter(weights[:8]), torch.nn.Parameter(weights[9:])]  # one is not aligned
    optimizer = ZOSGD(params, lr=0.1, restore="inplace")
    step = lambda: optimizer.step(lambda: sum(p.sum() for p in params))
    with zokernels.backend("triton"):
        step()
    saved, theta, launches = optimizer.state_dict(), weights.clone(), []
    kernel = combine.combine_kernel

    class Interrupted:
        def __getitem__(self, grid):
            if launches:
                raise Preempted
            launches.append(grid)
            return kernel[grid]

    combine.combine_kernel = Interrupted()
    try:
        raises(step, Preempted)
    finally:
        combine.combine_kernel = kernel
    assert not torch.equal(weights, theta)  # a part of a move
    for use in (step, optimizer.state_dict):
        assert "weights that no exception has left half moved (load a checkpoint)" in raises(
            use, RuntimeError
        )
    optimizer.load_state_dict(saved)
    weights.copy_(theta)
    with zokernels.backend("triton"):
        step()
    assert optimizer.step_count == 2


@case("trajectory: a run of the reference replays")
def _():
    import random
    import tempfile

    import torch
    from trajectory_cases import Model, assert_same, base_of, run

    import zokernels
    from zokernels.optim import ZOSGD
    from zokernels.trajectory import replay_

    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.bfloat16):
            model = Model(dtype, random.Random(SEED))
            base = base_of(model)
            with zokernels.backend("reference"):
                optimizer = ZOSGD(
                    model.named_parameters(),
                    lr=0.1,
                    weight_decay=0.1,
                    directions=2,
                    trajectory=f"{folder}/{dtype}",
                )
                run(optimizer, model, 3)
                optimizer.trajectory.close()
            assert all(not torch.equal(p, base[name]) for name, p in model.named_parameters())
            with zokernels.backend("triton"):
                replay_(base, f"{folder}/{dtype}")
            assert_same(base, base_of(model))


for _name in empty_cases.CASES:

    @case(f"empty: {_name}", _name)
    def _(name):
        import zokernels

        with zokernels.backend("triton"):
            empty_cases.CASES[name]("cpu")


@case("stochastic rounding at the largest finite values")
def _():
    import zokernels

    with zokernels.backend("triton"):
        largest_cases.check()


def run(name: str, seed: int) -> str:
    """What is wrong: an empty string if nothing is."""
    from helpers import poisoned

    global SEED
    SEED = seed
    try:
        with poisoned():
            CASES[name]()
    except Exception:  # a case may fail in any way; its test shows how
        return traceback.format_exc()
    return ""


def hasten_interpreter() -> None:
    """Leaves out what Triton's interpreter does in vain, half of its time.

    At each call of a device function it looks through its language for what is not patched yet, although the
    launch has patched all of it; and it makes a table of all dtypes whenever it asks for one.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches: list[set[frozenset]] = []  # of each that runs, the modules that it has patched

    @functools.cache
    def modules_of(function: Callable) -> frozenset:
        """Those of the language that ``function`` sees, which decide what is patched."""
        language = (interpreter.tl, interpreter.tl.core)
        return frozenset(m for m in language if any(m is value for value in function.__globals__.values()))

    def patch_once(function: Callable) -> object:
        modules = modules_of(function)
        if modules in launches[-1]:
            return None
        launches[-1].add(modules)
        return patch(function)

    def launch_anew(executor: object, *args: object, **options: object) -> None:
        launches.append(set())
        try:
            launch(executor, *args, **options)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    of_scalar = functools.cache(interpreter._get_np_dtype)
    of_any = interpreter._get_np_dtype
    scalar = interpreter.tl.dtype

    def dtype_of(kind: object) -> object:
        element = getattr(kind, "element_ty", kind)
        return (
            of_scalar(element)
            if type(element) is scalar and type(kind) is not interpreter.tl.pointer_type
            else of_any(kind)
        )

    interpreter._get_np_dtype = dtype_of


def main() -> None:
    hasten_interpreter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
