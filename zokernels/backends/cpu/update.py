"""update on the host: csrc/cpu/update.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def update(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, terms: Terms
) -> None:
    torch.ops.zokernels_cpu.update(params, first, second, rule, hyper, *terms.packed, current_isa())
