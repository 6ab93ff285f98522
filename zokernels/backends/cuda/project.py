"""project on an NVIDIA GPU: csrc/cuda/project_kernel.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS
from ..sums import by_partial_sums

#: Threads of a tile, which write a sum each: they do not communicate.
COLUMNS = 8


def project(tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str) -> Tensor:
    def kernel(partial: Tensor, seeds: Tensor) -> None:
        torch.ops.zokernels_cuda.project(partial, tensors, seeds, streams, offsets, DISTS[dist])

    return by_partial_sums(kernel, COLUMNS, tensors, seeds, offsets)
