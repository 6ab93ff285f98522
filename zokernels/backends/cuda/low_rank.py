"""low_rank on an NVIDIA GPU: csrc/cuda/low_rank_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms


def low_rank(out: list[Tensor], params: list[Tensor], left: list[Tensor], right: list[Tensor], terms: Terms) -> None:
    torch.ops.zokernels_cuda.low_rank(out, params, left, right, *terms.packed)
