"""A block that is open: it is in a slot and up to date, and scratch holds what each side computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..checks import DTYPES
from ..functional import decode, decode_fan_out, fan_out_
from ..step.deferred import Pass
from ..step.noise import Members
from ..step.types import Bucket, Point, Seeds, terms
from ..wire import Wire
from .blocks import Block, aliases
from .cache import BlockCache
from .history import Batch, HistoryNoise, Perturbed, apply_passes
from .layout import Place
from .movers import Slot

#: The wire format that has the bytes of a stored dtype as they are.
_WIRES: dict[torch.dtype, Wire] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Bytes to which torch aligns its own memory.  A matrix product may choose another kernel for less aligned
#: memory.
_ALIGNED = 64


class SidePoints(NamedTuple):
    """The points of a step's forwards, which are called sides, in each bucket."""

    of: Perturbed
    points: list[list[Point]]  #: of each side, one for each bucket
    seeds: Seeds
    #: Whether sides compute with dual numbers at theta, whose tangents are the directions of their points.
    tangents: bool = False

    def terms(self, side: int, place: int, bucket: Bucket) -> tuple[Tensor, Tensor]:
        return terms(self.points[side][place], self.seeds[bucket.device])

    def pair(self, sides: Sequence[int], place: int) -> tuple[int, float] | None:
        """(k, c), if two sides are at theta + c z_k and theta - c z_k; else None."""
        plus, minus = (self.points[s][place] for s in sides)
        if len(plus) == 1 and plus.keys() == minus.keys():
            ((k, c), d) = next(iter(plus.items())), next(iter(minus.values()))
            if isinstance(c, float) and isinstance(d, float) and c == -d:
                return k, c
        return None


