"""The two-pass form: the update adds the next step's perturbation, and everything that reads weights takes it out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..checks import fail
from .direction import terms
from .groups import Bucket, label_of
from .inplace import InplaceProbe
from .probe import Probe
from .state import DeviceState, HostState


class TwoPass:
    """Between steps the weights may stand at theta + eps z of the next step; ``pending`` is the probe that moved them.

    :meth:`flush` takes it out again, rounded to nearest, with the seed, eps and dist it was made with.  While something
    is pending, a forward of any module that holds one of its parameters flushes first; so do ``state_dict`` and
    ``load_state_dict`` of ``modules``, and a copy or a pickle of them raises.
    """

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        self.pending: InplaceProbe | None = None
        self._handles: list[Any] = []
        self._forward_hook: Any = None

    def __enter__(self) -> TwoPass:
        hook = _FlushHook(self)
        for module in {m: None for root in self.modules for m in root.modules()}:
            self._handles.append(module.register_state_dict_pre_hook(hook))
            self._handles.append(module.register_load_state_dict_pre_hook(hook))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def following(self, probe: Probe, state: HostState | DeviceState) -> InplaceProbe:
        """The next step's probe, over the same buckets, of which none has moved yet: their update will."""
        seeds = state.seeds({b.device: None for b in probe.buckets}, 1, ahead=1)
        following = [replace(b, at={}) for b in probe.buckets]
        for b in probe.buckets:
            b.ahead = terms(b.point(0, 1), seeds[b.device])
        return InplaceProbe(following, seeds, (state.seed, state.step + 1))

    def keep(self, probe: InplaceProbe) -> None:
        """``probe`` has moved the weights."""
        self.pending = probe
        # Only between steps: inside the closure it would be traced into graphs of torch.compile.
        self._forward_hook = register_module_forward_pre_hook(self._before_forward)

    def release(self) -> None:
        """The step has taken ``pending`` over."""
        self.pending = None
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def flush(self) -> None:
        if self.pending is not None:
            self.pending.restore()
            self.release()

    def take(self, key: tuple[int, int], buckets: list[Bucket]) -> InplaceProbe | None:
        """The pending probe where it is that of (run seed, step) and of just these ``buckets``; else flush."""
        probe = self.pending
        if probe is None or probe.key != key or [b.layout() for b in probe.buckets] != [b.layout() for b in buckets]:
            self.flush()
            return None
        for ours, planned in zip(probe.buckets, buckets, strict=True):
            ours.group = planned.group  # lr and weight decay are those of the step they act in
        return probe

    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        if self.pending is None:
            return
        params = [p for b in self.pending.buckets for p in b.params]
        if isinstance(module, torch.jit.ScriptModule):  # its parameters are other objects over the same memory
            held = not {p.data_ptr() for p in params}.isdisjoint(p.data_ptr() for p in module.parameters())
        else:
            held = not {id(p) for p in params}.isdisjoint(map(id, module.parameters()))
        if held:
            self.flush()


class _FlushHook:
    """Hook of ``state_dict`` and ``load_state_dict``.  It is part of the module, so a copy of the module copies it."""

    def __init__(self, two_pass: TwoPass | None) -> None:
        self._two_pass = weakref.ref(two_pass) if two_pass else lambda: None

    def __call__(self, *args: object) -> None:
        if two_pass := self._two_pass():
            two_pass.flush()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if (two_pass := self._two_pass()) and two_pass.pending:
            raise RuntimeError(
                "ZOSGD: two_pass: expected flush() before a model is copied or pickled, got weights that hold the next "
                "step's perturbation"
            )
        return _FlushHook, (None,)


def check_two_pass(
    op: str,
    restore: str,
    state: HostState | DeviceState,
    current: TwoPass | None,
    groups: list[dict[str, Any]],
    modules: tuple[nn.Module, ...],
) -> None:
    """Every trainable parameter must be one of ``modules``, or its state_dict would not flush."""
    if restore != "inplace":
        fail(op, "two_pass", "restore='inplace'", repr(restore))
    if state.capturable:
        fail(op, "two_pass", "capturable=False: a graph would replay on weights that hold a perturbation", True)
    if current:
        fail(op, "two_pass", "one at a time", "a second one inside it", RuntimeError)
    held = {id(p) for m in modules for p in m.parameters()}
    for at, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.requires_grad and id(param) not in held:
                expected = "the modules that own all trained parameters (torch.nn.ParameterList for bare ones)"
                fail(op, "two_pass", expected, f"none with {label_of(group, i)} of group {at}")
