"""spread in Triton: out[k] = round(x + c_k z_k) for many k, with one read of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import DISTS
from ..registry import implements
from ..terms import Terms
from .arithmetic import fma
from .device import on_device
from .launch import jobs, options
from .tile import each_tile, load, noise, noise_of, rounded, span_of, store

#: As many programs as keep the largest devices busy.  Where x has fewer, the directions are shared out, too.
BUSY = 1024


@triton.jit
def _tile(row, inside, span, terms, out, x, numel, first, last):
    value = load(x, row, inside, span)
    for k in range(first, last):
        acc = fma(tl.load(terms.coeffs + k), noise(tl.load(terms.seeds + k), row, span, terms), value)
        store(out + k * numel, rounded(acc, out.dtype.element_ty, row, span, terms), row, inside, span)


@triton.jit(do_not_specialize=["numel", "offset", "stream", "num_k", "each"])
def spread_kernel(
    out, x, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seeds, coeffs, num_k: tl.int32, each: tl.int32, DOMAIN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """spread of one tensor.  The grid has its elements on axis 0 and directions, ``each`` at a time, on 1."""
    span = span_of(offset, stream, None, tl.program_id(0).to(tl.int64))
    terms = noise_of(seeds, coeffs, num_k, None, None, None, None, DOMAIN, None)
    first = tl.program_id(1) * each
    args = (terms, out, x, numel, first, tl.minimum(first + each, num_k))
    each_tile(_tile, span, numel, ALIGNED, 4, args)


@implements
def spread(out: Tensor, x: Tensor, terms: Terms) -> None:
    num_k, numel = terms.seeds.numel(), x.numel()
    (job,) = jobs(([out], [x]), [numel], terms)
    programs = job.row[0]
    each = triton.cdiv(num_k, min(num_k, triton.cdiv(BUSY, programs)))
    aligned = job.aligned and (numel % 8 == 0 or num_k == 1)
    with on_device(x.device):
        spread_kernel[(programs, triton.cdiv(num_k, each))](
            *job.args,
            terms.seeds,
            terms.coeffs,
            num_k,
            each,
            DOMAIN=DISTS[terms.dist],
            ALIGNED=aligned,
            **options(x.device),
        )
