"""Rules that keep a state of each weight: momentum, Adam and HiZOO; and sign, which takes the same kernel.

Each is one fused pass over theta and its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_number, fail
from ...functional import Rule as KernelRule
from ...transfer import to_device
from ..directions.scaling import CurvedDirection
from ..estimators import ThreePoint
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..scalars import descent, learning_rate, scalars, where
from ..types import Bucket, Estimate, Group
from .rule import Rule, check_betas, check_fraction, groups_of


class Stateful(Rule):
    """One :func:`zokernels.update_` with G = sum_k g_k z_k, which is never stored.

    Unless ``finite``, the device itself takes :attr:`identity` for the hyper-parameters, no decay and G = 0,
    so that every value stays.  (A weight or a state of -0.0 may become 0.0 then, and an infinite one NaN.)
    """

    #: The kernel's name of the rule.
    kernel: KernelRule
    #: The hyper-parameters that change nothing.
    identity: tuple[float, ...]

    def hyper(self, optimizer: OptimizerView, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        """The kernel's hyper-parameters: numbers, or float64 tensors on the device of ``like``."""
        raise NotImplementedError

    def coefficients(self, group: Group, g: Tensor, finite: Tensor) -> Tensor:
        """The kernel's coefficients of z, fp32 [q]; 0 unless ``finite``."""
        return g

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        values = lambda: scalars(self.hyper(optimizer, bucket, g), g.device)
        hyper = to_device(
            where(finite, values, lambda: scalars(self.identity, g.device)).float(), bucket.device
        )
        coeffs = to_device(self.coefficients(bucket.group, g, finite), bucket.device)
        states = zip(
            ("first", "second"), (self.state(optimizer, bucket, name) for name in self.states), strict=False
        )
        options = {**dict(states), **self.rounding(bucket, seeds, g, finite)}
        bucket.noise.step(bucket.members, self.kernel, hyper, seeds, coeffs, **options)


