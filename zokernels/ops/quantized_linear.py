"""quantized_linear: products of integer weights, of which no float copy is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import select
from ..checks import DTYPES, fail
from .define import define

#: The largest number of inputs that may share a scale: 131,071 * 128 * 128 < 2^31, so int32 holds the sums.
MAX_GROUP = 131_071


def _check_floats(name: str, value: Tensor, shape: str, dims: int, device: torch.device) -> None:
    op = "quantized_linear"
    if value.dtype not in DTYPES:
        fail(op, name, "dtype float32, bfloat16 or float16", value.dtype, TypeError)
    if value.device != device:
        fail(op, name, f"device {device}, as x", value.device)
    if value.dim() != dims or not value.is_contiguous():
        got = f"shape {tuple(value.shape)}, strides {value.stride()}"
        fail(op, name, f"a contiguous tensor {shape}", got)


def _check_quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, x_bits: int = 24
) -> Tensor:
    """Returns what an output is like: without elements."""
    op = "quantized_linear"
    _check_floats("x", x, "[rows, inputs]", 2, x.device)
    _check_floats("scale", scale, "[outputs, groups]", 2, x.device)
    if weight.dtype not in (torch.int8, torch.uint8):
        fail(op, "weight", "dtype int8, or uint8 that packs two integers of 4 bits", weight.dtype, TypeError)
    if weight.device != x.device:
        fail(op, "weight", f"device {x.device}, as x", weight.device)
    inputs, (outputs, groups) = x.shape[1], scale.shape
    shape = outputs, ((inputs + 1) // 2 if weight.dtype is torch.uint8 else inputs)
    if weight.shape != shape or not weight.is_contiguous():
        got = f"shape {tuple(weight.shape)}, strides {weight.stride()}"
        fail(op, "weight", f"a contiguous tensor of shape {shape} for {inputs} inputs", got)
    if inputs and (not groups or inputs % groups or inputs // groups > MAX_GROUP):
        expected = f"a divisor of {inputs} inputs as the number of groups, of {MAX_GROUP:,} inputs at most"
        fail(op, "scale", expected, groups)
    if bias is not None:
        _check_floats("bias", bias, "[outputs]", 1, x.device)
        if len(bias) != outputs:
            fail(op, "bias", f"{outputs} numbers, one for each output", len(bias))
    if x_bits not in (24, 8):
        fail(op, "x_bits", "24 or 8", x_bits)
    return x.new_empty(x.shape[0], outputs)


@define(
    "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, int x_bits=24) -> Tensor",
    _check_quantized_linear,
)
def _quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, x_bits: int = 24
) -> Tensor:
    _check_quantized_linear(x, weight, scale, bias, x_bits)
    found: Tensor = select(x.device).quantized_linear(x, weight, scale, bias, x_bits)
    return found


@torch.no_grad()
def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, x_bits: int = 24
) -> Tensor:
    """y = x W^T + b with W[o, i] = scale[o, i // group_size] * weight[o, i], without a copy of W in floats.

    A row of x is a step s times integers, q = round(x / s) with ties to even.  Of 24 bits: s is a power of
    two, 2^(e - 22) with the least e >= -104 for which max |x| < 2^e, so that |q| <= 2^22.  Each number is off
    by half a step at most, which is 2^-22 of the row's largest one; of bf16, those that are at least 2^-14
    times the largest are exact.  Of 8 bits: s = max |x| / 127, or 1 where that is 0, and q lies in
    [-127, 127].  A row with a NaN or an infinity has the step NaN, and gives NaNs.

    Integers are multiplied and summed exactly: q = q2 2^16 + q1 2^8 + q0 with bytes in [-128, 127], and the
    sums of a group, I_j = sum q_j weight, are int32.  The rest is fp32, each operation rounded to nearest::

        t_g = I_2 2^16 + (I_1 2^8 + I_0)        or I_0 with 8 bits
        y   = ((t_0 scale_0 + t_1 scale_1) + ...) s + b,   from 0, the groups in their order

    and y is rounded to the dtype of x.  So the bits are the same on every backend, for any number of threads
    and whatever rows are beside a row.

    Args:
        x: [rows, inputs] in fp32, bf16 or fp16.
        weight: int8 [outputs, inputs], or uint8 [outputs, (inputs + 1) / 2] that packs two integers of 4 bits
            (:func:`~zokernels.quantize.pack_int4`).
        scale: [outputs, groups] in fp32, bf16 or fp16; group_size = inputs / groups, at most 131,071.
        bias: [outputs] in fp32, bf16 or fp16.
        x_bits: 24, or 8: x is rounded to 255 steps.

    Returns: [rows, outputs] in the dtype of x.  No gradient passes through.

    Raises: TypeError, ValueError: naming the argument, what was expected and what came.
    """
    y: Tensor = _quantized_linear(x, weight, scale, bias, x_bits)
    return y
