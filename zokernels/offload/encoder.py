"""Blocks that cross the link as wire bytes (``zokernels.wire``), while the exact weights stay in storage.

The exact weights of a block are its master.  One thread brings a master up to date, with one rounding for
each step that it lacks, and encodes it; another writes files.  On the device one pass decodes and perturbs.
Nothing is copied back.

What a forward sees depends on nothing but the master after all updates so far, theta_t.  It does not depend
on slots, on the order of visits, on what has been written, or on a restart.

    lossy       round(decode(encode(theta_t))): the update must be in the master before it is encoded
    lossless    theta_t: a block may be sent before the last update is known, and takes it as it is decoded
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import fail
from ..step.deferred import Pass
from .blocks import Block
from .gathered import Group
from .history import Batch, History, apply_passes
from .memory import mapping
from .movers import Carrier, FileStore, HostMemory, Slot, Threaded


class _Job(NamedTuple):
    """A block on its way: it is read, updated, used, and perhaps written."""

    block: Block
    version: int  #: the number of updates in the master when the job is done
    work: list[Batch]
    ready: torch.cuda.Event | None  #: when the updates' coefficients are there
    before: Future[None] | None  #: the last write of the block's file, which must end before it is read
    then: Callable[[dict[int, Tensor]], Any]  #: uses the master, given as :meth:`Block.views`
    done: Future[Any]  #: the result of ``then``
    written: Future[None] | None  #: this write of the file, where there is one


class Encoder(Threaded):
    """Fills slots with wire bytes.

    One thread reads masters, one updates and encodes them, and one writes files.
    """

    history: History  #: the engine sets it
    has_states = False  #: whether updates read and write states, which stay on the host

    def __init__(
        self,
        source: HostMemory | FileStore,
        carrier: Carrier,
        slots: int,
        staging: Tensor | None,
        group: Group | None = None,
    ) -> None:
        """``staging``: for a GPU, pinned memory for the wire bytes of one block for each of ``slots``.

        ``group``: ranks of which each updates and encodes its parts of every block.
        """
        assert carrier.layout is not None  # what crosses the link are wire bytes
        blocks, device = carrier.blocks, carrier.device
        super().__init__(source, carrier.timeline, "read", "encode", "write")
        self.layout, self._group = carrier.layout, group
        self._rank = 0 if group is None else group.rank
        self._device, self._write_every, self._cuda = device, carrier.write_every, carrier.to_gpu
        #: One decoded block, for what the fused pass does not serve.
        self._theta = torch.empty(max(b.scratch for b in blocks), dtype=torch.uint8, device=device)
        self._views: dict[int, list[Tensor]] = {}
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # for masters from files
        self.resize(slots, max(b.nbytes for b in blocks))
        self._coming: dict[int, Future[Any]] = {}  #: by slot
        self._keeping: list[Future[Any]] = []
        self._broken: BaseException | None = None  #: why a master in memory has only a part of an update
        self._beginning = False  #: whether a job is being begun, of which an exception could leave a part
        if self._cuda:
            self._in, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)
            assert staging is not None
            self._pinned = [staging[i * self.layout.room : (i + 1) * self.layout.room] for i in range(slots)]
        self._sent: dict[int, torch.cuda.Event] = {}  #: by slot
        self._released: dict[int, torch.cuda.Event] = {}  #: by slot
        self._on_host: OrderedDict[int, tuple[Pass, Pass]] = OrderedDict()

    def resize(self, slots: int, largest: int) -> None:
        self._free = queue.SimpleQueue()
        if isinstance(self.source, FileStore):
            data = mapping((slots + 2) * largest, torch.device("cpu"))
            for i in range(slots + 2):
                self._free.put(data[i * largest : (i + 1) * largest])

    def theta(self, block: Block) -> list[Tensor]:
        if block.index not in self._views:
            self._views[block.index] = block.scratch_views(self._theta)
        return self._views[block.index]

    @property
    def lag(self) -> float:
        """How many updates a slot's bytes may lack, which the device then adds."""
        if not self.layout.lossless or self.has_states:
            return 0
        return float("inf") if self._write_every is None else 1

    # In the engine's thread ---------------------------------------------------------------------------------

    def fetch(self, block: Block, slot: Slot) -> None:
        # Where files are only read, the device adds all updates if it can.
        slot.updates = block.scheduled if self.lag > 1 else max(self.history.end, block.scheduled)
        every, released = self._write_every, self._released.get(slot.index)
        write = isinstance(self.source, HostMemory) or (
            every is not None and slot.updates - block.scheduled >= every
        )
        send = lambda views: self._send(block, slot, views, released)
        self._coming[slot.index] = self._begin(block, slot.updates, write, send)

    def keep(self, block: Block) -> None:
        """Brings all updates of ``block`` into the storage."""
        self._keeping.append(
            self._begin(block, max(self.history.end, block.scheduled), True, lambda views: None)
        )

    def master(self, block: Block) -> dict[int, Tensor]:
        """The master of ``block`` with all updates, on the host.  It is valid until the next step.

        Without files and other ranks it is the one that is kept, else a copy.
        """
        in_memory = isinstance(self.source, HostMemory)

        def taken(views: dict[int, Tensor]) -> dict[int, Tensor]:
            if self._group is not None:
                data = mapping(block.nbytes, torch.device("cpu"))
                self._group.collect(block, views, data, first_alone=False)
                return block.views(data)
            return views if in_memory else {key: view.clone() for key, view in views.items()}

        version = max(self.history.end, block.scheduled)
        found: dict[int, Tensor] = self._begin(block, version, in_memory, taken).result()
        return found

    def put(self, block: Block, views: dict[int, Tensor]) -> None:
        """Keeps in host memory what :meth:`master` gave, and what was changed since."""
        assert isinstance(self.source, HostMemory)  # a run has its states in its folder
        if self._group is not None:
            kept = self.source.views(block)
            for e, part in block.parts(self._rank, self._group.count):
                kept[id(e.param)].copy_(views[id(e.param)].view(-1)[part])

    def _begin(
        self, block: Block, version: int, write: bool, then: Callable[[dict[int, Tensor]], Any]
    ) -> Future[Any]:
        if self._beginning:
            expected = "updates that no exception of another thread has cut off (resume, or a checkpoint)"
            fail("stream", "weights", expected, "one that was being begun", RuntimeError)
        if self.source.is_shared:  # all ranks must raise at the same place
            writes = [block.index] if block.index in self._writing else []
            wait([self._writing[i] for i in writes])
        else:
            writes = [i for i, future in self._writing.items() if future.done()]
        error = self._broken or self._failed(writes)
        if error is not None:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed
        work = self.history.batches(block, block.scheduled, {}) if version > block.scheduled else []
        ready = None
        if self._cuda and work:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        before, written = self._writing.get(block.index), None
        self._beginning = True
        if write:
            block.scheduled = version
            if isinstance(self.source, FileStore):
                written = self._writing[block.index] = Future()
        job = _Job(block, version, work, ready, before, then, Future(), written)
        self._submit("read", self._read, job)
        self._beginning = False
        return job.done

    def wait(self, slot: Slot) -> None:
        if (coming := self._coming.pop(slot.index, None)) is not None:
            with self.timeline.span("wait", slot.block):
                sent = coming.result()
            if sent is not None:
                torch.cuda.current_stream(self._device).wait_event(sent)

    def store(self, block: Block, slot: Slot) -> None:
        pass  # nothing comes back

    def released(self, slot: Slot) -> None:
        if self._cuda:
            event = self._released[slot.index] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        keeping, self._keeping = self._keeping, []
        wait([*self._coming.values(), *keeping, *self._writing.values()])
        self._raise_failed(list(self._writing))
        for future in keeping:
            future.result()
        if self._cuda:
            self._in.synchronize()

    # In threads ---------------------------------------------------------------------------------------------

    def _read(self, job: _Job) -> None:
        master = None
        try:
            if isinstance(self.source, HostMemory):
                views = self.source.views(job.block)
            else:
                if job.before is not None:
                    job.before.result()
                master = self._free.get()
                with self.timeline.span("read", job.block):
                    self.source.read(job.block, master)
                views = self.source.views(job.block, master)
            self._submit("encode", self._update, job, master, views)
        except BaseException as error:  # it is raised again by whoever waits
            self._fail(job, master, error)

    def _update(self, job: _Job, master: Tensor | None, views: dict[int, Tensor]) -> None:
        try:
            with self.timeline.span("encode", job.block):
                for of in job.work:
                    passes = [self._host(one, job.ready).bound(views) for one in of.passes]
                    self._apply(job.block, views, of, passes)
            if isinstance(self.source, HostMemory):
                job.block.stored = max(job.block.stored, job.version)
            result = job.then(views)
        except BaseException as error:
            if isinstance(self.source, HostMemory) and job.block.stored < job.version:
                self._broken = error
            return self._fail(job, master, error)
        if job.written is None or master is None:
            self._give_back(master)
        else:
            self._submit("write", self._write, job, master)
        job.done.set_result(result)

    def _apply(self, block: Block, views: dict[int, Tensor], of: Batch, passes: list[Pass]) -> None:
        if self._group is None:
            return apply_passes([views[id(block.entries[i].param)] for i in of.entries], of.streams, passes)
        here = [(block.entries[i], stream) for i, stream in zip(of.entries, of.streams, strict=True)]
        here = [(e, stream) for e, stream in here if id(e.param) in views]
        if here:
            offsets = [block.part(e, self._rank, self._group.count).start for e, _ in here]
            apply_passes(
                [views[id(e.param)] for e, _ in here], [stream for _, stream in here], passes, offsets
            )

    def _write(self, job: _Job, master: Tensor) -> None:
        assert job.written is not None
        try:
            with self.timeline.span("write", job.block):
                self._store(job.block, master, job.version)
            self._give_back(master)
            job.written.set_result(None)
        except BaseException as error:
            self._give_back(master)
            job.written.set_exception(error)

    def _give_back(self, master: Tensor | None) -> None:
        if master is not None and isinstance(self.source, FileStore):
            self._free.put(master)

    def _fail(self, job: _Job, master: Tensor | None, error: BaseException) -> None:
        self._give_back(master)
        if job.written is not None:
            job.block.scheduled = job.block.stored
            job.written.set_exception(error)
        job.done.set_exception(error)

    def _send(
        self, block: Block, slot: Slot, views: dict[int, Tensor], released: torch.cuda.Event | None
    ) -> Any:
        if not self._cuda:
            with self.timeline.span("copy-in", block):
                self.layout.encode(block, views, slot.data, self._rank)
                return self._gather(block, slot.data)
        buffer, mine = self._pinned[slot.index], self.layout.section(block, self._rank)
        if slot.index in self._sent:
            self._sent[slot.index].synchronize()  # the last copy from this buffer
        with self.timeline.span("encode", block):
            self.layout.encode(block, views, buffer, self._rank)
        if released is not None:
            self._in.wait_event(released)
        with torch.cuda.stream(self._in), self.timeline.device_span("copy-in", block, self._in):
            slot.data[mine].copy_(buffer[mine], non_blocking=True)
            self._gather(block, slot.data)
        event = self._sent[slot.index] = torch.cuda.Event()
        event.record(self._in)
        return event

    def _gather(self, block: Block, data: Tensor) -> None:
        """Fills ``data`` with the wire bytes of all ranks' parts."""
        if self._group is not None:
            self._group.exchange(
                data[: self.layout.nbytes[block.index]], data[self.layout.section(block, self._rank)]
            )

    def _host(self, one: Pass, ready: torch.cuda.Event | None) -> Pass:
        """``one`` with its seeds and coefficients on the host.

        Most blocks of a step have the same, so they are kept.
        """
        if not self._cuda:
            return one
        if id(one) not in self._on_host:
            assert ready is not None
            fields = {
                "seeds": one.seeds,
                "coeffs": one.coeffs,
                "decay": one.decay,
                "rounding_seed": one.rounding_seed,
                "minimum": one.minimum,
                "hyper": one.hyper,
            }
            with torch.cuda.stream(self._side):
                self._side.wait_event(ready)
                moved: dict[str, Any] = {
                    key: None if value is None else value.cpu() for key, value in fields.items()
                }
            self._on_host[id(one)] = one, one._replace(**moved)
            if len(self._on_host) > 4096:
                self._on_host.popitem(last=False)
        return self._on_host[id(one)][1]
