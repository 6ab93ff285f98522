"""Plain descent along sum_k g_k z_k, and the form that keeps the best of three."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import check_choice, check_number
from ...transfer import known_on_host, to_device
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..scalars import NO, YES, decay_of, is_zero, learning_rate, where
from ..types import Bucket, Estimate
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

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        if not bucket.at and bucket.ahead is None and is_zero(bucket.group["lr"]):
            return  # 0 * z would turn a weight of -0.0 into 0.0
        if known_on_host(g) and (finite is YES or finite is NO) and bucket.has_numbers:
            coeffs = self._from_numbers(bucket, g.tolist(), finite is YES)
        else:
            coeffs = self._from_tensors(bucket, g, finite)
        rounding = self.rounding(bucket, seeds, g, finite)
        if bucket.ahead is not None:
            seeds, coeffs = torch.cat((seeds, bucket.ahead[0])), torch.cat((coeffs, bucket.ahead[1]))
        bucket.noise.update(bucket.members, seeds, coeffs, **rounding)

    def _from_tensors(self, bucket: Bucket, g: Tensor, finite: Tensor) -> Tensor:
        """The coefficients c_k of the update, fp32 [q], on the bucket's device."""
        back = bucket.way_back(g)
        toward = lambda: (
            decay_of(bucket.group, g) * back - learning_rate(bucket.group, g) * g.double()
        ).float()
        # The other side is a tensor, too: a number would be copied to the device, and waited for.
        return to_device(where(finite, toward, back.float), bucket.device)

    def _from_numbers(self, bucket: Bucket, g: list[float], finite: bool) -> Tensor:
        """:meth:`_from_tensors` where the host knows all numbers: the same bits, in fewer operations."""
        at, lr = bucket.at, bucket.group["lr"]
        decay = 1 - lr * bucket.group["weight_decay"]
        if finite:
            coeffs = [decay * (0.0 - at.get(k, 0.0)) - lr * g_k for k, g_k in enumerate(g)]
        else:
            coeffs = [0.0 - at.get(k, 0.0) for k in range(len(g))]
        return torch.tensor(coeffs, dtype=torch.float32, device=bucket.device)


class Conservative(SGD):
    """:class:`SGD` that keeps the best of theta, theta - lr sum_k g_k z_k and theta + lr sum_k g_k z_k.

    This takes three forwards more.  They see the update without weight decay, rounded to nearest; weight
    decay is applied whichever is kept.

    ``ties``: which of equal losses wins, where the order is theta, theta - lr sum_k g_k z_k, theta + lr
    sum_k g_k z_k.  "first": equal losses say nothing, so the weights stay.  "last": as in the authors' code.

    Source: ZO-SGD-Cons of Zhang et al., 2024 (arXiv 2402.11592).
    """

    trials = (0, 1, -1)

    def __init__(self, ties: str = "first") -> None:
        super().__init__()
        check_choice("Conservative", "ties", ties, ("first", "last"))
        self.ties = ties

    def choose(self, losses: Tensor) -> Tensor:
        if self.ties == "first":
            return super().choose(losses)
        best, chosen = losses[0], torch.full_like(losses[0], self.trials[0])
        for loss, multiple in zip(losses[1:], self.trials[1:], strict=True):
            as_good = loss <= best
            best = torch.where(as_good, loss, best)
            chosen = torch.where(as_good, torch.full_like(chosen, multiple), chosen)
        return chosen


class Recalling(SGD):
    """:class:`SGD` that keeps the losses of the last finite step, L_1 .. L_q, for the next one's sigma."""

    reads_losses = True

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        count = optimizer.estimator.directions
        return {"losses": torch.zeros(count, dtype=torch.float64), "steps": torch.zeros(1, dtype=torch.int64)}

    def last(self, optimizer: OptimizerView, losses: Tensor) -> Tensor:
        """The kept losses, float64 [q]; before the first step ``losses`` themselves."""
        kept = self.kept(optimizer, optimizer.param_groups[0], losses.device)
        return torch.where(kept["steps"] > 0, kept["losses"], losses.double())

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        losses = estimate.losses[1:].double()
        kept = self.kept(optimizer, optimizer.param_groups[0], losses.device)
        finite = to_device(estimate.finite, losses.device)
        kept["losses"].copy_(torch.where(finite, losses, kept["losses"]))
        kept["steps"] += finite


class Floored(Rule):
    """:class:`SGD`, after which no weight is below ``minimum``: theta <- max(theta, minimum).

    It is for weights that must not change their sign or vanish, such as the scales of quantised layers.  The
    minimum is rounded to the weights' dtype.  A step that is skipped changes nothing.
    """

    folds_restore = True

    def __init__(self, minimum: float = 1e-7) -> None:
        super().__init__()
        self._descent = SGD()
        check_number("Floored", "minimum", minimum, positive=True, most=torch.finfo(torch.float32).max)
        self.minimum = minimum

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        self._descent.update(optimizer, bucket, seeds, g, finite)
        bucket.noise.raise_to(bucket.members, torch.where(finite, self.minimum, -math.inf))
