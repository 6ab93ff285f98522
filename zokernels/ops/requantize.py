"""requantize: combine over int8, rounded to an integer and clamped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.terms import Terms
from ..checks import check_overlap, check_tensors, check_terms, fail
from .arguments import Dist, Rounding, as_list, mask_args, noise_args
from .define import MASK, NOISE, checked, define, read_by, written


def _check_requantize(op: str, groups: Mapping[str, list[Tensor]], low: int, high: int, *fields: Any) -> Terms:
    terms = Terms(*fields)
    if any(groups.values()):
        check_tensors(op, groups, (torch.int8,))
    check_terms(op, "params", groups["params"], terms)
    if not -128 <= low < high <= 127:
        fail(op, "low, high", "-128 <= low < high <= 127", (low, high))
    return terms


@define(
    f"requantize_(Tensor(a!)[] params, int low, int high, {NOISE}, {MASK}) -> ()",
    checked(lambda params, *rest: _check_requantize("requantize_", {"params": params}, *rest)),
)
def _requantize_(params: list[Tensor], low: int, high: int, *fields: Any) -> None:
    terms = _check_requantize("requantize_", {"params": params}, low, high, *fields)
    check_overlap("requantize_", {"params": params}, read_by(terms))
    if params:
        select(params[0].device).requantize(params, params, low, high, terms)
        written(params)


@define(
    f"requantize(Tensor(a!)[] out, Tensor[] params, int low, int high, {NOISE}, {MASK}) -> ()",
    checked(lambda out, params, *rest: _check_requantize("requantize", {"params": params, "out": out}, *rest)),
)
def _requantize(out: list[Tensor], params: list[Tensor], low: int, high: int, *fields: Any) -> None:
    terms = _check_requantize("requantize", {"params": params, "out": out}, low, high, *fields)
    check_overlap("requantize", {"out": out}, {"params": params, **read_by(terms)})
    if params:
        select(params[0].device).requantize(out, params, low, high, terms)
        written(out)


@torch.no_grad()
def requantize_(
    params: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    low: int = -127,
    high: int = 127,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "stochastic",
    rounding_seed: int | Tensor | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    mask_seed: int | Tensor | None = None,
    density: float | None = None,
) -> None:
    """:func:`combine_` over int8: q = clamp(round(decay * q + sum_k coeffs[k] * z_k), low, high).

    Coefficients are in quantisation steps; a row for each tensor (fp32 [tensors, K]) gives each its own scale.
    "stochastic" is floor(acc + u / 65536) with the 16-bit field u of domain 4, so that q moves by the coefficients on
    average; "nearest" has ties to even.  NaN becomes ``low``.

    Source: QuZO, Zhou et al. 2025 (arXiv 2502.12346).
    """
    tensors = as_list(params)
    _requantize_(
        tensors,
        low,
        high,
        *noise_args("requantize_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *mask_args("requantize_", tensors, masks, mask_seed, density),
    )


@torch.no_grad()
def requantize(
    out: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    low: int = -127,
    high: int = 127,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "stochastic",
    rounding_seed: int | Tensor | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    mask_seed: int | Tensor | None = None,
    density: float | None = None,
) -> None:
    """:func:`requantize_` out of place; the weights are only read."""
    tensors = as_list(params)
    _requantize(
        as_list(out),
        tensors,
        low,
        high,
        *noise_args("requantize", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *mask_args("requantize", tensors, masks, mask_seed, density),
    )
