"""combine: theta = round(decay * theta + sum_k c_k w_k), one rounding, in pure PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ...contract import DOMAIN_MASK, DOMAIN_ROUNDING
from ..registry import implements
from ..terms import Terms, row_blocks
from .noise import NOISE, NOISE_AT, uniform16, uniform16_at
from .rounding import round_stochastic

#: Elements that are computed at a time, so that their float64 intermediates stay near 100 MB.
CHUNK = 1 << 20


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once.  PyTorch has no such function.

    float64 holds the product of two fp32 numbers exactly, but not always the sum.  To round the sum to
    float64 and then to fp32 would be two roundings.  Therefore the sum is rounded to odd: where it is
    inexact, the last bit is set to 1.  Rounding that to fp32 gives the correctly rounded result (Boldo and
    Melquiond, 2008)."""
    p, c = a.double() * b.double(), c.double()
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # TwoSum (Knuth): p + c is exactly s + error
    bits = s.view(torch.int64)
    away = torch.where((error > 0) == (s > 0), 1, -1)
    inexact_even = (error != 0) & (bits & 1 == 0) & s.isfinite()
    return torch.where(inexact_even, bits + away, bits).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # torch.sqrt of fp32 on the CPU can be off by one unit in the last place


def divide(a: Tensor, b: Tensor) -> Tensor:
    # float64 has more than twice the bits of fp32, so rounding the quotient twice is as good as once.
    return (a.double() / b.double()).float()


class Chunk:
    """Elements [at, at + n) of tensor ``index`` of a call, with their noise, masks and rounding.

    Of a tensor in rows they are some whole rows.
    """

    def __init__(self, terms: Terms, index: int, at: int, n: int) -> None:
        self.terms, self.index, self.at, self.n = terms, index, at, n
        self.stream, self.start = terms.streams[index], terms.logical(index, at)
        self.coeffs = terms.coeffs[index] if terms.coeffs.dim() == 2 else terms.coeffs
        self.width = terms.widths[index] if terms.widths else 0

    def of(self, tensor: Tensor) -> Tensor:
        """The elements of this chunk in ``tensor``, as a view [n]."""
        return tensor.view(-1)[self.at : self.at + self.n]

    def _range(self, begin: int, count: int, step: int = 1) -> Tensor:
        return begin + step * torch.arange(count, dtype=torch.int64, device=self.coeffs.device)

    @cached_property
    def starts(self) -> Tensor:
        """Logical index of the first element of each row, int64 [rows]."""
        assert self.terms.lengths is not None
        return self._range(self.start, self.n // self.width, self.terms.lengths[self.index])

    @cached_property
    def logical(self) -> Tensor:
        """Logical index of each element, int64 [n]."""
        if not self.width:
            return self._range(self.start, self.n)
        return (self.starts[:, None] + self._range(0, self.width)).flatten()

    def noise(self, k: int) -> Tensor:
        """z_k, fp32 [n]."""
        seed, dist = self.terms.seeds[k], self.terms.dist
        if self.width:
            return NOISE_AT[dist](seed, self.stream, self.logical)
        return NOISE[dist](seed, self.stream, self.start, self.n)

    def uniform16(self, seed: Tensor, domain: int) -> Tensor:
        """The random numbers of 16 bits of a domain, int64 [n]."""
        if self.width:
            return uniform16_at(seed, self.stream, domain, self.logical)
        return uniform16(seed, self.stream, domain, self.start, self.n)

    def kept(self) -> Tensor | None:
        """The elements that the masks keep, bool [n]; None where all are kept."""
        kept = None
        if self.terms.masks:
            # The byte of the first element in a packed mask, which begins with the tensor's first block of
            # eight, or in that of each row.
            place = (self.logical >> 3) - (self.terms.offsets[self.index] >> 3)
            if self.width:
                assert self.terms.lengths is not None
                sizes = self.terms.offsets[self.index], self.width, self.terms.lengths[self.index]
                first = row_blocks(*sizes) * self._range(self.at // self.width, len(self.starts))
                place = (self.logical >> 3) + (first - (self.starts >> 3)).repeat_interleave(self.width)
            kept = (self.terms.masks[self.index].view(-1)[place] >> (self.logical & 7)) & 1 == 1
        if self.terms.mask_seed is not None:
            drawn = self.uniform16(self.terms.mask_seed, DOMAIN_MASK) < self.terms.mask_keep
            kept = drawn if kept is None else kept & drawn
        return kept

    def decayed(self, theta: Tensor) -> Tensor:
        """decay * theta, fp32 [n]."""
        acc = self.of(theta).float()
        return acc if self.terms.decay is None else self.terms.decay * acc

    def rounded(self, acc: Tensor, dtype: torch.dtype, domain: int = DOMAIN_ROUNDING) -> Tensor:
        """``acc``, fp32 [n], in ``dtype``: to nearest, or stochastically with the bits of ``domain``."""
        if self.terms.rounding_seed is None:
            return acc.to(dtype)
        return round_stochastic(acc, self.uniform16(self.terms.rounding_seed, domain), dtype)


def chunks(params: list[Tensor], terms: Terms) -> Iterator[Chunk]:
    for index, theta in enumerate(params):
        width = (terms.widths[index] if terms.widths else 0) or 1
        step = max(1, CHUNK // width) * width
        for at in range(0, theta.numel(), step):
            yield Chunk(terms, index, at, min(step, theta.numel() - at))


def accumulate(chunk: Chunk, acc: Tensor) -> Tensor:
    """acc + sum_k c_k w_k, as a chain of fmas in the order of k.  An element that a mask drops stays acc."""
    terms, total = chunk.terms, acc
    root = sqrt(chunk.of(terms.curvature[chunk.index]).float()) if terms.curvature else None
    for k in range(terms.seeds.numel()):
        w = chunk.noise(k) if root is None else divide(chunk.noise(k), root)
        total = fma(chunk.coeffs[k].expand(chunk.n), w, total)
    kept = chunk.kept()
    return total if kept is None else torch.where(kept, total, acc)


def combine_by(
    out: list[Tensor],
    params: list[Tensor],
    terms: Terms,
    rounded: Callable[[Chunk, Tensor, torch.dtype], Tensor],
) -> None:
    """combine with a rounding of the caller's, for tensors that lie in one piece."""
    for chunk in chunks(params, terms):
        theta = params[chunk.index]
        acc = accumulate(chunk, chunk.decayed(theta))
        chunk.of(out[chunk.index]).copy_(rounded(chunk, acc, theta.dtype))


@implements
def combine(out: list[Tensor], params: list[Tensor], terms: Terms) -> None:
    combine_by(out, params, terms, Chunk.rounded)
