"""combine on the host: csrc/cpu/combine_kernel.h."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...contract import DISTS

#: auto, portable, avx2 or avx512: for tests and for measuring one against the other.
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


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
        out, params, seeds, coeffs, streams, offsets, DISTS[dist], decay, rounding_seed, isa
    )
