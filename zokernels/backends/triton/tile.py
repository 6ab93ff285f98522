"""What element-wise kernels share: which elements a program owns, and how it loads, draws, masks and rounds.

A program owns PROGRAM consecutive logical indices, from a multiple of PROGRAM on, whatever the offset of the
tensor is.  So no block of eight normals and no Rademacher tile is divided between programs, and the high word
of the blocks' numbers is one scalar.  A thread owns whole blocks of eight elements.  A block is one access of
16 bytes, or two in fp32.

A tile is some of these blocks, B in number.  ``row``, int32 [B], are their numbers in the program.  A value
of each element is a tensor [B, 8].  ``inside``, bool [B, 8], says which of the elements exist.  ``inside`` is
None where all exist and the pointers are multiples of 16 bytes.

An option is a value that a kernel may be compiled without: the tuple ``(value,)`` where there is one, and
``()`` where there is none.  The compiler knows ``len(option)``, so it decides a branch on it.  None would not
do: Triton 3.6 tries to make a tensor of a None that a function returns within a tuple.  Arguments of a kernel
can be None."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contract import DOMAIN_MASK, DOMAIN_NORMAL, DOMAIN_RADEMACHER, DOMAIN_ROUNDING
from .arithmetic import fma, int64
from .noise import normal, rademacher, uniform16
from .philox import philox, stream_words, words
from .rounding import round_integer, round_nearest, round_stochastic, to_float

NUM_WARPS = 4
#: Logical indices of a program: for each warp a Rademacher tile of 4096.
PROGRAM = 4096 * NUM_WARPS

_PROGRAM, _PROGRAM_SHIFT = tl.constexpr(PROGRAM), tl.constexpr(PROGRAM.bit_length() - 1)
_NORMAL, _RADEMACHER = tl.constexpr(DOMAIN_NORMAL), tl.constexpr(DOMAIN_RADEMACHER)
_MASK, _ROUNDING = tl.constexpr(DOMAIN_MASK), tl.constexpr(DOMAIN_ROUNDING)
THREADS = tl.constexpr(32 * NUM_WARPS)


class Span(NamedTuple):
    """Where the elements of one program are."""

    index: Any  #: int64: the program's first logical index, a multiple of PROGRAM
    start: Any  #: int64: the place of that element in the tensor, negative where the tensor begins after it
    stream: Any  #: int64, of 56 bits
    mask: Any  #: a pointer to the byte of the packed mask for the first block, as an option
    #: How many blocks after index / 8 each block of a tile comes, [B], as an option.  Where it is absent, it
    #: is ``row``.
    block: Any


class Noise(NamedTuple):
    """The fields of ``backends.terms.Terms`` inside of a kernel."""

    seeds: Any  #: K int64 values, or a pointer to num_k of them
    coeffs: Any  #: fp32, in the same form
    num_k: Any  #: int32, as an option; it is absent where the kernel is compiled for the number of directions
    decay: Any  #: fp32, as an option
    rounding_seed: Any  #: int64, as an option; where it is absent, rounding is to nearest
    random_mask: Any  #: (mask_seed int64, mask_keep int32), or ()
    mantissa: Any  #: what :func:`mantissa` gives, as an option; where it is absent, noise is Rademacher noise
    bounds: Any  #: (low, high) for int8 tensors; () for other dtypes


@triton.jit
def moved(ptr, count):
    """The pointer ``count`` elements after ``ptr``, as an option."""
    if ptr is None:
        return ()
    else:
        return (ptr + count,)


@triton.jit
def span_of(offset, stream, mask, pid):
    """The span of program ``pid`` of a tensor; ``mask``: the pointer to its packed mask, or None."""
    offset, stream = int64(offset), int64(stream)
    index = ((offset >> _PROGRAM_SHIFT) + pid) << _PROGRAM_SHIFT
    return Span(index, index - offset, stream, moved(mask, (index >> 3) - (offset >> 3)), ())


@triton.jit
def tabled_span(row, mask, pid):
    """numel of a tensor in a table (``launch.jobs``), and the span of its program ``pid``."""
    numel = tl.load(row + 2)
    return numel, span_of(tl.load(row + 3), tl.load(row + 4), mask, pid)


@triton.jit
def coeffs_of(coeffs, row, num_k, EACH: tl.constexpr):
    """The coefficients of a row's tensor: where EACH, its own of [tensors, K]; else those of all."""
    if EACH:
        return coeffs + tl.load(row + 1) * num_k
    else:
        return coeffs


@triton.jit
def _scalar(ptr):
    """The number that a pointer points to, as an option."""
    if ptr is None:
        return ()
    else:
        return (tl.load(ptr),)


