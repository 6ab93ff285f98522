"""The updates that blocks still lack: for each step, what was done to each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Rule as KernelRule
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
        self.tries = 0  #: how many steps have begun, whether they were taken or not
        #: The try that was taken, and its passes.
        self._steps: list[tuple[int, list[tuple[dict[int, int], Pass]]]] = []
        self._open: list[tuple[dict[int, int], Pass]] = []
        # most steps have the same, which are stored once
        self._members: dict[tuple[int, ...], dict[int, int]] = {}

    @property
    def end(self) -> int:
        """The number of updates so far."""
        return self.start + len(self._steps)

    def begin(self) -> None:
        self.tries += 1
        self._open = []

    def add(self, members: Members, one: Pass) -> None:
        key = tuple(map(id, members.params))
        if key not in self._members:
            self._members[key] = dict(zip(key, members.streams, strict=True))
        self._open.append((self._members[key], one))

    def commit(self, number: int) -> None:
        """Makes what was added since :meth:`begin` the update of that number, unless it is already there."""
        if self.end == number:
            self._steps.append((self.tries, self._open))
        self._open = []

    def drop(self, upto: int) -> None:
        """Drops the updates before number ``upto``, which every block has."""
        # When the steps of a log are taken again one by one, blocks have updates that are still to come.
        upto = min(upto, self.end)
        if upto > self.start:
            del self._steps[: upto - self.start]
            self.start = upto

    def restart(self, number: int) -> None:
        self.start, self._steps, self._open = number, [], []

    def pending(self, param: Tensor, since: int, measured: int = -1) -> tuple[int, tuple[Pass, ...]]:
        """The noise stream of ``param``, and its passes from update number ``since`` on.

        ``measured``: the try whose measurement is there already, made of the weights with ``since`` updates.
        """
        key, stream, found = id(param), 0, []
        for number, step in self._steps[since - self.start :]:
            for members, one in step:
                if key in members and not (one.measures and number == measured):
                    stream = members[key]
                    found.append(one)
        return stream, tuple(found)

    def measuring(self, param: Tensor) -> tuple[Pass, ...]:
        """What the step that runs has to measure of ``param`` before it perturbs it."""
        return tuple(one for members, one in self._open if id(param) in members and one.measures)

    def batches(
        self, block: Block, since: int, perturbed: Perturbed, everything: bool = False, measured: int = -1
    ) -> list[Batch]:
        """The parameters of ``block`` that need a call: those that lack updates from number ``since`` on,
        those of ``perturbed``, or ``everything``."""
        found: dict[tuple[Any, ...], Batch] = {}
        for i, e in enumerate(block.entries):
            stream, passes = self.pending(e.param, since, measured)
            bucket, place, stream = perturbed.get(id(e.param), (None, 0, stream))
            if bucket is not None:
                passes += self.measuring(e.param)
            if bucket is None and not passes and not everything:
                continue
            batch = found.setdefault(
                (e.dtype, id(bucket), *map(id, passes)), Batch([], [], passes, bucket, place)
            )
            batch.entries.append(i)
            batch.streams.append(stream)
        return list(found.values())


class HistoryNoise(Noise):
    """``noise`` of parameters that are elsewhere: an update is only written down."""

    def __init__(self, history: History, noise: Noise) -> None:
        self._history, self._noise = history, noise
        self.bounds = noise.bounds
        #: Whether one pass can make two sides and an update.
        self.fans_out = type(noise) is Noise
        #: What a pass has to keep of the noise.
        self._kept = None if self.fans_out or noise.bounds is not None else noise

    def bound(self, views: Mapping[int, Tensor]) -> Noise:
        return self._noise.bound(views)

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        self._noise.perturb(out, members, seeds, coeffs, **options)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        # The next step may write to the optimizer's own tensors, so they are copied.
        kept = Pass(
            seeds.clone(), coeffs.clone(), members.dist, **rounding, bounds=self.bounds, noise=self._kept
        )
        self._history.add(members, kept)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        """``options``: states are what stands for them in ``optimizer.state``."""
        for name in {"first", "second"} & options.keys():
            options[name] = {id(p): t for p, t in zip(members.params, options[name], strict=True)}
        self.update(members, seeds, coeffs, rule=rule, hyper=hyper.clone(), **options)

    def note(self, members: Members, device: torch.device) -> None:
        """Writes down that the step begins with a measurement, where it does."""
        if self._noise.measures:
            none = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
            one = Pass(*none, members.dist, None, "nearest", None, noise=self._noise, measures=True)
            self._history.add(members, one)

    def raise_to(self, members: Members, minimum: Tensor) -> None:
        self._history.add(members, raising(members, minimum))


def apply_passes(
    params: Sequence[Tensor],
    streams: Sequence[int],
    passes: Sequence[Pass],
    offsets: Sequence[int] | None = None,
) -> None:
    """Runs the passes in place, one by one, each with its own rounding; several of them piece by piece.

    ``offsets``: where what is given of each parameter begins in it, in elements; None: at 0.
    """
    if len(passes) == 1 or offsets is not None or any(one.noise is not None for one in passes):
        pick = lambda states: [states[id(p)] for p in params] if states else ()
        for one in passes:
            one.run(list(params), list(streams), list(offsets or [0] * len(params)), pick)
        return
    deferred = DeferredNoise()
    for one in passes:
        deferred.put(params, streams, one)
    with torch.no_grad():
        deferred.apply(lambda n: 0)
