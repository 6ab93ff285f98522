"""Scaled directions: z times a number for each tensor, or onto a sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import fail
from ..functional import squared_norm
from ..transfer import to_device
from .direction import Dense, Direction
from .masks import check_refresh
from .shard import whole_of

if TYPE_CHECKING:
    from .groups import Bucket
    from .optimizer import ZerothOrder


class _PerTensor(Dense):
    """s_t z in the moves and u_t z in the update, for every tensor t: a row of coefficients each."""

    def __init__(self, moves: dict[int, Tensor], updates: dict[int, Tensor]) -> None:
        self._moves, self._updates, self.uniform = moves, updates, moves is updates
        self._now = moves

    def noise(
        self, bucket: Bucket, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor, coeffs: Tensor
    ) -> dict[str, Any]:
        rows = torch.stack([self._now[id(p)] for p in params])[:, None] * coeffs
        return super().noise(bucket, params, streams, seeds, rows)

    def update(self, bucket: Bucket, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._now = self._updates
        try:
            super().update(bucket, seeds, coeffs, **rounding)
        finally:
            self._now = self._moves


@dataclass(frozen=True)
class TensorScale(Direction):
    """theta_t + eps s_t z, with s_t the root mean square of the tensor's weights, or its inverse.

    "rms" moves every tensor in proportion to its size.  MeZO's variants divide by d_t instead: "variance" perturbs
    along z / d_t and updates along d_t z, which leaves the gradient estimate unbiased and changes its variance;
    "expectation" updates along z, which divides each tensor's estimate by d_t.  d_t is the root mean square too.

    s_t is measured before anything moves, kept in ``optimizer.state[p]["scale"]`` and renewed every ``refresh`` steps
    (None: never).  A tensor of zeros has s_t = 1.  Its last bits depend on the device's order of summation.

    Source: MeZO, Malladi et al. 2023 (arXiv 2305.17333), appendix on variance- and expectation-modified SPSA.
    """

    kind: str = "rms"
    refresh: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "variance", "expectation"):
            fail("TensorScale", "kind", "'rms', 'variance' or 'expectation'", repr(self.kind))
        check_refresh("TensorScale", self.refresh)

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
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
            bucket.direction = _PerTensor(moves, updates)


class _OnSphere(Dense):
    """Each direction times its own factor, found by its seed."""

    def __init__(self, seeds: Tensor, factors: Tensor) -> None:
        self._seeds, self._factors = seeds, factors

    def noise(
        self, bucket: Bucket, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor, coeffs: Tensor
    ) -> dict[str, Any]:
        if len(seeds) > len(self._seeds):
            fail("Sphere", "rule", "one that uses the step's own directions", f"{len(seeds)} seeds")
        factors = torch.where(seeds[:, None] == self._seeds, self._factors, torch.zeros_like(self._factors)).amax(1)
        return super().noise(bucket, params, streams, seeds, factors * coeffs)


class Sphere(Direction):
    """z sqrt(d) / \\|z\\| over the d weights of the step together: uniform on the sphere of z's mean length.

    \\|z\\| takes one more draw of z and no access of a weight; for rademacher it is known.  A rule that draws earlier
    steps' directions again (a window) is refused: their factors are gone.

    Source: Flaxman, Kalai and McMahan 2005; Gao, Jiang and Zhang 2018.
    """

    separate = False

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        home = buckets[0].device
        total = torch.zeros(len(seeds[home]), dtype=torch.float64, device=home)
        for b in buckets:
            sizes = [p.numel() for p in b.params]
            total += to_device(squared_norm(seeds[b.device], sizes, streams=b.streams, dist=b.dist), home)
        count = sum(p.numel() for b in buckets for p in b.params)
        factors = (count / total).sqrt().float()
        for b in buckets:
            b.direction = _OnSphere(seeds[b.device], to_device(factors, b.device))
