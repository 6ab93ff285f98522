"""Named optimizers with other estimators than ZOSGD.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import fail
from ..ops.arguments import Dist
from ..step.estimators import (
    ForwardMode,
    Guided,
    Ranking,
    StdNormalized,
    TwoSided,
)
from ..step.loss import DerivativeReader, RankReader
from ..step.rules.sgd import SGD, Conservative, Floored, Recalling
from ..step.types import Bucket, Estimate, LossesAt
from .arguments import (
    Options,
    OptionsButClip,
    OptionsButDist,
)
from .optimizer import ZerothOrder


class FZOO(ZerothOrder):
    """theta <- theta - lr * sum_k (L_k - L_0) / (q sigma) * z_k,   k = 0 .. q - 1.

    L_k = L(theta + eps z_k), L_0 = L(theta), and sigma is the standard deviation of the L_k.  A step takes
    q + 1 forwards along Rademacher directions, and is normalized by the losses' own spread.  ``step``
    returns L_0.  The paper's update has eps q sigma in the place of q sigma: its lr is ours times eps.

    Args:
        directions: q >= 2.
        sigma: "sample" (divided by q - 1, the paper's) or "population" (divided by q, the authors' code's).
            With lr times sqrt(q / (q - 1)), "sample" takes the steps of "population".
        std_eps: in units of the loss.  Where sigma <= std_eps, g is 0 instead of a division by next to
            nothing.
        reuse: FZOO-R: sigma is that of the L_k and of those of the step before together, so half of the
            directions give it (in the first step the L_k count twice).  A log then holds the losses.

    Source: Dang et al., 2025, arXiv 2506.09034; FZOO-R by summaries of it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 8,
        std_eps: float = 1e-8,
        sigma: str = "sample",
        reuse: bool = False,
        dist: Dist = "rademacher",
        **options: Unpack[OptionsButDist],
    ) -> None:
        estimator, rule = StdNormalized(directions, std_eps, sigma), Recalling() if reuse else SGD()
        super().__init__(params, lr, eps, dist=dist, estimator=estimator, rule=rule, **options)

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        rule = self.rule
        if not isinstance(rule, Recalling):
            return super().estimate(buckets, losses_at)
        measured: list[Tensor] = []

        def with_last(points: Any, count: int) -> Tensor:
            losses = losses_at(points, count)
            measured.append(losses)
            return torch.cat((losses.double(), rule.last(self, losses[1:])))

        estimate = super().estimate(buckets, with_last)
        return estimate._replace(losses=measured[0], forwards=measured[0].unbind())


