"""project: inner products of tensors with noise, in the order of docs/contract.md, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ..sums import TILE, fold
from .combine import CHUNK, fma
from .noise import NOISE

#: How the contract divides a tile: 32 segments of 4 rows of 16 pairs of elements.
_SHAPE = (32, 4, 16, 2)


def _in_tiles(values: Tensor, lead: int) -> Tensor:
    """``values``, which begin ``lead`` elements after a tile does, as fp32 [tiles, 32, 4, 16, 2].

    Elements of the tiles that are not in the tensor are 0.
    """
    tail = -(lead + values.numel()) % TILE
    return torch.nn.functional.pad(values.float(), (lead, tail)).view(-1, *_SHAPE)


def _sums(x: Tensor, z: Tensor) -> Tensor:
    """The sum of x * z over each tile, float64 [tiles], in the order of the contract.

    Each column of pairs of a segment is a chain of eight fp32 fmas.  Then, in float64, even and odd segments
    are summed apart, and neighbouring sums are added until one is left.
    """
    chain = torch.zeros_like(x[:, :, 0, :, 0])
    for row in range(4):
        for e in range(2):
            chain = fma(x[:, :, row, :, e], z[:, :, row, :, e], chain)
    total = torch.zeros_like(chain[:, :2], dtype=torch.float64)
    for s in range(0, 32, 2):
        total = total + chain[:, s : s + 2].double()
    return fold(total.view(-1, 32))


@implements
def project_columns() -> int:
    """How many partial sums :func:`project` writes for a tile."""
    return 1


@implements
def project(
    partial: Tensor, tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> None:
    column = 0
    for x, stream, offset in zip(tensors, streams, offsets, strict=True):
        at = 0
        while at < x.numel():  # a chunk ends at a multiple of CHUNK, and so at the end of a tile
            n = min(CHUNK - (offset + at) % CHUNK, x.numel() - at)
            lead = (offset + at) % TILE
            values = _in_tiles(x.view(-1)[at : at + n], lead)
            for k in range(seeds.numel()):
                z = NOISE[dist](seeds[k], stream, offset + at, n)
                partial[k, column : column + len(values)] = _sums(values, _in_tiles(z, lead))
            column += len(values)
            at += n
