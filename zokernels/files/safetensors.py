"""safetensors files as mapped memory: tensors are views of the file, so that none has to fit into memory.

The format is a length (u64), a JSON header of names, dtypes, shapes and byte ranges, and the bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import fail
from ..contract import canonical_name
from .format import Log
from .replay import Progress, replay_
from .settings import check_base, digest, match

_MAX_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"
#: Elements that are worked on before their pages are given back.
_RELEASE = 1 << 24

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  #: byte in the file
    size: int


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        fail("safetensors", where, "JSON", str(error)[:200])
    if not isinstance(found, dict):
        fail("safetensors", where, "a JSON object", type(found).__name__)
    return found


class File:
    """A safetensors file that is read; nothing is ever written to it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                fail("safetensors", str(path), "a safetensors file", f"{total} bytes, {length} of them a header")
            header = _json(file.read(length), str(path))
            # Shared and read-only: a private writable map of the whole file would count as memory (ulimit -d).
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata = header.pop("__metadata__", {})
        self.entries = {name: self._entry(name, found, 8 + length, total) for name, found in header.items()}

    def _entry(self, name: str, found: Any, data: int, total: int) -> Entry:
        try:
            dtype, shape, (begin, end) = found["dtype"], tuple(found["shape"]), found["data_offsets"]
            integers = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
            good = isinstance(dtype, str) and integers and data + begin <= data + end <= total
            if good and dtype in _DTYPES:
                good = end - begin == math.prod(shape) * _DTYPES[dtype].itemsize
        except (TypeError, KeyError, ValueError):
            good = False
        if not good:
            fail("safetensors", f"{self.path}: {name[:200]!r}", "a dtype, a shape and their bytes", str(found)[:200])
        return Entry(dtype, shape, data + begin, end - begin)

    def tensor(self, name: str) -> Tensor:
        return view(self._map, self.entries[name])

    def data(self, name: str) -> memoryview:
        entry = self.entries[name]
        return memoryview(self._map)[entry.begin : entry.begin + entry.size]

    def release(self) -> None:
        """Give the pages that were read back to the system."""
        self._map.madvise(mmap.MADV_DONTNEED)


def view(mapped: mmap.mmap, entry: Entry) -> Tensor:
    if entry.dtype not in _DTYPES:
        fail("safetensors", "dtype", ", ".join(_DTYPES), entry.dtype)
    dtype, count = _DTYPES[entry.dtype], math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*buffer is not writable.*")
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.begin).view(entry.shape)


class Checkpoint:
    """One safetensors file, or a folder of them as Hugging Face writes it, with an index or one file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        files = {name: File(name) for name in self._files()}
        self.files = list(files.values())
        self.where: dict[str, File] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.where:
                    fail("safetensors", str(self.path), "each tensor once", f"{name!r} in two files")
                self.where[name] = file

    def _files(self) -> list[pathlib.Path]:
        if not self.path.is_dir():
            return [self.path]
        index = self.path / _INDEX
        if index.exists():
            names = _json(index.read_bytes(), str(index)).get("weight_map")
            if not isinstance(names, dict) or not all(
                isinstance(n, str) and n == os.path.basename(n) for n in names.values()
            ):
                fail("safetensors", str(index), "weight_map: names of files in this folder", str(names)[:200])
            return [self.path / name for name in dict.fromkeys(names.values())]
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            fail("safetensors", str(self.path), f"{_INDEX} or *.safetensors", "none")
        return found

    def tensors(self) -> dict[str, Tensor]:
        """By canonical name; views of the files."""
        result: dict[str, Tensor] = {}
        for name, file in self.where.items():
            if file.entries[name].dtype in _DTYPES:
                key = canonical_name(name)
                if key in result:
                    fail("safetensors", str(self.path), "one tensor for each parameter", f"two for {key!r}")
                result[key] = file.tensor(name)
        return result

    def release(self) -> None:
        for file in self.files:
            file.release()


def _layout(base: Checkpoint, widened: set[str]) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file with all tensors of ``base``, ``widened`` ones in fp32; wide dtypes first, so that every
    tensor is aligned."""
    entries = {name: file.entries[name] for name, file in base.where.items()}
    for name in widened:
        entries[name] = entries[name]._replace(dtype="F32", size=4 * math.prod(entries[name].shape))
    width = lambda name: _DTYPES[entries[name].dtype].itemsize if entries[name].dtype in _DTYPES else 1
    header: dict[str, Any] = {"__metadata__": base.files[0].metadata} if base.files[0].metadata else {}
    place = 0
    for name in sorted(entries, key=lambda name: (-width(name), name)):
        entry = entries[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [place, place + entry.size]}
        place += entry.size
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    for name in entries:
        entries[name] = entries[name]._replace(begin=8 + len(data) + header[name]["data_offsets"][0])
    return len(data).to_bytes(8, "little") + data, entries