class Visit:
    """Brings a block in a slot up to date, and makes what each side computes with in scratch.

    With two sides at theta +- c z, one pass makes the last update and both perturbations.  Other points are
    made when their side comes (:meth:`bind`).
    """

    #: True if parameters without an update and a perturbation need a call, too.
    everything = False

    def __init__(
        self, cache: BlockCache, block: Block, slot: Slot, sides: Sequence[int], step: SidePoints | None
    ) -> None:
        self.cache, self.block, self.slot, self.step = cache, block, slot, step
        self.sides, self._left = list(sides), len(sides)
        self._replaced: list[tuple[nn.Module, str, Tensor]] = []  # parameters, by dual numbers
        self._same: dict[int, Tensor] = {}  # by number of the entry
        self._params = self._values()
        self._held = True
        since = slot.updates
        perturbed = step.of if step else {}
        self._batches = cache.history.batches(block, since, perturbed, self.everything, slot.measured)
        if any(one.measures for a in self._batches for one in a.passes[-1:]):
            slot.measured = cache.history.tries
        if any(a.passes for a in self._batches):
            cache.mover.settle(slot)
        self._fixed = [i for i, e in enumerate(block.entries) if id(e.param) not in perturbed]
        with cache.timeline.span("update", block):
            pair = self._pair()
            for a in self._batches:
                if pair and a.bucket is not None:
                    self._fan_out(a)
                else:
                    self._apply(a, a.passes)
            #: The number of the scratch buffer that holds a side's point, by side.
            self._made: dict[int, int] = dict(zip(pair or (), (0, 1)))  # noqa: B905
        if since < cache.history.end:
            cache.updated(block, slot)
        if len(self._made) == self._left and sides and not self._fixed:
            self._release()

    def _values(self) -> list[Tensor]:
        """The parameters as they are in the slot."""
        return self.slot.params(self.block)

    def _views(self) -> Mapping[int, Tensor]:
        """The parameters and their states, as :meth:`Block.views` has them."""
        return self.slot.views(self.block)

    def _pair(self) -> list[int] | None:
        """The first two sides, if one pass can update the block and perturb it for both."""
        pair, perturbed = self.sides[:2], [a for a in self._batches if a.bucket is not None]
        if len(pair) < 2 or self.cache.scratches < 2 or self.step is None or not perturbed:
            return None
        if self.step.tangents:
            return None
        noises = [cast("HistoryNoise", a.bucket.noise) for a in perturbed if a.bucket is not None]
        if not all(noise.fans_out for noise in noises):
            return None
        together = all(self.step.pair(pair, a.place) for a in perturbed)
        return pair if together else None

    def _apply(self, a: Batch, passes: Sequence[Pass]) -> None:
        if passes:
            bound = [one.bound(self._views()) for one in passes]
            apply_passes([self._params[i] for i in a.entries], a.streams, bound)

    def _fan_out(self, a: Batch) -> None:
        """Makes the last update and both perturbations in one pass."""
        if (wire := self._widened(a)) is not None:
            return self._fan_out_widened(a, wire)
        update = self._last_update(a)
        self._apply(a, a.passes[:-1] if update else a.passes)
        params, plus, minus = (
            [views[i] for i in a.entries]
            for views in (self._params, *(self.cache.scratch(self.block, s) for s in (0, 1)))
        )
        seed, coeff, noise = self._pair_noise(a)
        fan_out_(params, plus, minus, seed, coeff, **noise, **update)

    def _widened(self, a: Batch) -> Wire | None:
        """How the bytes in the slot are decoded, where forwards compute in a wider dtype than is stored."""
        first = self.block.entries[a.entries[0]]
        return _WIRES[first.dtype] if first.is_widened else None

    def _fan_out_widened(self, a: Batch, wire: Wire) -> None:
        """Makes the updates, each rounded as it is stored, and then both perturbations in fp32."""
        self._apply(a, a.passes)
        plus, minus = ([self.cache.scratch(self.block, s)[i] for i in a.entries] for s in (0, 1))
        stored = [self.block.entries[i].bytes_of(self.slot.data) for i in a.entries]
        seed, coeff, noise = self._pair_noise(a)
        decode_fan_out(plus, minus, stored, wire, seed, coeff, **noise)

    def _last_update(self, a: Batch) -> dict[str, Any]:
        """The last update as arguments of a fan-out; none where it is no combine of that distribution."""
        assert a.bucket is not None
        if not a.passes or not a.passes[-1].is_combine or a.passes[-1].dist != a.bucket.dist:
            return {}
        return {
            key: getattr(a.passes[-1], key)
            for key in ("seeds", "coeffs", "decay", "rounding", "rounding_seed")
        }

    def _pair_noise(self, a: Batch) -> tuple[Tensor, float, dict[str, Any]]:
        """The seed and the coefficient of the pair of sides, and the noise's other arguments."""
        assert self.step is not None
        assert a.bucket is not None
        k, c = self.step.pair(self.sides[:2], a.place)  # type: ignore[misc]
        return self.step.seeds[a.bucket.device][k : k + 1], c, {"streams": a.streams, "dist": a.bucket.dist}

    def _perturb(self, side: int) -> list[Tensor]:
        """Makes the point of ``side`` in scratch, or its tangent alone."""
        which = self.sides.index(side) % self.cache.scratches
        views = self.cache.scratch(self.block, which)
        for a in self._batches:
            if a.bucket is not None:
                assert self.step is not None
                out, params = ([v[i] for i in a.entries] for v in (views, self._params))
                noise_terms = self.step.terms(side, a.place, a.bucket)
                if self._widened(a) is not None:
                    for value, theta in zip(out, params, strict=True):
                        value.copy_(theta)
                    here = zip((self.block.entries[i] for i in a.entries), out, strict=True)
                    noise = a.bucket.noise.bound({**self._views(), **{id(e.param): t for e, t in here}})
                    noise.move(Members(out, a.streams, a.bucket.dist), *noise_terms)
                    continue
                members = Members(params, a.streams, a.bucket.dist)
                noise = a.bucket.noise.bound(self._views())
                options: dict[str, Any] = {"decay": 0.0} if self.step.tangents else {}
                noise.perturb(out, members, *noise_terms, **options)
        self._made[side] = which
        return views

    def bind(self, side: int) -> None:
        """Lets the block's parameters be what ``side`` computes with."""
        with torch.no_grad(), torch.inference_mode(False):
            if side in self._made:
                views = list(self.cache.scratch(self.block, self._made[side]))
            elif self.step is not None and any(a.bucket is not None for a in self._batches):
                with self.cache.timeline.span("update", self.block):
                    views = list(self._perturb(side))
            else:
                views = list(self.cache.scratch(self.block, 0))
            for i in self._fixed:
                views[i] = self._as_it_is(i)
            if self.step is not None and self.step.tangents:
                self._dual(views)
            else:
                for e, view in zip(self.block.entries, views, strict=True):
                    e.param.data = view
        self._begin = self.cache.timeline.now()

    def _as_it_is(self, i: int) -> Tensor:
        """What all sides compute with of a parameter that none perturbs."""
        if i not in self._same:
            self._same[i] = self._params[i]
            if self._params[i].data_ptr() % _ALIGNED or self.block.entries[i].is_widened:
                self._same[i] = self.cache.scratch(self.block, 0)[i].copy_(self._params[i])
        return self._same[i]

    def _dual(self, views: list[Tensor]) -> None:
        """Lets modules have dual numbers in the place of their parameters, with ``views`` as tangents."""
        duals = {}
        for i, (e, theta) in enumerate(zip(self.block.entries, self._params, strict=True)):
            if i in self._fixed:
                e.param.data = views[i]
                continue
            aligned = theta if theta.data_ptr() % _ALIGNED == 0 else theta.clone()
            duals[id(e.param)] = forward_ad.make_dual(aligned, views[i])
        for _, module, key, p in list(aliases(self.block.module)):
            if id(p) in duals:
                module._parameters[key] = duals[id(p)]
                self._replaced.append((module, key, p))

    def leave(self) -> None:
        """Called when a side has run through the block."""
        self.cache.timeline.add("compute", self.block, self._begin)
        for module, key, p in self._replaced:
            module._parameters[key] = p  # type: ignore[assignment]
        self._replaced = []
        self._left -= 1
        if self._left == 0:
            self.done()

    def _release(self) -> None:
        self._held = False
        # Without sides it was a look at some parameter, which is often followed by a look at another of the
        # block.
        self.cache.release(self.slot, onward=bool(self.sides))

    def done(self) -> None:
        if self._held:
            self._release()


