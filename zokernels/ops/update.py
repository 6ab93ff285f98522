"""update: one pass of an update rule over theta and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import (
    STATE_DTYPES,
    check_scalars,
    check_states,
    check_tensors,
    check_terms,
    fail,
)
from .arguments import Dist, Rounding, as_list, device_values, mask_args, noise_args, row_args, user_operation
from .define import MASK, NOISE, ROWS, Call, define_writing, read_by
from .plan import Columns, Plan, members

Rule = Literal["momentum", "adam", "adam_window", "sign", "hizoo"]


#: Rules of ``update_``: state tensors, values in hyper (of adam_window: those before one value for each
#: seed).
RULES = {"momentum": (1, 4), "adam": (2, 8), "adam_window": (0, 2), "sign": (0, 2), "hizoo": (1, 2)}


def _terms(*fields: Any) -> Terms:
    """The fields of the schema, which has no curvature."""
    return Terms(*fields[:10])._replace(**dict(zip(("widths", "lengths"), fields[10:], strict=False)))


def _check_update_(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, *fields: Any
) -> Call:
    terms = _terms(*fields)
    if rule not in RULES:
        fail("update_", "rule", " or ".join(map(repr, RULES)), repr(rule))
    if params:
        check_tensors("update_", {"params": params})
    check_terms("update_", "params", params, terms)
    states = RULES[rule][0]
    for i, (argument, tensors) in enumerate((("first", first), ("second", second))):
        if i < states:
            check_states("update_", argument, tensors, params, STATE_DTYPES)
        elif tensors:
            fail("update_", argument, f"no state for rule {rule!r}", f"{len(tensors)} tensors")
    if params:
        _check_hyper(rule, hyper, terms, params[0].device)
    lists = {"params": params, "first": first, "second": second}
    return Call((*lists.values(), rule, hyper, terms), lists, read_by(terms))


def _check_hyper(rule: str, hyper: Tensor, terms: Terms, device: torch.device) -> None:
    check_scalars("update_", "hyper", hyper, torch.float32, device)
    seeds, (_, values) = terms.seeds.numel(), RULES[rule]
    values += seeds if rule == "adam_window" else 0
    if hyper.numel() != values:
        fail("update_", "hyper", f"{values} values for rule {rule!r}", hyper.numel())
    if rule == "hizoo" and seeds != 1:
        fail("update_", "seeds", "one seed for rule 'hizoo'", seeds)


_update_ = define_writing(
    "update_(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, str rule, Tensor hyper, "
    f"{NOISE}, {MASK}, {ROWS}) -> ()",
    _check_update_,
)


@user_operation
def update_(
    params: Tensor | Sequence[Tensor] | Plan,
    rule: Rule,
    hyper: Sequence[float] | Tensor,
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    first: Tensor | Sequence[Tensor] = (),
    second: Tensor | Sequence[Tensor] = (),
    streams: int | Sequence[int] | None = None,
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    mask_seed: int | Tensor | None = None,
    density: float | None = None,
    rows: Sequence[tuple[int, int] | None] | None = None,
) -> None:
    """One pass of an update rule over theta and its state, from G = sum_k coeffs[k] * z_k, which is never
    stored.

    In fp32, with theta' = decay * theta, every fma rounded once, square roots and quotients to nearest:

    ===========  =================================  ==========================================================
    rule         hyper                              formula
    ===========  =================================  ==========================================================
    momentum     l2, beta, gain, lr                 g = fma(l2, theta, G);  m = fma(beta, m, gain g);
                                                    theta = fma(-lr, m, theta')
    adam         l2, beta1, gain1, beta2, gain2,    g as above;  m = fma(beta1, m, gain1 g);
                 lr, scale, eps                     v = fma(beta2, v, gain2 g g);
                                                    theta = fma(-lr, m / fma(sqrt(v), scale, eps), theta')
    adam_window  lr, eps, b_0 ... b_{K-1}           m = G;  v = sum_k b_k z_k^2 (fmas in the order of k);
                                                    theta = fma(-lr, m / (sqrt(v) + eps), theta')
    sign         l2, lr                             theta = fma(-lr, sign(fma(l2, theta, G)), theta')
    hizoo        keep, gain                         one seed;  h = fma(gain, h (z z), keep h);
                                                    theta = fma(coeffs[0], z / sqrt(h), theta')
    ===========  =================================  ==========================================================

    theta is rounded once, and so is each state; in ``theta`` the state acts as it was before that rounding.
    An element that a mask drops gets theta' and keeps its state.

    Args:
        hyper: fp32, on the parameters' device, so that a schedule never waits for the host.
        first, second: the states (m; m and v; h), fp32 or bf16 tensors of the parameters' shapes.  With
            rounding="stochastic" bf16 states are rounded so too, with bits of their own (domains 5 and 6).
        params, seeds, coeffs, streams, ...: as for :func:`combine_`.

    Raises: as :func:`combine_`.

    Sources: Adam, Kingma and Ba 2015 (scale = 1 / sqrt(1 - beta2^t), lr over 1 - beta1^t); ZO-signSGD, Liu et
    al. 2019; HiZOO, Zhao et al. 2024 (arXiv 2402.15173)."""
    plan, tensors, streams, offsets, rows = members("update_", params, streams, offsets, rows)
    device = tensors[0].device if tensors else torch.device("cpu")
    lists = tensors, as_list("update_", "first", first), as_list("update_", "second", second)
    extras = rule, device_values("update_", "hyper", hyper, torch.float32, device)
    args = (
        *noise_args(
            "update_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed
        ),
        *mask_args("update_", tensors, masks, mask_seed, density),
        *row_args("update_", tensors, rows),
    )
    if plan is None:
        _update_(*lists, *extras, *args)
        return
    terms = _terms(*args)
    plan.run(
        "update_", _update_, (*lists, *extras, *args), "update",
        Columns(tensors, first=lists[1], second=lists[2], masks=terms.masks), terms, extras,
        direct=lambda kernel: kernel(*lists, *extras, terms), changed=lists,
        check=lambda: _check_hyper(*extras, terms, device), key=(rule,),
    )  # fmt: skip
