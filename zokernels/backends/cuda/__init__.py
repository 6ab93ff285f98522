"""CUDA C++ kernels: many tensors in one launch."""

from __future__ import annotations

import torch

from .. import library
from ..registry import Backend, BackendUnavailable
from .combine import combine
from .fan_out import fan_out


def load() -> Backend:
    library.load("cuda")
    if torch.version.cuda is None:
        raise BackendUnavailable(
            f"backend 'cuda' is built, but torch {torch.__version__} has no CUDA; install a CUDA build of torch"
        )
    return Backend("cuda", frozenset(("cuda",)), combine, torch.ops.zokernels_cuda.derive_seed, fan_out)