class WireVisit(Visit):
    """A visit to a block whose slot holds wire bytes, which are no longer needed once they are decoded."""

    everything = True  # all parameters must be decoded

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._held:
            self._release()

    def _values(self) -> list[Tensor]:
        """The parameters of the one decoded block, which :meth:`_apply` fills."""
        wire = self.cache.wire
        assert wire is not None
        self._wire, self._places = wire.layout.wire, wire.layout.places[self.block.index]
        return wire.theta(self.block)

    def _places_of(self, a: Batch) -> tuple[list[Place], list[Tensor], dict[str, Any]]:
        """Where the parameters of a batch are in the slot, their bytes there, and arguments of a kernel."""
        stream = dict(zip(a.entries, a.streams, strict=True))
        places = [place for of_rank in self._places for place in of_rank if place.entry in stream]
        options = {"streams": [stream[p.entry] for p in places], "offsets": [p.part.start for p in places]}
        return places, [place.of(self.slot.data) for place in places], options

    def _views(self) -> Mapping[int, Tensor]:
        """The parameters alone: states stay on the host."""
        return {id(e.param): t for e, t in zip(self.block.entries, self._params, strict=True)}

    def _apply(self, a: Batch, passes: Sequence[Pass]) -> None:
        places, buffers, options = self._places_of(a)
        out = [self._params[p.entry].view(-1)[p.part] for p in places]
        if out[0].dtype not in DTYPES:
            for value, buffer in zip(out, buffers, strict=True):
                value.view(torch.uint8).copy_(buffer)
            return super()._apply(a, passes)
        first: dict[str, Any] = {}
        if passes and passes[0].is_combine:
            one, *passes = passes
            fields = ("seeds", "coeffs", "dist", "decay", "rounding", "rounding_seed")
            first = {key: getattr(one, key) for key in fields}
        decode(out, buffers, self._wire, **first, **options)
        super()._apply(a, passes)

    def _fan_out(self, a: Batch) -> None:
        """One pass decodes, updates and perturbs, and does not store theta.

        This needs two sides, and at most one pending update.
        """
        update = self._last_update(a)
        if len(self.sides) > 2 or len(a.passes) > bool(update):
            return super()._fan_out(a)
        places, buffers, options = self._places_of(a)
        scratch = [self.cache.scratch(self.block, s) for s in (0, 1)]
        plus, minus = ([of[p.entry].view(-1)[p.part] for p in places] for of in scratch)
        seed, coeff, noise = self._pair_noise(a)
        decode_fan_out(plus, minus, buffers, self._wire, seed, coeff, **{**noise, **options}, **update)
