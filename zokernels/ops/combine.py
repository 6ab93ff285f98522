"""combine: theta = round(decay * theta + sum_k c_k w_k), one pass over every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import Terms, mask_bytes, row_blocks
from ..checks import check_tensors, check_terms, named_arguments, warn_of_one_noise
from .arguments import (
    NO_MASKS,
    Dist,
    Rounding,
    as_list,
    in_place,
    mask_args,
    noise_args,
    out_of_place,
    row_args,
)
from .define import TERMS, define_pair, read_by
from .plan import Columns, Plan, members


def _check_combine(op: str, groups: Mapping[str, list[Tensor]], *fields: Any) -> tuple[Any, ...]:
    terms = Terms(*fields)
    if any(groups.values()):
        check_tensors(op, groups)
    check_terms(op, "params", groups["params"], terms)
    return read_by(terms), (terms,)


_combine_, _combine = define_pair("combine", TERMS, _check_combine)


def _call(
    op: str,
    out: list[Tensor] | None,
    params: Tensor | Sequence[Tensor] | Plan,
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    streams: int | Sequence[int] | None = None,
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    mask_seed: int | Tensor | None = None,
    density: float | None = None,
    curvature: Tensor | Sequence[Tensor] | None = None,
    rows: Sequence[tuple[int, int] | None] | None = None,
) -> None:
    plan, tensors, streams, offsets, rows = members(op, params, streams, offsets, rows)
    args = (
        *noise_args(op, tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *(
            NO_MASKS
            if masks is mask_seed is density is None
            else mask_args(op, tensors, masks, mask_seed, density)
        ),
        None if curvature is None else as_list(op, "curvature", curvature),
        *((None, None) if rows is None else row_args(op, tensors, rows)),
    )
    if plan is not None:
        _run(plan, out, Terms(*args))
        return
    if out is None:
        _combine_(tensors, *args)
    else:
        _combine(out, tensors, *args)
    if rows is None:
        warn_of_one_noise(op, tensors, args[2], args[3], 4 if out is None else 5)


def _run(plan: Plan, out: list[Tensor] | None, terms: Terms) -> None:
    params = plan.params
    op, operation, lists = (
        ("combine_", _combine_, (params,)) if out is None else ("combine", _combine, (out, params))
    )
    plan.run(
        op, operation, (*lists, *terms), "combine",
        Columns(params, out, masks=terms.masks, curvature=terms.curvature), terms,
        direct=lambda kernel: kernel(lists[0], params, terms), changed=lists[:1],
    )  # fmt: skip


#: The fields of Terms that follow the rounding's seed, where there is no mask, curvature or row.
_NO_MORE = tuple(Terms._field_defaults.values())


def combine_planned(
    plan: Plan,
    out: list[Tensor] | None,
    seeds: Tensor,
    coeffs: Tensor,
    dist: Dist,
    decay: Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: Tensor | None = None,
) -> None:
    """:func:`combine_` (``out`` None) or :func:`combine` of a plan without rows, for callers in the package:
    its arguments are tensors already.
    """
    seed = None if rounding == "nearest" else rounding_seed
    # as Terms(...) makes it, without a function of Python
    fields = (seeds, coeffs, plan.streams, plan.offsets, dist, decay, seed, *_NO_MORE)
    terms: Terms = tuple.__new__(Terms, fields)
    if torch.is_grad_enabled():
        with torch.no_grad():
            _run(plan, out, terms)
    else:
        _run(plan, out, terms)


@in_place(_call)
def combine_(*args: Any, **options: Any) -> None:
    """In place, theta = round(decay * theta + sum_k coeffs[k] * z_k), for every tensor of ``params`` in one
    pass.

    The sum is a chain of fp32 fmas in the order of k, from fp32(theta) (times ``decay``), rounded once, at
    the end.

    Args:
        params: tensors of any shape, one dtype (fp32, bf16, fp16) and one device, contiguous and sharing no
            memory; or one tensor; or the :func:`plan` of some, which then has ``streams``, ``offsets`` and
            ``rows``.
        seeds: int64 [K]; z_k is the noise of seeds[k].  K = 0 is allowed.
        coeffs: fp32 [K], or [tensors, K] for coefficients of each tensor's own.  Tensors lie on the
            parameters' device, so that nothing waits for the host; Python numbers are moved there.
        streams: the stream of each tensor, in [0, 2^56) (``zokernels.stream_of(name)``).
        offsets: logical flat index of each tensor's first element in the unsharded parameter (default 0).
        dist: "normal" or "rademacher".
        decay: factor of theta before the noise is added (default none).
        rounding: "nearest" (ties to even) or "stochastic" (unbiased; fp32 is not changed by it).
        rounding_seed: seed of the rounding bits, needed for "stochastic"; it may equal a noise seed.
        masks: uint8, a bit for each element of each tensor (:func:`pack_mask`).  Where it is 0 no noise is
            added.
        mask_seed, density: a random mask in the kernel: elements whose 16-bit field of domain 3 is below
            round(65536 * density) are kept, the same ones wherever ``mask_seed`` is the same.
        curvature: positive fp32 or bf16 tensors h of the parameters' shapes: z_k becomes z_k / sqrt(h)
            (HiZOO).
        rows: of each tensor (width, length), or None for one that lies in one piece: element i has the
            logical index offset + (i // width) * length + i % width.  So [m, n] columns c .. c + w of a
            matrix are (w, n) from offset c; and the same of any tensor, with the dimensions before and from
            the split on taken together.

    Raises:
        TypeError, ValueError: naming op, argument, what was expected and what came, before anything is
            written.
        BackendUnavailable: a backend was asked for that cannot be used here.

    Source: contract zk1, docs/contract.md.  MeZO (Malladi et al., 2023) perturbs with coeffs = +-eps and
    updates with coeffs = -lr * projected gradient."""


@out_of_place(_call)
def combine(out: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
    """out = round(decay * theta + sum_k coeffs[k] * z_k): :func:`combine_` out of place; theta is only read.

    ``out`` has the shapes, dtype and device of ``params`` and shares no memory with them.  Perturbing into a
    scratch this way makes restoring exact and free."""


@named_arguments
def pack_mask(keep: Tensor, offset: int = 0, row: tuple[int, int] | None = None) -> Tensor:
    """``keep`` (bool, any shape) as the packed mask of :func:`combine_`: uint8, eight elements a byte.

    Bit (i & 7) of byte (i >> 3) - (offset >> 3) is the element with logical index i; its first element is
    ``offset``. With ``row``, an entry of ``rows``, each row has as many bytes, and its byte 0 is that of its
    own first element."""
    widths, lengths = row_args("pack_mask", [keep], [row])
    width, length = (widths[0], lengths[0]) if widths and lengths else (keep.numel(), 0)
    places = (width, length) if widths else ()
    size = mask_bytes(keep.numel(), offset, *places)
    bits = torch.zeros(8 * size, dtype=torch.uint8, device=keep.device)
    if widths:
        first = torch.arange(keep.numel() // width, device=keep.device)[:, None]
        place = first * (8 * row_blocks(offset, *places)) + (offset + first * length) % 8
        bits[place + torch.arange(width, device=keep.device)] = keep.reshape(-1, width).to(torch.uint8)
    else:
        lead = offset & 7
        bits[lead : lead + keep.numel()] = keep.reshape(-1)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
