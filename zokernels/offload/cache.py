"""The slots of a device as a cache of blocks: which slot holds which block, and which is to come next."""

from __future__ import annotations

from torch import Tensor

from .blocks import Block
from .encoder import Encoder
from .history import History
from .movers import Mover, Slot
from .timeline import Timeline


class BlockCache:
    """``slots`` hold the blocks that come in, ``scratch`` the perturbed copies that sides compute with."""

    def __init__(
        self,
        blocks: list[Block],
        slots: list[Slot],
        scratch: list[Tensor],
        mover: Mover,
        timeline: Timeline,
        write_every: int | None,
        wire: Encoder | None,
    ) -> None:
        self.blocks, self.mover, self.timeline, self.history = blocks, mover, timeline, History()
        self.write_every, self.wire = write_every, wire
        if wire is not None:
            wire.history = self.history
        self.in_step = False  #: whether the forwards of a step are running
        self._seen: dict[int, int] = {}  # the number of updates at the last visit, by block
        self._slots, self._scratch = slots, scratch
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of scratch, by block and scratch
        self._next = {b.index: blocks[(i + 1) % len(blocks)].index for i, b in enumerate(blocks)}
        self._last: int | None = None

    def load(self, block: Block) -> Slot:
        """A slot that holds ``block``; the blocks behind it begin to come."""
        if self._last is not None and self._last != block.index:
            self._next[self._last] = block.index  # blocks are expected in the order of the last forward
        self._last = block.index
        self._seen[block.index] = self.history.end
        upcoming = [block.index, *self.upcoming(block)[: len(self._slots) - 1]]
        slot = self._slot_of(block) or self._fetch(block, self._victim(upcoming))
        slot.users += 1
        try:
            self.prefetch(upcoming)
            self.mover.wait(slot)
        except BaseException:
            self.abandon(slot)
            raise
        if slot.updates < 0:
            slot.updates, slot.measured = block.stored, block.measured
        return slot

    def _slot_of(self, block: Block) -> Slot | None:
        return next((s for s in self._slots if s.block is block and not self._stale(s)), None)

    def _stale(self, slot: Slot) -> bool:
        """Whether the wire bytes in ``slot`` lack more updates than the device may add."""
        return (
            self.wire is not None
            and slot.block is not None
            and self.history.end - slot.updates > self.wire.lag
        )

    def _comes_too_early(self, block: Block) -> bool:
        """Whether ``block`` is wanted only for the next step, whose update has to be in its wire bytes."""
        waits = self.wire is not None and self.wire.lag == 0 and self.in_step
        return waits and self._seen.get(block.index) == self.history.end

    def _fetch(self, block: Block, slot: Slot | None) -> Slot:
        assert slot is not None, "no slot is free: more blocks are open at a time than there are slots"
        slot.block = None  # if another thread's exception falls between these lines, the slot is an empty one
        slot.updates = -1  # what is stored when it arrives
        self.mover.fetch(block, slot)
        slot.block = block
        return slot

    def upcoming(self, block: Block) -> list[int]:
        """The blocks that are expected after ``block``, as many as there are slots."""
        found: list[int] = []
        index = block.index
        while len(found) < len(self._slots) and (index := self._next[index]) not in (*found, block.index):
            found.append(index)
        return found

    def _victim(self, upcoming: list[int]) -> Slot | None:
        """A slot for another block: an empty one, else one whose block is not among ``upcoming``."""
        wanted = lambda s: s.block is not None and s.block.index in upcoming and not self._stale(s)
        idle = [s for s in self._slots if not s.users and not wanted(s)]
        return next((s for s in idle if s.block is None), idle[0] if idle else None)

    def prefetch(self, upcoming: list[int]) -> None:
        """Lets blocks come in, as far as there are slots for them."""
        for index in upcoming:
            block = self.blocks[index]
            if self._slot_of(block) is None and not self._comes_too_early(block):
                if (slot := self._victim(upcoming)) is None:
                    return
                self._fetch(block, slot)

    def release(self, slot: Slot, onward: bool = True) -> None:
        """Called when everything that is computed from ``slot`` has been issued.

        ``onward``: its block is not needed again for now, so the next ones may come.
        """
        slot.users -= 1
        self.mover.released(slot)
        if slot.block is not None and onward:
            self.prefetch(self.upcoming(slot.block))

    def scratch(self, block: Block, which: int) -> list[Tensor]:
        """The parameters of ``block`` as views of a scratch buffer."""
        key = block.index, which
        if key not in self._views:
            self._views[key] = block.scratch_views(self._scratch[which])
        return self._views[key]

    @property
    def buffers(self) -> list[Slot]:
        """The slots."""
        return self._slots

    @property
    def scratches(self) -> int:
        return len(self._scratch)

    def updated(self, block: Block, slot: Slot) -> None:
        """Called when ``slot`` has all updates: stores the block if ``write_every`` says so."""
        if self.wire is not None:
            return  # the slot has the bytes that came in; the host updates its own weights
        slot.updates = self.history.end
        if self.write_every is not None and slot.updates - block.scheduled >= self.write_every:
            block.scheduled = slot.updates
            self.mover.store(block, slot)

    def abandon(self, slot: Slot) -> None:
        """Called when what ``slot`` holds must not be used: the block comes again from the storage."""
        slot.users = max(0, slot.users - 1)  # a visit may have released it
        self.mover.released(slot)
        self.mover.drop(slot)

    def prefetch_after_update(self) -> None:
        """Lets encoded blocks come as soon as their update is known, before the next forward asks."""
        if self.wire is not None and self._last is not None:
            self.prefetch(self.upcoming(self.blocks[self._last])[: len(self._slots)])
