"""Writing a log while an optimizer runs."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import fail
from ..files.appending import AppendedFile
from ..step import roles
from ..step.roles import OptimizerView
from ..step.scalars import learning_rate
from ..step.types import Bucket, Estimate
from ..transfer import known_on_host
from .format import Layout, Log, Record, encode
from .settings import settings, whole_header

#: How many steps' numbers may be on their way from a GPU.  When there are more, the oldest is waited for.
_IN_FLIGHT = 64


class _Pending(NamedTuple):
    """The numbers of a step, on their way from the device to the host."""

    step: int
    two_pass: bool
    carried: bool
    groups: tuple[int | None, ...]  #: for each group, its place among the gradients
    values: Tensor  #: float64 on the host: finite, multiple, loss, rates, losses, gradients
    arrived: torch.cuda.Event | None

    def record(self, layout: Layout) -> Record:
        """The record of the step.  Waits for its numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        finite, multiple, loss, *rest = self.values.tolist()
        rates, losses = rest[: layout.groups], rest[layout.groups : layout.groups + layout.losses]
        g, q = rest[layout.groups + layout.losses :], layout.directions
        gradients = tuple((0.0,) * q if i is None else tuple(g[i * q : (i + 1) * q]) for i in self.groups)
        flags = bool(finite), self.two_pass, self.carried
        return Record(self.step, *flags, int(multiple), loss, tuple(rates), gradients, tuple(losses))


def pending(optimizer: OptimizerView, step: int, buckets: list[Bucket], estimate: Estimate) -> _Pending:
    """Sends the numbers of a step on their way to the host."""
    groups, elsewhere = optimizer.param_groups, estimate.elsewhere
    places = [id(group) for group in (*(b.group for b in buckets), *(group for group, _ in elsewhere))]
    place = {key: i for i, key in reversed(list(enumerate(places)))}
    like = estimate.gradients[0]
    fill = lambda v: torch.full((1,), v, dtype=torch.float64, device=like.device)
    number = lambda v: v.double().reshape(-1) if isinstance(v, Tensor) else fill(v)
    numbers = [estimate.finite, 1.0 if estimate.multiple is None else estimate.multiple]
    numbers += [
        optimizer.estimator.loss(estimate.losses).float(),
        *(learning_rate(group, like) for group in groups),
    ]
    numbers += [estimate.losses] if optimizer.rule.reads_losses else []
    numbers += [*estimate.gradients, *(g for _, g in elsewhere)]
    values, arrived = torch.cat([number(v) for v in numbers]), None
    if not known_on_host(values):
        stream = torch.cuda.current_stream(values.device)  # which copies, whatever the current device is
        values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(stream)
    at = tuple(place.get(id(group)) for group in groups)
    return _Pending(step, optimizer.in_two_pass, optimizer.carried, at, values, arrived)


