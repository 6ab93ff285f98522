"""The probe of coordinate-wise estimation: one weight moves at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..guards import uninterrupted
from .probe import Probe

#: A weight (flat tensor, position), the value that it is moved to and its own; None: theta itself.
Move = tuple[Tensor, int, Tensor, Tensor]


class CoordinateProbe(Probe):
    """At a point one weight holds another value; then its own bits are put back."""

    @contextmanager
    def at(self, point: Move | None) -> Iterator[None]:
        if point is None:
            yield
            return
        weights, i, value, own = point
        try:
            weights[i] = value
            torch.clear_autocast_cache()  # a cast of the weight before the move
            yield
        finally:
            with uninterrupted():
                weights[i] = own
                torch.clear_autocast_cache()
