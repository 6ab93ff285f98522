"""z of contract ``zk1`` from Philox words, in Triton.

Normal noise: word p gives the radius and word p + 1 the angle of the pair (2p, 2p + 1), by the method of Box
and Muller with polynomials.  Rademacher noise: one bit of the block's 16 bytes says whether it is +1 or -1.
The reference (``reference/noise.py``) says the same in PyTorch.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ... import contract
from .arithmetic import INTERPRET, PTX, add_apart, fma, sqrt


def _f32(bits: int) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


_NC2, _LK = _f32(contract.NORMAL_NC2), _f32(contract.NORMAL_LK)
_R0, _R1, _R2, _R3, _R4 = (_f32(bits) for bits in contract.NORMAL_R)
_COS0, _COS1, _COS2, _COS3 = (_f32(bits) for bits in contract.NORMAL_COS)
_SIN0, _SIN1, _SIN2, _SIN3 = (_f32(bits) for bits in contract.NORMAL_SIN)


@triton.jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight [B] tensors as one [B, 8].  A join adds an axis inside of each thread, so no data moves."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.join(even, odd).reshape(x0.shape[0], 8)


@triton.jit
def _signed_radius(v, mantissa):
    """The radius that a word stands for, with the sign that is the word's highest bit."""
    n = v.to(tl.int32, bitcast=True).to(tl.float32)
    bits = n.to(tl.uint32, bitcast=True)
    m = ((bits & mantissa) | 0x3F800000).to(tl.float32, bitcast=True)
    ef = (bits & 0x7F800000).to(tl.int32, bitcast=True).to(tl.float32)
    q = fma(_R4, m, _R3)
    q = fma(q, m, _R2)
    q = fma(q, m, _R1)
    q = fma(q, m, _R0)
    s = fma(q, m, fma(ef, _NC2, _LK))
    return (sqrt(s).to(tl.uint32, bitcast=True) ^ (v & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _turned(r, t):
    """The two normals that a radius with a sign and an angle give."""
    y = t * t
    cos = fma(_COS3, y, _COS2)
    cos = fma(cos, y, _COS1)
    cos = fma(cos, y, _COS0)
    sin = fma(_SIN3, y, _SIN2)
    sin = fma(sin, y, _SIN1)
    sin = fma(sin, y, _SIN0)
    return r * cos, r * (sin * t)


def _turn_two() -> str:
    """PTX of :func:`_turned` for two radii, $4 and $6, and their angles, $5 and $7: an instruction serves
    both.

    The radii are computed one by one.  An instruction for two takes both halves of the fp32 pipe, and one
    half is needed for Philox's products at that time (csrc/cuda/pair.cuh)."""
    lines = [".reg .b64 r, t, y, cos, sin, k;", "mov.b64 r, {$4, $6};", "mov.b64 t, {$5, $7};"]
    lines += ["mul.rn.f32x2 y, t, t;"]
    for name, coefficients in (("cos", contract.NORMAL_COS), ("sin", contract.NORMAL_SIN)):
        *others, first = (f"0x{bits:08x}{bits:08x}" for bits in coefficients)
        lines.append(f"mov.b64 {name}, {first};")
        for both in reversed(others):
            lines += [f"mov.b64 k, {both};", f"fma.rn.f32x2 {name}, {name}, y, k;"]
    lines += ["mul.rn.f32x2 cos, r, cos;", "mul.rn.f32x2 sin, sin, t;", "mul.rn.f32x2 sin, r, sin;"]
    lines += ["mov.b64 {$0, $2}, cos;", "mov.b64 {$1, $3}, sin;"]
    return f"{{ {' '.join(lines)} }}"


_TURN_TWO = tl.constexpr(_turn_two())


@triton.jit
def _normal_pairs(v, w, x, mantissa):
    """The two normals of radius v and angle w, and the two of radius w and angle x.

    sm_100 has instructions for two fp32 numbers at once.  Elsewhere the second pair is computed after the
    first, which takes fewer registers.
    """
    t0, t1 = w.to(tl.int16).to(tl.float32), x.to(tl.int16).to(tl.float32)
    if PTX and not INTERPRET and cuda_capability_geq(10, 0) and not cuda_capability_geq(11, 0):
        r0, r1 = _signed_radius(v, mantissa), _signed_radius(w, mantissa)
        z0, z1, z2, z3 = tl.inline_asm_elementwise(
            _TURN_TWO,
            "=f,=f,=f,=f,f,f,f,f",
            [r0, t0, r1, t1],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        z0, z1 = _turned(_signed_radius(v, mantissa), t0)
        z2, z3 = _turned(_signed_radius(w, mantissa), t1)
    return z0, z1, z2, z3


@triton.jit
def normal8(w0, w1, w2, w3, mantissa):
    """The eight normals of each block, as eight fp32 [B], from its four words [B].

    ``mantissa``: the scalar 0x007fffff, in a register (``tile.mantissa`` says why).
    """
    v0, v1, v2, v3 = w0 | 1, w1 | 1, w2 | 1, w3 | 1
    z0, z1, z2, z3 = _normal_pairs(v0, v1, v2, mantissa)
    z4, z5, z6, z7 = _normal_pairs(v2, v3, v0, mantissa)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit
def normal(w0, w1, w2, w3, mantissa):
    """:func:`normal8` as one tensor, fp32 [B, 8]."""
    return join8(*normal8(w0, w1, w2, w3, mantissa))


@triton.jit
def add_rademacher(acc, c, unit, rounding, word, byte: tl.constexpr):
    """acc + c w for acc [B, 8], where the signs of w are the bits of one byte of ``word`` [B].

    c * (+-1) is exact, so the fma of the contract is an addition of c, with its sign bit flipped where z is
    -1.

    Args:
        unit: |w|, as an option (``tile``); where it is absent, |w| is 1.
        rounding: the rounding seed, as an option.  With it Philox is computed for each element, too, and sums
        are
            kept apart (``arithmetic.add_apart``).
    """
    flip = (word[:, None] << (31 - 8 * byte - tl.arange(0, 8))[None, :].to(tl.uint32)) & 0x80000000
    signed = (c.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    if len(unit) != 0:
        return fma(signed, unit[0], acc)
    elif len(rounding) == 0:
        return acc + signed
    else:
        return add_apart(acc, signed)


@triton.jit
def rademacher(block, byte):
    """z, fp32 [B, 8], from byte number ``byte`` [B] of each row's Philox block.

    It is what :func:`add_rademacher` adds; this form is for the edges of tensors.
    """
    word = tl.where(byte < 8, tl.where(byte < 4, block[0], block[1]), tl.where(byte < 12, block[2], block[3]))
    bit = (8 * (byte & 3))[:, None] + tl.arange(0, 8)[None, :]
    return 1.0 - 2.0 * ((word[:, None] >> bit.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def uniform16(w0, w1, w2, w3):
    """The eight 16-bit fields of each block of a mask or rounding domain, uint32 [B, 8], from its words."""
    return join8(w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16)


@triton.jit
def field16(w0, w1, w2, w3, at):
    """Field number ``at``, from 0 to 7, of each block; the words and ``at`` have one shape."""
    word = tl.where(at < 4, tl.where(at < 2, w0, w1), tl.where(at < 6, w2, w3))
    return (word >> 16 * (at & 1)) & 0xFFFF
