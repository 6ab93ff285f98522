"""The instructions that compute, as NumPy functions: opcode -> types of its operands and the function.

Only what the package's kernels use is here.  An opcode that is missing is an error, and some are missing on
purpose: ``mul.f32`` without a rounding mode may be fused with an addition by ptxas, which changes its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any  #: np.ndarray or a NumPy scalar

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
#: Of every type of an operand but predicates, which are bool.  f16 and bf16 travel as their bits.
DTYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in _KINDS.items()
    for bits in (8, 16, 32, 64)
    if (kind, bits) not in (("f", 8), ("f", 16))
}
DTYPES["pred"] = np.dtype(bool)


class Rule(NamedTuple):
    result: str  # its type
    sources: tuple[str, ...]
    function: Callable[..., Array]


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a b + c rounded once.  The product is exact in float64, and the sum is rounded to odd there, so that
    the last bit says that something was lost: rounding it again, to 24 bits, then gives what rounding the
    exact sum would."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = (lost != 0) & (bits & 1 == 0) & np.isfinite(total)
    outward = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + outward, bits).view(np.float64).astype(np.float32)


def bf16_of(x: Array) -> Array:
    """To nearest, ties to even; any NaN is 0x7fff, as the instruction gives it."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16_of(x: Array) -> Array:
    bits = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def _pair(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _e4m3_value(code: Array) -> Array:
    """As f16 bits: 4 bits of exponent, 3 of mantissa, one NaN of either sign, no infinity."""
    sign, exponent, mantissa = code >> 7 & 1, code >> 3 & 15, code & 7
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10)
    )
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return f16_of(np.where(sign == 1, -value, value).astype(np.float32))


def _from_e4m3x2(codes: Array) -> Array:
    return _pair(_e4m3_value(codes & 0xFF), _e4m3_value(codes >> 8 & 0xFF))


def _to_integer(x: Array, rounding: Callable[[Array], Array], dtype: np.dtype) -> Array:
    """Saturating; NaN gives 0."""
    limits = np.iinfo(dtype)
    value = rounding(np.where(np.isnan(x), 0, x).astype(np.float64))
    return np.clip(value, float(limits.min), float(limits.max)).astype(dtype)


def _least(a: Array, b: Array) -> Array:
    """min.f32: the number where one is NaN; -0 before +0."""
    return np.where(np.signbit(a) & (a == b), a, np.fmin(a, b))


def _most(a: Array, b: Array) -> Array:
    return np.where(~np.signbit(a) & (a == b), a, np.fmax(a, b))


def _shift(a: Array, n: Array, left: bool) -> Array:
    """By more than the width: 0, or the sign of signed numbers."""
    bits = a.dtype.itemsize * 8
    n = np.asarray(n)
    small = np.minimum(n, bits - 1).astype(a.dtype)
    if left:
        return np.where(n >= bits, a.dtype.type(0), a << small)
    return a >> small if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> small)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of {b, a}, each by four bits of the selector, of which the highest repeats the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((pick & 7) * 8).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte >> 7 == 1, np.uint32(0xFF), np.uint32(0))
        result = result | np.where(pick >> 3 == 1, sign, byte) << np.uint32(8 * i)
    return result


def _bfi(a: Array, b: Array, position: Array, length: Array) -> Array:
    """The low ``length`` bits of a put into b at ``position``; both are constants of the code, below its
    width.
    """
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << position.astype(np.uint64)
    put = a.astype(np.uint64) << position.astype(np.uint64)
    return (put & mask | b.astype(np.uint64) & ~mask).astype(a.dtype)


def _bfe(a: Array, position: Array, length: Array) -> Array:
    """Bits of a, extended by zeros or by the sign; position + length must lie inside (else the PTX rules
    differ).
    """
    bits = a.dtype.itemsize * 8
    if np.any(position + length > bits) or np.any(length == 0):
        raise NotImplementedError("bfe beyond the register")
    return a << (bits - position - length).astype(a.dtype) >> (bits - length).astype(a.dtype)


def _divide(a: Array, b: Array) -> Array:
    if np.any(b == 0):
        raise ZeroDivisionError("integer division by zero")
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object)) if a.dtype.kind == "i" else a // b
    if a.dtype.kind == "i":
        quotient = np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)
    return quotient


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE["ge"] = np.greater_equal
_FLOAT_ONLY = {  # true where one is NaN; neither; either
    **{
        f"{name}u": lambda a, b, f=f: f(a, b) | np.isnan(a) | np.isnan(b)
        for name, f in _COMPARE.items()
        if name != "ne"
    },
    "neu": np.not_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_FLOAT_NE = lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)


