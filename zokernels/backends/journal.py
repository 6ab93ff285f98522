"""A record of which kernels have run, which is right even where an exception strikes between two of them.

A signal handler, or another thread, can raise an exception in this thread at nearly any point.  A step that
is interrupted between the kernels of its update has to know exactly which of them have changed weights, so
that it can finish the others or take the finished ones back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

#: The entry of a call that has begun and has not come to its end.
PART = object()


class _Journal(threading.local):
    """Who asks puts a list into :attr:`calls`, and afterwards what was there before.

    The list gets an entry for each call of a kernel that this thread has finished.  A call of a kernel in
    Python is there from its beginning, as :data:`PART`.
    """

    #: The results of the calls of this thread, while somebody asks for them; else None.
    calls: list[Any] | None = None


journal = _Journal()


def call(operation: Any, args: Sequence[Any]) -> Any:
    """``operation(*args)``, a compiled operation of torch.  Where the list is asked for, it gets the result.

    An exception can strike between any two lines of Python, and so between a call and the line that records
    it.  ``extend`` of a ``map`` makes both inside of the interpreter's C code, where none can."""
    if (calls := journal.calls) is None:
        return operation._op(*args)
    calls.extend(map(operation._op, *zip(args)))
    return calls[-1]


def in_python(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, which is made of lines of Python, with entries as those of :func:`call`.

    An exception can end it half-way.  Its entry is then :data:`PART`.
    """

    @functools.wraps(kernel)
    def noting(*args: Any) -> Any:
        if (calls := journal.calls) is None:
            return kernel(*args)
        at = len(calls)
        calls.append(PART)
        calls[at] = result = kernel(*args)
        return result

    return noting
