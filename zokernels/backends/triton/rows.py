"""Element-wise kernels for tensors whose rows are parts of a matrix's rows (``Terms.widths``).

The tiles are those of ``tile``; only the map from blocks to logical indices differs.  A program owns
ROW_BLOCKS blocks of eight elements, and each row has ``blocks`` of them.  Where width, length and offset are
multiples of eight, these are also the blocks of the memory, so loads are of 16 bytes.  The row of a block is
found by a product and a shift.  Rademacher noise draws a Philox block for each eight elements; in one piece,
128 elements share one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...checks import fail
from ..terms import Terms, row_blocks
from .arithmetic import int64
from .device import on_device
from .launch import Group, noise_args, options
from .tile import PROGRAM, THREADS, Span, moved

#: Blocks of eight elements of a program: as many as for tensors in one piece.
ROW_BLOCKS = PROGRAM // 8

_ROW_BLOCKS = tl.constexpr(ROW_BLOCKS)


#: The arguments of kernels over rows that are numbers, of whose values no kernel is compiled apart.
NUMBERS = [
    "offset", "stream", "width", "length", "blocks", "magic", "shift", "rows", "num_k", "mask_keep",
]  # fmt: skip


class Divisor(NamedTuple):
    """A division by the number of blocks of a row: n // count is umulhi(2 n, magic) >> shift, all uint32.

    csrc/cuda/table.h has the proof.
    """

    count: Any
    magic: Any
    shift: Any


def divisor_of(count: int) -> Divisor:
    shift = (count - 1).bit_length()
    return Divisor(count, -(-(1 << 31 + shift) // count), shift)


@triton.jit
def _quotient(n, blocks):
    """n // blocks for uint32 n < 2^31 as a product and a shift."""
    return tl.umulhi(n * 2, blocks.magic) >> blocks.shift


@triton.jit
def _whole_rows(
    TILE: tl.constexpr, base, column, begin, skipped, stream, mask, blocks, BLOCKS: tl.constexpr, args
):
    # The upper word of the counter is the same for all blocks.
    for first in range(0, _ROW_BLOCKS, BLOCKS * THREADS):
        row = first + tl.arange(0, BLOCKS * THREADS)
        ahead = column + row.to(tl.uint32)
        block = begin.to(tl.uint32) + ahead + _quotient(ahead, blocks) * skipped.to(tl.uint32)
        TILE(row, None, Span((begin >> 32) << 35, base * 8, stream, mask, (block,)), *args)


@triton.jit
def _edge_rows(
    TILE: tl.constexpr, base, column, line, offset, width, length, stream, mask, blocks, rows,
    ALIGNED: tl.constexpr,
    args,
):  # fmt: skip
    element = tl.arange(0, 8)[None, :]
    for first in range(0, _ROW_BLOCKS, THREADS):
        row = first + tl.arange(0, THREADS)
        ahead = column + row.to(tl.uint32)
        lines = _quotient(ahead, blocks)
        begin = offset + (line + lines) * length
        block = (begin >> 3) + (ahead - lines * blocks.count)
        at = (block * 8 - begin)[:, None] + element
        inside = (line + lines < rows)[:, None] & (at >= 0) & (at < width)
        place = (line + lines) * width + (block * 8 - begin)
        start = base * 8 if ALIGNED else (place - row * 8)[:, None]
        span = Span((block >> 9) << 12, start, stream, mask, ((block & 511).to(tl.int32),))
        TILE(row, inside, span, *args)


@triton.jit
def each_row_tile(
    TILE: tl.constexpr, offset, stream, mask, width, length, divisor, rows, ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr, args,
):  # fmt: skip
    """Calls TILE(row, inside, span, *args) for every tile of the program, as ``tile.each_tile`` does.

    BLOCKS: how many blocks a thread has at once in a whole program.
    """
    blocks = Divisor(divisor[0].to(tl.uint32), divisor[1].to(tl.uint32), divisor[2].to(tl.uint32))
    base = tl.program_id(0).to(tl.int64) * _ROW_BLOCKS
    offset, stream, length = int64(offset), int64(stream), int64(length)
    small = base < 2**31
    line = _quotient(base.to(tl.uint32), blocks).to(tl.int64) if small else base // divisor[0]
    column = (base - line * divisor[0]).to(tl.uint32)
    mask = moved(mask, base)
    if ALIGNED:
        begin, skipped = (offset + line * length) >> 3, (length >> 3) - divisor[0]
        last = column + (_ROW_BLOCKS - 1)
        end = begin + last + _quotient(last, blocks).to(tl.int64) * skipped
        if (base + _ROW_BLOCKS <= rows * divisor[0]) & (((begin ^ end) >> 32) == 0):
            _whole_rows(TILE, base, column, begin, skipped, stream, mask, blocks, BLOCKS, args)
        else:
            _edge_rows(
                TILE, base, column, line, offset, width, length, stream, mask, blocks, rows, ALIGNED, args
            )  # fmt: skip
    else:
        _edge_rows(TILE, base, column, line, offset, width, length, stream, mask, blocks, rows, ALIGNED, args)


def masked_rows(kernel: Any, groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """Launches ``kernel`` once for each tensor that is rows; ``args`` are further arguments of it."""
    leaders = groups[0]
    noise = {
        **noise_args(groups, terms),
        "mask_seed": terms.mask_seed,
        "mask_keep": terms.mask_keep,
        **args,
    }
    with on_device(leaders[0].device):
        for i, leader in enumerate(leaders):
            offset, width, length = terms.offsets[i], terms.widths[i], terms.lengths[i]
            if not width or not leader.numel():
                continue
            tensors = [group[i] if group else None for group in groups]
            wide = [t.data_ptr() for t in tensors if t is not None and t.dtype is not torch.uint8]
            aligned = (offset | width | length) % 8 == 0 and not any(a % 16 for a in wide)
            blocks, rows = row_blocks(offset, width, length), leader.numel() // width
            if blocks >= 2**31 - ROW_BLOCKS:
                fail("combine, update", f"rows[{i}]", "rows of fewer than 2^34 elements", (width, length))
            noise["coeffs"] = terms.coeffs[i] if terms.coeffs.dim() == 2 else terms.coeffs
            places = (offset, terms.streams[i], width, length, *divisor_of(blocks), rows)
            kernel[(-(-rows * blocks // ROW_BLOCKS),)](
                *tensors, *places, **noise, ALIGNED=aligned, **options(leader.device)
            )


def pieces(groups: Sequence[Group], terms: Terms) -> tuple[list[Group], Terms] | None:
    """The tensors of ``groups`` that lie in one piece, and their terms; None where there are none."""
    at = [i for i, width in enumerate(terms.widths or [0] * len(terms.offsets)) if not width]
    if len(at) == len(terms.offsets):
        return list(groups), terms
    if not at:
        return None
    pick = lambda values: [values[i] for i in at] if values else values
    coeffs = terms.coeffs
    if coeffs.dim() == 2:  # by slices, because an index would be copied from the host to the device
        coeffs = torch.cat([coeffs[i : i + 1] for i in at])
    own = {"streams": pick(terms.streams), "offsets": pick(terms.offsets), "masks": pick(terms.masks)}
    terms = terms._replace(coeffs=coeffs, **own, curvature=pick(terms.curvature), widths=None, lengths=None)
    return [pick(group) for group in groups], terms
