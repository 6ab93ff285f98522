"""Named optimizers with other rules than SGD.

Arguments that are not listed here are those of :class:`ZOSGD`, without its momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_choice, fail
from ..step.directions.scaling import CurvedDirection
from ..step.estimators import SignOfDifference, ThreePoint
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD
from ..step.rules.stateful import Adam, AMSGrad, Curvature, Sign
from ..step.rules.window import AdamWindow
from ..step.watch import tell
from .arguments import Options, OptionsButDirection, Sides
from .optimizer import ZerothOrder
from .zosgd import Differences


class ZOAdam(Differences):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  theta <- theta - lr m' / (sqrt(v') + adam_eps)

    with g = sum_k g_k z_k + weight_decay theta (coupled), m' = m / (1 - b1^t) and v' = v / (1 - b2^t), in one
    pass that never stores g.  For each group, t counts the steps that were not skipped.

    Args:
        betas: (b1, b2), each in [0, 1).
        adam_eps: in units of g; ``eps`` is the size of the perturbation.
        window: Adam without state: m and v of the last ``window`` steps alone, whose noise is drawn again in
            each update (:class:`AdamWindow`).  It allows no subset and no refreshed direction, and
            weight_decay only in :class:`ZOAdamW`.
        state_dtype: of m and v (``state[p]["exp_avg"]``, ``["exp_avg_sq"]``): fp32 or bf16, which is rounded
            as ``rounding`` says; to nearest, a bf16 v stands still where 1 - b2 is below its precision.
        amsgrad: the largest v so far takes the place of v (``state[p]["max_exp_avg_sq"]``), as in the paper
            below and in torch.optim.Adam; no window then.  (The paper has no bias corrections.)
        directions: q.
        estimator: "two-sided" or "one-sided".

    betas, adam_eps and weight_decay may differ between groups.

    Source: Kingma and Ba, 2015; on differences of losses, Chen et al., 2019 (ZO-AdaMM, arXiv 1910.06513).
    """

    _decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        estimator: Sides = "two-sided",
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        window: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        rule: Rule
        if window is None:
            kind = AMSGrad if amsgrad else Adam
            rule = kind(betas, adam_eps, self._decoupled, state_dtype)
        else:
            if amsgrad:
                fail(self.op, "amsgrad", "False with a window, which keeps no largest v", True)
            rule = AdamWindow(window, betas, adam_eps, self._decoupled)
        super().__init__(params, lr, eps, directions=directions, estimator=estimator, rule=rule, **options)

    def _warn_of_eps(self) -> None:
        eps = self.defaults["eps"]
        if eps > 1e-6:
            return super()._warn_of_eps()
        tell(
            self.op,
            self.warned,
            "eps",
            f"eps={eps:g} is the size of the perturbation, in units of the weights: far too small for "
            "losses to differ (1e-3 by default). The eps of torch's Adam is adam_eps here",
        )


class ZOAdamW(ZOAdam):
    """theta <- (1 - lr weight_decay) theta - lr m' / (sqrt(v') + adam_eps).

    This is :class:`ZOAdam` with decoupled weight decay.

    Source: Loshchilov and Hutter, 2019, arXiv 1711.05101.
    """

    _decoupled = True


class ZOSignSGD(Differences):
    """theta <- (1 - lr weight_decay) theta - lr sign(sum_k g_k z_k + l2 theta).

    The sign is that of the whole sum, so every weight moves by lr.

    Args:
        l2: coupled weight decay, inside the sign.
        of: "sum" as above; "difference": theta <- (1 - lr weight_decay) theta - lr / q sum_k sign(g_k) z_k,
            which has no l2 (:class:`SignOfDifference`).  ``zo_sign_opt`` of ZO-Bench (arXiv 2402.11592) is
            that.
        directions: q.
        estimator: "two-sided" or "one-sided".

    Source: ZO-signSGD, Liu et al., 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        estimator: Sides = "two-sided",
        l2: float = 0.0,
        of: str = "sum",
        **options: Unpack[Options],
    ) -> None:
        check_choice(self.op, "of", of, ("sum", "difference"))
        if of == "sum":
            super().__init__(
                params, lr, eps, directions=directions, estimator=estimator, rule=Sign(l2), **options
            )
            return
        if l2:
            fail(self.op, "l2", "0 with of='difference' (weight_decay is the same there)", l2)
        if estimator != "two-sided":
            fail(self.op, "estimator", "'two-sided' with of='difference'", repr(estimator))
        signs = SignOfDifference(directions)
        super(Differences, self).__init__(params, lr, eps, estimator=signs, rule=SGD(), **options)


class HiZOO(ZerothOrder):
    """Perturbs and updates by z over the root of an estimate h of the Hessian's diagonal: three forwards.

        L0 = L(theta),  L+- = L(theta +- eps z / sqrt(h)),   g = (L+ - L-) / (2 eps)
        h     <- (1 - alpha) h + alpha |L+ + L- - 2 L0| / (2 eps^2) h z^2
        theta <- (1 - lr weight_decay) theta - lr g z / sqrt(h)

    h starts at 1, and the update divides by the new one.  ``step`` returns L0, and ``last_losses`` are L0,
    L+, L-.

    Args:
        alpha: in [0, 1).  1e-6 is the paper's; the authors' scripts run with schedules of it that begin at 0,
            which set ``param_groups[0]["alpha"]`` between steps here.
        state_dtype: of h (``state[p]["curvature"]``): fp32 or bf16, which is rounded as ``rounding`` says; to
            nearest, a bf16 h stands still where alpha is below its precision.

    It takes no ``direction``.  alpha may differ between groups.

    Source: Zhao et al., 2024, arXiv 2402.15173.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        alpha: float = 1e-6,
        state_dtype: torch.dtype = torch.float32,
        **options: Unpack[OptionsButDirection],
    ) -> None:
        rule = Curvature(alpha, state_dtype)
        super().__init__(
            params, lr, eps, estimator=ThreePoint(), direction=CurvedDirection(), rule=rule, **options
        )
