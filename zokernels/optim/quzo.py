"""Zeroth-order training of integer weights, which no float copy accompanies: QuZO and QES."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import fail, is_integer
from ..step.directions.integers import IntegerSteps, RoundedSteps
from ..step.estimators import Population, TwoSided
from ..step.rules.feedback import ErrorFeedback, ErrorWindow
from ..step.rules.sgd import SGD
from .arguments import OptionsButDirection
from .optimizer import ZerothOrder


class QuZO(ZerothOrder):
    """q <- clamp(S'((1 - lr * weight_decay) * q - lr * sum_k g_k z_k)),   q integers of quantised weights.

        g_k = (L(clamp(S(q + eps z_k))) - L(clamp(S(q - eps z_k)))) / (2 eps n),   k = 0 .. n - 1

    S and S' round stochastically: floor(a + u), with u uniform in [0, 1) for each weight, so that E S(a) = a.
    Both sides of a direction have one z and one u.  S' has a u of its own, because the roundings of the
    update would else follow those that g was measured with.

    The integers are never written before the update, which is one pass.  The closure sees perturbed copies,
    as with any restore="exact".

    Args:
        params: ``zokernels.quantize.named_integers(model)``; or int8 tensors, with names or without.  Move
            the model to its device before: ``.to`` gives a module other buffers.  uint8 tensors are packed
            integers of 4 bits (:func:`~zokernels.quantize.pack_int4`).
        lr: in quantisation steps per unit of g.
        eps: in quantisation steps.
        directions: n.
        bits: of groups that do not say: integers lie in [-2^(bits-1) + 1, 2^(bits-1) - 1], in 2 .. 8.
        rounding: of the update: "stochastic", or "nearest", which loses every change below half a step.
        quantized_noise: as in the authors' code, eps z_k is rounded once, to d_k = S(eps z_k): both sides
            are clamp(q +- d_k), and the update subtracts lr g_k d_k / eps.  By default each side is rounded
            by itself, and the update takes z_k as it is, which is as unbiased and has less variance.
        weight_decay, seed, dist, clip, capturable: as :class:`ZerothOrder`.

    The authors also fit one scale to each tensor in each step.  Here the scales stay as they are.

    Source: Zhou et al., 2025, arXiv 2502.12346.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1.0,
        *,
        directions: int = 1,
        bits: int = 8,
        quantized_noise: bool = False,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        if options.get("restore", "exact") != "exact":
            fail(
                self.op,
                "restore",
                "'exact': integers that were rounded do not come back",
                repr(options["restore"]),
            )
        direction = RoundedSteps(bits, clamped=True) if quantized_noise else IntegerSteps(bits)
        super().__init__(
            params,
            lr,
            eps,
            direction=direction,
            estimator=TwoSided(directions),
            rule=SGD(),
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        assert isinstance(self.direction, IntegerSteps)  # the constructor's
        super().add_param_group({"bits": self.direction.bits, **param_group})


class QES(ZerothOrder):
    """q <- q + round(u), u = decay e + lr / N sum_n zscore(R)_n d_n / eps, and e <- u - round(u).

    Evolution strategies on integers of quantised weights.  R_n is what the closure returns at q + d_n, and
    d_n = S(eps z_n) are whole quantisation steps, rounded stochastically.  What an update could not move is
    kept in e for the next one (:class:`ErrorFeedback`), so even an lr that moves no weight by a half adds up.
    The price is 4 bytes a weight for e.

    Args:
        params: as for :class:`QuZO`.
        lr: the authors' alpha times N, because their update has no division by N.
        eps: their sigma, in quantisation steps.
        population: N >= 2; with ``mirrored`` an even number.
        mirrored: members in pairs q + d_n and q - d_n.
        error_decay, spread: as for :class:`ErrorFeedback`.
        window: e is not kept, but what the last so many updates, this one included, would have left
            (:class:`ErrorWindow`): no memory, and window times the noise in each update.  ``spread`` says
            nothing then.
        maximize: the closure returns rewards.  With False it returns losses.
        clip: bound on each zscore(R)_n / N.
        bits: of the integers, 2 to 8.

    Integers lie in [-2^(bits-1) + 1, 2^(bits-1) - 1] here; the code has one more.

    Source: QES, 2026, arXiv 2602.03120, and its code.
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
        window: int | None = None,
        mirrored: bool = False,
        maximize: bool = True,
        bits: int = 8,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        if options.get("restore", "exact") != "exact":
            got = repr(options["restore"])
            fail(self.op, "restore", "'exact': integers that were clamped do not come back", got)
        if mirrored and (not is_integer(population, 2) or population % 2):
            fail(self.op, "population", "an even number >= 2 with mirrored", repr(population))
        count = population // 2 if mirrored else population
        rule = ErrorFeedback(error_decay, spread) if window is None else ErrorWindow(window, error_decay)
        estimator = Population(count, mirrored=mirrored, maximize=maximize)
        parts: dict[str, Any] = {"estimator": estimator, "direction": RoundedSteps(bits), "rule": rule}
        super().__init__(params, lr, eps, **parts, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        assert isinstance(self.direction, RoundedSteps)  # the constructor's
        super().add_param_group({"bits": self.direction.bits, **param_group})
