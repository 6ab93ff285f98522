"""Plain descent along sum_k g_k z_k, and the form that keeps the best of three."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transfer import to_device
from ..roles import OptimizerView
from ..scalars import decay_of, is_zero, learning_rate, where
from ..types import Bucket
from .rule import Rule


class SGD(Rule):
    """theta <- round(decay * theta' + sum_k c_k z_k + ahead),   decay = 1 - lr * weight_decay: one pass.

        c_k = fp32(-lr * g_k - decay * at_k),   theta' = theta + sum_k at_k z_k

    at_k says where the probe left the weights, so that the pass also restores them; it is 0 with
    restore="exact".  ahead is the next step's perturbation (:meth:`ZerothOrder.two_pass`).

    c_k is computed in float64 from the fp32 g and rounded to fp32 once, so that plain Python makes the same
    bits of a log of g.  Unless ``finite``, decay = 1 and c_k = -at_k, which only restores.
    """

    folds_restore = True

    def __init__(self) -> None:
        super().__init__()

    def update(self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        if not bucket.at and is_zero(bucket.group["lr"]):
            return  # 0 * z would turn a weight of -0.0 into 0.0
        back = bucket.way_back(g)
        toward = lambda: (decay_of(bucket.group, g) * back - learning_rate(bucket.group, g) * g.double()).float()
        # The other side is a tensor, too: a number would be copied to the device, and waited for.
        coeffs = to_device(where(finite, toward, back.float), bucket.device)
        rounding = self.rounding(bucket, seeds, g, finite)
        if bucket.ahead is not None:
            seeds, coeffs = torch.cat((seeds, bucket.ahead[0])), torch.cat((coeffs, bucket.ahead[1]))
        bucket.noise.update(bucket.members, seeds, coeffs, **rounding)


class Conservative(SGD):
    """:class:`SGD` that keeps the best of theta, theta - lr sum_k g_k z_k and theta + lr sum_k g_k z_k.

    This takes three forwards more.  They see the update without weight decay, rounded to nearest; weight
    decay is applied whichever is kept.

    Source: ZO-SGD-Cons of Zhang et al., 2024 (arXiv 2402.11592).
    """

    trials = (0, 1, -1)
