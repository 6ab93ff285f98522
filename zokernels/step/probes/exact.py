"""The exact probe: the weights stay, and each torch function of a forward gets perturbed copies."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from ..scratch import ScratchPool
from ..types import Bucket, Point, Seeds
from .probe import Probe
from .substitute import USE_INPLACE, HiddenParameters, Substitution, Tangents


class ExactProbe(Probe):
    """Forwards run under a :class:`Substitution`, and nothing is ever written to a weight.

    The probe looks for what the substitution cannot see.  torch.compile is told to run eagerly, TorchScript
    is refused, and a warning names parameters that no function took.  ``warned``: the warnings already given.
    """

    def __init__(self, op: str, buckets: list[Bucket], seeds: Seeds, pool: ScratchPool, warned: set[str]) -> None:
        super().__init__(buckets, seeds)
        self.op, self.pool, self.warned = op, pool, warned
        self._addresses = {p.data_ptr() for b in buckets for p in b.params}

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        with self.watching(), self.point(points):
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around forwards, for the whole process.

        A graph of torch.compile takes parameters as hidden inputs.  Run eagerly, it calls functions that we
        see.
        """
        hook = register_module_forward_pre_hook(self._check_module)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            hook.remove()

    @contextmanager
    def point(self, points: list[Point]) -> Iterator[None]:
        """Around one forward, inside :meth:`watching`, for its thread alone."""
        mode, cached = self._mode(points), torch.is_autocast_cache_enabled()
        try:
            torch.set_autocast_cache_enabled(False)  # it would keep a cast of every copy, which is a second model
            with mode:
                yield
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._check_seen(mode.seen)

    def _mode(self, points: list[Point]) -> Substitution:
        return Substitution(self.op, self.buckets, self.seeds, self.pool, points)

    def _check_seen(self, seen: set[int]) -> None:
        if not seen:
            raise HiddenParameters(
                f"{self.op}: closure: expected torch functions that take the parameters, got none (another model, or a "
                f"graph that holds them: TorchScript, CUDA graph, C++ extension); {USE_INPLACE}"
            )
        unseen = [name for b in self.buckets for p, name in zip(b.params, b.names, strict=True) if id(p) not in seen]
        if unseen:
            total = sum(len(b.params) for b in self.buckets)
            few = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            self._warn_once(
                "unseen",
                f"{len(unseen)} of {total} parameters were taken by no torch function of the "
                f"closure ({few}): either the forward does not use them, or something that hides them does "
                f"(TorchScript function, C++ extension); then {USE_INPLACE}",
            )

    def _check_module(self, module: nn.Module, inputs: object) -> None:
        """A global forward pre-hook, which is called for every module of the forward."""
        if isinstance(module, torch.jit.ScriptModule):
            with torch._C.DisableTorchFunction():
                hidden = any(p.data_ptr() in self._addresses for p in module.parameters())
            if hidden:
                raise HiddenParameters(
                    f"{self.op}: closure: expected modules whose functions take the parameters, got the TorchScript "
                    f"module {module.original_name!r}; {USE_INPLACE}"
                )
        eval_frame = sys.modules.get("torch._dynamo.eval_frame")
        if module._compiled_call_impl is not None or (eval_frame and isinstance(module, eval_frame.OptimizedModule)):
            self._warn_once(
                "compiled",
                "restore='exact' runs torch.compile'd modules uncompiled, because a graph would hide their parameters; "
                "restore='inplace' keeps them compiled",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"{self.op}: {message}", stacklevel=2)


class TangentProbe(ExactProbe):
    """Forwards at theta itself, of dual tensors whose tangents are the points' directions, at length 1."""

    @contextmanager
    def point(self, points: list[Point]) -> Iterator[None]:
        unit: list[Point] = [dict.fromkeys(point, 1.0) for point in points]
        # Fused attention has no forward-mode derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), super().point(unit):
            yield

    def _mode(self, points: list[Point]) -> Substitution:
        return Tangents(self.op, self.buckets, self.seeds, self.pool, points)
