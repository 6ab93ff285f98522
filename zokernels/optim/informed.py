"""Named optimizers whose directions follow what the run has measured.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_integer, fail
from ..step.directions.covariance import RankOneCovariance
from ..step.directions.sampled import SampledTensors
from ..step.directions.spaces import ActivationSpace, GradientSpace
from ..step.directions.summed import Cone
from ..step.estimators import LeaveOneOut, OneSided, ProjectedDifference, TwoSided
from ..step.rules.cone import ConeMomentum
from ..step.rules.covariance import CovarianceDescent
from ..step.rules.sampled import Sensitivity
from ..step.rules.sgd import SGD
from ..step.rules.spaces import Projected
from ..step.scalars import projected_gradient
from ..step.types import Bucket, Estimate, LossesAt
from .arguments import OptionsButDirection, Sides
from .optimizer import ZerothOrder
from .zosgd import Differences


class ConMeZO(Differences):
    """theta <- theta - lr g z;   m <- momentum m + (1 - momentum) g z,   z in a cone around m.

        z = sqrt(d) cos(angle) m / |m| + sin(angle) u,   u dense noise, d the number of weights
        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)

    A step costs as many forwards as MeZO's, and 4 bytes a weight for m (:class:`ConeMomentum`).

    Args:
        momentum: in [0, 1); 0.99 in the authors' scripts, whose trainer holds it at 0.1 for 200 steps and
            then raises it for 1,800.  Here ``param_groups[0]["momentum"]`` may be set between steps, where no
            log is written.
        angle: in radians, in (0, pi / 2]; pi / 2 is MeZO.
        directions, estimator: as for :class:`ZOSGD`; of several directions each has an u of its own.

    m begins at 0, so the first z is u, as in the authors' synthetic experiments.  Their trainer begins with
    random noise in the place of m.

    Source: Behric, Zhang, Li and Thekumparampil, 2025, arXiv 2511.02757, and its code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        estimator: Sides = "two-sided",
        momentum: float = 0.99,
        angle: float = 1.35,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        parts: dict[str, Any] = {"rule": ConeMomentum(momentum, angle), "direction": Cone()}
        super().__init__(params, lr, eps, directions=directions, estimator=estimator, **parts, **options)


class AGZO(ZerothOrder):
    """theta <- theta - lr sum_k g_k z_k,   z = R A^T for linear layers: A spans the inputs of the layer.

        g_k = (L(theta + eps z_k) - L(theta)) / (eps q)

    A is measured in the forward at theta of each step (:class:`ActivationSpace`), so it costs no forward of
    its own.  ``step`` returns L(theta).

    Args:
        model: the module whose ``nn.Linear`` layers are watched while the closure runs at theta.
        rank: of A.
        iterations: of the power iteration that finds A.  (The paper's numbers could not be confirmed.)
        scaled: elements of z have variance 1, as everywhere else here.  The authors' have r / n, with one eps
            and one lr for all layers, which is the default.
        directions: q.

    There is no log (A comes from the batches), no mesh, no sharding, no streaming and no CUDA graph: A is
    measured in one process, of whole inputs.

    Source: Lin et al., 2026, arXiv 2601.17261.
    """

    replayable = False
    staged = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        model: nn.Module,
        rank: int = 16,
        iterations: int = 3,
        scaled: bool = False,
        directions: int = 1,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        for argument in ("mesh", "trajectory"):
            if options.get(argument) is not None:
                expected = "None: the directions come from the activations of one process, batch by batch"
                fail(self.op, argument, expected, repr(options.get(argument)))
        if options.get("capturable"):
            fail(self.op, "capturable", "False: layers are watched by Python", True)
        if options.get("restore") == "products":
            expected = "'exact' or 'inplace': the directions come from the step's first forward"
            fail(self.op, "restore", expected, "'products'")
        space = ActivationSpace(model=model, rank=rank, iterations=iterations, scaled=scaled)
        super().__init__(
            params, lr, eps, direction=space, estimator=OneSided(directions), rule=SGD(), **options
        )

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        space = self.direction
        assert isinstance(space, ActivationSpace)  # the constructor's
        with space.watching(self):
            base = losses_at([[{} for _ in buckets]], 1)
        if not space.bases:
            expected = "a forward that calls linear layers of the model, as modules that are not compiled"
            fail(self.op, "closure", expected, "none of them was called")
        q = self.estimator.directions
        moved = losses_at([[b.point(k, 1) for b in buckets] for k in range(q)], q)
        losses = torch.cat((base, moved.to(base.dtype)))
        return super().estimate(buckets, lambda points, count: losses)


