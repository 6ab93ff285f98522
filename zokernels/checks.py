"""Checks that run before anything is written.  One message shape: ``op: argument: expected ..., got ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .contract import DISTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def check_dist(op: str, dist: str) -> None:
    if dist not in DISTS:
        fail(op, "dist", " or ".join(repr(d) for d in DISTS), repr(dist))


def check_stream(op: str, argument: str, stream: int) -> None:
    if not 0 <= stream < 2**32:
        fail(op, argument, "an integer in [0, 2^32)", stream)


def check_offset(op: str, argument: str, offset: int, numel: int) -> None:
    if not 0 <= offset <= 2**63 - 1 - numel:
        fail(op, argument, f"0 <= offset and offset + {numel} elements < 2^63", offset)


def _check_scalars(op: str, argument: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if value.dtype is not dtype:
        fail(op, argument, f"dtype {dtype}", value.dtype, TypeError)
    if value.dim() != 1 or not value.is_contiguous():
        fail(op, argument, "a contiguous 1-D tensor", f"shape {tuple(value.shape)}, strides {value.stride()}")
    if value.device != device:
        fail(op, argument, f"the parameters' device {device}", value.device)


def check_one(op: str, argument: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    _check_scalars(op, argument, value, dtype, device)
    if value.numel() != 1:
        fail(op, argument, "one value", value.numel())


def _is_flat(t: Tensor) -> bool:
    return t.is_contiguous() and t.layout is torch.strided


def _find_fault(op: str, groups: dict[str, Sequence[Tensor]]) -> None:
    """Raises for the first tensor that does not go with the first one of all."""
    (leader, params), *_ = groups.items()
    device, dtype = params[0].device, params[0].dtype
    for argument, tensors in groups.items():
        if len(tensors) != len(params):
            fail(op, argument, f"{len(params)} tensors, as in {leader}", len(tensors))
        for i, tensor in enumerate(tensors):
            name, shape = f"{argument}[{i}]", tuple(params[i].shape)
            if tensor.dtype not in DTYPES:
                fail(op, name, "dtype float32, bfloat16 or float16", tensor.dtype, TypeError)
            if tensor.dtype is not dtype:
                fail(op, name, f"dtype {dtype}, as {leader}[0]", tensor.dtype, TypeError)
            if tensor.device != device:
                fail(op, name, f"device {device}, as {leader}[0]", tensor.device)
            if tensor.layout is not torch.strided:
                fail(op, name, "a contiguous tensor", tensor.layout)
            if not tensor.is_contiguous():
                fail(op, name, "a contiguous tensor", f"shape {tuple(tensor.shape)}, strides {tensor.stride()}")
            if tuple(tensor.shape) != shape:
                fail(op, name, f"shape {shape}, as {leader}[{i}]", tuple(tensor.shape))


def check_combine(
    op: str,
    groups: dict[str, Sequence[Tensor]],
    seeds: Tensor,
    coeffs: Tensor,
    streams: Sequence[int],
    offsets: Sequence[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    """Everything about a combine call that needs no data pointer; ``groups``: tensor lists by argument name."""
    check_dist(op, dist)
    (leader, params), *others = groups.items()
    if not params:
        return
    device, dtype = params[0].device, params[0].dtype
    good = dtype in DTYPES and all(len(tensors) == len(params) for tensors in groups.values())
    for tensors in groups.values():
        # One test a tensor where all is well: a list of 400 costs a quarter of what looking for the fault would.
        good = good and all(t.dtype is dtype and t.device == device and _is_flat(t) for t in tensors)
    for _, tensors in others:
        good = good and all(t.shape == p.shape for t, p in zip(tensors, params, strict=True))
    if not good:
        _find_fault(op, groups)
    for argument, values in (("streams", streams), ("offsets", offsets)):
        if len(values) != len(params):
            fail(op, argument, f"{len(params)} integers, one for each tensor of {leader}", len(values))
    if not all(0 <= s < 2**32 for s in streams):
        for i, stream in enumerate(streams):
            check_stream(op, f"streams[{i}]", stream)
    if any(offsets):  # 0 is right for every tensor
        for i, tensor in enumerate(params):
            check_offset(op, f"offsets[{i}]", offsets[i], tensor.numel())
    _check_scalars(op, "seeds", seeds, torch.int64, device)
    _check_scalars(op, "coeffs", coeffs, torch.float32, device)
    if seeds.numel() != coeffs.numel():
        fail(op, "coeffs", f"{seeds.numel()} values, one for each seed", coeffs.numel())
    for argument, value, kind in (("decay", decay, torch.float32), ("rounding_seed", rounding_seed, torch.int64)):
        if value is not None:
            check_one(op, argument, value, kind, device)


def check_overlap(op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]]) -> None:
    """No written tensor shares memory with another tensor of the call (two read ones may)."""
    spans = []
    for writes, groups in ((True, written), (False, read)):
        for argument, tensors in groups.items():
            for i, t in enumerate(tensors):
                if n := t.nbytes:
                    begin = t.data_ptr()
                    spans.append((begin, begin + n, argument, i, writes))
    spans.sort()
    # Sorted by begin, a span overlaps an earlier one iff it begins before the furthest end so far: of all spans where
    # it is written itself, of the written ones where it is only read.
    furthest = furthest_written = (0, 0, "", 0, False)
    for span in spans:
        begin, end, argument, i, writes = span
        other = furthest if writes else furthest_written
        if begin < other[1]:
            got = f"overlap with {other[2]}[{other[3]}]"
            fail(op, f"{argument}[{i}]", "tensors that share no memory within one call", got)
        if end > furthest[1]:
            furthest = span
        if writes and end > furthest_written[1]:
            furthest_written = span
