"""Triton kernels: contract ``zk1`` on NVIDIA GPUs without a CUDA toolkit, and on CPU in Triton's interpreter."""

from __future__ import annotations

import torch

from ..registry import Backend, BackendUnavailable


def load() -> Backend:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(f"triton: cannot import triton ({error}); `pip install triton` installs it") from error
    if torch.version.hip is not None:
        raise BackendUnavailable(
            "triton: expected an NVIDIA build of torch, got ROCm, and the kernels hold PTX; "
            "ZOKERNELS_BACKEND=reference runs"
        )
    from .combine import combine, requantize
    from .device import DEVICES
    from .fan_out import fan_out
    from .low_rank import low_rank
    from .project import project
    from .seeds import derive_seed
    from .spread import spread
    from .squares import squares
    from .update import update
    from .wire import decode, decode_fan_out, encode

    return Backend(
        "triton",
        DEVICES,
        derive_seed=derive_seed,
        combine=combine,
        requantize=requantize,
        fan_out=fan_out,
        update=update,
        low_rank=low_rank,
        spread=spread,
        squares=squares,
        project=project,
        encode=encode,
        decode=decode,
        decode_fan_out=decode_fan_out,
    )
