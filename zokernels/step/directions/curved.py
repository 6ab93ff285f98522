"""The direction of HiZOO: z over the root of a curvature that its rule keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..noise import DENSE, Members, Noise
from ..roles import OptimizerView
from ..types import Bucket, Seeds
from .direction import Direction


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
