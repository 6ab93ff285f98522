"""zokernels: fused kernels for zeroth-order training."""

from .backends import BackendUnavailable, backend
from .contract import CONTRACT, stream_of, streams_of
from .functional import combine, combine_, derive_seed, noise

__version__ = "0.1.0"

__all__ = [
    "CONTRACT",
    "BackendUnavailable",
    "backend",
    "combine",
    "combine_",
    "derive_seed",
    "noise",
    "stream_of",
    "streams_of",
]
