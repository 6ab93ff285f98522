"""Named optimizers whose directions follow what the run has measured.

Arguments that are not listed here are those of :class:`ZerothOrder`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..step.directions.summed import Cone
from ..step.rules.cone import ConeMomentum
from .zosgd import Differences


class ConMeZO(Differences):
    r"""theta <- theta - lr g z;   m <- momentum m + (1 - momentum) g z,   z in a cone around m.

        z = sqrt(d) cos(angle) m / \|m\| + sin(angle) u,   u dense noise, d the number of weights
        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)

    A step costs as many forwards as MeZO's, and 4 bytes a weight for m (:class:`ConeMomentum`).

    Args:
        momentum: in [0, 1); 0.99 in the authors' scripts, whose trainer holds it at 0.1 for 200 steps and
            then raises it for 1,800.  Here ``param_groups[0]["momentum"]`` may be set between steps, where no
            log is written.
        angle: in radians, in (0, pi / 2]; pi / 2 is MeZO.
        directions, estimator: as for :class:`ZOSGD`; of several directions each has an u of its own.

    m begins at 0, so the first z is u, as in the authors' synthetic experiments.  Their trainer begins with
    random noise in the place of m.

    Source: Behric, Zhang, Li and Thekumparampil, 2025, arXiv 2511.02757, and its code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        momentum: float = 0.99,
        angle: float = 1.35,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, eps, rule=ConeMomentum(momentum, angle), direction=Cone(), **options)
