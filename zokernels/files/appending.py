"""A locked file that grows by whole pieces: a write that fails leaves what was there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress

from ..checks import fail

#: Bytes that are hashed at a time.
_PIECE = 1 << 20

_open: weakref.WeakSet[AppendedFile] = weakref.WeakSet()


class AppendedFile:
    """A file that this process alone writes, from the end of its last whole piece on.

    The lock (``flock``) is taken before anything is read or written, so of two processes the second one gets
    an error and has changed nothing.  The system drops it with the process, however that ends.  A forked
    child closes its copy: it can neither write nor keep the lock when its parent is gone.

    Raises: ValueError where ``path`` is no ordinary file; RuntimeError where another process writes it.
    """

    def __init__(self, op: str, path: str | os.PathLike[str]) -> None:
        self.op, self.path = op, os.fspath(path)
        self.fd = -1
        self.fd = self._open_locked()
        #: The byte after the last whole piece.
        self.end = os.fstat(self.fd).st_size
        self._lock, self._syncing = threading.RLock(), threading.RLock()  # taken in the reverse order
        self._hashed = hashlib.sha256(), 0  # of so many bytes
        self._synced = self.end
        self.unsure = False  #: whether the last sync failed
        _open.add(self)

    def _open_locked(self) -> int:
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            fail(self.op, self.path, "a file in a folder that exists", f"none, {folder}", FileNotFoundError)
        while True:
            if os.path.exists(self.path) and not stat.S_ISREG(os.stat(self.path).st_mode):
                fail(self.op, self.path, "an ordinary file", "a folder, a pipe or a device")
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_path(fd):
                    return fd
                os.close(fd)  # the writer before this one has put another file here: lock that one
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EWOULDBLOCK:
                    fail(self.op, self.path, "a file system with locks (flock)", error.strerror, OSError)
                expected = "a file that no one else writes"
                if any(not other.closed and other._is_at_path_of(self.path) for other in list(_open)):
                    got = (
                        "one that an optimizer of this process still writes (its .trajectory.close() ends "
                        "that, or ending the program)"
                    )
                    fail(self.op, self.path, expected, got, RuntimeError)
                fail(self.op, self.path, expected, "one that is locked by another process", RuntimeError)

    def _is_at_path_of(self, path: str) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(path))
        except OSError:
            return False

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def check_untouched(self) -> None:
        """Raises RuntimeError where another process has removed, replaced, cut or extended the file."""
        if not self._is_at_path(self.fd):
            fail(
                self.op, self.path, "the file that was opened", "none, or another in its place", RuntimeError
            )
        if (found := os.fstat(self.fd).st_size) < self.end:
            fail(
                self.op, self.path, f"{self.end} bytes", f"{found}: another process has cut it", RuntimeError
            )
        if found > self.end:  # a part of a piece, which could not be removed when its write failed
            os.ftruncate(self.fd, self.end)

    def write(self, data: bytes, at: int) -> None:
        """Writes ``data`` at byte ``at``, the end or a piece that is there already; all of it, or nothing."""
        end, left = at, memoryview(data)
        with self._lock:
            try:
                while left:
                    if not (count := os.pwrite(self.fd, left, end)):
                        raise no_room(self.path)
                    end, left = end + count, left[count:]
            except BaseException as error:
                self._remove_fragment()
                if isinstance(error, OSError):
                    error.filename = self.path  # write(2) knows only a number
                raise
            self.end = max(self.end, end)

    def _remove_fragment(self) -> None:
        with suppress(OSError):  # the next write covers it, and readers take it for a piece that was cut off
            os.ftruncate(self.fd, self.end)

    def cut(self, end: int) -> None:
        """Removes everything from byte ``end`` on."""
        with self._lock:
            self.end, self._synced = end, min(self._synced, end)
            if self._hashed[1] > end:
                self._hashed = hashlib.sha256(), 0
            os.ftruncate(self.fd, end)

    def sha256(self) -> str:
        """The SHA-256 of all whole pieces.  Only what was added since the last call is read."""
        with self._lock:
            state, at = self._hashed
            state = state.copy()
            while at < self.end:
                data = os.pread(self.fd, min(_PIECE, self.end - at), at)
                if not data:
                    expected = f"{self.end} bytes"
                    fail(self.op, self.path, expected, f"{at}: another process has cut it", RuntimeError)
                state.update(data)
                at += len(data)
            self._hashed = state, at
            return state.hexdigest()

    def sync(self) -> None:
        """Brings the file to the disk.  What a sync that failed had to bring is written again by the next
        one.

        The system itself would not try again: to it those pages are clean (fsyncgate, 2018).  A file that
        another thread has closed meanwhile, with all that it has, needs no sync.
        """
        with self._syncing:
            with self._lock:
                begin, end = self._synced, self.end
                if self.closed and begin == end and not self.unsure:
                    return
                if self.closed:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
                if self.unsure and begin < end:
                    self.write(os.pread(self.fd, end - begin, begin), begin)
            try:
                # writes need not wait: it may take long, and what comes meanwhile is of the next sync
                os.fsync(self.fd)
            except OSError:
                self.unsure = True
                raise
            self._synced, self.unsure = end, False

    def close(self) -> None:
        """Closes the file when no other thread reads, writes or syncs it.

        From then on other processes can lock it.
        """
        with self._syncing, self._lock:
            self._close()

    def _close(self) -> None:
        if (fd := self.fd) >= 0:
            self.fd = -1
            os.close(fd)

    __del__ = _close


def no_room(path: str) -> OSError:
    """The error of a write that took nothing."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def sha256_of(path: str | os.PathLike[str], sizes: Iterable[int]) -> dict[int, str]:
    """The SHA-256 of the first bytes of a file, for each number of bytes.  The file is read once."""
    state, at, found = hashlib.sha256(), 0, {}
    with open(path, "rb") as file:
        for size in sorted(set(sizes)):
            while at < size and (data := file.read(min(_PIECE, size - at))):
                state.update(data)
                at += len(data)
            found[size] = state.hexdigest()
    return found


def _close_in_child() -> None:
    for file in list(_open):
        file._close()  # whose locks may be held by threads that the child does not have


os.register_at_fork(after_in_child=_close_in_child)
