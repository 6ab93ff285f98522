"""The classical probe: the weights themselves move to each point; the update brings them back."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ...backends.journal import PART, journal
from ...checks import fail
from ..guards import NOTHING, uninterrupted
from ..noise import Noise
from ..types import Bucket, Point, Seeds, between, terms
from .probe import Probe


class InplaceProbe(Probe):
    """Moves the weights from point to point, rounding to nearest at each move.

    In half precision the way back is therefore not exact.  A move along one direction (from +eps z to -eps z,
    or back to theta) is a combine with K = 1, and a move from one direction to another has K = 2.

    ``key``: the run seed and step of the directions, by which the two-pass form knows them again.
    """

    def __init__(self, buckets: list[Bucket], seeds: Seeds, key: tuple[int, int] | None = None) -> None:
        super().__init__(buckets, seeds)
        self.key = key

    def move(self, points: list[Point]) -> None:
        """The weights of each bucket from :attr:`Bucket.at` to a new point."""
        if self.lost:
            expected = "weights that no exception has left half moved (load a checkpoint)"
            fail("move", "weights", expected, "those of a step in place", RuntimeError)
        ways = [between(b.at, point) for b, point in zip(self.buckets, points, strict=True)]
        if not any(ways):
            return
        with uninterrupted():
            for b, point, way in zip(self.buckets, points, ways, strict=True):
                if way:
                    self._move(b, point, way)
            # Autocast would go on computing with the casts that it made of the weights before the move.
            torch.clear_autocast_cache()

    def _move(self, b: Bucket, point: Point, way: Point) -> None:
        outer = journal.calls
        calls = journal.calls = [] if outer is None else outer
        before = len(calls)
        try:
            b.noise.move(b.members, *terms(way, self.seeds[b.device]))
        except BaseException:
            if len(calls) > before:  # an exception of another thread, when a kernel had run
                if type(b.noise) is Noise and calls[-1] is not PART:  # the one of this move
                    b.at = point
                else:
                    self.lost = True
            raise
        finally:
            journal.calls = outer
        b.at = point

    def restore(self) -> None:
        self.move([{}] * len(self.buckets))

    def at(self, points: list[Point]) -> AbstractContextManager[None]:
        self.move(points)
        return NOTHING
