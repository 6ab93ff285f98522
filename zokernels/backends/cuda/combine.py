"""combine on an NVIDIA GPU: csrc/cuda/combine_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.combine import combine as reference
from ..terms import Terms


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    if not terms.is_plain:
        return reference(out, params, terms)
    torch.ops.zokernels_cuda.combine(out, params, *terms.packed)
