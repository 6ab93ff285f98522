"""Zeroth-order training of integer weights, which no float copy accompanies: QuZO and QES."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import fail
from ..step.directions.integers import IntegerSteps, RoundedSteps
from ..step.estimators import Population, TwoSided
from ..step.rules.feedback import ErrorFeedback
from ..step.rules.sgd import SGD
from .arguments import OptionsButDirection
from .optimizer import ZerothOrder


class QuZO(ZerothOrder):
    r"""q <- clamp(S'((1 - lr * weight_decay) * q - lr * sum_k g_k z_k)),   q integers of quantised weights.

        g_k = (L(clamp(S(q + eps z_k))) - L(clamp(S(q - eps z_k)))) / (2 eps n),   k = 0 .. n - 1

    S and S' round stochastically: floor(a + u), with u uniform in [0, 1) for each weight, so that E S(a) = a.
    Both sides of a direction have one z and one u.  S' has a u of its own, because the roundings of the
    update would else follow those that g was measured with.

    The integers are never written before the update, which is one pass.  The closure sees perturbed copies,
    as with any restore="exact".

    Args:
        params: ``zokernels.quantize.named_integers(model)``; or int8 tensors, with names or without.  Move
            the model to its device before: ``.to`` gives a module other buffers.
        lr: in quantisation steps per unit of g.
        eps: in quantisation steps.
        directions: n.
        bits: of groups that do not say: integers lie in [-2^(bits-1) + 1, 2^(bits-1) - 1], in 2 .. 8.
        rounding: of the update: "stochastic", or "nearest", which loses every change below half a step.
        weight_decay, seed, dist, clip, capturable: as :class:`ZerothOrder`.

    Source: Zhou et al., 2025, arXiv 2502.12346.  There both sides add the same rounded eps z.  Here each side
    is rounded by itself, which is as unbiased.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1.0,
        *,
        directions: int = 1,
        bits: int = 8,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        if options.get("restore", "exact") != "exact":
            fail(
                self.op,
                "restore",
                "'exact': integers that were rounded do not come back",
                repr(options["restore"]),
            )
        super().__init__(
            params,
            lr,
            eps,
            direction=IntegerSteps(bits),
            estimator=TwoSided(directions),
            rule=SGD(),
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        assert isinstance(self.direction, IntegerSteps)  # the constructor's
        super().add_param_group({"bits": self.direction.bits, **param_group})


class QES(ZerothOrder):
    r"""q <- q + round(u), u = decay e + lr / N sum_n zscore(R)_n d_n / eps, and e <- u - round(u).

    Evolution strategies on integers of quantised weights.  R_n is what the closure returns at q + d_n, and
    d_n = S(eps z_n) are whole quantisation steps, rounded stochastically.  What an update could not move is
    kept in e for the next one (:class:`ErrorFeedback`), so even an lr that moves no weight by a half adds up.
    The price is 4 bytes a weight for e.

    Args:
        params: as for :class:`QuZO`; integers of a byte each.
        lr: the authors' alpha times N, because their update has no division by N.
        eps: their sigma, in quantisation steps.
        population: N >= 2.
        error_decay, spread: as for :class:`ErrorFeedback`.
        maximize: the closure returns rewards.  With False it returns losses.
        clip: bound on each zscore(R)_n / N.

    Integers lie in [-2^(bits-1) + 1, 2^(bits-1) - 1] here; the code has one more.

    Source: QES, 2026, arXiv 2602.03120, and its code with whole residuals.  Not here: its form that draws
    the updates of a window again instead of storing e, mirrored members, and packed integers.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 0.01,
        *,
        population: int = 30,
        error_decay: float = 0.9,
        spread: bool = True,
        maximize: bool = True,
        bits: int = 8,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        if options.get("restore", "exact") != "exact":
            got = repr(options["restore"])
            fail(self.op, "restore", "'exact': integers that were clamped do not come back", got)
        parts: dict[str, Any] = {"estimator": Population(population, maximize=maximize)}
        parts |= {"direction": RoundedSteps(bits), "rule": ErrorFeedback(error_decay, spread)}
        super().__init__(params, lr, eps, **parts, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        assert isinstance(self.direction, RoundedSteps)  # the constructor's
        super().add_param_group({"bits": self.direction.bits, **param_group})
