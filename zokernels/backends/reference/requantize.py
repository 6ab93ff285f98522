"""requantize: combine over int8, rounded to an integer and clamped, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DOMAIN_ROUNDING
from ..registry import implements
from ..terms import Terms
from .combine import Chunk, combine_by


@implements
def requantize(out: list[Tensor], params: list[Tensor], low: int, high: int, terms: Terms) -> None:
    def rounded(chunk: Chunk, acc: Tensor, dtype: torch.dtype) -> Tensor:
        if terms.rounding_seed is None:
            whole = acc.round()  # ties to even
        else:
            u16 = chunk.uniform16(terms.rounding_seed, DOMAIN_ROUNDING)
            whole = (acc + u16.float() * 2.0**-16).floor()
        return whole.clamp(low, high).nan_to_num(low).to(dtype)

    combine_by(out, params, terms, rounded)