class QZO(ZerothOrder):
    """s <- max(s - lr sum_k g_k z_k, minimum):   the scales s of integer weights, which stay as they are.

    g_k as for :class:`ZOSGD`, clipped: |g_k| <= clip.

    Args:
        params: ``zokernels.quantize.named_scales(model)``, or any positive weights.
        clip: of the directional derivatives, in units of the loss per unit of s.
        minimum: no scale falls below it, because a negative one would turn the signs of its weights.
        directions: q.

    Source: QZO, Shang et al., 2025, arXiv 2505.13430; clip and minimum are those of its code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        clip: float | None = 100.0,
        minimum: float = 1e-7,
        **options: Unpack[OptionsButClip],
    ) -> None:
        estimator, rule = TwoSided(directions), Floored(minimum)
        super().__init__(params, lr, eps, clip=clip, estimator=estimator, rule=rule, **options)


class ZORankSGD(ZerothOrder):
    """Descent on an order alone: the best ``top`` of ``candidates`` forwards at theta + eps z_k are ranked.

        g_k = (times worse - times better) / number of edges,   theta <- theta - lr * sum_k g_k z_k

    An edge joins two candidates whose order is known: if i is better than j, then z_j - z_i leads uphill.
    This is for people or programs that can compare results but not score them.

    Args:
        candidates: m >= 2.
        top: how many of the best are in order, in [1, m] (default: all).

    Example::

        opt = ZORankSGD(model.named_parameters(), lr=1e-2, eps=1e-2, candidates=4, top=1)
        best = opt.step(lambda: generate(model), rank=lambda images: [choose(images)])

    Source: ZO-RankSGD, Tang, Rybin and Chang, 2023, arXiv 2303.03751.
    :class:`ZORankSearch` has its line search, too.
    """

    spelled: ClassVar = {"directions": "candidates"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 8,
        top: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, eps, estimator=Ranking(candidates, top), rule=SGD(), **options)

    def step(
        self,
        closure: Callable[..., Any] | None = None,
        rank: Callable[[list[Any]], Iterable[int]] | None = None,
        *,
        batched: bool = False,
    ) -> Any:
        """One step, as :meth:`ZerothOrder.step`.

        Without ``rank`` the closure returns losses, and the step returns the lowest.

        With ``rank`` the closure may return anything, one result for each candidate.  ``rank`` gets the list
        of results and returns indices into it, best first, at least ``top`` of them.  The step returns the
        best result, and ``last_losses`` are places, 0 for the best.  ``rank`` runs on the host, so it does
        not go with ``capturable``.
        """
        if rank is None:
            return super().step(closure, batched=batched)
        if batched:
            fail(self.op, "batched", "False with rank, which compares results that are no losses", True)
        if self.run_state.capturable:
            fail(self.op, "rank", "capturable=False: a CUDA graph calls no host function", "capturable=True")
        if not self.team.alone:
            fail(self.op, "rank", "losses with a mesh: one list of all results is on no rank", "a function")
        assert isinstance(self.estimator, Ranking)  # the constructor's
        results = RankReader(rank, self.estimator.top or self.estimator.directions)
        self.run_step(closure, results)
        return results.best


class MeZOGV(ZerothOrder):
    """theta <- theta - lr g v along a guiding vector v = sum_k w_k z_k (:class:`Guided`): candidates + 2
    forwards.

    The losses of some candidates theta + eps z_k are measured first.  v is the mean z of the ``top`` lowest
    less the mean z of the others (MeZO-GV); or, with ``best``, the z of the lowest alone (MeZO-Greedy).  Then
    g = (L(theta + eps v) - L(theta - eps v)) / (2 eps).

    It is a combine with the coefficients w_k, so v is never stored.  ``last_losses`` are those of the
    candidates and the two along v, whose mean a step returns.  ``last_projected_gradient`` are the g w_k.

    Args:
        candidates: q >= 2.
        top: how many are the low ones, below q.
        best: MeZO-Greedy.
        restore: with "inplace" there is no log, which has no place for the points along v that weights moved
            to.

    Source: Jin, Cen and Tan, 2026, arXiv 2601.04710.  The authors' code has one candidate a step, beside the
    best one of the steps before.  That MeZO-Greedy measures g by two forwards along the best is read from the
    abstract ("keeps the single best perturbation"); its code is not public.
    """

    spelled: ClassVar = {"directions": "candidates"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 4,
        top: int = 2,
        best: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.replayable = options.get("restore", "exact") == "exact"
        if not self.replayable and options.get("trajectory") is not None:
            expected = "'exact' with a trajectory: its points depend on the losses before them"
            fail(self.op, "restore", expected, repr(options["restore"]))
        super().__init__(params, lr, eps, estimator=Guided(candidates, top, best), rule=SGD(), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "replayable": self.replayable}

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        assert isinstance(self.estimator, Guided)  # the constructor's
        count = self.estimator.directions
        pool = losses_at([[b.point(k, 1) for b in buckets] for k in range(count)], count)
        w = self.estimator.guide(pool)
        along = lambda b, sign: {k: (sign * b.eps * c).float() for k, c in enumerate(w.unbind())}
        pair = losses_at([[along(b, sign) for b in buckets] for sign in (1, -1)], 2)
        losses = torch.cat((pool, pair.to(pool.dtype)))
        return super().estimate(buckets, lambda points, number: losses)


class ZOConservative(ZerothOrder):
    """:class:`ZOSGD` that keeps the best of theta, theta - lr g z and theta + lr g z.

    It runs the closure at each of them.  With q = 1 it takes 5 forwards and one update, and the choice is
    made on the device.  A trial sees the update rounded to nearest and without weight decay, which is applied
    whichever is kept.

    ``last_projected_gradient`` is the g that was applied: g, 0 or -g.  ``last_losses`` are l+, l-, and the
    three trials.

    Args:
        directions: q.
        ties: of equal losses, "first": the weights stay; "last": they move, as in the authors' code
            (:class:`Conservative`).

    Source: ZO-SGD-Cons of Zhang et al., 2024, arXiv 2402.11592.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        ties: str = "first",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, eps, estimator=TwoSided(directions), rule=Conservative(ties), **options)


class ForwardGradient(ZerothOrder):
    """theta <- theta - lr * sum_k g_k z_k,   g_k = <grad L(theta), z_k> / q by forward-mode differentiation.

    Each direction takes one forward of dual numbers.  There is no eps and no truncation error, and no memory
    of activations.  The tangent of a parameter is z rounded to its dtype.  It is made for each torch function
    call, as the exact probe makes its copies, so that no more than one call's tangents are ever stored.

    The closure returns a tensor, and every function between parameters and loss needs a forward-mode
    derivative (``torch.autograd.forward_ad``).  ``scaled_dot_product_attention`` runs unfused, because its
    fused kernels have none.

    Args:
        directions: q.
        eps: not used, and here for scripts that give it to every class.
        restore: "exact" only.

    ``last_losses``: for each direction a tensor [2], the loss and its derivative along z_k.

    Source: Baydin et al., 2022, arXiv 2202.08587.
    """

    tangents = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        **options: Unpack[Options],
    ) -> None:
        if (restore := options.get("restore", "exact")) != "exact":
            fail(self.op, "restore", "'exact': the weights are never perturbed", repr(restore))
        super().__init__(params, lr, eps, estimator=ForwardMode(directions), rule=SGD(), **options)

    # Narrower than its base: a number has no derivative.
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step, as :meth:`ZerothOrder.step`; the closure returns a tensor.

        Returns the mean loss, at theta.
        """
        return self.run_step(closure, DerivativeReader())
