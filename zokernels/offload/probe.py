"""The probe of a step with streamed parameters: the exact one for those on the device, the engine for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optim.direction import Point
from ..optim.exact import ExactProbe
from ..optim.groups import Bucket, engine_of
from ..optim.probe import Probe
from .engine import Step

if TYPE_CHECKING:
    from ..optim.optimizer import ZerothOrder
    from .engine import Engine


class StreamedProbe(Probe):
    """Forwards in lockstep, each under the function mode of the exact probe; updates of streamed parameters are written
    down."""

    def __init__(
        self, optimizer: ZerothOrder, engine: Engine, buckets: list[Bucket], seeds: dict[torch.device, Tensor]
    ) -> None:
        super().__init__(buckets, seeds)
        self._engine, self._optimizer = engine, optimizer
        self._streamed = [engine_of(b.params[0]) is not None for b in buckets]
        resident = [b for b, streamed in zip(buckets, self._streamed, strict=True) if not streamed]
        op = type(optimizer).__name__
        self._exact = ExactProbe(op, resident, seeds, optimizer._pool, optimizer._told) if resident else None
        self._before = optimizer.step_count
        for b, streamed in zip(buckets, self._streamed, strict=True):
            if streamed:
                b.direction = engine.later
        engine.history.begin()

    def forwards(self, points: list[list[Point]], run: Callable[[], Any]) -> list[Any]:
        """``points``: of each forward, for each bucket."""
        of = {
            id(p): (b, place, stream)
            for place, (b, streamed) in enumerate(zip(self.buckets, self._streamed, strict=True))
            if streamed
            for p, stream in zip(b.params, b.streams, strict=True)
        }
        with self._watched():
            return self._engine.forwards(Step(of, points, self.seeds), lambda side: self._forward(points[side], run))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if self._exact is None:
            yield
        else:
            with self._exact.watching():
                yield

    def _forward(self, point: list[Point], run: Callable[[], Any]) -> Any:
        if self._exact is None:
            return run()
        with self._exact.point([p for p, streamed in zip(point, self._streamed, strict=True) if not streamed]):
            return run()

    def __exit__(self, *exception: object) -> None:
        if self._optimizer.step_count > self._before:
            self._engine.committed()
