"""combine on the host: csrc/cpu/combine_kernel.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS
from .isa import current_isa


def combine(
    out: list[Tensor],
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    torch.ops.zokernels_cpu.combine(
        out, params, seeds, coeffs, streams, offsets, DISTS[dist], decay, rounding_seed, current_isa()
    )
