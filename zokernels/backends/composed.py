"""Operations as several calls of ``combine``: what the reference does, and a backend without a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def fan_out_by(combine: Callable[..., None]) -> Callable[..., None]:
    """fan_out as the pending combine in place, then one combine out of place for each side."""

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
        if seeds.numel() or decay is not None:
            combine(params, params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
        combine(plus, params, seed, coeff, streams, offsets, dist, None, None)
        combine(minus, params, seed, -coeff, streams, offsets, dist, None, None)

    return fan_out
