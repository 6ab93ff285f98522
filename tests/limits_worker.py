"""Files from elsewhere under a limit of memory and of time (test_limits.py): ``SEED``.

Prints, as JSON, how many files were read and the faults: what was neither read nor refused by one error, took
more memory or time than so small a file may, or changed something although it was refused.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from reader_cases import PREFIX, accepts
from torch import Tensor, nn
from trajectory_cases import CASES

from zokernels.trajectory import read, replay_
from zokernels.trajectory.format import MAGIC, VERSION, Record, canonical, encode

#: Bytes that a reader may take beside what the process has, and seconds of its own CPU time.
MEMORY, SECONDS = 64 << 20, 10

#: The values that replace a number, a text or a list, one at a time.
ODD: tuple[Any, ...] = (
    *(None, True, "x", [1], -1, 0.5, 2**12, 2**16, 2**20 - 1, 2**31 - 1, 2**40, 2**62, 2**63 - 1),
    *(1e300, 1e-320, -0.0),
)
#: A long and thin matrix: of it, factors of a large rank are much larger than the weights.
SHAPES = {"layers.0.w": (4096, 1), "layers.1.w": (5, 3), "head": (7,)}


class Late(BaseException):
    """A reader took more than :data:`SECONDS`."""


def _late(number: int, frame: object) -> None:
    raise Late


@contextmanager
def limited() -> Iterator[None]:
    """Inside, an allocation fails that goes beyond :data:`MEMORY`, and after :data:`SECONDS` comes Late."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def leaves(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each number and text of nested dicts and lists stands."""
    if not isinstance(found, (dict, list)):
        yield path
        return
    for key in found if isinstance(found, dict) else range(len(found)):
        yield from leaves(found[key], (*path, key))


def put(found: Any, path: tuple[Any, ...], value: object) -> Any:
    """A copy of ``found`` with ``value`` at that place."""
    result = place = copy.deepcopy(found)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


def kind_of(parts: tuple[object, ...], path: tuple[Any, ...]) -> tuple[Any, ...]:
    """What two places have in common that are the same entry of the same class."""
    return (*parts, *("each" if isinstance(key, int) else key for key in path))


class Trial:
    """Counts what was tried, and notes the faults."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tried, self.faults = rng, 0, []
        self._seen: set[tuple[Any, ...]] = set()

    def new(self, kind: tuple[Any, ...]) -> bool:
        """Whether an entry of this kind was not yet tried."""
        new = kind not in self._seen
        self._seen.add(kind)
        return new

    def one(self, what: object, use: Callable[[], object], unchanged: Callable[[], bool]) -> None:
        """Reads a file: it may be taken, or refused with everything as it was."""
        self.tried += 1
        try:
            with limited():
                use()
        except (ValueError, TypeError) as error:
            if not unchanged():
                self.faults.append(f"{what}: changed, and then {error!r}"[:300])
        except BaseException as error:
            self.faults.append(f"{what}: {error!r}"[:300])


def crafted(header: dict[str, Any], records: list[Record]) -> bytes:
    """A log with that header and, as far as they fit into a small file, the records."""
    head, layout = encode(header)
    if layout.size > 1 << 14:
        return head + bytes(1000)
    fill = lambda values, count: (*values, *(0.5,) * count)[:count]
    return head + b"".join(
        layout.pack(
            r._replace(
                step=header["start"] + r.step,
                gradients=tuple(fill(g, layout.directions) for g in r.gradients),
                losses=fill(r.losses, layout.losses),
            )
        )
        for r in records
    )


def try_logs_and_states(trial: Trial, path: pathlib.Path) -> None:
    """Each entry of the header of every optimizer's log and of its ``state_dict``, with odd values."""
    base = {name: torch.linspace(-1, 1, max(s)).repeat(min(s), 1).reshape(s) for name, s in SHAPES.items()
            if len(s) == 2} | {"head": torch.linspace(-1, 1, 7)}  # fmt: skip
    for make, options in CASES.values():
        params = {name: nn.Parameter(value.clone()) for name, value in base.items()}
        path.unlink(missing_ok=True)
        options = {**options, **({"rank": 1} if "rank" in options else {})}
        optimizer = make(list(params.items()), lr=0.01, seed=7, trajectory=path, **options)
        closure = lambda params=params: sum(p.square().sum() for p in params.values())
        for _ in range(2):
            optimizer.step(closure)
        optimizer.trajectory.close()
        _try_logs(trial, path, base)
        _try_states(trial, optimizer, params)


def _try_logs(trial: Trial, path: pathlib.Path, base: dict[str, Tensor]) -> None:
    log, edited = read(path), path.with_suffix(".edited")
    records, header = list(log.records()), log.header
    for place in leaves(header):
        part = header[place[0]]
        parts = (part["class"],) if isinstance(part, dict) and "class" in part else ()
        if place[-1] == "class" or not trial.new(kind_of(("log", *parts), place)):
            continue
        for value in trial.rng.sample(ODD, 3):
            try:
                edited.write_bytes(crafted(put(header, place, value), records))
            except ValueError:  # no reader takes such a header
                continue
            weights = {name: tensor.clone() for name, tensor in base.items()}
            same = lambda weights=weights: all(torch.equal(weights[name], base[name]) for name in base)
            trial.one(
                (place, parts, value),
                lambda weights=weights: replay_(weights, read(edited, recover=True), check=False),
                same,
            )


def _try_states(trial: Trial, optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    good = optimizer.state_dict()
    parts = type(optimizer.rule).__name__, type(optimizer.direction).__name__

    def unchanged() -> bool:
        now = optimizer.state_dict()
        return all(str(now[key]) == str(good[key]) for key in ("zo", "state", "param_groups"))

    for place in leaves(good):
        if not trial.new(kind_of(("state", *parts), place)):
            continue
        for value in trial.rng.sample(ODD, 2):
            loaded = copy.deepcopy(put(good, place, value))
            trial.one(
                ("state_dict", parts, place, value), lambda s=loaded: optimizer.load_state_dict(s), unchanged
            )
            optimizer.load_state_dict(copy.deepcopy(good))


def try_readers(trial: Trial) -> None:
    """Documents that are small, and say that they are large, or are nested without end."""
    deep = (b"[" * 200_000, b'{"a":' * 100_000, b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    huge = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}'
    number = b'{"w":{"dtype":"F32","shape":[1' + b"0" * 100_000 + b'],"data_offsets":[0,4]}}'
    for text in (*deep, huge % (2**31, 2**31, 2**62), huge % (2**62, 0, 0), number):
        framed = len(text).to_bytes(8, "little") + text + bytes(16)
        for reader, data in (("safetensors", framed), ("block", framed), ("index", text)):
            trial.one((reader, text[:40]), lambda r=reader, d=data: accepts(r, d), lambda: True)
        head = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text))
        trial.one(("log", text[:40]), lambda d=head + text: accepts("log", d), lambda: True)
    text = canonical({"seed": 1})
    for size in (2**29, 2**29 - 1, 2**31):  # a file that ends far before the end of its header
        head = PREFIX.pack(MAGIC, VERSION, size, 0)
        trial.one(("log", size), lambda d=head + text: accepts("log", d), lambda: True)
        framed = size.to_bytes(8, "little") + text
        trial.one(("safetensors", size), lambda d=framed: accepts("safetensors", d), lambda: True)


def main(seed: int) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGVTALRM, _late)
    torch.set_num_threads(1)
    trial = Trial(random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        try_logs_and_states(trial, pathlib.Path(folder) / "log")
    try_readers(trial)
    print(json.dumps({"tried": trial.tried, "faults": trial.faults}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
