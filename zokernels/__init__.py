"""zokernels: fused kernels for zeroth-order training."""

from .backends import BackendUnavailable, backend
from .blackbox import BlackBox
from .contract import CONTRACT, stream_of, streams_of
from .functional import (
    combine,
    combine_,
    derive_seed,
    fan_out_,
    low_rank,
    low_rank_,
    noise,
    pack_mask,
    project,
    requantize,
    requantize_,
    spread,
    squared_norm,
    update_,
)
from .span import Span, gram
from .version import __version__

__all__ = [
    "CONTRACT",
    "BackendUnavailable",
    "BlackBox",
    "Span",
    "__version__",
    "backend",
    "combine",
    "combine_",
    "derive_seed",
    "fan_out_",
    "gram",
    "low_rank",
    "low_rank_",
    "noise",
    "pack_mask",
    "project",
    "requantize",
    "requantize_",
    "spread",
    "squared_norm",
    "stream_of",
    "streams_of",
    "update_",
]
