"""Updates of integer weights whose rounding errors are kept for the next update (QES)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...functional import derive_seed
from ...transfer import to_device
from ..directions.direction import derived_seed
from ..directions.integers import RoundedNoise, RoundedSteps
from ..roles import OptimizerView
from ..scalars import descent
from ..types import Bucket, Group
from .rule import Rule, check_fraction

#: k of the seed of the first errors: far above any direction's.
_ERROR_K = 0x80000005
#: Errors stay in [-1.5, 1.5], as in the authors' code: weights at the end of their range store no more.
_MOST = 1.5
#: Elements whose first errors are drawn at a time: their indices are 8 bytes each.
_PIECE = 1 << 20


class ErrorFeedback(Rule):
    """u = decay e - lr sum_k g_k d_k / eps;   q <- q + round(u);   e <- min(max(u - round(u), -1.5), 1.5).

    d_k are the rounded directions of :class:`RoundedSteps`, where q + d_k is in range.  A weight that u would
    bring out of its range stays, and its whole u is kept as e.  Ties round to even.

    e is ``optimizer.state[p]["error"]``, fp32.  It begins uniform in [-1/2, 1/2), so that weights with like
    gradients do not all step at once; with ``spread=False`` at 0.  All operations are of fp32 and integers,
    none of them fused, and so have the same bits on every device.

    Source: QES (arXiv 2602.03120) and its code, with whole residuals.  Its other form draws the updates of a
    window again instead of storing e, and takes the weights as they are now for their range.
    """

    through_noise = False

    def __init__(self, error_decay: float = 0.9, spread: bool = True) -> None:
        super().__init__(error_decay=error_decay)
        self.spread = spread

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "error_decay", group["error_decay"])
        if group["weight_decay"]:
            fail(op, "weight_decay", "0 with error feedback", group["weight_decay"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        if not isinstance(optimizer.direction, RoundedSteps):
            fail(optimizer.op, "direction", "RoundedSteps", optimizer.direction)

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        noise = bucket.noise
        assert isinstance(noise, RoundedNoise)  # check_parts
        coeffs = to_device((descent(bucket.group, g).double() / bucket.eps).float(), bucket.device)
        on = to_device(finite, bucket.device)
        for i, theta in enumerate(bucket.params):
            one = bucket.members.picked([i])
            error = self._error(optimizer, theta, bucket.streams[i])
            u = bucket.group["error_decay"] * error
            for k, c in enumerate(coeffs.unbind()):
                steps = noise.gated(theta, noise.steps(one, seeds[k : k + 1]).short())
                u = u + c * steps.float()
            moves = noise.gated(theta, u.round().clamp(-512, 512).short())
            theta.copy_(torch.where(on, theta.short() + moves, theta.short()))
            error.copy_(torch.where(on, (u - moves.float()).clamp(-_MOST, _MOST), error))

    def _error(self, optimizer: OptimizerView, param: Tensor, stream: int) -> Tensor:
        state: dict[str, Any] = optimizer.state[param]
        if "error" not in state:
            self._check_capture(optimizer, param.device, "none")
            with torch.inference_mode(False):
                error = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                seed = derived_seed(optimizer, stream, _ERROR_K, param.device)
                for at in range(0, param.numel() if self.spread else 0, _PIECE):
                    index = torch.arange(at, min(at + _PIECE, param.numel()), device=param.device)
                    drawn = derive_seed(seed, index, torch.full_like(index, _ERROR_K))
                    values = ((drawn >> 40) & 0xFFFFFF).float() * 2.0**-24 - 0.5
                    error.view(-1)[at : at + len(index)] = values
                state["error"] = error
        found: Tensor = state["error"]
        return found
