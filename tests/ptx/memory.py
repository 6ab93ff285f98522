"""Memory in which every access is checked: bounds, alignment, what was written, what may be written, and by whom."""

from __future__ import annotations

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


class _Users:
    """Who has used each byte since the last barrier: what one thread writes no other may read or write."""

    _SEVERAL, _ATOMIC = -1, -2  # 0: nobody, n + 1: thread n

    def __init__(self, size: int) -> None:
        self._writer, self._reader = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def _check(self, what: object, before: np.ndarray, own: np.ndarray | int) -> None:
        if np.any((before != 0) & (before != own)):
            raise PtxError(f"race: {what}, where another thread is, without a barrier between")

    def read(self, what: object, places: np.ndarray, size: int, threads: np.ndarray) -> None:
        """``places``: numbers of ``size`` bytes each."""
        own = threads[:, None].astype(np.int32) + 1
        self._check(what, self._writer.reshape(-1, size)[places], own)
        reader = self._reader.reshape(-1, size)
        before = reader[places]
        reader[places] = own
        row, column = ((reader[places] != own) | ((before != 0) & (before != own))).nonzero()
        reader[places[row], column] = self._SEVERAL

    def write(self, what: object, places: np.ndarray, size: int, threads: np.ndarray) -> None:
        own = threads[:, None].astype(np.int32) + 1
        writer = self._writer.reshape(-1, size)
        self._check(what, writer[places], own)
        self._check(what, self._reader.reshape(-1, size)[places], own)
        writer[places] = own
        self._check(what, writer[places], own)  # two threads at one place

    def change(self, what: object, places: np.ndarray, size: int) -> None:
        """Atomically, by any threads."""
        for users in (self._writer, self._reader):
            self._check(what, users.reshape(-1, size)[places], self._ATOMIC)
            users.reshape(-1, size)[places] = self._ATOMIC

    def forget(self, row: int, rows: np.ndarray) -> None:
        """Of rows of ``row`` bytes those with numbers ``rows``."""
        for users in (self._writer, self._reader):
            users.reshape(-1, row)[rows] = 0


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
        self._traffic = {"ld": Traffic(), "st": Traffic()}
        self._touched = {kind: np.zeros(total // 32, bool) for kind in ("ld", "st")}
        self.launch()

    def launch(self) -> None:
        """A new one, which begins when all threads before have ended."""
        self._users = _Users(len(self.bytes))

    def holds(self, tensor: Tensor) -> bool:
        return self.base <= tensor.data_ptr() < self.base + len(self.bytes)

    def note_written(self, tensor: Tensor) -> None:
        """Of a tensor placed here that torch has written."""
        begin = tensor.data_ptr() - self.base
        self._state[begin : begin + tensor.numel() * tensor.itemsize] |= _WRITTEN

    def place(self, tensor: Tensor, *, written: bool, writable: bool) -> Tensor:
        """A copy at the same alignment.  A tensor placed twice must be placed as one (see ``call``)."""
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
        """``lanes``: the threads' numbers, which rise."""
        traffic, touched = self._traffic[kind], self._touched[kind]
        # An access is aligned to its size, so that it lies in one sector.
        warps, sectors = lanes // 32, ((addresses - np.uint64(self.base)) >> np.uint64(5)).astype(np.int64)
        traffic.requests += 1 + np.count_nonzero(np.diff(warps))
        traffic.sectors += len(np.unique(warps * len(touched) + sectors))
        traffic.bytes += size * len(addresses)
        touched[sectors] = True

    @property
    def traffic(self) -> dict[str, Traffic]:
        """By "ld" and "st"."""
        for kind, traffic in self._traffic.items():
            traffic.distinct = 32 * int(self._touched[kind].sum())
        return self._traffic

    def load(self, what: object, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """uint8 [accesses, size]."""
        places = self._places(what, addresses, size)
        unwritten = (self._state.reshape(-1, size)[places] & _WRITTEN == 0).any(1)
        if unwritten.any():
            raise PtxError(f"read of memory that nobody wrote: {what}, {int(addresses[unwritten.argmax()]):#x}")
        self._users.read(what, places, size, lanes)
        self._count("ld", addresses, size, lanes)
        return self.bytes.reshape(-1, size)[places]

    def store(self, what: object, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """Of ``values`` uint8 [accesses, size]."""
        size = values.shape[1]
        places = self._places(what, addresses, size)
        states = self._state.reshape(-1, size)
        if (states[places] & _WRITABLE == 0).any():
            raise PtxError(f"write to memory that is only read: {what}")
        self._users.write(what, places, size, lanes)
        self._count("st", addresses, size, lanes)
        states[places] |= _WRITTEN
        self.bytes.reshape(-1, size)[places] = values

    def add(self, what: object, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """Atomic integer addition; several of ``addresses`` may be equal."""
        size = values.dtype.itemsize
        places = self._places(what, addresses, size)
        if (self._state.reshape(-1, size)[places] != _ALLOCATED | _WRITTEN | _WRITABLE).any():
            raise PtxError(f"atomic access to memory that is unwritten or only read: {what}")
        self._users.change(what, places, size)
        self._count("st", addresses, size, lanes)
        np.add.at(self.bytes.view(values.dtype), places, values)


class Shared:
    """The shared memory of several blocks, of ``size`` bytes each, from address ``BASE`` on."""

    BASE = 1024  #: so that 0 is no address

    def __init__(self, blocks: int, size: int) -> None:
        self._size, self._row = size, max(16, -(-size // 16) * 16)
        self.bytes = np.zeros(blocks * self._row, np.uint8)
        self._written = np.zeros(blocks * self._row, bool)
        self._users = _Users(blocks * self._row)

    def _places(self, what: object, addresses: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
        at = addresses.astype(np.int64) - self.BASE
        if (at % size).any():
            raise PtxError(f"misaligned access: {what}, {int(addresses[(at % size != 0).argmax()]):#x}")
        outside = (at < 0) | (at + size > self._size)
        if outside.any():
            raise PtxError(f"access out of bounds: {what}, {size} bytes at {int(addresses[outside.argmax()]):#x}")
        return (blocks * self._row + at) // size

    def load(
        self, what: object, addresses: np.ndarray, size: int, blocks: np.ndarray, threads: np.ndarray
    ) -> np.ndarray:
        """uint8 [accesses, size]."""
        places = self._places(what, addresses, size, blocks)
        if not self._written.reshape(-1, size)[places].all():
            raise PtxError(f"read of memory that nobody wrote: {what}")
        self._users.read(what, places, size, threads)
        return self.bytes.reshape(-1, size)[places]

    def store(
        self, what: object, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray, threads: np.ndarray
    ) -> None:
        """Of ``values`` uint8 [accesses, size]."""
        size = values.shape[1]
        places = self._places(what, addresses, size, blocks)
        self._users.write(what, places, size, threads)
        self._written.reshape(-1, size)[places] = True
        self.bytes.reshape(-1, size)[places] = values

    def barrier(self, blocks: np.ndarray) -> None:
        """Of ``blocks``: what their threads did is over."""
        self._users.forget(self._row, blocks)