class Momentum(Stateful):
    """m <- momentum m + (1 - dampening) (G + l2 theta);   theta <- decay theta - lr m.

    m starts at 0.  (torch.optim.SGD starts it at the first gradient, without dampening.)
    """

    kernel = "momentum"
    identity = (0.0, 1.0, 0.0, 0.0)
    states: ClassVar = {"momentum_buffer": 0.0}

    def __init__(
        self,
        momentum: float = 0.9,
        dampening: float = 0.0,
        l2: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(state_dtype, momentum=momentum, dampening=dampening, l2=l2)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_fraction(op, "dampening", group["dampening"])
        check_number(op, "l2", group["l2"])

    def hyper(self, optimizer: OptimizerView, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        group = bucket.group
        return group["l2"], group["momentum"], 1 - group["dampening"], learning_rate(group, like)


class Sign(Stateful):
    """theta <- decay theta - lr sign(G + l2 theta); sign(0) = 0."""

    kernel = "sign"
    identity = (0.0, 0.0)

    def __init__(self, l2: float = 0.0) -> None:
        super().__init__(l2=l2)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_number(op, "l2", group["l2"])

    def hyper(self, optimizer: OptimizerView, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        return bucket.group["l2"], learning_rate(bucket.group, like)


class Adam(Stateful):
    """m <- b1 m + (1 - b1) G;  v <- b2 v + (1 - b2) G^2;  theta <- decay theta - lr m' / (sqrt(v') + eps).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t), where t counts the updates of the group.  As in torch, steps
    that were skipped, or in which none of its parameters took part, do not count.  torch counts for each
    parameter; here one that is unfrozen later has no bias correction of its own.  b^t is kept as a float64
    product, because multiplication has the same bits on every device and pow has not.

    ``decoupled``: weight_decay is the factor decay = 1 - lr weight_decay (AdamW).  Where it is not,
    weight_decay theta is added to G, and decay = 1 (Adam).
    """

    kernel = "adam"
    identity = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # the last two prevent 0 / 0
    states: ClassVar = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        decoupled: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(state_dtype, betas=betas, adam_eps=adam_eps)
        self.decoupled = decoupled

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_betas(op, group["betas"])
        check_number(op, "adam_eps", group["adam_eps"])

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        return {"products": torch.ones(2, dtype=torch.float64)}

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        finite = estimate.finite
        for group in groups_of(probe.buckets):
            products = self.kept(optimizer, group, finite.device)["products"]
            products.mul_(
                torch.where(finite, scalars(group["betas"], finite.device), torch.ones_like(products))
            )

    def hyper(self, optimizer: OptimizerView, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        group = bucket.group
        (b1, b2), l2 = group["betas"], 0.0 if self.decoupled else group["weight_decay"]
        left1, left2 = (1 - self.kept(optimizer, group, like.device)["products"]).unbind()
        return (
            l2,
            b1,
            1 - b1,
            b2,
            1 - b2,
            learning_rate(group, like) / left1,
            1 / left2.sqrt(),
            group["adam_eps"],
        )


class AMSGrad(Adam):
    """:class:`Adam` with the largest v so far in the place of v in v'.

    It keeps one state more, of the same dtype, and costs a second pass over the weights.
    """

    states: ClassVar = {**Adam.states, "max_exp_avg_sq": 0.0}
    through_noise = False

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        """Two kernels: one renews m and v with lr = 0; the other moves theta by m and the largest v.

        The second has no direction, and hyper-parameters that leave both states as they are.
        """
        values, still = scalars(self.hyper(optimizer, bucket, g), g.device), scalars(self.identity, g.device)
        renew, move = torch.cat((values[:5], still[5:6], values[6:])), torch.cat((still[:5], values[5:]))
        largest = self.state(optimizer, bucket, "max_exp_avg_sq")
        both = {
            key: self.state(optimizer, bucket, name)
            for key, name in (("first", "exp_avg"), ("second", "exp_avg_sq"))
        }
        rounding = self.rounding(bucket, seeds, g, finite)
        hyper = lambda v: to_device(torch.where(finite, v, still).float(), bucket.device)
        coeffs = to_device(g, bucket.device)
        bucket.noise.step(
            bucket.members, "adam", hyper(renew), seeds, coeffs, **both, **rounding | {"decay": None}
        )
        torch._foreach_maximum_(largest, both["second"])
        both["second"] = largest
        bucket.noise.step(bucket.members, "adam", hyper(move), seeds[:0], coeffs[:0], **both, **rounding)


class Curvature(Stateful):
    """h <- (1 - alpha) h + alpha |L+ + L- - 2 L0| / (2 eps^2) h z^2;  theta <- decay theta - lr g z /
    sqrt(h).

    h is an estimate of the Hessian's diagonal, and starts at 1.  Weights along which the loss bends more move
    less, in the perturbation (:class:`CurvedDirection`) and in the update, which uses the new h.
    """

    kernel = "hizoo"
    reads_losses = True
    identity = (1.0, 0.0)
    states: ClassVar = {"curvature": 1.0}

    def __init__(self, alpha: float = 1e-6, state_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(state_dtype, alpha=alpha)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "alpha", group["alpha"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        parts = optimizer.estimator, optimizer.direction
        if parts[0] != ThreePoint() or not isinstance(parts[1], CurvedDirection):
            fail(optimizer.op, "estimator, direction", "ThreePoint(), CurvedDirection()", parts)

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        self._losses = estimate.losses.double()

    def hyper(self, optimizer: OptimizerView, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        alpha, estimator = bucket.group["alpha"], optimizer.estimator
        assert isinstance(estimator, ThreePoint)  # check_parts
        return 1 - alpha, alpha / 2 * estimator.second_difference(self._losses, bucket.eps)

    def coefficients(self, group: Group, g: Tensor, finite: Tensor) -> Tensor:
        return torch.where(finite, descent(group, g), torch.zeros_like(g))
