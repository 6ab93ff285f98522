"""The direction of integer weights: noise in quantisation steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...functional import derive_seed, requantize, requantize_
from ...quantize import limit_of
from ..noise import Members, Noise, Tensors
from ..roles import OptimizerView
from ..types import Bucket, Seeds
from .direction import Direction


class _IntegerNoise(Noise):
    """theta is int8: coefficients are in quantisation steps, and results are integers in [-limit, limit]."""

    def __init__(self, limit: int) -> None:
        self.bounds = -limit, limit
        self._range: dict[str, Any] = {"low": -limit, "high": limit}

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        """Rounded stochastically, because a small perturbation would else be lost.

        The rounding seed is derived from the direction's, so that no update draws the same bits.
        """
        args = self.kernel_args(members, seeds, coeffs) | members.places | self._range
        theta = options.pop("theta", members.params)
        requantize(out, theta, **args, **options, rounding_seed=derive_seed(seeds[:1], 0))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        args = self.kernel_args(members, seeds, coeffs) | members.places | self._range
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
