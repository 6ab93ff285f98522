"""Momentum and Adam without state: the last steps' seeds and coefficients say what the state would be.

The noise of earlier steps is drawn again, so an update draws ``window`` times the noise of a plain one.  It
does so in the same one pass over the weights, and needs no memory of their size.  MeZO (Malladi et al., 2023,
arXiv 2305.17333) suggests it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_integer, check_number, fail
from ...transfer import to_device
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..scalars import descent, learning_rate, scalars
from ..types import Bucket, Estimate, Group
from .rule import Rule, check_betas, check_fraction


class Window(Rule):
    """Keeps the last ``window`` updates of each group, the newest first.

    These are seeds (int64 [window, q]) and what a subclass adds (float64 [window, ...]).  A kept number is
    multiplied by its factor once a step, and never raised to a power, because multiplication has the same
    bits on every device and pow has not.

    Steps that are not finite do not enter the window.  The z of an earlier step must be what it was then, so
    no subset and no direction that is refreshed is allowed.  A parameter that is unfrozen later takes the
    steps of the window that it did not take part in.
    """

    def __init__(self, window: int, **defaults: Any) -> None:
        super().__init__(**defaults)
        check_integer(type(self).__name__, "window", window)
        self.window = window

    def check_parts(self, optimizer: OptimizerView) -> None:
        direction = optimizer.direction
        if direction.refresh is not None or direction.changes or optimizer.subset is not None:
            got = (direction, optimizer.subset)
            fail(optimizer.op, "window", "a direction that is not refreshed and no subset", got)

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        shape = (self.window, optimizer.estimator.directions)
        return {
            "seeds": torch.zeros(shape, dtype=torch.int64),
            "first": torch.zeros(shape, dtype=torch.float64),
        }

    def newest(self, group: Group, g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        """For each float64 tensor that is kept: its newest entry, and the factor of all older ones.

        g is float64.
        """
        raise NotImplementedError

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        of_groups = {id(b.group): (b, g) for b, g in zip(probe.buckets, estimate.gradients, strict=True)}
        for bucket, g in of_groups.values():
            seeds = to_device(probe.seeds[bucket.device], g.device)
            entries = {"seeds": (seeds, 1), **self.newest(bucket.group, g.double())}
            for name, kept in self.kept(optimizer, bucket.group, g.device).items():
                entry, factor = entries[name]
                kept.copy_(torch.where(estimate.finite, torch.cat((entry[None], factor * kept[:-1])), kept))

    def seeds(self, kept: dict[str, Tensor], bucket: Bucket) -> Tensor:
        """The seeds of all updates in the window: int64 [window * q], on the bucket's device."""
        return to_device(kept["seeds"].flatten(), bucket.device)


class MomentumWindow(Window):
    """theta <- decay theta - lr (1 - dampening) sum_j momentum^j G_j over the last ``window`` updates.

    It is one combine.  This is the momentum of :class:`Momentum`, but for momentum^window of what is older.
    """

    def __init__(self, window: int, momentum: float = 0.9, dampening: float = 0.0) -> None:
        super().__init__(window, momentum=momentum, dampening=dampening)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_fraction(op, "dampening", group["dampening"])

    def newest(self, group: Group, g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        return {"first": ((1 - group["dampening"]) * g, group["momentum"])}

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        kept = self.kept(optimizer, bucket.group, g.device)
        coeffs = descent(bucket.group, kept["first"].flatten())
        coeffs = to_device(torch.where(finite, coeffs, torch.zeros_like(coeffs)), bucket.device)
        rounding = self.rounding(bucket, seeds, g, finite)
        bucket.noise.update(bucket.members, self.seeds(kept, bucket), coeffs, **rounding)


class AdamWindow(Window):
    """theta <- decay theta - lr m' / (sqrt(v') + adam_eps): m', v' are means of the last ``window`` updates.

        m' = (1 - b1) sum_j b1^j G_j / (1 - b1^n),   v' = (1 - b2) sum_j b2^j sum_k (g_jk z_jk)^2 / (1 - b2^n)

    j = 0 is the newest update, and n the number of updates in the window, so the weights of both means sum to
    1.  Of the square of G_j = sum_k g_jk z_jk only the squares of its terms are taken; with one direction
    that is G_j^2 itself.

    Unless ``decoupled``, weight_decay must be 0, because its gradient in earlier steps is not a multiple of
    noise.
    """

    def __init__(
        self,
        window: int,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        decoupled: bool = False,
    ) -> None:
        super().__init__(window, betas=betas, adam_eps=adam_eps)
        self.decoupled = decoupled

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_betas(op, group["betas"])
        check_number(op, "adam_eps", group["adam_eps"])
        if group["weight_decay"] and not self.decoupled:
            fail(op, "weight_decay", "0 with a window (ZOAdamW has a decoupled one)", group["weight_decay"])

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        kept = super().initial(optimizer)
        # The last row of products is (b1^n, b2^n).
        products = torch.ones(self.window, 2, dtype=torch.float64)
        return {**kept, "second": torch.zeros_like(kept["first"]), "products": products}

    def newest(self, group: Group, g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        b1, b2 = group["betas"]
        betas = scalars((b1, b2), g.device)
        return {"first": ((1 - b1) * g, b1), "second": ((1 - b2) * (g * g), b2), "products": (betas, betas)}

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        kept = self.kept(optimizer, bucket.group, g.device)
        left1, left2 = (1 - kept["products"][-1]).unbind()
        step = scalars((learning_rate(bucket.group, g), bucket.group["adam_eps"]), g.device)
        coeffs, hyper = kept["first"].flatten() / left1, torch.cat((step, kept["second"].flatten() / left2))
        still = torch.cat((scalars((0.0, 1.0), g.device), torch.zeros_like(coeffs)))  # no step, and no 0 / 0
        coeffs = to_device(torch.where(finite, coeffs, torch.zeros_like(coeffs)).float(), bucket.device)
        hyper = to_device(torch.where(finite, hyper, still).float(), bucket.device)
        rounding = self.rounding(bucket, seeds, g, finite)
        bucket.noise.step(bucket.members, "adam_window", hyper, self.seeds(kept, bucket), coeffs, **rounding)
