"""Global memory in which every access is checked: bounds, alignment, what was written, what may be written."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .parser import PtxError

_ALLOCATED, _WRITTEN, _WRITABLE = 1, 2, 4
_GAP = 1 << 16  #: bytes between allocations, which nothing may touch
_ALIGN = 256


@dataclass
class Traffic:
    """What warps ask of memory: a request is one instruction of one warp, a sector 32 bytes."""

    requests: int = 0
    sectors: int = 0
    bytes: int = 0
    distinct: int = 0  #: bytes of the sectors that were touched at all: what a cache that loses nothing passes on


class Memory:
    """``size`` bytes for allocations, each in a gap of its own and at its own alignment."""

    def __init__(self, size: int, tensors: int) -> None:
        total = -(-(size + (tensors + 1) * (_GAP + 2 * _ALIGN)) // _ALIGN) * _ALIGN
        raw = np.zeros(total + _ALIGN, np.uint8)
        skipped = -raw.ctypes.data % _ALIGN
        self.bytes = raw[skipped : skipped + total]
        self.base = self.bytes.ctypes.data
        self._tensor = torch.from_numpy(self.bytes)
        self._state = np.zeros(total, np.uint8)
        self._end = _GAP
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)  #: by "ld" and "st"
        self._touched = {kind: np.zeros(total // 32, bool) for kind in ("ld", "st")}

    def place(self, tensor: Tensor, *, written: bool, writable: bool) -> Tensor:
        """A copy at the same alignment.  A tensor placed twice must be placed as one (see ``device``)."""
        if not tensor.is_contiguous():
            raise PtxError(f"expected contiguous tensors, got strides {tensor.stride()}")
        size = tensor.numel() * tensor.itemsize
        begin = -(-self._end // _ALIGN) * _ALIGN + tensor.data_ptr() % _ALIGN
        self._end = begin + size + _GAP
        if self._end > len(self.bytes):
            raise PtxError(f"no room for {size} bytes more")
        copy = self._tensor[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        self._state[begin : begin + size] = _ALLOCATED | _WRITTEN * written | _WRITABLE * writable
        return copy

    def _places(self, what: object, addresses: np.ndarray, size: int) -> np.ndarray:
        """Numbers of ``size`` bytes from the beginning of this memory."""
        at = (addresses - np.uint64(self.base)).astype(np.int64)
        if (at % size).any():
            raise PtxError(f"misaligned access: {what}, {int(addresses[(at % size != 0).argmax()]):#x}")
        outside = (at < 0) | (at + size > len(self.bytes))
        if not outside.any():
            outside = (self._state.reshape(-1, size)[at // size] & _ALLOCATED == 0).any(1)
        if outside.any():
            where = int(addresses[outside.argmax()])
            raise PtxError(f"access out of bounds: {what}, {size} bytes at {where:#x}")
        return at // size

    def _count(self, kind: str, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        traffic = self.traffic[kind]
        warps, sectors = lanes // 32, (addresses >> np.uint64(5)).astype(np.int64)
        traffic.requests += len(np.unique(warps))
        traffic.sectors += len(np.unique(np.stack([warps, sectors]), axis=1).T)
        traffic.bytes += size * len(addresses)
        # An access is aligned to its size, so that it lies in one sector.
        own = np.unique((addresses - np.uint64(self.base)) >> np.uint64(5))
        traffic.distinct += 32 * int((~self._touched[kind][own]).sum())
        self._touched[kind][own] = True

    def load(self, what: object, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """uint8 [accesses, size]."""
        places = self._places(what, addresses, size)
        unwritten = (self._state.reshape(-1, size)[places] & _WRITTEN == 0).any(1)
        if unwritten.any():
            raise PtxError(f"read of memory that nobody wrote: {what}, {int(addresses[unwritten.argmax()]):#x}")
        self._count("ld", addresses, size, lanes)
        return self.bytes.reshape(-1, size)[places]

    def store(self, what: object, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """Of ``values`` uint8 [accesses, size]."""
        size = values.shape[1]
        places = self._places(what, addresses, size)
        states = self._state.reshape(-1, size)
        if (states[places] & _WRITABLE == 0).any():
            raise PtxError(f"write to memory that is only read: {what}")
        self._count("st", addresses, size, lanes)
        states[places] |= _WRITTEN
        self.bytes.reshape(-1, size)[places] = values

    def add(self, what: object, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """Atomic integer addition; several of ``addresses`` may be equal."""
        size = values.dtype.itemsize
        places = self._places(what, addresses, size)
        if (self._state.reshape(-1, size)[places] != _ALLOCATED | _WRITTEN | _WRITABLE).any():
            raise PtxError(f"atomic access to memory that is unwritten or only read: {what}")
        self._count("st", addresses, size, lanes)
        np.add.at(self.bytes.view(values.dtype), places, values)
