"""combine on the host: csrc/cpu/combine_kernel.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DISTS
from ..reference.combine import combine as reference
from ..terms import Terms
from .isa import current_isa


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    if not terms.is_plain:
        return reference(out, params, terms)
    seeds, coeffs, streams, offsets, dist, decay, rounding_seed, *_ = terms
    torch.ops.zokernels_cpu.combine(
        out, params, seeds, coeffs, streams, offsets, DISTS[dist], decay, rounding_seed, current_isa()
    )