class PGAP(ZerothOrder):
    """theta <- theta - lr g z,   z = U Z V^T in the space of an estimated gradient (:class:`GradientSpace`).

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)

    Every ``interval`` steps the gradient is estimated by ``probes`` differences along dense noise, two
    forwards each, whose singular vectors are kept: 4 (m + n + 1) r bytes for an [m, n] matrix.  A log holds
    those differences, too.

    Args:
        probes: differences of which the gradient is estimated.
        rank, interval, delta, last_delta, decay_steps, scaled: as for :class:`GradientSpace`.
        restore: "exact" only, because a step has two kinds of noise.

    ``last_losses`` are the two along z, and then the probes'.

    Source: Mi et al., 2025, arXiv 2510.18228; see :class:`GradientSpace` for what could not be confirmed.
    """

    spelled: ClassVar = {"refresh": "interval"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        rank: int = 8,
        interval: int = 100,
        probes: int = 4,
        delta: float = 1.0,
        last_delta: float | None = None,
        decay_steps: int = 1000,
        scaled: bool = False,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        check_integer(self.op, "probes", probes)
        space = GradientSpace(rank, interval, delta, last_delta, decay_steps, scaled)
        estimator = ProjectedDifference(1 + probes)
        super().__init__(params, lr, eps, direction=space, estimator=estimator, rule=Projected(), **options)

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        space = self.direction
        assert isinstance(space, GradientSpace)  # the constructor's
        points = [[b.point(k, sign) for b in buckets] for k, sign in self.estimator.points()]
        probes: tuple[Tensor, ...] = ()
        if space.renews(self, buckets):
            losses = losses_at(points[2:], len(points) - 2)
            probes, made = (losses,), {}
            plus, minus = losses.double().view(-1, 2).unbind(1)
            seeds = self.run_state.seeds({b.device: None for b in buckets}, self.estimator.directions)
            for b in buckets:
                g = projected_gradient((plus - minus) / (2 * b.eps), b.group["clip"])
                g = torch.where(g.isfinite().all(), g, torch.zeros_like(g))  # else the step is skipped
                made[id(b)] = space.measured(b, seeds[b.device][1:], g.to(b.device))
                space.use(self, b, made[id(b)])
            self.cache["spaces"] = made
        pair = losses_at(points[:2], 2)
        whole = torch.cat((pair, *(p.to(pair.dtype) for p in probes)))
        return super().estimate(buckets, lambda points, count: whole)


class LOREN(ZerothOrder):
    """M <- momentum M + sum_k g_k z_k;   theta <- theta - lr M,   z of a covariance that is learned.

        g_k = (L(theta + eps z_k) - mean) / (eps (q - 1))

    z_k is dense noise with less of what lies along one vector for each matrix, along which the loss bends
    (:class:`RankOneCovariance`); the vectors follow the losses (:class:`CovarianceDescent`).  A step takes q
    forwards, and keeps 4 bytes a weight for M.

    Args:
        directions: q >= 2.
        momentum: of matrices; vectors have none.
        damping, axis_lr: of the covariance.
        weight_decay: as everywhere, and of the vectors, too.

    Source: Seung, Lee and Ko, 2026, arXiv 2511.07971, and its code, which takes its steps one direction after
    another (see :class:`CovarianceDescent`).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 6,
        momentum: float = 0.9,
        damping: float = 0.1,
        axis_lr: float = 2e-3,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        parts: dict[str, Any] = {"estimator": LeaveOneOut(directions), "direction": RankOneCovariance()}
        super().__init__(
            params, lr, eps, rule=CovarianceDescent(momentum, damping, axis_lr), **parts, **options
        )


class CurvZO(ZerothOrder):
    """theta_t <- theta_t - lr g z_t / pi_t for the tensors t that take part, each with probability pi_t.

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),   z_t = 0 for the other tensors

    Scores of the tensors follow |g| (:class:`Sensitivity`), and pi is proportional to them
    (:class:`SampledTensors`).

    Args:
        ratio: the share of tensors that takes part at first.
        interval: after how many steps the share follows the scores.
        rate, pace, first: as for :class:`Sensitivity`.

    weight_decay is of all tensors in each step; in the authors' code of those that take part.

    Source: Wang, Chen and Tang, 2026, arXiv 2603.21725, whose text speaks of a probability for each weight.
    The formulas are those of a reproduction of the authors' code by others, which samples whole tensors.
    """

    spelled: ClassVar = {"refresh": "interval"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        ratio: float = 0.4,
        interval: int = 20,
        rate: float = 0.1,
        pace: float = 0.1,
        first: float = 0.01,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        parts: dict[str, Any] = {"estimator": TwoSided(1), "direction": SampledTensors(interval)}
        super().__init__(params, lr, eps, rule=Sensitivity(ratio, rate, pace, first), **parts, **options)
