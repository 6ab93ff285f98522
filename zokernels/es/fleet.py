"""Engines that share out tasks, and are made anew when they die."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ..checks import fail
from .engines import Engine, Here
from .run import Run


def _names(engine: Engine) -> list[str]:
    return engine.names()


def _catch_up(engine: Engine, updates: list[tuple[Any, ...]]) -> None:
    for update in updates:
        engine.update(*update)


class Fleet:
    """Engines that share out tasks.

    One that dies is made anew, takes the updates so far, and does its work again.
    """

    def __init__(self, engines: Here) -> None:
        self.engines = engines
        self.updates = [] if engines.run is None else self._updates_of(engines.run)
        self.restarts = 0  # since the last task that an engine has finished

    @staticmethod
    def _updates_of(run: Run) -> list[tuple[Any, ...]]:
        return [u for u in map(run.update, run.past) if u is not None]

    def join(self, run: Run) -> None:
        """Brings engines that are at the base of ``run`` to where its log ends."""
        if self.engines.run not in (None, run):
            fail("es", "engines", "engines of this run", "those of another one, whose updates they have")
        self.updates = self._updates_of(run)
        (found,) = self.map(_names, [()])
        if differ := run.names.symmetric_difference(found):
            got = f"{min(differ)!r} in one of them alone"
            fail("es", "engines", "the parameters of the run (its names=engine.names())", got)
        self.engines.run = run
        self._bring_up()

    def map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """``function(engine, *task)`` of each task, by the engine that is free first; results in order."""
        results: list[Any] = [None] * len(tasks)
        waiting, free = list(enumerate(tasks))[::-1], list(range(len(self.engines)))[::-1]
        running: list[tuple[Any, int, int, tuple[Any, ...]]] = []
        while waiting or running:
            while waiting and free:
                place, task = waiting.pop()
                i = free.pop()
                running.append((self.engines.submit(i, function, *task), i, place, task))
            done = self.engines.wait([handle for handle, *_ in running])
            at = next(n for n, (handle, *_) in enumerate(running) if handle is done)
            handle, i, place, task = running.pop(at)
            try:
                results[place] = self.engines.result(handle)
                self.restarts = 0
            except self.engines.dead:
                self._revive(i)
                waiting.append((place, task))
            free.append(i)
        return results

    def all(self, function: Callable[..., Any]) -> None:
        """``function(engine)`` on every engine, but on one that is made anew, which is at theta."""
        handles = [self.engines.submit(i, function) for i in range(len(self.engines))]
        for i, handle in enumerate(handles):
            try:
                self.engines.result(handle)
            except self.engines.dead:
                self._revive(i)

    def _bring_up(self) -> None:
        """Lets every engine take the updates that it lacks.

        An engine that an exception has left with a part of them is made anew.
        """
        handles, taken = [], self.engines.taken
        for i in range(len(self.engines)):
            if (done := taken[i]) is None:
                self.engines.restart(i)
                done = 0
            taken[i] = None
            handles.append(self.engines.submit(i, _catch_up, self.updates[done:]))
        for i, handle in enumerate(handles):
            try:
                self.engines.result(handle)
                taken[i] = len(self.updates)
            except self.engines.dead:
                self._revive(i)

    def update(self, update: tuple[Any, ...]) -> None:
        self.updates.append(update)
        self._bring_up()

    def _revive(self, i: int) -> None:
        """Makes engine ``i`` anew; it may die again while it takes the updates."""
        while True:
            self.restarts += 1
            if self.restarts > 3 * len(self.engines):
                fail("es", f"engine {i}", "an engine that lives", f"{self.restarts} that died", RuntimeError)
            self.engines.restart(i)
            with contextlib.suppress(*self.engines.dead):
                self.engines.taken[i] = None
                self.engines.result(self.engines.submit(i, _catch_up, self.updates))
                self.engines.taken[i] = len(self.updates)
                return
