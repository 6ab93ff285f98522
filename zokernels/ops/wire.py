"""encode, decode and decode_fan_out: parameters as the bytes of a wire format, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import Terms
from ..checks import check_one, check_places, check_scalars, check_tensors, check_terms, fail
from ..wire import Wire, format_of, wire_bytes
from .arguments import Dist, Rounding, as_list, device_values, noise_args, places, user_operation
from .define import NOISE, Call, define_writing


def _check_buffers(
    op: str, argument: str, buffers: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]
) -> None:
    """A wire buffer for each tensor of ``params``."""
    if len(buffers) != len(params):
        fail(op, argument, f"{len(params)} tensors, one for each parameter", len(buffers))
    form = format_of(op, wire)
    for i, (data, param) in enumerate(zip(buffers, params, strict=True)):
        size = wire_bytes(param.numel(), wire, offsets[i])
        good = data.dtype is torch.uint8 and data.dim() == 1 and data.numel() == size and data.is_contiguous()
        if not good or data.device != param.device or data.storage_offset() % form.size:
            expected = f"contiguous uint8 [{size}] on {param.device}, at a multiple of {form.size} bytes"
            fail(op, f"{argument}[{i}]", expected, f"{data.dtype} {tuple(data.shape)} on {data.device}")


def _check_encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> Call:
    format_of("encode", wire)
    if params:
        check_tensors("encode", {"params": params})
    check_places("encode", [p.numel() for p in params], [0] * len(params), offsets, "params")
    _check_buffers("encode", "out", out, params, wire, offsets)
    return Call((out, params, wire, offsets), {"out": out}, {"params": params})


_encode = define_writing(
    "encode(Tensor(a!)[] out, Tensor[] params, str wire, int[] offsets) -> ()", _check_encode
)


def _check_decode(out: list[Tensor], wires: list[Tensor], wire: str, *fields: Any) -> Call:
    terms = Terms(*fields)
    format_of("decode", wire)
    if out:
        check_tensors("decode", {"out": out})
    check_terms("decode", "out", out, terms)
    _check_buffers("decode", "wires", wires, out, wire, terms.offsets)
    if out:
        check_scalars("decode", "coeffs", terms.coeffs, torch.float32, out[0].device)
    return Call((out, wires, wire, terms), {"out": out}, {"wires": wires})


_decode = define_writing(f"decode(Tensor(a!)[] out, Tensor[] wires, str wire, {NOISE}) -> ()", _check_decode)


def _check_decode_fan_out(
    plus: list[Tensor],
    minus: list[Tensor],
    wires: list[Tensor],
    wire: str,
    seed: Tensor,
    coeff: Tensor,
    *fields: Any,
) -> Call:
    op, terms = "decode_fan_out", Terms(*fields)
    format_of(op, wire)
    if plus or minus:
        check_tensors(op, {"plus": plus, "minus": minus} if plus else {"minus": minus, "plus": plus})
    check_terms(op, "plus", plus, terms)
    _check_buffers(op, "wires", wires, plus, wire, terms.offsets)
    if plus:
        check_scalars(op, "coeffs", terms.coeffs, torch.float32, plus[0].device)
        check_one(op, "seed", seed, torch.int64, plus[0].device)
        check_one(op, "coeff", coeff, torch.float32, plus[0].device)
    args = (plus, minus, wires, wire, seed, coeff, terms)
    return Call(args, {"plus": plus, "minus": minus}, {"wires": wires})


_decode_fan_out = define_writing(
    "decode_fan_out(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] wires, str wire, Tensor seed, "
    f"Tensor coeff, {NOISE}) -> ()",
    _check_decode_fan_out,
)


@user_operation
def encode(
    out: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    wire: Wire,
    *,
    offsets: int | Sequence[int] | None = None,
) -> None:
    """out = encode(theta): parameters as the bytes of a wire format (``zokernels.wire``, docs/offload.md).

    Args:
        out: uint8, for each tensor of ``params`` a buffer of ``wire_bytes(numel, wire, offset)`` elements.
        params: as for :func:`combine_`; only read.
        wire: "bf16", "fp16", "fp8" (MXFP8 E4M3) or "int8" (MXINT8).
        offsets: logical flat index of each tensor's first element (default 0), which says where blocks of 32
            begin.

    Raises: as :func:`combine_`.  Source: OCP Microscaling Formats (MX) Specification v1.0, 2023.
    """
    buffers, tensors = as_list("encode", "out", out), as_list("encode", "params", params)
    args = buffers, tensors, wire, places("encode", 0, offsets, len(tensors))[1]
    if buffers or tensors:
        _encode(*args)
    else:
        _check_encode(*args)  # the dispatcher chooses by a tensor, and there is none


@user_operation
def decode(
    out: Tensor | Sequence[Tensor],
    wires: Tensor | Sequence[Tensor],
    wire: Wire,
    seeds: int | Sequence[int] | Tensor = (),
    coeffs: float | Sequence[float] | Tensor = (),
    *,
    streams: int | Sequence[int] | None = None,
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
) -> None:
    """out = round(decay * decode(W) + sum_k coeffs[k] * z_k): :func:`combine` of what a wire buffer holds.

    Args:
        out: tensors of fp32, bf16 or fp16; their dtype need not be the one that was encoded.
        wires: the buffers of :func:`encode`, for tensors of ``out``'s shapes and the same ``offsets``.
        seeds, coeffs, ...: as for :func:`combine_`; without them the values alone, rounded to ``out``'s
            dtype.

    Raises: as :func:`combine_`.
    """
    tensors = as_list("decode", "out", out)
    streams = [0] * len(tensors) if streams is None else streams
    _decode(
        tensors,
        as_list("decode", "wires", wires),
        wire,
        *noise_args("decode", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )


@user_operation
def decode_fan_out(
    plus: Tensor | Sequence[Tensor],
    minus: Tensor | Sequence[Tensor],
    wires: Tensor | Sequence[Tensor],
    wire: Wire,
    seed: int | Tensor,
    coeff: float | Tensor,
    *,
    seeds: int | Sequence[int] | Tensor = (),
    coeffs: float | Sequence[float] | Tensor = (),
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
    decay: float | Tensor | None = None,
    rounding: Rounding = "nearest",
    rounding_seed: int | Tensor | None = None,
) -> None:
    """plus, minus = round(theta +- coeff * z) with theta = :func:`decode` of ``wires``, not stored, in one
    pass.

    The bits are those of :func:`decode`, with the pending update of ``seeds``, ``coeffs`` and ``decay``,
    followed by two calls of :func:`combine`.  Arguments as for :func:`decode` and :func:`fan_out_`.

    Raises: as :func:`combine_`.
    """
    op = "decode_fan_out"
    tensors = as_list(op, "plus", plus)
    device = tensors[0].device if tensors else torch.device("cpu")
    _decode_fan_out(
        tensors,
        as_list(op, "minus", minus),
        as_list(op, "wires", wires),
        wire,
        device_values(op, "seed", seed, torch.int64, device),
        device_values(op, "coeff", coeff, torch.float32, device),
        *noise_args(op, tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )
