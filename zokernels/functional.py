"""The operations as users call them: typed wrappers that accept plain Python numbers.

theta is the parameter, z the noise of contract ``zk1``: a pure function of (seed, stream, logical index).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _ops
from .checks import fail
from .contract import derive_seed_int, seed_to_int64

Dist = Literal["normal", "rademacher"]
Rounding = Literal["nearest", "stochastic"]


def _device_values(op: str, argument: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` (a tensor, number or sequence of numbers) as a 1-D tensor on ``device``, without waiting for it."""
    if isinstance(value, Tensor):
        return value.reshape(1) if value.dim() == 0 else value
    numbers = list(value) if isinstance(value, (list, tuple, range)) else [value]
    kind = int if dtype is torch.int64 else (int, float)
    for number in numbers:
        if not isinstance(number, kind) or isinstance(number, bool):
            expected = "integers" if dtype is torch.int64 else "numbers"
            fail(op, argument, f"{expected} or a {dtype} tensor", repr(number), TypeError)
    if dtype is torch.int64:
        numbers = [seed_to_int64(n) for n in numbers]
    if len(numbers) == 1:  # a fill kernel: no copy from pageable memory
        return torch.full((1,), numbers[0], dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _combine_args(
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
) -> tuple:
    if rounding not in ("nearest", "stochastic"):
        fail(op, "rounding", "'nearest' or 'stochastic'", repr(rounding))
    if rounding == "stochastic" and rounding_seed is None:
        fail(op, "rounding_seed", "a seed where rounding is 'stochastic'", None)
    device = params[0].device if params else torch.device("cpu")
    stream_list = [streams] if isinstance(streams, int) else list(streams)
    offsets = [0] * len(params) if offsets is None else offsets
    offset_list = [offsets] if isinstance(offsets, int) else list(offsets)
    return (
        _device_values(op, "seeds", seeds, torch.int64, device),
        _device_values(op, "coeffs", coeffs, torch.float32, device),
        stream_list,
        offset_list,
        dist,
        None if decay is None else _device_values(op, "decay", decay, torch.float32, device),
        None if rounding == "nearest" else _device_values(op, "rounding_seed", rounding_seed, torch.int64, device),
    )


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
) -> None:
    """In place, theta = round(decay * theta + sum_k coeffs[k] * z_k), for every tensor of ``params`` in one pass.

    The sum is a chain of fp32 fmas in the order of k, from fp32(theta) (times ``decay``), rounded once, at the end.

    Args:
        params: tensors of any shape, one dtype (fp32, bf16, fp16) and one device, contiguous and sharing no memory; or
            one tensor.
        seeds: int64 [K]; z_k is the noise of seeds[k].  K = 0 is allowed.
        coeffs: fp32 [K].  Tensors lie on the parameters' device, so that nothing waits for the host; Python numbers are
            moved there.
        streams: the 32-bit stream id of each tensor (``zokernels.stream_of(name)``).
        offsets: logical flat index of each tensor's first element in the unsharded parameter (default 0).
        dist: "normal" or "rademacher".
        decay: factor of theta before the noise is added (default none).
        rounding: "nearest" (ties to even) or "stochastic" (unbiased; fp32 is not changed by it).
        rounding_seed: seed of the rounding bits, needed for "stochastic"; it may equal a noise seed.

    Raises:
        TypeError, ValueError: naming op, argument, what was expected and what came, before anything is written.
        BackendUnavailable: a backend was asked for that cannot be used here.

    Source: contract zk1, docs/contract.md.  MeZO (Malladi et al., 2023) perturbs with coeffs = +-eps and updates with
    coeffs = -lr * projected gradient.
    """
    tensors = _as_list(params)
    _ops.combine_(
        tensors,
        *_combine_args("combine_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
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
) -> None:
    """out = round(decay * theta + sum_k coeffs[k] * z_k): :func:`combine_` out of place; theta is only read.

    ``out`` has the shapes, dtype and device of ``params`` and shares no memory with them.  Perturbing into a scratch
    this way makes restoring exact and free.
    """
    tensors = _as_list(params)
    _ops.combine(
        _as_list(out),
        tensors,
        *_combine_args("combine", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
    )


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
        *_combine_args("fan_out_", tensors, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed),
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
    return _ops.noise((shape,) if isinstance(shape, int) else tuple(shape), seed_tensor, stream, offset, dist)


@overload
def derive_seed(run_seed: int, step: int, k: int = 0) -> int: ...
@overload
def derive_seed(run_seed: Tensor, step: int | Tensor, k: int | Tensor = 0) -> Tensor: ...
def derive_seed(run_seed, step, k=0):
    """Seed of direction ``k`` at ``step`` of a run: Philox(key = run_seed, counter = (step_lo, step_hi, k, 0)).

    Python integers give an integer in [0, 2^64).  Where any argument is an int64 tensor, the arguments broadcast and
    the result is an int64 tensor with the same bits, computed on the device.
    """
    tensors = [v for v in (run_seed, step, k) if isinstance(v, Tensor)]
    if not tensors:
        return derive_seed_int(run_seed, step, k)
    device = tensors[0].device
    as_tensor = lambda v: (
        v if isinstance(v, Tensor) else torch.full((), seed_to_int64(v), dtype=torch.int64, device=device)
    )
    return _ops.derive_seed(as_tensor(run_seed), as_tensor(step), as_tensor(k))
