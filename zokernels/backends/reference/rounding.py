"""Stochastic rounding of fp32 numbers to the dtype of a parameter, with given 16-bit fields."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY_HALF = 2.0**-14  # the smallest normal fp16


def round_stochastic(x: Tensor, u16: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` in ``dtype``, rounded away from zero with the probability that the dropped fraction is.

    ``u16``: a random field for each element, int64 in [0, 65536).

    bf16: the field is added to the 16 bits that are dropped, and the sum is truncated.  fp16: the upper 13
    bits of the field are added to the 13 bits that are dropped.  Below 2^-14 an fp16 number is subnormal and
    drops more bits than 13.  There |x| is first added to 2^-14, which moves the last bit that a subnormal
    keeps (2^-24) to the place of the last bit that a normal number keeps.  NaN, infinities and fp32 do not
    change.
    """
    if dtype is torch.float32:
        return x
    if dtype is torch.bfloat16:
        bits = (x.view(torch.int32) + u16.int()) & -65536
        rounded = bits.view(torch.float32)
    else:
        magnitude = x.abs()
        subnormal = magnitude < _TINY_HALF
        shifted = torch.where(subnormal, magnitude + _TINY_HALF, magnitude)
        bits = (shifted.view(torch.int32) + (u16 >> 3).int()) & -8192
        rounded = bits.view(torch.float32)
        rounded = torch.where(subnormal, rounded - _TINY_HALF, rounded).copysign(x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