class Follower(roles.Log):
    """A log that another process writes: this one makes the same checks before each step, and writes nothing.

    On a mesh the first rank has the :class:`Recorder`, which is a follower with a file; all others have this.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.recording, self.closed = os.fspath(path), True, False
        self._settings: tuple[Any, ...] | None = None
        self._next = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.path}, {'closed' if self.closed else 'open'}>"

    def go_on(self, log: Log, optimizer: OptimizerView) -> None:
        """Lets records be appended behind the last good one of ``log``."""
        self._start(log.layout, log.start + log.steps, optimizer)

    def _start(self, layout: Layout, step: int, optimizer: OptimizerView) -> None:
        self._next, self._settings = step, settings(optimizer)

    def _write_header(self, head: bytes) -> None:
        pass

    def begin(self, optimizer: OptimizerView) -> None:
        """Called before the forwards of a step: checks that the log can hold it.

        Before the first step it writes the header.
        """
        if self.closed:
            fail("trajectory", self.path, "an open log", "one that was closed", RuntimeError)
        if self._settings is None:
            if optimizer.state:
                got = "one with state from steps that are not in the log (resume=True continues a log)"
                fail("trajectory", "optimizer", "a fresh optimizer", got)
            head, layout = encode(whole_header(optimizer))  # all ranks together, where weights are sharded
            self._write_header(head)
            self._start(layout, optimizer.step_count, optimizer)
            self.flush()
        if settings(optimizer) != self._settings:
            expected = "the settings of the log (only lr may change): record to another file from here"
            fail(
                "trajectory", "param_groups", expected, "other hyper-parameters, streams or frozen parameters"
            )
        if optimizer.step_count != self._next:
            fail("trajectory", self.path, f"step {self._next}, the next of the log", optimizer.step_count)

    def append(self, optimizer: OptimizerView, buckets: list[Bucket], estimate: Estimate) -> None:
        self._next += 1

    def retract(self, optimizer: OptimizerView) -> None:
        self._next = optimizer.step_count

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Recorder(Follower):
    """The log to which an optimizer appends its steps.  :func:`record` makes it.

    A record is written before its step's update, by one system call.  So a killed process loses no completed
    step, but for those whose numbers a GPU had not yet sent.  Every ``sync`` seconds, and at :meth:`flush`,
    the file is synced, so that a machine that dies loses no more than the steps since then.

    Where a record cannot be written (a full disk), the file stays as it was, the step raises OSError, and has
    not happened.  Records of earlier steps whose numbers a GPU sends late wait in memory then, and so does
    the step's own on a mesh, whose other ranks take the step: no step begins, and no ``state_dict`` is made,
    before they are written.  When there is room the run goes on with a log that lacks nothing."""

    def __init__(
        self, path: str | os.PathLike[str], sync: float, before_close: Callable[[], None] = lambda: None
    ) -> None:
        """``before_close``: waits for other threads that write what the log's lock protects."""
        super().__init__(path)
        self._sync, self._before_close = sync, before_close
        self._file = AppendedFile("trajectory", self.path)
        self._queue = _Queue(self._file)
        self._synced = time.monotonic()
        self._mark: dict[str, Any] | None = None
        # What is on its way reaches the file when the recorder dies, and when the interpreter ends.
        self._finish = weakref.finalize(self, self._queue.finish)

    @property
    def closed(self) -> bool:
        return self._file.closed

    @closed.setter
    def closed(self, value: bool) -> None:
        pass  # the file knows

    @property
    def is_empty(self) -> bool:
        """Whether the file holds nothing yet."""
        return not self._file.end

    def go_on(self, log: Log, optimizer: OptimizerView) -> None:
        self._file.cut(log.end)
        super().go_on(log, optimizer)

    def _start(self, layout: Layout, step: int, optimizer: OptimizerView) -> None:
        super()._start(layout, step, optimizer)
        self._queue.start(layout, step)

    def clear(self) -> None:
        """Empties the file, which ends inside its header, so that no step was recorded."""
        self._file.cut(0)

    def _write_header(self, head: bytes) -> None:
        self._file.write(head, 0)

    def begin(self, optimizer: OptimizerView) -> None:
        if not self.closed:
            self._file.check_untouched()
            self._queue.write_arrived()
            if self._file.unsure:
                self._fsync()
        super().begin(optimizer)

    def append(self, optimizer: OptimizerView, buckets: list[Bucket], estimate: Estimate) -> None:
        self._queue.add(pending(optimizer, self._next, buckets, estimate))
        self._next += 1
        try:
            self._queue.write_arrived()
            if time.monotonic() - self._synced >= self._sync:
                self._fsync()
        except BaseException as error:
            if not optimizer.team.alone and isinstance(error, OSError):  # the other ranks take the step
                text = f"{error}: a record waits in memory, and no step begins before it can be written"
                warnings.warn(f"{optimizer.op}: {text}", stacklevel=2)
                return
            self.retract(optimizer)
            raise

    def retract(self, optimizer: OptimizerView) -> None:
        super().retract(optimizer)
        self._queue.retract(self._next)

    def flush(self) -> None:
        """Brings all steps taken so far into the file, and the file to the disk."""
        if not self.closed:
            self._queue.drain()
            self._fsync()

    def mark(self) -> dict[str, Any] | None:
        """The number of the next step, and the SHA-256 of the log before it: what tells this log from others.

        All steps are in the file then; it is :meth:`flush` that brings the file to the disk.
        """
        if not self.closed:
            self._mark = None if self.is_empty else self._queue.mark()
        return self._mark

    def _fsync(self) -> None:
        self._file.sync()
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the log.  The optimizer can take no further step.

        Raises OSError, and leaves the log open, where something cannot be written.
        """
        self._before_close()
        self.flush()
        self.mark()  # for a checkpoint that is written later
        self._finish.detach()
        self._file.close()


class _Queue:
    """Steps on their way into the file.  It outlives the recorder."""

    def __init__(self, file: AppendedFile) -> None:
        self.file = file
        self.layout: Layout | None = None
        self.written = 0  #: the number of the first step that is not in the file
        self._origin = 0, 0  # a step, and its byte in the file
        self._steps: deque[_Pending] = deque()
        self._lock = threading.RLock()  # a streamed run drains it from the thread that writes blocks

    def start(self, layout: Layout, step: int) -> None:
        self.layout, self.written, self._origin = layout, step, (step, self.file.end)

    def add(self, step: _Pending) -> None:
        with self._lock:
            self._steps.append(step)

    def retract(self, step: int) -> None:
        """Takes back the record of ``step``, which is the last, wherever it is by now."""
        with self._lock:
            while self._steps and self._steps[-1].step >= step:
                self._steps.pop()
            if self.written > step:
                self.written = step
                with suppress(OSError):  # the next record is written at the same place
                    self.file.cut(self._place(step))

    def _place(self, step: int) -> int:
        """Where the record of ``step`` begins in the file, in bytes."""
        assert self.layout is not None  # steps come behind the header
        first, begin = self._origin
        return begin + (step - first) * self.layout.size

    def write_arrived(self) -> None:
        """Writes the steps whose numbers are here."""
        with self._lock:
            steps = self._steps
            while steps and (len(steps) > _IN_FLIGHT or steps[0].arrived is None or steps[0].arrived.query()):
                self._write_first()

    def drain(self) -> None:
        with self._lock:
            while self._steps:
                self._write_first()

    def mark(self) -> dict[str, Any]:
        with self._lock:
            self.drain()
            return {"step": self.written, "sha256": self.file.sha256()}

    def finish(self) -> None:
        if self.file.closed:  # in a forked child
            return
        try:
            self.drain()
            self.file.sync()
        finally:
            self.file.close()

    def _write_first(self) -> None:
        """Writes the first step at its own place, so that one whose writing was interrupted is not there
        twice.
        """
        assert self.layout is not None  # steps come behind the header
        step = self._steps[0]
        self.file.write(self.layout.pack(step.record(self.layout)), self._place(step.step))
        self.written = step.step + 1
        self._steps.popleft()
