"""QuZO: zeroth-order training of integer weights, which no float copy accompanies."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..checks import fail
from ..step.directions.integers import IntegerSteps
from ..step.estimators import TwoSided
from ..step.rules.sgd import SGD
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
        **options: Any,
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
