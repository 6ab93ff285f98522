"""encode, decode and decode_fan_out on an NVIDIA GPU: csrc/cuda/wire_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ...wire import FORMATS
from ..terms import Terms

#: Numbers of the formats in csrc/op_args.h.
WIRES = {wire: i for i, wire in enumerate(FORMATS)}


def encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    torch.ops.zokernels_cuda.encode(out, params, WIRES[wire], offsets)


def decode(out: list[Tensor], wires: list[Tensor], wire: str, terms: Terms) -> None:
    torch.ops.zokernels_cuda.decode(out, wires, WIRES[wire], *terms.packed)


def decode_fan_out(
    plus: list[Tensor], minus: list[Tensor], wires: list[Tensor], wire: str, seed: Tensor, coeff: Tensor, terms: Terms
) -> None:
    args = WIRES[wire], seed, coeff, *terms.packed
    torch.ops.zokernels_cuda.decode_fan_out(plus, minus, wires, *args)
