"""project: inner products of tensors with noise, in the order of docs/contract.md, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ..sums import TILE, fold
from .combine import CHUNK, fma
from .noise import NOISE

#: A tile's segments of four rows of sixteen pairs.
_SHAPE = (32, 4, 16, 2)


def _in_tiles(values: Tensor, lead: int) -> Tensor:
    """fp32 [tiles, 32, 4, 16, 2]; zeros where the tensor has no elements."""
    tail = -(lead + values.numel()) % TILE
    return torch.nn.functional.pad(values.float(), (lead, tail)).view(-1, *_SHAPE)


def _sums(x: Tensor, z: Tensor) -> Tensor:
    """float64 [tiles], the sum of each."""
    chain = torch.zeros_like(x[:, :, 0, :, 0])
    for row in range(4):
        for e in range(2):
            chain = fma(x[:, :, row, :, e], z[:, :, row, :, e], chain)
    total = torch.zeros_like(chain[:, :2], dtype=torch.float64)
    for s in range(0, 32, 2):  # even and odd segments apart
        total = total + chain[:, s : s + 2].double()
    return fold(total.view(-1, 32))


@implements
def project_columns() -> int:
    """Sums of a tile in ``partial``."""
    return 1


@implements
def project(
    partial: Tensor, tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> None:
    column = 0
    for x, stream, offset in zip(tensors, streams, offsets, strict=True):
        at = 0
        while at < x.numel():  # up to a multiple of CHUNK, which is one of TILE
            n = min(CHUNK - (offset + at) % CHUNK, x.numel() - at)
            lead = (offset + at) % TILE
            values = _in_tiles(x.view(-1)[at : at + n], lead)
            for k in range(seeds.numel()):
                z = NOISE[dist](seeds[k], stream, offset + at, n)
                partial[k, column : column + len(values)] = _sums(values, _in_tiles(z, lead))
            column += len(values)
            at += n
