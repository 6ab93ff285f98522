"""low_rank: theta = round(decay * theta + sum_k c_k L_k R_k^T), one pass, in Triton.

A program owns ROWS x COLUMNS elements of one matrix.  A thread has eight neighbouring columns of several
rows, so that a value of a factor serves several elements.  The sums are fmas in the order of the contract, so
instructions for products of matrices, which sum in an order of their own, cannot be used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import DOMAIN_ROUNDING
from ..registry import implements
from ..terms import Terms
from .arithmetic import fma, int64
from .launch import Job, dtypes, launch
from .noise import field16, uniform16
from .philox import philox, stream_words, words
from .rounding import round_nearest, round_stochastic, to_float
from .table import pointer, row_of
from .tile import coeffs_of, zeros_like

#: A program's part of a matrix.  Either is smaller than its number of threads; Triton then loads the values
#: of a factor in the threads that use them, and not through shared memory.
ROWS, COLUMNS = 64, 64

_ROWS, _COLUMNS = tl.constexpr(ROWS), tl.constexpr(COLUMNS)
_ROUNDING = tl.constexpr(DOMAIN_ROUNDING)


@triton.jit
def _fields(seed, index, n, stream, ALIGNED: tl.constexpr):
    """A 16-bit field of the rounding domain for each element, uint32 [ROWS, COLUMNS].

    ``index``: the logical index of the first element.  A row of the matrix has ``n`` elements.
    """
    low, domain = stream_words(stream, _ROUNDING)
    if ALIGNED:  # eight columns are one block
        group = tl.arange(0, _ROWS * _COLUMNS // 8)
        block = (index + (group // (_COLUMNS // 8)).to(tl.int64) * n + 8 * (group % (_COLUMNS // 8))) >> 3
        block_lo, block_hi = words(block)
        w0, w1, w2, w3 = philox(block_lo, block_hi, low, domain, seed)
        return uniform16(w0, w1, w2, w3).reshape(_ROWS, _COLUMNS)
    else:
        element = index + tl.arange(0, _ROWS).to(tl.int64)[:, None] * n + tl.arange(0, _COLUMNS)[None, :]
        block_lo, block_hi = words(element >> 3)
        w0, w1, w2, w3 = philox(block_lo, block_hi, low, domain, seed)
        return field16(w0, w1, w2, w3, (element & 7).to(tl.uint32))


@triton.jit
def _program(
    out, theta, left, right, m, n, rank, offset, stream, pid, coeffs, num_k, decay, rounding_seed,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    offset, stream = int64(offset), int64(stream)
    if ALIGNED:
        n = n // 8 * 8  # this is n itself, but the compiler now knows that it is a multiple of 8
    across = tl.cdiv(n, _COLUMNS)
    top, first = pid // across * _ROWS, pid % across * _COLUMNS
    start = top * n + first
    out, theta = out + start, theta + start
    if ALIGNED:
        out, theta = tl.multiple_of(out, 16), tl.multiple_of(theta, 16)
    row, column = tl.arange(0, _ROWS), tl.arange(0, _COLUMNS)
    inside = (top + row < m)[:, None] & (first + column < n)[None, :]
    element = row.to(tl.int64)[:, None] * n + column[None, :]
    acc = to_float(tl.load(theta + element, mask=inside, other=0.0))
    if decay is not None:
        acc = tl.load(decay) * acc
    # Rows and columns beyond the edge read the factors of the last one: that is cheaper than a mask, and
    # nothing that comes of it is stored.
    left += tl.minimum(top + row, m - 1) * rank
    right += tl.minimum(first + column, n - 1) * rank
    for k in range(num_k):
        product = zeros_like(acc, (rank,))
        for r in tl.range(0, rank, loop_unroll_factor=4):
            product = fma(tl.load(left + r)[:, None], tl.load(right + r)[None, :], product)
        acc = fma(tl.load(coeffs + k), product, acc)
        left += m * rank
        right += n * rank
    dtype: tl.constexpr = out.dtype.element_ty
    if rounding_seed is None:
        x = round_nearest(acc, dtype)
    else:
        u16 = _fields(tl.load(rounding_seed), offset + start, n, stream, ALIGNED)
        x = round_stochastic(acc, u16, dtype)
    tl.store(out + element, x, mask=inside)


@triton.jit(
    do_not_specialize=["m", "n", "rank", "offset", "stream", "num_k"],
    do_not_specialize_on_alignment=["coeffs"],
)
def low_rank_kernel(
    out, theta, left, right, m: tl.int64, n: tl.int64, rank: tl.int64, offset: tl.int64, stream: tl.int64,
    coeffs, num_k: tl.int32, decay, rounding_seed, ALIGNED: tl.constexpr,
):  # fmt: skip
    """low_rank of one matrix."""
    pid = tl.program_id(0).to(tl.int64)
    _program(
        out, theta, left, right, m, n, rank, offset, stream, pid, coeffs, num_k, decay, rounding_seed, ALIGNED
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_k"])
def low_rank_table_kernel(
    table, owner, coeffs, num_k: tl.int32, decay, rounding_seed, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr = False,
):  # fmt: skip
    """low_rank of the matrices in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    m, n, rank = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    offset, stream = tl.load(row + 5), tl.load(row + 6)
    out, theta = pointer(row, 7, DTYPES[0]), pointer(row, 8, DTYPES[1])
    left, right = pointer(row, 9, DTYPES[2]), pointer(row, 10, DTYPES[3])
    coeffs = coeffs_of(coeffs, row, num_k, EACH)
    _program(
        out, theta, left, right, m, n, rank, offset, stream, pid, coeffs, num_k, decay, rounding_seed, ALIGNED
    )  # fmt: skip


@implements
def low_rank(
    out: list[Tensor], params: list[Tensor], left: list[Tensor], right: list[Tensor], terms: Terms
) -> None:
    jobs = []
    places = zip(out, params, left, right, terms.offsets, terms.streams, strict=True)
    for index, (*tensors, offset, stream) in enumerate(places):
        if tensors[0].numel():
            (_, m, rank), n = tensors[2].shape, tensors[3].shape[1]
            addresses = [t.data_ptr() for t in tensors]
            aligned = n % 8 == 0 and offset % 8 == 0 and addresses[0] % 16 == 0 and addresses[1] % 16 == 0
            numbers = (m, n, rank, offset, stream)
            row = (triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS), index, *numbers, *addresses)
            jobs.append(Job(row, (*tensors, *numbers), aligned))
    args = {
        "coeffs": terms.coeffs,
        "num_k": terms.coeffs.shape[-1],
        "decay": terms.decay,
        "rounding_seed": None if params[0].dtype is torch.float32 else terms.rounding_seed,
    }
    groups = (out, params, left, right)
    launch(params[0].device, (low_rank_kernel, low_rank_table_kernel), jobs, args, DTYPES=dtypes(groups))
