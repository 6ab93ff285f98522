"""fan_out in Triton: a pending combine of theta, then plus and minus = round(theta +- c z), in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .arithmetic import fma, negated
from .launch import elementwise
from .rounding import round_nearest, to_float
from .table import pointer, row_of
from .tile import accumulate, decayed, each_tile, load, noise, noise_of, rounded, span_of, store, tabled_span


@triton.jit
def _tile(row, inside, span, terms, theta, plus, minus, seed, c, PENDING: tl.constexpr):
    dtype: tl.constexpr = theta.dtype.element_ty
    x = load(theta, row, inside, span)
    if PENDING:
        total = accumulate(decayed(x, terms), row, span, terms, ())
        updated = rounded(total, dtype, row, span, terms)
        store(theta, updated, row, inside, span)
        x = to_float(updated)
    z = noise(seed, row, span, terms)
    store(plus, round_nearest(fma(c, z, x), dtype), row, inside, span)
    store(minus, round_nearest(fma(negated(c), z, x), dtype), row, inside, span)


@triton.jit
def _program(
    span, numel, terms, theta, plus, minus, seed, coeff, PENDING: tl.constexpr, ALIGNED: tl.constexpr
):
    seed, c = tl.load(seed), tl.load(coeff)
    each_tile(_tile, span, numel, ALIGNED, 4, (terms, theta, plus, minus, seed, c, PENDING))


@triton.jit(do_not_specialize=["numel", "offset", "stream", "num_k"])
def fan_out_kernel(
    theta, plus, minus, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seed, coeff, seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    PENDING: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """fan_out of one tensor."""
    span = span_of(offset, stream, None, tl.program_id(0).to(tl.int64))
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, None, None, DOMAIN, K)
    _program(span, numel, terms, theta, plus, minus, seed, coeff, PENDING, ALIGNED)


@triton.jit(do_not_specialize=["num_k"])
def fan_out_table_kernel(
    table, owner, seed, coeff, seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    PENDING: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """fan_out of the tensors in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    numel, span = tabled_span(row, None, pid)
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, None, None, DOMAIN, K)
    theta, plus, minus = pointer(row, 5, DTYPES[0]), pointer(row, 6, DTYPES[1]), pointer(row, 7, DTYPES[2])
    _program(span, numel, terms, theta, plus, minus, seed, coeff, PENDING, ALIGNED)


@implements
def fan_out(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, terms: Terms
) -> None:
    pending = terms.seeds.numel() > 0 or terms.decay is not None
    kernels = (fan_out_kernel, fan_out_table_kernel)
    elementwise(kernels, (params, plus, minus), terms, seed=seed, coeff=coeff, PENDING=pending)
