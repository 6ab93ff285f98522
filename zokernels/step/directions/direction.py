"""Directions: what z is in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import fail
from ...contract import derive_seed_int, seed_to_int64
from ..noise import DENSE
from ..roles import OptimizerView
from ..types import Bucket, Seeds


class Direction:
    """What z is.  Once a step, before anything moves, it gives each bucket what applies it."""

    #: Host steps after which something is drawn or measured anew; None: never, and so within a CUDA graph.
    refresh: int | None = None
    #: Whether what z is in a parameter depends on no other parameter.
    separate = True

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        """Set ``bucket.noise``.  The weights are unperturbed."""
        for bucket in buckets:
            bucket.noise = DENSE

    def window(self, optimizer: OptimizerView) -> int:
        """How often :attr:`refresh` steps have passed."""
        return optimizer.step_count // self.refresh if self.refresh else 0

    def begins_window(self, optimizer: OptimizerView) -> bool:
        return self.refresh is not None and optimizer.step_count % self.refresh == 0


def derived_seed(optimizer: OptimizerView, window: int, k: int, device: torch.device) -> Tensor:
    """derive_seed(run seed, window, k) as an int64 tensor [1]; directions' own k stay far below those used here."""
    value = seed_to_int64(derive_seed_int(optimizer.seed, window, k))
    return torch.full((1,), value, dtype=torch.int64, device=device)


def check_refresh(name: str, refresh: int | None) -> None:
    if refresh is not None and (not isinstance(refresh, int) or isinstance(refresh, bool) or refresh < 1):
        fail(name, "refresh", "None or a number of steps >= 1", repr(refresh))
