"""Writing a log while an optimizer runs, and going on with one."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checks import fail
from ..optim.update import known_on_host, learning_rate
from .format import Layout, Log, Record, encode, read, scan
from .replay import repeat_all
from .settings import check_base, check_same_run, own_part, settings, whole_header

if TYPE_CHECKING:
    from ..distributed import Exchange
    from ..optim.groups import Bucket
    from ..optim.optimizer import Estimate, ZerothOrder

#: Steps whose numbers may be on their way from a GPU; the one before them is waited for.
_IN_FLIGHT = 64


class _Pending(NamedTuple):
    step: int
    two_pass: bool
    carried: bool
    groups: tuple[int | None, ...]  #: of each group, its place among the gradients
    values: Tensor  #: float64 on the host: finite, multiple, loss, rates, losses, gradients
    arrived: torch.cuda.Event | None

    def record(self, layout: Layout) -> Record:
        """Waits for the numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        finite, multiple, loss, *rest = self.values.tolist()
        rates, losses = rest[: layout.groups], rest[layout.groups : layout.groups + layout.losses]
        g, q = rest[layout.groups + layout.losses :], layout.directions
        gradients = tuple((0.0,) * q if i is None else tuple(g[i * q : (i + 1) * q]) for i in self.groups)
        flags = bool(finite), self.two_pass, self.carried
        return Record(self.step, *flags, int(multiple), loss, tuple(rates), gradients, tuple(losses))


def pending(optimizer: ZerothOrder, step: int, buckets: list[Bucket], estimate: Estimate) -> _Pending:
    """The numbers of a step, on their way to the host."""
    groups, elsewhere = optimizer.param_groups, estimate.elsewhere
    places = [id(group) for group in (*(b.group for b in buckets), *(group for group, _ in elsewhere))]
    place = {key: i for i, key in reversed(list(enumerate(places)))}
    like = estimate.gradients[0]
    number = lambda v: (v if isinstance(v, Tensor) else torch.full((), v, device=like.device)).double().reshape(-1)
    rates = [learning_rate(group, like) for group in groups]
    numbers = [estimate.finite, 1.0 if estimate.multiple is None else estimate.multiple]
    numbers += [optimizer.estimator.loss(estimate.losses).float(), *(_double(r, like) for r in rates)]
    numbers += [estimate.losses] if optimizer.rule.reads_losses else []
    numbers += [*estimate.gradients, *(g for _, g in elsewhere)]
    values, arrived = torch.cat([number(v) for v in numbers]), None
    if not known_on_host(values):
        stream = torch.cuda.current_stream(values.device)  # which copies, whatever the current device is
        values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(stream)
    at = tuple(place.get(id(group)) for group in groups)
    return _Pending(step, bool(optimizer._two_pass), optimizer._carried, at, values, arrived)


