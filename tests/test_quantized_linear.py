"""quantized_linear: the reference against products in float64, and every kernel against the reference, bit
for bit.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from conftest import use_kernel
from helpers import CPU_KERNELS, DTYPES, assert_same_bits, check_backend, random_values, rounding_bound

import zokernels
from zokernels.quantize import pack_int4

X_BITS = pytest.mark.parametrize("x_bits", [24, 8])


def run(x, weight, scale, bias, x_bits):
    return [zokernels.quantized_linear(x, weight, scale, bias, x_bits=x_bits)]


@pytest.fixture(params=[*CPU_KERNELS, "cpu-vnni", "cpu-amx"])
def kernel(request, monkeypatch):
    """Each instruction set, and each with more instructions for products of bytes."""
    use_kernel(request.param, monkeypatch)
    with zokernels.backend("cpu"):
        yield request.param


def random_product(
    rng, dtype=None, rows=None, shape=None, size=None, packed=None, x_bits=None, specials=True
):
    """Arguments of run.  x, at any alignment, is a view into a buffer, and so are the weights, whose numbers
    are all that a byte or half a byte has."""
    dtype = dtype or rng.choice(DTYPES)
    rows = rng.choice([1, 2, 5, 6, 16, 17, rng.randrange(40)]) if rows is None else rows
    size = size or rng.choice([1, 3, 16, 32, 63, 64, 65, 128, rng.randrange(1, 300)])
    outputs, groups = shape or (rng.choice([1, 15, 16, 17, 128, 129, rng.randrange(1, 200)]), 1)
    if shape is None and size * outputs < 20_000:
        groups = rng.choice([1, 2, 3, rng.randrange(1, 5)])
    inputs, packed = size * groups, rng.random() < 0.5 if packed is None else packed
    weight = torch.randint(-8 if packed else -128, 8 if packed else 128, (outputs, inputs), dtype=torch.int8)
    weight[0] = -8 if packed else -128
    weight = pack_int4(weight) if packed else weight

    def view(values, *shape):
        begin = rng.choice([0, 1, 3])
        buffer = values.new_zeros(values.numel() + begin)
        buffer[begin:] = values.flatten()
        return buffer[begin:].view(shape)

    def numbers(count, kind):
        return (
            random_values(count, kind, rng)
            if specials and rng.random() < 0.5
            else torch.randn(count).to(kind)
        )

    x, of_scale = numbers(rows * inputs, dtype).view(rows, inputs), rng.choice(DTYPES)
    if rows and inputs:
        x[rng.randrange(rows)] *= rng.choice([0.0, 1.0, 2.0**-30])
    return {
        "x": view(x, rows, inputs),
        "weight": view(weight, *weight.shape),
        "scale": (torch.rand(outputs, groups) * 0.01).to(of_scale),
        "bias": rng.choice([None, numbers(outputs, rng.choice(DTYPES))]),
        "x_bits": x_bits or rng.choice([24, 8]),
    }


@X_BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_reference_follows_the_formula(dtype, packed, x_bits, rng):
    rows, outputs, groups, size = 5, 9, 4, 33
    args = random_product(rng, dtype, rows, (outputs, groups), size, packed, x_bits, specials=False) | {
        "bias": torch.randn(outputs)
    }
    x, scale = args["x"].double(), args["scale"].double()
    integers = args["weight"].short()
    if packed:
        halves = torch.stack((integers % 16, integers // 16), -1).flatten(1)
        integers = torch.where(halves > 7, halves - 16, halves)
    weight = integers.double() * scale.repeat_interleave(size, 1)
    want, magnitude = (
        (x @ weight.t() + args["bias"]).double(),
        x.abs() @ weight.abs().t() + args["bias"].abs(),
    )
    # Half a step of each x: the step is at most 2^-21 of the largest one, or a 127th part of it.
    step = x.abs().amax(1, keepdim=True) * (2.0**-21 if x_bits == 24 else 1 / 127)
    off = step / 2 * weight.abs().sum(1) * (1 + 1e-5)
    with zokernels.backend("reference"):
        y = run(**args)[0]
    # A group: three conversions and two additions, the scale, and the addition; then the step and the bias.
    most = magnitude + off
    assert (
        (y.double() - want).abs() <= off + rounding_bound(want, dtype, most, 7 * groups + 2) + off * 2**-7
    ).all()
    if dtype is torch.bfloat16 and x_bits == 24:  # which are all exact, if they are not too small
        args["x"] = torch.where(x.abs() < x.abs().amax(1, keepdim=True) * 2.0**-14, 0.0, x).to(dtype)
        want = args["x"].double() @ weight.t() + args["bias"]
        with zokernels.backend("reference"):
            y = run(**args)[0]
        assert ((y.double() - want).abs() <= rounding_bound(want, dtype, most, 7 * groups + 2)).all()


@pytest.mark.parametrize("repeat", range(10))
def test_kernels_equal_reference(kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_product(rng))


@X_BITS
@pytest.mark.parametrize("packed", [False, True])
def test_ends_of_chunks_and_tiles(kernel, packed, x_bits, rng):
    """Groups that end anywhere in a chunk, and in the middle of a byte; outputs and rows in a tile."""
    for size, groups in ((1, 5), (2, 3), (31, 2), (63, 3), (64, 5), (65, 2), (96, 3), (129, 1), (321, 1)):
        outputs, rows = rng.choice([1, 15, 16, 17, 33, 130]), rng.choice([1, 4, 5, 6, 15, 16, 17])
        check_backend(run, random_product(rng, None, rows, (outputs, groups), size, packed, x_bits))


@pytest.mark.parametrize("rows", [1, 5, 6, 16, 63, 64, 65, 130])
def test_rows(kernel, rows, rng):
    check_backend(run, random_product(rng, None, rows, (20, 2), 70))


def test_threads(kernel, rng):
    check_backend(run, random_product(rng, None, 70, (700, 2), 400), threads=(1, 3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory as Linux does")
@pytest.mark.parametrize("repeat", range(4))
def test_nothing_behind_a_tensor_is_read(kernel, rng, repeat):
    """Each ends where a page ends, and the next page cannot be read: who does ends the process."""
    page = mmap.PAGESIZE

    def at_the_end(t):
        size = -(-t.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), page, 0) == 0
        own = torch.frombuffer(memory, dtype=torch.uint8, count=size)[size - t.nbytes :]
        return own.view(t.dtype).view(t.shape).copy_(t)

    for _ in range(4):
        args = random_product(rng)
        guarded = {k: at_the_end(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        assert_same_bits(run(**guarded)[0], run(**args)[0])


@X_BITS
def test_the_largest_sums(kernel, x_bits, rng):
    """Of the longest group, whose sums of bytes are nearly 2^31."""
    args = random_product(rng, torch.float32, 2, (2, 1), 131_071, False, x_bits, specials=False)
    args["weight"].fill_(-128)
    args["x"].fill_(1.0)
    args["x"][1] = -8355711.0  # bytes of 127, but for the highest
    check_backend(run, args)


def test_a_row_has_the_bits_it_has_alone(cpu_backend, rng):
    args = random_product(rng, None, 23, (40, 3), 50)
    together = run(**args)[0]
    for row in range(23):
        assert_same_bits(run(**args | {"x": args["x"][row : row + 1]})[0][0], together[row], f"row {row}")


def test_rows_that_are_no_numbers(cpu_backend, rng):
    """They give NaNs, and the rows beside them what they give alone; zeros give the bias."""
    x = torch.randn(5, 70)
    x[0, 3], x[1, 69], x[2] = float("nan"), float("-inf"), 0.0
    args = random_product(rng, torch.float32, 5, (9, 1), 70, specials=False) | {
        "x": x,
        "bias": torch.randn(9),
    }
    y = run(**args)[0]
    assert y[:2].isnan().all()
    assert torch.equal(y[2], args["bias"])
    assert y[3:].isfinite().all()


@X_BITS
def test_nothing_to_sum(cpu_backend, x_bits):
    bias = torch.randn(5)
    for groups in (0, 1, 3):
        args = torch.empty(2, 0), torch.empty(5, 0, dtype=torch.int8), torch.full((5, groups), float("inf"))
        assert torch.equal(zokernels.quantized_linear(*args, bias, x_bits=x_bits), bias.expand(2, 5))
    x, weight, scale = torch.randn(2, 6), torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 2)
    assert zokernels.quantized_linear(x[:0], weight, scale).shape == (0, 5)
    assert zokernels.quantized_linear(x, weight[:0], scale[:0]).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 6, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or float16"),
        ({"x": torch.ones(6)}, r"x: expected a contiguous tensor \[rows, inputs\]"),
        ({"x": torch.ones(6, 2).t()}, r"x: expected a contiguous tensor \[rows, inputs\]"),
        ({"x": torch.ones(2, 5)}, r"weight: expected a contiguous tensor of shape \(5, 5\) for 5 inputs"),
        ({"weight": torch.ones(5, 6)}, "weight: expected dtype int8, or uint8 that packs"),
        ({"weight": torch.ones(5, 6, dtype=torch.uint8)}, r"weight: expected .* of shape \(5, 3\)"),
        ({"weight": torch.ones(6, 5, dtype=torch.int8).t()}, "weight: expected a contiguous tensor of shape"),
        ({"scale": torch.ones(5, 4)}, "scale: expected a divisor of 6 inputs as the number of groups"),
        ({"scale": torch.ones(5, 0)}, "scale: expected a divisor of 6 inputs as the number of groups"),
        ({"scale": torch.ones(4, 2)}, r"weight: expected a contiguous tensor of shape \(4, 6\)"),
        ({"bias": torch.ones(4)}, "bias: expected 5 numbers, one for each output, got 4"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias: expected dtype float32"),
        ({"x_bits": 16}, "x_bits: expected 24 or 8, got 16"),
        (
            {
                "x": torch.ones(1, 131_072),
                "weight": torch.ones(5, 131_072, dtype=torch.int8),
                "scale": torch.ones(5, 1),
            },
            "scale: expected a divisor of 131072 inputs .* of 131,071 inputs at most, got 1",
        ),
    ],
)
def test_arguments(change, message):
    args = {
        "x": torch.ones(2, 6), "weight": torch.ones(5, 6, dtype=torch.int8), "scale": torch.ones(5, 2),
        "bias": None, "x_bits": 24,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"quantized_linear: {message}"):
        run(**args | change)


@X_BITS
def test_opcheck(cpu_backend, x_bits, rng):
    args = random_product(rng, torch.float32, 3, (5, 2), 6, specials=False, x_bits=x_bits)
    torch.library.opcheck(torch.ops.zokernels.quantized_linear, tuple(args.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    with zokernels.backend(backend):
        for _ in range(4):
            check_backend(run, random_product(rng), "cuda")
        check_backend(run, random_product(rng, shape=(512, 4), size=128), "cuda")
