"""Which calls of compiled kernels a thread has finished, whatever exception falls between two of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class _Journal(threading.local):
    #: What the calls of this thread gave, while somebody asks; else None.
    calls: list[Any] | None = None


_journal = _Journal()


def call(operation: Any, args: Sequence[Any]) -> Any:
    """The result of ``operation``, a compiled operation of torch.

    Another thread can inject an exception into this one after any call that Python makes, so a call and a
    note of it by two lines of Python can come apart.  Here the interpreter's C code makes both."""
    if (calls := _journal.calls) is None:
        return operation(*args)
    calls.extend(map(operation._op, *zip(args)))
    return calls[-1]


@contextmanager
def noted() -> Iterator[list[Any]]:
    """Inside, the list has an entry for each call of a compiled kernel that this thread has finished."""
    outer = _journal.calls
    _journal.calls = calls = [] if outer is None else outer
    try:
        yield calls
    finally:
        _journal.calls = outer
