"""combine on the host: csrc/cpu/combine.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    torch.ops.zokernels_cpu.combine(out, params, *terms.packed, current_isa())
