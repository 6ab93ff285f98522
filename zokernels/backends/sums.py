"""Inner products with noise in one order of summation on every backend: ``project`` (docs/contract.md).

Floating-point sums depend on their order, so the contract fixes one.  A kernel sums short runs of elements,
and writes these partial sums in float64 in the order of the elements.  :func:`fold` adds neighbours until one
sum is left, on every device alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Elements that are summed together, from a multiple of as many: a tile of Rademacher noise (``contract``).
TILE = 4096
#: The largest tensor of partial sums, in bytes: more seeds than fit into it take several passes.
LIMIT = 1 << 29


def tiles(numel: int, offset: int) -> int:
    """How many tiles ``numel`` elements from logical index ``offset`` touch."""
    return (offset + numel - 1) // TILE - offset // TILE + 1 if numel else 0


def fold(partial: Tensor) -> Tensor:
    """The sums of the rows of [K, n], as [K]: neighbours are added, then their sums, until one is left.

    The last of an odd number is added to a zero, which changes no bit of it.
    """
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
    """The inner products float64 [K] of ``tensors`` with the noise of each seed, by a backend's ``kernel``.

    Args:
        kernel: fills ``partial``, float64 [seeds, columns of all tiles], for some of the seeds.
        columns: how many partial sums the kernel writes for a tile.
        limit: the largest ``partial`` in bytes.  Each pass takes as many seeds as fit, and at least one.
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
