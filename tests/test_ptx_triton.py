"""The PTX that Triton makes of its kernels, executed: its bits, and what it moves."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable

import pytest
import test_combine
import test_fan_out
import test_low_rank
import test_low_rank_linear
import test_quantized_linear
import test_rows
import test_spread
import torch
from helpers import DISTS, DTYPES, check_backend
from ptx import arithmetic, mutants
from ptx.parser import PtxError
from ptx_cases import FAULTS, OPERATIONS, PROGRAM, arguments, derive_seeds, faulty_arguments, random_combine

import zokernels
from zokernels.ops.update import RULES
from zokernels.wire import FORMATS

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

from ptx.triton_device import TritonDevice  # noqa: E402
from triton_kernels import combine_kernel, kernel_names  # noqa: E402


@pytest.fixture(scope="session")
def device():
    return TritonDevice()


@pytest.fixture
def on_ptx(device, monkeypatch):
    """The operations on CPU tensors through the Triton backend, its kernels executed as PTX."""
    device.use(monkeypatch)
    device.begin()
    return device


#: What ``places`` has of tensors: two on 16 bytes and two off, which make two tables; or one of each.
TABLES, ONES = (0, 1, 2, 3), (0, 2)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: Name: the kernels that it launches, and what it runs with a generator.
CASES: dict[str, tuple[set[str], Callable]] = {}


def add(
    name: str, kernels: set[str], operation: str, dist: str, tensors: tuple[int, ...], **fixed: object
) -> None:
    run, make = OPERATIONS[operation]
    CASES[name] = (
        kernels,
        lambda rng: check_backend(run, arguments(make, rng, dist, tensors, **fixed)),
    )


def rounding_of(dtype: torch.dtype) -> str:
    return "nearest" if dtype is FP32 else "stochastic"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PLAIN = {"count": 1, "decay": None, "rounding": "nearest"}
for dtype, dist in itertools.product(DTYPES, DISTS):
    add(f"combine {short(dtype)} {dist}", {"combine_kernel"}, "combine", dist, ONES, dtype=dtype, **PLAIN)
for dtype, dist in ((FP32, "normal"), (BF16, "rademacher"), (FP16, "normal")):
    add(
        f"combine K = 2 {short(dtype)} {dist}", {"combine_table_kernel"}, "combine", dist, TABLES,
        dtype=dtype, count=2, decay=0.97, rounding=rounding_of(dtype),
    )  # fmt: skip
for dist in DISTS:
    add(
        f"combine K = 3 {dist}",
        {"combine_kernel"},
        "combine",
        dist,
        ONES,
        **{**PLAIN, "dtype": BF16, "count": 3},
    )
add(
    "combine, masks and curvature", {"combine_table_kernel"}, "combine", "rademacher", TABLES,
    dtype=BF16, count=2, decay=0.97, rounding="nearest", extras=("each", "masks", "curvature"),
)  # fmt: skip
add(
    "combine, density", {"combine_kernel"}, "combine", "normal", ONES,
    dtype=FP16, count=1, decay=None, rounding="stochastic", extras=("density", "curvature"),
)  # fmt: skip
add(
    "requantize", {"combine_table_kernel"}, "requantize", "normal", TABLES,
    count=1, decay=None, rounding="stochastic", extras=("masks",),
)  # fmt: skip
add("requantize nearest", {"combine_kernel"}, "requantize", "rademacher", ONES, **PLAIN, extras=("density",))

for i, rule in enumerate(RULES):
    dtype, dist = DTYPES[i % 3], DISTS[i % 2]
    for kernel, tensors, extras in (
        ("update_table_kernel", TABLES, ("masks", "each")),
        ("update_kernel", ONES, ("density",)),
    ):
        if kernel == "update_table_kernel" or i % 2:
            add(
                f"update {rule} {kernel}", {kernel}, f"update {rule}", dist, tensors,
                dtype=dtype, count=2, decay=0.97, rounding=rounding_of(dtype), extras=extras,
            )  # fmt: skip

for i, wire in enumerate(FORMATS):
    dtype, dist = DTYPES[i % 3], DISTS[i % 2]
    fixed = {"wire": wire, "dtype": dtype, "rounding": rounding_of(dtype), "decay": 0.97}
    add(f"decode {wire}", {"decode_table_kernel"}, "decode", dist, TABLES, count=1, **fixed)
    fixed |= {"dtype": DTYPES[(i + 1) % 3], "rounding": "nearest", "decay": None}
    add(
        f"decode_fan_out {wire}",
        {"decode_kernel"},
        "decode_fan_out",
        DISTS[1 - i % 2],
        ONES,
        count=0,
        **fixed,
    )
    add(f"encode {wire}", {"encode_kernel"}, "encode", "normal", TABLES, wire=wire, dtype=DTYPES[(i + 2) % 3])

for dist in DISTS:
    add(f"project {dist}", {"project_table_kernel"}, "project", dist, TABLES, dtype=BF16, count=2)
add("project fp32", {"project_table_kernel"}, "project", "normal", TABLES, dtype=FP32, count=1)
add("squares", {"squares_table_kernel"}, "squares", "normal", TABLES, count=2)
add("squares of one", {"squares_kernel"}, "squares", "normal", (0,), count=1)


def fan_out(dtype: torch.dtype, dist: str, tensors: tuple[int, ...], count: int) -> Callable:
    fixed = {"dtype": dtype, "count": count, "decay": None, "rounding": rounding_of(dtype)}

    def run(rng) -> None:
        for _ in range(3):  # outputs on 16 bytes, or off
            args = arguments(random_combine, rng, dist, tensors, **fixed)
            test_fan_out.check(args.pop("buffers"), args.pop("parts"), args, rng)

    return run


CASES["fan_out fp32"] = {"fan_out_kernel"}, fan_out(FP32, "normal", (0,), 0)
CASES["fan_out bf16"] = {"fan_out_table_kernel"}, fan_out(BF16, "rademacher", TABLES, 1)
CASES["fan_out fp16"] = {"fan_out_kernel"}, fan_out(FP16, "normal", (0,), 1)


def rows(rule: str | None, dtype: torch.dtype, dist: str) -> Callable:
    def run(rng) -> None:
        fixed = {"dtype": dtype, "dist": dist, "count": 1, "decay": 0.97, "rounding": rounding_of(dtype)}
        for width in (1376, 4099):  # aligned to eight, and not
            args = test_rows.large_rows(rng, width, PROGRAM, rule, plain=rule is None, **fixed)
            check_backend(test_rows.run, args)

    return run


for dtype, dist in ((FP32, "normal"), (BF16, "rademacher"), (FP16, "normal")):
    CASES[f"rows {short(dtype)} {dist}"] = {"combine_rows_kernel"}, rows(None, dtype, dist)
CASES["rows momentum"] = {"update_rows_kernel"}, rows("momentum", BF16, "normal")
CASES["rows adam"] = {"update_rows_kernel"}, rows("adam", FP32, "rademacher")


def spread(dtype: torch.dtype, dist: str) -> Callable:
    def run(rng) -> None:
        for n, aligned in ((PROGRAM + 8 * rng.randrange(1000), True), (1 + rng.randrange(2000), False)):
            fixed = {"sizes": [n], "aligned": aligned, "dtype": dtype, "dist": dist, "count": 3}
            args = test_spread.random_spread(rng, **fixed)
            args["offset"] = 2**35 - PROGRAM if aligned else 2**35 - n // 2
            check_backend(test_spread.run, args)

    return run


CASES["spread bf16"] = {"spread_kernel"}, spread(BF16, "normal")
CASES["spread fp32"] = {"spread_kernel"}, spread(FP32, "rademacher")


def low_rank(dtype: torch.dtype, shapes: list[tuple[int, int]], rounding: str) -> Callable:
    def run(rng) -> None:
        args = test_low_rank.random_low_rank(rng, shapes=shapes, dtype=dtype, count=2)
        args |= {"offsets": [8 * rng.randrange(2**40) for _ in shapes], "out": None, "coeffs": torch.randn(2)}
        args |= {"decay": 0.97, "rounding": rounding}
        check_backend(test_low_rank.run, args)

    return run


CASES["low_rank fp32"] = {"low_rank_kernel"}, low_rank(FP32, [(70, 136)], "nearest")
CASES["low_rank bf16"] = {"low_rank_table_kernel"}, low_rank(BF16, [(65, 77), (3, 130)], "stochastic")


def low_rank_linear(rng) -> None:
    args = test_low_rank_linear.random_linear(rng, BF16, (70, 72), rank=3, rows=[17, 0, 2])
    check_backend(test_low_rank_linear.run, args)


CASES["low_rank_linear"] = {"low_rank_linear_kernel"}, low_rank_linear


def quantized_linear(rng) -> None:
    for packed, x_bits in ((True, 24), (False, 8)):
        args = test_quantized_linear.random_product(rng, BF16, 5, (9, 2), 65, packed, x_bits)
        check_backend(test_quantized_linear.run, args)


CASES["quantized_linear"] = {"quantize_kernel", "quantized_linear_kernel"}, quantized_linear
CASES["derive_seed"] = (
    {"derive_seed_kernel"},
    lambda rng: check_backend(derive_seeds, {"rng": rng.getrandbits(32)}),
)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(on_ptx, rng, name):
    kernels, run = CASES[name]
    run(rng)
    assert kernels <= on_ptx.launches.keys()  # a matrix of one row is one piece


def test_every_kernel_is_run():
    assert set().union(*(kernels for kernels, _ in CASES.values())) == kernel_names()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["combine", "update adam", "decode_fan_out", "project", "squares"])
def test_square_root_instruction_may_err(on_ptx, rng, operation, dtype):
    """The last bit of rsqrt.approx is not documented: one unit either way changes nothing."""
    if operation != "combine" and dtype is not BF16:
        pytest.skip("the noise is the same")
    run, make = OPERATIONS[operation]
    for on_ptx.rsqrt_ulps in (-1, 1):
        check_backend(run, arguments(make, rng, "normal", (0,), dtype=dtype, **PLAIN))


@pytest.mark.parametrize(("operation", "dtype"), [("combine", FP32), ("combine", BF16), ("squares", FP32)])
def test_normals_two_at_a_time(monkeypatch, rng, operation, dtype):
    """As sm_100 makes them: ten instructions for two radii."""
    device = TritonDevice(architecture=100)
    device.use(monkeypatch)
    run, make = OPERATIONS[operation]
    for device.rsqrt_ulps in (-1, 0, 1):
        check_backend(run, arguments(make, rng, "normal", (0,), dtype=dtype, **PLAIN))
    (text,) = device.texts.values()
    # Six fmas and four products for two radii, in each form of the code; LLVM makes more of what follows.
    packed = re.findall(r"\b(mul|fma)\.rn\.f32x2", text)
    assert packed.count("fma") >= 2 * 6
    assert packed.count("mul") >= 2 * 4


def test_signs_one_at_a_time(monkeypatch, rng):
    """For sm_100 the compiler makes one instruction of two sums, but not where Philox would wait for it."""
    device = TritonDevice(architecture=100)
    device.use(monkeypatch)
    run, make = OPERATIONS["combine"]
    rounded = PLAIN | {"rounding": "stochastic"}
    check_backend(run, arguments(make, rng, "rademacher", (0,), dtype=BF16, **rounded))
    (text,) = device.texts.values()
    assert "add.rn.f32x2" not in text
    assert "add.rn.f32x2" in combine_kernel(100, "bf16", "rademacher").asm["ptx"]


@pytest.mark.parametrize(("name", "kind"), FAULTS)
def test_a_fault_in_the_ptx_is_noticed(monkeypatch, rng, name, kind):
    """By an access that is wrong, by bits that are not the reference's, or by what is moved."""
    for opcode, (like, function) in mutants.TOWARD_ZERO.items():
        monkeypatch.setitem(arithmetic.RULES, opcode, arithmetic.RULES[like]._replace(function=function))
    args = faulty_arguments(rng, name, (0, 1))  # both aligned: one launch

    def executed(edit: Callable[[str], str]) -> TritonDevice:
        device = TritonDevice(edit)
        with monkeypatch.context() as patch:
            device.use(patch)
            check_backend(test_combine.run, args)
        return device

    whole = executed(str)
    (text,) = whole.texts.values()

    def notices(mutant: str) -> bool:
        try:
            return executed(lambda _: mutant).traffic != whole.traffic
        except (PtxError, AssertionError):
            return True

    mutants.check(text, kind, notices)


#: Bytes of a seed and of a coefficient, which each thread reads.
SMALL = 8 + 4


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_moves_what_a_copy_does(on_ptx, dtype, dist):
    """In place, over whole programs: each element is read once and written once, by accesses of 16 bytes
    a thread.
    """
    programs = 3
    theta = torch.zeros(programs * PROGRAM, dtype=dtype)
    zokernels.combine_(theta, 5, 1e-3, streams=2, dist=dist)
    assert theta.count_nonzero() == theta.numel()
    size, threads = theta.numel() * theta.itemsize, 128 * programs
    loads, stores = on_ptx.traffic["ld"], on_ptx.traffic["st"]
    assert stores.bytes == stores.distinct == size
    assert loads.bytes == size + threads * SMALL
    assert loads.distinct == size + 2 * 32  # a sector for the seed and one for the coefficient
    # A warp's access is 512 bytes: 16 sectors, or where a thread's eight elements are two accesses, half of
    # each of 32.
    sectors = 16 if dtype.itemsize == 2 else 32
    small = 2 * threads // 32  # the seed and the coefficient, one sector each
    assert loads.requests - small == stores.requests == size // 512
    assert loads.sectors - small == stores.sectors == size // 512 * sectors
