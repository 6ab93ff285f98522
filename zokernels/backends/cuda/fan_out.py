"""fan_out on an NVIDIA GPU: the combine kernel with two more outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS


def fan_out(
    params: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    seed: Tensor,
    coeff: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    torch.ops.zokernels_cuda.fan_out(
        params,
        plus,
        minus,
        seed,
        coeff,
        seeds,
        coeffs,
        streams,
        offsets,
        DISTS[dist],
        decay,
        rounding_seed,
    )