class Follower:
    """The checks of a log before each step.  With a mesh all ranks make them, and only the first writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.closed = os.fspath(path), False
        self._settings: tuple[Any, ...] | None = None
        self._next = 0

    def go_on(self, log: Log, optimizer: ZerothOrder) -> None:
        """Append behind the last good record of ``log``."""
        self._start(log.layout, log.start + log.steps, optimizer)

    def _start(self, layout: Layout, step: int, optimizer: ZerothOrder) -> None:
        self._next, self._settings = step, settings(optimizer)

    def _write_header(self, head: bytes) -> None:
        pass

    def begin(self, optimizer: ZerothOrder) -> None:
        """Before the forwards of a step: the header, before the first; and whether the log can hold the step."""
        if self.closed:
            fail("trajectory", self.path, "an open log", "one that was closed", RuntimeError)
        if self._settings is None:
            if optimizer.state:
                got = "one with state from steps that are not in the log (resume=True continues a log)"
                fail("trajectory", "optimizer", "a fresh optimizer", got)
            head, layout = encode(whole_header(optimizer))  # of sharded weights: all ranks together
            self._write_header(head)
            self._start(layout, optimizer.step_count, optimizer)
            self.flush()
        if settings(optimizer) != self._settings:
            expected = "the settings of the log (only lr may change): record to another file from here"
            fail("trajectory", "param_groups", expected, "other hyper-parameters, streams or frozen parameters")
        if optimizer.step_count != self._next:
            fail("trajectory", self.path, f"step {self._next}, the next of the log", optimizer.step_count)

    def append(self, optimizer: ZerothOrder, buckets: list[Bucket], estimate: Estimate) -> None:
        self._next += 1

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Recorder(Follower):
    """The log that an optimizer appends to.  Made by :func:`record`.

    A record is written after its step's update, by one system call: a killed process loses no completed step but those
    whose numbers a GPU had not yet sent.  Every ``sync`` seconds, and at :meth:`flush`, the file is synced, so that a
    machine that dies loses no more than that.
    """

    def __init__(self, path: str | os.PathLike[str], sync: float) -> None:
        super().__init__(path)
        self._sync = sync
        self._file: BinaryIO = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            fail("trajectory", self.path, "a file that no one else writes", "one that is locked", RuntimeError)
        self._queue = _Queue(self._file)
        self._synced = time.monotonic()
        # What is on its way reaches the file when the optimizer dies, and when the interpreter ends.
        self._finish = weakref.finalize(self, self._queue.finish)

    @property
    def closed(self) -> bool:
        return self._file.closed

    @closed.setter
    def closed(self, value: bool) -> None:
        pass  # the file knows

    def go_on(self, log: Log, optimizer: ZerothOrder) -> None:
        self._file.truncate(log.end)
        super().go_on(log, optimizer)

    def _start(self, layout: Layout, step: int, optimizer: ZerothOrder) -> None:
        super()._start(layout, step, optimizer)
        self._queue.layout = layout

    def _write_header(self, head: bytes) -> None:
        self._queue.write(head)

    def append(self, optimizer: ZerothOrder, buckets: list[Bucket], estimate: Estimate) -> None:
        """After the update of a step."""
        self._queue.add(pending(optimizer, self._next, buckets, estimate))
        self._next += 1
        if time.monotonic() - self._synced >= self._sync:
            self._fsync()

    def flush(self) -> None:
        """All steps taken so far into the file, and the file to the disk."""
        if not self.closed:
            self._queue.drain()
            self._fsync()

    def _fsync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flush and close; the optimizer can take no further step."""
        self._finish()


