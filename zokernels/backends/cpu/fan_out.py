"""fan_out on the host: the combine kernel with two more outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms
from .isa import current_isa


def fan_out(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, terms: Terms
) -> None:
    torch.ops.zokernels_cpu.fan_out(params, plus, minus, seed, coeff, *terms.packed, current_isa())
