"""The ops that can be measured, by name.  An op's module registers a function that yields result rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: The ops, each registered by the module of its name.  A new op is one more module in this list.
NAMES = ("combine", "fan_out", "many", "published", "step")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure.  An empty tuple stands for all that apply to the op."""

    device: str = "cpu"
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    dists: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1,)
    numel: int = 1 << 24
    baseline_numel: int = 1 << 22
    buffers: int = 4
    seconds: float = 2.0
    min_rounds: int = 7
    tiny: bool = False
    workloads: tuple[str, ...] = ("opt-1.3b",)
    scale: float = 1.0


@dataclass(frozen=True)
class Op:
    name: str
    summary: str
    run: Callable[[Settings], Iterator[Row]] = field(repr=False)


_OPS: dict[str, Op] = {}

#: What a run left out, and why.  It is printed and written with the rows, so that nothing is missing in
#: silence.
SKIPPED: dict[str, str] = {}


def skip(what: str, why: str) -> None:
    SKIPPED[what] = why


def register(name: str, summary: str) -> Callable[[Callable[[Settings], Iterator[Row]]], Callable]:
    def add(run: Callable[[Settings], Iterator[Row]]) -> Callable[[Settings], Iterator[Row]]:
        _OPS[name] = Op(name, summary, run)
        return run

    return add


def op(name: str) -> Op:
    """The op of :data:`NAMES`.  No other module is imported: it may need what an older package lacks."""
    importlib.import_module(f".{name}", __package__)
    return _OPS[name]
