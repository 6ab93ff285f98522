"""low_rank: combine whose noise is a product of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import check_tensors, check_terms, fail
from .arguments import Rounding, as_list, in_place, noise_args, out_of_place
from .define import define_pair

_FACTORS = (
    "Tensor[] left, Tensor[] right, Tensor coeffs, int[] streams, int[] offsets, "
    "Tensor? decay, Tensor? rounding_seed"
)


def _check_low_rank(
    op: str,
    groups: Mapping[str, list[Tensor]],
    left: list[Tensor],
    right: list[Tensor],
    coeffs: Tensor,
    *places: Any,
) -> tuple[Any, ...]:
    params = groups["params"]
    # The directions are the factors': no seed is drawn from, and K is the factors' first dimension.
    none = torch.empty(coeffs.shape[-1] if coeffs.dim() else 0, dtype=torch.int64, device=coeffs.device)
    streams, offsets, decay, rounding_seed = places
    terms = Terms(none, coeffs, streams, offsets, "normal", decay, rounding_seed)
    if any(groups.values()):
        check_tensors(op, groups)
    check_terms(op, "params", params, terms)
    count = none.numel()
    for argument, factors, at in (("left", left, 0), ("right", right, 1)):
        if len(factors) != len(params):
            fail(op, argument, f"{len(params)} tensors, as in params", len(factors))
        for i, (factor, param) in enumerate(zip(factors, params, strict=True)):
            name = f"{argument}[{i}]"
            if factor.dtype is not torch.float32 or factor.device != param.device:
                got = f"{factor.dtype} on {factor.device}"
                fail(op, name, f"torch.float32 on {param.device}", got, TypeError)
            if param.dim() < 2:
                fail(op, f"params[{i}]", "a matrix (two dimensions or more)", f"shape {tuple(param.shape)}")
            rows = param.shape[0] if at == 0 else math.prod(param.shape[1:])
            rank = left[i].shape[-1]
            if tuple(factor.shape) != (count, rows, rank) or not factor.is_contiguous():
                fail(op, name, f"a contiguous tensor of shape {(count, rows, rank)}", tuple(factor.shape))
    return {"left": left, "right": right}, (left, right, terms)


_low_rank_, _low_rank = define_pair("low_rank", _FACTORS, _check_low_rank)


def _call(
    op: str,
    out: list[Tensor] | None,
    params: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    coeffs: float | Sequence[float] | Tensor,
    *,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
) -> None:
    tensors = as_list(op, "params", params)
    noise = noise_args(op, tensors, (), coeffs, streams, offsets, "normal", decay, rounding, rounding_seed)
    _, coeffs, stream_list, offset_list, _, *rounded = noise
    args = (
        tensors,
        as_list(op, "left", left),
        as_list(op, "right", right),
        coeffs,
        stream_list,
        offset_list,
        *rounded,
    )
    _low_rank_(*args) if out is None else _low_rank(out, *args)


@in_place(_call)
def low_rank_(*args: Any, **options: Any) -> None:
    """theta = round(decay * theta + sum_k coeffs[k] * L_k R_k^T) for matrices; the dense products are never
    stored.

    An element's inner product is a chain of fp32 fmas in the order of the rank, from 0; the sum one in the
    order of k.

    Args:
        params: [m, ...] tensors, taken as [m, n] matrices.
        left, right: fp32 [K, m, r] and [K, n, r] for each; r may differ from tensor to tensor.
        coeffs, streams, offsets, decay, rounding, rounding_seed: as for :func:`combine_` (streams and offsets
            place the bits of stochastic rounding).

    Raises: as :func:`combine_`.

    Sources: LOZO, Chen et al. 2024 (arXiv 2410.07698); SubZero, Yu et al. 2024 (2410.08989); TeZO, Sun et al.
    2025 (2501.19057); EGGROLL, Sarkar et al. 2025 (2511.16652)."""


@out_of_place(_call)
def low_rank(out: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
    """:func:`low_rank_` out of place; theta is only read."""
