"""The direction of integer weights: noise in quantisation steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...functional import derive_seed, requantize, requantize_
from ...quantize import limit_of, pack_int4, unpack_int4
from ..noise import Members, Noise, Tensors
from ..roles import OptimizerView
from ..types import Bucket, Seeds
from .direction import Direction

#: k of the seeds of uniform numbers, and of rounding bits: far above any direction's.
UNIFORM_K, _ROUNDING_K = 0x80000005, 0x80000006
#: Elements whose uniform numbers are drawn at a time: their indices are 8 bytes each.
_PIECE = 1 << 20


def uniform(like: Tensor, seed: Tensor, bits: int) -> Tensor:
    """fp32 numbers in [0, 1), of the shape of ``like``: ``bits`` bits of derive_seed(seed, i, k) for element
    i.
    """
    out = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
    for at in range(0, out.numel(), _PIECE):
        index = torch.arange(at, min(at + _PIECE, out.numel()), device=like.device)
        drawn = derive_seed(seed, index, torch.full_like(index, UNIFORM_K))
        out[at : at + len(index)] = ((drawn >> 64 - bits) & (1 << bits) - 1).float() * 2.0**-bits
    return out.view(like.shape)


def integers_of(theta: Tensor) -> Tensor:
    """The integers of ``theta``, int8: itself, or, of uint8, two a byte."""
    return unpack_int4(theta, 2 * theta.shape[-1]) if theta.dtype is torch.uint8 else theta


def keep_integers(theta: Tensor, integers: Tensor) -> None:
    """Writes ``integers`` into ``theta``, packed where that is uint8."""
    theta.copy_(pack_int4(integers.to(torch.int8)) if theta.dtype is torch.uint8 else integers)


class _IntegerNoise(Noise):
    """theta is int8, or uint8 with two integers a byte.  Coefficients are in quantisation steps, and results
    are integers in [-limit, limit].
    """

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
    """z in quantisation steps of integer weights; ``bits``: of groups that do not say."""

    bits: int = 8
    #: The name that logs have for it.
    log_name = "Steps"

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            bucket.noise = _IntegerNoise(limit_of(bucket.group["bits"]))


class RoundedNoise(_IntegerNoise):
    """z_k rounded to integers d_k: both sides of a direction and the update have the same d_k.

    d_k = S(eps z_k) with stochastic rounding S, as in :class:`_IntegerNoise`, in [-reach, reach].  A weight
    that d_k would bring out of its range stays where it is, unless ``clamped``: then it goes to the range's
    end.
    """

    def __init__(self, limit: int, eps: float, reach: int, clamped: bool) -> None:
        super().__init__(limit)
        self.limit, self.eps, self._reach, self._clamped = limit, eps, reach, clamped

    def steps(self, one: Members, seed: Tensor) -> Tensor:
        """d of one parameter along one direction (``seed`` [1]): int8, one a byte."""
        (theta,) = one.params
        zero = torch.zeros_like(integers_of(theta))
        out = torch.empty_like(zero)
        eps = torch.full((1,), self.eps, dtype=torch.float32, device=theta.device)
        args = self.kernel_args(one, seed, eps) | one.places
        rounding_seed = derive_seed(seed, 0)
        requantize(out, zero, **args, low=-self._reach, high=self._reach, rounding_seed=rounding_seed)
        return out

    def gated(self, integers: Tensor, steps: Tensor) -> Tensor:
        """``steps`` (integers of at least 16 bits) where integers + steps stay in range, else 0."""
        moved = integers.to(steps.dtype) + steps
        if self._clamped:
            return moved.clamp(-self.limit, self.limit) - integers
        return torch.where(moved.abs() <= self.limit, steps, torch.zeros_like(steps))

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        if len(seeds) > 1:
            fail("RoundedSteps", "estimator", "points along one direction each", f"{len(seeds)} directions")
        theta = options.pop("theta", None) or members.params
        for i, (into, weights) in enumerate(zip(out, theta, strict=True)):
            if not len(seeds):
                into.copy_(weights)
                continue
            one, integers = members.picked([i])._replace(params=[weights]), integers_of(weights)
            steps = self.steps(one, seeds).short() * coeffs.sign().short()
            keep_integers(into, integers.short() + self.gated(integers, steps))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """q <- clamp(S'(decay q + sum_k c_k d_k / eps)), S' with the rounding seed or to nearest.

        The sum is of fp32, not fused, in the order of k.
        """
        decay, seed = rounding.get("decay"), rounding.get("rounding_seed")
        for i, theta in enumerate(members.params):
            one, integers = members.picked([i]), integers_of(theta)
            total = integers.float() if decay is None else decay * integers.float()
            for k, c in enumerate((coeffs.double() / self.eps).float().unbind()):
                total = total + c * self.steps(one, seeds[k : k + 1]).float()
            if rounding.get("rounding") == "stochastic":
                assert seed is not None
                derived = derive_seed(seed, one.streams[0], _ROUNDING_K)
                total = (total + uniform(total, derived, 16)).floor()
            keep_integers(theta, total.round().clamp(-self.limit, self.limit))


@dataclass(frozen=True)
class RoundedSteps(IntegerSteps):
    """z rounded to whole quantisation steps of integer weights, once for a direction (QES; QuZO's own form).

    ``clamped``: a weight near the end of its range goes to it (QuZO); else it does not take part where it
    would leave the range (QES).
    """

    clamped: bool = False
    log_name = "RoundedSteps"

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for b in buckets:
            bits = b.group["bits"]
            b.noise = RoundedNoise(limit_of(bits), b.eps, min(127, (1 << bits) - 1), self.clamped)
