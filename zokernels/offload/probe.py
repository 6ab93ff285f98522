"""The probe of a step with streamed parameters, which takes the exact probe for those on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..step.probes.exact import ExactProbe, dual_numbers, unit_points
from ..step.probes.probe import Probe
from ..step.roles import home_of
from ..step.types import Bucket, Point, Seeds
from .visit import SidePoints


class StreamedProbe(Probe):
    """Forwards in lockstep, each as a forward of the exact probe.

    Args:
        exact: of the resident parameters; None where there are none.
        run_sides: :meth:`Engine.forwards`.
        left: called when the step is over, however it ended.
        alone: around the step: no other thread runs the model meanwhile.
        tangents: whether forwards are of dual numbers.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        seeds: Seeds,
        exact: ExactProbe | None,
        run_sides: Callable[[SidePoints, Callable[[int], Any]], list[Any]],
        left: Callable[[], object],
        alone: AbstractContextManager[object],
        tangents: bool,
    ) -> None:
        super().__init__(buckets, seeds)
        self._tangents = tangents
        self._exact, self._run_sides, self._left, self._alone = exact, run_sides, left, alone
        self._streamed = [not home_of(b.params[0]).in_memory for b in buckets]

    def forwards(
        self,
        points: Iterable[Any],
        share: range,
        same_rng: Iterator[AbstractContextManager[None]],
        run: Callable[[], Any],
    ) -> list[Any]:
        """All together: a block comes in once for all of them."""
        mine = [point for i, point in enumerate(points) if i in share]
        of = {
            id(p): (b, place, stream)
            for place, (b, streamed) in enumerate(zip(self.buckets, self._streamed, strict=True))
            if streamed
            for p, stream in zip(b.params, b.streams, strict=True)
        }
        watched = nullcontext() if self._exact is None else self._exact.watching()
        if self._tangents:
            mine = [unit_points(point) for point in mine]
        numbers = dual_numbers() if self._tangents else nullcontext()
        with next(same_rng), watched, numbers:
            return self._run_sides(
                SidePoints(of, mine, self.seeds, self._tangents), lambda side: self._forward(mine[side], run)
            )

    def _forward(self, point: list[Point], run: Callable[[], Any]) -> Any:
        if self._exact is None:
            return run()
        with self._exact.point(
            [p for p, streamed in zip(point, self._streamed, strict=True) if not streamed]
        ):
            return run()

    def __enter__(self) -> Probe:
        self._alone.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._left()
        finally:
            self._alone.__exit__(None, None, None)
