"""Gradient estimators: where the closure runs, and how its losses become one coefficient for each direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..checks import fail


@dataclass(frozen=True)
class Estimator:
    """The gradient estimate is sum_k g_k z_k over the directions k = 0 .. q - 1.

    z_k is the noise of seed ``derive_seed(run_seed, step, k)``.  All losses come first and then one update, so that
    every loss of a step is one at theta, perturbed.
    """

    #: q, the number of directions in a step.
    directions: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.directions, int) or isinstance(self.directions, bool) or self.directions < 1:
            fail(type(self).__name__, "directions", "an integer >= 1", repr(self.directions))

    def points(self) -> list[tuple[int, int]]:
        """(k, sign) of each forward, in order: at theta + sign * eps * z_k; sign 0 is theta itself."""
        raise NotImplementedError

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        """g (float64 [q]) from the losses (float64 [n], in the order of :meth:`points`), on their device."""
        raise NotImplementedError

    def loss(self, losses: Tensor) -> Tensor:
        """What a step returns."""
        return losses.mean()


@dataclass(frozen=True)
class TwoSided(Estimator):
    """g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps q): central differences, 2 q forwards.

    SPSA (Spall, 1992); n-SPSA of MeZO (Malladi et al., 2023, arXiv 2305.17333).
    """

    def points(self) -> list[tuple[int, int]]:
        return [(k, sign) for k in range(self.directions) for sign in (1, -1)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        plus, minus = losses.view(-1, 2).unbind(1)
        return (plus - minus) / (2 * eps * self.directions)
