"""Named optimizers that are parts put together.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_integer, fail
from ..ops.arguments import Dist
from ..step.directions.direction import Direction
from ..step.directions.low_rank import FreshFactors, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import MagnitudeMask
from ..step.estimators import (
    Estimator,
    ForwardMode,
    Guided,
    Population,
    Ranking,
    ScaledPopulation,
    StdNormalized,
    TwoSided,
)
from ..step.loss import DerivativeReader, RankReader
from ..step.rules.factors import FactorMomentum
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD, Conservative, Floored, Recalling
from ..step.subset import LAYERS, Blocks, LayerSkip
from ..step.types import Bucket, Estimate, LossesAt
from .arguments import (
    Options,
    OptionsButClip,
    OptionsButDirection,
    OptionsButDist,
    SGDButDirection,
    SGDButSubset,
)
from .optimizer import ZerothOrder
from .zosgd import ZOSGD


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


class SparseMeZO(ZOSGD):
    """:class:`ZOSGD` on the smallest weights of each tensor, about the share ``density``.

    The threshold between small and large is each tensor's ``density`` quantile at the first step.  As in the
    paper every step compares the weights, as they are then, with that threshold, so a weight that has grown
    beyond it stands still from there on (a dynamic mask).  With ``dynamic=False`` the first step's mask stays
    as it is (a constant mask).  Either needs one bit a weight of extra memory (:class:`MagnitudeMask`).

    Args:
        density: 1 - the paper's sparsity.
        refresh: measure the thresholds again every so many steps (None: never).
        dynamic: compare the weights with the thresholds in every step, and not in the first alone.

    Source: Liu et al., 2024, arXiv 2402.15751.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        density: float = 0.25,
        refresh: int | None = None,
        dynamic: bool = True,
        **options: Unpack[SGDButDirection],
    ) -> None:
        super().__init__(params, lr, eps, direction=MagnitudeMask(density, refresh, dynamic), **options)


class LeZO(ZOSGD):
    """:class:`ZOSGD` that leaves out a random share of the layers in each step (:class:`LayerSkip`).

    Args:
        skipped: share of the layers that a step leaves out, in [0, 1).
        layers: regular expression that finds the number of a layer, its group 1, in a parameter's name.

    Source: Wang et al., 2024, arXiv 2410.09823.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        skipped: float = 0.75,
        layers: str = LAYERS,
        **options: Unpack[SGDButSubset],
    ) -> None:
        super().__init__(params, lr, eps, subset=LayerSkip(layers, skipped), **options)


class ZOBCD(ZOSGD):
    """:class:`ZOSGD` of ``size`` layers at a time, for ``period`` steps (:class:`Blocks`).

    Args:
        size: layers of a block.  What is in no layer (embeddings, head) is one block more.
        period: steps for which a block is trained.
        order: "cyclic": blocks in their order; "random": a block drawn anew for each period.
        layers: regular expression that finds the number of a layer, its group 1, in a parameter's name.

    Source: ZO-LLM, Zhang et al., 2024, arXiv 2402.11592.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        size: int = 1,
        period: int = 1,
        order: str = "cyclic",
        layers: str = LAYERS,
        **options: Unpack[SGDButSubset],
    ) -> None:
        super().__init__(params, lr, eps, subset=Blocks(layers, size, period, order), **options)


class _FactorSGD(ZOSGD):
    """:class:`ZOSGD` with kept factors: its momentum is of the fresh factor alone, unless it is a window."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        direction: Direction,
        **options: Unpack[SGDButDirection],
    ) -> None:
        momentum = options.get("momentum", 0.0)
        if not momentum or options.get("window") is not None:
            super().__init__(params, lr, eps, direction=direction, **options)
            return
        others: dict[str, Any] = {key: value for key, value in options.items() if key != "momentum"}
        for name in ("dampening", "l2", "state_dtype"):
            if name in others:
                fail(self.op, name, "none with the momentum of factors", repr(others[name]))
        others.pop("window", None)
        rule = FactorMomentum(momentum)
        super(ZOSGD, self).__init__(params, lr, eps, rule=rule, direction=direction, **others)


class LOZO(_FactorSGD):
    """:class:`ZOSGD` along U V^T / sqrt(rank), V kept for ``interval`` steps (:class:`KeptRight`).

    ``scaled=False`` is the authors' code: U V^T for matrices, dense noise for vectors, with one eps and one
    lr.  With ``scaled`` that is sqrt(rank) times their eps and rank times their lr in a group of the
    matrices, and their eps and lr in a group of the vectors.  (The paper divides its update by the rank; its
    code does not.)

    ``momentum``: LOZO-M, whose state of an [m, n] matrix is [m, rank] (:class:`FactorMomentum`; 0.7 in the
    authors' code).

    Args:
        rank: r, the columns of U and V.
        interval: steps for which a V is kept (None: for the whole run).
        scaled: elements of z have variance 1.

    Source: Chen et al., 2024, arXiv 2410.07698.
    """

    spelled: ClassVar = {"refresh": "interval"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        rank: int = 4,
        interval: int | None = 50,
        scaled: bool = True,
        **options: Unpack[SGDButDirection],
    ) -> None:
        direction = KeptRight(rank, interval, scaled)
        super().__init__(params, lr, eps, direction=direction, **options)


class SubZero(ZOSGD):
    """:class:`ZOSGD` in a random subspace of each layer, kept for ``interval`` steps (:class:`Subspace`).

    ``near_square`` takes thin matrices (LoRA, prefixes) as near squares, as the authors do there.  Their code
    has rank 8 and interval 2000 by default, their README 24 and 1000.

    Args:
        rank: of the subspace, on both sides of a matrix.
        interval: steps for which a subspace is kept (None: for the whole run).
        near_square: whether thin matrices are taken as near squares.

    Source: Yu et al., 2024, arXiv 2410.08989.
    """

    spelled: ClassVar = {"refresh": "interval"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        rank: int = 8,
        interval: int | None = 2000,
        near_square: bool = False,
        **options: Unpack[SGDButDirection],
    ) -> None:
        super().__init__(params, lr, eps, direction=Subspace(rank, interval, near_square), **options)


class TeZO(_FactorSGD):
    """:class:`ZOSGD` along a sum of kept outer products with fresh weights (:class:`TemporalFactor`).

    ``scaled=False`` leaves out the factor 1 / sqrt(rank), as the paper does.  With ``scaled`` the same steps
    are those of sqrt(rank) times the eps and rank times the lr, for matrices.

    ``momentum``: TeZO-m, whose state of a matrix are rank numbers (:class:`FactorMomentum`).  TeZO-Adam, with
    twice as many, is ``ZerothOrder(..., estimator=TwoSided(1), rule=FactorAdam(),
    direction=TemporalFactor(rank, None, False))``; ``ZOAdam(..., direction=TemporalFactor(rank))`` has whole
    moments.

    Args:
        rank: outer products in the sum.
        scaled: elements of z have variance 1.

    Source: Sun et al., 2025, arXiv 2501.19057.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        rank: int = 16,
        scaled: bool = True,
        **options: Unpack[SGDButDirection],
    ) -> None:
        direction = TemporalFactor(rank, None, scaled)
        super().__init__(params, lr, eps, direction=direction, **options)


