"""Blocks whose copies are in scratch, and parameters that are open: they have the memory of a copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ...ops.plan import Plan, fingerprint, matches
from ..guards import uninterrupted
from ..noise import Members
from ..scratch import Arena, ScratchPool, Views, arena_numel
from ..types import Bucket
from .blocks import Block
from .functions import refuse_write
from .guard import guarded_kind, own_kind, set_data

_use_count: Callable[[Tensor], int] = Tensor._use_count  # type: ignore[attr-defined]
_version: Callable[[Tensor], int] = attrgetter("_version")
_arena_version: Callable[[Arena], int] = attrgetter("data._version")
_set_class: Callable[[Any, type], None] = object.__dict__["__class__"].__set__


def _each(function: Callable[..., object], *lists: Iterable[Any]) -> None:
    """Calls ``function`` for the members of lists, in C alone: a loop in Python takes half as long again."""
    deque(map(function, *lists), maxlen=0)


class untouched:
    """Inside, torch runs as it does without what a closure may be in: modes, transforms, guards, a graph."""

    __slots__ = ("_contexts",)

    def __enter__(self) -> None:
        self._contexts: list[Any] = [torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch()]
        if torch.is_grad_enabled():
            self._contexts.append(torch.no_grad())
        if torch.is_inference_mode_enabled():
            self._contexts.append(torch.inference_mode(False))
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


class Part:
    """The parameters of a block that are in one bucket.

    ``thetas`` are their own values, as other tensors over the same memory: with them a parameter gets its
    memory back that has had a copy's.
    """

    __slots__ = (
        "_found", "_planned", "_prints", "_step", "bucket", "guards", "ids", "key",
        "kinds", "members", "numel", "plan", "seen", "thetas",
    )  # fmt: skip

    def __init__(self, bucket: int, members: Members) -> None:
        self.bucket, self.members, self.ids = bucket, members, tuple(map(id, members.params))
        self.seen = dict.fromkeys(self.ids)
        self.thetas: list[Tensor] = []
        self.kinds: list[type[Tensor]] = []
        self.guards: list[type[Tensor]] = []
        self.key = object()  #: of the views of an arena
        self.numel = 0
        self.plan: Plan | None = None  #: of ``thetas``
        self._found: Any = None
        self._prints: bytes | None = None
        self._planned: Plan | None = None
        self._step = -1

    def renew(self, step: int, planned: Plan | None = None) -> None:
        """Looks, once a step, whether the parameters have other memory than before.

        ``planned``: the plan of their bucket, where nothing has run since the step found it to hold: then it
        is the one of the last step, unless the parameters are others.
        """
        if self._step == step:
            return
        known, self._planned = planned is not None and self._planned is planned, planned
        self._step, params = step, self.members.params
        if known or (self._prints is not None and matches(self._prints, (params,))):
            return
        found = [p.data_ptr() for p in params], [p.shape for p in params]
        if found != self._found:
            self.key = object()
            self.thetas, self._found, self.numel = [p.detach() for p in params], found, arena_numel(params)
            self.kinds = [own_kind(p) for p in params]
            self.guards = list(map(guarded_kind, self.kinds))
            self.plan = Plan(self.thetas, self.members.streams)
        self._prints = fingerprint((params,))  # None where they are guarded


class Owners:
    """Which bucket each parameter of a step is in, and so which calls make the copies of a block.

    It is kept from step to step, and made anew for other buckets.
    """

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets, self.step = buckets, 0
        self.params = {id(p): p for b in buckets for p in b.params}
        self.ids = dict.fromkeys(self.params)
        self._places = {
            id(p): (i, s) for i, b in enumerate(buckets) for p, s in zip(b.params, b.streams, strict=True)
        }
        self._parts: dict[Block, list[Part]] = {}

    @classmethod
    def renewed(cls, last: Owners | None, buckets: list[Bucket]) -> Owners:
        """``last``, if it is of buckets like these."""
        if last is None or len(last.buckets) != len(buckets) or not all(map(_alike, last.buckets, buckets)):
            return cls(buckets)
        last.buckets = buckets
        last.step += 1
        return last

    def place(self, param: Tensor) -> tuple[int, int]:
        """The number of a parameter's bucket, and the parameter's stream."""
        return self._places[id(param)]

    def parts(self, block: Block) -> list[Part]:
        if block not in self._parts:
            by_bucket: dict[int, tuple[list[Tensor], list[int]]] = {}
            for p in block.params:
                if (place := self._places.get(id(p))) is not None:  # a subset of the parameters may take part
                    at, stream = place
                    params, streams = by_bucket.setdefault(at, ([], []))
                    params.append(p)
                    streams.append(stream)
            made = [Part(at, Members(*found, self.buckets[at].dist)) for at, found in by_bucket.items()]
            if len(self._parts) >= 4096:  # of blocks of one forward each
                self._parts.clear()
            self._parts[block] = made
        return self._parts[block]

    def close(self, pool: ScratchPool) -> None:
        """Gives all parameters that still have memory of ``pool`` their own back."""
        scratch = pool.addresses()
        for part in (part for parts in self._parts.values() for part in parts):
            for p, theta in zip(part.members.params, part.thetas, strict=False):
                if p.untyped_storage().data_ptr() in scratch:
                    p.data = theta
        pool.give_all_back()


def _alike(a: Bucket, b: Bucket) -> bool:
    if a.params is b.params and a.streams is b.streams:  # of one plan, which is kept from step to step
        return a.dist == b.dist
    facts = lambda one: (one.device, one.dtype, one.dist, one.streams, list(map(id, one.params)))
    return bool(facts(a) == facts(b))


class Made:
    """A block whose copies are in scratch.

    If it is open, the memory of its parameters is that of the copies, and they are not guarded.
    """

    __slots__ = ("_params", "_versions", "arenas", "block", "is_open", "parts", "stays", "users", "views")

    def __init__(
        self, block: Block, owners: Owners, pool: ScratchPool, copies: int = 1, before: bool = False
    ) -> None:
        """``copies``: of each parameter, one behind the other.  ``before``: no forward of the step has
        begun.
        """
        self.block, self.parts, self.stays, self.is_open = block, owners.parts(block), block.kept, False
        self.users = 0  #: compiled functions that run now
        self.arenas: list[Arena] = []
        self.views: list[Views] = []
        self._versions: list[int] = []
        self._params: list[tuple[list[int], list[int]]] = []
        try:
            for i, part in enumerate(self.parts):
                part.renew(owners.step, owners.buckets[part.bucket].plan if before else None)
                params = part.members.params
                last = block.arenas[i] if i < len(block.arenas) else None
                self.arenas.append(pool.take(copies * part.numel, params[0], last))
                self.views.append(self.arenas[-1].views((part.key, copies), [*params] * copies))
        except BaseException:
            for arena in self.arenas:
                pool.give_back(arena)
            raise
        block.arenas = list(self.arenas)

    def written(self) -> None:
        """Called when the copies have their values."""
        self._versions = [*map(_arena_version, self.arenas)]

    def open(self) -> None:
        """Gives the parameters the memory of the copies, and no guard."""
        # What should not change, besides the memory: versions, and references from outside of Python.
        all_params = [part.members.params for part in self.parts]
        self._params = [(list(map(_version, params)), list(map(_use_count, params))) for params in all_params]
        self.is_open = True
        for part, params, views in zip(self.parts, all_params, self.views, strict=True):
            if list(map(type, params)) != part.kinds:
                _each(_set_class, params, part.kinds)
            _each(set_data, params, views.out)

    def close(self, guarded: bool) -> None:
        """Gives the parameters their own memory back, and perhaps their guard."""
        if self.is_open:
            for part in self.parts:
                params = part.members.params
                _each(set_data, params, part.thetas)
                if guarded:
                    _each(_set_class, params, part.guards)
            self.is_open = False

    def are_copies_written(self) -> bool:
        return self._versions != [*map(_arena_version, self.arenas)]

    def check(self) -> tuple[bool, bool]:
        """Whether the forward has written to the parameters, and whether an autograd graph refers to them.

        A write may also be other memory in the place of the copies.
        """
        written, graph = self.are_copies_written(), False
        if self.is_open:
            for part, views, (versions, counts) in zip(self.parts, self.views, self._params, strict=True):
                params = part.members.params
                written |= versions != list(map(_version, params))
                written |= views.pointers != list(map(Tensor.data_ptr, params))
                graph |= counts != list(map(_use_count, params))
        return written, graph

    def is_idle(self) -> bool:
        """Whether nothing else refers to the copies, so that there can be others in their place."""
        if not self.is_open:
            return all(map(Arena.idle, self.arenas))
        return all(map(Arena.idle, self.arenas, [len(part.ids) for part in self.parts]))


class Opened:
    """The open blocks that one forward of a step leaves to the next one, so that they are opened once."""

    def __init__(self, op: str, pool: ScratchPool) -> None:
        self.op, self.pool = op, pool
        self.blocks: list[Made] = []
        #: How many blocks have all parameters of the step, where they are open from the beginning.
        self.whole = 0

    def leave(self, guarded: bool, error: bool) -> None:
        """Closes the blocks.  ``error``: whether there is one already."""
        blocks, self.blocks = self.blocks, []
        close(self.op, blocks, self.pool, guarded, error)


def close(op: str, blocks: Sequence[Made], pool: ScratchPool, guarded: bool, error: bool = False) -> None:
    """Gives the parameters of blocks their own memory back, and refuses what has been done to the copies.

    ``error``: whether there is one already, so that none is raised here.
    """
    written = False
    if not blocks:
        return
    with uninterrupted(), untouched():
        for made in blocks:
            of_this, graph = made.check()
            written |= of_this
            made.close(guarded)
            if graph:  # a backward from here on, which would see theta, is an error
                torch.autograd.graph.increment_version(
                    [p for part in made.parts for p in part.members.params]
                )
            for arena in made.arenas:
                pool.give_back(arena)
    if written and not error:
        refuse_write(op)
