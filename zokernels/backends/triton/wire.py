"""encode, decode and decode_fan_out in Triton; ``zokernels/wire.py`` describes the formats.

A buffer of 16-bit codes is a tensor of their dtype.  One of 8-bit codes is an int8 tensor, with the scale
bytes of the blocks behind the codes, from the next multiple of 256 on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...wire import ALIGN, BLOCK, FORMATS, scale_count
from ..registry import implements
from ..terms import Terms
from .arithmetic import fma
from .device import on_device
from .launch import elementwise, options
from .rounding import round_nearest, to_float
from .table import pointer, row_of
from .tile import accumulate, decayed, each_tile, load, noise, noise_of, rounded, span_of, store, tabled_span

_ALIGN, _BLOCK = tl.constexpr(ALIGN), tl.constexpr(BLOCK)
#: How many blocks of 32 elements a program of encode takes.
_BLOCKS = 64


@triton.jit
def _scale(byte):
    """The scale 2^(byte - 127), fp32, of a byte in an int32; NaN for byte 255.

    2^-127 is subnormal: its exponent bits are 0 and the highest bit of its mantissa is 1.  That bit also
    makes a NaN of the exponent 255.
    """
    lowest = tl.where((byte == 0) | (byte == 255), 0x00400000, 0)
    return ((byte << 23) | lowest).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(code):
    """fp32 numbers from E4M3 codes, int8.

    The bits of a code are put into their places in fp32.  The exponent is then too small by 120, the
    difference of the biases, and a product with 2^120 mends it, for subnormal codes, too.
    """
    wide = code.to(tl.int32)  # its sign is that of the number
    rest = (wide << 20) & 0x07F00000
    bits = tl.where(rest == 0x07F00000, 0x7FC00000, rest | (wide & -0x80000000))
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _codes(ptr, row, inside, span):
    base = ptr + span.start
    if inside is not None:
        return tl.load(base + (row[:, None] * 8 + tl.arange(0, 8)[None, :]), mask=inside, other=0)
    else:
        return tl.load(tl.multiple_of(base, 16) + row[:, None] * 8 + tl.arange(0, 8)[None, :])


@triton.jit
def _decoded(wire, row, inside, span, numel, EMAX: tl.constexpr):
    """The decoded elements of a tile, fp32 [B, 8].  EMAX: the format's; None for formats without scales."""
    if EMAX is None:
        return load(wire, row, inside, span)
    else:
        codes = _codes(wire, row, inside, span)
        # All eight elements of a row lie in one block of 32, so there is one scale for a row.
        first = (span.index - span.start) >> 5
        scales = wire + (numel + (_ALIGN - 1)) // _ALIGN * _ALIGN + ((span.index >> 5) - first)
        at = tl.max_contiguous(row, 1) >> 2
        if inside is None:
            byte = tl.load(scales + at)
        else:
            byte = tl.load(scales + at, mask=tl.max(inside.to(tl.int32), 1) > 0, other=0)
        scale = _scale(byte.to(tl.int32) & 0xFF)
        if EMAX == 0:
            return to_float(codes) * (scale * 2.0**-6)[:, None]
        else:
            return _e4m3(codes) * scale[:, None]


@triton.jit
def _updated(row, inside, span, terms, wire, numel, dtype: tl.constexpr, EMAX: tl.constexpr):
    x = decayed(_decoded(wire, row, inside, span, numel, EMAX), terms)
    return rounded(accumulate(x, row, span, terms, ()), dtype, row, span, terms)


@triton.jit
def _tile(row, inside, span, terms, out, wire, numel, EMAX: tl.constexpr):
    store(out, _updated(row, inside, span, terms, wire, numel, out.dtype.element_ty, EMAX), row, inside, span)


@triton.jit
def _fan_out_tile(row, inside, span, terms, plus, minus, wire, numel, seed, c, EMAX: tl.constexpr):
    dtype: tl.constexpr = plus.dtype.element_ty
    x = to_float(_updated(row, inside, span, terms, wire, numel, dtype, EMAX))
    z = noise(seed, row, span, terms)
    store(plus, round_nearest(fma(c, z, x), dtype), row, inside, span)
    store(minus, round_nearest(fma(-c, z, x), dtype), row, inside, span)


@triton.jit
def _program(span, numel, terms, plus, minus, wire, seed, coeff, EMAX: tl.constexpr, ALIGNED: tl.constexpr):
    if minus is None:
        each_tile(_tile, span, numel, ALIGNED, 4, (terms, plus, wire, numel, EMAX))
    else:
        seed, c = tl.load(seed), tl.load(coeff)
        each_tile(_fan_out_tile, span, numel, ALIGNED, 4, (terms, plus, minus, wire, numel, seed, c, EMAX))


