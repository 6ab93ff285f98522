"""Evolution strategies as named optimizers.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_integer, fail
from ..step.directions.low_rank import FreshFactors
from ..step.estimators import (
    Estimator,
    Population,
    ScaledPopulation,
    TwoSided,
)
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD
from .arguments import (
    Options,
    OptionsButDirection,
)
from .optimizer import ZerothOrder


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
