"""Where blocks live, and what carries them from there to the slots of a device.

A storage is made before the model changes: whatever there may be too little of is allocated then.  Its
``mover()`` fills it with the weights, and gives what moves them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import fail
from .blocks import PAGE, Block, round_up
from .disk import check_room
from .encoder import Encoder
from .gathered import Group, PartFiles, Parts, SharedFiles, Slices
from .memory import mapping
from .movers import ByStreams, ByThreads, Carrier, FileStore, HostMemory, Mover, Slot, Staged
from .run import Run

#: Gives the bytes of a block as it is at first.
Packed = Callable[[Block], Tensor]


def _buffers(carrier: Carrier) -> list[Slot]:
    """Slots of the size of the largest block, or of its wire bytes where those cross the link."""
    slots = [Slot(i, torch.empty(0)) for i in range(min(carrier.slots, len(carrier.blocks)))]
    _fill(slots, carrier)
    return slots


def _resize(slots: list[Slot], carrier: Carrier) -> None:
    """Gives ``slots`` memory for the blocks as they are now, in the place of what they have.

    There are fewer of them afterwards where not as many fit.
    """
    if carrier.layout is not None:
        return  # wire bytes are of the weights alone
    for slot in slots:
        slot.resize(torch.empty(0, dtype=torch.uint8))  # first, so that both are never there at once
    del slots[carrier.refit() :]
    _fill(slots, carrier)


def _fill(slots: list[Slot], carrier: Carrier) -> None:
    """Gives slots, which have none, their memory."""
    layout, device = carrier.layout, carrier.device
    size = _largest(carrier) if layout is None else round_up(max(layout.nbytes), PAGE)
    count = len(slots)
    # Files are read into slots on the CPU directly: those begin at a page.
    whole = (
        torch.empty(count * size, dtype=torch.uint8, device=device)
        if carrier.to_gpu
        else mapping(count * size, device)
    )
    for i, slot in enumerate(slots):
        slot.resize(whole[i * size : (i + 1) * size])


def _largest(carrier: Carrier) -> int:
    """The bytes of the largest block, in whole pages of every slice."""
    return round_up(max(b.nbytes for b in carrier.blocks), PAGE * carrier.parts)


class HostStorage:
    """Blocks in one region of host memory, pinned for a GPU; with a ``group``, this rank's slices of them."""

    @property
    def parts(self) -> int:
        """Into how many slices the bytes of a block are divided."""
        return self.memory.parts

    def __init__(self, carrier: Carrier, group: Group | None) -> None:
        self.carrier = carrier
        # With wire bytes the copies to the device come from buffers of their own.
        pinned_for = carrier.device if carrier.layout is None else torch.device("cpu")
        # Slices make blocks longer, so they come before the slots.
        self.memory: HostMemory
        if group is None:
            self.memory = HostMemory(carrier.blocks, pinned_for)
        elif carrier.layout is None:
            self.memory = Slices(carrier.blocks, carrier.device, group)
        else:
            self.memory = Parts(carrier.blocks, group)
        self._group = group
        self.slots = _buffers(carrier)
        self._staging = None
        if carrier.to_gpu and carrier.layout:
            self._staging = mapping(len(self.slots) * carrier.layout.room, carrier.device)

    def mover(self, packed: Packed, run: Run | None) -> Mover:
        memory, device, timeline = self.memory, self.carrier.device, self.carrier.timeline
        for b in self.carrier.blocks:
            memory.write(b, packed(b), 0)
        if self.carrier.layout:
            return Encoder(memory, self.carrier, len(self.slots), self._staging, self._group)
        if not self.carrier.to_gpu:
            return ByThreads(memory, timeline)
        return ByStreams(memory, device, timeline)

    def add_states(self, mover: Mover) -> None:
        """Makes room for the states that blocks have got.  ``mover`` is drained, and slots are empty."""
        _resize(self.slots, self.carrier)
        self.memory.add_states(self.carrier.blocks)


class DiskStorage:
    """Blocks in files: a checkpoint that is read, a folder of a run that is written, or both.

    With a ``group`` each rank reads its slice of a block.
    """

    parts = 1  # files are the same for any number of ranks

    def __init__(
        self, carrier: Carrier, threads: int, has_checkpoint: bool, cache: int, group: Group | None
    ) -> None:
        self.carrier, self.threads, self.has_checkpoint, self.cache = carrier, threads, has_checkpoint, cache
        self._group = group
        self.slots = _buffers(carrier)
        self._staging = None
        if carrier.to_gpu:
            layout, slots = carrier.layout, len(self.slots)
            size = slots * layout.room if layout else 2 * slots * _largest(carrier)
            self._staging = mapping(size, carrier.device)

    def mover(self, packed: Packed, run: Run | None) -> Mover:
        carrier, self.run = self.carrier, run
        mark = run.mark if run else lambda: None
        files = (run.folder if run else None), mark, self.threads, self.cache
        source: FileStore
        if self._group is None:
            source = FileStore(*files)
        else:
            source = (PartFiles if carrier.layout else SharedFiles)(*files, self._group)
        self.source = source
        if run:
            source.reader.own.update(run.files)
            self._fill(source, run, packed)
        if carrier.layout:
            return Encoder(source, carrier, len(self.slots), self._staging, self._group)
        if self._staging is None:
            return ByThreads(source, carrier.timeline)
        staging, self._staging = self._staging, None  # the mover alone holds it, and may take another
        return Staged(source, staging, len(self.slots), carrier.device, carrier.timeline)

    def add_states(self, mover: Mover) -> None:
        """Makes room for the states that blocks have got, which their files get as they are written."""
        if self.run is not None:
            more = sum(b.nbytes - b.weights for b in self.carrier.blocks if not b.stored)
            check_room(self.carrier.op, self.run.folder, self.carrier.blocks, _largest(self.carrier) + more)
        self.source.forget()
        _resize(self.slots, self.carrier)
        mover.resize(len(self.slots), _largest(self.carrier))

    def _fill(self, source: FileStore, run: Run, packed: Packed) -> None:
        """Checks that there is room on the disk, and writes the blocks of a model that has no checkpoint."""
        op, blocks = self.carrier.op, self.carrier.blocks
        missing = [b for b in blocks if b.index not in run.files]
        if run.resumes and not self.has_checkpoint and missing:
            fail(op, "weights", "the checkpoint that the run began with", None)
        begins = not self.has_checkpoint and not run.resumes
        check_room(
            op,
            run.folder,
            blocks,
            _largest(self.carrier) + sum(b.nbytes for b in (blocks if begins else missing)),
        )
        for b in blocks if begins else ():
            source.write(b, packed(b), 0)
