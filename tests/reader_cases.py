"""The readers of files from outside, each as a function of bytes: for coverage-guided fuzzing and for its
corpus.

A reader may refuse a file by ValueError or OSError, as documented, and ``accepts`` is then False.  Whatever
else is raised is a fault of the reader and passes through.  ``python tests/reader_cases.py`` writes the
corpus's files that are made from real ones, in ``tests/corpus/READER/``: "good-..." must be accepted and
"bad-..." refused."""

from __future__ import annotations

import copy
import functools
import json
import pathlib
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zokernels.cli import summary
from zokernels.files.safetensors import Checkpoint, Entry, lay_out
from zokernels.offload.blocks import Block
from zokernels.offload.disk import Folder, header
from zokernels.trajectory import read, replay_
from zokernels.trajectory.format import MAGIC, VERSION, canonical, encode

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"
PREFIX = struct.Struct("<6sHII")  # docs/trajectory.md: magic, version, bytes of the header, its CRC-32
INDEX = "model.safetensors.index.json"


def weights() -> dict[str, Tensor]:
    """The weights from which the runs began whose logs are in the corpus."""
    return {
        "layers.0.w": torch.linspace(-1, 1, 6).view(3, 2),
        "layers.1.b": torch.linspace(0.5, 2, 4).bfloat16(),
    }


def block() -> Block:
    """The block of a streamed run whose file is read."""
    found = Block(0, "layer", nn.Identity())
    found.place([(name, nn.Parameter(value)) for name, value in weights().items()])
    return found


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zokernels-readers-")


def _file(name: str, data: bytes) -> pathlib.Path:
    """A new file, since the one before may still be mapped."""
    path = pathlib.Path(_folder().name) / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# --- readers: each raises ValueError or OSError where it refuses the file ---------------------------------


def read_log(data: bytes) -> None:
    """All that ``zokernels log --json`` and ``replay_`` do with a log, its last part given up if it is
    damaged.
    """
    log = read(_file("run.zk", data), recover=True)
    json.dumps(summary(log), allow_nan=False)
    replay_(weights(), log, check=False)
    read(log.path)


def mended(data: bytes) -> bytes:
    """A log of the same header and records with right checksums and steps, so that what lies behind them is
    read.

    Without it a fuzzer sees nothing but refused checksums.
    """
    size = min(PREFIX.unpack(data[: PREFIX.size].ljust(PREFIX.size, b"\0"))[2], len(data) - PREFIX.size)
    text, records = data[PREFIX.size : PREFIX.size + max(0, size)], data[PREFIX.size + max(0, size) :]
    try:
        found = json.loads(text)
        text = canonical(found)
        head, layout = encode(found)
    except (ValueError, RecursionError):
        return PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text + records
    out = [head]
    for i in range(0, len(records), layout.size):
        record = records[i : i + layout.size]
        if len(record) == layout.size:
            step = found["start"] + i // layout.size
            body = struct.pack("<I", step & 0xFFFFFFFF) + record[4:-4]
            record = body + struct.pack("<I", zlib.crc32(body, layout.crc))
        out.append(record)
    return b"".join(out)


def read_mended_log(data: bytes) -> None:
    read_log(mended(data))


def read_safetensors(data: bytes) -> None:
    """All that a checkpoint's file goes through: its tensors, their bytes, and the header of a replayed
    copy.
    """
    checkpoint = Checkpoint(_file("model.safetensors", data))
    for tensor in checkpoint.tensors().values():
        assert tensor.contiguous().view(-1).view(torch.uint8).sum() >= 0  # reads every byte
    (file,) = checkpoint.files
    for name, entry in file.entries.items():
        assert len(file.data(name)) == entry.size
    copied, placed = lay_out(file.entries, file.metadata)
    copy = copied + bytes(sum(entry.size for entry in placed.values()))
    assert Checkpoint(_file("copy.safetensors", copy)).files[0].entries == placed


def read_block(data: bytes) -> None:
    """Reads the file of a block in the folder of a streamed run."""
    path = _file("block-00000.safetensors", data)
    mine = block()
    file = Folder(path.parent).open("stream", mine)
    assert file is not None
    file.close()
    assert mine.stored >= 0


