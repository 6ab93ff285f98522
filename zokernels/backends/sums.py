"""Inner products with noise in one order of summation on every backend: ``project`` (docs/contract.md).

A kernel gives partial sums, float64, in the order of elements; :func:`fold` adds neighbours until one is
left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Logical indices whose sum has one order, aligned: a Rademacher tile.
TILE = 4096
#: Bytes of partial sums at a time.
LIMIT = 1 << 29


def tiles(numel: int, offset: int) -> int:
    """Tiles that ``numel`` elements from logical index ``offset`` touch."""
    return (offset + numel - 1) // TILE - offset // TILE + 1 if numel else 0


def fold(partial: Tensor) -> Tensor:
    """[K, n] to [K]: neighbours are added, then the sums' neighbours; the last of an odd number waits."""
    while partial.shape[1] > 1:
        if partial.shape[1] % 2:
            partial = torch.nn.functional.pad(partial, (0, 1))
        partial = partial[:, 0::2] + partial[:, 1::2]
    return partial[:, 0] if partial.shape[1] else partial.new_zeros(partial.shape[0])


def by_partial_sums(
    kernel: Callable[[Tensor, Tensor], None],
    columns: int,
    tensors: Sequence[Tensor],
    seeds: Tensor,
    offsets: list[int],
    limit: int = LIMIT,
) -> Tensor:
    """project as ``kernel(partial [K, columns of all tiles], seeds)`` and a fold.

    ``limit``: bytes of ``partial``.  More seeds than fit take another pass; each pass takes at least one.
    """
    width = columns * sum(tiles(t.numel(), o) for t, o in zip(tensors, offsets, strict=True))
    if not seeds.numel() or not width:
        return seeds.new_zeros(seeds.numel(), dtype=torch.float64)
    found = []
    for part in seeds.split(max(1, limit // (8 * width))):
        partial = torch.empty((part.numel(), width), dtype=torch.float64, device=seeds.device)
        kernel(partial, part)
        found.append(fold(partial))
    return torch.cat(found)
