"""Which calls of kernels a thread has finished, whatever exception falls between two of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

#: Noted in the place of what a call gives while it runs, and where it has not come to its end.
PART = object()


class _Journal(threading.local):
    """Who asks puts a list into :attr:`calls`, and afterwards what was there before.

    The list gets an entry for each call of a kernel that this thread has finished.  A call of a kernel in
    Python is there from its beginning, as :data:`PART`.
    """

    #: What the calls of this thread gave, while somebody asks; else None.
    calls: list[Any] | None = None


journal = _Journal()


def call(operation: Any, args: Sequence[Any]) -> Any:
    """The result of ``operation``, a compiled operation of torch.

    Another thread can inject an exception into this one after any call that Python makes, so a call and a
    note of it by two lines of Python can come apart.  Here the interpreter's C code makes both."""
    if (calls := journal.calls) is None:
        return operation._op(*args)
    calls.extend(map(operation._op, *zip(args)))
    return calls[-1]


def in_python(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, which is not one call of a compiled function, with a note: an exception can end it
    anywhere.
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
