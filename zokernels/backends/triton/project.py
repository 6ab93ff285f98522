"""project: inner products of tensors with noise, in the order of docs/contract.md, in Triton.

A tile of 4096 elements is 32 segments of 16 blocks of eight.  Eight threads share a tile.  A thread has the
even or the odd segments, and of each of them the blocks c, c + 4, c + 8 and c + 12, along which it makes four
chains of fmas, one for each pair of columns.  So no chain needs a value of another thread, and each thread
writes one partial sum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import DISTS, DOMAIN_NORMAL
from ..registry import implements
from ..sums import TILE, tiles
from .arithmetic import fma
from .device import on_device
from .launch import dtypes, options
from .noise import normal8
from .table import pointer, table_of
from .tile import THREADS, Span, draw, draw_rademacher, edges, load, mantissa

#: Threads that share a tile, and so the partial sums of a tile.
COLUMNS = 8
#: Tiles of a program, and its logical indices.
_TILES = THREADS.value // COLUMNS
_PROGRAM = tl.constexpr(_TILES * TILE)
_PROGRAM_SHIFT = tl.constexpr((_TILES * TILE).bit_length() - 1)
_COLUMNS, _NORMAL = tl.constexpr(COLUMNS), tl.constexpr(DOMAIN_NORMAL)


@triton.jit
def _halves(x):
    """The even and the odd columns of [B, 8], each as [B, 4]."""
    return x.reshape(x.shape[0], 4, 2).split()


@triton.jit
def _join4(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4)


@triton.jit
def _normals(seed, row, span, normals):
    w0, w1, w2, w3 = draw(seed, row, span, _NORMAL)
    z0, z1, z2, z3, z4, z5, z6, z7 = normal8(w0, w1, w2, w3, normals)
    return _join4(z0, z2, z4, z6), _join4(z1, z3, z5, z7)


@triton.jit
def _signed(x, words, byte):
    """x z for Rademacher noise, exactly: x with its sign flipped where the block's ``byte`` says so."""
    low, high = tl.where((byte & 4) != 0, words[1], words[0]), tl.where((byte & 4) != 0, words[3], words[2])
    word = tl.where(byte >= 8, high, low) >> (8 * (byte & 3))
    flip = (word[:, None] << (31 - tl.arange(0, 8))[None, :].to(tl.uint32)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _load(x, row, span, numel, WHOLE: tl.constexpr):
    if WHOLE:
        return load(x, row, None, span)
    elif x.dtype.element_ty == tl.float32:
        # Halves of a block are loaded apart, as ``load`` does it for whole programs.  A thread then has whole
        # rows, and the kernel needs no more registers than there are.
        begin, stop = edges(span, numel, _PROGRAM)
        at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
        low = tl.load(x + span.start + at, mask=(at >= begin) & (at < stop), other=0.0)
        at += 4
        high = tl.load(x + span.start + at, mask=(at >= begin) & (at < stop), other=0.0)
        return tl.join(low, high).permute(0, 2, 1).reshape(row.shape[0], 8)
    else:
        begin, stop = edges(span, numel, _PROGRAM)
        at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = (at >= begin) & (at < stop)
        return tl.where(inside, load(x, row, inside, span), 0.0)


@triton.jit
def _segments(span, numel, WHOLE: tl.constexpr):
    """The pairs of segments to go through: all, or those that a tensor inside of one tile touches."""
    if WHOLE:
        return 0, 16
    else:
        first, stop = edges(span, numel, _PROGRAM)
        last = stop - 1
        one = (first >> 12) == (last >> 12)
        return tl.where(one, (first & 4095) >> 8, 0), tl.where(one, ((last & 4095) >> 8) + 1, 16)


@triton.jit
def _sums(tensor, numel, span, seed, normals, WHOLE: tl.constexpr):
    """The partial sum of each thread, float64 [THREADS]."""
    lane = tl.arange(0, THREADS)
    first = (lane >> 3) * 512 + ((lane >> 2) & 1) * 16 + (lane & 3)  # block of the first segment and row
    signs = ()
    if len(normals) == 0:
        block = (lane >> 3) * 32 + ((lane >> 2) & 1) * 16 + (lane & 3)
        for r in tl.static_range(4):
            signs += (draw_rademacher(seed, block + 4 * r, span),)
    total = tl.zeros((THREADS, 4), tl.float64)
    begin, stop = _segments(span, numel, WHOLE)
    for segment in range(begin, stop):
        chain = tl.zeros((THREADS, 4), tl.float32)
        for r in tl.static_range(4):
            row = first + 32 * segment + 4 * r
            x = _load(tensor, row, span, numel, WHOLE)
            if len(normals) == 1:
                even, odd = _normals(seed, row, span, normals[0])
                x_even, x_odd = _halves(x)
                chain = fma(x_odd, odd, fma(x_even, even, chain))
            else:
                even, odd = _halves(_signed(x, signs[r], segment))
                chain = (chain + even) + odd
        total += chain.to(tl.float64)
    a, b = total.reshape(THREADS, 2, 2).split()
    a, b = (a + b).split()
    return a + b


@triton.jit(do_not_specialize=["num_k", "columns"])
def project_table_kernel(
    partial, columns: tl.int64, table, owner, seeds, num_k: tl.int32,
    DOMAIN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program sums one part of x for one direction, number program_id % num_k.

    So the programs of the same part of x are neighbours, and all but the first find it in the cache.
    """
    k = tl.program_id(0) % num_k
    pid = tl.program_id(0) // num_k
    row = table + tl.load(owner + pid).to(tl.int64) * WIDTH
    number = pid - tl.load(row)
    column, numel, offset = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    index = ((offset >> _PROGRAM_SHIFT) + number) << _PROGRAM_SHIFT
    span = Span(index, index - offset, tl.load(row + 4), (), ())
    x, seed = pointer(row, 5, DTYPE), tl.load(seeds + k)
    normals = (mantissa(num_k),) if DOMAIN == _NORMAL else ()
    lane = tl.arange(0, THREADS)
    if ALIGNED & (span.start >= 0) & (span.start + _PROGRAM <= numel):
        sums = _sums(x, numel, span, seed, normals, True)
    else:
        sums = _sums(x, numel, span, seed, normals, False)
    place = ((index - (offset & -4096)) >> 9) + lane  # among the tensor's columns, eight a tile
    stop = _COLUMNS * (((offset & 4095) + numel + 4095) >> 12)
    tl.store(partial + k.to(tl.int64) * columns + column + place, sums, mask=(place >= 0) & (place < stop))


@implements
def project_columns() -> int:
    return COLUMNS


@implements
def project(
    partial: Tensor, tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str
) -> None:
    found: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    column = 0
    for x, stream, offset in zip(tensors, streams, offsets, strict=True):
        if count := tiles(x.numel(), offset):
            aligned = offset % 8 == 0 and x.data_ptr() % 16 == 0
            size = _TILES * TILE
            programs = (offset + x.numel() - 1) // size - offset // size + 1
            row = (programs, column, x.numel(), offset, stream, x.data_ptr())
            found[aligned].append(row)
            column += COLUMNS * count
    with on_device(partial.device):
        for aligned, rows in found.items():
            if rows:
                table = table_of(partial.device, tuple(rows))
                project_table_kernel[(table.owner.numel() * seeds.numel(),)](
                    partial, partial.shape[1], table.rows, table.owner, seeds, seeds.numel(),
                    DOMAIN=DISTS[dist], DTYPE=dtypes([tensors])[0], ALIGNED=aligned, WIDTH=len(rows[0]),
                    **options(partial.device),
                )  # fmt: skip
