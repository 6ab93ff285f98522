"""fan_out: a pending combine of theta, and both sides of a direction, in one read of theta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import check_one, check_scalars, check_tensors, check_terms
from .arguments import Dist, Rounding, as_list, device_values, noise_args, user_operation
from .define import NOISE, Call, define_writing
from .plan import Columns, Plan, members


def _check_fan_out_(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, *fields: Any
) -> Call:
    terms = Terms(*fields)
    if params or plus or minus:
        check_tensors("fan_out_", {"params": params, "plus": plus, "minus": minus})
    check_terms("fan_out_", "params", params, terms)
    if params:
        _check_direction(seed, coeff, terms, params[0].device)
    lists = {"params": params, "plus": plus, "minus": minus}
    return Call((*lists.values(), seed, coeff, terms), lists, {}, _changed(terms, *lists.values()))


def _check_direction(seed: Tensor, coeff: Tensor, terms: Terms, device: torch.device) -> None:
    check_scalars("fan_out_", "coeffs", terms.coeffs, torch.float32, device)
    check_one("fan_out_", "seed", seed, torch.int64, device)
    check_one("fan_out_", "coeff", coeff, torch.float32, device)


def _changed(
    terms: Terms, params: list[Tensor], plus: list[Tensor], minus: list[Tensor]
) -> list[list[Tensor]]:
    """The lists that a call writes to: theta only where an update is pending."""
    return [params if terms.seeds.numel() or terms.decay is not None else [], plus, minus]


_fan_out_ = define_writing(
    "fan_out_(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor seed, Tensor "
    f"coeff, {NOISE}) -> ()",
    _check_fan_out_,
)


@user_operation
def fan_out_(
    params: Tensor | Sequence[Tensor] | Plan,
    plus: Tensor | Sequence[Tensor],
    minus: Tensor | Sequence[Tensor],
    seed: int | Tensor,
    coeff: float | Tensor,
    *,
    seeds: int | Sequence[int] | Tensor = (),
    coeffs: float | Sequence[float] | Tensor = (),
    streams: int | Sequence[int] | None = None,
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
) -> None:
    """plus = round(theta + coeff * z), minus = round(theta - coeff * z), in one read of theta; z is
    ``seed``'s noise.

    With ``seeds`` and ``coeffs`` (or ``decay``) theta first takes a pending update, as by :func:`combine_`,
    and is written back: plus and minus start from the updated, rounded theta.  Without, theta is only read.
    The bits are those of ``combine_`` followed by two calls of :func:`combine`, with four accesses of memory
    for each element instead of six: for weights that visit the device once a step, or whose perturbed copies
    are both needed.

    Args:
        params, plus, minus: as ``params`` of :func:`combine_`, of the same shapes; none shares memory with
            another.
        seed, coeff: the direction of the two sides (int64, fp32; one element) and the size of the
            perturbation.
        seeds, coeffs, decay, rounding, rounding_seed: the pending update; its rounding.  The sides round to
            nearest.
        streams, offsets, dist: as for :func:`combine_`.

    Raises: as :func:`combine_`.
    """
    plan, tensors, streams, offsets, _ = members("fan_out_", params, streams, offsets)
    device = tensors[0].device if tensors else torch.device("cpu")
    lists = tensors, as_list("fan_out_", "plus", plus), as_list("fan_out_", "minus", minus)
    direction = (
        device_values("fan_out_", "seed", seed, torch.int64, device),
        device_values("fan_out_", "coeff", coeff, torch.float32, device),
    )
    args = noise_args(
        "fan_out_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed
    )
    if plan is None or plan.rows is not None:
        _fan_out_(*lists, *direction, *args)
        return
    terms = Terms(*args)
    plan.run(
        "fan_out_", _fan_out_, (*lists, *direction, *args), "fan_out",
        Columns(tensors, first=lists[1], second=lists[2]), terms, direction,
        direct=lambda kernel: kernel(*lists, *direction, terms), changed=_changed(terms, *lists),
        check=lambda: _check_direction(*direction, terms, device),
    )  # fmt: skip
