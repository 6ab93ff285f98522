"""The direction of integer weights: noise in quantisation steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
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


class RoundedNoise(_IntegerNoise):
    """z_k rounded to integers d_k: both sides of a direction and the update have the same d_k.

    d_k = S(eps z_k) with stochastic rounding S, as in :class:`_IntegerNoise`, in [-reach, reach].  A weight
    that d_k would bring out of its range stays where it is.
    """

    def __init__(self, limit: int, eps: float, reach: int) -> None:
        super().__init__(limit)
        self.limit, self.eps, self._reach = limit, eps, reach

    def steps(self, one: Members, seed: Tensor) -> Tensor:
        """d of one parameter along one direction (``seed`` [1]): int8."""
        (theta,) = one.params
        zero, out = torch.zeros_like(theta), torch.empty_like(theta)
        eps = torch.full((1,), self.eps, dtype=torch.float32, device=theta.device)
        args = self.kernel_args(one, seed, eps) | one.places
        rounding_seed = derive_seed(seed, 0)
        requantize(out, zero, **args, low=-self._reach, high=self._reach, rounding_seed=rounding_seed)
        return out

    def gated(self, theta: Tensor, steps: Tensor) -> Tensor:
        """``steps`` (integers of at least 16 bits) where theta + steps stays in range, else 0."""
        inside = (theta.to(steps.dtype) + steps).abs() <= self.limit
        return torch.where(inside, steps, torch.zeros_like(steps))

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        if len(seeds) > 1:
            fail("RoundedSteps", "estimator", "points along one direction each", f"{len(seeds)} directions")
        theta = options.pop("theta", None) or members.params
        for i, (into, weights) in enumerate(zip(out, theta, strict=True)):
            if not len(seeds):
                into.copy_(weights)
                continue
            one = members.picked([i])._replace(params=[weights])
            steps = self.steps(one, seeds).short() * coeffs.sign().short()
            into.copy_(weights.short() + self.gated(weights, steps))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        fail("RoundedSteps", "rule", "ErrorFeedback", "one that adds noise which is not rounded")


@dataclass(frozen=True)
class RoundedSteps(IntegerSteps):
    """z rounded to whole quantisation steps of int8 weights, once for a direction (QES)."""

    log_name = "RoundedSteps"

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for b in buckets:
            bits = b.group["bits"]
            b.noise = RoundedNoise(limit_of(bits), b.eps, min(127, (1 << bits) - 1))
