"""Momentum and Adam without state: the last steps' seeds and coefficients say what the state would be.

z of an earlier step is drawn again: an update draws ``window`` times the noise of a plain one, in the same one pass
over the weights, and needs no memory of their size.  MeZO (Malladi et al., 2023, arXiv 2305.17333) suggests it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import fail
from ..transfer import to_device
from .groups import Bucket, check_number
from .rules import Rule, check_betas, check_fraction
from .update import decay_of, descent, gated_decay, learning_rate, scalars

if TYPE_CHECKING:
    from .optimizer import Estimate, ZerothOrder
    from .probe import Probe


class Window(Rule):
    """The last ``window`` updates of each group, newest first: seeds (int64 [window, q]) and what a subclass adds
    (float64 [window, ...], multiplied once a step and never raised to a power, so that they have the same bits on every
    device).

    Steps that are not finite do not enter.  z of an earlier step must be what it was then: no subset, and no direction
    that is refreshed.  A parameter that is unfrozen takes the steps of the window that it did not take part in.
    """

    def __init__(self, window: int, **defaults: Any) -> None:
        super().__init__(**defaults)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            fail(type(self).__name__, "window", "an integer >= 1", repr(window))
        self.window = window

    def check_parts(self, optimizer: ZerothOrder) -> None:
        if optimizer.direction.refresh is not None or optimizer.subset is not None:
            got = (optimizer.direction, optimizer.subset)
            fail(type(optimizer).__name__, "window", "a direction that is not refreshed and no subset", got)

    def initial(self, optimizer: ZerothOrder) -> dict[str, Tensor]:
        shape = (self.window, optimizer.estimator.directions)
        return {"seeds": torch.zeros(shape, dtype=torch.int64), "first": torch.zeros(shape, dtype=torch.float64)}

    def newest(self, group: dict[str, Any], g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        """Of each float64 tensor that is kept, the newest entry, and the factor of the older ones (``g``: float64)."""
        raise NotImplementedError

    def begin(self, optimizer: ZerothOrder, probe: Probe, estimate: Estimate) -> None:
        of_groups = {id(b.group): (b, g) for b, g in zip(probe.buckets, estimate.gradients, strict=True)}
        for bucket, g in of_groups.values():
            seeds = to_device(probe.seeds[bucket.device], g.device)
            entries = {"seeds": (seeds, 1), **self.newest(bucket.group, g.double())}
            for name, kept in self.kept(optimizer, bucket.group, g.device).items():
                entry, factor = entries[name]
                kept.copy_(torch.where(estimate.finite, torch.cat((entry[None], factor * kept[:-1])), kept))

    def seeds(self, kept: dict[str, Tensor], bucket: Bucket) -> Tensor:
        """int64 [window * q], on the bucket's device."""
        return to_device(kept["seeds"].flatten(), bucket.device)

    def rounding(self, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> dict[str, Any]:
        decays = bucket.group["weight_decay"]
        return {
            "decay": gated_decay(decay_of(bucket.group, g), finite, bucket.device) if decays else None,
            "rounding": bucket.group["rounding"],
            "rounding_seed": seeds[:1],
        }


class MomentumWindow(Window):
    """theta <- decay theta - lr (1 - dampening) sum_j momentum^j G_j over the last ``window`` updates, one combine.

    The momentum of :class:`Momentum` but for momentum^window of what is older.
    """

    def __init__(self, window: int, momentum: float = 0.9, dampening: float = 0.0) -> None:
        super().__init__(window, momentum=momentum, dampening=dampening)

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_fraction(op, "dampening", group["dampening"])

    def newest(self, group: dict[str, Any], g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        return {"first": ((1 - group["dampening"]) * g, group["momentum"])}

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        kept = self.kept(optimizer, bucket.group, g.device)
        coeffs = descent(bucket.group, kept["first"].flatten())
        coeffs = to_device(torch.where(finite, coeffs, torch.zeros_like(coeffs)), bucket.device)
        rounding = self.rounding(bucket, seeds, g, finite)
        bucket.direction.update(bucket, self.seeds(kept, bucket), coeffs, **rounding)


class AdamWindow(Window):
    """theta <- decay theta - lr m' / (sqrt(v') + adam_eps), with m' and v' weighted means over the last ``window``
    updates j = 0, 1, ...:

        m' = (1 - b1) sum_j b1^j G_j / (1 - b1^n),   v' = (1 - b2) sum_j b2^j sum_k (g_jk z_jk)^2 / (1 - b2^n)

    n is the number of updates in the window, so both means have weights that sum to 1.  Of the square of G_j = sum_k
    g_jk z_jk only the squares of its terms are taken: with one direction that is G_j^2 itself.

    Unless ``decoupled``, weight_decay must be 0: its gradient in earlier steps is not a multiple of noise.
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

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_betas(op, group["betas"])
        check_number(op, "adam_eps", group["adam_eps"])
        if group["weight_decay"] and not self.decoupled:
            fail(op, "weight_decay", "0 with a window (ZOAdamW has a decoupled one)", group["weight_decay"])

    def initial(self, optimizer: ZerothOrder) -> dict[str, Tensor]:
        kept = super().initial(optimizer)
        # The last row of products is (b1^n, b2^n).
        products = torch.ones(self.window, 2, dtype=torch.float64)
        return {**kept, "second": torch.zeros_like(kept["first"]), "products": products}

    def newest(self, group: dict[str, Any], g: Tensor) -> dict[str, tuple[Tensor, float | Tensor]]:
        b1, b2 = group["betas"]
        betas = scalars((b1, b2), g.device)
        return {"first": ((1 - b1) * g, b1), "second": ((1 - b2) * (g * g), b2), "products": (betas, betas)}

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        kept = self.kept(optimizer, bucket.group, g.device)
        left1, left2 = (1 - kept["products"][-1]).unbind()
        step = scalars((learning_rate(bucket.group, g), bucket.group["adam_eps"]), g.device)
        coeffs, hyper = kept["first"].flatten() / left1, torch.cat((step, kept["second"].flatten() / left2))
        still = torch.cat((scalars((0.0, 1.0), g.device), torch.zeros_like(coeffs)))  # no step, and no 0 / 0
        coeffs = torch.where(finite, coeffs, torch.zeros_like(coeffs)).float()
        hyper = torch.where(finite, hyper, still).float()
        bucket.direction.step(
            bucket,
            "adam_window",
            to_device(hyper, bucket.device),
            self.seeds(kept, bucket),
            to_device(coeffs, bucket.device),
            **self.rounding(bucket, seeds, g, finite),
        )
