"""QuZO: zeroth-order training of integer weights, which no float copy accompanies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..checks import fail
from ..functional import derive_seed, requantize, requantize_
from ..quantize import limit_of
from .direction import Dense, Direction
from .estimators import TwoSided
from .optimizer import ZerothOrder
from .rules import SGD

if TYPE_CHECKING:
    from .groups import Bucket


class _Steps(Dense):
    """theta is int8: coefficients are in quantisation steps, and results are integers in [-limit, limit]."""

    def __init__(self, limit: int) -> None:
        self._range: dict[str, Any] = {"low": -limit, "high": limit}

    def perturb(
        self,
        bucket: Bucket,
        out: Sequence[Tensor],
        params: Sequence[Tensor],
        streams: Sequence[int],
        seeds: Tensor,
        coeffs: Tensor,
        decay: float | None = None,
        theta: Sequence[Tensor] | None = None,
    ) -> None:
        """Rounded stochastically, with bits that are those of no update: their seed is derived from the direction's."""
        noise = self.noise(bucket, params, streams, seeds, coeffs)
        requantize(out, params, **noise, **self._range, decay=decay, rounding_seed=derive_seed(seeds[:1], 0))

    def update(self, bucket: Bucket, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        noise = self.noise(bucket, bucket.params, bucket.streams, seeds, coeffs)
        requantize_(bucket.params, **noise, **self._range, **rounding)


@dataclass(frozen=True)
class Steps(Direction):
    """z in quantisation steps of int8 weights; ``bits``: of groups that do not say."""

    bits: int = 8

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        for bucket in buckets:
            bucket.direction = _Steps(limit_of(bucket.group["bits"]))


class QuZO(ZerothOrder):
    r"""q <- clamp(S'((1 - lr * weight_decay) * q - lr * sum_k g_k z_k)),   q the integers of quantised weights.

        g_k = (L(clamp(S(q + eps z_k))) - L(clamp(S(q - eps z_k)))) / (2 eps n),   k = 0 .. n - 1

    S and S' round stochastically: floor(a + u), u uniform in [0, 1) for each weight, so that E S(a) = a.  Both sides
    of a direction have one z and one u.  S' has a u of its own: else the roundings of the update would follow those
    that g was measured with.  The integers are never written before the update, which is one pass: the closure sees
    perturbed copies, as with any restore="exact".

    Args:
        params: ``zokernels.quantize.named_integers(model)``; or int8 tensors, with names or without.  Move the model
            to its device before: ``.to`` gives a module other buffers.
        lr: in quantisation steps per unit of g.
        eps: in quantisation steps.
        directions: n.
        bits: of groups that do not say: integers lie in [-2^(bits-1) + 1, 2^(bits-1) - 1], in 2 .. 8.
        rounding: of the update: "stochastic", or "nearest", which loses every change below half a step.
        weight_decay, seed, dist, clip, capturable: as :class:`ZerothOrder`.

    Source: Zhou et al., 2025, arXiv 2502.12346.  There both sides add the same rounded eps z; here each side is rounded
    by itself, as unbiased.
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
            fail(self._op, "restore", "'exact': integers that were rounded do not come back", repr(options["restore"]))
        super().__init__(params, lr, eps, direction=Steps(bits), estimator=TwoSided(directions), rule=SGD(), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        assert isinstance(self.direction, Steps)  # the constructor's
        super().add_param_group({"bits": self.direction.bits, **param_group})
