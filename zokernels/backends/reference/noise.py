"""z of contract ``zk1`` and its 16-bit fields, over a range of logical indices."""

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
    return (
        torch.tensor(bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int32).view(torch.float32).item()
    )


_NC2, _LK = _f32(NORMAL_NC2), _f32(NORMAL_LK)
_R, _COS, _SIN = ([_f32(b) for b in bits] for bits in (NORMAL_R, NORMAL_COS, NORMAL_SIN))


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """fp32 fma through float64.

    Inside the normal transform the double rounding never bites (checked exhaustively).
    """
    c = c.double() if isinstance(c, Tensor) else c
    return (a.double() * b.double() + c).float()


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = _fma(value, x, c)
    return value


def _signed(x: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return ((x & (2 * half - 1)) ^ half) - half


def normal_from_words(words: Tensor) -> Tensor:
    """Philox words [n, 4] to standard normals [n, 8] (fp32)."""
    v = words | 1
    n = _signed(v, 32).float()
    bits = n.view(torch.int32)
    m = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    ef = (bits & 0x7F800000).float()
    s = _fma(_horner(_R, m), m, _fma(ef, torch.full_like(ef, _NC2), _LK))
    r = s.double().sqrt().float()  # fp32 torch.sqrt on CPU can be one ulp off
    r = torch.where(n < 0, -r, r)
    t = _signed(v.roll(-1, dims=-1), 16).float()
    y = t * t
    return torch.stack((r * _horner(_COS, y), r * (_horner(_SIN, y) * t)), dim=-1).flatten(-2)


def _blocks(start: int, n: int, device: torch.device) -> Tensor:
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
    """z[start : start + n] in {-1, +1}, fp32."""
    index = torch.arange(start, start + n, dtype=torch.int64, device=seed.device)
    first, last = start // RADEMACHER_TILE, (start + n - 1) // RADEMACHER_TILE
    blocks = torch.arange(32 * first, 32 * (last + 1), dtype=torch.int64, device=seed.device)
    words = philox_blocks(seed, stream, DOMAIN_RADEMACHER, blocks)
    return _signs(words, 32 * (index // RADEMACHER_TILE - first) + (index >> 3 & 31), index)


def _fields(words: Tensor) -> Tensor:
    """Philox words [n, 4] to their 16-bit fields [n, 8]."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)


def uniform16(seed: Tensor, stream: int, domain: int, start: int, n: int) -> Tensor:
    """The 16-bit fields of the mask and rounding domains, int64 in [0, 65536)."""
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
