"""C++ kernels for the host: one translation unit per instruction set, chosen at run time."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import library, reference
from ..composed import spread_by
from ..registry import Backend
from .combine import combine
from .fan_out import fan_out


def load() -> Backend:
    library.load("cpu")
    return replace(
        reference.load(),
        name="cpu",
        devices=frozenset(("cpu",)),
        derive_seed=torch.ops.zokernels_cpu.derive_seed,
        combine=combine,
        fan_out=fan_out,
        spread=spread_by(combine),
    )
