"""encode, decode and decode_fan_out on the host: csrc/cpu/encode.cpp, and the combine kernel with another load."""

from __future__ import annotations

import torch
from torch import Tensor

from ...wire import FORMATS
from ..terms import Terms
from .isa import current_isa

#: Numbers of the formats in csrc/op_args.h.
WIRES = {wire: i for i, wire in enumerate(FORMATS)}


def encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    torch.ops.zokernels_cpu.encode(out, params, WIRES[wire], offsets, current_isa())


def decode(out: list[Tensor], wires: list[Tensor], wire: str, terms: Terms) -> None:
    torch.ops.zokernels_cpu.decode(out, wires, WIRES[wire], *terms.packed, current_isa())


def decode_fan_out(
    plus: list[Tensor], minus: list[Tensor], wires: list[Tensor], wire: str, seed: Tensor, coeff: Tensor, terms: Terms
) -> None:
    args = WIRES[wire], seed, coeff, *terms.packed, current_isa()
    torch.ops.zokernels_cpu.decode_fan_out(plus, minus, wires, *args)
