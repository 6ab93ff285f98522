"""A record of which kernels have run, which is right even where an exception strikes between two of them.

A signal handler, or another thread, can raise an exception in this thread at nearly any point.  A step that
is interrupted between the kernels of its update has to know exactly which of them have changed weights, so
that it can finish the others or take the finished ones back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: The entry of a call that has begun and has not come to its end.
PART = object()


class _Journal(threading.local):
    #: The results of the calls of this thread, inside of :func:`noted`; None outside of it.
    calls: list[Any] | None = None


_journal = _Journal()


def call(operation: Any, args: Sequence[Any]) -> Any:
    """``operation(*args)``, a compiled operation of torch; inside of :func:`noted` its result is an entry.

    An exception can strike between any two lines of Python, and so between a call and the line that records
    it.  ``extend`` of a ``map`` makes both inside of the interpreter's C code, where none can."""
    if (calls := _journal.calls) is None:
        return operation(*args)
    calls.extend(map(operation._op, *zip(args)))
    return calls[-1]


def in_python(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, which is made of lines of Python, with entries as those of :func:`call`.

    An exception can end it half-way.  Its entry is then :data:`PART`.
    """

    @functools.wraps(kernel)
    def noting(*args: Any) -> Any:
        if (calls := _journal.calls) is None:
            return kernel(*args)
        at = len(calls)
        calls.append(PART)
        calls[at] = result = kernel(*args)
        return result

    return noting


@contextmanager
def noted() -> Iterator[list[Any]]:
    """A list that gets an entry, in order, for each kernel that this thread runs inside of the block.

    A compiled kernel gets its entry when it has run.  A kernel in Python has one from its beginning, which is
    :data:`PART` until it has run.
    """
    outer = _journal.calls
    _journal.calls = calls = [] if outer is None else outer
    try:
        yield calls
    finally:
        _journal.calls = outer
