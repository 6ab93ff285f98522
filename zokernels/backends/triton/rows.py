"""Tensors that are rows of matrices (``Terms.widths``): the element-wise kernels with another map of their blocks.

A program owns ROW_BLOCKS Philox blocks of rows, ``blocks`` of each row.  Where everything is aligned to eight they are
the blocks of the memory, and a load is one of 16 bytes; only the number of a block is found by a division.  A block of
Rademacher signs is drawn for each eight elements, not shared among 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ...checks import fail
from ...contract import DISTS
from ..terms import Terms, row_blocks
from .device import on_device
from .launch import OPTIONS, UNROLLED, Group
from .tile import THREADS, Span

#: Of a program: eight for each thread.
ROW_BLOCKS = 8 * THREADS.value

_ROW_BLOCKS = tl.constexpr(ROW_BLOCKS)


@triton.jit
def each_row_tile(TILE: tl.constexpr, offset, stream, mask, width, length, blocks, rows, ALIGNED: tl.constexpr, args):
    """TILE(row, inside, span, *args) as in ``tile``: of each block, ``span`` begins at its Rademacher tile."""
    element = tl.arange(0, 8)[None, :]
    # One division of 64 bits a program, and one of 32 bits a block.
    base = tl.program_id(0).to(tl.int64) * _ROW_BLOCKS
    base_line = base // blocks
    base_block = (base - base_line * blocks).to(tl.int32)
    for first in range(0, _ROW_BLOCKS, THREADS):
        number = base + first + tl.arange(0, THREADS)
        ahead = (base_block + first + tl.arange(0, THREADS)).to(tl.uint32)
        lines = ahead // blocks.to(tl.uint32)
        line = base_line + lines
        begin = offset + line * length
        block = (begin >> 3) + (ahead - lines * blocks.to(tl.uint32))
        column = block * 8 - begin
        row = (block & 511).to(tl.int32)
        exists = (line < rows)[:, None]
        if ALIGNED:
            place, inside = number * 8, tl.broadcast_to(exists, (THREADS, 8))
        else:
            place = line * width + column
            inside = exists & (column[:, None] + element >= 0) & (column[:, None] + element < width)
        packed = None
        if mask is not None:
            packed = mask + (number - row)
        span = Span((block >> 9) << 12, (place - row * 8)[:, None], stream.to(tl.uint32), packed)
        TILE(row, inside, span, *args)


def masked_rows(kernel: Any, groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """One launch of ``kernel`` for each tensor that is rows."""
    leaders, num_k = groups[0], terms.seeds.numel()
    rounds = any(group and group[0].dtype not in (torch.float32, torch.uint8) for group in groups)
    noise = {
        "seeds": terms.seeds,
        "num_k": num_k,
        "decay": terms.decay,
        "rounding_seed": terms.rounding_seed if rounds else None,
        "mask_seed": terms.mask_seed,
        "mask_keep": terms.mask_keep,
        "DOMAIN": DISTS[terms.dist],
        "K": num_k if num_k <= UNROLLED else None,
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
            places = (offset, terms.streams[i], width, length, blocks, rows)
            kernel[(-(-rows * blocks // ROW_BLOCKS),)](*tensors, *places, **noise, ALIGNED=aligned, **OPTIONS)


def pieces(groups: Sequence[Group], terms: Terms) -> tuple[list[Group], Terms] | None:
    """The tensors that lie in one piece; None where there are none."""
    at = [i for i, width in enumerate(terms.widths or [0] * len(terms.offsets)) if not width]
    if len(at) == len(terms.offsets):
        return list(groups), terms
    if not at:
        return None
    pick = lambda values: [values[i] for i in at] if values else values
    coeffs = terms.coeffs
    if coeffs.dim() == 2:  # by slices: an index would be copied from the host
        coeffs = torch.cat([coeffs[i : i + 1] for i in at])
    own = {"streams": pick(terms.streams), "offsets": pick(terms.offsets), "masks": pick(terms.masks)}
    terms = terms._replace(coeffs=coeffs, **own, curvature=pick(terms.curvature), widths=None, lengths=None)
    return [pick(group) for group in groups], terms