class EGGROLL(ZerothOrder):
    """theta <- theta - lr eps / sqrt(N) * sum_k (f(L_k+) - f(L_k-)) z_k,   z_k = A_k B_k^T / sqrt(rank).

    These are evolution strategies at large populations: L_k+- = L(theta +- eps z_k) are the losses of N = 2 q
    members, and f(L) = (L - mean) / sqrt(variance + 1e-5) over all of them.  The factors A and B are fresh
    in each direction (:class:`FreshFactors`).

    Args:
        rank: of the factors.
        directions: q, half the population, each member of which has a mirror image.
        shaping: f: "variance" as above, which is the authors' default; another of :class:`Population`; or
            None, which is no shaping but plain differences, g_k = (L_k+ - L_k-) / (2 eps q).  The authors'
            raw scores are those with lr times eps^2 sqrt(N).
        maximize: the closure returns rewards, of which more is better.
        baseline: the value at theta, one forward more, is subtracted in the place of the mean.  For pairs
            this changes nothing but the authors' spread, so it is for ``mirrored=False``.
        group: the mean is that of each group of so many members, which had a task of their own.
        mirrored: members in pairs, as above; False: q members theta + eps z_k.
        refresh: after how many steps the members' noise is drawn anew (the authors' ``noise_reuse``, whose
            default of 0 keeps the first step's noise for the whole run); default: in every step.
        signs: matrices are updated by sign(A_k) sign(B_k)^T / sqrt(rank) in the place of z_k (the authors'
            ``alteggroll``).

    Of the authors' code the sparse noise is not here.

    Source: Sarkar et al., 2025, arXiv 2511.16652.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        rank: int = 1,
        directions: int = 8,
        shaping: str | None = "variance",
        maximize: bool = False,
        baseline: bool = False,
        group: int | None = None,
        mirrored: bool = True,
        refresh: int | None = None,
        signs: bool = False,
        rule: Rule | None = None,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        estimator: Estimator = TwoSided(directions)
        if shaping is not None:
            estimator = ScaledPopulation(directions, shaping, mirrored, maximize, baseline, group)
        elif maximize:
            fail(self.op, "maximize", "False without shaping (let the closure return -reward)", True)
        elif baseline or group is not None or not mirrored:
            fail(self.op, "baseline, group, mirrored", "their defaults without shaping", (baseline, group))
        direction, rule = FreshFactors(rank, refresh, signs), SGD() if rule is None else rule
        super().__init__(params, lr, eps, estimator=estimator, direction=direction, rule=rule, **options)


class ES(ZerothOrder):
    """theta <- theta + lr / N * sum_n zscore(R_n) z_n: evolution strategies on rewards.

    R_n is what the closure returns at theta + eps z_n, for each of the N members of a population, and
    zscore(R) = (R - mean) / (std + 1e-8) over the population, with its own standard deviation (divided by
    N).  A step takes N forwards, whatever they are (generated answers and a program that scores them, for
    example), and one pass over the weights.  It returns the mean reward.

    Args:
        lr: the authors' alpha.  As in their code the update is not divided by eps.
        eps: the authors' sigma.
        population: N >= 2; with ``mirrored`` an even number, of which each half mirrors the other.
        shaping: "z-score", or another of :class:`Population`.
        mirrored: members in pairs theta + eps z and theta - eps z.
        maximize: the closure returns rewards.  With False it returns losses.
        baseline, group: what takes the place of the mean of all members (:class:`Population`).

    Source: ES at scale, Qiu et al., 2025, arXiv 2509.24372, whose code has these defaults.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-4,
        eps: float = 1e-3,
        *,
        population: int = 30,
        shaping: str = "z-score",
        mirrored: bool = False,
        maximize: bool = True,
        baseline: bool = False,
        group: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_integer(self.op, "population", population, 2)
        if mirrored and population % 2:
            fail(self.op, "population", "an even number with mirrored=True", population)
        directions = population // 2 if mirrored else population
        estimator = Population(directions, shaping, mirrored, maximize, baseline, group)
        super().__init__(params, lr, eps, estimator=estimator, rule=SGD(), **options)
