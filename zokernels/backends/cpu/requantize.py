"""requantize on the host: the combine kernel over int8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def requantize(out: list[Tensor], params: list[Tensor], low: int, high: int, terms: Terms) -> None:
    torch.ops.zokernels_cpu.requantize(out, params, low, high, *terms.packed, current_isa())
