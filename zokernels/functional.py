"""The operations as users call them: typed wrappers that accept plain Python numbers.

Each stands in a file of ``zokernels/ops``; this is the list of them, which ``zokernels`` itself takes over.

theta is the parameter, z the noise of contract ``zk1``: a pure function of (seed, stream, logical index).
"""

from __future__ import annotations

from .ops.arguments import Dist as Dist
from .ops.arguments import Rounding as Rounding
from .ops.combine import combine, combine_, pack_mask
from .ops.fan_out import fan_out_
from .ops.low_rank import low_rank, low_rank_
from .ops.low_rank_linear import low_rank_linear_
from .ops.noise import noise
from .ops.plan import Plan as Plan
from .ops.plan import plan
from .ops.project import project
from .ops.quantized_linear import quantized_linear
from .ops.requantize import requantize, requantize_
from .ops.seeds import derive_seed
from .ops.spread import spread
from .ops.squares import squared_norm
from .ops.update import Rule as Rule
from .ops.update import update_
from .ops.wire import decode, decode_fan_out, encode

__all__ = [
    "combine",
    "combine_",
    "decode",
    "decode_fan_out",
    "derive_seed",
    "encode",
    "fan_out_",
    "low_rank",
    "low_rank_",
    "low_rank_linear_",
    "noise",
    "pack_mask",
    "plan",
    "project",
    "quantized_linear",
    "requantize",
    "requantize_",
    "spread",
    "squared_norm",
    "update_",
]
