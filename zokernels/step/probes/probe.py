"""What all probes of a step have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .direction import Point
from .groups import Bucket


class Probe:
    """How the closure sees the weights of ``buckets`` at the points of a step.  A context: the weights leave it
    unperturbed, or updated.

    ``seeds``: int64 [q] on each device.  Forwards come one after another, each inside :meth:`at`; or, of streamed
    weights, together (:meth:`forwards`).
    """

    #: Whether ``Bucket.at`` says where the weights stand, so that an update can bring them back.
    says_where = True

    def __init__(self, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        self.buckets, self.seeds = buckets, seeds

    def at(self, point: Any) -> AbstractContextManager[None]:
        """``point``: of each bucket, or what else the optimizer's estimate asks for (a coordinate)."""
        raise NotImplementedError

    def forwards(self, points: list[list[Point]], run: Callable[[], Any]) -> list[Any]:
        """What ``run`` returns at each of ``points``, given for each bucket."""
        raise NotImplementedError

    def move(self, points: list[Point]) -> None:
        """Follow a point that another rank evaluates; where the weights do not move there is nothing to do."""

    def restore(self) -> None:
        """The weights back to theta; likewise."""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()  # after an update nothing is left to move; after an exception this brings the weights back
