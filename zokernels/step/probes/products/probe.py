"""The probe whose forwards perturb products: one point after another, or many members at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from ....checks import fail
from ...cohort import Cohort, CohortReader, Look
from ...types import Bucket, Point, Seeds
from ..blocks import Blocks
from ..functions import HiddenParameters
from ..hidden import guarded, leave
from ..made import Owners
from ..probe import Probe
from . import handlers  # noqa: F401  registers them
from .forward import NotInOneForward, Products
from .kept import Factors, Learned


class ProductProbe(Probe):
    """Products are perturbed, and weights are not.

    Args:
        reader: of a batched step, whose closure has the rows of many members in one forward.
    """

    def __init__(
        self,
        op: str,
        buckets: list[Bucket],
        seeds: Seeds,
        blocks: Blocks,
        warned: set[str],
        learned: Learned,
        reader: CohortReader | None = None,
    ) -> None:
        super().__init__(buckets, seeds)
        for bucket in buckets:
            if bucket.is_sharded:
                fail(op, "restore", "'exact' or 'inplace' for sharded parameters", "'products'")
            if not bucket.noise.has_factors:
                expected = "a direction of low rank with 'products' (FreshFactors, KeptRight, ...)"
                fail(op, "restore", expected, type(bucket.noise).__name__)
        self.op, self.blocks, self.warned, self.learned, self.reader = op, blocks, warned, learned, reader
        self._owners = blocks.owners = Owners.renewed(blocks.owners, buckets)
        self._kept = Factors()

    def forwards(
        self, points: Iterable[Any], share: range, same_rng: Iterator[AbstractContextManager[None]], run: Any
    ) -> list[Any]:
        with self._watching():
            if self.reader is None:
                return super().forwards(points, share, same_rng, run)
            mine = [(i, point) for i, point in enumerate(points) if i in share]
            size, results = self.learned.size or len(mine), []
            for begin in range(0, len(mine), size):
                numbers, own = zip(*mine[begin : begin + size], strict=True)
                try:
                    with next(same_rng), self._at(own, Cohort(numbers)):
                        results.append(run())
                except NotInOneForward as error:
                    raise HiddenParameters(
                        f"{self.op}: closure: expected the functions of the run's first forward, got another "
                        f"one: {error}; use cohort=1"
                    ) from error
            return results

    def look(
        self, points: Sequence[Any], same_rng: Iterator[AbstractContextManager[None]]
    ) -> tuple[str | None, int, int]:
        """The first forwards of a run: one of one member and one of two, of whose losses nothing comes.

        What later forwards rely on is that rows of members are where they are in both: along the first
        dimension, which has twice the size in the second.  Returns why a forward cannot have several members,
        None where it can, and the bytes that the two took.
        """
        assert self.reader is not None
        looks = []
        try:
            with self._watching():
                for count in range(1, min(2, len(points)) + 1):
                    looks.append(look := Look())
                    cohort = Cohort(range(count), look)
                    with next(same_rng), self._at(points[:count], cohort, look), look:
                        self.reader.run()
        except NotInOneForward as error:
            return str(error), 0, 0
        for key, sizes in looks[0].sizes.items():
            others = looks[-1].sizes.get(key, sizes)
            if any(one != two for one, two in zip(sizes, others, strict=False)):
                return f"{key[0]} takes rows in another dimension than the first", 0, 0
        return None, looks[0].peak, looks[-1].peak

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        with self._at([points], None):
            yield

    @contextmanager
    def _at(
        self, points: Sequence[list[Point]], cohort: Cohort | None, look: Look | None = None
    ) -> Iterator[None]:
        if self.reader is not None:
            self.reader.cohort = cohort
        with Products(
            self.op, self._owners, self.seeds, points, cohort, self.learned, self._kept, self._say, look
        ) as forward:
            yield
        if not forward.seen:
            raise HiddenParameters(
                f"{self.op}: closure: expected torch functions that take the parameters, got none (another "
                "model, or a graph that holds them: TorchScript, CUDA graph, C++ extension)"
            )

    @contextmanager
    def _watching(self) -> Iterator[None]:
        params, compiled = self._owners.params, self.blocks.compiled
        compiled.renew(params)
        with ExitStack() as stack:
            if compiled.regions:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                self._say("compiled", "products run torch.compile'd functions uncompiled")
            stack.enter_context(guarded(self.op, params))
            yield

    def mend(self) -> None:
        leave(self._owners.params)

    def _say(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"{self.op}: {message}", stacklevel=2)
