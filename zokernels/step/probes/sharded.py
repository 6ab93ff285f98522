"""Probes of sharded weights, whose shards themselves must hold the point before a forward.

FSDP gathers a module's weights from its shards, where no function mode can replace them.  The exact probe
therefore keeps a copy of this rank's shards, which is one over the number of ranks of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..guards import uninterrupted
from ..hooks import ForwardHook
from ..scratch import Arena, ScratchPool, arena_numel
from ..shard import locals_of
from ..types import Bucket, Point, Seeds, terms
from .inplace import InplaceProbe
from .probe import Probe


@contextmanager
def gathered_anew() -> Iterator[None]:
    """Inside, FSDP modules gather their weights from the shards at each forward, and keep none at the end.

    FSDP leaves the root's weights gathered after a forward.  The next forward would see the point before in
    them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        yield
        return
    seen: dict[Any, None] = {}

    def before(module: nn.Module, inputs: object) -> None:
        if isinstance(module, kind):
            if module not in seen:
                module.reshard()
            seen[module] = None

    hook = ForwardHook(before)
    try:
        yield
    finally:
        hook.remove()
        for module in seen:
            module.reshard()


class MovedShardProbe(InplaceProbe):
    """The in-place probe: the shards move, and each move rounds to nearest."""

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        with super().at(points), gathered_anew():
            yield


class CopiedShardProbe(Probe):
    """The exact probe: points are computed from a copy of the shards, which is put back before the update."""

    update_may_restore = False

    def __init__(self, buckets: list[Bucket], seeds: Seeds, pool: ScratchPool) -> None:
        super().__init__(buckets, seeds)
        self._pool = pool
        self._copies: list[list[Tensor]] | None = None
        self._arenas: list[Arena] = []

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        if self._copies is None:
            self._copies = [self._copy(list(locals_of(b.params))) for b in self.buckets]
        with uninterrupted():
            for b, theta, point in zip(self.buckets, self._copies, points, strict=True):
                b.noise.perturb(b.params, b.members, *terms(point, self.seeds[b.device]), theta=theta)
            torch.clear_autocast_cache()
        with gathered_anew():
            yield

    def _copy(self, weights: list[Tensor]) -> list[Tensor]:
        arena = self._pool.take(arena_numel(weights), weights[0])
        self._arenas.append(arena)
        # Other subsets of the parameters have other views.
        like = [(t.shape, t.stride(), t.requires_grad) for t in weights]
        copies = arena.views(("shards", *like), weights).out
        torch._foreach_copy_(copies, weights)
        return copies

    def restore(self) -> None:
        if self._copies is not None:
            with uninterrupted():
                for b, theta in zip(self.buckets, self._copies, strict=True):
                    torch._foreach_copy_([w.detach() for w in locals_of(b.params)], theta)
                torch.clear_autocast_cache()
            self._copies = None
        while self._arenas:
            self._pool.give_back(self._arenas.pop())