@triton.jit(do_not_specialize=["numel", "offset", "stream", "num_k"])
def decode_kernel(
    plus, minus, wire, numel: tl.int64, offset: tl.int64, stream: tl.int64,
    seed, coeff, seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    EMAX: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """decode_fan_out of one tensor; without ``minus`` decode, whose output is ``plus``."""
    span = span_of(offset, stream, None, tl.program_id(0).to(tl.int64))
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, None, None, DOMAIN, K)
    _program(span, numel, terms, plus, minus, wire, seed, coeff, EMAX, ALIGNED)


@triton.jit(do_not_specialize=["num_k"])
def decode_table_kernel(
    table, owner, seed, coeff, seeds, coeffs, num_k: tl.int32, decay, rounding_seed,
    EMAX: tl.constexpr, DOMAIN: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same for the tensors in a table, in one launch."""
    row, pid = row_of(table, owner, WIDTH)
    numel, span = tabled_span(row, None, pid)
    terms = noise_of(seeds, coeffs, num_k, decay, rounding_seed, None, None, DOMAIN, K)
    plus, wire = pointer(row, 5, DTYPES[0]), pointer(row, 7, DTYPES[2])
    minus = pointer(row, 6, DTYPES[1])
    _program(span, numel, terms, plus, minus, wire, seed, coeff, EMAX, ALIGNED)


@triton.jit
def _e4m3_code(y):
    """The nearest E4M3 code of fp32 numbers, in an int32: ties to even, and at most 448."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Codes below 2^-6 are subnormal, multiples of 2^-9.  Adding 2^14 rounds to such a multiple.
    tiny = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (tl.where(magnitude < 0x3C800000, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.int32)


@triton.jit
def _int8_code(y):
    """64 y, at most 127 in magnitude, as the nearest integer: the last bits of its sum with 1.5 * 2^23."""
    x = tl.minimum(tl.maximum(y * 64.0, -127.0), 127.0)
    return (x + 1.5 * 2.0**23).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "offset", "blocks"])
def encode_kernel(
    out, theta, numel: tl.int64, offset: tl.int64, blocks: tl.int64, EMAX: tl.constexpr, BLOCKS: tl.constexpr
):
    """encode of one tensor; a program takes BLOCKS blocks of 32 elements."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * _BLOCK - (offset & (_BLOCK - 1)) + tl.arange(0, _BLOCK)[None, :]
    inside = (at >= 0) & (at < numel)
    x = to_float(tl.load(theta + at, mask=inside, other=0.0))
    dtype: tl.constexpr = out.dtype.element_ty
    if EMAX is None:
        if dtype == tl.float16:
            bits = x.to(tl.uint32, bitcast=True)
            magnitude = bits & 0x7FFFFFFF
            over = (magnitude > 0x477FE000) & (magnitude < 0x7F800000)  # above 65504, and no infinity or NaN
            x = tl.where(over, (bits & 0x80000000) | 0x477FE000, bits).to(tl.float32, bitcast=True)
        tl.store(out + at, round_nearest(x, dtype), mask=inside)
    else:
        top = tl.max((x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), 1) >> 23
        scale = tl.where(top == 255, 255, tl.maximum(top - EMAX, 0))
        y = x * _scale(254 - tl.minimum(scale, 254))[:, None]
        code = _int8_code(y) if EMAX == 0 else _e4m3_code(y)
        code = tl.where((scale == 255)[:, None], 0, code)
        tl.store(out + at, code.to(tl.int8), mask=inside)
        scales = out + (numel + (_ALIGN - 1)) // _ALIGN * _ALIGN
        tl.store(scales + block, scale.to(tl.int8), mask=block < blocks)


def _as_codes(wires: list[Tensor], wire: str) -> list[Tensor]:
    return [w.view(torch.int8 if FORMATS[wire].emax is not None else FORMATS[wire].dtype) for w in wires]


@implements
def encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    with on_device(params[0].device):
        for data, param, offset in zip(_as_codes(out, wire), params, offsets, strict=True):
            if n := param.numel():
                blocks = scale_count(n, offset)
                encode_kernel[(triton.cdiv(blocks, _BLOCKS),)](
                    data,
                    param,
                    n,
                    offset,
                    blocks,
                    EMAX=FORMATS[wire].emax,
                    BLOCKS=_BLOCKS,
                    **options(param.device),
                )


@implements
def decode(out: list[Tensor], wires: list[Tensor], wire: str, terms: Terms) -> None:
    _decode((out, None, _as_codes(wires, wire)), wire, None, None, terms)


@implements
def decode_fan_out(
    plus: list[Tensor],
    minus: list[Tensor],
    wires: list[Tensor],
    wire: str,
    seed: Tensor,
    coeff: Tensor,
    terms: Terms,
) -> None:
    _decode((plus, minus, _as_codes(wires, wire)), wire, seed, coeff, terms)


def _decode(groups: tuple, wire: str, seed: Tensor | None, coeff: Tensor | None, terms: Terms) -> None:
    kernels = (decode_kernel, decode_table_kernel)
    elementwise(kernels, groups, terms, seed=seed, coeff=coeff, EMAX=FORMATS[wire].emax)
