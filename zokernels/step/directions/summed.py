"""Directions that are more than drawn noise: a stored tensor takes part in them.

No single kernel call adds them to theta.  So their sum over k is made first, in fp32, for one parameter at a
time, and then theta takes it with the one rounding that it would have taken anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...functional import Rule as KernelRule
from ...functional import combine, update_
from ..noise import Members, Noise, Tensors
from ..roles import OptimizerView
from ..scalars import scalars
from ..shard import locals_of
from ..types import Bucket, Seeds
from .direction import Direction


class Summed(Noise):
    """Noise that is added to theta as the tensor sum_k c_k z_k, which :meth:`total` makes.

    It is scratch of fp32, as large as the parameter that is worked on.  Rules with a state of each weight are
    refused: their kernels take seeds.
    """

    def total(self, one: Members, seeds: Tensor, coeffs: Tensor) -> Tensor:
        """sum_k c_k z_k for the one parameter in ``one``: fp32, of the shape of its local part."""
        raise NotImplementedError

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        theta = locals_of(members.params if options.get("theta") is None else options["theta"])
        decay = options.get("decay")
        for i, (into, weights) in enumerate(zip(locals_of(out), theta, strict=True)):
            weights = weights.detach()
            if len(seeds):
                total = self.total(members.picked([i]), seeds, coeffs)
                # fp32 additions and casts have one result on every device, so this needs no kernel.
                weights = total.add_(weights.float() if decay is None else decay * weights.float())
            elif decay is not None:
                weights = decay * weights.float()
            into.detach().copy_(weights)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self.perturb(members.params, members, seeds, coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """A kernel of momentum moves theta by -1 times the sum: it is the one that takes a stored tensor."""
        hyper = scalars((0.0, 1.0, 0.0, -1.0), coeffs.device).float()
        for i in range(len(members.params)):
            one = members.picked([i])
            total = self.total(one, seeds, coeffs)
            none: dict[str, Any] = {"seeds": seeds[:0], "coeffs": coeffs[:0], "dist": members.dist}
            update_(locals_of(one.params), "momentum", hyper, first=[total], **none, **one.places, **rounding)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        fail(type(self).__name__, "rule", "one without a state of each weight", repr(rule))


def weighted(factor: Tensor, coeffs: Tensor) -> Tensor:
    """factor * sum_k coeffs[k], float64: the sum in the order of k, the same on every device."""
    total = torch.zeros_like(factor)
    for c in coeffs.double().unbind():
        total = total + c
    return factor * total


class ConeNoise(Summed):
    """z_k = toward m + across u_k, with m a stored momentum and u_k dense noise."""

    def __init__(self, momenta: dict[int, Tensor], toward: Tensor, across: Tensor) -> None:
        self._momenta, self.toward, self.across = momenta, toward, across

    def total(self, one: Members, seeds: Tensor, coeffs: Tensor) -> Tensor:
        m = self._momenta[id(one.params[0])]
        args = self.kernel_args(one, seeds, (self.across * coeffs.double()).float())
        out = torch.empty_like(m)
        decay = weighted(self.toward, coeffs).float().reshape(1)
        combine([out], [m], decay=decay, **args, **one.places)
        return out


def cosine_and_sine(angle: float) -> tuple[float, float]:
    """cos(angle), rounded to fp32, and the sine that belongs to it.

    Libraries of different machines disagree about the last bits of a cosine, and not about a square root.
    """
    cosine = torch.tensor(math.cos(angle), dtype=torch.float32).item()
    return cosine, math.sqrt(1 - cosine * cosine)


class Cone(Direction):
    r"""z_k = sqrt(d) cos(angle) m / \|m\| + sin(angle) u_k: directions at an angle to a momentum m.

    u_k is dense noise, d the number of weights of the step, and m the momentum that the rule
    :class:`ConeMomentum` keeps.  While m is 0, z_k = u_k.
    """

    separate = False

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        size = optimizer.rule.momentum_size(optimizer, buckets)
        for bucket in buckets:
            states = optimizer.rule.state(optimizer, bucket, "momentum_buffer")
            momenta = {id(p): m for p, m in zip(bucket.params, states, strict=True)}
            cosine, sine = cosine_and_sine(bucket.group["angle"])
            here = size.to(bucket.device)
            still = here == 0
            toward = torch.where(still, torch.zeros_like(here), cosine / here)
            across = torch.where(still, torch.ones_like(here), torch.full_like(here, sine))
            bucket.noise = ConeNoise(momenta, toward, across)
