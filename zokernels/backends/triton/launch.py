"""Launches: one for each tensor, or one for all tensors of a call through a table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...contract import DISTS
from ..terms import Terms
from .device import on_device
from .table import Row, table_of
from .tile import PROGRAM, THREADS

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}

#: Directions up to which a kernel is compiled for their number, which then stands unrolled; more run in a
#: loop.
UNROLLED = 2


def compile_options(warp_size: int = 32) -> dict[str, Any]:
    """For devices whose warps have ``warp_size`` threads: 64 on AMD's CDNA, else 32.  A program always has
    THREADS.

    enable_fp_fusion=False: a product and a sum of the contract must stay two roundings.
    """
    return {"num_warps": THREADS.value // warp_size, "enable_fp_fusion": False}


@functools.cache
def options(device: torch.device) -> dict[str, Any]:
    """``compile_options`` of a device."""
    rocm = torch.version.hip is not None and device.type == "cuda"
    return compile_options(torch.cuda.get_device_properties(device).warp_size if rocm else 32)


Group = Sequence[Tensor] | None


class Job(NamedTuple):
    """One tensor of a call, or what an operation takes together with it."""

    row: Row  # for the table kernel
    args: tuple  # for the kernel of one tensor, in its order
    #: Every block of eight lies on 16 bytes, so that whole programs move 16 bytes at a time; None: nothing is
    #: moved.
    aligned: bool | None


def dtypes(groups: Sequence[Group]) -> tuple[tl.dtype | None, ...]:
    return tuple(_DTYPES[group[0].dtype] if group else None for group in groups)


def programs(numel: int, offset: int) -> int:
    """Programs of one tensor: the aligned spans of PROGRAM logical indices that it touches."""
    return (offset + numel - 1) // PROGRAM - offset // PROGRAM + 1


def jobs(groups: Sequence[Group], sizes: Sequence[int], terms: Terms) -> list[Job]:
    """The jobs of element-wise kernels; every group has a tensor for each size.

    Masks are read by the byte.
    """
    found = []
    columns = [group or [None] * len(sizes) for group in groups]
    wide = [bool(group) and group[0].dtype is not torch.uint8 for group in groups]
    places = zip(sizes, terms.offsets, terms.streams, *columns, strict=True)
    for index, (numel, offset, stream, *tensors) in enumerate(places):
        if numel:
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            aligned = offset % 8 == 0 and not any(a % 16 and w for a, w in zip(addresses, wide, strict=True))
            row = (programs(numel, offset), index, numel, offset, stream, *addresses)
            found.append(Job(row, (*tensors, numel, offset, stream), aligned))
    return found


def launch(
    device: torch.device, kernels: tuple[Any, Any], jobs: list[Job], args: dict, **table_args: object
) -> None:
    """One launch of the second kernel, over a table, for all jobs of one alignment; of the first for a single
    job.

    ``args``: what both kernels take besides; of coefficients [tensors, K] each job gets its row.
    """
    coeffs = args.get("coeffs")
    each = coeffs is not None and coeffs.dim() == 2
    if each:
        table_args["EACH"] = True
    with on_device(device):
        for aligned in (True, False, None):
            group = [job for job in jobs if job.aligned is aligned]
            own = args if aligned is None else {**args, "ALIGNED": aligned}
            table = table_of(device, tuple(job.row for job in group)) if len(group) > 1 else None
            if table is not None:
                count, width = table.owner.numel(), table.rows.shape[1]
                kernels[1][(count,)](
                    table.rows, table.owner, WIDTH=width, **own, **table_args, **options(device)
                )
                continue
            for job in group:
                if each:
                    own["coeffs"] = coeffs[job.row[1]]
                kernels[0][(job.row[0],)](*job.args, **own, **options(device))


def elementwise(kernels: tuple[Any, Any], groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """``launch`` with a tensor of each group to a job, the parameters first, and the noise of ``terms``."""
    leaders = groups[0]
    num_k = terms.seeds.numel()
    rounds = any(group and group[0].dtype not in (torch.float32, torch.uint8) for group in groups)
    noise = {
        "seeds": terms.seeds,
        "coeffs": terms.coeffs,
        "num_k": num_k,
        "decay": terms.decay,
        "rounding_seed": terms.rounding_seed if rounds else None,
        "DOMAIN": DISTS[terms.dist],
        "K": num_k if num_k <= UNROLLED else None,
    }
    found = jobs(groups, [t.numel() for t in leaders], terms)
    launch(leaders[0].device, kernels, found, {**noise, **args}, DTYPES=dtypes(groups))


def masked(kernels: tuple[Any, Any], groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """``elementwise`` of kernels that take masks."""
    elementwise(kernels, groups, terms, mask_seed=terms.mask_seed, mask_keep=terms.mask_keep, **args)
