"""Operations as several calls of ``combine``: what the reference does, and a backend without a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .terms import Terms

Combine = Callable[[list[Tensor], list[Tensor], Terms], None]


def fan_out_by(combine: Combine) -> Callable[..., None]:
    """fan_out as the pending combine in place, then one combine out of place for each side."""

    def fan_out(
        params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, terms: Terms
    ) -> None:
        if terms.seeds.numel() or terms.decay is not None:
            combine(params, params, terms)
        side = terms._replace(seeds=seed, coeffs=coeff, decay=None, rounding_seed=None)
        combine(plus, params, side)
        combine(minus, params, side._replace(coeffs=-coeff))

    return fan_out


def spread_by(combine: Combine) -> Callable[..., None]:
    """spread as one combine out of place for each direction."""

    def spread(out: Tensor, x: Tensor, terms: Terms) -> None:
        for k in range(terms.seeds.numel()):
            combine([out[k]], [x], terms._replace(seeds=terms.seeds[k : k + 1], coeffs=terms.coeffs[k : k + 1]))

    return spread
