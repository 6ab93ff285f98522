"""The first-order part of a hybrid step: gradients of some parameters, beside forwards for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..step.groups import devices_of
from ..step.guards import RngState
from ..step.loss import WITHOUT_ARGUMENTS, call
from ..step.probes.probe import Probe
from ..step.step import StepOptimizer
from ..step.types import Estimate


class FirstOrder:
    """An optimizer of torch that takes its steps with those of ``owner``.

    Its gradients are taken at theta, before the first perturbation; both updates come after the last forward.
    Parameters of ``owner`` alone get no gradient.  All forwards, the one with gradients included, begin with
    one RNG state.  If a loss of the step is not finite, neither optimizer moves anything; to know that, the
    host waits for the losses, which steps of ``owner`` alone do not.
    """

    def __init__(self, owner: StepOptimizer, optimizer: Any, closure: Callable[[], Any] | None) -> None:
        op = owner.op
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, StepOptimizer):
            got = type(optimizer).__name__
            expected = "an optimizer of torch.optim, or another one with gradients"
            fail(op, "first_order", expected, got, TypeError)
        asked = inspect.signature(optimizer.step).parameters.get("closure")
        if asked is not None and asked.default is inspect.Parameter.empty:
            got = f"{type(optimizer).__name__}, whose step evaluates a closure of its own"
            fail(op, "first_order", "an optimizer that takes a step with the gradients that are there", got)
        if closure is not None and not callable(closure):
            fail(op, "first_order_closure", "a function that returns a loss", repr(closure), TypeError)
        if not owner.team.alone:
            fail(op, "mesh", "None with first_order: gradients are not exchanged", "one")
        if not owner.home.in_memory:
            fail(
                op, "params", "parameters in memory with first_order", "streamed ones: they have no backward"
            )
        if owner.run_state.capturable:
            fail(op, "capturable", "False with first_order", True)
        self.owner, self.optimizer, self.closure = owner, optimizer, closure
        own = {id(p) for group in owner.param_groups for p in group["params"]}
        #: Whether a parameter belongs to both, as in Addax.
        self.shares = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        self._finite = torch.tensor(True)

    def measure(self, closure: Callable[[], Any]) -> None:
        """Gives the optimizer's parameters their gradients at theta."""
        owner, optimizer = self.owner, self.optimizer
        owner.flush()
        rng = RngState(devices_of([*owner.param_groups, *optimizer.param_groups]), owner.generators)
        optimizer.zero_grad(set_to_none=True)
        with self._frozen(), torch.enable_grad():
            own = closure if self.closure is None else self.closure
            loss = call(owner.op, own, (), WITHOUT_ARGUMENTS)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                got = "one without a gradient" if isinstance(loss, Tensor) else repr(loss)
                expected = "a scalar loss that depends on parameters of the first-order optimizer"
                fail(owner.op, "closure", expected, got, TypeError)
            params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            torch.autograd.backward(loss.sum(), inputs=params)
        rng.restore()
        self._finite = loss.detach().isfinite().all()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside, parameters of the owner alone take no part in backward."""
        mine = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        params = [p for group in self.owner.param_groups for p in group["params"]]
        others = [p for p in params if p.requires_grad and id(p) not in mine]
        try:
            for p in others:
                p.requires_grad_(False)
            yield
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            for p in others:
                p.requires_grad_(True)

    def consume(self, finish: Callable[[Probe, Estimate], object]) -> Callable[[Probe, Estimate], None]:
        """What a step calls in the place of ``finish``, its own update: both updates."""

        def both(probe: Probe, estimate: Estimate) -> None:
            finite = bool(self._finite)
            if not finite:  # then the other part does not move either
                estimate = estimate._replace(finite=torch.zeros_like(estimate.finite), skip=False)
                zeros = [torch.zeros_like(g) for g in estimate.gradients]
                estimate = estimate._replace(gradients=zeros)
            finish(probe, estimate)
            if finite and bool(estimate.finite):
                with torch.enable_grad():
                    self.optimizer.step()

        return both

    def clear(self) -> None:
        """Gives the memory of the gradients back."""
        self.optimizer.zero_grad(set_to_none=True)
