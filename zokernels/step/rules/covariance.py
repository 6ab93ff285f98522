"""Descent with momentum, and the vectors of curvature that shape the noise (:class:`RankOneCovariance`)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_number, fail
from ...functional import combine_, update_
from ...transfer import to_device
from ..directions.covariance import CovarianceNoise, RankOneCovariance, as_matrix
from ..directions.direction import derived_seed
from ..directions.low_rank import draw
from ..directions.summed import weighted
from ..estimators import LeaveOneOut
from ..noise import DENSE
from ..roles import OptimizerView
from ..scalars import is_zero, learning_rate, scalars
from ..types import Bucket, Group
from .rule import Rule, check_fraction

#: k of the seed of the vectors' first values: far above any direction's.
_AXIS_K = 0x80000003


class CovarianceDescent(Rule):
    """M <- momentum M + G,  theta <- decay theta - lr M;  a <- (1 - axis_lr weight_decay) a - axis_lr D.

    G = sum_k g_k z_k along the directions of :class:`RankOneCovariance`.  M is of matrices; vectors move by
    lr G.  With w_k = g_k eps^3 and the numbers of :class:`Spread`, D [n] is the sum over the m rows of

        sum_k w_k (dots_k u_k - a' - (sqrt(damping) + root) (dots_k^2 - s) / (s root) a') / root

    which is the natural gradient of the covariance's logarithm that the authors' code computes.  a is
    ``optimizer.state[p]["axis"]``, fp32 [n], normal noise at first.  The code takes all of these steps once
    for each k, with the a that k - 1 has left; here they are taken for all k together.

    Source: LOREN (Seung, Lee and Ko, 2026, arXiv 2511.07971) and its code.
    """

    states: ClassVar = {"momentum_buffer": 0.0}
    through_noise = False

    def __init__(self, momentum: float = 0.9, damping: float = 0.1, axis_lr: float = 2e-3) -> None:
        super().__init__(momentum=momentum, damping=damping, axis_lr=axis_lr)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_number(op, "damping", group["damping"], positive=True)
        check_number(op, "axis_lr", group["axis_lr"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        parts = optimizer.estimator, optimizer.direction
        if not isinstance(parts[0], LeaveOneOut) or not isinstance(parts[1], RankOneCovariance):
            fail(optimizer.op, "estimator, direction", "LeaveOneOut and RankOneCovariance", parts)

    def axes(self, optimizer: OptimizerView, bucket: Bucket) -> list[Tensor]:
        """The axis a of each parameter of ``bucket``."""
        found = []
        for p, stream in zip(bucket.params, bucket.streams, strict=True):
            state = optimizer.state[p]
            if "axis" not in state:
                self._check_capture(optimizer, p.device, "none")
                with torch.inference_mode(False):
                    seed = derived_seed(optimizer, 0, _AXIS_K, p.device)
                    (state["axis"],) = draw([(as_matrix(p)[1], 1)], seed, [stream], [0], 1.0)
                    state["axis"] = state["axis"].reshape(-1)
            found.append(state["axis"])
        return found

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        assert isinstance(bucket.noise, CovarianceNoise)  # check_parts
        group, device = bucket.group, bucket.device
        g, on = to_device(g, device), to_device(finite, device)
        lr = to_device(scalars((learning_rate(group, g),), g.device), device)
        hyper = scalars((0.0, 1.0, 0.0, torch.where(on, lr, torch.zeros_like(lr))), device).float()
        rounding = self.rounding(bucket, seeds, g, finite)
        none: dict[str, Any] = {"seeds": seeds[:0], "coeffs": g[:0], "dist": bucket.dist}
        states = self.state(optimizer, bucket, "momentum_buffer")
        for i, (p, m) in enumerate(zip(bucket.params, states, strict=True)):
            one = bucket.members.picked([i])
            (total,) = bucket.noise.totals(one, seeds, g)
            # Two operations of fp32, none of them fused, have the same bits on every device.
            new = group["momentum"] * m + total if p.dim() >= 2 else total
            m.copy_(torch.where(on, new, m))
            if not is_zero(group["lr"]):
                update_([p], "momentum", hyper, first=[m], **none, **one.places, **rounding)
            self._turn(bucket, i, seeds, g, on)

    def _turn(self, bucket: Bucket, i: int, seeds: Tensor, g: Tensor, on: Tensor) -> None:
        """Takes the step of the axis a of parameter ``i``."""
        assert isinstance(bucket.noise, CovarianceNoise)
        group, one = bucket.group, bucket.members.picked([i])
        (p,) = one.params
        spread, (m, n) = bucket.noise.spreads[id(p)], as_matrix(p)
        w, side = g.double() * bucket.eps**3, math.sqrt(group["damping"]) + spread.root
        rows = torch.full((m, n), -0.0, dtype=torch.float32, device=p.device)
        combine_([rows], **DENSE.kernel_args(one, seeds, (w * spread.dots).float()), **one.places)
        bend = side * (spread.dots.square() - spread.s) / (spread.s * spread.root)
        along = weighted(torch.ones_like(spread.s), w * (1 + bend))
        along = torch.where(spread.s > 0, along, torch.zeros_like(along))
        turn = (rows.double().sum(0) - along * m * spread.a.double()) / spread.root
        keep = 1 - group["axis_lr"] * group["weight_decay"]
        new = (keep * spread.a.double() - group["axis_lr"] * turn).float()
        spread.a.copy_(torch.where(on, new, spread.a))
