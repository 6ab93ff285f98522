"""How the bytes of blocks come to slots and go back.

All calls return at once, and only :meth:`Mover.wait` waits.

========  ============  ==========================================================================
storage   device        what moves
========  ============  ==========================================================================
device    any           nothing: each block has a slot of its own
host      cpu           copies, by threads
host      cuda          copies between pinned memory and slots, on two streams, chained by events
disk      cpu           direct reads and writes of files, by threads
disk      cuda          both: files to pinned staging by threads, staging to slots by streams
========  ============  ==========================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Block
from .disk import Direct, Folder, Mark, Reader
from .layout import WireLayout
from .memory import mapping
from .timeline import Timeline


@dataclass
class Carrier:
    """What storages and movers need to know of the stream that they serve."""

    op: str
    blocks: list[Block]
    device: torch.device  #: of the slots
    slots: int  #: how many, at most
    layout: WireLayout | None  #: of the bytes that cross the link; None: they are the weights
    timeline: Timeline
    write_every: int | None  #: None: nothing is written
    #: How many slots there may be, when blocks have become larger.
    refit: Callable[[], int]
    parts: int = 1  #: into how many slices of whole pages the bytes of a block are divided

    @property
    def to_gpu(self) -> bool:
        return self.device.type == "cuda"


class Slot:
    """A buffer on the device that holds one block at a time."""

    def __init__(self, index: int, data: Tensor) -> None:
        self.index, self.data = index, data
        self.block: Block | None = None
        self.updates = 0  #: the number of updates that its bytes hold
        self.measured = -1  #: as :attr:`Block.measured`, of its bytes
        self.users = 0  #: sides that compute with it
        self._views: dict[int, dict[int, Tensor]] = {}  # by block

    def views(self, block: Block) -> dict[int, Tensor]:
        """Weights and states, as :meth:`Block.views` has them."""
        if block.index not in self._views:
            self._views[block.index] = block.views(self.data)
        return self._views[block.index]

    def params(self, block: Block) -> list[Tensor]:
        views = self.views(block)
        return [views[id(e.param)] for e in block.entries]

    def forget(self, block: Block) -> None:
        """Makes the views of ``block`` anew when they are needed again."""
        self._views.pop(block.index, None)

    def resize(self, data: Tensor) -> None:
        """Lets other memory be the slot, which then holds nothing."""
        self.data, self.block, self._views = data, None, {}


class Mover:
    """Carries blocks to slots and back.

    ``fetch`` and ``store`` only begin.  A fetch waits by itself for whatever still uses its slot or writes
    its block.
    """

    timeline: Timeline

    def fetch(self, block: Block, slot: Slot) -> None:
        raise NotImplementedError

    def wait(self, slot: Slot) -> None:
        """Waits until what is computed from here on finds the block in ``slot``."""

    def settle(self, slot: Slot) -> None:
        """Waits until what is stored from ``slot`` has left it, which is about to be written to."""

    def drop(self, slot: Slot) -> None:
        """Forgets what ``slot`` holds."""
        slot.block = None

    def store(self, block: Block, slot: Slot) -> None:
        """Stores the block as ``slot`` holds it, with ``slot.updates`` updates."""
        raise NotImplementedError

    def released(self, slot: Slot) -> None:
        """Called when the last computation with ``slot`` has been issued."""

    def drain(self) -> None:
        """Waits until everything is where it was to go, and raises what failed on the way."""

    def resize(self, slots: int, largest: int) -> None:
        """Makes what is between ``slots`` and storage of the size of the ``largest`` block.

        It is called after :meth:`drain`.
        """

    def copy_in(self, block: Block, slot: Slot) -> None:
        """A fetch alone, for measurements, of a block that is not in use."""
        slot.block = None
        self.fetch(block, slot)
        self.wait(slot)

    def copy_out(self, block: Block, slot: Slot) -> None:
        """:meth:`copy_in` and a store of the same bytes, one after the other, for measurements."""
        self.copy_in(block, slot)
        slot.updates, slot.measured = block.stored, block.measured
        self.store(block, slot)
        self.drain()

    def close(self) -> None:
        pass


class Region(NamedTuple):
    """Bytes of a block, and the host memory where they are kept."""

    begin: int  #: in the block
    size: int  #: of the block's bytes
    data: Tensor  #: the host memory, of ``size`` bytes, or of a slice of them

    def of(self, data: Tensor) -> Tensor:
        """The same bytes in ``data``, the bytes of the block."""
        return data[self.begin : self.begin + self.size]


class HostMemory:
    """All blocks in host memory, or one of ``parts`` equal slices of each.

    The weights of all blocks are one mapping of it, and the states of all, where an optimizer has some, are
    another.
    """

    is_shared = False

    def __init__(self, blocks: Sequence[Block], device: torch.device, parts: int = 1) -> None:
        self._device, self.parts = device, parts
        self.regions: list[list[Region]] = [[] for _ in blocks]  #: by block
        self._add(blocks, [(0, b.nbytes) for b in blocks])

    def _add(self, blocks: Sequence[Block], spans: Sequence[tuple[int, int]]) -> None:
        """Makes room for the bytes from ``begin`` to ``end`` of each block."""
        sizes = [end - begin for begin, end in spans]
        ends = list(itertools.accumulate(size // self.parts for size in sizes))
        data = mapping(ends[-1], self._device)
        for b, (begin, _), size, end in zip(blocks, spans, sizes, ends, strict=True):
            if size:
                self.regions[b.index].append(Region(begin, size, data[end - size // self.parts : end]))

    def add_states(self, blocks: Sequence[Block]) -> None:
        """Makes room for the states of the blocks, which get their first values."""
        self._add(blocks, [(b.weights, b.nbytes) for b in blocks])
        data = mapping(max(b.nbytes for b in blocks), torch.device("cpu"))
        for b in blocks:
            b.begin_states(data)
            for region in self.regions[b.index][1:]:
                self.put(region, data)

    def get(self, region: Region, data: Tensor) -> None:
        """Copies a region to ``data``, the bytes of its block; to a GPU, on the current stream."""
        region.of(data).copy_(region.data, non_blocking=True)

    def put(self, region: Region, data: Tensor) -> None:
        """Copies the bytes of a region from ``data``, as :meth:`get`."""
        region.data.copy_(region.of(data), non_blocking=True)

    def read(self, block: Block, data: Tensor) -> None:
        for region in self.regions[block.index]:
            self.get(region, data)

    def write(self, block: Block, data: Tensor, updates: int) -> None:
        for region in self.regions[block.index]:
            self.put(region, data)

    def views(self, block: Block, data: Tensor | None = None) -> dict[int, Tensor]:
        """Weights and states where they are kept, as :meth:`Block.views` has them."""
        found = {}
        for region in self.regions[block.index]:
            for e in (s.entry for s in block.states) if region.begin else block.entries:
                found[id(e.param)] = e._replace(begin=e.begin - region.begin).of(region.data)
        return found

    def close(self) -> None:
        pass


class Span(NamedTuple):
    """Bytes of a block that were read."""

    begin: int
    end: int
    is_whole: bool  #: whether that is all, on every rank: nothing is gathered


class FileStore:
    """A checkpoint that is only read, and, where there is one, a folder that takes what is stored.

    In front of both are copies of the first blocks, as many as ``cache`` bytes of host memory hold.  They are
    read from files once, and what is stored goes to the file and to the copy.  Which blocks have one stays,
    because a step takes all blocks in turn: a cache of those that were used last would always lack the next.
    """

    is_shared = False  #: whether other processes read and wait for the same files

    def __init__(self, folder: Folder | None, mark: Mark, threads: int, cache: int = 0) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="zokernels-io")
        self.reader, self._folder, self._mark = Reader(self._pool), folder, mark
        self._room, self._copies = cache, dict[int, list[Tensor]]()  # by block, of each span

    @property
    def cached(self) -> int:
        """The bytes of the copies."""
        return sum(copy.nbytes for copies in self._copies.values() for copy in copies)

    def forget(self) -> None:
        """Drops the copies, because blocks have become larger."""
        self._copies = {}

    def spans(self, block: Block) -> list[tuple[int, int]]:
        """The bytes of the block that this process reads, as (begin, end): all."""
        return [(0, block.nbytes)]

    def views(self, block: Block, data: Tensor) -> dict[int, Tensor]:
        """What this process reads of weights and states, as :meth:`Block.views` has them."""
        return block.views(data)

    def gather(self, block: Block, data: Tensor, is_whole: bool) -> None:
        """Brings what other processes have read into ``data``, and waits until they have read all of it where
        each has.
        """

    def read(self, block: Block, data: Tensor) -> None:
        self.complete(block, data, self.read_span(block, data))

    def read_span(self, block: Block, data: Tensor) -> Span:
        """Reads :meth:`spans` of a block to their place in ``data``; all of it, to compare its checksums."""
        spans = self.spans(block)
        read = Span(spans[0][0], spans[-1][1], False)
        if (copies := self._copies.get(block.index)) is not None:
            self._copy(spans, data, copies)
            return read
        if self.reader.is_unchecked(block):
            read = Span(0, block.nbytes, True)
        for begin, end in [read[:2]] if read.is_whole else spans:
            self.reader.read(block, data, begin, end)
        if self.cached + sum(end - begin for begin, end in spans) <= self._room:
            self._copies[block.index] = [mapping(end - begin, torch.device("cpu")) for begin, end in spans]
            self._copy(spans, data, self._copies[block.index], back=True)
        return read

    def _copy(
        self, spans: list[tuple[int, int]], data: Tensor, copies: list[Tensor], back: bool = False
    ) -> None:
        """Copies spans to their place in ``data``, or from there."""
        for (begin, end), copy in zip(spans, copies, strict=True):
            copy.copy_(data[begin:end]) if back else data[begin:end].copy_(copy)

    def complete(self, block: Block, data: Tensor, read: Span) -> None:
        """Makes a block of what :meth:`read_span` has read, which is in ``data``, of any device."""
        self.gather(block, data, read.is_whole)
        if not self.reader.has_states(block):
            block.begin_states(data)  # the file is older than they are

    def write(self, block: Block, data: Tensor, updates: int) -> None:
        file = self._replace(block, data, updates)
        old, self.reader.own[block.index] = self.reader.own.get(block.index), file
        if old is not None:
            old.close()
        if (copies := self._copies.get(block.index)) is not None:
            self._copy(self.spans(block), data, copies, back=True)

    def _replace(self, block: Block, data: Tensor, updates: int) -> Direct:
        """Writes the file of a block."""
        assert self._folder is not None
        return self._folder.write(block, data, updates, self._pool, self._mark)

    def close(self) -> None:
        self._pool.shutdown()
        self.reader.close()
        self.forget()


class Threaded(Mover):
    """A mover with a thread for each of its works, such as "read" and "write"; each does one thing at a
    time.
    """

    def __init__(self, source: HostMemory | FileStore, timeline: Timeline, *works: str) -> None:
        self.source, self.timeline = source, timeline
        self._threads = {
            work: ThreadPoolExecutor(1, thread_name_prefix=f"zokernels-{work}") for work in works
        }

        self._writing: dict[int, Future[Any]] = {}  #: by block

    def _submit(self, work: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._threads[work].submit(function, *args)

    def _store(self, block: Block, data: Tensor, updates: int, measured: int = -1) -> None:
        """Writes a block.

        If that fails, its old bytes are still there: it is due again, and lacks nothing.
        """
        try:
            self.source.write(block, data, updates)
        except BaseException:
            block.scheduled = block.stored
            raise
        block.stored, block.measured = updates, measured
        block.scheduled = max(block.scheduled, updates)

    def _raise_earlier(self, block: Block) -> None:
        """Raises what an earlier write ran into; then ``block``, which was to be stored, is due again,
        too.

        Where other processes wait for the same write, all must raise at the same place: where the block that
        could not be written is stored again, which has come in since.
        """
        done = [index for index, future in self._writing.items() if future.done()]
        try:
            self._raise_failed([i for i in done if i == block.index or not self.source.is_shared])
        except BaseException:
            block.scheduled = block.stored
            raise

    def _failed(self, writing: Sequence[int]) -> BaseException | None:
        """What a write of the blocks of these numbers ran into; once."""
        failed = [e for index in writing if (e := self._writing.pop(index).exception()) is not None]
        return failed[0] if failed else None

    def _raise_failed(self, writing: Sequence[int]) -> None:
        if (error := self._failed(writing)) is not None:
            raise error

    def await_writes(self) -> None:
        """Waits until no block is being written, whether that succeeds or not."""
        wait(list(self._writing.values()))

    def close(self) -> None:
        """Ends the threads in their order: what has been read is still passed on."""
        for work, thread in self._threads.items():
            thread.shutdown(cancel_futures=work == "read")
        self._writing = {}  # of a block whose read was cancelled there is no end
        self.source.close()


class ByThreads(Threaded):
    """Slots in host memory, which one thread fills and another empties.

    Their order keeps a block's writes before its next read.
    """

    def __init__(self, source: HostMemory | FileStore, timeline: Timeline) -> None:
        super().__init__(source, timeline, "read", "write")
        self._coming: dict[int, Future[Any]] = {}  #: by slot
        self._leaving: dict[int, Future[Any]] = {}  #: by slot

    def fetch(self, block: Block, slot: Slot) -> None:
        before = [f for f in (self._leaving.get(slot.index), self._writing.get(block.index)) if f is not None]
        self._coming[slot.index] = self._submit("read", self._read, block, slot.data, before)

    def _read(self, block: Block, data: Tensor, before: list[Future[Any]]) -> None:
        wait(before)  # whether they succeeded or not: ``block.stored`` says what is there
        with self.timeline.span("copy-in", block):
            self.source.read(block, data)

    def wait(self, slot: Slot) -> None:
        if (coming := self._coming.pop(slot.index, None)) is not None:
            with self.timeline.span("wait", slot.block):
                coming.result()

    def settle(self, slot: Slot) -> None:
        if (leaving := self._leaving.get(slot.index)) is not None:
            wait([leaving])

    def store(self, block: Block, slot: Slot) -> None:
        self._raise_earlier(block)
        future = self._submit("write", self._write, block, slot.data, slot.updates, slot.measured)
        self._leaving[slot.index] = self._writing[block.index] = future

    def _write(self, block: Block, data: Tensor, updates: int, measured: int) -> None:
        with self.timeline.span("copy-out", block):
            self._store(block, data, updates, measured)

    def drain(self) -> None:
        # whoever waits for a block hears why it did not come
        wait([*self._coming.values(), *self._writing.values()])
        self._leaving = {}
        self._raise_failed(list(self._writing))


class ByStreams(Mover):
    """Slots on a GPU and blocks in pinned memory, between which two CUDA streams copy.

    Events order the copies with the computation.  Nothing waits for the host, and nothing is allocated.
    """

    def __init__(self, source: HostMemory, device: torch.device, timeline: Timeline) -> None:
        self.source, self.timeline, self._device = source, timeline, device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}  #: by slot
        self._free: dict[int, torch.cuda.Event] = {}  #: by slot
        self._left: dict[int, torch.cuda.Event] = {}  #: by slot
        self._written: dict[int, torch.cuda.Event] = {}  #: by block

    def _event(self, events: dict[int, torch.cuda.Event], key: int, stream: torch.cuda.Stream) -> None:
        if key not in events:
            events[key] = torch.cuda.Event()
        events[key].record(stream)

    def _copy(self, lane: str, block: Block, slot: Slot, stream: torch.cuda.Stream) -> None:
        """Copies the bytes of a block to its slot ("copy-in"), or from there to host memory ("copy-out")."""
        copy = self.source.get if lane == "copy-in" else self.source.put
        with torch.cuda.stream(stream), self.timeline.device_span(lane, block, stream):
            for region in self.source.regions[block.index]:
                copy(region, slot.data)

    def fetch(self, block: Block, slot: Slot) -> None:
        for events, key in ((self._free, slot.index), (self._left, slot.index), (self._written, block.index)):
            if key in events:
                self._in.wait_event(events[key])
        self._copy("copy-in", block, slot, self._in)
        self._event(self._arrived, slot.index, self._in)

    def wait(self, slot: Slot) -> None:
        if slot.index in self._arrived:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot.index])

    def settle(self, slot: Slot) -> None:
        if slot.index in self._left:
            torch.cuda.current_stream(self._device).wait_event(self._left[slot.index])

    def store(self, block: Block, slot: Slot) -> None:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        self._copy("copy-out", block, slot, self._out)
        self._event(self._left, slot.index, self._out)
        self._event(self._written, block.index, self._out)
        block.stored, block.measured = slot.updates, slot.measured

    def released(self, slot: Slot) -> None:
        self._event(self._free, slot.index, torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        self._in.synchronize()
        self._out.synchronize()


class Staged(Threaded):
    """Slots on a GPU and blocks in files, with pinned buffers between them: one for each slot and way.

    One thread reads a file into a buffer and then issues its copy.  Another waits for a copy out, and writes
    the file.
    """

    def __init__(
        self, source: FileStore, data: Tensor, slots: int, device: torch.device, timeline: Timeline
    ) -> None:
        super().__init__(source, timeline, "read", "write")
        self.source: FileStore = source
        self._device, self._in, self._out = device, torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._take(data, slots)
        self._issued: dict[int, Future[Any]] = {}
        self._emptied: dict[int, Future[Any]] = {}  #: by slot: its buffer on the way out is free
        self._free: dict[int, torch.cuda.Event] = {}
        self._left: dict[int, torch.cuda.Event] = {}

    def _take(self, data: Tensor, slots: int) -> None:
        """Lets ``data`` be the buffers."""
        nbytes = len(data) // (2 * slots)
        self._coming = [data[i * nbytes : (i + 1) * nbytes] for i in range(slots)]
        self._going = [data[i * nbytes : (i + 1) * nbytes] for i in range(slots, 2 * slots)]

    def resize(self, slots: int, largest: int) -> None:
        self._out.synchronize()
        self._coming = self._going = []
        self._take(mapping(2 * slots * largest, self._device), slots)

    def fetch(self, block: Block, slot: Slot) -> None:
        events = [e[slot.index] for e in (self._free, self._left) if slot.index in e]
        before = self._writing.get(block.index)
        self._issued[slot.index] = self._submit("read", self._read, block, slot, events, before)

    def _read(
        self, block: Block, slot: Slot, events: list[torch.cuda.Event], before: Future[Any] | None
    ) -> torch.cuda.Event:
        if before is not None:
            wait([before])
        self._in.synchronize()  # the last copy from this buffer
        with self.timeline.span("read", block):
            read = self.source.read_span(block, self._coming[slot.index])
        for event in events:
            self._in.wait_event(event)
        with torch.cuda.stream(self._in), self.timeline.device_span("copy-in", block, self._in):
            part = slice(read.begin, read.end)
            slot.data[part].copy_(self._coming[slot.index][part], non_blocking=True)
            self.source.complete(block, slot.data, read)
        event = torch.cuda.Event()
        event.record(self._in)
        return event

    def wait(self, slot: Slot) -> None:
        if slot.index in self._issued:
            torch.cuda.current_stream(self._device).wait_event(self._issued.pop(slot.index).result())

    def settle(self, slot: Slot) -> None:
        if slot.index in self._left:
            torch.cuda.current_stream(self._device).wait_event(self._left[slot.index])

    def store(self, block: Block, slot: Slot) -> None:
        self._raise_earlier(block)
        if (before := self._emptied.get(slot.index)) is not None:
            wait([before])
        buffer = self._going[slot.index]
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out), self.timeline.device_span("copy-out", block, self._out):
            buffer[: block.nbytes].copy_(slot.data[: block.nbytes], non_blocking=True)
        event = self._left[slot.index] = torch.cuda.Event()
        event.record(self._out)
        future = self._submit("write", self._write, block, buffer, slot.updates, slot.measured, event)
        self._writing[block.index] = self._emptied[slot.index] = future

    def _write(
        self, block: Block, buffer: Tensor, updates: int, measured: int, event: torch.cuda.Event
    ) -> None:
        event.synchronize()
        with self.timeline.span("write", block):
            self._store(block, buffer, updates, measured)

    def released(self, slot: Slot) -> None:
        event = self._free[slot.index] = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        wait([*self._issued.values(), *self._writing.values()])
        self._in.synchronize()
        self._raise_failed(list(self._writing))
