"""A block that is open: in its slot, up to date, with scratch for what each side computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES
from ..functional import combine, decode, decode_fan_out, fan_out_
from ..step.deferred import Pass
from ..step.types import Bucket, Point, Seeds, terms
from .blocks import Block
from .cache import BlockCache
from .history import apply_passes
from .movers import Slot

#: Matrix products may choose another kernel for memory that is less aligned than torch's own.
_ALIGNED = 64


class SidePoints(NamedTuple):
    """The forwards of a step: where each side stands in each bucket."""

    of: dict[int, tuple[Bucket, int, int]]  #: bucket, its place among ``points``, stream, by id of the parameter
    points: list[list[Point]]  #: of each side, for each bucket
    seeds: Seeds

    def terms(self, side: int, place: int, bucket: Bucket) -> tuple[Tensor, Tensor]:
        return terms(self.points[side][place], self.seeds[bucket.device])

    def pair(self, sides: Sequence[int], place: int) -> tuple[int, float] | None:
        """(k, c), where two sides stand at theta + c z_k and theta - c z_k."""
        plus, minus = (self.points[s][place] for s in sides)
        if len(plus) == 1 and plus.keys() == minus.keys():
            ((k, c), d) = next(iter(plus.items())), next(iter(minus.values()))
            if isinstance(c, float) and isinstance(d, float) and c == -d:
                return k, c
        return None


class _Batch(NamedTuple):
    """Parameters of a block that one call takes."""

    entries: list[int]
    streams: list[int]
    passes: tuple[Pass, ...]
    bucket: Bucket | None  #: in which they are perturbed
    place: int


class Visit:
    """A block in its slot, up to date, and scratch with what the sides compute with."""

    everything = False  #: whether parameters without update and perturbation have work, too

    def __init__(
        self, cache: BlockCache, block: Block, slot: Slot, sides: Sequence[int], step: SidePoints | None
    ) -> None:
        self.cache, self.block, self.slot, self.step = cache, block, slot, step
        self.sides, self._left = list(sides), len(sides)
        self._params = self._values()
        self._held = True
        since = slot.updates
        if since < cache.history.end:
            cache.mover.settle(slot)
        self._batches = self._groups(since)
        with cache.timeline.span("update", block):
            pair = self._pair()
            for a in self._batches:
                if pair and a.bucket is not None:
                    self._fan_out(a)
                else:
                    self._apply(a, a.passes)
            #: scratch by side
            self._made: dict[int, int] = dict(zip(pair or (), (0, 1)))  # noqa: B905
        if since < cache.history.end:
            cache.updated(block, slot)
        if len(self._made) == self._left and sides and not self._fixed:
            self._release()

    def _values(self) -> list[Tensor]:
        return self.slot.params(self.block)

    def _groups(self, since: int) -> list[_Batch]:
        """Entries by dtype, updates and bucket; those without either are not in any."""
        found: dict[tuple[Any, ...], _Batch] = {}
        self._fixed: list[int] = []  #: entries that no side perturbs
        history, of = self.cache.history, self.step.of if self.step else {}
        for i, e in enumerate(self.block.entries):
            stream, passes = history.pending(e.param, since)
            bucket, place, of_bucket = of.get(id(e.param), (None, 0, stream))
            if bucket is None:
                self._fixed.append(i)
            if bucket is None and not passes and not self.everything:
                continue
            key = (e.param.dtype, id(bucket), *map(id, passes))
            if key not in found:
                found[key] = _Batch([], [], passes, bucket, place)
            found[key].entries.append(i)
            found[key].streams.append(of_bucket)
        return list(found.values())

    def _pair(self) -> list[int] | None:
        """The first two sides, where one pass can update and perturb for both."""
        pair, perturbed = self.sides[:2], [a for a in self._batches if a.bucket is not None]
        if len(pair) < 2 or self.cache.scratches < 2 or self.step is None or not perturbed:
            return None
        together = all(self.step.pair(pair, a.place) for a in perturbed)
        return pair if together else None

    def _apply(self, a: _Batch, passes: Sequence[Pass]) -> None:
        if passes:
            apply_passes([self._params[i] for i in a.entries], a.streams, passes)

    def _fan_out(self, a: _Batch) -> None:
        """The last update and the perturbations in one pass."""
        update = self._last_update(a)
        self._apply(a, a.passes[:-1] if update else a.passes)
        params, plus, minus = (
            [views[i] for i in a.entries]
            for views in (self._params, *(self.cache.scratch(self.block, s) for s in (0, 1)))
        )
        seed, coeff = self._direction(a)
        fan_out_(params, plus, minus, seed, coeff, **self._noise(a), **update)

    def _last_update(self, a: _Batch) -> dict[str, Any]:
        """As arguments of a fan-out, where it can be one's."""
        assert a.bucket is not None
        if not a.passes or a.passes[-1].dist != a.bucket.dist:
            return {}
        return {key: getattr(a.passes[-1], key) for key in ("seeds", "coeffs", "decay", "rounding", "rounding_seed")}

    def _direction(self, a: _Batch) -> tuple[Tensor, float]:
        """Seed and coefficient of the pair of sides."""
        assert self.step is not None
        assert a.bucket is not None
        k, c = self.step.pair(self.sides[:2], a.place)  # type: ignore[misc]
        return self.step.seeds[a.bucket.device][k : k + 1], c

    def _noise(self, a: _Batch) -> dict[str, Any]:
        assert a.bucket is not None
        return {"streams": a.streams, "dist": a.bucket.dist}

    def _perturb(self, side: int) -> list[Tensor]:
        """Scratch with the point of ``side``."""
        which = self.sides.index(side) % self.cache.scratches
        views = self.cache.scratch(self.block, which)
        for a in self._batches:
            if a.bucket is not None:
                assert self.step is not None
                out, params = ([v[i] for i in a.entries] for v in (views, self._params))
                seeds, coeffs = self.step.terms(side, a.place, a.bucket)
                combine(out, params, seeds, coeffs, streams=a.streams, dist=a.bucket.dist)
        self._made[side] = which
        return views

    def bind(self, side: int) -> None:
        """The block's parameters are what ``side`` computes with."""
        with torch.no_grad(), torch.inference_mode(False):
            if side in self._made:
                views = list(self.cache.scratch(self.block, self._made[side]))
            elif self.step is not None and any(a.bucket is not None for a in self._batches):
                with self.cache.timeline.span("update", self.block):
                    views = list(self._perturb(side))
            else:
                views = list(self.cache.scratch(self.block, 0))
            for i in self._fixed:
                if self._params[i].data_ptr() % _ALIGNED == 0:
                    views[i] = self._params[i]
                else:
                    views[i].copy_(self._params[i])
            for e, view in zip(self.block.entries, views, strict=True):
                e.param.data = view
        self._begin = self.cache.timeline.now()

    def leave(self) -> None:
        self.cache.timeline.add("compute", self.block, self._begin)
        self._left -= 1
        if self._left == 0:
            self.done()

    def _release(self) -> None:
        self._held = False
        self.cache.release(self.slot, onward=bool(self.sides))  # a look at one parameter is often followed by another

    def done(self) -> None:
        if self._held:
            self._release()


