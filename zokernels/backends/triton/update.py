"""update in Triton: theta and the state of a rule from G = sum_k c_k z_k, in one pass.

The docstring of :func:`zokernels.update_` has the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...contract import DOMAIN_STATE
from ..registry import implements
from ..terms import Terms
from .arithmetic import fma, negated
from .launch import masked
from .rounding import round_nearest
from .rows import NUMBERS, each_row_tile, masked_rows, pieces
from .table import pointer, row_of
from .tile import (
    accumulate,
    choose,
    coeffs_of,
    decayed,
    each_tile,
    kept,
    load,
    noise,
    noise_of,
    rounded,
    span_of,
    store,
    tabled_span,
    zeros_like,
)

_FIRST, _SECOND = tl.constexpr(DOMAIN_STATE), tl.constexpr(DOMAIN_STATE + 1)

#: How many hyper-parameters each rule has, without those that adam_window has for each seed.
VALUES = {"momentum": 4, "adam": 8, "adam_window": 2, "sign": 2, "hizoo": 2}

# A rule takes theta, ``base`` (decay * theta), its old states, and ``hyper``, a tuple of its
# hyper-parameters.  It gives the new theta, and the new first and second state as options.  All are fp32 [B,
# 8], and rounded later.


@triton.jit
def _gradient(theta, l2, row, span, terms):
    return fma(l2, theta, accumulate(zeros_like(theta, terms.num_k), row, span, terms, ()))


@triton.jit
def _momentum(row, span, terms, theta, base, m, hyper):
    l2, beta, gain, lr = hyper
    g = _gradient(theta, l2, row, span, terms)
    m = fma(beta, m, gain * g)
    return fma(negated(lr), m, base), (m,), ()


@triton.jit
def _adam(row, span, terms, theta, base, m, v, hyper):
    l2, beta1, gain1, beta2, gain2, lr, scale, eps = hyper
    g = _gradient(theta, l2, row, span, terms)
    m = fma(beta1, m, gain1 * g)
    v = fma(beta2, v, gain2 * g * g)
    return fma(negated(lr), tl.div_rn(m, fma(tl.sqrt_rn(v), scale, eps)), base), (m,), (v,)


@triton.jit
def _adam_window(row, span, terms, base, square_coeffs, hyper):
    lr, eps = hyper
    m, v = zeros_like(base, terms.num_k), zeros_like(base, terms.num_k)
    for k in range(terms.num_k[0]):
        z = noise(tl.load(terms.seeds + k), row, span, terms)
        m, v = fma(tl.load(terms.coeffs + k), z, m), fma(tl.load(square_coeffs + k), z * z, v)
    return fma(negated(lr), tl.div_rn(m, tl.sqrt_rn(v) + eps), base), (), ()


@triton.jit
def _sign(row, span, terms, theta, base, hyper):
    l2, lr = hyper
    g = _gradient(theta, l2, row, span, terms)
    return fma(negated(lr), (g > 0).to(tl.float32) - (g < 0).to(tl.float32), base), (), ()


@triton.jit
def _hizoo(row, span, terms, base, h, hyper):
    keep, gain = hyper
    z = noise(terms.seeds[0], row, span, terms)
    h = fma(gain, h * (z * z), keep * h)
    return fma(terms.coeffs[0], tl.div_rn(z, tl.sqrt_rn(h)), base), (h,), ()


@triton.jit
def _apply(row, span, terms, theta, base, first, second, square_coeffs, hyper, RULE: tl.constexpr):
    if RULE == "momentum":
        return _momentum(row, span, terms, theta, base, first[0], hyper)
    elif RULE == "adam":
        return _adam(row, span, terms, theta, base, first[0], second[0], hyper)
    elif RULE == "adam_window":
        return _adam_window(row, span, terms, base, square_coeffs, hyper)
    elif RULE == "sign":
        return _sign(row, span, terms, theta, base, hyper)
    else:
        return _hizoo(row, span, terms, base, first[0], hyper)


@triton.jit
def _load_state(ptr, row, inside, span):
    """A state's elements, as an option."""
    if ptr is None:
        return ()
    else:
        return (load(ptr, row, inside, span),)


