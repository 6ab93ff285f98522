"""noise: z itself, as a tensor; combine over -0.0, so no backend has a kernel for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..backends.terms import Terms
from ..checks import check_dist, check_offset, check_stream, fail, named_arguments
from .arguments import Dist, seeds_of
from .define import define


def _check_noise(shape: Sequence[int], seed: Tensor, stream: int, offset: int, dist: str) -> None:
    check_dist("noise", dist)
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.numel()} elements of {seed.dtype}"
        fail("noise", "seed", "an integer or an int64 tensor of one element", got, TypeError)
    if any(n < 0 for n in shape):
        fail("noise", "shape", "sizes >= 0", tuple(shape))
    numel = 1
    for n in shape:
        numel = numel * n
    check_stream("noise", "stream", stream)
    check_offset("noise", "offset", offset, numel)


def _fake_noise(shape: list[int], seed: Tensor, stream: int, offset: int, dist: str) -> Tensor:
    _check_noise(shape, seed, stream, offset, dist)
    return torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)


@define("noise(SymInt[] shape, Tensor seed, int stream, int offset, str dist) -> Tensor", _fake_noise)
def _noise(shape: list[int], seed: Tensor, stream: int, offset: int, dist: str) -> Tensor:
    _check_noise(shape, seed, stream, offset, dist)
    # z is combine over -0.0 with coefficient 1: -0.0, unlike 0.0, is the neutral element of addition.
    z = torch.full(tuple(shape), -0.0, dtype=torch.float32, device=seed.device)
    one = torch.ones(1, dtype=torch.float32, device=seed.device)
    terms = Terms(seed.reshape(1), one, [stream], [offset], dist, None, None)
    select(z.device).combine([z], [z], terms)
    return z


@named_arguments
def noise(
    shape: int | Sequence[int],
    *,
    seed: int | Tensor,
    stream: int = 0,
    offset: int = 0,
    dist: Dist = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    """z[offset : offset + numel] of (``seed``, ``stream``) as a fp32 tensor of ``shape``.

    "normal" is standard normal (|z| <= 6.556), "rademacher" is +1 or -1.  For tests, baselines and a look:
    training never materialises z.  ``device`` defaults to the seed's where it is a tensor, else to torch's
    default device."""
    if isinstance(stream, str):
        check_stream("noise", "stream", stream)
    sizes = [shape] if hasattr(shape, "__index__") and not isinstance(shape, Tensor) else shape
    numbers = isinstance(sizes, (list, tuple)) and not any(isinstance(n, Tensor) for n in sizes)
    if not numbers or not all(hasattr(n, "__index__") for n in sizes):
        expected = "an integer or a sequence of integers (tensor.shape: noise of a tensor's shape)"
        fail("noise", "shape", expected, type(shape).__name__, TypeError)
    seeds = seeds_of("noise", "seed", seed, device)
    seeds = seeds if device is None else seeds.to(device)
    z: Tensor = _noise(tuple(sizes), seeds, stream, offset, dist)
    return z
