"""C++ kernels for the host: one translation unit per instruction set, chosen at run time."""

from __future__ import annotations

import torch

from .. import library
from ..registry import Backend
from .combine import combine
from .fan_out import fan_out


def load() -> Backend:
    library.load("cpu")
    return Backend("cpu", frozenset(("cpu",)), combine, torch.ops.zokernels_cpu.derive_seed, fan_out)
