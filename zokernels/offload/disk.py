"""Blocks in files: a checkpoint that is read directly, and a folder whose files are replaced one by one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, wait
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..files.appending import no_room
from ..files.atomic import sync_folder
from ..files.safetensors import DTYPES, NAMES, Entry, File, encode_header
from .blocks import PAGE, Block, Kept, round_up, state_named

#: Bytes of one read or write.
CHUNK = 8 << 20

_DIRECT = getattr(os, "O_DIRECT", 0)


class Direct:
    """A file that is read past the page cache, which would else hold a second copy.

    Where the file system has no direct access (tmpfs), it is read through the cache.
    """

    def __init__(self, path: str | os.PathLike[str], write: bool = False) -> None:
        self.path = os.fspath(path)
        self.first = self.size = 0  #: where a block's bytes begin in its file, and how many these are
        #: What the CRC32 of each :data:`CHUNK` of a block must be, until it has been read once.
        self.unchecked: str | None = None
        flags = (os.O_RDWR | os.O_CREAT | os.O_EXCL) if write else os.O_RDONLY
        try:
            self.fd = os.open(self.path, flags | _DIRECT, 0o666)
            self.direct = bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.fd = os.open(self.path, flags & ~os.O_EXCL, 0o666)
            self.direct = False

    def read(self, into: memoryview, at: int) -> None:
        """Reads whole pages.  What would lie behind the end of the file stays as it is."""
        while into:
            count = os.preadv(self.fd, [into], at)
            if count == 0:
                return
            at, into = at + count, into[count:]
            if count % PAGE:  # the end of the file
                return
        if not self.direct:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def write(self, data: memoryview, at: int) -> None:
        while data:
            count = os.pwritev(self.fd, [data], at)
            # a full disk takes a part of a page; the rest is an error
            count -= count % PAGE if self.direct else 0
            if not count:
                raise no_room(self.path)
            at, data = at + count, data[count:]

    def check_in_place(self) -> None:
        """Raises OSError where the path is another file by now, or none."""
        try:
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                return
        except FileNotFoundError:
            pass
        raise OSError(
            f"stream: {self.path}: expected the file that this run wrote, got none, or another in its place"
        )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    __del__ = close


def memory_of(data: Tensor) -> memoryview:
    """A writable view of the bytes of a host tensor."""
    array = (ctypes.c_char * data.nbytes).from_address(data.data_ptr())
    return memoryview(array).cast("B")


#: A read or a write of a file (:class:`Direct`), its memory, and where in the file it begins.
Transfer = tuple[Callable[[memoryview, int], None], memoryview, int]


def transfer(transfers: Sequence[Transfer], pool: Executor) -> None:
    """Runs all ``transfers``, in pieces and at once, and returns when all have ended."""
    futures = [
        pool.submit(run, data[i : i + CHUNK], at + i)
        for run, data, at in transfers
        for i in range(0, len(data), CHUNK)
    ]
    wait(futures)  # whatever fails: no thread may go on with memory that has another use by then
    for future in futures:
        future.result()


class Reader:
    """Reads blocks, each from the checkpoint until the folder has a file of it."""

    def __init__(self, pool: Executor) -> None:
        self._pool, self._lock = pool, threading.Lock()
        self._files: dict[str, Direct] = {}
        self.own: dict[int, Direct] = {}  #: the folder's file, by block

    def file(self, path: str) -> Direct:
        with self._lock:
            if path not in self._files:
                self._files[path] = Direct(path)
            return self._files[path]

    def is_unchecked(self, block: Block) -> bool:
        """Whether the next read compares the checksums of ``block``, and so needs all of its bytes."""
        own = self.own.get(block.index)
        return own is not None and own.unchecked is not None

    def has_states(self, block: Block) -> bool:
        """Whether the states of ``block`` are in the file that it is read from."""
        own = self.own.get(block.index)
        return own is not None and own.size >= block.nbytes

    def read(self, block: Block, data: Tensor, begin: int, end: int) -> None:
        """Reads the bytes of ``block`` from ``begin`` to ``end``, whole pages, to their place in ``data``."""
        memory, transfers = memory_of(data), []
        if (own := self.own.get(block.index)) is not None:
            first, size = own.first, own.size
            if (found := os.fstat(own.fd).st_size) < first + size:
                raise OSError(f"stream: {own.path}: expected {first + size} bytes, got {found}")
            own.check_in_place()
            transfers.append((own.read, memory[begin : min(end, size)], first + begin))
        else:
            for path, at, within, size in block.extents:
                first = within - at % PAGE
                low, high = max(begin, first), min(end, round_up(within + size, PAGE))
                file = self.file(path)
                if (found := os.fstat(file.fd).st_size) < at + size:
                    raise OSError(f"stream: {path}: expected at least {at + size} bytes, got {found}")
                if low < high:
                    transfers.append((file.read, memory[low:high], at - at % PAGE + low - first))
        transfer(transfers, self._pool)
        if own is not None and own.unchecked is not None:
            sums: dict[int, int] = {}
            transfer([(_summing(sums), memory[: own.size], 0)], self._pool)
            if _hex(sums) != own.unchecked:
                raise OSError(f"stream: {own.path}: expected the bytes of its checksums (CRC32), got others")
            own.unchecked = None

    def close(self) -> None:
        for file in (*self._files.values(), *self.own.values()):
            file.close()


def _summing(sums: dict[int, int], then: Callable[[memoryview, int], None] | None = None) -> Any:
    """A transfer that writes down the CRC32 of each piece, by where it begins."""

    def run(data: memoryview, at: int) -> None:
        sums[at] = zlib.crc32(data)
        if then is not None:
            then(data, at)

    return run


def checksums(block: Block, values: Sequence[Tensor]) -> str:
    """One CRC32 of the parameters of ``block``, one after the other, in as many digits as those of its
    bytes.
    """
    total = 0
    for value in values:
        total = zlib.crc32(memory_of(value), total)
    return f"{total:0{8 * -(-block.nbytes // CHUNK)}x}"


def _hex(sums: dict[int, int]) -> str:
    return "".join(f"{sums[at]:08x}" for at in sorted(sums))


class Folder:
    """A folder of ``block-00012.safetensors`` and the like, and ``resident.safetensors`` for the rest.

    A file holds all updates up to the number in its metadata, which also has checksums of its bytes, and the
    :meth:`~zokernels.trajectory.Recorder.mark` of the log at that time, so that no other run takes it for its
    own.  A new file is written beside the old one, synced, and renamed over it, so that at any moment one
    whole file is there.  Tensors lie as they do in memory, in whole pages behind the header; the gaps are
    entries of their own."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        #: The metadata of the files that were opened, by name.
        self.marks: dict[str, dict[str, str]] = {}

    def file_of(self, block: Block) -> pathlib.Path:
        return self.path / f"block-{block.index:05d}.safetensors"

    def open(self, op: str, block: Block) -> Direct | None:
        """The file of ``block``, if there is one; sets ``block.stored``, and lays out the states in it."""
        path = self.file_of(block)
        if not path.exists():
            return None
        found = File(path)
        block.keep(_states_in(found, block), torch.device("cpu"))
        first = len(header(block, 0))
        entries = (*block.entries, *(s.entry for s in block.states))
        ours = {e.name: (NAMES[e.dtype], tuple(e.param.shape), first + e.begin) for e in entries}
        theirs = {
            n: (e.dtype, e.shape, e.begin) for n, e in found.entries.items() if not n.startswith("_gap")
        }
        if ours != theirs:
            name = next(n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n))
            fail(op, f"{path.name}: {name}", f"{ours.get(name)} (the model's)", theirs.get(name))
        block.stored = version_of(op, found)
        file = Direct(path)
        file.first, file.size = first, block.nbytes
        file.unchecked = found.metadata.get("crc32", "")
        self.marks[path.name] = found.metadata
        return file

    def written(self, block: Block) -> Direct:
        """The file of ``block`` that another process of the run has just written."""
        file = Direct(self.file_of(block))
        file.first, file.size = len(header(block, 0)), block.nbytes
        return file

    def write(self, block: Block, data: Tensor, version: int, pool: Executor, mark: Mark) -> Direct:
        """Replaces the file of ``block``.

        ``mark``: called before anything is written; brings the log to the disk, and gives its mark.
        """
        path = self.file_of(block)
        temporary = path.with_suffix(".part")
        temporary.unlink(missing_ok=True)
        file = Direct(temporary, write=True)
        try:
            first, size, logged = len(header(block, version)), block.nbytes, mark()
            file.first, file.size = first, size
            os.posix_fallocate(file.fd, 0, first + size)
            sums: dict[int, int] = {}
            transfer([(_summing(sums, file.write), memory_of(data)[:size], first)], pool)
            pages = mmap.mmap(-1, first)  # direct writes begin at a page in memory, too
            pages[:] = header(block, version, logged, _hex(sums))
            file.write(memoryview(pages), 0)
            os.fdatasync(file.fd)
            os.replace(temporary, path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        file.path = os.fspath(path)
        return file

    def sync(self) -> None:
        sync_folder(self.path)


def _states_in(file: File, block: Block) -> list[tuple[str, Kept]]:
    """The states in a block's file, as :meth:`Block.keep` takes them, in the order of their bytes.

    Their first values are not there, and are not needed: the file has later ones.
    """
    found: list[tuple[str, Kept]] = []
    for name, e in sorted(file.entries.items(), key=lambda item: item[1].begin):
        state = state_named(name, (w.name for w in block.entries))
        if state is not None and e.dtype in DTYPES:
            found.append((state[1], [(state[0], e.shape, DTYPES[e.dtype], 0.0)]))
    return found


def version_of(op: str, file: File) -> int:
    version = file.metadata.get("zokernels_updates", "")
    if not (version.isascii() and version.isdecimal() and len(version) <= 20):
        fail(op, str(file.path), "metadata 'zokernels_updates', a number", repr(version))
    return int(version)


def mark_of(op: str, name: str, metadata: dict[str, str]) -> tuple[int, str]:
    """The step and the SHA-256 of the log with which a file was written; step 0 where there was no log
    yet.
    """
    step, sha256 = metadata.get("log_step", ""), metadata.get("log_sha256", "")
    if not (step.isascii() and step.isdecimal() and len(step) <= 20):
        fail(op, name, "metadata 'log_step', a number", repr(step))
    return int(step), sha256


#: Gives :meth:`~zokernels.trajectory.Recorder.mark` of the run's log.
Mark = Callable[[], dict[str, Any] | None]


def header(
    block: Block,
    version: int,
    mark: dict[str, Any] | None = None,
    sums: str = "",
    more: Mapping[str, str] | None = None,
) -> bytes:
    """The header of a block's file, in whole pages; it has the same size whatever its metadata are, unless
    there are ``more``.

    safetensors allows no gap between tensors and wants them in the header's order, so gaps are tensors, too.
    """
    entries: list[tuple[str, Entry]] = []
    at = 0

    def gap(end: int) -> None:
        if end > at:
            entries.append((f"_gap{at}", Entry("U8", (end - at,), at, end - at)))

    tensors = (*block.entries, *(s.entry for s in block.states))
    for e in sorted(tensors, key=lambda e: e.begin):
        gap(e.begin)
        entries.append((e.name, Entry(NAMES[e.dtype], tuple(e.param.shape), e.begin, e.nbytes)))
        at = e.begin + e.nbytes
    gap(block.nbytes)
    metadata = {
        "zokernels_updates": f"{version:020d}",
        "block": block.name,
        "crc32": sums or "0" * 8 * -(-block.nbytes // CHUNK),
        "log_step": f"{mark['step'] if mark else 0:020d}",
        "log_sha256": mark["sha256"] if mark else "0" * 64,
        **(more or {}),
    }
    return encode_header(entries, metadata, PAGE)


def check_room(op: str, folder: Folder, blocks: Sequence[Block], needed: int) -> None:
    """Raises, before the first write, where there is less room than ``needed`` bytes."""
    status = os.statvfs(folder.path)
    if (free := status.f_bavail * status.f_frsize) < needed:
        fail(op, "path", f"{needed} free bytes in {folder.path}", free, OSError)
