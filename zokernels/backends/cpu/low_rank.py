"""low_rank on the host: csrc/cpu/low_rank.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def low_rank(out: list[Tensor], params: list[Tensor], left: list[Tensor], right: list[Tensor], terms: Terms) -> None:
    torch.ops.zokernels_cpu.low_rank(out, params, left, right, *terms.packed, current_isa())
