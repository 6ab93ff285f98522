"""The momentum around which directions are drawn (:class:`~zokernels.step.directions.summed.Cone`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_number, fail
from ...functional import combine_
from ...transfer import to_device
from ..directions.summed import Cone, ConeNoise, weighted
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..scalars import descent, is_zero
from ..types import Bucket, Estimate, Group
from .rule import Rule, check_fraction, groups_of


class ConeMomentum(Rule):
    """theta <- decay theta - lr G;   m <- momentum m + (1 - momentum) G,   G = sum_k g_k z_k.

    z_k = a m + b u_k are the directions of :class:`Cone`, with a = sqrt(d) cos(angle) / |m| and b =
    sin(angle).  So the new m is a combine of the old one:

        m <- (momentum + (1 - momentum) a sum_k g_k) m + (1 - momentum) b sum_k g_k u_k

    m is ``optimizer.state[p]["momentum_buffer"]``, fp32, 0 at first.  |m| is not measured.  As in the
    authors' trainer it is the expected one: m and u_k are nearly orthogonal and |u_k|^2 is nearly d, so
    |m|^2 / d becomes the sum of the squares of the factors of m (times the old |m|^2 / d) and of the u_k.
    In this way it is a number that every device and every replay computes alike, without a pass.
    """

    states: ClassVar = {"momentum_buffer": 0.0}
    through_noise = False

    def __init__(self, momentum: float = 0.99, angle: float = 1.35) -> None:
        super().__init__(momentum=momentum, angle=angle)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])
        check_number(op, "angle", group["angle"], positive=True)
        if group["angle"] > math.pi / 2:
            fail(op, "angle", "a number of radians in (0, pi / 2]", group["angle"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        if type(optimizer.direction) is not Cone or optimizer.subset is not None:
            got = (optimizer.direction, optimizer.subset)
            fail(optimizer.op, "direction, subset", "Cone() and no subset", got)

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        return {"square": torch.zeros(1, dtype=torch.float64)}  # |m|^2 / d of the group's own weights

    def momentum_size(self, optimizer: OptimizerView, buckets: Sequence[Bucket]) -> Tensor:
        """|m| / sqrt(d) over the weights of all groups: float64, 0-dim, on the first bucket's device."""
        home, counts = buckets[0].device, dict[int, int]()
        for bucket in buckets:
            count = sum(p.numel() for p in bucket.params)
            counts[id(bucket.group)] = counts.get(id(bucket.group), 0) + count
        square = torch.zeros(1, dtype=torch.float64, device=home)
        for group in groups_of(buckets):
            share = counts[id(group)] / sum(counts.values())
            square = square + share * self.kept(optimizer, group, home)["square"]
        return square.sqrt().reshape(())

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        home = probe.buckets[0].device
        finite = to_device(estimate.finite, home)
        for bucket, gradient in zip(probe.buckets, estimate.gradients, strict=True):
            group = bucket.group
            if id(group) in self._factors:
                continue
            g, beta = to_device(gradient, home).double(), group["momentum"]
            toward, across = (to_device(t, home) for t in self._slopes(bucket))
            keep, fresh = beta + weighted((1 - beta) * toward, g), (1 - beta) * across * g
            self._factors[id(group)] = keep.reshape(1), fresh
            square = self.kept(optimizer, group, home)["square"]
            new = keep.square() * square + weighted(torch.ones_like(keep), fresh.square())
            square.copy_(torch.where(finite, new, square))

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        here = lambda t: to_device(t, bucket.device)
        if not is_zero(bucket.group["lr"]):
            coeffs = torch.where(finite, descent(bucket.group, g), torch.zeros_like(g))
            rounding = self.rounding(bucket, seeds, g, finite)
            bucket.noise.update(bucket.members, seeds, here(coeffs), **rounding)
        keep, fresh = (here(t) for t in self._factors[id(bucket.group)])
        keep = torch.where(here(finite), keep, torch.ones_like(keep)).float()
        fresh = torch.where(here(finite), fresh, torch.zeros_like(fresh)).float()
        states = self.state(optimizer, bucket, "momentum_buffer")
        combine_(states, seeds, fresh, dist=bucket.dist, decay=keep, **bucket.members.places)

    def _slopes(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        assert isinstance(bucket.noise, ConeNoise)  # check_parts
        return bucket.noise.toward, bucket.noise.across
