"""ZOSGD: stochastic gradient descent on forwards alone (SPSA), without gradients or stored noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_choice, fail
from ..step.estimators import OneSided, TwoSided
from ..step.rules.rule import Rule
from ..step.rules.sgd import SGD
from ..step.rules.stateful import Momentum
from ..step.rules.window import MomentumWindow
from .arguments import Options, Sides
from .optimizer import ZerothOrder

ESTIMATORS = {"two-sided": TwoSided, "one-sided": OneSided}


class Differences(ZerothOrder):
    """Any ``rule`` on differences of losses; ``directions`` and ``estimator`` as for :class:`ZOSGD`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        estimator: Sides = "two-sided",
        rule: Rule,
        **options: Unpack[Options],
    ) -> None:
        check_choice(self.op, "estimator", estimator, tuple(ESTIMATORS))
        made = ESTIMATORS[estimator](directions)
        super().__init__(params, lr, eps, estimator=made, rule=rule, **options)


class ZOSGD(Differences):
    """theta <- (1 - lr * weight_decay) * theta - lr * sum_k g_k z_k,   k = 0 .. q - 1.

    g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps q) with 2 q forwards ("two-sided"), or (L(theta +
    eps z_k) - L(theta)) / (eps q) with q + 1 ("one-sided").  Then comes one fused pass over the weights.  In
    place, the forwards of q = 1 move the weights by +eps z and -2 eps z, and :meth:`two_pass` saves one of
    the three passes.

    With ``momentum``, G = sum_k g_k z_k and

        m <- momentum m + (1 - dampening) (G + l2 theta);   theta <- (1 - lr weight_decay) theta - lr m

    in one pass that never stores G.  m starts at 0.  (The first step of torch.optim.SGD differs: it has no
    dampening.)  Without momentum there is no l2, because a gradient of l2 theta is then the same as
    weight_decay = l2.

    Args:
        directions: q.
        estimator: "two-sided" or "one-sided".
        momentum, dampening: in [0, 1).
        l2: coupled weight decay, which enters m; weight_decay is decoupled.
        window: momentum without state: m of the last ``window`` steps alone, whose noise is drawn again in
            each update (:class:`MomentumWindow`).  It allows no l2, no subset and no refreshed direction.
        state_dtype: of m (``state[p]["momentum_buffer"]``): fp32 or bf16, which is rounded as ``rounding``
            says.

    momentum, dampening and l2 may differ between groups.

    Example::

        opt = ZOSGD(model.named_parameters(), lr=1e-6, seed=0)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Sources: SPSA, Spall 1992; MeZO, Malladi et al. 2023 (arXiv 2305.17333).  See docs/optimizer.md.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        directions: int = 1,
        estimator: Sides = "two-sided",
        momentum: float = 0.0,
        dampening: float = 0.0,
        l2: float = 0.0,
        window: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        **options: Unpack[Options],
    ) -> None:
        if (window is not None or not momentum) and l2:
            fail(self.op, "l2", "0 without momentum (weight_decay is the same there) and with a window", l2)
        if not momentum and (dampening or window is not None):
            fail(self.op, "dampening, window", "momentum > 0 with either", (dampening, window))
        rule: Rule
        if window is not None:
            rule = MomentumWindow(window, momentum, dampening)
        else:
            rule = Momentum(momentum, dampening, l2, state_dtype) if momentum else SGD()
        super().__init__(params, lr, eps, directions=directions, estimator=estimator, rule=rule, **options)
