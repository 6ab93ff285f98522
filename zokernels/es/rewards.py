"""The rewards of texts, by a function of the user's that may take too long."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..checks import fail

#: A function of one prompt, as it was given, and of the text that an engine made of it.  More is better.
Reward = Callable[[Any, str], float]


class Late(BaseException):
    """A reward function did not return in time.  ``except Exception`` in it does not catch this."""


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """Raises :class:`Late` in the block after so many seconds, whatever Python code runs there."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        fail("es", "timeout", "None outside of the main thread, whose signals end a function", seconds)

    armed = True

    def late(number: int, frame: Any) -> None:
        if armed:
            raise Late

    before = signal.signal(signal.SIGALRM, late)
    # Python drops an exception that is raised in a destructor or in a callback of the garbage collector, so
    # the signal comes again.
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 0.5))
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rewards_of(
    reward: Reward, prompts: Sequence[Any], texts: Sequence[str], timeout: float | None, late: float
) -> list[float]:
    """The reward of each text; ``late`` for one that took more than ``timeout`` seconds."""
    if len(texts) != len(prompts):
        fail("es", "engine", f"{len(prompts)} texts, one for each prompt", len(texts))
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            with _within(timeout):
                value = _number(reward(prompt, text))
        except Late:
            value = late
        found.append(value)
    return found


def _number(reward: Any) -> float:
    """A reward as a float; what is beyond its range is infinite, so that the generation is skipped."""
    if not isinstance(reward, (str, bytes)):  # which float would read
        try:
            return float(reward)
        except OverflowError:
            return math.inf if reward > 0 else -math.inf
        except (TypeError, ValueError, RuntimeError):
            pass
    fail("es", "reward", "a function that returns a number", repr(reward)[:200], TypeError)
