"""Scaled directions: z times a number of each tensor or of each weight, or scaled to a sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ...functional import squared_norm
from ...transfer import to_device
from ..noise import DENSE, Members, Noise
from ..roles import OptimizerView
from ..shard import whole_of
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh


class _PerTensor(Noise):
    """s_t z in the moves and u_t z in the update, for every tensor t, which has a row of coefficients."""

    def __init__(self, moves: dict[int, Tensor], updates: dict[int, Tensor]) -> None:
        self._moves, self._updates, self.same_scale = moves, updates, moves is updates
        self._now = moves

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        rows = torch.stack([self._now[id(p)] for p in members.params])[:, None] * coeffs
        return super().kernel_args(members, seeds, rows)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._now = self._updates
        try:
            super().update(members, seeds, coeffs, **rounding)
        finally:
            self._now = self._moves


@dataclass(frozen=True)
class TensorScale(Direction):
    """theta_t + eps s_t z, with s_t the root mean square of the tensor's weights, or its inverse.

    "rms" moves every tensor in proportion to its size.  MeZO's variants divide by d_t, which is the root mean
    square, too.  "variance" perturbs along z / d_t and updates along d_t z, which leaves the gradient
    estimate unbiased and changes its variance.  "expectation" updates along z, which divides each tensor's
    estimate by d_t.

    s_t is measured before anything moves, kept in ``optimizer.state[p]["scale"]`` and renewed every
    ``refresh`` steps (None: never).  A tensor of zeros has s_t = 1.  The last bits of s_t depend on the
    device's order of summation.

    Source: MeZO, Malladi et al. 2023 (arXiv 2305.17333), appendix on variance- and expectation-modified SPSA.
    """

    kind: str = "rms"
    refresh: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "variance", "expectation"):
            fail("TensorScale", "kind", "'rms', 'variance' or 'expectation'", repr(self.kind))
        check_refresh("TensorScale", self.refresh)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        fresh = self.begins_window(optimizer)
        for bucket in buckets:
            sizes = {}
            for p in bucket.params:
                state = optimizer.state[p]
                if fresh or "scale" not in state:
                    size = whole_of(p).detach().float().square().mean().sqrt()
                    state["scale"] = torch.where(size > 0, size, torch.ones_like(size))
                sizes[id(p)] = state["scale"]
            if self.kind == "rms":
                moves = updates = sizes
            else:
                moves = {key: 1 / size for key, size in sizes.items()}
                updates = sizes if self.kind == "variance" else {k: torch.ones_like(s) for k, s in sizes.items()}
            bucket.noise = _PerTensor(moves, updates)


class _OnSphere(Noise):
    """Each direction times its own factor, which is found by the direction's seed."""

    def __init__(self, seeds: Tensor, factors: Tensor) -> None:
        self._seeds, self._factors = seeds, factors

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        if len(seeds) > len(self._seeds):
            fail("Sphere", "rule", "one that uses the step's own directions", f"{len(seeds)} seeds")
        factors = torch.where(seeds[:, None] == self._seeds, self._factors, torch.zeros_like(self._factors)).amax(1)
        return super().kernel_args(members, seeds, factors * coeffs)


class Sphere(Direction):
    """z sqrt(d) / \\|z\\| over the d weights of the step together: uniform on the sphere of z's mean length.

    \\|z\\| costs one more draw of z, and no access of a weight; for rademacher it is known.  A rule that
    draws the directions of earlier steps again (a window) is refused, because their factors are gone.

    Source: Flaxman, Kalai and McMahan 2005; Gao, Jiang and Zhang 2018.
    """

    separate = False

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        home = buckets[0].device
        total = torch.zeros(len(seeds[home]), dtype=torch.float64, device=home)
        for b in buckets:
            sizes = [p.numel() for p in b.params]
            total += to_device(squared_norm(seeds[b.device], sizes, streams=b.streams, dist=b.dist), home)
        count = sum(p.numel() for b in buckets for p in b.params)
        factors = (count / total).sqrt().float()
        for b in buckets:
            b.noise = _OnSphere(seeds[b.device], to_device(factors, b.device))


class _Curved(Noise):
    """z / sqrt(h) in the moves; the update's kernel divides by its new h itself."""

    same_scale = False

    def __init__(self, curvature: dict[int, Tensor]) -> None:
        self._curvature = curvature

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        curvature = [self._curvature[id(p)] for p in members.params]
        return super().kernel_args(members, seeds, coeffs) | {"curvature": curvature}

    def step(self, members: Members, *args: Any, **options: Any) -> None:
        DENSE.step(members, *args, **options)


class CurvedDirection(Direction):
    """z / sqrt(h), h = ``optimizer.state[p]["curvature"]`` of the rule :class:`Curvature`."""

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            states = optimizer.rule.state(optimizer, bucket, "curvature")
            bucket.noise = _Curved({id(p): h for p, h in zip(bucket.params, states, strict=True)})
