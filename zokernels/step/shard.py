"""Sharded parameters (``DTensor``): which elements of the logical tensor lie here, and where in it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..checks import fail

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """A box of a tensor, as kernels see it: rows of ``width`` elements.

    They begin ``length`` logical indices apart, the first of them at the logical index ``offset``.
    """

    shape: tuple[int, ...]  #: of the part that lies here
    start: tuple[int, ...]  #: its first element
    offset: int
    width: int
    length: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor of the logical shape."""
        for dim, (start, size) in enumerate(zip(self.start, self.shape, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole.contiguous()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    # Where the module was not imported there is no such tensor; importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(map(is_sharded, tensors))


def local_of(tensor: Tensor) -> Tensor:
    """The memory that lies here: the local shard, or the tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def locals_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [local_of(t) for t in tensors]


def whole_of(tensor: Tensor) -> Tensor:
    """The logical tensor.  All ranks that hold a part of it must call this together: they gather it."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]  # a DTensor's detach is a DTensor
    return whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that belongs to the local shard of ``like``, which has the same logical shape."""
    return shard_of(like).of(whole) if is_sharded(like) else whole


def full_like(tensor: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of ``value`` that is sharded as ``tensor`` is."""
    local = torch.full(local_of(tensor).shape, value, dtype=dtype, device=tensor.device)
    if not is_sharded(tensor):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed(params: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments offsets and rows of :func:`zokernels.combine_`; neither where nothing is sharded."""
    if not any_sharded(params):
        return {}
    shards = [shard_of(p) if is_sharded(p) else None for p in params]
    return {
        "offsets": [0 if s is None else s.offset for s in shards],
        "rows": [None if s is None else (s.width, s.length) for s in shards],
    }


def shard_of(tensor: DTensor) -> Shard:
    return _shard(tuple(tensor.shape), tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=4096)
def _shard(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Shard:
    # What each dimension of the mesh leaves of the tensor's dimensions, from left to right as DTensor does
    # it.
    left = [torch.arange(n) for n in shape]
    for place, at, ranks in zip(placements, mesh.get_coordinate(), mesh.mesh.shape, strict=True):
        if place.is_replicate():
            continue
        if place.is_partial():
            fail("shard", "placements", "Shard or Replicate", place)
        dim = place.dim % len(shape)
        chunk = lambda x, n: (*x.chunk(n), *[x[:0]] * n)[:n] if len(x) else (x,) * n
        pieces = chunk(left[dim], getattr(place, "split_factor", 1))
        left[dim] = torch.cat([chunk(piece, ranks)[at] for piece in pieces])
    local = tuple(len(k) for k in left)
    start = tuple(int(k[0]) if len(k) else 0 for k in left)
    if 0 in local:
        return Shard(local, start, 0, 0, 0)
    partial = [d for d, (n, m) in enumerate(zip(local, shape, strict=True)) if n != m]
    runs = all(int(k[-1]) - int(k[0]) + 1 == len(k) for k in left)
    # The shard is taken as a matrix, whose rows are the dimensions before the last one that is cut.  The rest
    # is one piece of a row.
    last = partial[-1] if partial else 0
    if not runs or (len(partial) > 1 and math.prod(local[: partial[-2]]) != 1) or len(partial) > 2:
        fail("shard", "placements", "a shard that is rows of one matrix", f"{placements} of shape {shape}")
    inner = math.prod(shape[last + 1 :])
    offset = 0
    for n, at in zip(shape, start, strict=True):
        offset = offset * n + at
    width, length = (local[last] * inner, shape[last] * inner) if shape else (1, 1)
    return Shard(local, start, offset, width, length)


def peers_of(tensor: DTensor) -> set[int]:
    """The ranks between which a tensor is split, this one included.  They must perturb it alike."""
    mesh, at = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    found = mesh.mesh
    for dim in reversed(range(mesh.ndim)):
        if tensor.placements[dim].is_replicate():
            assert at is not None  # this rank holds a part
            found = found.select(dim, at[dim])
    return set(found.flatten().tolist())
