"""CUDA C++ kernels: many tensors in one launch."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import library, reference
from ..composed import spread_by
from ..registry import Backend, BackendUnavailable
from .combine import combine
from .fan_out import fan_out


def load() -> Backend:
    library.load("cuda")
    if torch.version.cuda is None:
        raise BackendUnavailable(
            f"backend 'cuda' is built, but torch {torch.__version__} has no CUDA; install a CUDA build of torch"
        )
    return replace(
        reference.load(),
        name="cuda",
        devices=frozenset(("cuda",)),
        derive_seed=torch.ops.zokernels_cuda.derive_seed,
        combine=combine,
        fan_out=fan_out,
        spread=spread_by(combine),
    )
