"""Triton kernels: contract ``zk1`` on NVIDIA GPUs without a CUDA toolkit, and on CPU in Triton's interpreter."""

from __future__ import annotations

import torch

from ..registry import Backend, BackendUnavailable, kernels_of


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
    from .device import DEVICES

    return Backend("triton", DEVICES, kernels_of(__name__).get)
