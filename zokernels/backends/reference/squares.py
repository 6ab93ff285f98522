"""squares: sum of z^2 over the elements of several tensors, exact in any order, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import SQUARE_SCALE
from ..registry import implements
from .combine import CHUNK
from .noise import NOISE


@implements
def squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    total = torch.zeros_like(seeds)
    for size, stream, offset in zip(sizes, streams, offsets, strict=True):
        for at in range(0, size, CHUNK):
            for k in range(seeds.numel()):
                z = NOISE[dist](seeds[k], stream, offset + at, min(CHUNK, size - at))
                total[k] += (z * z * SQUARE_SCALE).round().long().sum()
    return total
