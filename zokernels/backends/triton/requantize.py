"""requantize: the combine kernel over int8, rounded to an integer and clamped, in Triton."""

from __future__ import annotations

from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .combine import combine_kernel, combine_table_kernel
from .launch import masked


@implements
def requantize(out: list[Tensor], params: list[Tensor], low: int, high: int, terms: Terms) -> None:
    kernels = (combine_kernel, combine_table_kernel)
    masked(kernels, (out, params, terms.masks, None), terms, LOW=low, HIGH=high)
