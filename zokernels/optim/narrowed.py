"""Named optimizers that perturb less than all weights: small ones, some layers, or matrices of low rank.

Arguments that are not listed here are those of :class:`ZOSGD`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import fail
from ..step.directions.direction import Direction
from ..step.directions.low_rank import KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import MagnitudeMask
from ..step.rules.factors import FactorMomentum
from ..step.subset import LAYERS, Blocks, LayerSkip
from .arguments import (
    SGDButDirection,
    SGDButSubset,
)
from .zosgd import ZOSGD


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