def read_index(data: bytes) -> None:
    """Reads a folder of two files of weights whose index is ``data``."""
    folder = pathlib.Path(_folder().name) / "folder"
    folder.mkdir(exist_ok=True)
    for name, value in weights().items():
        _file(f"folder/{name[-1]}.safetensors", _safetensors({name: value}))
    _file(f"folder/{INDEX}", data)
    Checkpoint(folder).tensors()


READERS: dict[str, Callable[[bytes], None]] = {
    "log": read_log,
    "mended_log": read_mended_log,
    "safetensors": read_safetensors,
    "block": read_block,
    "index": read_index,
}


# --- edits of the JSON that every one of these files has --------------------------------------------------

#: The values that replace a number, a text or a list.
ODD: tuple[object, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        255,
        256,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        2**70,
        -(2**70),
    ),
    *(
        0.0,
        -0.0,
        0.5,
        1e-320,
        1e300,
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        "w",
        "0",
        "-1",
        "U8",
        "F4",
        "C64",
    ),
    *("\ud800", "x" * 5000, [], {}, [0], [[]], [0, 2**70], [2**40, 2**40], {"class": "SGD"}, ["w"] * 70),
)


def _split(reader: str, data: bytes) -> tuple[int, int]:
    """The places in a file where its JSON begins and ends."""
    if reader.endswith("log"):
        size = PREFIX.unpack(data[: PREFIX.size].ljust(PREFIX.size, b"\0"))[2]
        return PREFIX.size, PREFIX.size + size
    begin = 0 if reader == "index" else 8
    return begin, len(data) if reader == "index" else 8 + int.from_bytes(data[:8], "little")


def edited(reader: str, data: bytes, rng: random.Random) -> bytes:
    """``data`` with a value of its JSON replaced, removed or doubled, one to three times, and the lengths
    with it.

    Where there is no JSON, or one nested so deeply that only the reader should meet it, it is returned as it
    is."""
    begin, end = _split(reader, data)
    try:
        found = json.loads(data[begin:end])
        if max((depth for *_, depth in _places(found)), default=0) > 20:
            return data
    except (ValueError, RecursionError):
        return data
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(found))
        if not places:
            break
        (parent, key, _), (other, another, _) = rng.choice(places), rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice(("__metadata__", "class", f"{key}x", "zokernels_updates"))] = copy.deepcopy(
                parent[key]
            )
        elif action == 1:
            parent.append(copy.deepcopy(parent[key]))
        elif action == 2:
            parent[key] = copy.deepcopy(other[another])
        elif action == 3 and isinstance(parent[key], (int, float)):
            parent[key] += rng.choice((-1, 1, 0.5, 2**31))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    text = canonical(found) if reader.endswith("log") and _is_finite(found) else json.dumps(found).encode()
    if reader.endswith("log"):
        return PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text + data[end:]
    if reader == "index":
        return text
    text += b" " * (-(8 + len(text)) % (4096 if reader == "block" else 1))
    return len(text).to_bytes(8, "little") + text + data[end:]


def _is_finite(found: object) -> bool:
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        return False
    return True


def _places(found: Any, depth: int = 1) -> Iterator[tuple[Any, Any, int]]:
    """(parent, key, depth) of each value of a JSON document."""
    keys = found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    for key in keys:
        yield found, key, depth
        yield from _places(found[key], depth + 1)


def corpus_of(reader: str) -> pathlib.Path:
    return CORPUS / reader.removeprefix("mended_")


def accepts(reader: str, data: bytes) -> bool:
    try:
        READERS[reader](data)
    except (ValueError, OSError):
        return False
    return True


# --- the files of the corpus that are made from real ones -------------------------------------------------


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    entries = {n: Entry(dtypes[t.dtype], tuple(t.shape), 0, t.nbytes) for n, t in tensors.items()}
    head, placed = lay_out(entries, metadata or {})
    data = bytearray(head.ljust(len(head) + sum(t.nbytes for t in tensors.values())))
    for name, t in tensors.items():
        at = placed[name].begin
        data[at : at + t.nbytes] = bytes(t.contiguous().view(-1).view(torch.uint8).tolist())
    return bytes(data)


