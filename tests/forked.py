"""Processes that a worker forks, and kills with SIGKILL."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """The number of a new process, which does ``work`` and ends with the code 0, or 1 where it raises."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # the child must not return into the parent's loop
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> os.waitid_result | None:
    """How the process has ended; None while it runs."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def attempt(work: Callable[[], object], wait: Callable[[int], None] | None) -> bool:
    """Whether a process that does ``work`` was killed, which happens when ``wait(child)`` returns; None: it
    is not.  A process that fails by itself ends this one.
    """
    child = fork(work)
    if wait is not None:
        wait(child)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(1)
    return os.WIFSIGNALED(status)
