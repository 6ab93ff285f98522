"""The scalars of an update, from the two losses to one coefficient and one decay per bucket, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Bucket


def projected_gradient(difference: Tensor, eps: float, clip: float | None) -> Tensor:
    """g = (l+ - l-) / (2 eps) in float64, rounded once to fp32; then min(max(g, -clip), clip).

    A g that is not finite stays so: clipping must not turn an overflow into a step.
    """
    g = (difference / (2 * eps)).float()
    return g if clip is None else torch.where(g.isfinite(), g.clamp(-clip, clip), g)


def coefficients(buckets: list[Bucket], difference: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(c, decay) of each bucket for theta = round(decay * theta' + c z), where theta' = theta + at * eps * z, and
    whether all is finite (bool); every one a 0-dim tensor on the losses' device.

        decay = 1 - lr * weight_decay,   c = -lr * g - decay * at * eps

    in float64, rounded to fp32 once each, so that a log of g gives the same bits in plain Python.  Where any g or c is
    not finite, all buckets get decay = 1 and c = -at * eps, which only restores.
    """
    values, checked = [], []
    for b in buckets:
        lr = b.group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(()).to(difference.device, torch.float64, non_blocking=True)
        g = projected_gradient(difference, b.eps, b.group["clip"]).double()
        decay, back = torch.ones_like(g) - lr * b.group["weight_decay"], -b.at * b.eps
        c = (decay * back - lr * g).float()
        # The other side of torch.where as a tensor of the device: a number would be copied there, and waited for.
        values.append((c, torch.full_like(c, back), decay.float()))
        checked += [g, c.double()]
    finite = torch.isfinite(torch.stack(checked)).all()
    gated = [(torch.where(finite, c, back), torch.where(finite, decay, torch.ones_like(decay)))
             for c, back, decay in values]  # fmt: skip
    return gated, finite


def is_zero(lr: float | Tensor) -> bool:
    """Whether the host knows that there is nothing to update."""
    return not isinstance(lr, Tensor) and lr == 0


def known_on_host(value: Tensor) -> bool:
    """Whether the host can read ``value`` without waiting for a device."""
    return value.device.type == "cpu"