@triton.jit
def _store_state(ptr, new, old, keep, row, inside, span, terms, DOMAIN: tl.constexpr):
    if ptr is not None:
        dtype: tl.constexpr = ptr.dtype.element_ty
        x = choose(keep, rounded(new[0], dtype, row, span, terms, DOMAIN), round_nearest(old[0], dtype))
        store(ptr, x, row, inside, span)


@triton.jit
def _tile(row, inside, span, terms, theta, first, second, square_coeffs, hyper, RULE: tl.constexpr):
    x = load(theta, row, inside, span)
    base = decayed(x, terms)
    m, v = _load_state(first, row, inside, span), _load_state(second, row, inside, span)
    new, new_m, new_v = _apply(row, span, terms, x, base, m, v, square_coeffs, hyper, RULE)
    keep = kept(row, inside, span, terms)
    new = choose(keep, new, base)
    store(theta, rounded(new, theta.dtype.element_ty, row, span, terms), row, inside, span)
    _store_state(first, new_m, m, keep, row, inside, span, terms, _FIRST)
    _store_state(second, new_v, v, keep, row, inside, span, terms, _SECOND)


@triton.jit
def _program(
    span,
    numel,
    terms,
    theta,
    first,
    second,
    hyper,
    RULE: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    values = ()
    for i in tl.static_range(VALUES):
        values += (tl.load(hyper + i),)
    each_tile(_tile, span, numel, ALIGNED, 1, (terms, theta, first, second, hyper + VALUES, values, RULE))


@triton.jit(
    do_not_specialize=["numel", "offset", "stream", "num_k", "mask_keep"],
    do_not_specialize_on_alignment=["coeffs"],
)
def update_kernel(
    theta, first, second, mask, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32, hyper,
    RULE: tl.constexpr, VALUES: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """update of one tensor."""
    span = span_of(offset, stream, mask, tl.program_id(0).to(tl.int64))
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K)
    _program(span, numel, terms, theta, first, second, hyper, RULE, VALUES, ALIGNED)


@triton.jit(do_not_specialize=["num_k", "mask_keep"])
def update_table_kernel(
    table, owner, seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32, hyper,
    RULE: tl.constexpr, VALUES: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr = False,
):  # fmt: skip
    """update of the tensors in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    numel, span = tabled_span(row, pointer(row, 8, DTYPES[3]), pid)
    coeffs = coeffs_of(coeffs, row, num_k, EACH)
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K)
    theta = pointer(row, 5, DTYPES[0])
    first = pointer(row, 6, DTYPES[1])
    second = pointer(row, 7, DTYPES[2])
    _program(span, numel, terms, theta, first, second, hyper, RULE, VALUES, ALIGNED)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["coeffs"])
def update_rows_kernel(
    theta, first, second, mask, offset: tl.int64, stream: tl.int64, width: tl.int64, length: tl.int64,
    blocks: tl.int64, magic: tl.int64, shift: tl.int32, rows: tl.int64,
    seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32, hyper,
    RULE: tl.constexpr, VALUES: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """update of one tensor whose rows are parts of a matrix's rows (``Terms.widths``)."""
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K)
    values = ()
    for i in tl.static_range(VALUES):
        values += (tl.load(hyper + i),)
    divisor = (blocks, magic, shift)
    each_row_tile(  # no tuple that holds a string may have a name
        _tile, offset, stream, mask, width, length, divisor, rows, ALIGNED, 1,
        (terms, theta, first, second, hyper + VALUES, values, RULE),
    )  # fmt: skip


@implements
def update(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, terms: Terms
) -> None:
    # A window has many seeds, and each has a second coefficient, for its square.  So its kernel has a loop
    # that reads them, and is not compiled for their number.
    own = {"K": None} if rule == "adam_window" else {}
    own |= {"hyper": hyper, "RULE": rule, "VALUES": VALUES[rule]}
    if terms.widths:
        masked_rows(update_rows_kernel, (params, first, second, terms.masks), terms, **own)
    if rest := pieces((params, first, second), terms):
        groups, terms = rest
        masked((update_kernel, update_table_kernel), (*groups, terms.masks), terms, **own)
