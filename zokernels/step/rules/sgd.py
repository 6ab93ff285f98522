"""Plain descent along sum_k g_k z_k, and the form that keeps the best of three."""

from __future__ import annotations

import torch
from torch import Tensor

from ..roles import OptimizerView
from ..scalars import decay_of, gated_decay, is_zero, learning_rate
from ..types import Bucket
from .rule import Rule


class SGD(Rule):
    """theta <- round(decay * theta' + sum_k c_k z_k + ahead),   decay = 1 - lr * weight_decay: one pass.

        c_k = fp32(-lr * g_k - decay * at_k),   theta' = theta + sum_k at_k z_k

    at_k is where the probe left the weights (0 with restore="exact"), so the pass also restores; ahead is the next
    step's perturbation (:meth:`ZerothOrder.two_pass`).  Computed in float64 from the fp32 g and rounded to fp32 once,
    so that a log of g gives the same bits in plain Python.  Unless ``finite``, decay = 1 and c_k = -at_k: it only
    restores.
    """

    folds_restore = True

    def __init__(self) -> None:
        super().__init__()

    def update(self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        if not bucket.at and is_zero(bucket.group["lr"]):
            return  # 0 * z would turn a weight of -0.0 into 0.0
        decay, back = decay_of(bucket.group, g), bucket.way_back(g)
        c = (decay * back - learning_rate(bucket.group, g) * g.double()).float()
        # The other side of torch.where as a tensor of the device: a number would be copied there, and waited for.
        coeffs = torch.where(finite, c, back.float()).to(bucket.device, non_blocking=True)
        rounding_seed = seeds[:1]
        if bucket.ahead is not None:
            seeds, coeffs = torch.cat((seeds, bucket.ahead[0])), torch.cat((coeffs, bucket.ahead[1]))
        bucket.noise.update(
            bucket.members,
            seeds,
            coeffs,
            decay=gated_decay(decay, finite, bucket.device) if bucket.group["weight_decay"] else None,
            rounding=bucket.group["rounding"],
            rounding_seed=rounding_seed,
        )


class Conservative(SGD):
    """:class:`SGD` that keeps the best of theta, theta - lr sum_k g_k z_k and theta + lr sum_k g_k z_k: three forwards
    more, which see the update without weight decay, rounded to nearest.  Weight decay is applied whichever is kept.

    ZO-SGD-Cons of Zhang et al., 2024 (arXiv 2402.11592).
    """

    trials = (0, 1, -1)
