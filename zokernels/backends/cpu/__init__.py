"""The C++ kernels of csrc/cpu, compiled once for each instruction set; the best one is chosen at run time."""

from __future__ import annotations

from .. import library
from ..registry import Backend
from .isa import current_isa


def load() -> Backend:
    library.load("cpu")
    return Backend("cpu", frozenset(("cpu",)), library.finder("cpu", current_isa), compiled=True)
