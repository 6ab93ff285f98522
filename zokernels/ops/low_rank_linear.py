"""low_rank_linear: what a perturbation of low rank adds to a product, for the members of a population."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..checks import DTYPES, check_overlap, check_scalars, fail
from .arguments import device_values, user_operation
from .define import checked, define, written

#: The largest rank of the factors.
MAX_RANK = 64


def _check_matrix(name: str, value: Tensor, like: Tensor) -> None:
    if value.dtype not in DTYPES or value.dtype is not like.dtype:
        expected = "float32, bfloat16 or float16, the same for y and x"
        fail("low_rank_linear_", name, f"dtype {expected}", value.dtype, TypeError)
    if value.device != like.device:
        fail("low_rank_linear_", name, f"device {like.device}, as y", value.device)
    if value.dim() != 2 or not value.is_contiguous():
        got = f"shape {tuple(value.shape)}, strides {value.stride()}"
        fail("low_rank_linear_", name, "a contiguous matrix [rows, columns]", got)


def _check_factor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if value.dtype is not torch.float32 or value.device != device:
        got = f"{value.dtype} on {value.device}"
        fail("low_rank_linear_", name, f"torch.float32 on {device}", got, TypeError)
    count = value.shape[0] if value.dim() else 0
    shared = count == shape[0] or (count > 0 and shape[0] % count == 0)
    if value.dim() != len(shape) or value.shape[1:] != shape[1:] or not shared or not value.is_contiguous():
        expected = f"a contiguous tensor of shape {shape}, or of a divisor of so many members"
        fail("low_rank_linear_", name, expected, f"shape {tuple(value.shape)}, strides {value.stride()}")


def _check_low_rank_linear(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    coeffs: Tensor,
    rows: list[int],
    bias: Tensor | None = None,
    add: bool = True,
) -> None:
    op = "low_rank_linear_"
    for name, value in (("y", y), ("x", x)):
        _check_matrix(name, value, y)
    if x.shape[0] != y.shape[0]:
        fail(op, "x", f"{y.shape[0]} rows, as y", x.shape[0])
    check_scalars(op, "coeffs", coeffs, torch.float32, y.device)
    members, rank = coeffs.shape[0], left.shape[-1] if left.dim() else 0
    if not 1 <= rank <= MAX_RANK:
        fail(op, "left", f"factors of a rank in [1, {MAX_RANK}]", f"shape {tuple(left.shape)}")
    _check_factor("left", left, (members, y.shape[1], rank), y.device)
    _check_factor("right", right, (members, x.shape[1], rank), y.device)
    if bias is not None:
        _check_factor("bias", bias, (members, y.shape[1]), y.device)
    if len(rows) != members or min(rows, default=0) < 0 or sum(rows) != y.shape[0]:
        fail(op, "rows", f"{members} integers >= 0 with the sum {y.shape[0]}, one for each member", rows)


@define(
    "low_rank_linear_(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor coeffs, int[] rows, "
    "Tensor? bias=None, bool add=True) -> ()",
    checked(_check_low_rank_linear),
)
def _low_rank_linear_(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    coeffs: Tensor,
    rows: list[int],
    bias: Tensor | None = None,
    add: bool = True,
) -> None:
    _check_low_rank_linear(y, x, left, right, coeffs, rows, bias, add)
    read = {"x": [x], "left": [left], "right": [right], "bias": [] if bias is None else [bias]}
    check_overlap("low_rank_linear_", {"y": [y]}, read)
    if y.numel():
        select(y.device).low_rank_linear(y, x, left, right, coeffs, rows, bias, add)
        written([y])


@user_operation
def low_rank_linear_(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    rows: Sequence[int],
    bias: Tensor | None = None,
    add: bool = True,
) -> None:
    """y_p = round(y_p + c_p ((x_p B_p) A_p^T + b_p)) in place, for every member p of a population.

    Together with x W^T, which is added before or after, this is x_p (W + c_p A_p B_p^T)^T: a product with
    perturbed weights, for which no perturbed weight is made.  The rows of all members lie in one batch, one
    member behind the other.

    An element of x_p B_p is the sum of 64 chains of fp32 fmas, of which chain l takes columns l, l + 64, ...
    of x; neighbouring chains are added until one is left.  The sum over the rank is a chain of fp32 fmas in
    its order, from 0; b_p is added to it, and an fma adds c_p times that to y.  So the bits are the same on
    every backend.

    Args:
        y: [N, m] in fp32, bf16 or fp16; rounded once, to nearest.
        x: [N, n], of y's dtype.
        left, right: A and B, fp32 [P, m, r] and [P, n, r] with r from 1 to 64.  Neighbouring members may
            share a factor: of [G, ...] with P a multiple of G, each serves P / G members, one after the
            other, as the two of an antithetic pair, or with G = 1 all of them.
        coeffs: P numbers, or fp32 [P] on the device of y.
        rows: the number of rows of each member; their sum is N.
        bias: b, fp32 [P, m] or [G, m]: the noise of a bias, which has the same coefficient.
        add: False: y is written and not read, as if it were 0.

    Raises: as :func:`combine_`.

    Source: EGGROLL, Sarkar et al. 2025 (arXiv 2511.16652); in one batch with adapters of other members, as
    Punica, Chen et al. 2023 (arXiv 2310.18547), serves LoRA.
    """
    values = device_values("low_rank_linear_", "coeffs", coeffs, torch.float32, y.device)
    _low_rank_linear_(y, x, left, right, values, list(rows), bias, add)