def _double(rate: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(rate, Tensor):
        return rate
    return torch.full((), rate, dtype=torch.float64, device=like.device)


class _Queue:
    """Steps on their way into the file; it outlives the recorder."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.layout: Layout | None = None
        self._steps: deque[_Pending] = deque()
        self._lock = threading.Lock()  # a streamed run drains it from the thread that writes blocks

    def add(self, step: _Pending) -> None:
        """And write those that are here."""
        steps = self._steps
        with self._lock:
            steps.append(step)
            while steps and (len(steps) > _IN_FLIGHT or steps[0].arrived is None or steps[0].arrived.query()):
                self._write_first()

    def drain(self) -> None:
        with self._lock:
            while self._steps:
                self._write_first()

    def finish(self) -> None:
        try:
            self.drain()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def write(self, data: bytes) -> None:
        if (written := self.file.write(data)) != len(data):
            fail("trajectory", str(self.file.name), f"room for {len(data)} bytes", f"{written} written", OSError)

    def _write_first(self) -> None:
        assert self.layout is not None  # steps come behind the header
        self.write(self.layout.pack(self._steps[0].record(self.layout)))
        self._steps.popleft()


def record(
    optimizer: ZerothOrder,
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    recover: bool = False,
    rewind: bool = False,
    sync: float = 10.0,
) -> Follower:
    """Append a record of every step of ``optimizer`` to ``path``.

    The header, with the SHA-256 of the weights as they are then, is written before the first step.  The settings then
    stay as they are but for lr.

    Args:
        path: a file that does not exist or is empty, unless ``resume`` or ``rewind``.
        resume: where the file holds a log of a run like this optimizer's, the weights, which must be those that the
            run began with, and the optimizer first take its steps.  A record that a kill cut off is removed.
        recover: also remove what follows a damaged record.
        rewind: for an optimizer and weights that come from a checkpoint at step n: where the file holds a log of a run
            like this optimizer's, its steps from n on are removed, and the run goes on from there.  Of the weights only
            those at the log's first step can be compared with it.
        sync: seconds between two syncs of the file to the disk; 0: after every step.

    On a mesh all ranks call this; the first one has the file, and the others get the log from it.

    Returns: the :class:`Recorder` (on the other ranks of a mesh a :class:`Follower`, which writes nothing);
    ``recorder.close()`` ends the log, as does the end of the program.

    Raises: ValueError, before a weight or the file changes, where the log is damaged or of another run, or the weights
    are not its base; RuntimeError where another writer has it open.
    """
    if resume and rewind:
        fail("trajectory", "resume, rewind", "one of them", "both")
    if not optimizer.replayable:
        fail("trajectory", "optimizer", "steps along directions", type(optimizer).__name__)
    if optimizer._state.capturable:
        fail("trajectory", "capturable", "False: the replays of a CUDA graph call no host function", True)
    if optimizer._recorder is not None and not optimizer._recorder.closed:
        fail("trajectory", "optimizer", "one log at a time", optimizer._recorder.path, RuntimeError)
    if optimizer._exchange:
        optimizer._recorder = _record_together(optimizer, optimizer._exchange, path, resume, recover, rewind, sync)
        return optimizer._recorder
    recorder = Recorder(path, sync)
    try:
        if (log := _log_to_resume(optimizer, recorder, resume, recover, rewind)) is not None:
            _resume(optimizer, recorder, log, rewind)
    except BaseException:
        recorder.close()
        raise
    optimizer._recorder = recorder
    return recorder


def _record_together(
    optimizer: ZerothOrder,
    exchange: Exchange,
    path: str | os.PathLike[str],
    resume: bool,
    recover: bool,
    rewind: bool,
    sync: float,
) -> Follower:
    """The first rank has the file, and sends the others the log that it resumes: no file system need be shared."""
    recorder, log = Follower(path), None
    error: Exception | None = None
    exchange.agreement.start(optimizer)
    if exchange.is_first:
        try:
            recorder = Recorder(path, sync)
            log = _log_to_resume(optimizer, recorder, resume, recover, rewind)
        except Exception as failure:
            error = failure
    data = None
    if log is not None:
        with open(log.path, "rb") as file:
            data = file.read(log.end)
    try:
        error, data = exchange.from_first((error, data))
        if error is not None:
            raise error
        if data is not None:
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(data)
                copy.flush()
                received = scan(copy.name)
                assert received is not None  # the first rank has read it
                _resume(optimizer, recorder, received, rewind)
    except BaseException:
        recorder.close()
        raise
    return recorder


def _log_to_resume(optimizer: ZerothOrder, recorder: Recorder, resume: bool, recover: bool, rewind: bool) -> Log | None:
    """The log that is in the recorder's file, if any; to ``rewind`` without the steps that the optimizer is before."""
    if not os.path.getsize(recorder.path):
        return None
    if not (resume or rewind):
        fail("trajectory", recorder.path, "a new file, or resume=True", "a file with a log")
    log = scan(recorder.path)
    if log is None:  # killed inside the header: no step was taken
        recorder._file.truncate(0)
        return None
    if rewind:
        step, end = optimizer.step_count, log.start + log.steps
        if not log.start <= step <= end:
            expected = f"a log with the steps before {step}, the checkpoint's"
            fail("trajectory", f"{recorder.path}: rewind", expected, f"steps {log.start} to {end} (exclusive)")
        return replace(log, steps=step - log.start)
    if log.broken and not log.cut_off and not recover:
        read(recorder.path)  # raises
    if optimizer.state or optimizer.step_count:
        fail("trajectory", "optimizer", "a fresh one, which takes the recorded steps", f"step {optimizer.step_count}")
    return log


def _resume(optimizer: ZerothOrder, recorder: Follower, log: Log, rewind: bool) -> None:
    check_same_run(optimizer, log.header)
    if not (rewind and log.steps):  # else the weights are those of a checkpoint
        check_base(own_part(optimizer, log.header), [group["params"] for group in optimizer.param_groups])
    if not rewind:
        _take(optimizer, log)
    recorder.go_on(log, optimizer)


def _take(optimizer: ZerothOrder, log: Log) -> None:
    """The steps of ``log``, by the optimizer and its weights."""
    optimizer._state.load(optimizer.seed, log.start, 0)
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        repeat_all(optimizer, log.header["gated"], log.records())
    finally:
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
    optimizer._skips_told = int(optimizer._state.skipped)  # warned of when they were taken
