"""project: inner products of tensors with noise, in one order of summation on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..backends.sums import by_partial_sums
from ..checks import check_dist, check_places, check_scalars, check_tensors
from .arguments import Dist, as_list, device_values, places, user_operation
from .define import define


def _check_project(
    tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> None:
    check_dist("project", dist)
    check_scalars("project", "seeds", seeds, torch.int64, tensors[0].device if tensors else seeds.device)
    if tensors:
        check_tensors("project", {"tensors": tensors})
    check_places("project", [t.numel() for t in tensors], streams, offsets, "tensors")


def _fake_project(
    tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> Tensor:
    _check_project(tensors, seeds, streams, offsets, dist)
    return seeds.new_empty(seeds.shape, dtype=torch.float64)


@define(
    "project(Tensor[] tensors, Tensor seeds, int[] streams, int[] offsets, str dist) -> Tensor", _fake_project
)
def _project(
    tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> Tensor:
    _check_project(tensors, seeds, streams, offsets, dist)
    columns = select(seeds.device).project_columns()
    fill = select(seeds.device).project
    return by_partial_sums(
        lambda partial, part: fill(partial, tensors, part, streams, offsets, dist),
        columns,
        tensors,
        seeds,
        offsets,
    )


@user_operation
def project(
    tensors: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    *,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
) -> Tensor:
    """p_k = sum over ``tensors`` of <x, z_k>, float64 [K]: the adjoint of :func:`combine_`, in one read of
    the tensors.

    The sum has one order (docs/contract.md), so its bits are the same on every backend, instruction set,
    number of threads and device: chains of eight fp32 fmas, summed in float64.  Its error is near 1e-7 |x|;
    that of the products alone, fp32 but for Rademacher noise, where they are exact.

    Args:
        tensors: as ``params`` of :func:`combine_`; they are read, and may share memory.  For the adjoint of a
            masked combine, multiply them by the mask before.
        seeds: int64 [K]; z_k is the noise of seeds[k].  K = 0 is allowed.
        streams, offsets, dist: as for :func:`combine_`.  Tiles of 4096 logical indices are summed first: the
            sum of shards is that of the whole up to float64 rounding, and to the bit where shards are each
            other's neighbours in the tree of tiles (halves, quarters, ... of a tensor of 4096 * 2^m
            elements).

    Raises: as :func:`combine_`.
    """
    listed = as_list("project", "tensors", tensors)
    device = (
        listed[0].device if listed else seeds.device if isinstance(seeds, Tensor) else torch.device("cpu")
    )
    seeds = device_values("project", "seeds", seeds, torch.int64, device)
    sums: Tensor = _project(listed, seeds, *places("project", streams, offsets, len(listed)), dist)
    return sums
