"""spread: one combine out of place for each direction, in pure PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .combine import combine


@implements
def spread(out: Tensor, x: Tensor, terms: Terms) -> None:
    for k in range(terms.seeds.numel()):
        combine([out[k]], [x], terms._replace(seeds=terms.seeds[k : k + 1], coeffs=terms.coeffs[k : k + 1]))
