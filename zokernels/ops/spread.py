"""spread: a tensor moved along many directions, in one read of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import check_scalars, check_tensors, check_terms, fail
from .arguments import Dist, device_values, user_operation
from .define import Call, define_writing


def _check_spread(
    out: Tensor, x: Tensor, seeds: Tensor, coeffs: Tensor, stream: int, offset: int, dist: str
) -> Call:
    terms = Terms(seeds, coeffs, [stream], [offset], dist, None, None)
    check_tensors("spread", {"x": [x]})
    check_terms("spread", "x", [x], terms)
    check_scalars("spread", "coeffs", coeffs, torch.float32, x.device)
    if out.dtype is not x.dtype or out.device != x.device:
        fail("spread", "out", f"{x.dtype} on {x.device}, as x", f"{out.dtype} on {out.device}", TypeError)
    shape = (seeds.numel(), *x.shape)
    if tuple(out.shape) != shape or not out.is_contiguous():
        got = f"{tuple(out.shape)}, strides {out.stride()}"
        fail("spread", "out", f"a contiguous tensor of shape {shape}", got)
    return Call((out, x, terms), {"out": [out] if out.numel() else []}, {"x": [x]})


_spread = define_writing(
    "spread(Tensor(a!) out, Tensor x, Tensor seeds, Tensor coeffs, int stream, int offset, str dist) -> ()",
    _check_spread,
)


@user_operation
def spread(
    out: Tensor,
    x: Tensor,
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    stream: int = 0,
    offset: int = 0,
    dist: Dist = "normal",
) -> None:
    """out[k] = round(x + coeffs[k] * z_k) for every k, in one read of x: queries of a black box, or
    candidates.

    ``out`` is a contiguous tensor of shape [K, *x.shape], of x's dtype and device; seeds and coeffs have K
    values.

    Raises: as :func:`combine_`.  Source: ZO-AE-DS, Zhang et al. 2022 (arXiv 2203.14195).
    """
    _spread(
        out,
        x,
        device_values("spread", "seeds", seeds, torch.int64, x.device),
        device_values("spread", "coeffs", coeffs, torch.float32, x.device),
        stream,
        offset,
        dist,
    )
