"""The exact probe: the weights stay, and each torch function of a forward gets perturbed copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..guards import uninterrupted
from ..scratch import ScratchPool
from ..types import Bucket, Point, Seeds
from .blocks import Blocks
from .functions import USE_INPLACE, HiddenParameters
from .guard import release
from .hidden import guarded, leave
from .made import Made, Opened, Owners, untouched
from .probe import Probe
from .substitute import Substitution, Tangents


class ExactProbe(Probe):
    """Parameters are guarded while forwards run, each of them under a :class:`Substitution`.

    Nothing is ever written to a weight.  TorchScript is refused, and a warning names parameters that no
    function took.

    Args:
        pool, blocks: of the optimizer, which keeps them from step to step.
        warned: the warnings already given.
        shared: whether forwards run in several threads in turn, so that no block can be open.
    """

    kind: type[Substitution] = Substitution

    def __init__(
        self,
        op: str,
        buckets: list[Bucket],
        seeds: Seeds,
        pool: ScratchPool,
        blocks: Blocks,
        warned: set[str],
        shared: bool = False,
    ) -> None:
        super().__init__(buckets, seeds)
        self.op, self.pool, self.blocks, self.warned = op, pool, blocks, warned
        blocks.least = shared  # beside weights that are streamed to save memory
        self._owners = blocks.owners = Owners.renewed(blocks.owners, buckets)
        self._opened = Opened(op, pool)
        self._contexts: list[AbstractContextManager[object]] = []  #: around the forwards, outermost first
        #: Whether the next forward looks at every function; always, where threads share the parameters.
        self._looks, self._shared = blocks.begin() or shared, shared

    def forwards(
        self, points: Iterable[Any], share: range, same_rng: Iterator[AbstractContextManager[None]], run: Any
    ) -> list[Any]:
        error = True
        try:
            self._begin()
            results = super().forwards(points, share, same_rng, run)
            error = False
        finally:
            self._end(error)
        return results

    def at(self, points: list[Point]) -> AbstractContextManager[object]:
        return self.point(points)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around forwards, in whichever thread they run."""
        error = True
        try:
            self._begin()
            yield
            error = False
        finally:
            self._end(error)

    def _begin(self) -> None:
        owners, blocks = self._owners, self.blocks
        opens = self.kind.opens and not self._looks and not self._shared
        whole = blocks.whole(owners.params) if opens else []
        compiled = blocks.compiled
        compiled.renew(owners.params)
        if compiled.regions and not self.kind.opens:
            self._enter(torch.compiler.set_stance("force_eager"))
            self._warn_once(
                "compiled", f"{self.kind.__name__.lower()} run torch.compile'd functions uncompiled"
            )
        self._enter(guarded(self.op, owners.params, not whole))
        if compiled.regions:
            self._enter(compiled.watched())
        if whole:  # a small model is open from the beginning
            self._opened.whole = len(whole)
            with untouched():
                for block in whole:
                    self._opened.blocks.append(Made(block, owners, self.pool, before=True))
                    self._opened.blocks[-1].open()

    def _enter(self, context: AbstractContextManager[object]) -> None:
        context.__enter__()
        self._contexts.append(context)

    def _end(self, error: bool) -> None:
        """May be called again, where an exception of another thread has cut it short."""
        opened = self._opened
        kept = len(opened.blocks) == opened.whole
        try:
            opened.leave(guarded=not opened.whole, error=error)
            if opened.whole and not kept:  # a forward could not go on with the scratch of the one before
                release(self._owners.params.values())
        finally:
            while self._contexts:
                self._contexts[-1].__exit__(None, None, None)
                del self._contexts[-1]

    def point(self, points: list[Point]) -> AbstractContextManager[object]:
        """Around one forward, inside :meth:`watching`, for its thread alone."""
        opened = Opened(self.op, self.pool) if self._shared else self._opened
        options = (self.blocks, self.seeds, self.pool, points, self._looks, opened, self._tell_unseen)
        forward = self.kind(self.op, self._owners, *options)
        forward.opens = forward.opens and not self._shared
        self._looks = self._looks and self._shared
        return forward

    def mend(self) -> None:
        with uninterrupted(), untouched():
            self._owners.close(self.pool)
            release(self._owners.params.values())
        leave(self._owners.params)

    def _tell_unseen(self, seen: dict[int, None]) -> None:
        if not seen:
            raise HiddenParameters(
                f"{self.op}: closure: expected torch functions that take the parameters, got none "
                "(another model, or a "
                f"graph that holds them: TorchScript, CUDA graph, C++ extension); {USE_INPLACE}"
            )
        unseen = [
            name for b in self.buckets for p, name in zip(b.params, b.names, strict=True) if id(p) not in seen
        ]
        total = sum(len(b.params) for b in self.buckets)
        few = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        self._warn_once(
            "unseen",
            f"{len(unseen)} of {total} parameters were taken by no torch function of the "
            f"closure ({few}): either the forward does not use them, or something that hides them does "
            f"(TorchScript function, C++ extension); then {USE_INPLACE}",
        )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"{self.op}: {message}", stacklevel=2)


class TangentProbe(ExactProbe):
    """Forwards at theta itself, of dual tensors whose tangents are the points' directions, at length 1."""

    kind = Tangents

    @contextmanager
    def point(self, points: list[Point]) -> Iterator[None]:
        around = nullcontext() if self._shared else dual_numbers()
        with around, super().point(unit_points(points)):
            yield


def unit_points(points: list[Point]) -> list[Point]:
    """The points of tangents: each direction at length 1."""
    return [dict.fromkeys(point, 1.0) for point in points]


@contextmanager
def dual_numbers() -> Iterator[None]:
    """Around forwards of dual numbers: one forward, or all that run in turn, for this holds in all threads.

    Fused attention has no forward-mode derivative.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        yield
