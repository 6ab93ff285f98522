"""Directions that are more than drawn noise: a stored tensor takes part in them.

No single kernel call adds them to theta.  So their sum over k is made first, in fp32, for some parameters at
a time, and then theta takes it with the one rounding that it would have taken anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...functional import Rule as KernelRule
from ...functional import combine, update_
from ..noise import Members, Noise, Tensors
from ..roles import OptimizerView
from ..scalars import scalars
from ..shard import local_of, locals_of
from ..types import Bucket, Seeds
from .direction import Direction

#: Elements up to which parameters are worked on together: 4 MiB of sums, which stay in the cache, and few
#: calls for many small parameters.
_TOGETHER = 1 << 20


def packs(members: Members) -> Iterator[list[int]]:
    """The numbers of parameters that are worked on together; a large one is alone."""
    pack: list[int] = []
    size = 0
    for i, p in enumerate(members.params):
        more = local_of(p).numel()
        if pack and size + more > _TOGETHER:
            yield pack
            pack, size = [], 0
        pack.append(i)
        size += more
    if pack:
        yield pack


class Summed(Noise):
    """Noise that is added to theta as the tensors sum_k c_k z_k, which :meth:`totals` makes.

    They are scratch of fp32, as large as the parameters that are worked on together (:func:`packs`).  Rules
    with a state of each weight are refused: their kernels take seeds.
    """

    def totals(self, members: Members, seeds: Tensor, coeffs: Tensor) -> list[Tensor]:
        """sum_k c_k z_k for each parameter: fp32, of the shape of its local part."""
        raise NotImplementedError

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        theta = locals_of(members.params if options.get("theta") is None else options["theta"])
        into, decay = locals_of(out), options.get("decay")
        for pack in packs(members):
            totals = self.totals(members.picked(pack), seeds, coeffs) if len(seeds) else [None] * len(pack)
            for i, total in zip(pack, totals, strict=True):
                # fp32 additions and casts have one result on every device, so this needs no kernel.
                weights = theta[i].detach()
                weights = weights if decay is None else decay * weights.float()
                into[i].detach().copy_(weights if total is None else total.add_(weights.float()))

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self.perturb(members.params, members, seeds, coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """A kernel of momentum moves theta by -1 times the sum: it is the one that takes a stored tensor."""
        hyper = scalars((0.0, 1.0, 0.0, -1.0), coeffs.device).float()
        for pack in packs(members):
            some = members.picked(pack)
            totals = self.totals(some, seeds, coeffs)
            none: dict[str, Any] = {"seeds": seeds[:0], "coeffs": coeffs[:0], "dist": members.dist}
            update_(
                locals_of(some.params), "momentum", hyper, first=totals, **none, **some.places, **rounding
            )

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

    def totals(self, members: Members, seeds: Tensor, coeffs: Tensor) -> list[Tensor]:
        momenta = [self._momenta[id(p)] for p in members.params]
        args = self.kernel_args(members, seeds, (self.across * coeffs.double()).float())
        out = [torch.empty_like(m) for m in momenta]
        decay = weighted(self.toward, coeffs).float().reshape(1)
        combine(out, momenta, decay=decay, **args, **members.places)
        return out


def cosine_and_sine(angle: float) -> tuple[float, float]:
    """cos(angle), rounded to fp32, and the sine that belongs to it.

    Libraries of different machines disagree about the last bits of a cosine, and not about a square root.
    """
    cosine = torch.tensor(math.cos(angle), dtype=torch.float32).item()
    return cosine, math.sqrt(1 - cosine * cosine)


class Cone(Direction):
    """z_k = sqrt(d) cos(angle) m / |m| + sin(angle) u_k: directions at an angle to a momentum m.

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
