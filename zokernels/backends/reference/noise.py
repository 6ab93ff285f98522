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


def rademacher(seed: Tensor, stream: int, start: int, n: int) -> Tensor:
    """z[start : start + n] in {-1, +1}, fp32."""
    index = torch.arange(start, start + n, dtype=torch.int64, device=seed.device)
    tile, element = index // RADEMACHER_TILE, index % RADEMACHER_TILE
    first, last = start // RADEMACHER_TILE, (start + n - 1) // RADEMACHER_TILE
    blocks = torch.arange(32 * first, 32 * (last + 1), dtype=torch.int64, device=seed.device)
    words = philox_blocks(seed, stream, DOMAIN_RADEMACHER, blocks)
    vec = element >> 3
    byte = vec >> 5
    word = words[32 * (tile - first) + (vec & 31), byte >> 2]
    return 1.0 - 2.0 * ((word >> (8 * (byte & 3) + (element & 7))) & 1).float()


def uniform16(seed: Tensor, stream: int, domain: int, start: int, n: int) -> Tensor:
    """The 16-bit fields of the mask and rounding domains, int64 in [0, 65536)."""
    words = philox_blocks(seed, stream, domain, _blocks(start, n, seed.device))
    fields = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    return fields[start & 7 : (start & 7) + n]


NOISE = {"normal": normal, "rademacher": rademacher}
