"""combine on an NVIDIA GPU: csrc/cuda/combine_kernel.cuh, and update_kernel.cuh where it is not plain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    torch.ops.zokernels_cuda.combine(out, params, *terms.packed)
