"""squares: the squared norm of noise, exact in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..checks import check_noise_of, named_arguments
from ..contract import SQUARE_SCALE
from .arguments import Dist, places, seeds_of
from .define import define


def _fake_squares(
    seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str
) -> Tensor:
    check_noise_of("squares", seeds, sizes, streams, offsets, dist)
    return torch.empty_like(seeds)


@define("squares(Tensor seeds, int[] sizes, int[] streams, int[] offsets, str dist) -> Tensor", _fake_squares)
def _squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    check_noise_of("squares", seeds, sizes, streams, offsets, dist)
    found: Tensor = select(seeds.device).squares(seeds, sizes, streams, offsets, dist)
    return found


@named_arguments
def squared_norm(
    seeds: int | Sequence[int] | Tensor,
    sizes: Sequence[int],
    *,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    dist: Dist = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    """|z_k|^2 of each seed over tensors of ``sizes`` elements, float64 [K], for directions on a sphere.

    Every square (fp32) is rounded to a multiple of 2^-20 and summed as an integer, so no order of summation,
    shard or device changes a bit; the sum fits for 2^42 elements.  Rounding costs about sqrt(n) * 2^-22 in n
    elements."""
    values = seeds_of("squares", "seeds", seeds, device).reshape(-1)
    sums: Tensor = _squares(values, list(sizes), *places("squared_norm", streams, offsets, len(sizes)), dist)
    return sums.double() / SQUARE_SCALE
