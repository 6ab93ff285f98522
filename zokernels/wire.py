"""Wire formats: what parameters become on a link, narrower than they are (docs/offload.md).

========  ==================  ================================================================================
wire      bytes a parameter   decode(W)
========  ==================  ================================================================================
bf16      2                   the bf16 nearest to x, ties to even
fp16      2                   the fp16 nearest to x, ties to even; a finite x beyond 65504 becomes +-65504
fp8       1 + 1/32            MXFP8: 2^(s - 127) times an E4M3 number
int8      1 + 1/32            MXINT8: 2^(s - 127) times m / 64, -127 <= m <= 127
========  ==================  ================================================================================

The last two are those of the OCP Microscaling (MX) specification v1.0: each block of 32 elements, by logical
flat index, shares one scale byte s (E8M0).  With E = floor(log2 max |x|) of the block,

    s = clamp(E - emax, -127, 127) + 127         emax: 8 of fp8, 0 of int8
    code = x * 2^(127 - s), rounded to the nearest code, ties to even; what is larger takes the largest code

so a block of zeros has s = 0, as have blocks whose E - emax is below -127 (fp32 subnormals of int8; of fp8,
all below 2^-118), which then lose low bits.  A NaN or an infinity makes s = 255 and all codes 0: the whole
block decodes to NaN. int8 has no -0.0.  A scale is a power of two, so decode is exact in fp32, and has the
same bits everywhere.

A tensor's wire buffer is uint8 [wire_bytes(n, wire, offset)]: codes in the order of elements (little-endian),
from byte 0; scale bytes from the next multiple of 256 on.  A shard that begins or ends inside a block of 32
has a scale of its own for its part."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .checks import fail

Wire = Literal["bf16", "fp16", "fp8", "int8"]

#: Elements that share a scale.
BLOCK = 32
#: Scales begin at a multiple of this.
ALIGN = 256


class Format(NamedTuple):
    size: int  #: bytes of a code
    dtype: torch.dtype  #: of the codes
    emax: int | None  #: exponent of the largest code; None: no scales


FORMATS = {
    "bf16": Format(2, torch.bfloat16, None),
    "fp16": Format(2, torch.float16, None),
    "fp8": Format(1, torch.float8_e4m3fn, 8),
    "int8": Format(1, torch.int8, 0),
}


def format_of(op: str, wire: str) -> Format:
    if wire not in FORMATS:
        fail(op, "wire", " or ".join(map(repr, FORMATS)), repr(wire))
    return FORMATS[wire]


def is_lossless(wire: str | None, dtype: torch.dtype) -> bool:
    """Whether decode(encode(x)) = x for every x of ``dtype``: bf16 as "bf16", fp16 as "fp16", and no wire at
    all.

    All others are lossy: what arrives is near x, and what is kept must be kept elsewhere.
    """
    return wire is None or format_of("is_lossless", wire).dtype is dtype


def scale_begin(numel: int) -> int:
    """Where the scales of a buffer begin, in bytes."""
    return -(-numel // ALIGN) * ALIGN


def scale_count(numel: int, offset: int = 0) -> int:
    return ((offset + numel - 1) // BLOCK - offset // BLOCK + 1) if numel else 0


def wire_bytes(numel: int, wire: str, offset: int = 0) -> int:
    """Size of the wire buffer of ``numel`` elements from logical index ``offset``."""
    form = format_of("wire_bytes", wire)
    if form.emax is None or not numel:
        return form.size * numel
    return scale_begin(numel) + scale_count(numel, offset)