@triton.jit
def mantissa(num_k):
    """The constant 0x007fffff in a register, for ``noise.normal8``.

    (n & a) | b is one instruction, LOP3, if at most one of a and b is an immediate; with two it is a second
    LOP3 for each radius, 0.5 instructions for a normal.  ptxas does not know that num_k is not negative, so
    to it this is no constant."""
    return 0x007FFFFF | (num_k >> 31).to(tl.uint32)


@triton.jit
def noise_of(
    seeds, coeffs, num_k, decay, rounding_seed, mask_seed, mask_keep, DOMAIN: tl.constexpr, K: tl.constexpr,
    LOW: tl.constexpr = None, HIGH: tl.constexpr = None,
):  # fmt: skip
    decay, rounding_seed = _scalar(decay), _scalar(rounding_seed)
    random_mask = () if mask_seed is None else (tl.load(mask_seed), mask_keep)
    normals = (mantissa(num_k),) if DOMAIN == _NORMAL else ()
    bounds = () if LOW is None else (LOW, HIGH)
    if K is None:
        return Noise(seeds, coeffs, (num_k,), decay, rounding_seed, random_mask, normals, bounds)
    else:
        seed_list, coeff_list = (), ()
        for k in tl.static_range(K):
            seed_list += (tl.load(seeds + k),)
            coeff_list += (tl.load(coeffs + k),)
        return Noise(seed_list, coeff_list, (), decay, rounding_seed, random_mask, normals, bounds)


@triton.jit
def is_whole(span, numel, ALIGNED: tl.constexpr):
    """Whether all elements of the program exist, and its blocks begin at multiples of 16 bytes."""
    if ALIGNED:
        return (span.start >= 0) & (span.start + _PROGRAM <= numel)
    else:
        return ALIGNED


