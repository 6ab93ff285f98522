"""update on an NVIDIA GPU: csrc/cuda/update_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms, by_rows


def update(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, terms: Terms
) -> None:
    run = torch.ops.zokernels_cuda.update
    by_rows(lambda groups, flat: run(*groups, rule, hyper, *flat.packed), [params, first, second], terms)
