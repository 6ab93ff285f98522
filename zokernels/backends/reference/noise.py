"""The noise z of contract ``zk1``, and its 16-bit fields, for a range of logical indices.

docs/contract.md defines every step; the constants are in ``contract.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import (
    DOMAIN_NORMAL,
    DOMAIN_RADEMACHER,
    NORMAL_COS,
    NORMAL_LK,
    NORMAL_NC2,
    NORMAL_R,
    NORMAL_SIN,
    RADEMACHER_TILE,
)
from .philox import philox_blocks


def _f32(bits: int) -> float:
    """The fp32 number with these 32 bits."""
    return (
        torch.tensor(bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int32).view(torch.float32).item()
    )


_NC2, _LK = _f32(NORMAL_NC2), _f32(NORMAL_LK)
_R, _COS, _SIN = ([_f32(b) for b in bits] for bits in (NORMAL_R, NORMAL_COS, NORMAL_SIN))


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a * b + c through float64, which is rounded twice.

    For every input that the normal transform can have, the result equals that of one rounding.  All of them
    have been tried.  This is faster than ``combine.fma``, which is right for all numbers.
    """
    c = c.double() if isinstance(c, Tensor) else c
    return (a.double() * b.double() + c).float()


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, the constant first, at x."""
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = _fma(value, x, c)
    return value


def _signed(x: Tensor, bits: int) -> Tensor:
    """The lowest ``bits`` of x as a signed number in two's complement."""
    half = 1 << (bits - 1)
    return ((x & (2 * half - 1)) ^ half) - half


def normal_from_words(words: Tensor) -> Tensor:
    """Standard normals, fp32 [n, 8], from Philox words, int64 [n, 4].

    Word p gives the radius r and word p + 1 the angle t of the pair (2p, 2p + 1), which is the method of Box
    and Muller.  r is sqrt(-2 ln u) for the number u that word p stands for: its logarithm is the exponent
    times ln 2 plus a polynomial of the mantissa.  Cosine and sine of the angle are polynomials, too.
    """
    v = words | 1  # never 0, of which there is no logarithm
    n = _signed(v, 32).float()
    bits = n.view(torch.int32)
    m = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    ef = (bits & 0x7F800000).float()
    s = _fma(_horner(_R, m), m, _fma(ef, torch.full_like(ef, _NC2), _LK))
    # torch.sqrt of fp32 on the CPU can be off by one unit in the last place.
    r = s.double().sqrt().float()
    r = torch.where(n < 0, -r, r)
    t = _signed(v.roll(-1, dims=-1), 16).float()
    y = t * t
    return torch.stack((r * _horner(_COS, y), r * (_horner(_SIN, y) * t)), dim=-1).flatten(-2)


def _blocks(start: int, n: int, device: torch.device) -> Tensor:
    """The numbers of the blocks of eight elements in which [start, start + n) lies."""
    return torch.arange(start >> 3, (start + n + 7 >> 3), dtype=torch.int64, device=device)


def normal(seed: Tensor, stream: int, start: int, n: int) -> Tensor:
    """z[start : start + n], fp32."""
    words = philox_blocks(seed, stream, DOMAIN_NORMAL, _blocks(start, n, seed.device))
    return normal_from_words(words).flatten()[start & 7 : (start & 7) + n]


def _signs(words: Tensor, place: Tensor, index: Tensor) -> Tensor:
    """z in {-1, +1} of the logical indices, each of which has the Philox block ``words[place]``."""
    byte = index % RADEMACHER_TILE >> 8
    word = words[place, byte >> 2]
    return 1.0 - 2.0 * ((word >> (8 * (byte & 3) + (index & 7))) & 1).float()


def rademacher(seed: Tensor, stream: int, start: int, n: int) -> Tensor:
    """z[start : start + n] in {-1, +1}, fp32.

    A tile of 4096 elements has 32 Philox blocks of 16 bytes.  Byte b of block i has the signs, one bit each,
    of the eight elements from 8 (32 b + i).  So 32 threads that draw a block each need neighbouring elements
    at a time, which are loaded together.
    """
    index = torch.arange(start, start + n, dtype=torch.int64, device=seed.device)
    first, last = start // RADEMACHER_TILE, (start + n - 1) // RADEMACHER_TILE
    blocks = torch.arange(32 * first, 32 * (last + 1), dtype=torch.int64, device=seed.device)
    words = philox_blocks(seed, stream, DOMAIN_RADEMACHER, blocks)
    return _signs(words, 32 * (index // RADEMACHER_TILE - first) + (index >> 3 & 31), index)


def _fields(words: Tensor) -> Tensor:
    """Philox words [n, 4] to their 16-bit fields [n, 8]."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)


def uniform16(seed: Tensor, stream: int, domain: int, start: int, n: int) -> Tensor:
    """Field [start : start + n] of a domain for masks or rounding, int64 in [0, 65536)."""
    words = philox_blocks(seed, stream, domain, _blocks(start, n, seed.device))
    return _fields(words).flatten()[start & 7 : (start & 7) + n]


NOISE = {"normal": normal, "rademacher": rademacher}

# --- at any logical indices, int64 [n] --------------------------------------------------------------------


def _words_at(seed: Tensor, stream: int, domain: int, block: Tensor) -> tuple[Tensor, Tensor]:
    """Philox words of the blocks that ``block`` names, each computed once; and the place of each there."""
    blocks, place = torch.unique(block, return_inverse=True)
    return philox_blocks(seed, stream, domain, blocks), place


def normal_at(seed: Tensor, stream: int, index: Tensor) -> Tensor:
    words, place = _words_at(seed, stream, DOMAIN_NORMAL, index >> 3)
    return normal_from_words(words)[place, index & 7]


def rademacher_at(seed: Tensor, stream: int, index: Tensor) -> Tensor:
    block = 32 * (index // RADEMACHER_TILE) + (index >> 3 & 31)
    return _signs(*_words_at(seed, stream, DOMAIN_RADEMACHER, block), index)


def uniform16_at(seed: Tensor, stream: int, domain: int, index: Tensor) -> Tensor:
    words, place = _words_at(seed, stream, domain, index >> 3)
    return _fields(words)[place, index & 7]


NOISE_AT = {"normal": normal_at, "rademacher": rademacher_at}
