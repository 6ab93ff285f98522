"""fp32 to a parameter's dtype: to nearest even, or stochastically with given 16-bit fields."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY_HALF = 2.0**-14  # the smallest normal fp16


def round_stochastic(x: Tensor, u16: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 ``x`` away from zero with probability equal to the dropped fraction; ``u16``: int64 in [0,
    65536).

    bf16 adds the field to the 16 dropped bits and truncates; fp16 adds the top 13 bits of it to the 13
    dropped ones. Below 2^-14 an fp16 drops more bits than 13: there |x| is first added to 2^-14, which puts
    the last kept bit of a subnormal (2^-24) in the place of the last kept bit of a normal.  NaN and
    infinities pass; fp32 never moves."""
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
