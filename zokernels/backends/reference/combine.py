"""combine: theta = round(decay * theta + sum_k c_k z_k), one rounding, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import DOMAIN_ROUNDING
from .noise import NOISE, uniform16
from .rounding import round_stochastic

#: Elements at a time: the float64 intermediates of a chunk stay near 100 MB.
_CHUNK = 1 << 20


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 fma with one rounding.

    float64 holds a * b exactly but not a * b + c: the sum is rounded to odd (Boldo and Melquiond, 2008), from which
    rounding to fp32 gives the correctly rounded result.
    """
    p, c = a.double() * b.double(), c.double()
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # TwoSum: p + c == s + error, exactly
    bits = s.view(torch.int64)
    away = torch.where((error > 0) == (s > 0), 1, -1)
    inexact_even = (error != 0) & (bits & 1 == 0) & s.isfinite()
    return torch.where(inexact_even, bits + away, bits).view(torch.float64).float()


def combine(
    out: list[Tensor],
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    noise = NOISE[dist]
    for target, theta, stream, offset in zip(out, params, streams, offsets, strict=True):
        target, theta = target.view(-1), theta.view(-1)
        for at in range(0, theta.numel(), _CHUNK):
            piece = theta[at : at + _CHUNK]
            start, n = offset + at, piece.numel()
            acc = piece.float()
            if decay is not None:
                acc = decay * acc  # 1 * acc is acc
            for k in range(seeds.numel()):
                acc = fma(coeffs[k].expand(n), noise(seeds[k], stream, start, n), acc)
            if rounding_seed is None:
                rounded = acc.to(theta.dtype)
            else:
                u16 = uniform16(rounding_seed, stream, DOMAIN_ROUNDING, start, n)
                rounded = round_stochastic(acc, u16, theta.dtype)
            target[at : at + _CHUNK].copy_(rounded)
