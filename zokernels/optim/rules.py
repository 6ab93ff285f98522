"""Update rules: what is done with the gradient estimate sum_k g_k z_k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .groups import Bucket
from .update import decay_of, gated_decay, is_zero, learning_rate

if TYPE_CHECKING:
    from .optimizer import ZerothOrder


class Rule:
    """Called once a step for each bucket, under ``torch.no_grad`` and with interrupts held back.

    A rule with state keeps it in ``optimizer.state[p]``, as torch does.
    """

    #: Whether :meth:`update` takes what ``bucket.at`` says out of the weights; where not, that is done before.
    restores = False
    #: Multiples of the update sum_k -lr * g_k z_k at which the closure runs once more before :meth:`update`, which gets
    #: the g_k times that multiple whose loss is lowest.
    trials: tuple[int, ...] = ()
    #: Whether it reads the losses themselves, which a log of the run then holds.
    reads_losses = False

    def choose(self, losses: Tensor) -> Tensor:
        """The multiple (0-dim) of the lowest of the trials' losses (float64); of equal ones the first, and never one of
        NaN but the first."""
        best, chosen = losses[0], torch.full_like(losses[0], self.trials[0])
        for loss, multiple in zip(losses[1:], self.trials[1:], strict=True):
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = torch.where(better, torch.full_like(chosen, multiple), chosen)
        return chosen

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        """Update the weights of ``bucket``.

        Args:
            seeds: int64 [q], on the bucket's device; ``seeds[:1]`` is the step's rounding seed.
            g: fp32 [q], clipped, on the losses' device; all 0 unless ``finite``.
            finite: bool, on the losses' device: unless it holds, no weight and no state changes.
        """
        raise NotImplementedError


class SGD(Rule):
    """theta <- round(decay * theta' + sum_k c_k z_k + ahead),   decay = 1 - lr * weight_decay: one pass.

        c_k = fp32(-lr * g_k - decay * at_k),   theta' = theta + sum_k at_k z_k

    at_k is where the probe left the weights (0 with restore="exact"), so the pass also restores; ahead is the next
    step's perturbation (:meth:`ZerothOrder.two_pass`).  Computed in float64 from the fp32 g and rounded to fp32 once,
    so that a log of g gives the same bits in plain Python.  Unless ``finite``, decay = 1 and c_k = -at_k: it only
    restores.
    """

    restores = True

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        if not bucket.at and is_zero(bucket.group["lr"]):
            return  # 0 * z would turn a weight of -0.0 into 0.0
        decay, back = decay_of(bucket.group, g), bucket.way_back(g)
        c = (decay * back - learning_rate(bucket.group, g) * g.double()).float()
        # The other side of torch.where as a tensor of the device: a number would be copied there, and waited for.
        coeffs = torch.where(finite, c, back.float()).to(bucket.device, non_blocking=True)
        rounding_seed = seeds[:1]
        if bucket.ahead is not None:
            seeds, coeffs = torch.cat((seeds, bucket.ahead[0])), torch.cat((coeffs, bucket.ahead[1]))
        bucket.direction.update(
            bucket,
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
