"""A search of the learning rate: a few short runs from one state, and the curve of their losses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checks import check_integer, check_number, fail, named_arguments
from ..step.groups import devices_of
from .optimizer import ZerothOrder
from .trial import Closures, Unchanged, check_alone, copied

#: Learning rates follow each other by this factor.
_STEP = math.sqrt(10)
#: How many are tried on either side of the optimizer's own at first, and how many in all at most.
_EITHER, _MOST = 2, 20
#: A run is given up where its loss exceeds that of the beginning by so many times its size, and 1.
_DIVERGED = 2.0
#: How many losses are averaged at the beginning and at the end of a run, where batches differ.
_CHECKS = 8
_WIDTH = 40


@dataclass(frozen=True)
class Sweep:
    """What :func:`find_lr` found.  ``print(sweep)`` draws the curve.

    Attributes:
        lrs: the learning rates that were tried, ascending.
        losses: the loss after the steps with each of them; infinity where the run diverged.
        before: the loss before the first step.
        lr: the learning rate with the best loss, or None where none was better than before.
        at_edge: whether that is the first or the last one that was tried, so that the best is perhaps beyond.
        steps, forwards: of each run.
        curves: for each learning rate what its steps returned.
    """

    lrs: list[float]
    losses: list[float]
    before: float
    lr: float | None
    at_edge: bool
    steps: int
    forwards: int
    maximize: bool = False
    curves: list[list[float]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        what = "reward" if self.maximize else "loss"
        # From the best to where the runs began; what is worse than that has a full bar.
        best = (max if self.maximize else min)([x for x in (*self.losses, self.before) if math.isfinite(x)])
        low, high = sorted((best, self.before))
        head = f"{what} after {self.steps} steps, {self.forwards} forwards each; before: {self.before:.6g}"
        lines = [f"{'lr':>9}  {head}"]
        for lr, loss in zip(self.lrs, self.losses, strict=True):
            if not math.isfinite(loss):
                lines.append(f"{lr:9.2e}  diverged")
                continue
            share = min(max((loss - low) / (high - low), 0.0), 1.0) if high > low else 1.0
            mark = "  <- best" if lr == self.lr else ""
            lines.append(f"{lr:9.2e}  {loss:<10.6g} |{'#' * round(_WIDTH * share):<{_WIDTH}}|{mark}")
        if self.lr is None:
            diverged = all(not math.isfinite(loss) for loss in self.losses)
            way = (
                "all are too large: try smaller ones (lrs=)"
                if diverged
                else "optimizer.diagnose(closure) says why"
            )
            lines.append(f"no learning rate improves the {what}: {way}")
        elif self.at_edge:
            lines.append("the best is at the edge: try further ones (lrs=)")
        return "\n".join(lines)


@named_arguments
def find_lr(
    optimizer: ZerothOrder,
    closure: Callable[..., Any],
    lrs: Iterable[float] | None = None,
    *,
    steps: int = 20,
    batches: Sequence[Any] | None = None,
    model: nn.Module | None = None,
) -> Sweep:
    """Runs ``steps`` steps with each of some learning rates, all from the state that ``optimizer`` is in.

    Afterwards its weights, its own state, its step and torch's random numbers are what they were, bit for
    bit; nothing is written to a log.  All runs see the same noise and the same batches, so that their losses
    can be compared.  The loss of a run is that of its last weights.

    Args:
        optimizer: any of ``zokernels.optim``, just made or in the middle of a training.  Groups keep the
            ratios of their learning rates; the first one's is the one that is tried.
        closure: as for ``optimizer.step``; with ``batches`` a function of a batch that returns the loss.
        lrs: which to try.  By default the optimizer's own and two on either side, a factor of the root of 10
            apart, and then further ones while the best is at the edge, up to 20 in all.
        steps: of each run.  Few steps survive an lr that many do not: docs/choosing.md has by how much.
        batches: a list, one for each step, begun again at its end.  Without it the closure has its own data:
            one batch, or batches that it draws from torch's random numbers.
        model: its buffers are put back, too (BatchNorm).

    Memory: one copy of the trained weights, and of what the optimizer keeps of them.

    Example::

        opt = ZOSGD(model.named_parameters(), lr=1e-6)
        sweep = find_lr(opt, lambda batch: model(**batch).loss, batches=list(islice(loader, 20)))
        print(sweep)
        factor = sweep.lr / opt.param_groups[0]["lr"]
        for group in opt.param_groups:
            group["lr"] *= factor

    Raises: TypeError, ValueError for an optimizer on a mesh, with streamed weights or with ``first_order``.
    """
    check_alone("find_lr", optimizer)
    check_integer("find_lr", "steps", steps)
    trials = _Trials(optimizer, Closures("find_lr", closure, batches), steps, model)
    if lrs is not None:
        given = list(lrs)
        for i, lr in enumerate(given):
            check_number("find_lr", f"lrs[{i}]", lr, positive=True)
        if not given:
            fail("find_lr", "lrs", "at least one learning rate", "none")
        with trials.unchanged:
            for lr in given:
                trials.run(lr)
    else:
        with trials.unchanged:
            _walk(trials)
    return trials.result()


def _walk(trials: _Trials) -> None:
    """Tries learning rates around the optimizer's own, and further ones while the best is at the edge."""
    size = lambda power: float(f"{trials.rates[0] * _STEP**power:.3g}")
    worse = {power: trials.run(size(power)) for power in range(-_EITHER, _EITHER + 1)}
    while len(worse) < _MOST:
        best = min(worse, key=lambda power: (worse[power], power))
        if best not in (min(worse), max(worse)):
            break
        further = best - 1 if best == min(worse) else best + 1
        worse[further] = trials.run(size(further))


