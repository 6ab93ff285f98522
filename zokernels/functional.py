"""The operations as users call them: typed wrappers that accept plain Python numbers.

theta is the parameter, z the noise of contract ``zk1``: a pure function of (seed, stream, logical index).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _ops
from .backends.terms import KEEP_ALL, mask_bytes, row_blocks
from .checks import fail
from .contract import SQUARE_SCALE, derive_seed_int, seed_to_int64
from .transfer import to_device
from .wire import Wire

Dist = Literal["normal", "rademacher"]
Rule = Literal["momentum", "adam", "adam_window", "sign", "hizoo"]
Rounding = Literal["nearest", "stochastic"]


def _device_values(op: str, argument: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` (a tensor, number or sequence of numbers) as a 1-D tensor on ``device``, without waiting for it."""
    if isinstance(value, Tensor):
        return value.reshape(1) if value.dim() == 0 else value
    numbers: list[Any] = list(value) if isinstance(value, (list, tuple, range)) else [value]
    kind = int if dtype is torch.int64 else (int, float)
    for number in numbers:
        if not isinstance(number, kind) or isinstance(number, bool):
            expected = "integers" if dtype is torch.int64 else "numbers"
            fail(op, argument, f"{expected} or a {dtype} tensor", repr(number), TypeError)
    if dtype is torch.int64:
        numbers = [seed_to_int64(n) for n in numbers]
    if len(numbers) == 1:  # a fill kernel: no copy from pageable memory
        return torch.full((1,), numbers[0], dtype=dtype, device=device)
    return to_device(torch.tensor(numbers, dtype=dtype), device)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _places(
    streams: int | Sequence[int], offsets: int | Sequence[int] | None, count: int
) -> tuple[list[int], list[int]]:
    stream_list = [streams] if isinstance(streams, int) else list(streams)
    offsets = [0] * count if offsets is None else offsets
    return stream_list, [offsets] if isinstance(offsets, int) else list(offsets)


def _noise_args(
    op: str,
    params: list[Tensor],
    seeds: object,
    coeffs: object,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None,
    dist: str,
    decay: object,
    rounding: str,
    rounding_seed: object,
) -> tuple[Any, ...]:
    if rounding not in ("nearest", "stochastic"):
        fail(op, "rounding", "'nearest' or 'stochastic'", repr(rounding))
    if rounding == "stochastic" and rounding_seed is None:
        fail(op, "rounding_seed", "a seed where rounding is 'stochastic'", None)
    device = params[0].device if params else torch.device("cpu")
    return (
        _device_values(op, "seeds", seeds, torch.int64, device),
        _device_values(op, "coeffs", coeffs, torch.float32, device),
        *_places(streams, offsets, len(params)),
        dist,
        None if decay is None else _device_values(op, "decay", decay, torch.float32, device),
        None if rounding == "nearest" else _device_values(op, "rounding_seed", rounding_seed, torch.int64, device),
    )


def _mask_args(
    op: str, params: list[Tensor], masks: Tensor | Sequence[Tensor] | None, mask_seed: object, density: float | None
) -> tuple[Any, ...]:
    if (mask_seed is None) != (density is None):
        fail(op, "mask_seed, density", "both or none", (mask_seed, density))
    if density is None:
        return None if masks is None else _as_list(masks), None, KEEP_ALL
    if not 0 <= density <= 1:
        fail(op, "density", "a number in [0, 1]", density)
    device = params[0].device if params else torch.device("cpu")
    seed = _device_values(op, "mask_seed", mask_seed, torch.int64, device)
    return None if masks is None else _as_list(masks), seed, round(density * KEEP_ALL)


def _row_args(
    op: str, params: list[Tensor], rows: Sequence[tuple[int, int] | None] | None
) -> tuple[list[int] | None, list[int] | None]:
    """Widths and lengths; 0 where the elements lie in one piece."""
    if rows is None:
        return None, None
    if len(rows) != len(params):
        fail(op, "rows", f"{len(params)} pairs or None, one for each tensor", len(rows))
    pairs = []
    for param, pair in zip(params, rows, strict=True):
        width, length = pair or (0, 0)
        whole = width in (length, param.numel())
        pairs.append((0, 0) if whole else (width, length))
    widths, lengths = ([pair[i] for pair in pairs] for i in (0, 1))
    return (widths, lengths) if any(widths) else (None, None)


