"""quantized_linear: y = x W^T + b of integer weights, exact sums of integers and then fp32 in one order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements


def quantized_rows(x: Tensor, x_bits: int) -> tuple[Tensor, Tensor]:
    """The integers of each row, int64, and its step, fp32 [rows, 1]."""
    x = x.float()
    most = x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
    finite = most.isfinite()  # a NaN is the largest of its row
    if x_bits == 8:
        step = most / 127
        step = torch.where(step == 0, 1.0, step)
    else:
        exponent = (most.view(torch.int32) >> 23).sub(21).clamp(min=1)
        step = (exponent << 23).view(torch.float32)
    q = torch.where(finite, x / torch.where(finite, step, 1.0), 0.0).round()
    q = q.clamp(-127, 127) if x_bits == 8 else q
    return q.long(), torch.where(finite, step, torch.nan)


def unpacked(weight: Tensor) -> Tensor:
    """int8 [outputs, 2 bytes] of uint8 [outputs, bytes]: the low half of a byte, then the high one."""
    halves = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)
    return (halves.view(torch.int8) ^ 8) - 8  # bit 3 is the sign


@implements
def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, x_bits: int) -> Tensor:
    (rows, inputs), (outputs, groups) = x.shape, scale.shape
    q, step = quantized_rows(x, x_bits)
    integers = unpacked(weight)[:, :inputs] if weight.dtype is torch.uint8 else weight
    y = torch.zeros(rows, outputs, dtype=torch.float32, device=x.device)
    for g in range(groups if inputs else 0):
        group = slice(g * (inputs // groups), (g + 1) * (inputs // groups))
        rest, total = q[:, group], torch.zeros_like(y)
        for limb in range(x_bits // 8):
            low = ((rest + 128) & 255) - 128
            rest = (rest - low) >> 8
            # Products of integers below 2^53, which float64 sums exactly; a GPU has none of int64.
            total += (low.double() @ integers[:, group].double().t()).float() * 2.0 ** (8 * limb)
        y += total * scale[:, g].float()
    y *= step
    return (y if bias is None else y + bias.float()).to(x.dtype)
