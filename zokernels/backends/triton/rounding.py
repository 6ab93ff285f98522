"""A tensor's dtype to fp32 and back, to nearest even or stochastically with given 16-bit fields, in
Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRET, PTX, floor

_TINY_HALF = tl.constexpr(2.0**-14)  # the smallest normal fp16
_WHOLE = tl.constexpr(2.0**23)  # from here on fp32 are integers


@triton.jit
def to_float(x):
    """Exact.

    A bf16 is the high half of its fp32: as integers the unpacking is one instruction, cvt would take 1.5.
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
    """Away from zero with probability equal to the dropped fraction; ``u16``: uint32 in [0, 65536).

    bf16 adds the field to the 16 dropped bits and truncates; fp16 adds the top 13 bits of it to the 13
    dropped ones. Below 2^-14 an fp16 drops more bits than 13: there |x| is first added to 2^-14, which puts
    the last kept bit of a subnormal in the place of the last kept bit of a normal.  Infinities stay: their
    mantissa of 0 carries nothing over."""
    if dtype == tl.bfloat16:
        if PTX and not INTERPRET:
            # A NaN that NVIDIA's arithmetic makes has all bits but the sign set, to which nothing may be
            # added.  As integers all numbers and infinities are smaller, negative ones too, and other NaNs
            # here end in zeros.
            bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)
        else:  # other arithmetic passes the NaNs of its operands on, of either sign and with any bits
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
    """The nearest integer, ties to even, of 0 <= x."""
    return tl.where(x < _WHOLE, (x + _WHOLE) - _WHOLE, x)


@triton.jit
def round_integer(x, u16, low, high):
    """To int8 in [low, high]; NaN becomes ``low``.  ``u16``: as above; None: to nearest, ties to even."""
    if u16 is not None:
        x += u16.to(tl.int32).to(tl.float32) * 2.0**-16
    # The bounds are integers, so clamping first changes nothing, and makes the cast safe.
    x = tl.where(x >= low, tl.where(x <= high, x, high), low)
    if u16 is None:
        # the sum's last bits are the integer's
        return (x + 1.5 * _WHOLE).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return floor(x).to(tl.int8)
