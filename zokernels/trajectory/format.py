"""The file of a recorded run: a header, then records of one size, each with a checksum (docs/trajectory.md).

Everything in a file is checked before it is used.  The header must be canonical JSON of at most
``MAX_HEADER`` bytes, and every entry of it must have a known name, type and range.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ..checks import fail, is_integer
from ..contract import CONTRACT, STREAM_BITS, canonical_name

MAGIC, VERSION = b"ZKLOG\n", 1
#: Bytes of a header: about 250 for a parameter, so 2^28 for a model of a million tensors.
MAX_HEADER = 1 << 29
#: Factors of a larger rank would be larger than most weights.  Nothing else bounds what a replay allocates
#: for them.
MAX_RANK = 4096
#: Updates that a window may keep, of all groups and directions: 16 to 40 bytes each, and a pass over the
#: weights in each step, whatever the size of the log.
MAX_WINDOW = 1 << 16
_PREFIX = struct.Struct("<6sHII")  # magic, version, bytes of the header, its CRC32
_HEAD = struct.Struct("<IBbf")  # low word of the step, flags, multiple, loss
_CRC = struct.Struct("<I")
FINITE, TWO_PASS, CARRIED = 1, 2, 4

DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8")


class Record(NamedTuple):
    """What the update of one step needs, besides the seed of the run."""

    step: int
    finite: bool
    #: In the two-pass form these say whether the update added the next step's perturbation, and whether the
    #: step began with one.
    two_pass: bool
    carried: bool
    #: The rule's choice among its trials.  The update's g is this times :attr:`gradients`.
    multiple: int
    #: The loss that the step returned (fp32).
    loss: float
    #: The learning rate of each group (float64).
    rates: tuple[float, ...]
    #: g_k of each group (fp32), before ``multiple``; zeros where none of its parameters took part.
    gradients: tuple[tuple[float, ...], ...]
    #: The losses at the estimator's points (float64), if the rule needs them.
    losses: tuple[float, ...]


class Layout:
    """How a record of so many groups, directions and losses is packed into bytes.

    Args:
        crc: the header's checksum, with which those of the records go on.
        asynchronous: the order of the records is not that of their steps, which are below 2^32.
    """

    def __init__(
        self, groups: int, directions: int, losses: int, crc: int, asynchronous: bool = False
    ) -> None:
        self.groups, self.directions, self.losses, self.crc = groups, directions, losses, crc
        self.asynchronous = asynchronous
        self.size = _HEAD.size + 4 * groups * directions + 8 * (groups + losses) + _CRC.size

    def _body(self) -> struct.Struct:
        return struct.Struct(f"<{self.groups}d{self.losses}d{self.groups * self.directions}f")

    def pack(self, record: Record) -> bytes:
        flags = FINITE * record.finite | TWO_PASS * record.two_pass | CARRIED * record.carried
        head = _HEAD.pack(record.step & 0xFFFFFFFF, flags, record.multiple, record.loss)
        numbers = (*record.rates, *record.losses, *(g for of_group in record.gradients for g in of_group))
        data = head + self._body().pack(*numbers)
        return data + _CRC.pack(zlib.crc32(data, self.crc))

    def fault(self, data: bytes, step: int) -> str | None:
        """Why ``data`` is no record of ``step``; None where it is one."""
        if len(data) < self.size:
            return f"{len(data)} of {self.size} bytes"
        if _CRC.unpack_from(data, self.size - _CRC.size)[0] != zlib.crc32(data[: -_CRC.size], self.crc):
            return "a checksum that does not match"
        if (found := _HEAD.unpack_from(data)[0]) != step & 0xFFFFFFFF and not self.asynchronous:
            return f"the record of step {found}"
        return None

    def unpack(self, data: bytes, step: int) -> Record:
        low, flags, multiple, loss = _HEAD.unpack_from(data)
        step = low if self.asynchronous else step
        numbers = self._body().unpack_from(data, _HEAD.size)
        rates, losses = numbers[: self.groups], numbers[self.groups : self.groups + self.losses]
        g, q = numbers[self.groups + self.losses :], self.directions
        gradients = tuple(g[i * q : (i + 1) * q] for i in range(self.groups))
        flag = lambda bit: bool(flags & bit)
        return Record(
            step, flag(FINITE), flag(TWO_PASS), flag(CARRIED), multiple, loss, rates, gradients, losses
        )


# Header -----------------------------------------------------------------------------------------------------


def canonical(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def encode(header: dict[str, Any]) -> tuple[bytes, Layout]:
    """The bytes before the first record, and the layout of the records."""
    check_header(header)
    data = canonical(header)
    if len(data) > MAX_HEADER:
        fail("trajectory", "header", f"at most {MAX_HEADER} bytes", len(data))
    crc = zlib.crc32(data)
    return _PREFIX.pack(MAGIC, VERSION, len(data), crc) + data, _layout(header, crc)


def _layout(header: dict[str, Any], crc: int) -> Layout:
    sizes = len(header["groups"]), header["estimator"]["directions"], header["losses"]
    return Layout(*sizes, crc, "asynchronous" in header)


def _is_option(value: object) -> bool:
    """Whether ``value`` is a setting: None, a bool, a number, a short text, or a list of a few of them."""
    if isinstance(value, list):
        return len(value) <= 16 and all(_is_option(v) and not isinstance(v, list) for v in value)
    plain = value is None or isinstance(value, (bool, float)) or _is_text(value, 256)
    return plain or is_integer(value, -(2**63), 2**64 - 1)


def _is_part(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("class"), str)
        and all(map(_is_option, value.values()))
    )


def _is_text(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) <= length


_HEADER = {
    "contract": lambda v: v == CONTRACT,
    "created_by": lambda v: _is_text(v, 256),
    "optimizer": lambda v: _is_text(v, 256),
    "seed": lambda v: is_integer(v, -(2**63), 2**64 - 1),
    "start": lambda v: is_integer(v, 0, 2**63 - 1),
    "restore": lambda v: v in ("exact", "inplace", "products"),
    "gated": lambda v: isinstance(v, bool),
    "losses": lambda v: is_integer(v, 0, 2**20 - 1),
    "estimator": lambda v: _is_part(v) and is_integer(v.get("directions"), 1, 2**20 - 1),
    "rule": lambda v: _is_part(v) and is_integer(v.get("window", 1), 1, MAX_WINDOW),
    "direction": lambda v: _is_part(v) and is_integer(v.get("rank", 1), 1, MAX_RANK),
    "subset": lambda v: v is None or _is_part(v),
    "groups": lambda v: isinstance(v, list) and v,
}
#: Entries that a header need not have.
_OPTIONAL = {
    "asynchronous": lambda v: v is True,
    "part": lambda v: v is True,
    "cohort": lambda v: is_integer(v, 0, 2**20 - 1),
}
_GROUP = {
    "options": lambda v: isinstance(v, dict) and all(map(_is_option, v.values())),
    "lr_is_tensor": lambda v: isinstance(v, bool),
    "params": lambda v: isinstance(v, list),
}
_PARAM = {
    "name": lambda v: v is None or _is_text(v, 4096),
    "stream": lambda v: is_integer(v, 0, 2**STREAM_BITS - 1),
    "shape": lambda v: isinstance(v, list) and len(v) <= 64 and all(is_integer(n, 0, 2**63 - 1) for n in v),
    "dtype": lambda v: _is_text(v, 32),
    "sha256": lambda v: v is None or (_is_text(v, 64) and re.fullmatch("[0-9a-f]{64}", v)),
}


def _check_entries(where: str, found: object, known: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.keys() != known.keys():
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        fail("trajectory", where, f"the entries {sorted(known)}", str(got)[:200])
    for key, is_valid in known.items():
        if not is_valid(found[key]):
            expected = f"contract {CONTRACT!r}" if key == "contract" else "a valid value"
            fail("trajectory", f"{where}.{key}", expected, repr(found[key])[:200])


def check_header(header: Any) -> None:
    more = {key: valid for key, valid in _OPTIONAL.items() if isinstance(header, dict) and key in header}
    _check_entries("header", header, _HEADER | more)
    for i, group in enumerate(header["groups"]):
        _check_entries(f"header.groups[{i}]", group, _GROUP)
        for j, param in enumerate(group["params"]):
            _check_entries(f"header.groups[{i}].params[{j}]", param, _PARAM)
            if param["sha256"] is not None and param["dtype"] not in DTYPES:
                fail(
                    "trajectory", f"header.groups[{i}].params[{j}].dtype", " or ".join(DTYPES), param["dtype"]
                )
    if (window := header["rule"].get("window")) is not None:
        kept = window * header["estimator"]["directions"] * len(header["groups"])
        if kept > MAX_WINDOW:
            expected = f"window * directions * groups of at most {MAX_WINDOW}"
            fail("trajectory", "header.rule.window", expected, kept)


def _read_header(file: BinaryIO, name: str) -> tuple[dict[str, Any], Layout] | None:
    """The header and the layout; None where the file ends inside the header, so that no step was recorded."""
    prefix = file.read(_PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)]:
        fail("trajectory", name, "a log of zokernels", f"a file that begins with {prefix[: len(MAGIC)]!r}")
    if len(prefix) < _PREFIX.size:
        return None
    _, version, size, crc = _PREFIX.unpack(prefix)
    if version != VERSION:
        fail("trajectory", name, f"format version {VERSION}", version)
    if size > MAX_HEADER:
        fail("trajectory", name, f"a header of at most {MAX_HEADER} bytes", size)
    if size > os.fstat(file.fileno()).st_size - _PREFIX.size:  # read() takes memory for what it is asked for
        return None
    data = file.read(size)
    if zlib.crc32(data) != crc:
        fail("trajectory", name, "a header that matches its checksum", "another one: the log is damaged")
    try:
        header = json.loads(data)
        same = canonical(header) == data
    except (ValueError, RecursionError) as error:
        fail("trajectory", name, "a header of JSON", str(error)[:200])
    if not same:
        fail("trajectory", name, "a header of canonical JSON", "another form of it")
    check_header(header)
    for group in header["groups"]:
        for param in group["params"]:  # logs from before know fewer wrappers
            param["name"] = param["name"] and canonical_name(param["name"])
    return header, _layout(header, crc)


@dataclass(frozen=True)
class Log:
    """A log whose every checksum has been read."""

    path: str
    header: dict[str, Any]
    layout: Layout
    begin: int  #: the byte of the first record
    steps: int  #: the number of good records
    broken: str | None  #: what follows the last good record, where that is not the end of the file
    cut_off: bool  #: whether that is only a part of a record, as a killed writer leaves it

    @property
    def start(self) -> int:
        """The step of the first record."""
        step: int = self.header["start"]
        return step

    @property
    def end(self) -> int:
        """The byte after the last good record."""
        return self.begin + self.steps * self.layout.size

    def check_upto(self, upto: int | None) -> int:
        """The step that ``upto`` means; None is the end of the log."""
        stop = self.start + self.steps if upto is None else upto
        if not self.start <= stop <= self.start + self.steps:
            fail("trajectory", "upto", f"a step in [{self.start}, {self.start + self.steps}]", upto)
        return stop

    def records(self, upto: int | None = None) -> Iterator[Record]:
        """The records of the steps before step ``upto`` (default: all)."""
        stop = self.check_upto(upto)
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            for step in range(self.start, stop):
                data = file.read(self.layout.size)
                if (fault := self.layout.fault(data, step)) is not None:
                    fail("trajectory", f"{self.path}, step {step}", "the record that was there before", fault)
                yield self.layout.unpack(data, step)


def is_log(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file at ``path`` that begins as a log does."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def scan(path: str | os.PathLike[str]) -> Log | None:
    """The log, with every checksum read; None where it ends inside its header."""
    path = os.fspath(path)
    with open(path, "rb") as file:
        if (found := _read_header(file, path)) is None:
            return None
        (header, layout), begin, size = found, file.tell(), os.fstat(file.fileno()).st_size
        steps, fault, cut_off = 0, None, False
        for index in range(-(-max(0, size - begin) // layout.size)):
            step = header["start"] + index
            if index * layout.size + begin + layout.size > size:
                fault, cut_off = f"{size - begin - index * layout.size} of {layout.size} bytes", True
            else:
                fault = layout.fault(file.read(layout.size), step)
            if fault is not None:
                fault = f"step {step}, byte {begin + index * layout.size}: {fault}"
                break
            steps += 1
    return Log(path, header, layout, begin, steps, fault, cut_off)


def read(path: str | os.PathLike[str], recover: bool = False) -> Log:
    """The log at ``path``, with every checksum read.

    ``recover``: accept a log that is cut off or damaged, up to its last good record; :attr:`Log.broken` says
    where.

    Raises ValueError where the file is no log, and, without ``recover``, where it is damaged.
    """
    log = scan(path)
    if log is None:
        expected = "a whole header"
        fail("trajectory", os.fspath(path), expected, "a file that ends inside it: no step was recorded")
    if log.broken and not recover:
        expected = f"whole records (recover=True or --recover takes the {log.steps} before)"
        fail("trajectory", log.path, expected, log.broken)
    return log