@torch.no_grad()
def combine_(
    params: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    streams: int | Sequence[int],
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
    """In place, theta = round(decay * theta + sum_k coeffs[k] * z_k), for every tensor of ``params`` in one pass.

    The sum is a chain of fp32 fmas in the order of k, from fp32(theta) (times ``decay``), rounded once, at the end.

    Args:
        params: tensors of any shape, one dtype (fp32, bf16, fp16) and one device, contiguous and sharing no memory; or
            one tensor.
        seeds: int64 [K]; z_k is the noise of seeds[k].  K = 0 is allowed.
        coeffs: fp32 [K], or [tensors, K] for coefficients of each tensor's own.  Tensors lie on the parameters' device,
            so that nothing waits for the host; Python numbers are moved there.
        streams: the stream of each tensor, in [0, 2^56) (``zokernels.stream_of(name)``).
        offsets: logical flat index of each tensor's first element in the unsharded parameter (default 0).
        dist: "normal" or "rademacher".
        decay: factor of theta before the noise is added (default none).
        rounding: "nearest" (ties to even) or "stochastic" (unbiased; fp32 is not changed by it).
        rounding_seed: seed of the rounding bits, needed for "stochastic"; it may equal a noise seed.
        masks: uint8, a bit for each element of each tensor (:func:`pack_mask`).  Where it is 0 no noise is added.
        mask_seed, density: a random mask in the kernel: elements whose 16-bit field of domain 3 is below
            round(65536 * density) are kept, the same ones wherever ``mask_seed`` is the same.
        curvature: positive fp32 or bf16 tensors h of the parameters' shapes: z_k becomes z_k / sqrt(h) (HiZOO).
        rows: of each tensor (width, length), or None for one that lies in one piece: element i has the logical index
            offset + (i // width) * length + i % width.  So [m, n] columns c .. c + w of a matrix are (w, n) from offset
            c; and the same of any tensor, with the dimensions before and from the split on taken together.

    Raises:
        TypeError, ValueError: naming op, argument, what was expected and what came, before anything is written.
        BackendUnavailable: a backend was asked for that cannot be used here.

    Source: contract zk1, docs/contract.md.  MeZO (Malladi et al., 2023) perturbs with coeffs = +-eps and updates with
    coeffs = -lr * projected gradient.
    """
    tensors = _as_list(params)
    _ops.combine_(
        tensors,
        *_noise_args("combine_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *_mask_args("combine_", tensors, masks, mask_seed, density),
        None if curvature is None else _as_list(curvature),
        *_row_args("combine_", tensors, rows),
    )


@torch.no_grad()
def combine(
    out: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    streams: int | Sequence[int],
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
    """out = round(decay * theta + sum_k coeffs[k] * z_k): :func:`combine_` out of place; theta is only read.

    ``out`` has the shapes, dtype and device of ``params`` and shares no memory with them.  Perturbing into a scratch
    this way makes restoring exact and free.
    """
    tensors = _as_list(params)
    _ops.combine(
        _as_list(out),
        tensors,
        *_noise_args("combine", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *_mask_args("combine", tensors, masks, mask_seed, density),
        None if curvature is None else _as_list(curvature),
        *_row_args("combine", tensors, rows),
    )


@torch.no_grad()
def update_(
    params: Tensor | Sequence[Tensor],
    rule: Rule,
    hyper: Sequence[float] | Tensor,
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    first: Tensor | Sequence[Tensor] = (),
    second: Tensor | Sequence[Tensor] = (),
    streams: int | Sequence[int],
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
    r"""One pass of an update rule over theta and its state, from G = sum_k coeffs[k] * z_k, which is never stored.

    In fp32, with theta' = decay * theta, every fma rounded once, square roots and quotients to nearest:

    ===========  =================================  ===============================================================
    rule         hyper                              formula
    ===========  =================================  ===============================================================
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
    ===========  =================================  ===============================================================

    theta is rounded once, and so is each state; in ``theta`` the state acts as it was before that rounding.  An element
    that a mask drops gets theta' and keeps its state.

    Args:
        hyper: fp32, on the parameters' device, so that a schedule never waits for the host.
        first, second: the states (m; m and v; h), fp32 or bf16 tensors of the parameters' shapes.  With
            rounding="stochastic" bf16 states are rounded so too, with bits of their own (domains 5 and 6).
        params, seeds, coeffs, streams, ...: as for :func:`combine_`.

    Raises: as :func:`combine_`.

    Sources: Adam, Kingma and Ba 2015 (scale = 1 / sqrt(1 - beta2^t), lr over 1 - beta1^t); ZO-signSGD, Liu et al. 2019;
    HiZOO, Zhao et al. 2024 (arXiv 2402.15173).
    """
    tensors = _as_list(params)
    device = tensors[0].device if tensors else torch.device("cpu")
    _ops.update_(
        tensors,
        _as_list(first),
        _as_list(second),
        rule,
        _device_values("update_", "hyper", hyper, torch.float32, device),
        *_noise_args("update_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *_mask_args("update_", tensors, masks, mask_seed, density),
        *_row_args("update_", tensors, rows),
    )


def _low_rank_args(
    op: str,
    tensors: list[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    coeffs: object,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None,
    decay: object,
    rounding: str,
    rounding_seed: object,
) -> tuple[Any, ...]:
    noise = _noise_args(op, tensors, (), coeffs, streams, offsets, "normal", decay, rounding, rounding_seed)
    _, coeffs, streams, offsets, _, decay, rounding_seed = noise
    return _as_list(left), _as_list(right), coeffs, streams, offsets, decay, rounding_seed


@torch.no_grad()
def low_rank_(
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
    """theta = round(decay * theta + sum_k coeffs[k] * L_k R_k^T) for matrices; the dense products are never stored.

    An element's inner product is a chain of fp32 fmas in the order of the rank, from 0; the sum one in the order of k.

    Args:
        params: [m, ...] tensors, taken as [m, n] matrices.
        left, right: fp32 [K, m, r] and [K, n, r] for each; r may differ from tensor to tensor.
        coeffs, streams, offsets, decay, rounding, rounding_seed: as for :func:`combine_` (streams and offsets place the
            bits of stochastic rounding).

    Raises: as :func:`combine_`.

    Sources: LOZO, Chen et al. 2024 (arXiv 2410.07698); SubZero, Yu et al. 2024 (2410.08989); TeZO, Sun et al. 2025
    (2501.19057); EGGROLL, Sarkar et al. 2025 (2511.16652).
    """
    tensors = _as_list(params)
    _ops.low_rank_(
        tensors,
        *_low_rank_args("low_rank_", tensors, left, right, coeffs, streams, offsets, decay, rounding, rounding_seed),
    )


@torch.no_grad()
def low_rank(
    out: Tensor | Sequence[Tensor],
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
    """:func:`low_rank_` out of place; theta is only read."""
    tensors = _as_list(params)
    _ops.low_rank(
        _as_list(out),
        tensors,
        *_low_rank_args("low_rank", tensors, left, right, coeffs, streams, offsets, decay, rounding, rounding_seed),
    )


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
    tensors = _as_list(params)
    _ops.requantize_(
        tensors,
        low,
        high,
        *_noise_args("requantize_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *_mask_args("requantize_", tensors, masks, mask_seed, density),
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
    tensors = _as_list(params)
    _ops.requantize(
        _as_list(out),
        tensors,
        low,
        high,
        *_noise_args("requantize", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
        *_mask_args("requantize", tensors, masks, mask_seed, density),
    )


@torch.no_grad()
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
    """out[k] = round(x + coeffs[k] * z_k) for every k, in one read of x: queries of a black box, or candidates.

    ``out`` is a contiguous tensor of shape [K, *x.shape], of x's dtype and device; seeds and coeffs have K values.

    Raises: as :func:`combine_`.  Source: ZO-AE-DS, Zhang et al. 2022 (arXiv 2203.14195).
    """
    _ops.spread(
        out,
        x,
        _device_values("spread", "seeds", seeds, torch.int64, x.device),
        _device_values("spread", "coeffs", coeffs, torch.float32, x.device),
        stream,
        offset,
        dist,
    )


def pack_mask(keep: Tensor, offset: int = 0, row: tuple[int, int] | None = None) -> Tensor:
    """``keep`` (bool, any shape) as the packed mask of :func:`combine_`: uint8, eight elements a byte.

    Bit (i & 7) of byte (i >> 3) - (offset >> 3) is the element with logical index i; its first element is ``offset``.
    With ``row``, an entry of ``rows``, each row has as many bytes, and its byte 0 is that of its own first element.
    """
    widths, lengths = _row_args("pack_mask", [keep], [row])
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


@torch.no_grad()
def fan_out_(
    params: Tensor | Sequence[Tensor],
    plus: Tensor | Sequence[Tensor],
    minus: Tensor | Sequence[Tensor],
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
    """plus = round(theta + coeff * z), minus = round(theta - coeff * z), in one read of theta; z is ``seed``'s noise.

    With ``seeds`` and ``coeffs`` (or ``decay``) theta first takes a pending update, as by :func:`combine_`, and is
    written back: plus and minus start from the updated, rounded theta.  Without, theta is only read.  The bits are
    those of ``combine_`` followed by two calls of :func:`combine`, with four accesses of memory for each element
    instead of six: for weights that visit the device once a step, or whose perturbed copies are both needed.

    Args:
        params, plus, minus: as ``params`` of :func:`combine_`, of the same shapes; none shares memory with another.
        seed, coeff: the direction of the two sides (int64, fp32; one element) and the size of the perturbation.
        seeds, coeffs, decay, rounding, rounding_seed: the pending update; its rounding.  The sides round to nearest.
        streams, offsets, dist: as for :func:`combine_`.

    Raises: as :func:`combine_`.
    """
    tensors = _as_list(params)
    device = tensors[0].device if tensors else torch.device("cpu")
    _ops.fan_out_(
        tensors,
        _as_list(plus),
        _as_list(minus),
        _device_values("fan_out_", "seed", seed, torch.int64, device),
        _device_values("fan_out_", "coeff", coeff, torch.float32, device),
        *_noise_args("fan_out_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )


@torch.no_grad()
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
        offsets: logical flat index of each tensor's first element (default 0), which says where blocks of 32 begin.

    Raises: as :func:`combine_`.  Source: OCP Microscaling Formats (MX) Specification v1.0, 2023.
    """
    tensors = _as_list(params)
    _ops.encode(_as_list(out), tensors, wire, _places(0, offsets, len(tensors))[1])


@torch.no_grad()
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
        seeds, coeffs, ...: as for :func:`combine_`; without them the values alone, rounded to ``out``'s dtype.

    Raises: as :func:`combine_`.
    """
    tensors = _as_list(out)
    streams = [0] * len(tensors) if streams is None else streams
    _ops.decode(
        tensors,
        _as_list(wires),
        wire,
        *_noise_args("decode", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )


@torch.no_grad()
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
    """plus, minus = round(theta +- coeff * z) with theta = :func:`decode` of ``wires``, not stored, in one pass.

    The bits are those of :func:`decode`, with the pending update of ``seeds``, ``coeffs`` and ``decay``, followed by
    two calls of :func:`combine`.  Arguments as for :func:`decode` and :func:`fan_out_`.

    Raises: as :func:`combine_`.
    """
    op, tensors = "decode_fan_out", _as_list(plus)
    device = tensors[0].device if tensors else torch.device("cpu")
    _ops.decode_fan_out(
        tensors,
        _as_list(minus),
        _as_list(wires),
        wire,
        _device_values(op, "seed", seed, torch.int64, device),
        _device_values(op, "coeff", coeff, torch.float32, device),
        *_noise_args(op, tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )


def noise(
    shape: int | Sequence[int],
    *,
    seed: int | Tensor,
    stream: int = 0,
    offset: int = 0,
    dist: Dist = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    """z[offset : offset + numel] of (``seed``, ``stream``) as a fp32 tensor of ``shape``.

    "normal" is standard normal (|z| <= 6.556), "rademacher" is +1 or -1.  For tests, baselines and a look: training
    never materialises z.  ``device`` defaults to the seed's where it is a tensor, else to torch's default device.
    """
    if isinstance(seed, Tensor):
        seed_tensor = seed if device is None else seed.to(device)
    else:
        target = torch.get_default_device() if device is None else torch.device(device)
        seed_tensor = _device_values("noise", "seed", seed, torch.int64, target)
    z: Tensor = _ops.noise((shape,) if isinstance(shape, int) else tuple(shape), seed_tensor, stream, offset, dist)
    return z


def squared_norm(
    seeds: int | Sequence[int] | Tensor,
    sizes: Sequence[int],
    *,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    dist: Dist = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    """|z_k|^2 of each seed over tensors of ``sizes`` elements, float64 [K], for directions on a sphere.

    Every square (fp32) is rounded to a multiple of 2^-20 and summed as an integer, so no order of summation, shard or
    device changes a bit; the sum fits for 2^42 elements.  Rounding costs about sqrt(n) * 2^-22 in n elements.
    """
    if not isinstance(seeds, Tensor):
        target = torch.get_default_device() if device is None else torch.device(device)
        seeds = _device_values("squares", "seeds", seeds, torch.int64, target)
    places = _places(streams, offsets, len(sizes))
    sums: Tensor = _ops.squares(seeds.reshape(-1), list(sizes), *places, dist)
    return sums.double() / SQUARE_SCALE


@torch.no_grad()
def project(
    tensors: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    *,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None = None,
    dist: Dist = "normal",
) -> Tensor:
    """p_k = sum over ``tensors`` of <x, z_k>, float64 [K]: the adjoint of :func:`combine_`, in one read of the tensors.

    The sum has one order (docs/contract.md), so its bits are the same on every backend, instruction set, number of
    threads and device: chains of eight fp32 fmas, summed in float64.  Its error is near 1e-7 |x|; that of the
    products alone, fp32 but for Rademacher noise, where they are exact.

    Args:
        tensors: as ``params`` of :func:`combine_`; they are read, and may share memory.  For the adjoint of a masked
            combine, multiply them by the mask before.
        seeds: int64 [K]; z_k is the noise of seeds[k].  K = 0 is allowed.
        streams, offsets, dist: as for :func:`combine_`.  Tiles of 4096 logical indices are summed first: the sum of
            shards is that of the whole up to float64 rounding, and to the bit where shards are each other's neighbours
            in the tree of tiles (halves, quarters, ... of a tensor of 4096 * 2^m elements).

    Raises: as :func:`combine_`.
    """
    listed = _as_list(tensors)
    device = listed[0].device if listed else seeds.device if isinstance(seeds, Tensor) else torch.device("cpu")
    seeds = _device_values("project", "seeds", seeds, torch.int64, device)
    sums: Tensor = _ops.project(listed, seeds, *_places(streams, offsets, len(listed)), dist)
    return sums


@overload
def derive_seed(run_seed: int, step: int, k: int = 0) -> int: ...
@overload
def derive_seed(run_seed: Tensor, step: int | Tensor, k: int | Tensor = 0) -> Tensor: ...
@overload
def derive_seed(run_seed: int, step: Tensor, k: int | Tensor = 0) -> Tensor: ...
@overload
def derive_seed(run_seed: int, step: int, k: Tensor) -> Tensor: ...
def derive_seed(run_seed: int | Tensor, step: int | Tensor, k: int | Tensor = 0) -> int | Tensor:
    """Seed of direction ``k`` at ``step`` of a run: Philox(key = run_seed, counter = (step_lo, step_hi, k, 0)).

    Python integers give an integer in [0, 2^64).  Where any argument is an int64 tensor, the arguments broadcast and
    the result is an int64 tensor with the same bits, computed on the device.
    """
    if not (isinstance(run_seed, Tensor) or isinstance(step, Tensor) or isinstance(k, Tensor)):
        return derive_seed_int(run_seed, step, k)
    device = next(v.device for v in (run_seed, step, k) if isinstance(v, Tensor))

    def as_tensor(v: int | Tensor) -> Tensor:
        return v if isinstance(v, Tensor) else torch.full((), seed_to_int64(v), dtype=torch.int64, device=device)

    seeds: Tensor = _ops.derive_seed(as_tensor(run_seed), as_tensor(step), as_tensor(k))
    return seeds
