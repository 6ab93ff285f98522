"""Update rules as one fused pass over theta and the state of each weight: momentum, Adam, sign, HiZOO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import functional
from ..checks import fail
from ..transfer import to_device
from .direction import Dense, Direction
from .estimators import ThreePoint
from .groups import Bucket, check_number
from .rules import Rule, check_betas, check_fraction, groups_of
from .update import decay_of, descent, gated_decay, learning_rate, scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .optimizer import Estimate, ZerothOrder
    from .probe import Probe


class Stateful(Rule):
    """One :func:`zokernels.update_` with G = sum_k g_k z_k, which is never stored.

    The device itself takes :attr:`identity` for the hyper-parameters, no decay and G = 0 unless ``finite``: every value
    then stays (a weight or a state of -0.0 may become 0.0, and one that is infinite NaN).
    """

    kernel: functional.Rule
    #: The hyper-parameters that change nothing.
    identity: tuple[float, ...]
    #: Whether weight_decay is a factor of theta; where not, ``hyper`` adds its gradient.
    decoupled = True

    def hyper(self, optimizer: ZerothOrder, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        """Those of the kernel: numbers, or float64 tensors on the device of ``like``."""
        raise NotImplementedError

    def coefficients(self, group: dict[str, Any], g: Tensor, finite: Tensor) -> Tensor:
        """Of the kernel (fp32 [q]); 0 unless ``finite``."""
        return g

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        group, decays = bucket.group, self.decoupled and bucket.group["weight_decay"]
        values = scalars(self.hyper(optimizer, bucket, g), g.device)
        hyper = torch.where(finite, values, scalars(self.identity, g.device)).float()
        states = [self.state(optimizer, bucket, name) for name in self.states]
        bucket.direction.step(
            bucket,
            self.kernel,
            to_device(hyper, bucket.device),
            seeds,
            to_device(self.coefficients(group, g, finite), bucket.device),
            **dict(zip(("first", "second"), states, strict=False)),
            decay=gated_decay(decay_of(group, g), finite, bucket.device) if decays else None,
            rounding=group["rounding"],
            rounding_seed=seeds[:1],
        )


class Momentum(Stateful):
    """m <- momentum m + (1 - dampening) (G + l2 theta);   theta <- decay theta - lr m.

    m starts at 0 (torch.optim.SGD starts it at the first gradient, without dampening).
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

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_fraction(op, "dampening", group["dampening"])
        check_number(op, "l2", group["l2"])

    def hyper(self, optimizer: ZerothOrder, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        group = bucket.group
        return group["l2"], group["momentum"], 1 - group["dampening"], learning_rate(group, like)


class Sign(Stateful):
    """theta <- decay theta - lr sign(G + l2 theta); sign(0) = 0."""

    kernel = "sign"
    identity = (0.0, 0.0)

    def __init__(self, l2: float = 0.0) -> None:
        super().__init__(l2=l2)

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_number(op, "l2", group["l2"])

    def hyper(self, optimizer: ZerothOrder, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        return bucket.group["l2"], learning_rate(bucket.group, like)


class Adam(Stateful):
    """m <- b1 m + (1 - b1) G;  v <- b2 v + (1 - b2) G^2;  theta <- decay theta - lr m' / (sqrt(v') + adam_eps).

    m' = m / (1 - b1^t), v' = v / (1 - b2^t), where t counts the updates of the group: steps that were skipped or in
    which none of its parameters took part do not count, as in torch.  Torch counts for each parameter; here one that
    is unfrozen later has no bias correction of its own.  b^t is kept as a product in float64: multiplied, so that it
    has the same bits on every device.

    ``decoupled``: weight_decay is the factor decay = 1 - lr weight_decay (AdamW); else G has weight_decay theta added
    and decay = 1 (Adam).
    """

    kernel = "adam"
    identity = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # the last two keep 0 / 0 away
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

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_betas(op, group["betas"])
        check_number(op, "adam_eps", group["adam_eps"])

    def initial(self, optimizer: ZerothOrder) -> dict[str, Tensor]:
        return {"products": torch.ones(2, dtype=torch.float64)}

    def begin(self, optimizer: ZerothOrder, probe: Probe, estimate: Estimate) -> None:
        finite = estimate.finite
        for group in groups_of(probe.buckets):
            products = self.kept(optimizer, group, finite.device)["products"]
            products.mul_(torch.where(finite, scalars(group["betas"], finite.device), torch.ones_like(products)))

    def hyper(self, optimizer: ZerothOrder, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        group = bucket.group
        (b1, b2), l2 = group["betas"], 0.0 if self.decoupled else group["weight_decay"]
        left1, left2 = (1 - self.kept(optimizer, group, like.device)["products"]).unbind()
        return l2, b1, 1 - b1, b2, 1 - b2, learning_rate(group, like) / left1, 1 / left2.sqrt(), group["adam_eps"]


class Curvature(Stateful):
    """h <- (1 - alpha) h + alpha |L+ + L- - 2 L0| / (2 eps^2) h z^2;   theta <- decay theta - lr g z / sqrt(h).

    h (:class:`CurvedDirection`) starts at 1, and is an estimate of the Hessian's diagonal: weights that bend the loss
    more move less, in the perturbation and in the update.  The step uses the new h.
    """

    kernel = "hizoo"
    reads_losses = True
    identity = (1.0, 0.0)
    states: ClassVar = {"curvature": 1.0}

    def __init__(self, alpha: float = 1e-6, state_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(state_dtype, alpha=alpha)

    def check(self, op: str, group: dict[str, Any]) -> None:
        super().check(op, group)
        check_fraction(op, "alpha", group["alpha"])

    def check_parts(self, optimizer: ZerothOrder) -> None:
        parts = optimizer.estimator, optimizer.direction
        if parts[0] != ThreePoint() or not isinstance(parts[1], CurvedDirection):
            fail(type(optimizer).__name__, "estimator, direction", "ThreePoint(), CurvedDirection()", parts)

    def begin(self, optimizer: ZerothOrder, probe: Probe, estimate: Estimate) -> None:
        self._losses = estimate.losses.double()

    def hyper(self, optimizer: ZerothOrder, bucket: Bucket, like: Tensor) -> Sequence[float | Tensor]:
        alpha, estimator = bucket.group["alpha"], optimizer.estimator
        assert isinstance(estimator, ThreePoint)  # check_parts
        return 1 - alpha, alpha / 2 * estimator.second_difference(self._losses, bucket.eps)

    def coefficients(self, group: dict[str, Any], g: Tensor, finite: Tensor) -> Tensor:
        return torch.where(finite, descent(group, g), torch.zeros_like(g))


class _Curved(Dense):
    """z / sqrt(h) in the moves; the update's kernel divides by its new h itself."""

    uniform = False

    def __init__(self, curvature: dict[int, Tensor]) -> None:
        self._curvature = curvature

    def noise(
        self, bucket: Bucket, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor, coeffs: Tensor
    ) -> dict[str, Any]:
        curvature = [self._curvature[id(p)] for p in params]
        return super().noise(bucket, params, streams, seeds, coeffs) | {"curvature": curvature}

    def step(self, bucket: Bucket, *args: Any, **options: Any) -> None:
        Dense().step(bucket, *args, **options)


class CurvedDirection(Direction):
    """z / sqrt(h), h = ``optimizer.state[p]["curvature"]`` of the rule :class:`Curvature`."""

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        for bucket in buckets:
            states = optimizer.rule.state(optimizer, bucket, "curvature")
            bucket.direction = _Curved({id(p): h for p, h in zip(bucket.params, states, strict=True)})