class _Trials:
    """The runs of one search, and the loss at the end of each."""

    def __init__(
        self, optimizer: ZerothOrder, closures: Closures, steps: int, model: nn.Module | None
    ) -> None:
        self.optimizer, self.closures, self.steps = optimizer, closures, steps
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not self.rates[0]:
            fail("find_lr", "lr", "a first group with lr > 0, which the other groups' are relative to", 0.0)
        self.maximize = bool(getattr(optimizer.estimator, "maximize", False))
        self.unchanged = Unchanged(optimizer, model)
        self.losses: dict[float, float] = {}
        self.curves: dict[float, list[float]] = {}
        first = [self._loss(i) for i in range(min(len(closures) or _CHECKS, _CHECKS))]
        #: How many losses are averaged: one, where the closure has one batch of its own.
        self._checks = len(first) if len(closures) or any(x != first[0] for x in first) else 1
        self.unchanged.restore()
        self.before = self._mean()

    def _loss(self, step: int) -> float:
        return self.closures.loss(step, devices_of(self.optimizer.param_groups)[0])

    def _mean(self) -> float:
        self.unchanged.random.restore()
        return sum(self._loss(i) for i in range(self._checks)) / self._checks

    def run(self, lr: float) -> float:
        """How bad the weights are after the steps with ``lr``: lower is better."""
        self.unchanged.restore()
        trial = copied(self.optimizer)
        for group, rate in zip(trial.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate / self.rates[0]
        curve = self.curves.setdefault(lr, [])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*skipped: loss not finite.*")
            for i in range(self.steps):
                curve.append(float(trial.step(self.closures[i])))
                if self._diverged(curve[-1]):
                    break
        loss = math.inf if self._diverged(curve[-1]) else self._mean()
        self.losses[lr] = math.inf if self._diverged(loss) else loss
        return self._worse(self.losses[lr])

    def _worse(self, loss: float) -> float:
        return -loss if self.maximize and math.isfinite(loss) else loss

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        return not self.maximize and loss - self.before > _DIVERGED * abs(self.before) + 1.0

    def result(self) -> Sweep:
        order = sorted(self.losses)
        losses = [self.losses[lr] for lr in order]
        best = min(range(len(order)), key=lambda i: self._worse(losses[i]))
        improves = math.isfinite(losses[best]) and self._worse(losses[best]) < self._worse(self.before)
        optimizer = self.optimizer
        forwards = self.steps * (len(optimizer.estimator.points()) + len(optimizer.rule.trials))
        return Sweep(
            lrs=order,
            losses=losses,
            before=self.before,
            lr=order[best] if improves else None,
            at_edge=len(order) > 1 and best in (0, len(order) - 1),
            steps=self.steps,
            forwards=forwards,
            maximize=self.maximize,
            curves=[self.curves[lr] for lr in order],
        )
