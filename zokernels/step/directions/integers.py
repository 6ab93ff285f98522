"""The direction of integer weights: noise in quantisation steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...functional import derive_seed, requantize, requantize_
from ...quantize import limit_of
from ..noise import Members, Noise
from ..roles import OptimizerView
from ..types import Bucket, Seeds
from .direction import Direction


class _IntegerNoise(Noise):
    """theta is int8: coefficients are in quantisation steps, and results are integers in [-limit, limit]."""

    def __init__(self, limit: int) -> None:
        self._range: dict[str, Any] = {"low": -limit, "high": limit}

    def perturb(
        self,
        out: Sequence[Tensor],
        members: Members,
        seeds: Tensor,
        coeffs: Tensor,
        decay: float | None = None,
        theta: Sequence[Tensor] | None = None,
    ) -> None:
        """Rounded stochastically, with bits that are those of no update: their seed is derived from the direction's."""
        args = self.kernel_args(members, seeds, coeffs) | self._range
        requantize(out, members.params, **args, decay=decay, rounding_seed=derive_seed(seeds[:1], 0))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        args = self.kernel_args(members, seeds, coeffs) | self._range
        requantize_(members.params, **args, **rounding)


@dataclass(frozen=True)
class IntegerSteps(Direction):
    """z in quantisation steps of int8 weights; ``bits``: of groups that do not say."""

    bits: int = 8
    #: The name that logs have for it.
    log_name = "Steps"

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            bucket.noise = _IntegerNoise(limit_of(bucket.group["bits"]))