class WireVisit(Visit):
    """A block whose slot holds wire bytes, which are done with as soon as they are decoded."""

    everything = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._held:
            self._release()

    def _values(self) -> list[Tensor]:
        """Of the one decoded block, filled by :meth:`_apply`."""
        wire = self.cache.wire
        assert wire is not None
        self._wire, self._buffers = wire.layout.wire, wire.layout.buffers(self.block, self.slot.data)
        return wire.theta(self.block)

    def _apply(self, a: _Batch, passes: Sequence[Pass]) -> None:
        out, buffers = ([of[i] for i in a.entries] for of in (self._params, self._buffers))
        if out[0].dtype not in DTYPES:
            for value, buffer in zip(out, buffers, strict=True):
                value.view(-1).view(torch.uint8).copy_(buffer)
            return
        first: dict[str, Any] = {}
        if passes:
            one, *passes = passes
            fields = ("seeds", "coeffs", "dist", "decay", "rounding", "rounding_seed")
            first = {key: getattr(one, key) for key in fields}
        decode(out, buffers, self._wire, **first, streams=a.streams)
        super()._apply(a, passes)

    def _fan_out(self, a: _Batch) -> None:
        """In one pass, without theta, where no other side needs it and at most one update is pending."""
        update = self._last_update(a)
        if len(self.sides) > 2 or len(a.passes) > bool(update):
            return super()._fan_out(a)
        plus, minus = ([self.cache.scratch(self.block, s)[i] for i in a.entries] for s in (0, 1))
        buffers = [self._buffers[i] for i in a.entries]
        seed, coeff = self._direction(a)
        decode_fan_out(plus, minus, buffers, self._wire, seed, coeff, **self._noise(a), **update)
