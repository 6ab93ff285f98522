"""zokernels: fused kernels for zeroth-order training."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import es as es
    from . import offload as offload
    from . import optim as optim
    from . import quantize as quantize
    from . import trajectory as trajectory

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

#: Folders and modules that are imported when they are first asked for: ``zokernels.optim.ZOSGD``.
_LATER = ("distributed", "es", "offload", "optim", "quantize", "trajectory")

if not TYPE_CHECKING:  # which would believe that every name is there

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            import importlib

            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module 'zokernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER})
