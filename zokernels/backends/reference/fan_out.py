"""fan_out: the pending combine in place, then one combine out of place for each side, in pure PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .combine import combine


@implements
def fan_out(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, terms: Terms
) -> None:
    if terms.seeds.numel() or terms.decay is not None:
        combine(params, params, terms)
    side = terms._replace(seeds=seed, coeffs=coeff, decay=None, rounding_seed=None)
    combine(plus, params, side)
    combine(minus, params, side._replace(coeffs=-coeff))
