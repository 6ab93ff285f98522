"""Pure PyTorch: the readable form of contract ``zk1``, on any device, without compiled code."""

from __future__ import annotations

from ..composed import fan_out_by
from ..registry import Backend
from .combine import combine
from .seeds import derive_seed


def load() -> Backend:
    return Backend("reference", frozenset(("cpu", "cuda")), combine, derive_seed, fan_out_by(combine))
