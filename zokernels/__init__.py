"""zokernels: fused kernels for zeroth-order training."""

from .backends import BackendUnavailable, backend
from .blackbox import BlackBox
from .contract import CONTRACT, stream_of, streams_of
from .functional import (
    combine,
    combine_,
    decode,
    decode_fan_out,
    derive_seed,
    encode,
    fan_out_,
    low_rank,
    low_rank_,
    low_rank_linear_,
    noise,
    pack_mask,
    plan,
    project,
    requantize,
    requantize_,
    spread,
    squared_norm,
    update_,
)
from .span import Span, gram
from .version import __version__
from .wire import is_lossless, wire_bytes

__all__ = [
    "CONTRACT",
    "BackendUnavailable",
    "BlackBox",
    "Span",
    "__version__",
    "backend",
    "combine",
    "combine_",
    "decode",
    "decode_fan_out",
    "derive_seed",
    "encode",
    "fan_out_",
    "gram",
    "is_lossless",
    "low_rank",
    "low_rank_",
    "low_rank_linear_",
    "noise",
    "pack_mask",
    "plan",
    "project",
    "requantize",
    "requantize_",
    "spread",
    "squared_norm",
    "stream_of",
    "streams_of",
    "update_",
    "wire_bytes",
]
