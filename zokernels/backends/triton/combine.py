"""combine: theta = round(decay * theta + sum_k c_k z_k), one pass, in Triton.

A program owns PROGRAM consecutive logical indices that begin at a multiple of PROGRAM, whatever the offset: so blocks
of eight normals and Rademacher tiles lie whole in one program, and the high word of its block index is one scalar.  A
thread owns whole blocks of eight elements, and a block is one 16-byte access (two in fp32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...contract import DOMAIN_NORMAL, DOMAIN_RADEMACHER, DOMAIN_ROUNDING
from .arithmetic import fma
from .noise import add_rademacher, normal, rademacher, uniform16
from .philox import philox, words
from .rounding import round_nearest, round_stochastic, to_float

NUM_WARPS = 4
#: One Rademacher tile of 4096 a warp.
PROGRAM = 4096 * NUM_WARPS

_PROGRAM, _PROGRAM_SHIFT = tl.constexpr(PROGRAM), tl.constexpr(PROGRAM.bit_length() - 1)
_NORMAL, _RADEMACHER = tl.constexpr(DOMAIN_NORMAL), tl.constexpr(DOMAIN_RADEMACHER)
_ROUNDING = tl.constexpr(DOMAIN_ROUNDING)
_THREADS = tl.constexpr(32 * NUM_WARPS)
#: Blocks a thread handles at once where nothing is masked: four loads in flight.
_BLOCKS = tl.constexpr(4)


@triton.jit
def _load(ptr, row):
    """fp32 [B, 8]: elements 8 row + (0..7) of ``ptr``, which lies on 16 bytes."""
    base = ptr + row[:, None] * 8
    if ptr.dtype.element_ty == tl.float32:  # 16 bytes are half a block
        quad = base + tl.arange(0, 4)[None, :]
        return tl.join(tl.load(quad), tl.load(quad + 4)).permute(0, 2, 1).reshape(row.shape[0], 8)
    else:
        return to_float(tl.load(base + tl.arange(0, 8)[None, :]))


@triton.jit
def _store(ptr, x, row):
    base = ptr + row[:, None] * 8
    if ptr.dtype.element_ty == tl.float32:
        quad = base + tl.arange(0, 4)[None, :]
        low, high = x.reshape(row.shape[0], 2, 4).permute(0, 2, 1).split()
        tl.store(quad, low)
        tl.store(quad + 4, high)
    else:
        tl.store(base + tl.arange(0, 8)[None, :], x)


@triton.jit
def _draw(seed, index, row, stream, DOMAIN: tl.constexpr):
    """Words of the blocks that hold elements 8 row + (0..7) from logical index ``index``, a multiple of PROGRAM."""
    block_lo, block_hi = words(index >> 3)
    return philox(block_lo + row.to(tl.uint32), block_hi, stream, tl.full((), DOMAIN, tl.uint32), seed)


@triton.jit
def _round(acc, dtype: tl.constexpr, rounding_seed, index, row, stream):
    if rounding_seed is None or dtype == tl.float32:
        return round_nearest(acc, dtype)
    else:
        w0, w1, w2, w3 = _draw(rounding_seed, index, row, stream, _ROUNDING)
        return round_stochastic(acc, uniform16(w0, w1, w2, w3), dtype)


@triton.jit
def _mantissa(num_k):
    """0x007fffff in a register.  LOP3 takes one immediate, so two constants in (n & a) | b would cost a second LOP3 for
    each radius, 0.5 instructions per normal; ptxas does not know that num_k is not negative."""
    return 0x007FFFFF | (num_k >> 31).to(tl.uint32)


@triton.jit
def _add_normal(acc, seed, c, index, row, stream, mantissa):
    w0, w1, w2, w3 = _draw(seed, index, row, stream, _NORMAL)
    return fma(c, normal(w0, w1, w2, w3, mantissa), acc)


@triton.jit
def _full_normal(out, theta, index, stream, seeds, coeffs, num_k, decay, rounding_seed, K: tl.constexpr):
    mantissa = _mantissa(num_k)
    for first in range(0, _PROGRAM // 8, _BLOCKS * _THREADS):
        row = first + tl.arange(0, _BLOCKS * _THREADS)
        acc = _load(theta, row)
        if decay is not None:
            acc = decay * acc
        if K is None:
            for k in range(num_k):
                acc = _add_normal(acc, tl.load(seeds + k), tl.load(coeffs + k), index, row, stream, mantissa)
        else:
            for k in tl.static_range(K):
                acc = _add_normal(acc, seeds[k], coeffs[k], index, row, stream, mantissa)
        _store(out, _round(acc, out.dtype.element_ty, rounding_seed, index, row, stream), row)


@triton.jit
def _add_rademacher4(x0, x1, x2, x3, seed, c, index, lane, stream, WORD: tl.constexpr):
    block_lo, block_hi = words(index >> 7)  # 32 blocks a tile of 4096
    # Where K is static, the compiler makes one of the four calls with the same block: 128 elements a Philox block.
    block = philox(block_lo + lane.to(tl.uint32), block_hi, stream, tl.full((), _RADEMACHER, tl.uint32), seed)
    x0 = add_rademacher(x0, c, block[WORD], 0)
    x1 = add_rademacher(x1, c, block[WORD], 1)
    x2 = add_rademacher(x2, c, block[WORD], 2)
    x3 = add_rademacher(x3, c, block[WORD], 3)
    return x0, x1, x2, x3


@triton.jit
def _full_rademacher(out, theta, index, stream, seeds, coeffs, num_k, decay, rounding_seed, K: tl.constexpr):
    lane = tl.arange(0, _THREADS)  # a block each: lane & 31 of tile lane >> 5
    dtype: tl.constexpr = out.dtype.element_ty
    for word in tl.static_range(4):
        r0 = (lane >> 5) * 512 + (lane & 31) + 128 * word
        r1, r2, r3 = r0 + 32, r0 + 64, r0 + 96
        x0, x1, x2, x3 = _load(theta, r0), _load(theta, r1), _load(theta, r2), _load(theta, r3)
        if decay is not None:
            x0, x1, x2, x3 = decay * x0, decay * x1, decay * x2, decay * x3
        if K is None:
            for k in range(num_k):
                seed, c = tl.load(seeds + k), tl.load(coeffs + k)
                x0, x1, x2, x3 = _add_rademacher4(x0, x1, x2, x3, seed, c, index, lane, stream, word)
        else:
            for k in tl.static_range(K):
                x0, x1, x2, x3 = _add_rademacher4(x0, x1, x2, x3, seeds[k], coeffs[k], index, lane, stream, word)
        _store(out, _round(x0, dtype, rounding_seed, index, r0, stream), r0)
        _store(out, _round(x1, dtype, rounding_seed, index, r1, stream), r1)
        _store(out, _round(x2, dtype, rounding_seed, index, r2, stream), r2)
        _store(out, _round(x3, dtype, rounding_seed, index, r3, stream), r3)


@triton.jit
def _masked(out, theta, begin, end, index, stream, seeds, coeffs, num_k, decay, rounding_seed, DOMAIN: tl.constexpr):
    """Elements begin <= i < end of the program, for the edges of a tensor and for pointers off 16 bytes."""
    mantissa = _mantissa(num_k)
    for first in range(begin // (8 * _THREADS) * _THREADS, (end + 7) // 8, _THREADS):
        row = first + tl.arange(0, _THREADS)
        element = row[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = (element >= begin) & (element < end)
        acc = to_float(tl.load(theta + element, mask=inside, other=0.0))
        if decay is not None:
            acc = decay * acc
        for k in range(num_k):
            seed, c = tl.load(seeds + k), tl.load(coeffs + k)
            if DOMAIN == _NORMAL:
                acc = _add_normal(acc, seed, c, index, row, stream, mantissa)
            else:
                block_lo, block_hi = words(index >> 7)
                block_lo += ((row >> 9) * 32 + (row & 31)).to(tl.uint32)
                block = philox(block_lo, block_hi, stream, tl.full((), DOMAIN, tl.uint32), seed)
                acc += c * rademacher(block, (row >> 5) & 15)
        tl.store(out + element, _round(acc, out.dtype.element_ty, rounding_seed, index, row, stream), mask=inside)


@triton.jit
def _program(
    out, theta, numel, offset, stream, pid, seeds, coeffs, num_k, decay, rounding_seed,
    DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    index = ((offset >> _PROGRAM_SHIFT) + pid) << _PROGRAM_SHIFT
    start = index - offset
    out += start
    theta += start
    stream = stream.to(tl.uint32)
    if decay is not None:
        decay = tl.load(decay)
    if rounding_seed is not None:
        rounding_seed = tl.load(rounding_seed)
    full = ALIGNED
    if ALIGNED:
        full = (start >= 0) & (start + _PROGRAM <= numel)
    if full:
        out, theta = tl.multiple_of(out, 16), tl.multiple_of(theta, 16)
        if K is not None:
            seed_list, coeff_list = (), ()
            for k in tl.static_range(K):
                seed_list += (tl.load(seeds + k),)
                coeff_list += (tl.load(coeffs + k),)
        else:
            seed_list, coeff_list = seeds, coeffs
        if DOMAIN == _NORMAL:
            _full_normal(out, theta, index, stream, seed_list, coeff_list, num_k, decay, rounding_seed, K)
        else:
            _full_rademacher(out, theta, index, stream, seed_list, coeff_list, num_k, decay, rounding_seed, K)
    else:
        begin = tl.maximum(-start, 0).to(tl.int32)
        end = tl.minimum(numel - start, _PROGRAM).to(tl.int32)
        _masked(out, theta, begin, end, index, stream, seeds, coeffs, num_k, decay, rounding_seed, DOMAIN)


@triton.jit(do_not_specialize=["numel", "offset", "stream", "num_k"])
def combine_kernel(
    out, theta, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tensor."""
    pid = tl.program_id(0).to(tl.int64)
    _program(out, theta, numel, offset, stream, pid, seeds, coeffs, num_k, decay, rounding_seed, DOMAIN, K, ALIGNED)


@triton.jit(do_not_specialize=["num_k"])
def combine_table_kernel(
    table, owner, seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    DTYPE: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Many tensors: row owner[program] of ``table`` is (out, theta, numel, offset, stream, first program)."""
    pid = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owner + pid).to(tl.int64) * 6
    out = tl.load(row).to(tl.pointer_type(DTYPE))
    theta = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    numel, offset, stream = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    pid -= tl.load(row + 5)
    _program(out, theta, numel, offset, stream, pid, seeds, coeffs, num_k, decay, rounding_seed, DOMAIN, K, ALIGNED)
