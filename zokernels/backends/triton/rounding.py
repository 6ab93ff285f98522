"""Conversions in Triton from a tensor's dtype to fp32, and back: to nearest even, or stochastically."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRET, PTX, floor

_TINY_HALF = tl.constexpr(2.0**-14)  # the smallest normal fp16
_WHOLE = tl.constexpr(2.0**23)  # from here on every fp32 number is an integer


@triton.jit
def to_float(x):
    """``x`` in fp32, which is exact.

    A bf16 number is the high half of its fp32 form.  As an integer it is shifted by one instruction; a
    conversion takes 1.5.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _high_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:  # NumPy has no bf16
        bits = x.to(tl.uint32, bitcast=True)
        return _high_half(tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000))
    else:
        return x.to(dtype)


@triton.jit
def round_stochastic(x, u16, dtype: tl.constexpr):
    """fp32 ``x`` in ``dtype``, rounded away from zero with the probability that the dropped fraction is.

    ``u16``: a random field for each element, uint32 in [0, 65536).  The reference (``reference/rounding.py``)
    says how it is used.  Infinities stay what they are, because to a mantissa of 0 nothing is carried over.
    """
    if dtype == tl.bfloat16:
        if PTX and not INTERPRET:
            # A NaN that NVIDIA's arithmetic makes is 0x7fffffff, and an addition would make a number of it.
            # The minimum of integers makes 0x7fff0000 of it.  All numbers and infinities are smaller as
            # int32, negative ones too, and other NaNs that come here end in 16 zeros.
            bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)
        else:  # other arithmetic passes on the NaNs of its operands, which have either sign and any bits
            bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        return _high_half(bits + u16)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = tl.abs(x)
        subnormal = magnitude < _TINY_HALF
        shifted = tl.where(subnormal, magnitude + _TINY_HALF, magnitude).to(tl.uint32, bitcast=True)
        rounded = ((shifted + (u16 >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        rounded = tl.where(subnormal, rounded - _TINY_HALF, rounded).to(tl.uint32, bitcast=True)
        signed = (rounded | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        return tl.where(x == x, signed, x).to(dtype)


@triton.jit
def rint(x):
    """x >= 0 rounded to the nearest integer, ties to even: adding 2^23 drops the fraction."""
    return tl.where(x < _WHOLE, (x + _WHOLE) - _WHOLE, x)


@triton.jit
def round_integer(x, u16, low, high):
    """``x`` as an int8 in [low, high], where NaN becomes ``low``.

    ``u16``: as for :func:`round_stochastic`; None rounds to nearest, ties to even.
    """
    if u16 is not None:
        x += u16.to(tl.int32).to(tl.float32) * 2.0**-16
    # The bounds are integers, so clamping first changes nothing, and makes the cast safe.
    x = tl.where(x >= low, tl.where(x <= high, x, high), low)
    if u16 is None:
        # In the sum with 1.5 * 2^23 the last bits of the mantissa are the integer.
        return (x + 1.5 * _WHOLE).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return floor(x).to(tl.int8)