def _of_json(found: object) -> bytes:
    text = json.dumps(found).encode()
    return len(text).to_bytes(8, "little") + text


def _logs() -> Iterator[tuple[str, bytes]]:
    from zokernels import optim

    makers = {
        "sgd": (optim.ZOSGD, {"directions": 2}),
        "adam": (optim.ZOAdam, {}),
        "window": (optim.ZOSGD, {"momentum": 0.9, "window": 2}),
        "low-rank": (optim.LOZO, {"rank": 1, "interval": 2}),
        "sparse": (optim.SparseMeZO, {"density": 0.5}),
        "fzoo": (optim.FZOO, {"directions": 2}),
        "ranking": (optim.ZORankSGD, {"candidates": 3, "top": 1}),
        "layers": (optim.LeZO, {"skipped": 0.5}),
    }
    for name, (kind, options) in makers.items():
        params = {n: nn.Parameter(t) for n, t in weights().items()}
        path = pathlib.Path(_folder().name) / f"{name}.zk"
        path.unlink(missing_ok=True)
        optimizer = kind(list(params.items()), lr=0.01, seed=7, restore="inplace", trajectory=path, **options)
        for _ in range(3):
            optimizer.step(lambda params=params: sum(p.float().square().sum() for p in params.values()))
        optimizer.log.close()
        yield name, path.read_bytes()


def _write(reader: str, name: str, data: bytes) -> None:
    (CORPUS / reader).mkdir(parents=True, exist_ok=True)
    (CORPUS / reader / name).write_bytes(data)


def write_corpus() -> None:
    for name, data in _logs():
        _write("log", f"good-{name}", data)
        if name == "sgd":
            _write("log", "bad-cut-in-a-record", data[:-5])
            _write("log", "bad-cut-in-the-header", data[:100])
            _write("log", "bad-a-flipped-bit", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
            _write("log", "bad-version", data[:6] + b"\2" + data[7:])
            far = data.replace(b'"eps":0.001', b'"eps":9223372036854775807')  # 2 eps has no int64
            text = far[PREFIX.size : PREFIX.size + PREFIX.unpack(far[: PREFIX.size])[2] + 14]
            far = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + far[PREFIX.size :]
            assert mended(far) != data
            _write("log", "good-an-eps-beyond-int64", mended(far))
            _write("log", "bad-form-of-json", data.replace(b'"seed":7', b'"seed": 7'))
    both = _safetensors(weights(), {"format": "pt"})
    _write("safetensors", "good-two", both)
    _write("safetensors", "bad-cut", both[:-1])
    _write("safetensors", "bad-header-longer-than-the-file", b"\xff" * 8 + both[8:])
    _write(
        "safetensors", "bad-dtype-of-another-size", both.replace(b"BF16", b"U8", 1).replace(b"[4]", b"  [4]")
    )
    _write("safetensors", "bad-metadata-is-a-number", _of_json({"__metadata__": 3}))
    _write("safetensors", "bad-metadata-holds-a-number", _of_json({"__metadata__": {"format": 1}}))
    # torch has no strides for it
    empty = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    _write("safetensors", "bad-empty-with-a-huge-shape", _of_json({"w": empty}))
    _write("safetensors", "bad-shape-of-truth-values", _of_json({"w": {**empty, "shape": [False]}}))
    _write("block", "bad-metadata-is-a-number", _of_json({"__metadata__": 0}))
    file = header(block(), 3)
    _write("block", "good-three-updates", file + bytes(block().nbytes))
    _write("block", "bad-other-shape", file.replace(b"[3,2]", b"[2,3]") + bytes(block().nbytes))
    _write("block", "bad-no-number", file.replace(b"00000003", b"0000000x") + bytes(block().nbytes))
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {"layers.0.w": "w.safetensors", "layers.1.b": "b.safetensors"},
    }
    _write("index", "good-two-files", json.dumps(index).encode())
    _write("index", "bad-a-folder-above", json.dumps({"weight_map": {"w": "../w.safetensors"}}).encode())
    _write("index", "bad-no-map", b'{"weight_map": ["w.safetensors"]}')
    _write("index", "bad-missing-file", b'{"weight_map": {"w": "v.safetensors"}}')


if __name__ == "__main__":
    write_corpus()
