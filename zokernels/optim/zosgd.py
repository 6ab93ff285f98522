"""ZOSGD: stochastic gradient descent on forwards alone (SPSA), without gradients, activations or stored noise."""

from __future__ import annotations

from torch import Tensor

from .estimators import OneSided, TwoSided
from .groups import check_choice
from .optimizer import ZerothOrder
from .rules import SGD

ESTIMATORS = {"two-sided": TwoSided, "one-sided": OneSided}


class ZOSGD(ZerothOrder):
    r"""theta <- (1 - lr * weight_decay) * theta - lr * sum_k g_k z_k,   k = 0 .. q - 1.

    g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps q) with 2 q forwards ("two-sided"), or
    (L(theta + eps z_k) - L(theta)) / (eps q) with q + 1 ("one-sided"); then one fused pass over the weights.  In place,
    the forwards of q = 1 move the weights by +eps z and -2 eps z, and :meth:`two_pass` saves one of the three passes.

    Args:
        directions: q.
        estimator: "two-sided" or "one-sided".
        params, lr, ...: as for :class:`ZerothOrder`.

    Example::

        opt = ZOSGD(model.named_parameters(), lr=1e-6, seed=0)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Sources: SPSA, Spall 1992; MeZO, Malladi et al. 2023 (arXiv 2305.17333).  See docs/optimizer.md.
    """

    def __init__(
        self, params, lr: float | Tensor, *args, directions: int = 1, estimator: str = "two-sided", **options
    ) -> None:
        check_choice(self._op, "estimator", estimator, tuple(ESTIMATORS))
        super().__init__(params, lr, *args, estimator=ESTIMATORS[estimator](directions), rule=SGD(), **options)
