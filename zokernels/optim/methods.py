"""Named optimizers that are parts put together.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..checks import fail
from ..step.directions.low_rank import FreshFactors, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import MagnitudeMask
from ..step.estimators import ForwardMode, Ranking, StdNormalized, TwoSided
from ..step.loss import DerivativeReader, RankReader
from ..step.probes.exact import TangentProbe
from ..step.rules.sgd import SGD, Conservative
from ..step.shard import any_sharded
from ..step.subset import LAYERS, Blocks, LayerSkip
from ..step.types import Bucket, Seeds
from .optimizer import ZerothOrder
from .zosgd import ZOSGD


class FZOO(ZerothOrder):
    """theta <- theta - lr * sum_k (L_k - L_0) / (q sigma) * z_k,   k = 0 .. q - 1.

    L_k = L(theta + eps z_k), L_0 = L(theta), and sigma is the sample standard deviation of the L_k.  A step
    takes q + 1 forwards along Rademacher directions, and is normalized by the losses' own spread.  ``step``
    returns L_0.

    Args:
        directions: q >= 2.
        std_eps: in units of the loss.  Where sigma <= std_eps, g is 0 instead of a division by next to
            nothing.

    Source: Dang et al., 2025, arXiv 2506.09034.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 8,
        std_eps: float = 1e-8,
        dist: str = "rademacher",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, eps, dist=dist, estimator=StdNormalized(directions, std_eps), rule=SGD(), **options
        )


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

    Source: ZO-RankSGD, Tang, Rybin and Chang, 2023, arXiv 2303.03751; without its line search.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 8,
        top: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, eps, estimator=Ranking(candidates, top), rule=SGD(), **options)

    def step(
        self, closure: Callable[[], Any] | None = None, rank: Callable[[list[Any]], Iterable[int]] | None = None
    ) -> Any:
        """One step, as :meth:`ZerothOrder.step`.

        Without ``rank`` the closure returns losses, and the step returns the lowest.

        With ``rank`` the closure may return anything, one result for each candidate.  ``rank`` gets the list
        of results and returns indices into it, best first, at least ``top`` of them.  The step returns the
        best result, and ``last_losses`` are places, 0 for the best.  ``rank`` runs on the host, so it does
        not go with ``capturable``.
        """
        if rank is None:
            return super().step(closure)
        if self.run_state.capturable:
            fail(self.op, "rank", "capturable=False: a CUDA graph calls no host function", "capturable=True")
        if not self.team.alone:
            fail(self.op, "rank", "losses with a mesh: one list of all results is on no rank", "a function")
        assert isinstance(self.estimator, Ranking)  # the constructor's
        results = RankReader(rank, self.estimator.top or self.estimator.directions)
        self.run_step(closure, results)
        return results.best


class ZOConservative(ZerothOrder):
    """:class:`ZOSGD` that keeps the best of theta, theta - lr g z and theta + lr g z.

    It runs the closure at each of them.  With q = 1 it takes 5 forwards and one update, and the choice is
    made on the device.  A trial sees the update rounded to nearest and without weight decay, which is applied
    whichever is kept.

    ``last_projected_gradient`` is the g that was applied: g, 0 or -g.  ``last_losses`` are l+, l-, and the
    three trials.

    Args:
        directions: q.

    Source: ZO-SGD-Cons of Zhang et al., 2024, arXiv 2402.11592.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor, eps: float = 1e-3, *, directions: int = 1, **options: Any
    ) -> None:
        super().__init__(params, lr, eps, estimator=TwoSided(directions), rule=Conservative(), **options)


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
        restore: "exact" only; eps is not used.

    ``last_losses``: for each direction a tensor [2], the loss and its derivative along z_k.

    Source: Baydin et al., 2022, arXiv 2202.08587.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor, *, directions: int = 1, restore: str = "exact", **options: Any
    ) -> None:
        if restore != "exact":
            fail(self.op, "restore", "'exact': the weights are never perturbed", repr(restore))
        super().__init__(params, lr, estimator=ForwardMode(directions), rule=SGD(), **options)

    # Narrower than its base: a number has no derivative.
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step, as :meth:`ZerothOrder.step`; the closure returns a tensor.

        Returns the mean loss, at theta.
        """
        return self.run_step(closure, DerivativeReader())

    def own_probe(self, buckets: list[Bucket], seeds: Seeds) -> TangentProbe:
        if any_sharded(p for b in buckets for p in b.params):
            fail(self.op, "params", "plain tensors: a tangent is handed to each function", "a DTensor", TypeError)
        return TangentProbe(self.op, buckets, seeds, self.scratch, self.blocks, self.warned)


