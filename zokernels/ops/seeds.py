"""derive_seed: the seed of a direction from those of a run, its step and its number."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..backends import select
from ..checks import fail, named_arguments
from ..contract import derive_seed_int, seed_to_int64
from .define import define


def _check_derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> None:
    for argument, value in (("run_seed", run_seed), ("step", step), ("k", k)):
        if value.dtype is not torch.int64:
            fail("derive_seed", argument, "an integer or an int64 tensor", value.dtype, TypeError)
        if value.device != run_seed.device:
            fail("derive_seed", argument, f"device {run_seed.device}, as run_seed", value.device)


def _fake_derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    return torch.empty(shape, dtype=torch.int64, device=run_seed.device)


@define("derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor", _fake_derive_seed)
def _derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    run_seed, step, k = (t.expand(shape).contiguous() for t in (run_seed, step, k))
    found: Tensor = select(run_seed.device).derive_seed(run_seed, step, k)
    return found


@overload
def derive_seed(run_seed: int, step: int, k: int = 0) -> int: ...


@overload
def derive_seed(run_seed: Tensor, step: int | Tensor, k: int | Tensor = 0) -> Tensor: ...


@overload
def derive_seed(run_seed: int, step: Tensor, k: int | Tensor = 0) -> Tensor: ...


@overload
def derive_seed(run_seed: int, step: int, k: Tensor) -> Tensor: ...


@named_arguments
def derive_seed(run_seed: int | Tensor, step: int | Tensor, k: int | Tensor = 0) -> int | Tensor:
    """Seed of direction ``k`` at ``step`` of a run: Philox(key = run_seed, counter = (step_lo, step_hi, k,
    0)).

    Python integers give an integer in [0, 2^64).  Where any argument is an int64 tensor, the arguments
    broadcast and the result is an int64 tensor with the same bits, computed on the device."""
    if not (isinstance(run_seed, Tensor) or isinstance(step, Tensor) or isinstance(k, Tensor)):
        return derive_seed_int(run_seed, step, k)
    device = next(v.device for v in (run_seed, step, k) if isinstance(v, Tensor))

    def as_tensor(v: int | Tensor) -> Tensor:
        return (
            v if isinstance(v, Tensor) else torch.full((), seed_to_int64(v), dtype=torch.int64, device=device)
        )

    seeds: Tensor = _derive_seed(as_tensor(run_seed), as_tensor(step), as_tensor(k))
    return seeds
