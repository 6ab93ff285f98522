"""Estimators that weigh or search candidates, where the others measure slopes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer, check_number, fail
from .estimators import Estimator, Ranking


@dataclass(frozen=True)
class Consensus(Estimator):
    """Consensus hopping: the weights go to the mean of q candidates, weighted by exp(-alpha L).

        w = softmax_k(-alpha L(theta + eps z_k)),   g_k = -eps w_k

    A step of plain SGD with lr = 1 leads to sum_k w_k (theta + eps z_k), the consensus point; a smaller lr
    leads a part of the way there.  The larger alpha, the more the lowest losses count: at 0 all candidates
    weigh the same, and towards infinity the best one is alone.  alpha is in units of 1 / loss, and eps is the
    width of the search, the authors' sigma.

    A loss that is not finite skips the step.

    Source: "Gradient is All You Need?" (Riedl, Klock, Geldhauser and Fornasier, 2023, arXiv 2306.09778).
    """

    directions: int = 8
    alpha: float = 10.0

    def __post_init__(self) -> None:
        check_integer("Consensus", "directions", self.directions, 2)
        check_number("Consensus", "alpha", self.alpha)

    def points(self) -> list[tuple[int, int]]:
        return [(k, 1) for k in range(self.directions)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        weights = torch.softmax(-self.alpha * losses.double(), 0)
        return torch.where(losses.isfinite().all(), -eps * weights, torch.full_like(weights, float("nan")))


@dataclass(frozen=True)
class RankingRounds(Ranking):
    """:class:`Ranking` in up to ``rounds`` rounds of ``candidates`` each, with a line search after each.

    Round r has the directions z_k, k = r m .. (r + 1) m - 1 with m = ``candidates``; so ``directions`` is
    ``rounds`` m.  The points of the line search depend on the losses before them:
    :class:`~zokernels.optim.ZORankSearch` runs it.
    """

    directions: int = 8
    top: int | None = None
    candidates: int = 8
    rounds: int = 1

    def __post_init__(self) -> None:
        check_integer("RankingRounds", "candidates", self.candidates, 2)
        check_integer("RankingRounds", "rounds", self.rounds, 1)
        if self.directions != self.candidates * self.rounds:
            expected = f"candidates * rounds = {self.candidates * self.rounds}"
            fail("RankingRounds", "directions", expected, self.directions)
        if self.top is not None:
            check_integer("RankingRounds", "top", self.top, 1, self.candidates)

    def points(self) -> list[tuple[int, int]]:
        """The candidates of the first round."""
        return [(k, 1) for k in range(self.candidates)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        """g of one round (float64 [m]) from the losses of its candidates."""
        return Ranking(self.candidates, self.top).coefficients(losses, eps)
