"""Steps of finite differences along coordinates, in the dtype of what is stepped."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stepped(x: Tensor, step: float) -> Tensor:
    """x + ``step`` in x's dtype, to nearest; where that falls short, one or two units in the last place
    further.

    So no step is lost to rounding, as 1 + 1e-3 in bf16 would be: |stepped(x, step) - x| >= |step|.  A
    quotient divides by the step as it became."""
    target = x.double() + step
    near = target.to(x.dtype)
    limits = torch.finfo(x.dtype)
    # one to two units in the last place
    unit = limits.eps * near.double().abs().clamp(min=limits.smallest_normal)
    beyond = (near.double() + math.copysign(1, step) * unit).to(x.dtype)
    short = near.double() < target if step > 0 else near.double() > target
    return torch.where(short, beyond, near)
