"""C++ kernels for the host, compiled once for each instruction set, which is chosen at run time."""

from __future__ import annotations

import torch

from .. import library
from ..registry import Backend
from .combine import combine
from .fan_out import fan_out
from .low_rank import low_rank
from .project import project
from .requantize import requantize
from .spread import spread
from .squares import squares
from .update import update
from .wire import decode, decode_fan_out, encode


def load() -> Backend:
    library.load("cpu")
    return Backend(
        "cpu",
        frozenset(("cpu",)),
        derive_seed=torch.ops.zokernels_cpu.derive_seed,
        combine=combine,
        fan_out=fan_out,
        spread=spread,
        update=update,
        low_rank=low_rank,
        requantize=requantize,
        squares=squares,
        project=project,
        encode=encode,
        decode=decode,
        decode_fan_out=decode_fan_out,
    )
