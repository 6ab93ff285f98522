"""combine: theta = round(decay * theta + sum_k c_k w_k), one pass, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .launch import masked
from .noise import add_rademacher
from .rows import NUMBERS, each_row_tile, masked_rows, pieces
from .table import pointer, row_of
from .tile import (
    THREADS,
    accumulate,
    choose,
    coeffs_of,
    decayed,
    draw_rademacher,
    each_edge_tile,
    each_tile,
    is_whole,
    kept,
    load,
    noise_of,
    rounded,
    span_of,
    store,
    tabled_span,
)

#: Blocks of eight elements that a thread handles together in whole programs, so that four loads are in
#: flight.
_BLOCKS = tl.constexpr(4)


@triton.jit
def _root(curvature, row, inside, span):
    """sqrt(curvature), as an option (``tile`` says what an option is)."""
    if curvature is None:
        return ()
    else:
        return (tl.sqrt_rn(load(curvature, row, inside, span)),)


@triton.jit
def _finish(total, acc, row, inside, span, terms, out):
    total = choose(kept(row, inside, span, terms), total, acc)
    store(out, rounded(total, out.dtype.element_ty, row, span, terms), row, inside, span)


@triton.jit
def _tile(row, inside, span, terms, out, theta, curvature):
    acc = decayed(load(theta, row, inside, span), terms)
    total = accumulate(acc, row, span, terms, _root(curvature, row, inside, span))
    _finish(total, acc, row, inside, span, terms, out)


@triton.jit
def _unit(root):
    """1 / root, which is |w| of Rademacher noise, as an option; where it is absent, |w| is 1."""
    if len(root) == 0:
        return ()
    else:
        return (tl.div_rn(1.0, root[0]),)


@triton.jit
def _add_word(t0, t1, t2, t3, c, signs, units, rounding):
    """Adds c times the signs of a word to the elements of its four blocks.

    ``signs``: the number of a pair of words, and the word for pair 0 and for pair 1.
    """
    word = tl.where(signs[0] == 0, signs[1], signs[2])
    t0 = add_rademacher(t0, c, units[0], rounding, word, 0)
    t1 = add_rademacher(t1, c, units[1], rounding, word, 1)
    t2 = add_rademacher(t2, c, units[2], rounding, word, 2)
    t3 = add_rademacher(t3, c, units[3], rounding, word, 3)
    return t0, t1, t2, t3


@triton.jit
def _whole_rademacher(span, terms, out, theta, curvature):
    """The program where all of its elements exist: each thread draws one Philox block for 128 elements.

    It is block lane & 31 of tile lane >> 5, and its 16 bytes are the signs of 16 blocks of eight elements, a
    word those of four.  Two words are unrolled, and the pairs of words a loop: with all four unrolled the
    compiler took up to 2.5 times as long, because one of its passes compares each access with all other
    instructions, and an element 0.3 instructions less.
    """
    lane = tl.arange(0, THREADS)
    drawn = ()
    if len(terms.num_k) == 0:
        for k in tl.static_range(len(terms.seeds)):
            drawn += (draw_rademacher(terms.seeds[k], lane, span),)
    for pair in range(2):
        for word in tl.static_range(2):
            r0 = (lane >> 5) * 512 + (lane & 31) + 128 * (2 * pair + word)
            r1, r2, r3 = r0 + 32, r0 + 64, r0 + 96
            a0, a1 = decayed(load(theta, r0, None, span), terms), decayed(load(theta, r1, None, span), terms)
            a2, a3 = decayed(load(theta, r2, None, span), terms), decayed(load(theta, r3, None, span), terms)
            u0, u1 = _unit(_root(curvature, r0, None, span)), _unit(_root(curvature, r1, None, span))
            u2, u3 = _unit(_root(curvature, r2, None, span)), _unit(_root(curvature, r3, None, span))
            units = (u0, u1, u2, u3)
            t0, t1, t2, t3 = a0, a1, a2, a3
            if len(terms.num_k) == 1:
                for k in range(terms.num_k[0]):
                    block = draw_rademacher(tl.load(terms.seeds + k), lane, span)
                    signs, c = (pair, block[word], block[word + 2]), tl.load(terms.coeffs + k)
                    t0, t1, t2, t3 = _add_word(t0, t1, t2, t3, c, signs, units, terms.rounding_seed)
            else:
                for k in tl.static_range(len(terms.seeds)):
                    signs, c = (pair, drawn[k][word], drawn[k][word + 2]), terms.coeffs[k]
                    t0, t1, t2, t3 = _add_word(t0, t1, t2, t3, c, signs, units, terms.rounding_seed)
            _finish(t0, a0, r0, None, span, terms, out)
            _finish(t1, a1, r1, None, span, terms, out)
            _finish(t2, a2, r2, None, span, terms, out)
            _finish(t3, a3, r3, None, span, terms, out)


@triton.jit
def _program(span, numel, terms, out, theta, curvature, ALIGNED: tl.constexpr):
    args = (terms, out, theta, curvature)
    if len(terms.mantissa) == 1:
        each_tile(_tile, span, numel, ALIGNED, _BLOCKS, args)
    elif is_whole(span, numel, ALIGNED):
        _whole_rademacher(span, *args)
    else:
        each_edge_tile(_tile, span, numel, args)


@triton.jit(
    do_not_specialize=["numel", "offset", "stream", "num_k", "mask_keep"],
    do_not_specialize_on_alignment=["coeffs"],
)
def combine_kernel(
    out, theta, mask, curvature, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32,
    DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr, LOW: tl.constexpr = None,
    HIGH: tl.constexpr = None,
):  # fmt: skip
    """combine of one tensor."""
    span = span_of(offset, stream, mask, tl.program_id(0).to(tl.int64))
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K, LOW, HIGH)
    _program(span, numel, terms, out, theta, curvature, ALIGNED)


@triton.jit(do_not_specialize=["num_k", "mask_keep"])
def combine_table_kernel(
    table, owner, seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32,
    DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr = False,
    LOW: tl.constexpr = None, HIGH: tl.constexpr = None,
):  # fmt: skip
    """combine of the tensors in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    numel, span = tabled_span(row, pointer(row, 7, DTYPES[2]), pid)
    coeffs = coeffs_of(coeffs, row, num_k, EACH)
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K, LOW, HIGH)
    out, theta = pointer(row, 5, DTYPES[0]), pointer(row, 6, DTYPES[1])
    curvature = pointer(row, 8, DTYPES[3])
    _program(span, numel, terms, out, theta, curvature, ALIGNED)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["coeffs"])
def combine_rows_kernel(
    out, theta, mask, curvature, offset: tl.int64, stream: tl.int64, width: tl.int64, length: tl.int64,
    blocks: tl.int64, magic: tl.int64, shift: tl.int32, rows: tl.int64,
    seeds, coeffs, num_k: tl.int32, decay, rounding_seed, mask_seed, mask_keep: tl.int32,
    DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """combine of one tensor whose rows are parts of a matrix's rows (``Terms.widths``)."""
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN, K)
    args = (terms, out, theta, curvature)
    divisor = (blocks, magic, shift)
    each_row_tile(_tile, offset, stream, mask, width, length, divisor, rows, ALIGNED, _BLOCKS, args)


@implements
def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    if terms.widths:
        masked_rows(combine_rows_kernel, (out, params, terms.masks, terms.curvature), terms)
    if rest := pieces((out, params), terms):
        groups, terms = rest
        masked((combine_kernel, combine_table_kernel), (*groups, terms.masks, terms.curvature), terms)
