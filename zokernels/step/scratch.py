"""Memory for perturbed copies: a flat arena for each call, used again when nothing else refers to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes between the starts of two tensors of an arena: a cache line pair, and the alignment of cudaMalloc.
ALIGN = 256

_use_count = getattr(torch._C, "_storage_Use_Count", None)


def arena_numel(tensors: Sequence[Tensor]) -> int:
    """The elements of an arena that holds copies of ``tensors``, which share a dtype."""
    unit = ALIGN // tensors[0].element_size()
    return sum(-(-t.numel() // unit) * unit for t in tensors)


class _Arena:
    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written in later, ordinary steps
            self.data = torch.empty(numel, dtype=dtype, device=device)
        self.storage = self.data.untyped_storage()
        self._idle_count = self._count()

    def _count(self) -> int:
        return _use_count(self.storage._cdata) if _use_count else -1

    def idle(self) -> bool:
        """Whether no view holds the memory, not even a numpy array, a DLPack capsule or an autograd graph."""
        return _use_count is not None and self._count() == self._idle_count


class ScratchPool:
    """Arenas by device and dtype.

    An arena with live views is never handed out: it leaves the pool, and dies with its last view.  On CUDA
    every call asks torch's caching allocator instead, which already recycles memory by CUDA stream.  On the
    CPU such an allocation would fault in every page of every large weight again at each step.
    """

    def __init__(self) -> None:
        self._arenas: dict[tuple[torch.device, torch.dtype], list[_Arena]] = {}

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors of the shapes of ``tensors``, which share device and dtype."""
        device, dtype, numel = tensors[0].device, tensors[0].dtype, arena_numel(tensors)
        arena = self._arena_for(numel, dtype, device)
        unit, at, out = ALIGN // tensors[0].element_size(), 0, []
        for t in tensors:
            out.append(arena.data.as_strided(t.shape, t.stride(), at))
            at += -(-t.numel() // unit) * unit
        return out

    def _arena_for(self, numel: int, dtype: torch.dtype, device: torch.device) -> _Arena:
        if device.type != "cpu":
            return _Arena(numel, dtype, device)
        arenas = self._arenas.setdefault((device, dtype), [])
        if len(arenas) == 1 and arenas[0].data.numel() >= numel and arenas[0].idle():
            return arenas[0]  # the usual case
        busy = [a for a in arenas if not a.idle()]
        idle = [a for a in arenas if a.idle()]
        fit = min((a for a in idle if a.data.numel() >= numel), key=lambda a: a.data.numel(), default=None)
        arenas.clear()
        del idle  # too small or surplus: freed before a larger one is allocated
        if fit is None:
            fit = _Arena(numel, dtype, device)
        arenas.extend((*busy, fit))
        return fit

    def nbytes(self) -> int:
        """Bytes held for later calls, views alive included."""
        return sum(a.storage.nbytes() for arenas in self._arenas.values() for a in arenas)
