"""Operations of exact IEEE fp32 that Triton's language lacks, or that its interpreter rounds otherwise.

Compiled for NVIDIA, an operation is the instruction (or the inline PTX) that its docstring names.  For AMD it
is what Triton and LLVM make of the plain operation.  In the interpreter kernels run in NumPy, which has no
fma; there it is computed from exact float64 pieces, so that what tests show there holds for compiled code,
too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

#: Whether operations may be inline PTX: a process of torch for ROCm compiles for AMD, every other one for
#: NVIDIA.
PTX = tl.constexpr(torch.version.hip is None)

#: Whether kernels run in the interpreter.  Triton decides it when it decorates them, so TRITON_INTERPRET must
#: be set before the import.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

_INF = tl.constexpr(float("inf"))


@triton.jit
def int64(x):
    """``x``, an argument of a kernel that is annotated as int64, as an int64.

    Triton's interpreter keeps a number in [2^31, 2^32) as uint32, whatever the annotation is, and a shift of
    that by 32 has no meaning.  The sum with an int64 is one; compilers remove the addition of 0."""
    return x + tl.zeros((), tl.int64)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once.  fma.rn.f32"""
    if INTERPRET:
        # As in the reference (combine.fma): the product is exact in float64, and the sum is rounded to odd
        # (Boldo and Melquiond, 2008), so that the rounding to fp32 is right.
        p, d = tl.cast(a, tl.float64) * tl.cast(b, tl.float64), tl.cast(c, tl.float64)
        s = p + d
        t = s - p
        error = (p - (s - t)) + (d - t)
        bits = s.to(tl.int64, bitcast=True)
        away = tl.where((error > 0) == (s > 0), 1, -1).to(tl.int64)
        inexact_even = (error != 0) & ((bits & 1) == 0) & (tl.abs(s) < _INF)
        return tl.where(inexact_even, bits + away, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def add_apart(a, b):
    """a + b, as an instruction of its own: add.rn.f32.

    For sm_100 the compiler joins two sums into one instruction, which takes both halves of the fp32 pipe.  An
    instruction for one sum takes one half, and the other half computes Philox's integer products
    meanwhile."""
    if PTX and not INTERPRET and cuda_capability_geq(10, 0):
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a + b


@triton.jit
def negated(x):
    """-x: neg.f32.  Triton's own -x is 0 - x, which makes 0.0 of 0.0, where -0.0 is right."""
    return x * -1.0


@triton.jit
def sqrt(s):
    """sqrt(s) to nearest even, for 2^-100 < s < 2^100.

    This is the fast path of sqrt.rn.f32.  Its check of the range and its slow path would take 2.5
    instructions more for each normal.  ``.ftz`` treats subnormal arguments as 0, of which there are none in
    this range."""
    if INTERPRET or not PTX:
        return tl.sqrt_rn(s)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r, g, h, n, e;
            rsqrt.approx.ftz.f32 r, $1;
            mul.rn.f32 g, r, $1;
            mul.rn.f32 h, r, 0f3F000000;
            neg.f32 n, g;
            fma.rn.f32 e, n, g, $1;
            fma.rn.f32 $0, e, h, g; }""",
            "=f,f",
            [s],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def floor(x):
    """The largest integer <= x as an int32, for |x| < 2^31: cvt.rmi.s32.f32.

    Triton's own floor treats subnormal numbers as 0, so that of -1e-40 it makes 0, where -1 is right.  With
    the conversion it takes two instructions."""
    if INTERPRET or not PTX:
        return tl.floor(x).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rmi.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def mul_wide(a, b):
    """The (low, high) words of the product of two uint32: mul.wide.u32, which is one IMAD.WIDE.

    Of the equal product of uint64, LLVM makes a multiplication for each word in a third of all cases: 0.75
    instructions more for each normal."""
    if INTERPRET or not PTX:
        product = a.to(tl.uint64) * b
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .u64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
            "=r,=r,r,r",
            [a, b],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
