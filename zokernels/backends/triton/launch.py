"""Launch of the combine kernels: one for a tensor, or one for all tensors of a call through a table of pointers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...contract import DISTS
from ..reference.combine import combine as reference
from ..terms import Terms
from .combine import NUM_WARPS, combine_kernel, combine_table_kernel
from .device import on_device
from .table import Row, programs, table_of

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

#: Directions up to which a kernel is compiled for their number, which then stands unrolled; more run in a loop.
UNROLLED = 2

#: enable_fp_fusion=False: a product and a sum of the contract must stay two roundings.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def is_aligned(row: Row) -> bool:
    """Whether every block of eight lies on 16 bytes, so that whole programs move 16 bytes at a time."""
    target, theta, _, offset, _ = row
    return target % 16 == 0 and theta % 16 == 0 and offset % 8 == 0


def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    if not terms.is_plain:
        return reference(out, params, terms)
    seeds, coeffs, streams, offsets, dist, decay, rounding_seed, *_ = terms
    device, dtype = params[0].device, params[0].dtype
    num_k = seeds.numel()
    scalars = (seeds, coeffs, num_k, decay, None if dtype is torch.float32 else rounding_seed)
    variant = {"DOMAIN": DISTS[dist], "K": num_k if num_k <= UNROLLED else None, **_OPTIONS}
    groups: dict[bool, list[tuple[Tensor, Tensor, Row]]] = {True: [], False: []}
    for target, theta, stream, offset in zip(out, params, streams, offsets, strict=True):
        if theta.numel():
            row = (target.data_ptr(), theta.data_ptr(), theta.numel(), offset, stream)
            groups[is_aligned(row)].append((target, theta, row))
    with on_device(device):
        for aligned, group in groups.items():
            table = table_of(device, tuple(row for _, _, row in group)) if len(group) > 1 else None
            if table is not None:
                combine_table_kernel[(table.owner.numel(),)](
                    table.rows, table.owner, *scalars, DTYPE=_DTYPES[dtype], ALIGNED=aligned, **variant
                )
                continue
            for target, theta, (_, _, numel, offset, stream) in group:
                combine_kernel[(programs(numel, offset),)](
                    target, theta, numel, offset, stream, *scalars, ALIGNED=aligned, **variant
                )
