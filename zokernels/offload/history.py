"""The updates that blocks still lack: for each step, what was done to each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..step.deferred import DeferredNoise, Pass, raising
from ..step.noise import Members, Noise, Tensors
from ..step.types import Bucket
from .blocks import Block


class Batch(NamedTuple):
    """Parameters of a block that one call takes: of one dtype, in one bucket, and with the same updates
    to take.
    """

    entries: list[int]  #: their numbers in the block
    streams: list[int]
    passes: tuple[Pass, ...]  #: the updates that they lack
    bucket: Bucket | None  #: in which they are perturbed
    place: int  #: of the bucket among the points of a side


#: By id of a perturbed parameter: its bucket, the bucket's place among the points of a side, its noise
#: stream.
Perturbed = Mapping[int, tuple[Bucket, int, int]]


class History:
    """The passes of each update, in order.

    Update number i is a list of passes, each with the streams of its parameters, by id of the parameter.  A
    block holds the first ``stored`` updates, and takes the rest as it comes in.  Updates that every block has
    are dropped.
    """

    def __init__(self) -> None:
        self.start = 0  #: the number of the first update that is not dropped
        self._steps: list[list[tuple[dict[int, int], Pass]]] = []
        self._open: list[tuple[dict[int, int], Pass]] = []
        # most steps have the same, which are stored once
        self._members: dict[tuple[int, ...], dict[int, int]] = {}

    @property
    def end(self) -> int:
        """The number of updates so far."""
        return self.start + len(self._steps)

    def begin(self) -> None:
        self._open = []

    def add(self, members: Members, one: Pass) -> None:
        key = tuple(map(id, members.params))
        if key not in self._members:
            self._members[key] = dict(zip(key, members.streams, strict=True))
        self._open.append((self._members[key], one))

    def commit(self, number: int) -> None:
        """Makes what was added since :meth:`begin` the update of that number, unless it is already there."""
        if self.end == number:
            self._steps.append(self._open)

    def drop(self, upto: int) -> None:
        """Drops the updates before number ``upto``, which every block has."""
        # When the steps of a log are taken again one by one, blocks have updates that are still to come.
        upto = min(upto, self.end)
        if upto > self.start:
            del self._steps[: upto - self.start]
            self.start = upto

    def restart(self, number: int) -> None:
        self.start, self._steps, self._open = number, [], []

    def pending(self, param: Tensor, since: int) -> tuple[int, tuple[Pass, ...]]:
        """The noise stream of ``param``, and its passes from update number ``since`` on."""
        key, stream, found = id(param), 0, []
        for step in self._steps[since - self.start :]:
            for members, one in step:
                if key in members:
                    stream = members[key]
                    found.append(one)
        return stream, tuple(found)

    def batches(
        self, block: Block, since: int, perturbed: Perturbed, everything: bool = False
    ) -> list[Batch]:
        """The parameters of ``block`` that need a call: those that lack updates from number ``since`` on,
        those of ``perturbed``, or ``everything``."""
        found: dict[tuple[Any, ...], Batch] = {}
        for i, e in enumerate(block.entries):
            stream, passes = self.pending(e.param, since)
            bucket, place, stream = perturbed.get(id(e.param), (None, 0, stream))
            if bucket is None and not passes and not everything:
                continue
            batch = found.setdefault(
                (e.param.dtype, id(bucket), *map(id, passes)), Batch([], [], passes, bucket, place)
            )
            batch.entries.append(i)
            batch.streams.append(stream)
        return list(found.values())


class HistoryNoise(Noise):
    """``noise`` of parameters that are elsewhere: an update is only written down."""

    def __init__(self, history: History, noise: Noise) -> None:
        self._history, self._noise = history, noise
        self.bounds = noise.bounds

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        self._noise.perturb(out, members, seeds, coeffs, **options)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        # The next step may write to the optimizer's own tensors, so they are copied.
        kept = Pass(seeds.clone(), coeffs.clone(), members.dist, **rounding, bounds=self.bounds)
        self._history.add(members, kept)

    def raise_to(self, members: Members, minimum: Tensor) -> None:
        self._history.add(members, raising(members, minimum))


def apply_passes(
    params: Sequence[Tensor],
    streams: Sequence[int],
    passes: Sequence[Pass],
    done: Callable[..., Any] = lambda n: 0,
) -> None:
    """Runs the passes in place, one by one, each with its own rounding; several of them piece by piece."""
    if len(passes) == 1:
        passes[0].run(list(params), list(streams), [0] * len(params), lambda states: ())
        return
    deferred = DeferredNoise()
    for one in passes:
        deferred.put(params, streams, one)
    with torch.no_grad():
        deferred.apply(done)
