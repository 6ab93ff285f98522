"""squares on the host: csrc/cpu/squares.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS
from .isa import current_isa


def squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    sums: Tensor = torch.ops.zokernels_cpu.squares(seeds, sizes, streams, offsets, DISTS[dist], current_isa())
    return sums
