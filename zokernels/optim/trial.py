"""Steps and forwards on trial, after which weights and random numbers are what they were, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..checks import fail
from ..step.groups import devices_of, takes_part
from ..step.guards import RngState
from ..step.loss import as_loss, call, run_closure
from ..step.step import StepOptimizer

T = TypeVar("T", bound=StepOptimizer)


class Unchanged:
    """A context after which everything is as it was: weights, buffers and random numbers.

    That is: the optimizer's trainable parameters, the buffers of ``model`` (running means of a BatchNorm),
    torch's random numbers, and the optimizer's generators.
    """

    def __init__(self, optimizer: StepOptimizer, model: nn.Module | None = None) -> None:
        optimizer.flush()
        groups = optimizer.param_groups
        params = [p for g in groups for p in g["params"] if takes_part(g, p)]
        self._tensors = [*params, *(model.buffers() if model is not None else [])]
        self._kept = [t.detach().clone() for t in self._tensors]
        self.random = RngState(devices_of(groups), optimizer.generators)

    @torch.no_grad()
    def restore_weights(self) -> None:
        for tensor, value in zip(self._tensors, self._kept, strict=True):
            tensor.copy_(value)

    def restore(self) -> None:
        self.restore_weights()
        self.random.restore()

    def __enter__(self) -> Unchanged:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def check_alone(op: str, optimizer: object) -> None:
    """Raises where an optimizer cannot take steps on trial."""
    if not isinstance(optimizer, StepOptimizer):
        got = type(optimizer).__name__
        fail(op, "optimizer", "an optimizer of zokernels.optim", got, TypeError)
    if not optimizer.team.alone:
        fail(op, "optimizer", "one without a mesh: on one process", "one with a mesh")
    if getattr(optimizer, "partner", None) is not None:
        fail(op, "optimizer", "one without first_order", "one with an optimizer beside it")
    if not optimizer.home.in_memory:
        fail(op, "optimizer", "parameters in memory", "streamed ones")


def copied(optimizer: T) -> T:
    """An optimizer of the same parameters with the same state, seed and step, and without a log.

    Its steps change nothing of the first one but the weights that both have.
    """
    shared = [p for g in optimizer.param_groups for p in g["params"]]
    parts = (optimizer.direction, optimizer.rule, optimizer.estimator)
    shared += [m for part in parts for m in vars(part).values() if isinstance(m, nn.Module)]
    own = copy.deepcopy(optimizer, {id(value): value for value in shared})
    own.generators = optimizer.generators
    own.warned |= {"half loss", "zero g", "same numbers", "other numbers"}  # the first one's to tell
    return own


class Closures:
    """The closure of each step: the user's own, or with ``batches`` the user's on one batch after another."""

    def __init__(self, op: str, closure: Any, batches: Sequence[Any] | None) -> None:
        if not callable(closure):
            fail(op, "closure", "a function that returns the loss", repr(closure), TypeError)
        if batches is not None and (not hasattr(batches, "__len__") or not len(batches)):
            expected = "a list of batches (list(itertools.islice(loader, 20)), for example)"
            fail(op, "batches", expected, type(batches).__name__, TypeError)
        self.op, self._closure, self._batches = op, closure, batches

    def __len__(self) -> int:
        """How many batches there are; 0 where the closure has its own."""
        return 0 if self._batches is None else len(self._batches)

    def __getitem__(self, step: int) -> Callable[[], Any]:
        if self._batches is None:
            expected = "a function that takes nothing (of a batch: batches= gives it one after another)"
            return lambda: call(self.op, self._closure, (), expected)
        batch = self._batches[step % len(self._batches)]
        return lambda: call(self.op, self._closure, (batch,), "a function of a batch with batches=")

    @torch.no_grad()
    def loss(self, step: int, device: torch.device) -> float:
        """The loss at the weights as they are."""
        return float(as_loss(self.op, run_closure(self.op, self[step]), device))
