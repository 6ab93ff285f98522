"""The two-pass form of a step, whose update adds the next step's perturbation.

A step then costs two passes over the weights instead of three.  Between steps the weights hold a
perturbation, so everything that reads them must take it out first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..checks import fail
from .groups import label_of
from .hooks import ForwardHook
from .probes.inplace import InplaceProbe
from .probes.probe import Probe
from .roles import OptimizerView
from .state import DeviceState, HostState
from .types import Bucket, Point, Seeds, terms


class ThreePass:
    """The ordinary form: a step leaves the weights unperturbed, and the next one perturbs them itself."""

    in_two_pass = False
    #: The probe that has moved the weights to the next step's point; None where they are at theta.
    pending: InplaceProbe | None = None

    def probe(
        self, state: HostState | DeviceState, buckets: list[Bucket], seeds: Seeds
    ) -> InplaceProbe | None:
        """The probe of a step; None where it is the optimizer's own."""
        return None

    def release(self) -> None:
        """The step has taken :attr:`pending` over, and restores it."""

    def ahead(
        self, probe: Probe, state: HostState | DeviceState
    ) -> AbstractContextManager[list[tuple[Bucket, Point]]]:
        """Around the update of a step.

        Yields for each bucket the one whose ``at`` becomes which point when the bucket has its update.
        """
        return nullcontext([(b, {}) for b in probe.buckets])

    def flush(self) -> None:
        """The weights back to theta."""

    def drop_lost(self) -> None:
        """Called where a checkpoint is loaded: the weights are nowhere else than at theta then."""


class TwoPass(ThreePass):
    """Between steps the weights may stand at theta + eps z of the next step.

    :meth:`flush` takes the perturbation out again, rounded to nearest, with the seed, eps and dist that it
    was made with.  While a perturbation is pending, a forward of any module that holds one of its parameters
    flushes first, and so do ``state_dict`` and ``load_state_dict`` of ``modules``.  A copy or a pickle of
    these raises.
    """

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        #: False when the context has been left, even where an exception has cut its end short.
        self.in_two_pass = True
        self._handles: list[Any] = []
        self._forward_hook: ForwardHook | None = None

    def __enter__(self) -> TwoPass:
        hook, loading = _FlushHook(self), _FlushHook(self, drops=True)
        for module in {m: None for root in self.modules for m in root.modules()}:
            self._handles.append(module.register_state_dict_pre_hook(hook))
            self._handles.append(module.register_load_state_dict_pre_hook(loading))
        return self

    def __exit__(self, *exception: object) -> None:
        self.in_two_pass = False
        for handle in self._handles:
            handle.remove()

    def probe(self, state: HostState | DeviceState, buckets: list[Bucket], seeds: Seeds) -> InplaceProbe:
        """The pending probe, if it is of this seed, this step and just these ``buckets``; else a new one."""
        key, probe = (state.seed, state.step), self.pending
        if (
            probe is None
            or probe.key != key
            or [b.layout() for b in probe.buckets] != [b.layout() for b in buckets]
        ):
            self.flush()
            return InplaceProbe(buckets, seeds, key)
        for ours, planned in zip(probe.buckets, buckets, strict=True):
            ours.group = planned.group  # lr and weight decay are those of the step they act in
        return probe

    def release(self) -> None:
        self.pending = None
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    @contextmanager
    def ahead(self, probe: Probe, state: HostState | DeviceState) -> Iterator[list[tuple[Bucket, Point]]]:
        """The update of each bucket adds the next step's +eps z, too.

        Afterwards that step's probe is pending.
        """
        seeds, key = (
            state.seeds({b.device: None for b in probe.buckets}, 1, ahead=1),
            (state.seed, state.step + 1),
        )
        following = InplaceProbe([b.following() for b in probe.buckets], seeds, key)
        for b in probe.buckets:
            b.ahead = terms(b.point(0, 1), seeds[b.device])

        try:
            yield [(b, b.point(0, 1)) for b in following.buckets]
            # At once: from here on an exception of another thread meets weights at the next step's point.
            self.pending = following
            # Only between steps: inside the closure it would be traced into graphs of torch.compile.
            self._forward_hook = ForwardHook(self._before_forward)
        except BaseException:
            following.restore()
            raise
        finally:
            for b in probe.buckets:  # whoever finishes the update may be out of the two-pass form
                b.ahead = None

    def flush(self) -> None:
        if self.pending is not None:
            self.pending.restore()
            self.release()

    def drop_lost(self) -> None:
        if self.pending is not None and self.pending.lost:
            self.release()

    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        if self.pending is None:
            return
        params = [p for b in self.pending.buckets for p in b.params]
        # its parameters are other objects over the same memory
        if isinstance(module, torch.jit.ScriptModule):
            held = not {p.data_ptr() for p in params}.isdisjoint(p.data_ptr() for p in module.parameters())
        else:
            held = not {id(p) for p in params}.isdisjoint(map(id, module.parameters()))
        if held:
            self.flush()


class _FlushHook:
    """The hook of ``state_dict`` and ``load_state_dict``.  A copy of the module copies it with the module.

    ``drops``: whether weights that are lost may be overwritten.
    """

    def __init__(self, two_pass: TwoPass | None, drops: bool = False) -> None:
        self._two_pass = weakref.ref(two_pass) if two_pass else lambda: None
        self._drops = drops

    def __call__(self, *args: object) -> None:
        if two_pass := self._two_pass():
            if self._drops:
                two_pass.drop_lost()
            two_pass.flush()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if (two_pass := self._two_pass()) and two_pass.pending:
            raise RuntimeError(
                "ZOSGD: two_pass: expected flush() before a model is copied or pickled, got weights "
                "that hold the next "
                "step's perturbation"
            )
        return _FlushHook, (None,)


def check_two_pass(optimizer: OptimizerView, modules: tuple[nn.Module, ...]) -> None:
    """Raises where the two-pass form cannot begin.

    Every trained parameter must belong to one of ``modules``, or its state_dict would not flush.
    """
    op = optimizer.op
    if optimizer.restore != "inplace":
        fail(op, "two_pass", "restore='inplace'", repr(optimizer.restore))
    if optimizer.run_state.capturable:
        fail(
            op, "two_pass", "capturable=False: a graph would replay on weights that hold a perturbation", True
        )
    if optimizer.in_two_pass:
        fail(op, "two_pass", "one at a time", "a second one inside it", RuntimeError)
    held = {id(p) for m in modules for p in m.parameters()}
    for at, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if param.requires_grad and id(param) not in held:
                expected = (
                    "the modules that own all trained parameters (torch.nn.ParameterList for bare ones)"
                )
                fail(op, "two_pass", expected, f"none with {label_of(group, i)} of group {at}")
