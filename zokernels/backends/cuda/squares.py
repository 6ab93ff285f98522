"""squares on an NVIDIA GPU: csrc/cuda/squares_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import SQUARE_SCALE

#: Partial sums of a direction.  Each thread adds once, for 64 elements: with one sum they would queue at one address.
COLUMNS = 8192


def squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    if dist == "rademacher":  # every square is 1
        return torch.full_like(seeds, sum(sizes) * int(SQUARE_SCALE))
    partial = torch.zeros((seeds.numel(), COLUMNS), dtype=torch.int64, device=seeds.device)
    torch.ops.zokernels_cuda.squares(partial, seeds, sizes, streams, offsets)
    return partial.sum(1)
