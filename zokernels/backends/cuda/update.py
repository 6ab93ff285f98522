"""update on an NVIDIA GPU: csrc/cuda/update_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms


def update(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, terms: Terms
) -> None:
    torch.ops.zokernels_cuda.update(params, first, second, rule, hyper, *terms.packed)
