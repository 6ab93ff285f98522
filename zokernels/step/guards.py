"""What must hold around the forwards of a step: one RNG state for all, and no interrupt inside an update."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from threading import get_ident
from typing import Any

import torch

from ..checks import fail
from ..transfer import CPU

#: What signal's functions call: they also make an enum of each number and handler, which takes longer than
#: the rest.
_signal: Any = importlib.import_module("_signal")
_NUMBERS = tuple(sorted(map(int, signal.valid_signals())))
NOTHING = nullcontext()
_C: Any = torch._C  # whose annotations lack some functions


def is_capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured.  Where no parameter is on a GPU, CUDA is not even asked."""
    if devices == [CPU]:
        return False
    return any([d != CPU and d.type == "cuda" for d in devices]) and torch.cuda.is_current_stream_capturing()


def check_transforms(op: str) -> None:
    """Raises RuntimeError inside ``torch.func``'s transforms, which hide what is written from the weights."""
    if torch._C._functorch.maybe_current_level() is not None:
        expected = "a call outside vmap, grad and other transforms of torch.func (a closure may use them)"
        fail(op, "step", expected, "one inside", RuntimeError)


class OwnProcess:
    """Remembers the process that first uses something whose threads a forked child does not have.

    These are torch's own threads on the CPU, for which a child would wait without end, and those of a stream.
    """

    def __init__(self) -> None:
        self._id: int | None = None

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that called :meth:`check` first."""
        return self._id is not None and self._id != os.getpid()

    def check(self, op: str, argument: str) -> None:
        """Raises RuntimeError in a child of the process that called this first."""
        if self.is_forked:
            expected = "the process that took the first step (start workers with 'spawn')"
            fail(op, argument, expected, "a fork of it, which has none of its threads", RuntimeError)
        self._id = os.getpid()


class ThreadState:
    """What a step switches off in its thread: torch functions, and autocast's cache.

    An exception of another thread can fall between the two ends of such a switch."""

    def __init__(self) -> None:
        # torch's object for the state is made in each call, which takes long; mostly it is this one
        self._functions = _C._TorchFunctionState.ENABLED
        if not _C._is_torch_function_enabled():
            self._functions = _C._get_torch_function_state()
        self._cache = torch.is_autocast_cache_enabled()

    def restore(self) -> None:
        _C._set_torch_function_state(self._functions)
        torch.set_autocast_cache_enabled(self._cache)


class RngState:
    """torch's RNG state on the CPU and on each CUDA device of the parameters, from which all forwards start.

    On CUDA it is the (seed, offset) that the host keeps of the generator, so nothing waits for the device.

    ``generators``: others, which the closure draws from.
    """

    def __init__(self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> None:
        self.cpu = torch.default_generator.get_state()
        self._others = [(g, g.get_state()) for g in generators] if generators else []
        there = [] if devices == [CPU] else devices
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in there if d.type == "cuda"] if there else []

    def restore(self) -> None:
        torch.default_generator.set_state(self.cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        for generator, state in self._others:
            generator.set_state(state)

    def forward(self, index: int) -> AbstractContextManager[None]:
        """Around the forward of that number; 0 is the first, and finds the state as it is."""
        if index:
            self.restore()
        return NOTHING


@functools.cache
def _handled() -> Callable[[Callable[[int], Any], tuple[int, ...]], list[tuple[int, Any]]]:
    """The function of (signal.getsignal, numbers) that finds the signals with a handler in Python, each
    with it; compiled, where the host module is built.
    """
    try:
        compiled: Any = importlib.import_module(".._host", __package__).handled
    except ImportError:
        return lambda handler, numbers: [(n, h) for n in numbers if callable(h := handler(n))]
    return compiled  # type: ignore[no-any-return]


class uninterrupted:
    """Holds back every signal that has a handler in Python, until the block ends.

    So none of them, whether Ctrl-C, a SIGTERM whose handler calls sys.exit() or an alarm whose handler
    raises, can fall between a weight write and its record.  Only the main thread runs handlers; in any other
    this does nothing, nor does it inside another such block, which holds them all.

    An exception that another thread injects can strike just before the block ends, and so keep it from
    ending.  The next signal, or the next block, finds that the function which made this one has returned, and
    ends it then."""

    _held: list[tuple[int, Any]] = []  # noqa: RUF012  before the block begins; each has its own
    _pending: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        maker = sys._getframe(1)
        self._maker = id(maker), maker.f_code  # the frame itself would refer to itself through this block

    def __enter__(self) -> uninterrupted:
        self._held, self._pending = [], []
        self._thread = get_ident()
        found = _handled()(_signal.getsignal, _NUMBERS)
        if found and getattr(found[0][1], "__func__", None) is uninterrupted._hold:
            outer = found[0][1].__self__
            if outer._thread != self._thread or not outer._is_left():
                return self
            outer.__exit__()
            found = _handled()(_signal.getsignal, _NUMBERS)
        if not found:
            return self
        try:
            for one in found:
                self._held.append(one)
                self._held[-1] = one[0], _signal.signal(one[0], self._hold)  # the one that was there now
        except BaseException as error:  # of a handler that was not yet held back
            if threading.current_thread() is not threading.main_thread():
                self._held.clear()
                if isinstance(error, ValueError):  # the main thread alone may set handlers
                    return self
            self.__exit__()
            raise
        return self

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of ``function``, while which signals are not held back, in the thread of the block."""
        if get_ident() != self._thread:
            return function()
        try:
            self.__exit__()
            return function()
        finally:
            self.__enter__()

    def _hold(self, number: int, frame: object) -> None:
        self._pending.append(number)
        if self._is_left():
            self.__exit__()

    def _is_left(self) -> bool:
        """Whether the function that made this block has returned.  To be asked in the block's thread."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if id(frame) == self._maker[0] and frame.f_code is self._maker[1]:
                return False
            frame = frame.f_back
        return True

    def __exit__(self, *exception: object) -> None:
        """Puts all handlers back, and then lets them run; of several that raise, the first one's error is
        raised.
        """
        error: BaseException | None = None
        while self._held or self._pending:
            try:
                while self._held:  # the lowest number first, by which a block inside knows that it is one
                    _signal.signal(*self._held[0])
                    del self._held[0]
                while self._pending:
                    signal.raise_signal(self._pending.pop(0))
            except BaseException as raised:
                error = error or raised
        if error is not None:
            raise error