@contextmanager
def replacing(path: pathlib.Path) -> Iterator[Any]:
    """A file beside ``path`` that takes its place, synced, if the block ends well, and else is removed."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            os.fsync(file.fileno())
            os.umask(mask := os.umask(0))
            os.chmod(file.name, 0o666 & ~mask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checked(base: Checkpoint, log: Log) -> dict[str, Tensor]:
    """The tensors of ``base``, whose values are those that the run of ``log`` began with."""
    tensors = base.tensors()
    check_base(log.header, match(log.header, tensors))
    base.release()
    return tensors


def compare(log: Log, ours: Checkpoint, theirs: Checkpoint) -> int:
    """The number of trained tensors; raises ValueError where one differs in a bit."""
    a, b = ours.tensors(), theirs.tensors()
    names = [p["name"] for group in log.header["groups"] for p in group["params"] if p["sha256"] is not None]
    for name in names:
        if name not in b:
            fail("verify", name, f"a tensor in {theirs.path}", "none")
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            got = f"{b[name].dtype} of shape {tuple(b[name].shape)}"
            fail("verify", name, f"{a[name].dtype} of shape {tuple(a[name].shape)}", got)
        if digest(a[name]) != digest(b[name]):
            fail("verify", name, "the bits of the run", "others")
        ours.release()
        theirs.release()
    return len(names)


def replay_file(
    base: Checkpoint,
    log: Log,
    out: str | os.PathLike[str],
    upto: int | None = None,
    *,
    mode: str = "exact",
    progress: Progress = lambda elements: None,
) -> int:
    """Write ``base`` with the weights of the run (:func:`replay_`) as the safetensors file ``out``.

    ``out`` appears, whole and synced, when all is done.  The work is done in the mapped file itself.
    """
    path = pathlib.Path(out).resolve()
    if path in {pathlib.Path(log.path).resolve(), *(f.path.resolve() for f in base.files)}:
        fail("replay", "out", "another file than the base and the log", str(out))
    log.check_upto(upto)
    tensors = checked(base, log)
    trained = {p["name"] for group in log.header["groups"] for p in group["params"] if p["sha256"] is not None}
    widened = {name for name in base.where if mode == "fp32" and canonical_name(name) in trained}
    header, entries = _layout(base, widened)
    total = max([len(header), *(e.begin + e.size for e in entries.values())])
    with replacing(path) as file:
        os.posix_fallocate(file.fileno(), 0, total)  # a full disk is an error here, not a signal later
        with mmap.mmap(file.fileno(), total) as mapped:
            mapped[: len(header)] = header
            weights = {}
            for name, source in base.where.items():
                entry = entries[name]
                if name in widened:
                    view(mapped, entry).copy_(tensors[canonical_name(name)])
                else:
                    mapped[entry.begin : entry.begin + entry.size] = source.data(name)
                if entry.dtype in _DTYPES:
                    weights[name] = view(mapped, entry)
                source.release()
                mapped.madvise(mmap.MADV_DONTNEED)
            steps = replay_(weights, log, upto, mode=mode, check=False, progress=_releasing(mapped, progress))
            mapped.flush()
            weights.clear()  # a map with views cannot be closed
    return steps


def _releasing(mapped: mmap.mmap, progress: Progress) -> Callable[[int], None]:
    touched = 0

    def done(elements: int) -> None:
        nonlocal touched
        touched += elements
        if touched >= _RELEASE:
            touched = 0
            mapped.madvise(mmap.MADV_DONTNEED)  # of a shared map: what was written stays in the file
        progress(elements)

    return done
