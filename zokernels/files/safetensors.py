"""safetensors files as mapped memory: tensors are views of the file, so that none needs to fit into memory.

A file begins with a length (u64) and a JSON header of that length, which has a name, a dtype, a shape and a
range of bytes for each tensor.  The bytes follow.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import fail
from ..contract import canonical_name

_MAX_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"
#: torch's dtypes by their names in a header.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
#: The names of torch's dtypes.
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor is in a file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  #: byte in the file
    size: int

    @property
    def width(self) -> int:
        """Bytes of an element; 1 where torch has no such dtype."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        fail("safetensors", where, "JSON", str(error)[:200])
    if not isinstance(found, dict):
        fail("safetensors", where, "a JSON object", type(found).__name__)
    return found


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


class File:
    """A safetensors file that is only read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                expected = "a safetensors file"
                fail("safetensors", str(path), expected, f"{total} bytes, {length} of them a header")
            header = _json(file.read(length), str(path))
            # Shared and read-only: a private writable map of the whole file would count as data (ulimit -d).
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            fail("safetensors", f"{path}: '__metadata__'", "an object of texts", str(metadata)[:200])
        self.metadata: dict[str, str] = metadata
        self.entries = {name: self._entry(name, found, 8 + length, total) for name, found in header.items()}

    def _entry(self, name: str, found: Any, data: int, total: int) -> Entry:
        parts: Any = found if isinstance(found, dict) else {}
        dtype, shape, offsets = parts.get("dtype"), parts.get("shape"), parts.get("data_offsets")
        good = isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
        begin, end = 0, 0
        if good:
            begin, end = offsets
            good = data + begin <= data + end <= total
            # An empty tensor may have any other sizes; torch's strides are products of them all the same.
            good = good and math.prod(max(n, 1) for n in shape) * 16 < 2**63
            if good and dtype in DTYPES:
                good = end - begin == math.prod(shape) * DTYPES[dtype].itemsize
        if not good:
            expected = "a dtype, a shape and their bytes"
            fail("safetensors", f"{self.path}: {name[:200]!r}", expected, str(found)[:200])
        return Entry(dtype, tuple(shape), data + begin, end - begin)

    def tensor(self, name: str) -> Tensor:
        return view(self._map, self.entries[name])

    def data(self, name: str) -> memoryview:
        entry = self.entries[name]
        return memoryview(self._map)[entry.begin : entry.begin + entry.size]

    def release(self) -> None:
        """Gives the pages that were read back to the system."""
        self._map.madvise(mmap.MADV_DONTNEED)


def view(mapped: mmap.mmap, entry: Entry) -> Tensor:
    if entry.dtype not in DTYPES:
        fail("safetensors", "dtype", ", ".join(DTYPES), entry.dtype)
    dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*buffer is not writable.*")
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.begin).view(entry.shape)


class Checkpoint:
    """One safetensors file, or a folder of several as Hugging Face writes it, with an index."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        files = {name: File(name) for name in self._files()}
        self.files = list(files.values())
        self.aliases: dict[str, str] = {}  #: a parameter's name for names of the file, see adopt
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
            is_here = lambda name: isinstance(name, str) and name == os.path.basename(name)
            if not isinstance(names, dict) or not all(map(is_here, names.values())):
                fail("safetensors", str(index), "weight_map: names of files in this folder", str(names)[:200])
            return [self.path / name for name in dict.fromkeys(names.values())]
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            fail("safetensors", str(self.path), f"{_INDEX} or *.safetensors", "none")
        return found

    def adopt(self, names: Sequence[str]) -> None:
        """Lets the files' tensors be found by the parameters' canonical ``names``, where peft saved them.

        A model of peft calls a parameter ``base_model.model.q.lora_A.default.weight``, and its folder
        ``base_model.model.q.lora_A.weight``: without the adapter's name, which the folder does not hold.  It
        is that part of the missing names without which all of them are in the files.  Where there is none,
        the names stay as they are.
        """
        found = self.tensors()
        missing = [name for name in names if name not in found]
        for adapter in dict.fromkeys(("default", *missing[0].split("."))) if missing else ():
            saved = {peft_name(name, adapter): name for name in missing}
            if len(saved) == len(missing) and saved.keys() <= self.where.keys():
                self.aliases = saved
                return

    def parameter(self, name: str) -> str:
        """The canonical name of the parameter that a file's tensor ``name`` holds."""
        return self.aliases.get(name) or canonical_name(name)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by canonical name of their parameters, as views of the files."""
        result: dict[str, Tensor] = {}
        for name, file in self.where.items():
            if file.entries[name].dtype in DTYPES:
                key = self.parameter(name)
                if key in result:
                    fail("safetensors", str(self.path), "one tensor for each parameter", f"two for {key!r}")
                result[key] = file.tensor(name)
        return result

    def release(self) -> None:
        for file in self.files:
            file.release()


def peft_name(name: str, adapter: str) -> str:
    """The name under which peft saves a parameter of the adapter of this name."""
    name = name[max(name.find("base_model."), 0) :]  # a model that holds the one of peft adds a part in front
    if name == f"prompt_encoder.{adapter}.embedding.weight":
        return "prompt_embeddings"
    name = name.replace(f".modules_to_save.{adapter}.", ".")
    if name.endswith(f".lora_magnitude_vector.{adapter}.weight"):  # DoRA's, a vector alone in former versions
        name = name.removesuffix(".weight")
    return f"{name}.".replace(f".{adapter}.", ".").removesuffix(".")


def lay_out(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file with tensors of these dtypes, shapes and sizes; and where each begins in it.

    Tensors follow one another without a gap, those with wide elements first, so that all are aligned.
    """
    order = sorted(entries.items(), key=lambda item: (-item[1].width, item[0]))
    placed, at = {}, 0
    for name, entry in order:
        placed[name] = entry._replace(begin=at)
        at += entry.size
    data = encode_header(placed.items(), metadata, 64)  # a cache line, to which torch aligns memory
    return data, {name: entry._replace(begin=len(data) + entry.begin) for name, entry in placed.items()}


def encode_header(entries: Iterable[tuple[str, Entry]], metadata: Mapping[str, str], align: int) -> bytes:
    """The length and the JSON header of a file, together a multiple of ``align`` bytes.

    ``begin`` of an entry counts from the end of the header here, as it does in the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, e in entries:
        header[name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.begin + e.size]}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-(8 + len(data)) % align)
    return len(data).to_bytes(8, "little") + data
