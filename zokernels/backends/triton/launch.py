"""How kernels are launched: once for each tensor, or once for all tensors of a call, through a table."""

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

#: Up to so many directions a kernel is compiled for their number, and its loop over them is unrolled.  For
#: more there is one kernel with a loop.
UNROLLED = 2


def compile_options(warp_size: int = 32) -> dict[str, Any]:
    """Triton's options for devices whose warps have ``warp_size`` threads: 64 on AMD's CDNA, 32 elsewhere.

    A program has THREADS threads on all of them.  enable_fp_fusion=False keeps compilers from joining a
    product and a sum into an fma, because the contract rounds both.
    """
    return {"num_warps": THREADS.value // warp_size, "enable_fp_fusion": False}


@functools.cache
def options(device: torch.device) -> dict[str, Any]:
    """:func:`compile_options` for a device."""
    rocm = torch.version.hip is not None and device.type == "cuda"
    return compile_options(torch.cuda.get_device_properties(device).warp_size if rocm else 32)


Group = Sequence[Tensor] | None


class Job(NamedTuple):
    """The work of a call on one tensor."""

    row: Row  #: what the kernel for tables reads
    args: tuple  #: the first arguments of the kernel for one tensor
    #: Whether every block of eight elements begins at a multiple of 16 bytes, so that whole programs can load
    #: and store 16 bytes at a time.  None for kernels that load and store no tensor.
    aligned: bool | None


def dtypes(groups: Sequence[Group]) -> tuple[tl.dtype | None, ...]:
    """Triton's dtype of each group of tensors; None for a group that is not there."""
    return tuple(_DTYPES[group[0].dtype] if group else None for group in groups)


def programs(numel: int, offset: int) -> int:
    """How many programs a tensor has: one for each aligned span of PROGRAM indices that it touches."""
    return (offset + numel - 1) // PROGRAM - offset // PROGRAM + 1


def jobs(groups: Sequence[Group], sizes: Sequence[int], terms: Terms) -> list[Job]:
    """The jobs of element-wise kernels, one for each tensor that has elements.

    Each of ``groups`` has a tensor for each of ``sizes``, or is not there.  uint8 tensors are masks, which
    are read byte by byte, so their alignment does not matter.
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
    """Runs ``jobs``: those of one alignment in one launch of the second kernel, over a table of them.

    A job that is the only one of its alignment is a launch of the first kernel.  So is each, where a CUDA
    graph is captured and the table does not exist yet.

    Args:
        args: what both kernels take besides.  Of coefficients [tensors, K] each job gets the row of its
        tensor. table_args: what the second kernel takes besides that.
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


def noise_args(groups: Sequence[Group], terms: Terms) -> dict[str, Any]:
    """The arguments of a kernel for the noise of ``terms``, but for its coefficients, streams and offsets."""
    num_k = terms.seeds.numel()
    rounds = any(group and group[0].dtype not in (torch.float32, torch.uint8) for group in groups)
    return {
        "seeds": terms.seeds,
        "num_k": num_k,
        "decay": terms.decay,
        "rounding_seed": terms.rounding_seed if rounds else None,
        "DOMAIN": DISTS[terms.dist],
        "K": num_k if num_k <= UNROLLED else None,
    }


def elementwise(kernels: tuple[Any, Any], groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """:func:`launch` of jobs that have a tensor of each group, with the noise of ``terms``.

    The parameters are the first group.  ``args`` are other arguments of both kernels.
    """
    found = jobs(groups, [t.numel() for t in groups[0]], terms)
    args = {**noise_args(groups, terms), "coeffs": terms.coeffs, **args}
    launch(groups[0][0].device, kernels, found, args, DTYPES=dtypes(groups))


def masked(kernels: tuple[Any, Any], groups: Sequence[Group], terms: Terms, **args: object) -> None:
    """:func:`elementwise` for kernels that take masks."""
    elementwise(kernels, groups, terms, mask_seed=terms.mask_seed, mask_keep=terms.mask_keep, **args)
