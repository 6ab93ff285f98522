"""spread on an NVIDIA GPU: csrc/cuda/spread_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms


def spread(out: Tensor, x: Tensor, terms: Terms) -> None:
    torch.ops.zokernels_cuda.spread(out, x, *terms.packed)
