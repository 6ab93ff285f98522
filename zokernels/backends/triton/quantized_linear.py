"""quantized_linear: y = x W^T + b of integer weights, in Triton: the integers of x, and then products of
integers.

A program of the second kernel owns some outputs of some rows.  The products are of int32, which every device
multiplies, and the sums of a group stay in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .device import on_device
from .launch import options
from .rounding import round_nearest, to_float

#: Rows and outputs of a program, and elements that it takes at a time.
ROWS, OUTPUTS, DEPTH = 4, 8, 64
_ROWS, _OUTPUTS, _DEPTH = tl.constexpr(ROWS), tl.constexpr(OUTPUTS), tl.constexpr(DEPTH)
_BLOCK = tl.constexpr(1024)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["columns"])
def quantize_kernel(q, steps, x, columns: tl.int64, LIMBS: tl.constexpr):
    """The integers of a row, int32, and its step."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    largest = tl.zeros((_BLOCK,), tl.int32)
    for at in range(0, columns, _BLOCK):
        column = at + tl.arange(0, _BLOCK)
        value = to_float(tl.load(x + column, mask=column < columns, other=0.0))
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(largest, 0)
    finite = most < _INFINITY
    if LIMBS == 3:
        exponent = tl.maximum((most >> 23) - 21, 1)
        step = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = (tl.where(finite, 254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    else:
        step = tl.div_rn(most.to(tl.float32, bitcast=True), 127.0)
        step = tl.where(step == 0.0, 1.0, step)
        inverse = 1.0
    tl.store(steps + row, tl.where(finite, step, float("nan")))
    for at in range(0, columns, _BLOCK):
        column = at + tl.arange(0, _BLOCK)
        value = to_float(tl.load(x + column, mask=column < columns, other=0.0))
        scaled = value * inverse if LIMBS == 3 else tl.div_rn(value, step)
        # The last bits of such a sum are the integer's, rounded to nearest even.
        near = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        if LIMBS == 1:
            near = tl.minimum(tl.maximum(near, -127), 127)
        tl.store(q + row * columns + column, tl.where(finite, near, 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "columns", "outputs", "groups", "width"])
def quantized_linear_kernel(
    out, q, steps, weight, scale, bias, rows: tl.int64, columns: tl.int64, outputs: tl.int64,
    groups: tl.int64, width: tl.int64, PACKED: tl.constexpr, LIMBS: tl.constexpr,
):  # fmt: skip
    """``width``: bytes of a row of the weights."""
    blocks = tl.cdiv(outputs, _OUTPUTS)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks * _ROWS + tl.arange(0, _ROWS)
    output = pid % blocks * _OUTPUTS + tl.arange(0, _OUTPUTS)
    is_row, is_output = row < rows, output < outputs
    size = columns // groups
    total = tl.zeros((_ROWS, _OUTPUTS), tl.float32)
    for group in range(groups):
        low = tl.zeros((_ROWS, _OUTPUTS, _DEPTH), tl.int32)
        middle, high = low, low
        for at in range(0, size, _DEPTH):
            place = at + tl.arange(0, _DEPTH)
            element, inside = group * size + place, place < size
            if PACKED:
                byte = tl.load(
                    weight + output[:, None] * width + (element >> 1)[None, :],
                    mask=is_output[:, None] & inside[None, :],
                    other=0,
                ).to(tl.int32)
                half = (byte >> ((element & 1) * 4).to(tl.int32)[None, :]) & 15
                w = (half ^ 8) - 8
            else:
                w = tl.load(
                    weight + output[:, None] * width + element[None, :],
                    mask=is_output[:, None] & inside[None, :],
                    other=0,
                ).to(tl.int32)
            rest = tl.load(
                q + row[:, None] * columns + element[None, :],
                mask=is_row[:, None] & inside[None, :],
                other=0,
            )
            byte_of_q = ((rest + 128) & 255) - 128
            low += byte_of_q[:, None, :] * w[None, :, :]
            if LIMBS == 3:
                rest = (rest - byte_of_q) >> 8
                byte_of_q = ((rest + 128) & 255) - 128
                middle += byte_of_q[:, None, :] * w[None, :, :]
                high += ((rest - byte_of_q) >> 8)[:, None, :] * w[None, :, :]
        sums = tl.sum(low, 2).to(tl.float32)
        if LIMBS == 3:
            sums = tl.sum(middle, 2).to(tl.float32) * 256.0 + sums
            sums = tl.sum(high, 2).to(tl.float32) * 65536.0 + sums
        of_group = to_float(tl.load(scale + output * groups + group, mask=is_output, other=0.0))
        total += sums * of_group[None, :]
    y = total * tl.load(steps + row, mask=is_row, other=0.0)[:, None]
    if bias is not None:
        y += to_float(tl.load(bias + output, mask=is_output, other=0.0))[None, :]
    to = out + row[:, None] * outputs + output[None, :]
    tl.store(to, round_nearest(y, out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@implements
def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, x_bits: int) -> Tensor:
    (rows, columns), (outputs, groups) = x.shape, scale.shape
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    q, steps = torch.empty_like(x, dtype=torch.int32), x.new_empty(rows, dtype=torch.float32)
    with on_device(x.device):
        quantize_kernel[(rows,)](q, steps, x, columns, LIMBS=x_bits // 8, **options(x.device))
        blocks = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS)
        quantized_linear_kernel[(blocks,)](
            out, q, steps, weight, scale, bias, rows, columns, outputs, groups if columns else 0,
            weight.shape[1], PACKED=weight.dtype is torch.uint8, LIMBS=x_bits // 8, **options(x.device),
        )  # fmt: skip
    return out
