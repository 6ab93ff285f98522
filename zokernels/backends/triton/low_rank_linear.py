"""low_rank_linear: y_p = round(y_p + c_p ((x_p B_p) A_p^T + b_p)), in Triton.

A program owns ROWS rows of one member.  It sums over the columns of x for one number of the rank after the
other, in the order of docs/contract.md, and then goes over the columns of out.  The sums of a row stay in
registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .arithmetic import fma
from .device import on_device
from .launch import options
from .rounding import round_nearest, to_float
from .table import table_of

#: Rows of a program, and columns of out that it takes at a time.
ROWS, COLUMNS = 16, 64
_ROWS, _COLUMNS, _CHAINS = tl.constexpr(ROWS), tl.constexpr(COLUMNS), tl.constexpr(64)


@triton.jit
def _sum_of_chains(chain):
    """[ROWS, 64] to [ROWS]: neighbours are added until one sum is left."""
    a, b = chain.reshape(_ROWS, 32, 2).split()
    a, b = (a + b).reshape(_ROWS, 16, 2).split()
    a, b = (a + b).reshape(_ROWS, 8, 2).split()
    a, b = (a + b).reshape(_ROWS, 4, 2).split()
    a, b = (a + b).reshape(_ROWS, 2, 2).split()
    a, b = (a + b).split()
    return a + b


@triton.jit(do_not_specialize=["m", "n", "rank", "left_members", "right_members", "bias_members"])
def low_rank_linear_kernel(
    out, x, left, right, coeffs, bias, table, owner, m: tl.int64, n: tl.int64, rank: tl.int64,
    left_members: tl.int64, right_members: tl.int64, bias_members: tl.int64, ADD: tl.constexpr,
    WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """``left_members`` and its like: how many neighbouring members share a factor.  ``RANKS``: a power of
    two, ``rank`` or more."""
    pid = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(owner + pid).to(tl.int64) * WIDTH
    member, first, count = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    row = (pid - tl.load(entry)) * _ROWS + tl.arange(0, _ROWS)
    inside = row < count
    left += member // left_members * m * rank
    right += member // right_members * n * rank
    # Columns of x, in chains.
    sums = tl.zeros((_ROWS, RANKS), tl.float32)
    which = tl.arange(0, RANKS)[None, :]
    from_x = x + (first + row)[:, None] * n
    for j in range(rank):
        chain = tl.zeros((_ROWS, _CHAINS), tl.float32)
        for at in range(0, n, _CHAINS):
            column = at + tl.arange(0, _CHAINS)
            mask = column < n
            values = to_float(
                tl.load(from_x + column[None, :], mask=inside[:, None] & mask[None, :], other=0.0)
            )
            factor = tl.load(right + column * rank + j, mask=mask, other=0.0)
            chain = fma(values, factor[None, :], chain)
        sums = tl.where(which == j, _sum_of_chains(chain)[:, None], sums)
    # Columns of out.
    coeff = tl.load(coeffs + member)
    to = out + (first + row)[:, None] * m
    for at in range(0, m, _COLUMNS):
        column = at + tl.arange(0, _COLUMNS)
        product = tl.zeros((_ROWS, _COLUMNS), tl.float32)
        for j in range(rank):
            # one sum and zeros: exact in any order
            inner = tl.sum(tl.where(which == j, sums, 0.0), 1)
            factor = tl.load(left + column * rank + j, mask=column < m, other=0.0)
            product = fma(inner[:, None], factor[None, :], product)
        if bias is not None:
            own = bias + member // bias_members * m
            product += tl.load(own + column, mask=column < m, other=0.0)[None, :]
        mask = inside[:, None] & (column < m)[None, :]
        if ADD:
            y = to_float(tl.load(to + column[None, :], mask=mask, other=0.0))
        else:
            y = tl.zeros((_ROWS, _COLUMNS), tl.float32)
        value = round_nearest(fma(coeff, product, y), out.dtype.element_ty)
        tl.store(to + column[None, :], value, mask=mask)


@implements
def low_rank_linear(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    coeffs: Tensor,
    rows: list[int],
    bias: Tensor | None,
    add: bool,
) -> None:
    entries, first = [], 0
    for member, count in enumerate(rows):
        if count:
            entries.append((triton.cdiv(count, ROWS), member, first, count))
        first += count
    members = lambda factor: 1 if factor is None else len(rows) // len(factor)
    (m, rank), n = left.shape[1:], x.shape[1]
    with on_device(y.device):
        table = table_of(y.device, tuple(entries))
        assert table is not None  # no step with a batched forward is captured
        low_rank_linear_kernel[(table.owner.numel(),)](
            y, x, left, right, coeffs, bias, table.rows, table.owner, m, n, rank,
            members(left), members(right), members(bias), ADD=add, WIDTH=len(entries[0]),
            RANKS=triton.next_power_of_2(rank), **options(y.device),
        )  # fmt: skip
