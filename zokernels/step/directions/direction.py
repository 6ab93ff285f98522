"""Directions: what z is in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import fail, is_integer
from ...contract import derive_seed_int, seed_to_int64
from ..noise import DENSE
from ..roles import OptimizerView
from ..types import Bucket, Seeds


class Direction:
    """What z is: here, dense noise.  Once a step, before anything moves, it gives each bucket its noise."""

    #: The number of steps, which the host counts, after which something is drawn or measured anew.  None
    #: means never, so that the direction can be part of a CUDA graph.
    refresh: int | None = None
    #: True if z of one parameter depends on no other parameter.
    separate = True

    def __repr__(self) -> str:
        return "dense noise" if type(self) is Direction else f"{type(self).__name__}()"

    @property
    def changes(self) -> bool:
        """Whether what z is follows the weights from step to step, so that no later step can draw it
        again.
        """
        return False

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        """Sets ``bucket.noise``.  The weights are unperturbed."""
        for bucket in buckets:
            bucket.noise = DENSE

    def kept_of(self, param: Tensor) -> list[tuple[str, tuple[int, ...], torch.dtype, float]]:
        """The name, shape, dtype and first value of each tensor in ``optimizer.state[param]``."""
        return []

    def window(self, optimizer: OptimizerView) -> int:
        """How often :attr:`refresh` steps have passed."""
        return optimizer.step_count // self.refresh if self.refresh else 0

    def begins_window(self, optimizer: OptimizerView) -> bool:
        return self.refresh is not None and optimizer.step_count % self.refresh == 0


def derived_seed(optimizer: OptimizerView, window: int, k: int, device: torch.device) -> Tensor:
    """derive_seed(run seed, window, k) as an int64 tensor [1].

    The k used here are far above those of the q directions of a step.
    """
    value = seed_to_int64(derive_seed_int(optimizer.seed, window, k))
    return torch.full((1,), value, dtype=torch.int64, device=device)


def check_refresh(name: str, refresh: int | None) -> None:
    if refresh is not None and not is_integer(refresh, 1):
        fail(name, "refresh", "None or a number of steps >= 1", repr(refresh))
