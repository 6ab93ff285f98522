"""The PTX that Triton makes of its kernels, executed: its bits, and what it moves."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import test_fan_out
import test_low_rank
import test_rows
import test_spread
import torch
from helpers import DISTS, DTYPES, check_backend
from ptx_cases import OPERATIONS, PROGRAM, arguments, derive_seeds, random_combine

from zokernels.ops.update import RULES
from zokernels.wire import FORMATS

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

from ptx.triton_device import TritonDevice  # noqa: E402
from triton_kernels import kernel_names  # noqa: E402


@pytest.fixture(scope="session")
def device():
    return TritonDevice()


@pytest.fixture
def on_ptx(device, monkeypatch):
    """The operations on CPU tensors through the Triton backend, its kernels executed as PTX."""
    device.use(monkeypatch)
    device.launches.clear()
    device.rsqrt_ulps = 0
    return device


#: What ``places`` has of tensors: two on 16 bytes and two off, which make two tables; or one of each.
TABLES, ONES = (0, 1, 2, 3), (0, 2)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: Name: the kernels that it launches, and what it runs with a generator.
CASES: dict[str, tuple[set[str], Callable]] = {}


def add(name: str, kernels: set[str], operation: str, dist: str, tensors: tuple[int, ...], **fixed: object) -> None:
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
    add(f"combine K = 3 {dist}", {"combine_kernel"}, "combine", dist, ONES, **{**PLAIN, "dtype": BF16, "count": 3})
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
    add(f"decode_fan_out {wire}", {"decode_kernel"}, "decode_fan_out", DISTS[1 - i % 2], ONES, count=0, **fixed)
    add(f"encode {wire}", {"encode_kernel"}, "encode", "normal", TABLES, wire=wire, dtype=DTYPES[(i + 2) % 3])

for dist in DISTS:
    add(f"project {dist}", {"project_table_kernel"}, "project", dist, TABLES, dtype=BF16, count=2)
add("project fp32", {"project_table_kernel"}, "project", "normal", TABLES, dtype=FP32, count=1)
add("squares", {"squares_table_kernel"}, "squares", "normal", TABLES, count=2)
add("squares of one", {"squares_kernel"}, "squares", "normal", (0,), count=1)


def fan_out(dtype: torch.dtype, dist: str, tensors: tuple[int, ...], count: int) -> Callable:
    def run(rng) -> None:
        args = arguments(
            random_combine, rng, dist, tensors, dtype=dtype, count=count, decay=None, rounding=rounding_of(dtype)
        )
        test_fan_out.check(args.pop("buffers"), args.pop("parts"), args, rng)

    return run


CASES["fan_out fp32"] = {"fan_out_kernel"}, fan_out(FP32, "normal", ONES, 0)
CASES["fan_out bf16"] = {"fan_out_table_kernel"}, fan_out(BF16, "rademacher", TABLES, 1)
CASES["fan_out fp16"] = {"fan_out_kernel"}, fan_out(FP16, "normal", ONES, 1)


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
