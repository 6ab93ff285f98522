"""Several runs of one function, called sides, which stop where they ask for the same block.

Between its blocks a forward is ordinary Python, and only a thread can stop in the middle of that.  So each
side is a thread.  A baton goes from one to the next: no two sides ever run at once, and each has its own
torch RNG state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from ..step.guards import RngState, uninterrupted


class Cancelled(BaseException):
    """Raised in a side because another side failed."""


class _Side:
    def __init__(self, index: int) -> None:
        self.index = index
        self.thread: int | None = None  #: the one that it runs in, while it does
        self.baton = threading.Event()
        self.waits_for: Hashable = None
        self.ready, self.done = True, False
        self.cancelled = False  #: whether the thread of :meth:`Lockstep.run` does not wait for it any more
        self.left = threading.Event()
        self.rng: RngState | None = None
        self.result: Any = None
        self.error: BaseException | None = None


class Lockstep:
    """Runs sides until each waits for a block or is done.

    ``grant(key, sides)`` is called when all sides that are left wait.  It gets what the first of them waits
    for, and the sides that wait for the same.
    """

    def __init__(self, grant: Callable[[Any, list[int]], None], devices: Iterable[torch.device]) -> None:
        self._grant, self._devices = grant, list(devices)
        self.generators: Sequence[torch.Generator] = ()  #: of the closure, besides torch's own
        self._pool: ThreadPoolExecutor | None = None
        self._sides: list[_Side] = []
        self._running: _Side | None = None
        self._failed = False

    @property
    def current(self) -> int | None:
        """The side that runs, while :meth:`run` does."""
        side = self._side
        return None if side is None else side.index

    @property
    def _side(self) -> _Side | None:
        """The side that runs; None when all have ended, also where another thread's exception cut off
        :meth:`run` before it forgot them.
        """
        return None if all(s.done or s.cancelled for s in self._sides) else self._running

    def _rng_state(self) -> RngState:
        return RngState(self._devices, self.generators)

    @property
    def in_own_thread(self) -> bool:
        """Whether the calling thread is that of the side that runs."""
        side = self._side
        return side is not None and side.thread == threading.get_ident()

    def run(self, function: Callable[[int], Any], count: int) -> list[Any]:
        """[function(0), ..., function(count - 1)].  The first is called in this thread.

        All sides start from torch's present RNG state.  The last one's is left at the end, as if they had run
        one after another.
        """
        if not count:
            return []
        if self._side is not None:
            raise RuntimeError("offload: a step inside a step")
        try:
            return self._run(function, count)
        finally:
            self._sides, self._running = [], None

    def _run(self, function: Callable[[int], Any], count: int) -> list[Any]:
        start, sides = self._rng_state(), [_Side(i) for i in range(count)]
        for side in sides:
            side.rng = start
        setting = _ThreadSetting(self._devices)
        if count > 1 and (self._pool is None or self._pool._max_workers < count - 1):
            self.close()
            self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="zokernels-side")
        try:
            self._sides, self._failed, self._running = sides, False, sides[0]
            with uninterrupted() as hold:  # but for the function itself: a side that is left waits for ever
                futures = [
                    self._pool.submit(copy_context().run, self._in_thread, setting, function, side)  # type: ignore[union-attr]
                    for side in sides[1:]
                ]
                self._call(function, sides[0], hold)
                wait(futures)
        except BaseException:  # another thread's, which can fall anywhere
            self._cancel(sides)
            start.restore()
            raise
        errors = [s.error for s in sides if s.error is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, Cancelled)):
            raise error
        sides[-1].rng.restore()  # type: ignore[union-attr]
        return [s.result for s in sides]

    def _cancel(self, sides: Sequence[_Side]) -> None:
        """Ends the sides of other threads, one after the other, wherever the baton is."""
        self._failed = sides[0].done = True
        for side in sides[1:]:
            side.cancelled = True
            side.baton.set()
            if side.thread is not None:
                side.left.wait()
        self.close()  # with what has not begun

    def arrive(self, key: Hashable) -> None:
        """The running side asks for ``key``; returns when that is granted, and it is the side's turn."""
        side = self._running
        assert side is not None
        side.waits_for, side.ready = key, False
        self._hand_over(side)
        if self._failed or side.cancelled:
            raise Cancelled

    def _in_thread(self, setting: _ThreadSetting, function: Callable[[int], Any], side: _Side) -> None:
        side.baton.wait()
        # until the baton is handed on: the next block may be brought in by this thread
        with ExitStack() as stack:

            def begin(index: int) -> Any:
                stack.enter_context(setting)
                side.rng.restore()  # type: ignore[union-attr]
                if self._failed or side.cancelled:
                    raise Cancelled
                return function(index)

            try:
                self._call(begin, side)
            finally:
                side.left.set()

    def _call(self, function: Callable[[int], Any], side: _Side, hold: uninterrupted | None = None) -> None:
        """``hold``: what holds signals back around this call, and not while ``function`` runs."""
        side.thread = threading.get_ident()
        try:
            run = lambda: function(side.index)
            side.result = run() if hold is None else hold.call(run)
        except BaseException as error:  # it is raised again in run()
            side.error, self._failed = side.error or error, True
        side.done = True
        self._hand_over(side)

    def _hand_over(self, side: _Side) -> None:
        """Lets the next side run; returns when it is this one's turn again, or when it is done.

        Signals are held back meanwhile, while the others run to their next block, too: their handlers then
        raise here, in the side that is to run."""
        with uninterrupted():
            self._pass_on(side)

    def _pass_on(self, side: _Side) -> None:
        side.rng = self._rng_state()
        try:
            following = self._next()
        except BaseException as error:
            side.error, self._failed = side.error or error, True
            following = self._next()
        if following is side:
            return
        side.baton.clear()
        if following is not None:
            self._running = following
            following.baton.set()
        if side.done:
            return
        side.baton.wait()
        side.rng.restore()

    def _next(self) -> _Side | None:
        left = [s for s in self._sides if not s.done]
        if self._failed:  # each in turn runs into Cancelled
            return left[0] if left else None
        for s in left:
            if s.ready:
                return s
        if not left:
            return None
        together = [s for s in left if s.waits_for == left[0].waits_for]
        self._grant(left[0].waits_for, [s.index for s in together])
        for s in together:
            s.ready = True
        return left[0]

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class _ThreadSetting:
    """What torch keeps for each thread: read where this is made, and set in the thread that enters it."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._threads = torch.get_num_threads()
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        types = dict.fromkeys(("cpu", *(d.type for d in devices)))
        self._autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
        self._cache = torch.is_autocast_cache_enabled()
        self._modes = _get_current_function_mode_stack()
        self._streams = [torch.cuda.current_stream(d) for d in devices if d.type == "cuda"]
        self._device = torch.cuda.current_device() if self._streams else None

    def __enter__(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self._inside = [torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad)]
        for context in self._inside:
            context.__enter__()
        for kind, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self._cache)
        for mode in self._modes:
            torch._C._push_on_torch_function_stack(mode)
        if self._device is not None:
            for stream in self._streams:
                torch.cuda.set_stream(stream)
            torch.cuda.set_device(self._device)

    def __exit__(self, *exception: object) -> None:
        for _ in self._modes:
            torch._C._pop_torch_function_stack()
        for kind, _, _ in self._autocast:  # the thread serves other steps, which may be without
            torch.set_autocast_enabled(kind, False)
        for context in reversed(self._inside):
            context.__exit__(None, None, None)
