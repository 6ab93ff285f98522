"""requantize: combine over int8, rounded to an integer and clamped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.terms import Terms, mask_bytes
from ..checks import check_overlap, check_tensors, check_terms, fail
from .arguments import Dist, Rounding, as_list, in_place, mask_args, noise_args, out_of_place
from .define import MASK, NOISE, define_pair, read_by

#: Bytes of packed integers that are taken apart at a time: their integers stay in a CPU's caches.
_PIECE = 1 << 18


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [..., n] with values in [-8, 7] as uint8 [..., (n + 1) / 2], two a byte, the first in the low
    half.
    """
    even, odd = integers[..., ::2] & 15, F.pad(integers, (0, integers.shape[-1] & 1))[..., 1::2] & 15
    return even.view(torch.uint8) | odd.view(torch.uint8) << 4


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """The int8 [..., n] of :func:`pack_int4`."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]
    return (halves.view(torch.int8) ^ 8) - 8  # bit 3 is the sign


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
    tensors = as_list(op, "params", params)
    noise = noise_args(op, tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed)
    mask = mask_args(op, tensors, masks, mask_seed, density)
    if any(t.dtype is torch.uint8 for t in tensors):
        _in_pieces(op, tensors if out is None else out, tensors, low, high, Terms(*noise, *mask))
        return
    args = tensors, low, high, *noise, *mask
    _requantize_(*args) if out is None else _requantize(out, *args)


def _in_pieces(op: str, out: list[Tensor], params: list[Tensor], low: int, high: int, terms: Terms) -> None:
    """The operation on packed integers: a piece after the other is unpacked, changed and packed again."""
    written = {"params": params} if out is params else {"out": out}
    check_tensors(op, {"params": params} | written, (torch.uint8,))
    if not torch.compiler.is_compiling():  # which knows no addresses
        check_overlap(op, written, ({} if out is params else {"params": params}) | read_by(terms))
    if not -8 <= low < high <= 7:
        fail(op, "low, high", "-8 <= low < high <= 7 of packed integers", (low, high))
    # Views of two elements a byte: what the checks and masks count are integers.
    check_terms(op, "params", [p.view(-1, 1).expand(-1, 2) for p in params], terms)
    for i, (into, theta) in enumerate(zip(out, params, strict=True)):
        coeffs = terms.coeffs[i : i + 1] if terms.coeffs.dim() == 2 else terms.coeffs
        into, theta, begin = into.detach().view(-1), theta.detach().view(-1), terms.offsets[i]
        for at in range(0, theta.numel(), _PIECE):
            integers = unpack_int4(theta[at : at + _PIECE], 2 * len(theta[at : at + _PIECE]))
            offset, masks = begin + 2 * at, None
            if terms.masks:
                first, count = (offset >> 3) - (begin >> 3), mask_bytes(integers.numel(), offset)
                masks = [terms.masks[i].view(-1)[first : first + count]]
            places = [terms.streams[i]], [offset]
            rest = terms.dist, terms.decay, terms.rounding_seed, masks, terms.mask_seed, terms.mask_keep
            _requantize_([integers], low, high, terms.seeds, coeffs, *places, *rest)
            into[at : at + _PIECE] = pack_int4(integers)


@in_place(_call)
def requantize_(*args: Any, **options: Any) -> None:
    """:func:`combine_` over int8: q = clamp(round(decay * q + sum_k coeffs[k] * z_k), low, high).

    Coefficients are in quantisation steps; a row for each tensor (fp32 [tensors, K]) gives each its own
    scale. "stochastic" is floor(acc + u / 65536) with the 16-bit field u of domain 4, so that q moves by the
    coefficients on average; "nearest" has ties to even.  NaN becomes ``low``.

    uint8 tensors are packed integers of 4 bits, two a byte (:func:`~zokernels.quantize.pack_int4`), of which
    element i is in byte i / 2; ``low`` and ``high`` then lie in [-8, 7].  They get the bits that their
    integers would have in int8.  They are unpacked, changed and packed again in pieces, whose int8 integers
    are the only extra memory (512 kB).

    Source: QuZO, Zhou et al. 2025 (arXiv 2502.12346).
    """


@out_of_place(_call)
def requantize(out: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
    """:func:`requantize_` out of place; the weights are only read."""
