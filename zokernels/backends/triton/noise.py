"""z of contract ``zk1`` from Philox words, in Triton.

normal: word p gives the radius and word p + 1 the angle of the pair (2p, 2p + 1), Box-Muller in polynomials.
rademacher: +1 or -1 by one bit of the block's 16 bytes.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from ... import contract
from .arithmetic import fma, sqrt


def _f32(bits: int) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


_NC2, _LK = _f32(contract.NORMAL_NC2), _f32(contract.NORMAL_LK)
_R0, _R1, _R2, _R3, _R4 = (_f32(bits) for bits in contract.NORMAL_R)
_COS0, _COS1, _COS2, _COS3 = (_f32(bits) for bits in contract.NORMAL_COS)
_SIN0, _SIN1, _SIN2, _SIN3 = (_f32(bits) for bits in contract.NORMAL_SIN)


@triton.jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight [B] tensors as one [B, 8].  A join adds the fastest axis inside a thread: no data moves."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.join(even, odd).reshape(x0.shape[0], 8)


@triton.jit
def _normal_pair(v, w, mantissa):
    n = v.to(tl.int32, bitcast=True).to(tl.float32)
    bits = n.to(tl.uint32, bitcast=True)
    m = ((bits & mantissa) | 0x3F800000).to(tl.float32, bitcast=True)
    ef = (bits & 0x7F800000).to(tl.int32, bitcast=True).to(tl.float32)
    q = fma(_R4, m, _R3)
    q = fma(q, m, _R2)
    q = fma(q, m, _R1)
    q = fma(q, m, _R0)
    s = fma(q, m, fma(ef, _NC2, _LK))
    r = (sqrt(s).to(tl.uint32, bitcast=True) ^ (v & 0x80000000)).to(tl.float32, bitcast=True)
    t = w.to(tl.int16).to(tl.float32)
    y = t * t
    cos = fma(_COS3, y, _COS2)
    cos = fma(cos, y, _COS1)
    cos = fma(cos, y, _COS0)
    sin = fma(_SIN3, y, _SIN2)
    sin = fma(sin, y, _SIN1)
    sin = fma(sin, y, _SIN0)
    return r * cos, r * (sin * t)


@triton.jit
def normal8(w0, w1, w2, w3, mantissa):
    """Words [B] of each block to its eight normals, eight fp32 [B].  ``mantissa``: the scalar 0x007fffff."""
    v0, v1, v2, v3 = w0 | 1, w1 | 1, w2 | 1, w3 | 1
    z0, z1 = _normal_pair(v0, v1, mantissa)
    z2, z3 = _normal_pair(v1, v2, mantissa)
    z4, z5 = _normal_pair(v2, v3, mantissa)
    z6, z7 = _normal_pair(v3, v0, mantissa)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit
def normal(w0, w1, w2, w3, mantissa):
    """normal8 as fp32 [B, 8]."""
    return join8(*normal8(w0, w1, w2, w3, mantissa))


@triton.jit
def add_rademacher(acc, c, unit, word, byte: tl.constexpr):
    """acc + c w for acc [B, 8] and the bits of one byte of ``word`` [B]; w = z * unit, or z where ``unit``,
    an option (``tile``), is absent.

    c * (+-1) is exact, so the fma of the contract is an addition of c with its sign bit flipped.
    """
    flip = (word[:, None] << (31 - 8 * byte - tl.arange(0, 8))[None, :].to(tl.uint32)) & 0x80000000
    signed = (c.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    if len(unit) == 0:
        return acc + signed
    else:
        return fma(signed, unit[0], acc)


@triton.jit
def rademacher(block, byte):
    """z fp32 [B, 8] from one ``byte`` [B] of each row's Philox block: what add_rademacher adds, for
    masked edges.
    """
    word = tl.where(byte < 8, tl.where(byte < 4, block[0], block[1]), tl.where(byte < 12, block[2], block[3]))
    bit = (8 * (byte & 3))[:, None] + tl.arange(0, 8)[None, :]
    return 1.0 - 2.0 * ((word[:, None] >> bit.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def uniform16(w0, w1, w2, w3):
    """Words [B] of each block to its eight 16-bit fields, uint32 [B, 8]: the mask and rounding domains."""
    return join8(w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16)


@triton.jit
def field16(w0, w1, w2, w3, at):
    """Field ``at`` in 0..7 of each block, with words and ``at`` of one shape."""
    word = tl.where(at < 4, tl.where(at < 2, w0, w1), tl.where(at < 6, w2, w3))
    return (word >> 16 * (at & 1)) & 0xFFFF
