"""Random calls of combine, and exact comparison."""

from __future__ import annotations

import json
import pathlib
import random

import torch
from torch import Tensor

import zokernels
from zokernels.contract import seed_to_int64

CPU_KERNELS = ["cpu-portable", "cpu-avx2", "cpu-avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTS = ["normal", "rademacher"]
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())


def bits(x: Tensor) -> Tensor:
    """The bit patterns of ``x``, with every NaN made the same: its payload is not part of the contract."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, want: Tensor, note: str = "") -> None:
    a, b = bits(got.cpu()).flatten(), bits(want.cpu()).flatten()
    wrong = (a != b).nonzero().flatten()
    assert wrong.numel() == 0, (
        f"{note}: {wrong.numel()} of {a.numel()} differ, first at {wrong[0].item()}: "
        f"got {got.flatten()[wrong[0]]}, want {want.flatten()[wrong[0]]}"
    )


def random_values(n: int, dtype: torch.dtype, rng: random.Random) -> Tensor:
    """Values of all magnitudes of ``dtype``, subnormals included, and a few specials."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    exponent = torch.randint(-30 if dtype is torch.float16 else -130, 12, (n,), generator=generator)
    x = (torch.randn(n, generator=generator).double() * torch.exp2(exponent.double())).to(dtype)
    typical = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    x = torch.where(torch.rand(n, generator=generator) < 0.5, x, typical)
    for special in (0.0, -0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max):
        if n and rng.random() < 0.2:
            x[rng.randrange(n)] = special
    return x


SENTINELS = 8


def random_call(rng: random.Random, *, max_size: int = 4100, **fixed) -> tuple[list[Tensor], list[slice], dict]:
    """Buffers, the part of each that is the parameter (at any alignment), and the other arguments of combine_."""
    dtype = fixed.pop("dtype", None) or rng.choice(DTYPES)
    count = fixed.pop("count", None)
    count = rng.choice([0, 1, 2, 7]) if count is None else count
    sizes = fixed.pop("sizes", None) or [rng.randrange(max_size + 1) for _ in range(rng.randrange(1, 4))]
    buffers = [random_values(n + 2 * SENTINELS, dtype, rng) for n in sizes]
    parts = []
    for n in sizes:
        begin = rng.randrange(SENTINELS + 1)
        parts.append(slice(begin, begin + n))
    aligned = rng.random() < 0.3
    if aligned:
        parts = [slice(0, n) for n in sizes]
    offsets = []
    for n in sizes:
        near_wrap = 8 * 2**32 - rng.randrange(n + 1)  # the low counter word wraps inside the tensor
        offset = rng.choice([0, rng.randrange(10000), rng.randrange(2**50), near_wrap, 2**63 - 1 - n])
        offsets.append(offset // 8 * 8 if aligned else offset)
    kwargs = {
        "seeds": torch.tensor([seed_to_int64(rng.getrandbits(64)) for _ in range(count)], dtype=torch.int64),
        "coeffs": torch.tensor([rng.gauss(0, 1) * 10.0 ** rng.randrange(-6, 2) for _ in range(count)]),
        "streams": [rng.getrandbits(32) for _ in sizes],
        "offsets": offsets,
        "dist": rng.choice(DISTS),
        "decay": rng.choice([None, 1.0, 0.97]),
        "rounding": rng.choice(["nearest", "stochastic"]),
        "rounding_seed": rng.getrandbits(64),
    }
    return buffers, parts, {**kwargs, **fixed}


def reference_result(buffers: list[Tensor], parts: list[slice], kwargs: dict) -> list[Tensor]:
    """The whole buffers after combine_ by the reference backend."""
    result = [b.clone() for b in buffers]
    with zokernels.backend("reference"):
        zokernels.combine_([b[p] for b, p in zip(result, parts, strict=True)], **kwargs)
    return result
