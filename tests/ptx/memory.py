"""Memory in which every access is checked: bounds, alignment, what was written, what may be written, and
by whom.
"""

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
    #: bytes of the sectors that were touched at all: what a cache that loses nothing passes on
    distinct: int = 0


class Threads:
    """Who accesses memory: threads of a grid, and how many barriers their blocks have passed."""

    def __init__(self, numbers: np.ndarray, threads: int, barriers: np.ndarray) -> None:
        self.numbers = numbers  #: in the grid; they rise
        block, own = np.divmod(numbers, threads)
        #: In one number, for ``_Users``.
        self.codes = (block.astype(np.int64) + 1) << _BLOCK | barriers.astype(np.int64) << _BARRIER | own + 1


_BLOCK, _BARRIER, _THREAD = 28, 12, (1 << 12) - 1
_SEVERAL = _THREAD  # of the threads of a block
_BLOCKS, _ATOMIC = -1, -2  # several blocks; any threads, by atomic additions


class _Users:
    """Who has used each byte: what one thread writes no other may read or write, unless a barrier lies
    between.

    A barrier is one of a block: it orders what the block's threads do, not what other blocks do.
    """

    def __init__(self, size: int) -> None:
        self._writer, self._reader = np.zeros(size, np.int64), np.zeros(size, np.int64)  # 0: nobody

    def _conflict(self, before: np.ndarray, own: np.ndarray) -> np.ndarray:
        other = (before & _THREAD) != (own & _THREAD)
        since = (before >> _BARRIER) >= (own >> _BARRIER)
        return (before != 0) & ((before >> _BLOCK != own >> _BLOCK) | other & since)

    def _check(self, what: object, wrong: np.ndarray) -> None:
        if wrong.any():
            raise PtxError(f"race: {what}, where another thread is, without a barrier between")

    def _put(self, users: np.ndarray, places: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Makes them users; where several do so at once, the place belongs to several: those."""
        users[places] = own
        several = users[places] != own
        if several.any():
            row, column = several.nonzero()
            at, who = places[row], own[row, np.minimum(column, own.shape[1] - 1)]
            blocks = users[at, column] >> _BLOCK != who >> _BLOCK
            users[at, column] = who | _SEVERAL
            users[at[blocks], column[blocks]] = _BLOCKS
        return several

    def read(self, what: object, places: np.ndarray, size: int, threads: Threads) -> None:
        """``places``: numbers of ``size`` bytes each."""
        own = threads.codes[:, None]
        self._check(what, self._conflict(self._writer.reshape(-1, size)[places], own))
        reader = self._reader.reshape(-1, size)
        before = reader[places]
        again = self._conflict(before, own)
        if again.any():
            own = np.where(again, np.where(before >> _BLOCK == own >> _BLOCK, own | _SEVERAL, _BLOCKS), own)
        self._put(reader, places, own)

    def write(self, what: object, places: np.ndarray, size: int, threads: Threads, *, alike: bool) -> None:
        """``alike``: those that write to one place at once write the same."""
        own = threads.codes[:, None]
        writer = self._writer.reshape(-1, size)
        self._check(what, self._conflict(writer[places], own))
        self._check(what, self._conflict(self._reader.reshape(-1, size)[places], own))
        several = self._put(writer, places, own)
        self._check(what, several & (not alike))

    def change(self, what: object, places: np.ndarray, size: int) -> None:
        """Atomically, by any threads."""
        for users in (self._writer, self._reader):
            before = users.reshape(-1, size)[places]
            self._check(what, (before != 0) & (before != _ATOMIC))
            users.reshape(-1, size)[places] = _ATOMIC


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

    def _count(self, kind: str, addresses: np.ndarray, size: int, threads: Threads) -> None:
        traffic, touched = self._traffic[kind], self._touched[kind]
        # An access is aligned to its size, so that it lies in one sector.
        warps, sectors = (
            threads.numbers // 32,
            ((addresses - np.uint64(self.base)) >> np.uint64(5)).astype(np.int64),
        )
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

    def load(self, what: object, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        """uint8 [accesses, size]."""
        places = self._places(what, addresses, size)
        unwritten = (self._state.reshape(-1, size)[places] & _WRITTEN == 0).any(1)
        if unwritten.any():
            raise PtxError(
                f"read of memory that nobody wrote: {what}, {int(addresses[unwritten.argmax()]):#x}"
            )
        self._users.read(what, places, size, threads)
        self._count("ld", addresses, size, threads)
        return self.bytes.reshape(-1, size)[places]

    def store(self, what: object, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Of ``values`` uint8 [accesses, size]."""
        size = values.shape[1]
        places = self._places(what, addresses, size)
        states = self._state.reshape(-1, size)
        if (states[places] & _WRITABLE == 0).any():
            raise PtxError(f"write to memory that is only read: {what}")
        self._users.write(what, places, size, threads, alike=False)
        self._count("st", addresses, size, threads)
        states[places] |= _WRITTEN
        self.bytes.reshape(-1, size)[places] = values

    def add(self, what: object, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Atomic integer addition; several of ``addresses`` may be equal."""
        size = values.dtype.itemsize
        places = self._places(what, addresses, size)
        if (self._state.reshape(-1, size)[places] != _ALLOCATED | _WRITTEN | _WRITABLE).any():
            raise PtxError(f"atomic access to memory that is unwritten or only read: {what}")
        self._users.change(what, places, size)
        self._count("st", addresses, size, threads)
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
            raise PtxError(
                f"access out of bounds: {what}, {size} bytes at {int(addresses[outside.argmax()]):#x}"
            )
        return (blocks * self._row + at) // size

    def load(
        self, what: object, addresses: np.ndarray, size: int, blocks: np.ndarray, threads: Threads
    ) -> np.ndarray:
        """uint8 [accesses, size]; ``blocks``: which of these each access is of."""
        places = self._places(what, addresses, size, blocks)
        if not self._written.reshape(-1, size)[places].all():
            raise PtxError(f"read of memory that nobody wrote: {what}")
        self._users.read(what, places, size, threads)
        return self.bytes.reshape(-1, size)[places]

    def store(
        self, what: object, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray, threads: Threads
    ) -> None:
        """Of ``values`` uint8 [accesses, size].

        Threads that hold the same number may write it to one place.
        """
        size = values.shape[1]
        places = self._places(what, addresses, size, blocks)
        self._written.reshape(-1, size)[places] = True
        stored = self.bytes.reshape(-1, size)
        stored[places] = values
        self._users.write(what, places, size, threads, alike=np.array_equal(stored[places], values))
