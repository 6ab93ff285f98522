"""The classical probe: the weights themselves move to each point; the update brings them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..guards import uninterrupted
from ..types import Bucket, Point, Seeds, between, terms
from .probe import Probe


class InplaceProbe(Probe):
    """Weights at a point, rounded to nearest at each move: in half precision the way back is not exact.

    A move along one direction (+eps z to -eps z, or back to theta) is a combine of K = 1; one from a direction to
    another has K = 2.  ``key``: (run seed, step) of the direction, for the two-pass form.
    """

    def __init__(self, buckets: list[Bucket], seeds: Seeds, key: tuple[int, int] | None = None) -> None:
        super().__init__(buckets, seeds)
        self.key = key

    def move(self, points: list[Point]) -> None:
        """The weights of each bucket from where they stand to its point."""
        with uninterrupted():
            for b, point in zip(self.buckets, points, strict=True):
                if way := between(b.at, point):
                    b.noise.move(b.members, *terms(way, self.seeds[b.device]))
                    b.at = point
            # autocast would go on computing with the casts it made of the weights before the move
            torch.clear_autocast_cache()

    def restore(self) -> None:
        self.move([{}] * len(self.buckets))

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        self.move(points)
        yield
