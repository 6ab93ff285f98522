"""zokernels: fused kernels for zeroth-order training, which needs forward passes only.

Where to begin::

    from zokernels.optim import ZOSGD

    optimizer = ZOSGD(model.named_parameters(), lr=1e-6)
    loss = optimizer.step(lambda: model(**batch).loss)

zokernels.optim            optimizers (ZOSGD is MeZO), ``find_lr``, ``optimizer.diagnose``
zokernels.offload          ``stream``: a model whose weights are on the host or on disk
zokernels.trajectory       a log of a run, which replays it without a forward
zokernels.distributed      several processes that exchange scalars alone
zokernels.integrations     ``transformers`` (ZOTrainer), vLLM, and what other engines need
zokernels.es               evolution strategies whose members are run by such an engine
zokernels.quantize         layers of integers, which QZO and QuZO train
zokernels.BlackBox         a function without gradients as a layer
zokernels.combine_, noise, plan
                           the operations: noise of a seed added to weights, in one pass
zokernels.backends         the kernels (CUDA, Triton, CPU) and which of them is used

``zokernels info`` on the command line says what is built.  The documentation is in docs/ of the repository.
"""

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
    quantized_linear,
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
    "quantized_linear",
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
_LATER = ("distributed", "es", "integrations", "offload", "optim", "quantize", "trajectory")

if not TYPE_CHECKING:  # which would believe that every name is there

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            import importlib

            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module 'zokernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER, "backends", "functional"})
