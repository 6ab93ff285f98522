"""Blocks that cross the link as wire bytes (``zokernels.wire``), while their masters stay in storage, exact.

A thread brings a block's master up to date, one rounding for each step that it lacks, and encodes it; another writes
files.  On the device one pass decodes and perturbs.  Nothing is copied back.

Which values a forward sees depends on nothing but the master after all updates so far, theta_t: not on slots, on the
order of visits, on what has been written, or on a restart.

    lossy       round(decode(encode(theta_t))): the update must be in the master before it is encoded
    lossless    theta_t: a block may be sent before the last update is known, and takes it as it is decoded
"""

from __future__ import annotations

import itertools
import queue
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES
from ..functional import decode, decode_fan_out, encode
from ..wire import Wire, is_lossless, wire_bytes
from .blocks import ALIGN, Block
from .engine import _Alike, _Visit
from .history import take
from .memory import mapping
from .movers import Files, HostMemory, Mover, Slot
from .timeline import Timeline

if TYPE_CHECKING:
    from ..trajectory.deferred import Pass
    from .history import History


class Format:
    """Where each parameter lies in the wire bytes of its block.  Other than fp32, bf16 and fp16 they travel as they
    are."""

    def __init__(self, wire: Wire, blocks: Sequence[Block]) -> None:
        self.wire = wire
        self.places: list[list[tuple[int, int]]] = []  #: (begin, size) by block
        for block in blocks:
            sizes = [wire_bytes(p.numel(), wire) if p.dtype in DTYPES else p.nbytes for _, p, _ in block.entries]
            begins = itertools.accumulate((-(-n // ALIGN) * ALIGN for n in sizes), initial=0)
            self.places.append(list(zip(begins, sizes)))  # noqa: B905
        self.nbytes = [max(1, *(begin + size for begin, size in places)) for places in self.places]
        self.room = -(-max(self.nbytes) // ALIGN) * ALIGN  #: for any block
        dtypes = {e.param.dtype for b in blocks for e in b.entries} & set(DTYPES)
        self.lossless = all(is_lossless(wire, dtype) for dtype in dtypes)

    def buffers(self, block: Block, data: Tensor) -> list[Tensor]:
        return [data[begin : begin + size] for begin, size in self.places[block.index]]

    def encode(self, block: Block, master: Tensor, data: Tensor) -> None:
        """The bytes of ``block`` in ``master`` to wire bytes in ``data``."""
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for e, buffer in zip(block.entries, self.buffers(block, data), strict=True):
            value = e.of(master)
            if value.dtype in DTYPES:
                out, params = alike.setdefault(value.dtype, ([], []))
                out.append(buffer)
                params.append(value)
            else:
                buffer.copy_(value.view(-1).view(torch.uint8))
        for out, params in alike.values():
            encode(out, params, self.wire)


class _Work(NamedTuple):
    """Updates that some entries of a block lack."""

    entries: list[int]
    streams: list[int]
    passes: tuple[Pass, ...]


class _Job(NamedTuple):
    """A block on its way: read, updated, sent, and written."""

    block: Block
    version: int  #: updates of the master when it is done
    work: list[_Work]
    ready: torch.cuda.Event | None  #: of the coefficients
    before: Future[None] | None  #: the last write of the block's file
    then: Callable[[Tensor], Any]  #: what becomes of the master
    done: Future[Any]  #: of the result of ``then``
    written: Future[None] | None  #: of this write of the file, where there is one


class Encoding(Mover):
    """Slots that hold wire bytes: a thread reads masters, one updates and encodes them, one writes files."""

    history: History  #: set by the engine

    def __init__(
        self,
        source: HostMemory | Files,
        form: Format,
        blocks: Sequence[Block],
        slots: int,
        device: torch.device,
        write_every: int | None,
        timeline: Timeline,
        staging: Tensor | None,
    ) -> None:
        """``staging``: pinned memory for the wire bytes of a block for each slot, for a GPU."""
        self.source, self.form, self.timeline = source, form, timeline
        self._device, self._write_every, self._cuda = device, write_every, device.type == "cuda"
        #: one block decoded, for what the fused pass does not serve
        self._theta = torch.empty(max(b.scratch for b in blocks), dtype=torch.uint8, device=device)
        self._views: dict[int, list[Tensor]] = {}
        self._reads, self._updates, self._writes = (
            ThreadPoolExecutor(1, thread_name_prefix=f"zokernels-{name}") for name in ("read", "encode", "write")
        )
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # for masters from files
        if isinstance(source, Files):
            size = max(b.nbytes for b in blocks)
            data = mapping((slots + 2) * size, torch.device("cpu"))
            for i in range(slots + 2):
                self._free.put(data[i * size : (i + 1) * size])
        self._coming: dict[int, Future[Any]] = {}  #: by slot
        self._writing: dict[int, Future[None]] = {}  #: by block
        self._keeping: list[Future[Any]] = []
        self._broken: BaseException | None = None  #: why a master in memory has an update in part
        if self._cuda:
            self._in, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)
            assert staging is not None
            self._pinned = [staging[i * form.room : (i + 1) * form.room] for i in range(slots)]
        self._sent: dict[int, torch.cuda.Event] = {}  #: by slot
        self._released: dict[int, torch.cuda.Event] = {}  #: by slot
        self._on_host: OrderedDict[int, tuple[Pass, Pass]] = OrderedDict()

    def theta(self, block: Block) -> list[Tensor]:
        if block.index not in self._views:
            self._views[block.index] = block.scratch_views(self._theta)
        return self._views[block.index]

    @property
    def lag(self) -> float:
        """How many updates a slot's bytes may lack when they are decoded."""
        if not self.form.lossless:
            return 0
        return float("inf") if self._write_every is None else 1

    # In the engine's thread -----------------------------------------------------------------------------------------

    def fetch(self, block: Block, slot: Slot) -> None:
        # Of a file that is only read, the device takes all updates where it can.
        slot.updates = block.kept if self.lag > 1 else max(self.history.end, block.kept)
        every, released = self._write_every, self._released.get(slot.index)
        write = isinstance(self.source, HostMemory) or (every is not None and slot.updates - block.kept >= every)
        send = lambda master: self._send(block, slot, master, released)
        self._coming[slot.index] = self._submit(block, slot.updates, write, send)

    def keep(self, block: Block) -> None:
        """All updates into the storage."""
        self._keeping.append(self._submit(block, max(self.history.end, block.kept), True, lambda master: None))

    def master(self, block: Block) -> Tensor:
        """The bytes of ``block`` with all updates, on the host; valid until the next step."""
        in_memory = isinstance(self.source, HostMemory)
        copy = lambda master: master if in_memory else master[: block.nbytes].clone()
        found: Tensor = self._submit(block, max(self.history.end, block.kept), in_memory, copy).result()
        return found

    def _submit(self, block: Block, version: int, write: bool, then: Callable[[Tensor], Any]) -> Future[Any]:
        errors = (f.exception() for f in self._writing.values() if f.done())  # what a write before ran into
        if (error := self._broken or next(filter(None, errors), None)) is not None:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed
        found: dict[tuple[Any, ...], _Work] = {}
        for i, e in enumerate(block.entries if version > block.kept else ()):
            stream, passes = self.history.pending(e.param, block.kept)
            if passes:
                work = found.setdefault((e.param.dtype, *map(id, passes)), _Work([], [], passes))
                work.entries.append(i)
                work.streams.append(stream)
        ready = None
        if self._cuda and found:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        before, written = self._writing.get(block.index), None
        if write:
            block.kept = version
            if isinstance(self.source, Files):
                written = self._writing[block.index] = Future()
        job = _Job(block, version, list(found.values()), ready, before, then, Future(), written)
        self._reads.submit(self._read, job)
        return job.done

    def wait(self, slot: Slot) -> None:
        if (coming := self._coming.pop(slot.index, None)) is not None:
            with self.timeline.span("wait", slot.block):
                sent = coming.result()
            if sent is not None:
                torch.cuda.current_stream(self._device).wait_event(sent)

    def arrived(self, slot: Slot) -> bool:
        coming = self._coming.get(slot.index)
        return coming is None or coming.done()

    def store(self, block: Block, slot: Slot) -> None:
        pass  # nothing comes back

    def released(self, slot: Slot) -> None:
        if self._cuda:
            event = self._released[slot.index] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        for future in [*self._coming.values(), *self._keeping, *self._writing.values()]:
            future.result()
        self._keeping = []
        if self._cuda:
            self._in.synchronize()

    def close(self) -> None:
        self._reads.shutdown(cancel_futures=True)
        self._updates.shutdown()
        self._writes.shutdown()
        self.source.close()

    # In threads -----------------------------------------------------------------------------------------------------

    def _read(self, job: _Job) -> None:
        master = None
        try:
            if isinstance(self.source, HostMemory):
                master = self.source.regions[job.block.index]
            else:
                if job.before is not None:
                    job.before.result()
                master = self._free.get()
                with self.timeline.span("read", job.block):
                    self.source.read(job.block, master)
            self._updates.submit(self._update, job, master)
        except BaseException as error:  # it is raised again by whoever waits
            self._fail(job, master, error)

    def _update(self, job: _Job, master: Tensor) -> None:
        try:
            params = [e.of(master) for e in job.block.entries]
            with self.timeline.span("encode", job.block):
                for entries, streams, passes in job.work:
                    take([params[i] for i in entries], streams, [self._host(one, job.ready) for one in passes])
            if isinstance(self.source, HostMemory):
                job.block.stored = max(job.block.stored, job.version)
            result = job.then(master)
        except BaseException as error:
            if isinstance(self.source, HostMemory) and job.block.stored < job.version:
                self._broken = error
            return self._fail(job, master, error)
        if job.written is None:
            self._give_back(master)
        else:
            self._writes.submit(self._write, job, master)
        job.done.set_result(result)

    def _write(self, job: _Job, master: Tensor) -> None:
        assert job.written is not None
        try:
            with self.timeline.span("write", job.block):
                self.source.write(job.block, master, job.version)
            job.block.stored = job.version
            self._give_back(master)
            job.written.set_result(None)
        except BaseException as error:
            self._give_back(master)
            job.written.set_exception(error)

    def _give_back(self, master: Tensor | None) -> None:
        if master is not None and isinstance(self.source, Files):
            self._free.put(master)

    def _fail(self, job: _Job, master: Tensor | None, error: BaseException) -> None:
        self._give_back(master)
        if job.written is not None:
            job.written.set_exception(error)
        job.done.set_exception(error)

    def _send(self, block: Block, slot: Slot, master: Tensor, released: torch.cuda.Event | None) -> Any:
        if not self._cuda:
            with self.timeline.span("copy-in", block):
                return self.form.encode(block, master, slot.data)
        buffer, size = self._pinned[slot.index], self.form.nbytes[block.index]
        if slot.index in self._sent:
            self._sent[slot.index].synchronize()  # the last copy from this buffer
        with self.timeline.span("encode", block):
            self.form.encode(block, master, buffer)
        if released is not None:
            self._in.wait_event(released)
        with torch.cuda.stream(self._in), self.timeline.device_span("copy-in", block, self._in):
            slot.data[:size].copy_(buffer[:size], non_blocking=True)
        event = self._sent[slot.index] = torch.cuda.Event()
        event.record(self._in)
        return event

    def _host(self, one: Pass, ready: torch.cuda.Event | None) -> Pass:
        """``one`` with its seeds and coefficients on the host; most blocks of a step have the same."""
        if not self._cuda:
            return one
        if id(one) not in self._on_host:
            assert ready is not None
            fields = {"seeds": one.seeds, "coeffs": one.coeffs, "decay": one.decay, "rounding_seed": one.rounding_seed}
            with torch.cuda.stream(self._side):
                self._side.wait_event(ready)
                moved: dict[str, Any] = {key: None if value is None else value.cpu() for key, value in fields.items()}
            self._on_host[id(one)] = one, one._replace(**moved)
            if len(self._on_host) > 4096:
                self._on_host.popitem(last=False)
        return self._on_host[id(one)][1]


class WireVisit(_Visit):
    """A block whose slot holds wire bytes, which are done with as soon as they are decoded."""

    everything = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._held:
            self._release()

    def _values(self) -> list[Tensor]:
        """Of the one decoded block, filled by :meth:`_take`."""
        wire = self.engine.wire
        assert wire is not None
        self._wire, self._buffers = wire.form.wire, wire.form.buffers(self.block, self.slot.data)
        return wire.theta(self.block)

    def _take(self, a: _Alike, passes: Sequence[Pass]) -> None:
        out, buffers = ([of[i] for i in a.entries] for of in (self._params, self._buffers))
        if out[0].dtype not in DTYPES:
            for value, buffer in zip(out, buffers, strict=True):
                value.view(-1).view(torch.uint8).copy_(buffer)
            return
        first: dict[str, Any] = {}
        if passes:
            one, *passes = passes
            fields = ("seeds", "coeffs", "dist", "decay", "rounding", "rounding_seed")
            first = {key: getattr(one, key) for key in fields}
        decode(out, buffers, self._wire, **first, streams=a.streams)
        super()._take(a, passes)

    def _fan_out(self, a: _Alike) -> None:
        """In one pass, without theta, where no other side needs it and at most one update is pending."""
        update = self._last_update(a)
        if len(self.sides) > 2 or len(a.passes) > bool(update):
            return super()._fan_out(a)
        plus, minus = ([self.engine.scratch(self.block, s)[i] for i in a.entries] for s in (0, 1))
        buffers = [self._buffers[i] for i in a.entries]
        seed, coeff = self._direction(a)
        decode_fan_out(plus, minus, buffers, self._wire, seed, coeff, **self._noise(a), **update)