class SparseMeZO(ZOSGD):
    """:class:`ZOSGD` on the ``density`` smallest weights of each tensor; the others never move.

    It needs one bit a weight of extra memory (:class:`MagnitudeMask`).

    Source: Liu et al., 2024, arXiv 2402.15751 (density = 1 - its sparsity).
    """

    def __init__(
        self, params: ParamsT, *args: Any, density: float = 0.25, refresh: int | None = None, **options: Any
    ) -> None:
        super().__init__(params, *args, direction=MagnitudeMask(density, refresh), **options)


class LeZO(ZOSGD):
    """:class:`ZOSGD` that leaves out a random share of the layers in each step (:class:`LayerSkip`).

    Source: Wang et al., 2024, arXiv 2410.09823.
    """

    def __init__(
        self, params: ParamsT, *args: Any, skipped: float = 0.75, layers: str = LAYERS, **options: Any
    ) -> None:
        super().__init__(params, *args, subset=LayerSkip(layers, skipped), **options)


class ZOBCD(ZOSGD):
    """:class:`ZOSGD` of ``size`` layers at a time, for ``period`` steps (:class:`Blocks`).

    Source: ZO-LLM, Zhang et al., 2024, arXiv 2402.11592.
    """

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        size: int = 1,
        period: int = 1,
        order: str = "cyclic",
        layers: str = LAYERS,
        **options: Any,
    ) -> None:
        super().__init__(params, *args, subset=Blocks(layers, size, period, order), **options)


class LOZO(ZOSGD):
    """:class:`ZOSGD` along U V^T / sqrt(rank), V kept for ``interval`` steps (:class:`KeptRight`).

    The paper perturbs by its eps times U V^T and updates by U V^T / r, which is this class with eps times
    sqrt(r).

    Source: Chen et al., 2024, arXiv 2410.07698.
    """

    def __init__(self, params: ParamsT, *args: Any, rank: int = 4, interval: int | None = 50, **options: Any) -> None:
        super().__init__(params, *args, direction=KeptRight(rank, interval), **options)


class SubZero(ZOSGD):
    """:class:`ZOSGD` in a random subspace of each layer, kept for ``interval`` steps (:class:`Subspace`).

    Source: Yu et al., 2024, arXiv 2410.08989.
    """

    def __init__(self, params: ParamsT, *args: Any, rank: int = 16, interval: int | None = 500, **options: Any) -> None:
        super().__init__(params, *args, direction=Subspace(rank, interval), **options)


class TeZO(ZOSGD):
    """:class:`ZOSGD` along a sum of kept outer products with fresh weights (:class:`TemporalFactor`).

    Source: Sun et al., 2025, arXiv 2501.19057.
    """

    def __init__(self, params: ParamsT, *args: Any, rank: int = 16, **options: Any) -> None:
        super().__init__(params, *args, direction=TemporalFactor(rank), **options)


class EGGROLL(ZOSGD):
    """:class:`ZOSGD` along A B^T / sqrt(rank), fresh in each direction (:class:`FreshFactors`).

    These are evolution strategies at large populations.  ``directions`` is half the population, each member
    of which has a mirror image.

    Source: Sarkar et al., 2025, arXiv 2511.16652.
    """

    def __init__(self, params: ParamsT, *args: Any, rank: int = 1, directions: int = 8, **options: Any) -> None:
        super().__init__(params, *args, directions=directions, direction=FreshFactors(rank), **options)
