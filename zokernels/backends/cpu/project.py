"""project on the host: csrc/cpu/project.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS
from ..sums import by_partial_sums
from .isa import current_isa


def project(tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str) -> Tensor:
    def kernel(partial: Tensor, seeds: Tensor) -> None:
        torch.ops.zokernels_cpu.project(partial, tensors, seeds, streams, offsets, DISTS[dist], current_isa())

    return by_partial_sums(kernel, 1, tensors, seeds, offsets)
