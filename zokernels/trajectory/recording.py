"""Giving an optimizer its log: a new one, or one that is there and goes on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..checks import fail
from ..files.appending import sha256_of
from ..step import roles
from ..step.step import StepOptimizer
from .format import Log, read, scan
from .recorder import Follower, Recorder
from .replay import check_records, repeat_all, retaking
from .settings import check_base, check_same_run, own_part


def record(
    optimizer: StepOptimizer,
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    recover: bool = False,
    rewind: bool = False,
    sync: float = 10.0,
) -> Follower:
    """Appends a record of every step of ``optimizer`` to ``path``.

    The header is written before the first step, with the SHA-256 of the weights as they are then.  From there
    on no setting but lr may change.

    Args:
        path: a file that does not exist or is empty, unless ``resume`` or ``rewind``.
        resume: go on with the log in the file, if there is one.  The weights must be those that the run began
            with; they and the optimizer first take its steps.  A record that a kill cut off is removed.
        recover: also remove what follows a damaged record.
        rewind: go on with the log in the file, if there is one, from step n, where the optimizer and the
            weights come from a checkpoint at step n.  The log's steps from n on are removed.  Those before
            must be the ones with which the checkpoint was written: its ``state_dict`` has their SHA-256.
        sync: seconds between two syncs of the file to the disk; 0: after every step.

    On a mesh all ranks call this.  The first one has the file, and the others get the log from it.

    Returns: the :class:`Recorder`, or on the other ranks of a mesh a :class:`Follower`, which writes nothing.
    ``recorder.close()`` ends the log, and so does the end of the program.

    Raises: ValueError, before a weight or the file changes, where the log is damaged or of another run, or
    the weights are not its base; RuntimeError where another writer has it open.
    """
    if resume and rewind:
        fail("trajectory", "resume, rewind", "one of them", "both")
    if not optimizer.replayable:
        fail("trajectory", "optimizer", "steps along directions", optimizer.op)
    if optimizer.part and resume:
        expected = "rewind=True, from a checkpoint: a log has no first-order weights to go on with"
        fail("trajectory", "resume", expected, True)
    if optimizer.run_state.capturable:
        fail("trajectory", "capturable", "False: the replays of a CUDA graph call no host function", True)
    if isinstance(optimizer.log, Follower) and not optimizer.log.closed:
        fail("trajectory", "optimizer", "one log at a time", optimizer.log.path, RuntimeError)
    team = optimizer.team
    team.join(optimizer)
    recorder, log, error = Follower(path), None, None
    try:
        if team.is_first:
            try:
                recorder = Recorder(path, sync)
                log = _log_to_resume(optimizer, recorder, resume, recover, rewind)
            except Exception as failure:  # which all processes raise
                error = failure
        with _from_first(team, log, error) as log:
            if log is not None:
                _resume(optimizer, recorder, log, rewind)
    except BaseException:
        recorder.close()
        raise
    optimizer.log = recorder
    return recorder


@contextmanager
def _from_first(team: roles.Team, log: Log | None, error: Exception | None) -> Iterator[Log | None]:
    """The log that the first process resumes, or its error.

    No file system need be shared: the others get a copy.
    """
    data = None
    if log is not None and not team.alone:
        with open(log.path, "rb") as file:
            data = file.read(log.end)
    error, data = team.from_first((error, data))
    if error is not None:
        raise error
    if team.is_first or data is None:
        yield log
        return
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(data)
        copy.flush()
        received = scan(copy.name)
        assert received is not None  # the first process has read it
        yield received


def _log_to_resume(
    optimizer: StepOptimizer, recorder: Recorder, resume: bool, recover: bool, rewind: bool
) -> Log | None:
    """The log in the recorder's file, if any; with ``rewind``, only its steps before the optimizer's."""
    if recorder.is_empty:
        return None
    if not (resume or rewind):
        fail("trajectory", recorder.path, "a new file, or resume=True", "a file with a log")
    log = scan(recorder.path)
    if log is None:  # killed inside the header: no step was taken
        recorder.clear()
        return None
    if rewind:
        step, end = optimizer.step_count, log.start + log.steps
        if not log.start <= step <= end:
            expected = f"a log with the steps before {step}, the checkpoint's"
            fail(
                "trajectory", f"{recorder.path}: rewind", expected, f"steps {log.start} to {end} (exclusive)"
            )
        log = replace(log, steps=step - log.start)
        if log.steps:
            _check_mark(log, optimizer.log.expected, step)
        return log
    if log.broken and not log.cut_off and not recover:
        read(recorder.path)  # raises
    if optimizer.state or optimizer.step_count:
        expected = "a fresh one, which takes the recorded steps"
        fail("trajectory", "optimizer", expected, f"step {optimizer.step_count}")
    return log


def _check_mark(log: Log, mark: dict[str, Any] | None, step: int) -> None:
    """Raises where the log before ``step`` is not the one with which the checkpoint of ``mark`` was
    written.
    """
    where = f"{log.path}: rewind"
    if mark is None:
        expected = "a state_dict of an optimizer with this log"
        fail("trajectory", where, expected, "one of an optimizer without a log")
    if mark["step"] != step:
        fail("trajectory", where, f"a state_dict of step {mark['step']}, as its log's", f"step {step}")
    if sha256_of(log.path, [log.end])[log.end] != mark["sha256"]:
        expected = f"the log with which the checkpoint was written, up to step {step}"
        fail("trajectory", where, expected, "another run's")


def _resume(optimizer: StepOptimizer, recorder: Follower, log: Log, rewind: bool) -> None:
    check_same_run(optimizer, log.header)
    if not (rewind and log.steps):  # else the weights are those of a checkpoint
        check_base(own_part(optimizer, log.header), [group["params"] for group in optimizer.param_groups])
    if not rewind:
        check_records(optimizer, log.records())
        with retaking(optimizer, log.start):
            repeat_all(optimizer, log.header["gated"], log.records())
    recorder.go_on(log, optimizer)
