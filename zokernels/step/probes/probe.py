"""What all probes of a step have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from ..types import Bucket, Point, Seeds


class Probe:
    """How the closure sees the weights of ``buckets`` at the points of a step.

    A context: the weights leave it unperturbed, or updated.
    """

    #: True if the weights themselves sit at point ``bucket.at``, so the update can fold the restore into its
    #: pass.  False if the probe holds a copy of them.
    update_may_restore = True
    #: True where an exception has left a part of a move, so that it is not known where the weights are.
    lost = False

    def __init__(self, buckets: list[Bucket], seeds: Seeds) -> None:
        self.buckets, self.seeds = buckets, seeds

    def at(self, point: Any) -> AbstractContextManager[object]:
        """Inside, the closure sees the weights at ``point``: a point for each bucket, or what else the
        optimizer's estimate asks for (a coordinate).
        """
        raise NotImplementedError

    def forwards(
        self,
        points: Iterable[Any],
        share: range,
        same_rng: Iterator[AbstractContextManager[None]],
        run: Callable[[], Any],
    ) -> list[Any]:
        """What ``run`` returns at each of ``points`` whose number is in ``share``, one forward after another.

        Each takes the next context of ``same_rng``, so that all of them draw the same random numbers.
        """
        results = []
        for i, point in enumerate(points):
            if i not in share:
                self.move(point)  # weights that move round at each move, so all processes make all moves
                continue
            with next(same_rng), self.at(point):
                results.append(run())
        return results

    def move(self, points: list[Point]) -> None:
        """The weights of each bucket to its point, where the weights themselves move; else nothing."""

    def restore(self) -> None:
        """The weights back to theta, where they are elsewhere."""

    def mend(self) -> None:
        """Called where an exception has left a step without the end of this context: the weights to theta."""
        self.restore()

    def restore_before_update(self, folds: bool) -> None:
        """The one place that decides who restores the weights: the update, in its own pass, or this probe.

        ``folds``: whether the rule's update can subtract the perturbation (:attr:`Rule.folds_restore`).  It
        does so where the weights are known to sit at ``bucket.at`` and their noise has one scale;
        ``bucket.at`` is then left as it is.  In every other case the weights are at theta after this call,
        and ``bucket.at`` is {}.
        """
        if not (folds and self.update_may_restore and all([b.noise.same_scale for b in self.buckets])):
            self.restore()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        # after an update nothing is left to move; after an exception this brings the weights back
        if not self.lost:
            self.restore()
