"""Launch of the combine kernels: one for a tensor, or one for all tensors of a call through a table of pointers."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from ...contract import DISTS
from .combine import NUM_WARPS, PROGRAM, combine_kernel, combine_table_kernel
from .device import on_device

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

#: Directions up to which a kernel is compiled for their number, which then stands unrolled; more run in a loop.
UNROLLED = 2

#: enable_fp_fusion=False: a product and a sum of the contract must stay two roundings.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

#: (out address, theta address, numel, offset, stream) of one tensor
Row = tuple[int, int, int, int, int]


def _row(target: Tensor, theta: Tensor, stream: int, offset: int) -> Row:
    return target.data_ptr(), theta.data_ptr(), theta.numel(), offset, stream


def is_aligned(row: Row) -> bool:
    """Whether every block of eight lies on 16 bytes, so that whole programs move 16 bytes at a time."""
    target, theta, _, offset, _ = row
    return target % 16 == 0 and theta % 16 == 0 and offset % 8 == 0


def programs(numel: int, offset: int) -> int:
    """Programs of one tensor: the aligned spans of PROGRAM logical indices that it touches."""
    return (offset + numel - 1) // PROGRAM - offset // PROGRAM + 1


@functools.lru_cache(maxsize=128)
def _table(device: torch.device, cuda_stream: int, rows: tuple[Row, ...]) -> tuple[Tensor, Tensor]:
    """Device copy of ``rows`` with each one's first program, and the row of every program.

    Keyed on everything it holds, so that a stale one is never used, and on the stream that its copy was queued on.
    """
    counts = torch.tensor([programs(numel, offset) for _, _, numel, offset, _ in rows])
    firsts = counts.cumsum(0) - counts
    table = torch.cat((torch.tensor(rows, dtype=torch.int64), firsts[:, None]), dim=1)
    owner = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), counts)
    return table.to(device), owner.to(device)


def combine(
    out: list[Tensor],
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    device, dtype = params[0].device, params[0].dtype
    num_k = seeds.numel()
    scalars = (seeds, coeffs, num_k, decay, None if dtype is torch.float32 else rounding_seed)
    variant = {"DOMAIN": DISTS[dist], "K": num_k if num_k <= UNROLLED else None, **_OPTIONS}
    groups: dict[bool, list[tuple[Tensor, Tensor, Row]]] = {True: [], False: []}
    for target, theta, stream, offset in zip(out, params, streams, offsets, strict=True):
        if theta.numel():
            row = _row(target, theta, stream, offset)
            groups[is_aligned(row)].append((target, theta, row))
    with on_device(device):
        # A captured graph would outlive a table in the cache; the launches that tables save cost a graph nothing.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for aligned, group in groups.items():
            if len(group) > 1 and not capturing:
                cuda_stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
                table, owner = _table(device, cuda_stream, tuple(row for _, _, row in group))
                combine_table_kernel[(owner.numel(),)](
                    table, owner, *scalars, DTYPE=_DTYPES[dtype], ALIGNED=aligned, **variant
                )
            else:
                for target, theta, (_, _, numel, offset, stream) in group:
                    combine_kernel[(programs(numel, offset),)](
                        target, theta, numel, offset, stream, *scalars, ALIGNED=aligned, **variant
                    )
