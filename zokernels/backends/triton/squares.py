"""squares in Triton: the sum of rint(z^2 * 2^20): integers, so that any order gives the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import DOMAIN_NORMAL, SQUARE_SCALE
from ..registry import implements
from ..terms import Terms
from .launch import jobs, launch
from .noise import normal8
from .rounding import rint
from .table import row_of
from .tile import THREADS, draw, edges, mantissa, span_of, tabled_span

_NORMAL, _SCALE = tl.constexpr(DOMAIN_NORMAL), tl.constexpr(SQUARE_SCALE)


@triton.jit
def _program(span, numel, seeds, num_k, total):
    begin, end = edges(span, numel)
    for k in range(num_k):
        seed = tl.load(seeds + k)
        sums = tl.zeros((THREADS,), tl.int64)
        for first in range(begin // (8 * THREADS) * THREADS, (end + 7) // 8, THREADS):
            row = first + tl.arange(0, THREADS)
            w0, w1, w2, w3 = draw(seed, row, span, _NORMAL)
            z = normal8(w0, w1, w2, w3, mantissa(num_k))
            eight = tl.zeros((THREADS,), tl.int32)  # int32 holds eight squares of at most 43 * 2^20
            for i in tl.static_range(8):
                inside = (8 * row + i >= begin) & (8 * row + i < end)
                eight += tl.where(inside, rint(z[i] * z[i] * _SCALE).to(tl.int32), 0)
            sums += eight.to(tl.int64)
        tl.atomic_add(total + k, tl.sum(sums, 0), sem="relaxed")


@triton.jit(do_not_specialize=["numel", "offset", "stream", "num_k"])
def squares_kernel(numel: tl.int64, offset: tl.int64, stream: tl.int64, seeds, num_k: tl.int32, total):
    """squares of one tensor."""
    _program(span_of(offset, stream, None, tl.program_id(0).to(tl.int64)), numel, seeds, num_k, total)


@triton.jit(do_not_specialize=["num_k"])
def squares_table_kernel(table, owner, seeds, num_k: tl.int32, total, WIDTH: tl.constexpr):
    """squares of the tensors in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    numel, span = tabled_span(row, None, pid)
    _program(span, numel, seeds, num_k, total)


@implements
def squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    if dist == "rademacher":
        return torch.full_like(seeds, sum(sizes) * int(SQUARE_SCALE))
    total = torch.zeros_like(seeds)
    found = jobs((), sizes, Terms(seeds, seeds, streams, offsets, dist, None, None))
    found = [job._replace(aligned=None) for job in found]
    args = {"seeds": seeds, "num_k": seeds.numel(), "total": total}
    launch(seeds.device, (squares_kernel, squares_table_kernel), found, args)
    return total
