"""Memory for perturbed copies: arenas that hold one block at a time, with the views of each block kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from sys import getrefcount

import torch
from torch import Tensor

from ..ops.arguments import OneMemory
from .guards import is_capturing

#: Bytes between the starts of two tensors of an arena: a cache line pair, and the alignment of cudaMalloc.
ALIGN = 256

_use_count: Callable[[int], int] = torch._C._storage_Use_Count


def arena_numel(tensors: Sequence[Tensor]) -> int:
    """The elements of an arena that holds copies of ``tensors``, which share a dtype."""
    unit = ALIGN // tensors[0].element_size()
    return sum(-(-t.numel() // unit) * unit for t in tensors)


def alias(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A leaf over the same memory, with the same counter of versions.

    ``detach().requires_grad_()`` is the same, but is refused inside the transforms of torch.func.
    """
    made: Tensor = Tensor._make_subclass(Tensor, tensor, requires_grad)
    return made


class Views:
    """Tensors of an arena, one for each of ``tensors``."""

    __slots__ = ("_copies", "_grad", "out", "pointers")

    def __init__(self, data: Tensor, tensors: Sequence[Tensor]) -> None:
        unit, at = ALIGN // tensors[0].element_size(), 0
        out: list[Tensor] = []
        for t in tensors:
            out.append(data.as_strided(t.shape, t.stride(), at))
            at += -(-t.numel() // unit) * unit
        self.out = OneMemory(out, data)
        self.pointers = [c.data_ptr() for c in self.out]
        self._grad = [t.requires_grad for t in tensors]
        self._copies: list[Tensor] = []

    @property
    def copies(self) -> list[Tensor]:
        """What functions are given in the place of parameters.

        They require grad where the parameters do, because matmul picks its kernel by that.
        """
        if not self._copies:
            self._copies = [alias(c, grad) for c, grad in zip(self.out, self._grad, strict=True)]
        return self._copies

    def idle(self) -> tuple[bool, int]:
        """Whether nobody else has the copies, and how many tensors there are."""
        if not self._copies:
            return True, len(self.out)
        return set(map(getrefcount, self._copies)) == {_ALONE}, len(self.out) + len(self._copies)


class Arena:
    """Memory of one dtype on one device.

    ``data`` and all views share one version counter, by which writes of others are noticed.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, stream: int | None) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written in later, ordinary steps
            self.data = torch.empty(numel, dtype=dtype, device=device)
        self.stream = stream
        self._storage = self.data.untyped_storage()
        self._views: dict[Hashable, Views] = {}
        self._empty_count = _use_count(self._storage._cdata)

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes()

    def serves(self, numel: int, dtype: torch.dtype, device: torch.device, stream: int | None) -> bool:
        """Whether tensors of so many elements find room here."""
        data = self.data
        alike = data.dtype is dtype and data.device == device and self.stream == stream
        return alike and data.numel() >= numel

    def views(self, key: Hashable, tensors: Sequence[Tensor]) -> Views:
        """Uninitialised tensors like ``tensors``, which share the arena's dtype and device.

        They begin at the beginning of the arena.  Those of a ``key`` are made once.
        """
        found = self._views.get(key)
        if found is None:
            if sum(len(views.out) for views in self._views.values()) + len(tensors) > _MOST_VIEWS:
                self._views.clear()  # of blocks that there are no more, or of other subsets of them
            with torch.no_grad(), torch.inference_mode(False):
                found = self._views[key] = Views(self.data, tensors)
        return found

    def idle(self, opened: int = 0) -> bool:
        """Whether nothing else refers to the memory: no view, numpy array, DLPack capsule or autograd graph.

        ``opened``: the number of parameters that have it.
        """
        expected = self._empty_count + opened
        for views in self._views.values():
            free, count = views.idle()
            if not free:
                return False
            expected += count
        return _use_count(self._storage._cdata) == expected


#: Tensors that an arena keeps; one of its blocks may have more.
_MOST_VIEWS = 4096
#: What getrefcount says in :meth:`Views.idle` of an object that one list holds.
_ALONE = next(map(getrefcount, [object()]))


class ScratchPool:
    """Arenas that nobody uses.

    An arena that something still refers to never comes back: it dies with its last view.  On CUDA an arena
    serves the stream that it was made for alone, as torch's caching allocator does it, and what is captured
    in a CUDA graph gets memory of the graph's pool, which stays there."""

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._taken: set[Arena] = set()

    def take(self, numel: int, like: Tensor, last: Arena | None = None) -> Arena:
        """An arena of ``numel`` elements or more, for tensors of the dtype and device of ``like``.

        ``last``: the one that is taken if it is here: its views are made, and its addresses known.
        """
        dtype, device, stream = like.dtype, like.device, None
        if like.is_cuda:
            if is_capturing([device]):
                # it is never among the taken, and does not come back
                return Arena(numel, dtype, device, None)
            stream = torch.cuda.current_stream(device).cuda_stream
        if last is not None and last in self._free and last.serves(numel, dtype, device, stream):
            self._free.remove(last)
            self._taken.add(last)
            return last
        alike = [
            a for a in self._free if a.data.dtype is dtype and a.data.device == device and a.stream == stream
        ]
        fit = [a for a in alike if a.data.numel() >= numel]
        if not fit:
            self._free = [a for a in self._free if a not in alike]
            del alike  # too small: freed before a larger one is allocated
            arena = Arena(numel, dtype, device, stream)
        else:
            arena = min(fit, key=lambda a: a.data.numel())
            self._free = [a for a in self._free if a is not arena]
        self._taken.add(arena)
        return arena

    def give_back(self, arena: Arena) -> None:
        if arena in self._taken:
            self._taken.remove(arena)
            if arena.idle():
                self._free.append(arena)

    def addresses(self) -> set[int]:
        """Where the arenas begin."""
        return {a.data.untyped_storage().data_ptr() for a in (*self._taken, *self._free)}

    def give_all_back(self) -> None:
        for arena in list(self._taken):
            self.give_back(arena)

    def nbytes(self) -> int:
        """Bytes that are held or in use."""
        return sum(a.nbytes for a in (*self._taken, *self._free))
