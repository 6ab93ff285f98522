"""Updates of integer weights whose rounding errors are kept for the next update (QES)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...transfer import to_device
from ..directions.direction import derived_seed
from ..directions.integers import (
    UNIFORM_K,
    RoundedNoise,
    RoundedSteps,
    integers_of,
    keep_integers,
    uniform,
)
from ..noise import Members
from ..roles import OptimizerView
from ..scalars import descent
from ..types import Bucket, Group
from .rule import Rule, check_fraction
from .window import Window

#: Errors stay in [-1.5, 1.5], as in the authors' code: weights at the end of their range store no more.
_MOST = 1.5


def _check(op: str, group: Group) -> None:
    check_fraction(op, "error_decay", group["error_decay"])
    if group["weight_decay"]:
        fail(op, "weight_decay", "0 with error feedback", group["weight_decay"])


def _check_parts(optimizer: OptimizerView) -> None:
    direction = optimizer.direction
    if not isinstance(direction, RoundedSteps) or direction.clamped:
        fail(optimizer.op, "direction", "RoundedSteps (not clamped)", direction)


def _coeffs(group: Group, g: Tensor, eps: float) -> Tensor:
    """-lr g / eps, fp32: what of each d_k goes into u."""
    return (descent(group, g).double() / eps).float()


def _moved(
    noise: RoundedNoise, one: Members, integers: Tensor, u: Tensor, seeds: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole steps, and the error that they leave, of u = ``u`` + sum_k c_k d_k."""
    for k, c in enumerate(coeffs.unbind()):
        steps = noise.gated(integers, noise.steps(one, seeds[k : k + 1]).short())
        u = u + c * steps.float()
    moves = noise.gated(integers, u.round().clamp(-512, 512).short())
    return moves, (u - moves.float()).clamp(-_MOST, _MOST)


class ErrorFeedback(Rule):
    """u = decay e - lr sum_k g_k d_k / eps;   q <- q + round(u);   e <- min(max(u - round(u), -1.5), 1.5).

    d_k are the rounded directions of :class:`RoundedSteps`, where q + d_k is in range.  A weight that u would
    bring out of its range stays, and its whole u is kept as e.  Ties round to even.

    e is ``optimizer.state[p]["error"]``, fp32, of the integers' shape (twice as wide as packed ones).  It
    begins uniform in [-1/2, 1/2), so that weights with like gradients do not all step at once; with
    ``spread=False`` at 0.  All operations are of fp32 and integers, none of them fused, and so have the same
    bits on every device.

    Source: QES (arXiv 2602.03120) and its code, with whole residuals; :class:`ErrorWindow` is its other form.
    """

    through_noise = False

    def __init__(self, error_decay: float = 0.9, spread: bool = True) -> None:
        super().__init__(error_decay=error_decay)
        self.spread = spread

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        _check(op, group)

    def check_parts(self, optimizer: OptimizerView) -> None:
        _check_parts(optimizer)

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        noise = bucket.noise
        assert isinstance(noise, RoundedNoise)  # check_parts
        coeffs = to_device(_coeffs(bucket.group, g, bucket.eps), bucket.device)
        on = to_device(finite, bucket.device)
        for i, theta in enumerate(bucket.params):
            integers = integers_of(theta)
            error = self._error(optimizer, theta, bucket.streams[i])
            u = bucket.group["error_decay"] * error
            moves, left = _moved(noise, bucket.members.picked([i]), integers, u, seeds, coeffs)
            keep_integers(theta, torch.where(on, integers.short() + moves, integers.short()))
            error.copy_(torch.where(on, left, error))

    def _error(self, optimizer: OptimizerView, param: Tensor, stream: int) -> Tensor:
        state: dict[str, Any] = optimizer.state[param]
        if "error" not in state:
            self._check_capture(optimizer, param.device, "none")
            with torch.inference_mode(False):
                error = torch.zeros_like(integers_of(param), dtype=torch.float32)
                if self.spread:
                    seed = derived_seed(optimizer, stream, UNIFORM_K, param.device)
                    error = uniform(error, seed, 24) - 0.5
                state["error"] = error
        found: Tensor = state["error"]
        return found


class ErrorWindow(Window):
    """:class:`ErrorFeedback` without memory: e is what the last ``window`` updates would have left.

        e <- 0, then for each of the window's updates before this one, the oldest first:
            u = decay e + c_j d_j,   e <- min(max(u - round(u), -1.5), 1.5)

    The last updates' seeds and coefficients are kept, and their directions are drawn again, so an update
    costs ``window`` times as much, and nothing of the weights' size is kept.  Which weights are in range, and
    so take part, is asked of the weights as they are now: those of earlier steps are gone.  e therefore
    differs from the kept one near the ends of the range, and by ``error_decay`` to the power of the window.

    Source: QES (arXiv 2602.03120) and its code.
    """

    through_noise = False

    def __init__(self, window: int, error_decay: float = 0.9) -> None:
        super().__init__(window, error_decay=error_decay)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        _check(op, group)

    def check_parts(self, optimizer: OptimizerView) -> None:
        super().check_parts(optimizer)
        _check_parts(optimizer)

    def newest(self, group: Group, g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        return {"first": (_coeffs(group, g.float(), group["eps"]).double(), 1.0)}

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        noise = bucket.noise
        assert isinstance(noise, RoundedNoise)  # check_parts
        kept = self.kept(optimizer, bucket.group, g.device)
        past = to_device(kept["seeds"], bucket.device)
        coeffs = to_device(kept["first"].float(), bucket.device)
        on = to_device(finite, bucket.device)
        for i, theta in enumerate(bucket.params):
            one, integers = bucket.members.picked([i]), integers_of(theta)
            error = torch.zeros_like(integers, dtype=torch.float32)
            moves = torch.zeros_like(integers, dtype=torch.int16)
            for j in reversed(range(self.window)):
                u = bucket.group["error_decay"] * error
                moves, error = _moved(noise, one, integers, u, past[j], coeffs[j])
            keep_integers(theta, torch.where(on, integers.short() + moves, integers.short()))
