"""combine on an NVIDIA GPU: csrc/cuda/combine_kernel.cuh, and update_kernel.cuh where it is not plain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms, by_rows


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    by_rows(lambda groups, flat: torch.ops.zokernels_cuda.combine(*groups, *flat.packed), [out, params], terms)