def _in_pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of fp32 on the two halves of 64 bits."""

    def both(*operands: Array) -> Array:
        halves = [np.ascontiguousarray(np.atleast_1d(a)).view(np.float32) for a in operands]
        return function(*halves).view(np.uint64)

    return both


def _dp4a(a: Array, b: Array, c: Array) -> Array:
    """c and the products of four signed bytes each, of which no sum is cut off."""
    sum = c.astype(np.int64)
    for byte in range(0, 32, 8):
        of_a, of_b = ((x >> np.uint32(byte)).astype(np.uint8).view(np.int8).astype(np.int64) for x in (a, b))
        sum = sum + of_a * of_b
    return sum.astype(np.int32)


def _dp2a_low(a: Array, b: Array, c: Array) -> Array:
    """c + the two halves of a, times the two lowest bytes of b."""
    return c + (a & 0xFFFF) * (b & 0xFF) + (a >> 16) * (b >> 8 & 0xFF)


#: The only NaN that fp32 arithmetic makes, whatever those of its operands are.
_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def _with_one_nan(function: Callable[..., Array]) -> Callable[..., Array]:
    def result(*operands: Array) -> Array:
        made = np.asarray(function(*operands))
        return np.where(np.isnan(made), _NAN, made)

    return result


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}

    def rule(opcode: str, result: str, sources: str, function: Callable[..., Array]) -> None:
        rules[opcode] = Rule(result, tuple(sources.split()), function)

    for bits in (16, 32, 64):
        for kind in "su":
            t = f"{kind}{bits}"
            rule(f"add.{t}", t, f"{t} {t}", np.add)
            rule(f"sub.{t}", t, f"{t} {t}", np.subtract)
            rule(f"mul.lo.{t}", t, f"{t} {t}", np.multiply)
            rule(f"mad.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c: a * b + c)
            rule(f"min.{t}", t, f"{t} {t}", np.minimum)
            rule(f"max.{t}", t, f"{t} {t}", np.maximum)
            rule(f"div.{t}", t, f"{t} {t}", _divide)
            rule(f"rem.{t}", t, f"{t} {t}", lambda a, b: a - _divide(a, b) * b)
            rule(f"shr.{t}", t, f"{t} u32", lambda a, n: _shift(a, n, False))
            if bits < 64:
                wide = f"{kind}{2 * bits}"
                product = lambda a, b, d=DTYPES[wide]: a.astype(d) * b.astype(d)
                rule(f"mul.wide.{t}", wide, f"{t} {t}", product)
                rule(f"mad.wide.{t}", wide, f"{t} {t} {wide}", lambda a, b, c, f=product: f(a, b) + c)
                rule(
                    f"mul.hi.{t}",
                    t,
                    f"{t} {t}",
                    lambda a, b, n=bits, f=product, d=DTYPES[t]: (f(a, b) >> n).astype(d),
                )
        rule(f"neg.s{bits}", f"s{bits}", f"s{bits}", np.negative)
        b = f"b{bits}"
        rule(f"shl.{b}", b, f"{b} u32", lambda a, n: _shift(a, n, True))
        rule(f"not.{b}", b, b, np.invert)
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            rule(f"{name}.{b}", b, f"{b} {b}", function)
        for kind in "bsu":
            t = f"{kind}{bits}"
            rule(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, p: np.where(p, a, b))
            for name, function in _COMPARE.items():
                rule(f"setp.{name}.{t}", "pred", f"{t} {t}", function)
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        rule(f"{name}.pred", "pred", "pred pred", function)
    rule("not.pred", "pred", "pred", np.logical_not)
    rule("prmt.b32", "b32", "b32 b32 b32", _prmt)
    rule("dp2a.lo.u32.u32", "u32", "u32 u32 u32", _dp2a_low)
    rule("dp4a.s32.s32", "s32", "b32 b32 s32", _dp4a)
    for b in ("b32", "b64"):
        rule(f"bfi.{b}", b, f"{b} {b} u32 u32", _bfi)
    for t in ("u32", "s32", "u64", "s64"):
        rule(f"bfe.{t}", t, f"{t} u32 u32", _bfe)
    wrap = lambda low, high, n: (
        ((high.astype(np.uint64) << np.uint64(32) | low) << (n & 31).astype(np.uint64)) >> np.uint64(32)
    )
    rule("shf.l.wrap.b32", "b32", "b32 b32 u32", lambda a, b, n: wrap(a, b, n).astype(np.uint32))

    for t in ("f32", "f64"):
        # Without a product there is nothing to fuse a sum with: add.f64 has one result.
        arithmetic = _with_one_nan if t == "f32" else lambda function: function
        for mode in (".rn", "") if t == "f64" else (".rn",):
            rule(f"add{mode}.{t}", t, f"{t} {t}", arithmetic(np.add))
            rule(f"sub{mode}.{t}", t, f"{t} {t}", arithmetic(np.subtract))
        rule(f"mul.rn.{t}", t, f"{t} {t}", arithmetic(np.multiply))
        rule(f"neg.{t}", t, t, np.negative)
        rule(f"abs.{t}", t, t, np.abs)
        rule(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, p: np.where(p, a, b))
        for name, function in {**_COMPARE, **_FLOAT_ONLY, "ne": _FLOAT_NE}.items():
            rule(f"setp.{name}.{t}", "pred", f"{t} {t}", function)
    rule("fma.rn.f32", "f32", "f32 f32 f32", _with_one_nan(fma32))
    rule("fma.rn.f32x2", "b64", "b64 b64 b64", _in_pairs(_with_one_nan(fma32)))
    for name, function in {"mul": np.multiply, "add": np.add, "sub": np.subtract}.items():
        rule(f"{name}.rn.f32x2", "b64", "b64 b64", _in_pairs(_with_one_nan(function)))
    rule("div.rn.f32", "f32", "f32 f32", _with_one_nan(np.divide))
    rule("sqrt.rn.f32", "f32", "f32", _with_one_nan(np.sqrt))
    rule("min.f32", "f32", "f32 f32", _with_one_nan(_least))
    rule("max.f32", "f32", "f32 f32", _with_one_nan(_most))

    integers = [f"{kind}{bits}" for kind in "su" for bits in (8, 16, 32, 64)]
    for source in integers:
        for result in integers:
            rule(f"cvt.{result}.{source}", result, source, lambda a, d=DTYPES[result]: a.astype(d))
        for result in ("f32", "f64"):
            rule(f"cvt.rn.{result}.{source}", result, source, lambda a, d=DTYPES[result]: a.astype(d))
    for name, function in (("rni", np.rint), ("rmi", np.floor), ("rzi", np.trunc), ("rpi", np.ceil)):
        for result in ("s16", "s32", "u32"):
            rule(
                f"cvt.{name}.{result}.f32",
                result,
                "f32",
                lambda a, f=function, d=DTYPES[result]: _to_integer(a, f, d),
            )
        rule(f"cvt.{name}.f32.f32", "f32", "f32", function)
    rule("cvt.f64.f32", "f64", "f32", lambda a: a.astype(np.float64))
    rule("cvt.rn.f32.f64", "f32", "f64", lambda a: a.astype(np.float32))
    rule("cvt.f32.f16", "f32", "b16", lambda a: a.view(np.float16).astype(np.float32))
    rule("cvt.f32.bf16", "f32", "b16", lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32))
    rule("cvt.rn.f16.f32", "b16", "f32", f16_of)
    rule("cvt.rn.bf16.f32", "b16", "f32", bf16_of)
    rule("cvt.rn.f16x2.f32", "b32", "f32 f32", lambda high, low: _pair(f16_of(low), f16_of(high)))
    rule("cvt.rn.bf16x2.f32", "b32", "f32 f32", lambda high, low: _pair(bf16_of(low), bf16_of(high)))
    rule("cvt.rn.f16x2.e4m3x2", "b32", "b16", _from_e4m3x2)
    rule("cvta.to.global.u64", "u64", "u64", np.positive)
    return rules


RULES = _rules()


def rsqrt(x: Array, ulps: int) -> Array:
    """1 / sqrt(x) to nearest, then ``ulps`` units in the last place away: the instruction is within two
    of them.
    """
    exact = (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)
    moved = (np.asarray(exact).view(np.int32) + np.int32(ulps)).view(np.float32)
    return np.where(np.isfinite(exact) & (exact > 0), moved, exact)