@triton.jit
def each_tile(TILE: tl.constexpr, span, numel, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, args):
    """Calls TILE(row, inside, span, *args) for every tile of the program.

    BLOCKS: how many blocks a thread has at once in a whole program.
    """
    if is_whole(span, numel, ALIGNED):
        for first in range(0, _PROGRAM // 8, BLOCKS * THREADS):
            TILE(first + tl.arange(0, BLOCKS * THREADS), None, span, *args)
    else:
        each_edge_tile(TILE, span, numel, args)


@triton.jit
def edges(span, numel, program: tl.constexpr = _PROGRAM):
    """The range (first, last + 1) of those elements of a program that exist."""
    return tl.maximum(-span.start, 0).to(tl.int32), tl.minimum(numel - span.start, program).to(tl.int32)


@triton.jit
def each_edge_tile(TILE: tl.constexpr, span, numel, args):
    """:func:`each_tile` for the edges of a tensor, and for pointers that are no multiples of 16 bytes."""
    begin, end = edges(span, numel)
    for first in range(begin // (8 * THREADS) * THREADS, (end + 7) // 8, THREADS):
        row = first + tl.arange(0, THREADS)
        element = row[:, None] * 8 + tl.arange(0, 8)[None, :]
        TILE(row, (element >= begin) & (element < end), span, *args)


@triton.jit
def load(ptr, row, inside, span):
    """The elements of a tile of the tensor at ``ptr``, fp32 [B, 8]."""
    base = ptr + span.start
    if inside is not None:
        return to_float(tl.load(base + (row[:, None] * 8 + tl.arange(0, 8)[None, :]), mask=inside, other=1.0))
    else:
        base = tl.multiple_of(base, 16) + row[:, None] * 8
        if ptr.dtype.element_ty == tl.float32:  # 16 bytes are half a block
            quad = base + tl.arange(0, 4)[None, :]
            return tl.join(tl.load(quad), tl.load(quad + 4)).permute(0, 2, 1).reshape(row.shape[0], 8)
        else:
            return to_float(tl.load(base + tl.arange(0, 8)[None, :]))


@triton.jit
def store(ptr, x, row, inside, span):
    base = ptr + span.start
    if inside is not None:
        tl.store(base + (row[:, None] * 8 + tl.arange(0, 8)[None, :]), x, mask=inside)
    else:
        base = tl.multiple_of(base, 16) + row[:, None] * 8
        if ptr.dtype.element_ty == tl.float32:
            quad = base + tl.arange(0, 4)[None, :]
            low, high = x.reshape(row.shape[0], 2, 4).permute(0, 2, 1).split()
            tl.store(quad, low)
            tl.store(quad + 4, high)
        else:
            tl.store(base + tl.arange(0, 8)[None, :], x)


@triton.jit
def _block(row, span):
    if len(span.block) == 0:
        return row
    else:
        return span.block[0]


@triton.jit
def draw(seed, row, span, DOMAIN: tl.constexpr):
    """The Philox words of a tile's blocks."""
    block_lo, block_hi = words(span.index >> 3)
    stream, domain = stream_words(span.stream, DOMAIN)
    return philox(block_lo + _block(row, span).to(tl.uint32), block_hi, stream, domain, seed)


@triton.jit
def draw_rademacher(seed, block, span):
    """The Philox words of the Rademacher blocks ``block``, numbered in the program, 32 to a tile of 4096."""
    block_lo, block_hi = words(span.index >> 7)
    stream, domain = stream_words(span.stream, _RADEMACHER)
    return philox(block_lo + block.to(tl.uint32), block_hi, stream, domain, seed)


@triton.jit
def _uniform16(seed, row, span, DOMAIN: tl.constexpr):
    w0, w1, w2, w3 = draw(seed, row, span, DOMAIN)
    return uniform16(w0, w1, w2, w3)


@triton.jit
def noise(seed, row, span, terms):
    """z of a tile, fp32 [B, 8]."""
    if len(terms.mantissa) == 1:
        w0, w1, w2, w3 = draw(seed, row, span, _NORMAL)
        return normal(w0, w1, w2, w3, terms.mantissa[0])
    else:
        block = _block(row, span)
        return rademacher(draw_rademacher(seed, (block >> 9) * 32 + (block & 31), span), (block >> 5) & 15)


@triton.jit
def zeros_like(x, count):
    """Zeros of the shape of ``x``, for a loop that adds up ``count`` terms, an option (absent: it is
    unrolled).

    In a loop they must not be constants.  Triton would give these another layout than the terms, and each
    term would pass through shared memory: momentum with one direction took 46 instructions for an element,
    not 35."""
    if len(count) == 0:
        return tl.zeros_like(x)
    else:  # zeros, but the compiler does not know that a count is not negative
        return (x.to(tl.uint32, bitcast=True) & (count[0] >> 31).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def weighted(z, root):
    if len(root) == 0:
        return z
    else:
        return tl.div_rn(z, root[0])


@triton.jit
def accumulate(acc, row, span, terms, root):
    """acc + sum_k c_k w_k, as a chain of fmas.  w is z / root, or z where the option ``root`` is absent."""
    if len(terms.num_k) == 1:
        for k in range(terms.num_k[0]):
            w = weighted(noise(tl.load(terms.seeds + k), row, span, terms), root)
            acc = fma(tl.load(terms.coeffs + k), w, acc)
    else:
        for k in tl.static_range(len(terms.seeds)):
            acc = fma(terms.coeffs[k], weighted(noise(terms.seeds[k], row, span, terms), root), acc)
    return acc


@triton.jit
def decayed(x, terms):
    if len(terms.decay) == 0:
        return x
    else:
        return terms.decay[0] * x


@triton.jit
def _packed(row, inside, span):
    # Without this hint a thread would load the bytes of several neighbouring blocks, and hand them to their
    # threads through shared memory.
    row = tl.max_contiguous(row, 1)
    if inside is None:
        byte = tl.load(span.mask[0] + row)
    else:
        byte = tl.load(span.mask[0] + row, mask=tl.max(inside.to(tl.int32), 1) > 0, other=0)
    return ((byte[:, None].to(tl.int32) >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def kept(row, inside, span, terms):
    """Which elements the masks keep, bool [B, 8], as an option; it is absent where all are kept."""
    if len(terms.random_mask) == 0:
        if len(span.mask) == 0:
            return ()
        else:
            return (_packed(row, inside, span),)
    else:
        drawn = _uniform16(terms.random_mask[0], row, span, _MASK) < terms.random_mask[1]
        if len(span.mask) == 0:
            return (drawn,)
        else:
            return (_packed(row, inside, span) & drawn,)


@triton.jit
def choose(keep, x, otherwise):
    if len(keep) == 0:
        return x
    else:
        return tl.where(keep[0], x, otherwise)


@triton.jit
def rounded(acc, dtype: tl.constexpr, row, span, terms, DOMAIN: tl.constexpr = _ROUNDING):
    """``acc`` in ``dtype``: the one rounding of an operation."""
    if dtype == tl.float32:
        return acc
    elif len(terms.rounding_seed) == 0:
        if dtype == tl.int8:
            return round_integer(acc, None, terms.bounds[0], terms.bounds[1])
        else:
            return round_nearest(acc, dtype)
    else:
        u16 = _uniform16(terms.rounding_seed[0], row, span, DOMAIN)
        if dtype == tl.int8:
            return round_integer(acc, u16, terms.bounds[0], terms.bounds[1])
        else:
            return round_stochastic(acc, u16, dtype)
