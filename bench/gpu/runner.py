"""Runs stages: each in a process of its own, with a limit; what ends it, and how, is its outcome.

Nothing that a stage does ends the check: an exit status, a signal, a hang and an exception are all reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import stage as stages
from .stage import ROOT, Context, Stage

#: The limit of a stage in a rehearsal, in seconds.  Those of the plan are for a GPU and would be short for a
#: busy CPU.
REHEARSED = 900

#: Says why the whole check has to end now, or None.
Stop = Callable[[], "str | None"]


@dataclass(frozen=True)
class Outcome:
    name: str
    kind: str
    #: passed, failed, skipped (it never ran) or stopped (it ran, and was ended)
    status: str
    note: str
    seconds: float = 0.0


def groups(plan: Sequence[Stage]) -> list[list[Stage]]:
    """The stages that start together, in their order."""
    found: list[list[Stage]] = []
    for stage in plan:
        if stage.beside and found:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def too_late(stage: Stage, seconds_left: float) -> str | None:
    """Why ``stage`` is not started, or None where its time is left."""
    if seconds_left >= stage.seconds:
        return None
    return f"takes about {stage.seconds} s, {max(seconds_left, 0):.0f} s are left"


class Job:
    """A stage that runs, and that is stopped after ``seconds``."""

    def __init__(self, stage: Stage, ctx: Context, seconds: float, command: list[str]) -> None:
        self.stage, self.ctx, self.allowed = stage, ctx, seconds
        self.start = time.monotonic()
        with (ctx.output / f"{stage.name}.log").open("w") as log:
            # It leads a session, so that everything that the stage starts can be ended with it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=stages.environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def kill(self) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process that hangs in the driver cannot be ended, but the other stages can still run.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def ended(self, stop: str | None) -> Outcome | None:
        """The outcome, once there is one; until then None."""
        code, seconds = self.process.poll(), self.seconds
        if code is None and stop is None and seconds < self.allowed:
            return None
        self.kill()  # a process that has ended may have left others running
        make = lambda status, note: Outcome(self.stage.name, self.stage.kind, status, note, round(seconds, 1))
        if code is None:
            return make("stopped", f"by {stop}" if stop else f"after {self.allowed:.0f} s")
        try:
            status, note = json.loads((self.ctx.scratch / f"{self.stage.name}.outcome").read_text())
        except (OSError, ValueError):
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return make("failed", f"its process ended without a word: {how}")
        return make(status, note)


def run_together(
    group: Sequence[Stage],
    ctx: Context,
    seconds_left: float,
    stop: Stop = lambda: None,
    command: Callable[[Stage, Context], list[str]] = stages.command,
) -> Iterator[Outcome]:
    """Starts the stages of ``group`` and yields the outcome of each when it ends."""
    limit = lambda stage: REHEARSED if ctx.rehearse else stage.limit
    jobs = [Job(s, ctx, min(limit(s), seconds_left), command(s, ctx)) for s in group]
    try:
        while jobs:
            why = stop()
            for job in list(jobs):
                if (outcome := job.ended(why)) is not None:
                    jobs.remove(job)
                    yield outcome
            time.sleep(0.02)
    finally:
        for job in jobs:
            job.kill()


def follow(
    plan: Sequence[Stage],
    ctx: Context,
    deadline: float,
    stop: Stop = lambda: None,
    starting: Callable[[Sequence[Stage]], None] = lambda group: None,
    command: Callable[[Stage, Context], list[str]] = stages.command,
) -> Iterator[Outcome]:
    """The whole plan until ``deadline``, a time of time.monotonic: an outcome for every stage, also for those
    for which no time was left.  ``starting`` is told which stages are about to run.
    """
    for group in groups(plan):
        left, ready = deadline - time.monotonic(), []
        for stage in group:
            reason = f"{why} ended the check" if (why := stop()) else too_late(stage, left)
            if reason:
                yield Outcome(stage.name, stage.kind, "skipped", reason)
            else:
                ready.append(stage)
        if ready:
            starting(ready)
            yield from run_together(ready, ctx, left, stop, command)


def verdict(outcomes: Sequence[Outcome], rehearse: bool) -> bool:
    """Whether every stage that decides has passed.  A check may leave out only what is optional; a rehearsal
    may leave out anything, but whatever it runs must end well, figures too.
    """
    for o in outcomes:
        ran_badly = o.status in ("failed", "stopped")
        if o.kind == "required" and o.status != "passed" and not (rehearse and o.status == "skipped"):
            return False
        if o.kind == "optional" and (o.status == "failed" or (rehearse and ran_badly)):
            return False
        if o.kind == "measure" and rehearse and ran_badly:
            return False
    return True
