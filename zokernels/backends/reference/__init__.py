"""Pure PyTorch: the readable form of contract ``zk1``, on any device, without compiled code."""

from __future__ import annotations

from ..composed import fan_out_by, spread_by
from ..registry import Backend
from .combine import combine
from .low_rank import low_rank
from .project import project
from .requantize import requantize
from .seeds import derive_seed
from .squares import squares
from .update import update
from .wire import decode, decode_fan_out, encode


def load() -> Backend:
    return Backend(
        "reference",
        frozenset(("cpu", "cuda")),
        derive_seed=derive_seed,
        combine=combine,
        fan_out=fan_out_by(combine),
        spread=spread_by(combine),
        update=update,
        low_rank=low_rank,
        requantize=requantize,
        squares=squares,
        project=project,
        encode=encode,
        decode=decode,
        decode_fan_out=decode_fan_out,
    )
