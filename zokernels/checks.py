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
    for argument, tensors in groups.items():
        if len(tensors) != len(params):
            fail(op, argument, f"{len(params)} tensors, as in {leader}", len(tensors))
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in DTYPES:
                fail(op, f"{argument}[{i}]", "dtype float32, bfloat16 or float16", tensor.dtype, TypeError)
            if tensor.dtype is not dtype:
                fail(op, f"{argument}[{i}]", f"dtype {dtype}, as {leader}[0]", tensor.dtype, TypeError)
            if tensor.device != device:
                fail(op, f"{argument}[{i}]", f"device {device}, as {leader}[0]", tensor.device)
            if tensor.layout is not torch.strided or not tensor.is_contiguous():
                got = f"strides {tensor.stride()}" if tensor.layout is torch.strided else tensor.layout
                fail(op, f"{argument}[{i}]", "a contiguous tensor", f"shape {tuple(tensor.shape)}, {got}")
    for argument, tensors in others:
        for i, tensor in enumerate(tensors):
            if tensor.shape != params[i].shape:
                fail(op, f"{argument}[{i}]", f"shape {tuple(params[i].shape)}, as {leader}[{i}]", tuple(tensor.shape))
    for argument, values in (("streams", streams), ("offsets", offsets)):
        if len(values) != len(params):
            fail(op, argument, f"{len(params)} integers, one for each tensor of {leader}", len(values))
    for i, tensor in enumerate(params):
        check_stream(op, f"streams[{i}]", streams[i])
        check_offset(op, f"offsets[{i}]", offsets[i], tensor.numel())
    _check_scalars(op, "seeds", seeds, torch.int64, device)
    _check_scalars(op, "coeffs", coeffs, torch.float32, device)
    if seeds.numel() != coeffs.numel():
        fail(op, "coeffs", f"{seeds.numel()} values, one for each seed", coeffs.numel())
    for argument, value, kind in (("decay", decay, torch.float32), ("rounding_seed", rounding_seed, torch.int64)):
        if value is not None:
            _check_scalars(op, argument, value, kind, device)
            if value.numel() != 1:
                fail(op, argument, "one value", value.numel())


def check_overlap(op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]]) -> None:
    """No written tensor shares memory with another tensor of the call (two read ones may)."""
    spans = []
    for writes, groups in ((True, written), (False, read)):
        for argument, tensors in groups.items():
            for i, t in enumerate(tensors):
                if n := t.numel():
                    begin = t.data_ptr()
                    spans.append((begin, begin + n * t.element_size(), argument, i, writes))
    spans.sort()
    # Sorted by begin, an overlap exists iff one exists with the span that reaches furthest so far, taken once among
    # all spans and once among the written ones.
    furthest: tuple | None = None
    furthest_written: tuple | None = None
    for span in spans:
        begin, end, argument, i, writes = span
        other = furthest if writes else furthest_written
        if other is not None and begin < other[1]:
            _, _, theirs, j, _ = other
            fail(op, f"{argument}[{i}]", "tensors that share no memory within one call", f"overlap with {theirs}[{j}]")
        if furthest is None or end > furthest[1]:
            furthest = span
        if writes and (furthest_written is None or end > furthest_written[1]):
            furthest_written = span
