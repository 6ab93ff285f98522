"""requantize: combine over int8, rounded to an integer and clamped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import check_tensors, check_terms, fail
from .arguments import Dist, Rounding, as_list, in_place, mask_args, noise_args, out_of_place
from .define import MASK, NOISE, define_pair, read_by


def _check_requantize(
    op: str, groups: Mapping[str, list[Tensor]], low: int, high: int, *fields: Any
) -> tuple[Any, ...]:
    terms = Terms(*fields)
    if any(groups.values()):
        check_tensors(op, groups, (torch.int8,))
    check_terms(op, "params", groups["params"], terms)
    if not -128 <= low < high <= 127:
        fail(op, "low, high", "-128 <= low < high <= 127", (low, high))
    return read_by(terms), (low, high, terms)


_requantize_, _requantize = define_pair(
    "requantize", f"int low, int high, {NOISE}, {MASK}", _check_requantize
)


def _call(
    op: str,
    out: list[Tensor] | None,
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
    tensors = as_list(params)
    noise = noise_args(op, tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed)
    args = tensors, low, high, *noise, *mask_args(op, tensors, masks, mask_seed, density)
    _requantize_(*args) if out is None else _requantize(out, *args)


@in_place(_call)
def requantize_(*args: Any, **options: Any) -> None:
    """:func:`combine_` over int8: q = clamp(round(decay * q + sum_k coeffs[k] * z_k), low, high).

    Coefficients are in quantisation steps; a row for each tensor (fp32 [tensors, K]) gives each its own
    scale. "stochastic" is floor(acc + u / 65536) with the 16-bit field u of domain 4, so that q moves by the
    coefficients on average; "nearest" has ties to even.  NaN becomes ``low``.

    Source: QuZO, Zhou et al. 2025 (arXiv 2502.12346).
    """
    with torch.no_grad():
        _call("requantize_", None, *args, **options)


@out_of_place(_call)
def requantize(out: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
    """:func:`requantize_` out of place; the weights are only read."""
    with torch.no_grad():
        _call("requantize", as_list(out), *args, **options)
