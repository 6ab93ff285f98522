"""What every operation over parameters shares: which noise, with which coefficients, rounded how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..contract import DISTS

#: ``mask_keep`` that keeps every element: a field of 16 bits is always below it.
KEEP_ALL = 1 << 16


class Terms(NamedTuple):
    """acc = decay * theta + sum_k coeffs[k] * w_k, rounded once; w_k is z_k, or z_k / sqrt(curvature).

    An element that a mask drops gets decay * theta alone.
    """

    seeds: Tensor  # int64 [K]
    coeffs: Tensor  # fp32 [K], or [tensors, K]
    streams: list[int]
    offsets: list[int]
    dist: str
    decay: Tensor | None  # fp32 [1]
    rounding_seed: Tensor | None  # int64 [1]; None: to nearest
    #: uint8, one bit for each element: bit (i & 7) of byte (i >> 3) - (offset >> 3) for logical index i.
    masks: Sequence[Tensor] | None = None
    mask_seed: Tensor | None = None  # int64 [1]: keeps where the 16-bit field of domain 3 is below mask_keep
    mask_keep: int = KEEP_ALL
    curvature: Sequence[Tensor] | None = None  # fp32 or bf16, like the parameters, > 0

    @property
    def is_plain(self) -> bool:
        """One coefficient a direction, no mask, no curvature."""
        return self.coeffs.dim() == 1 and not self.masks and self.mask_seed is None and not self.curvature

    @property
    def packed(self) -> tuple:
        """The fields as the compiled libraries take them (csrc/op_args.h)."""
        seeds, coeffs, streams, offsets, dist, decay, rounding_seed, masks, mask_seed, mask_keep, curvature = self
        return (
            seeds, coeffs, streams, offsets, DISTS[dist], decay, rounding_seed, masks or [], mask_seed, mask_keep,
            curvature or [],
        )  # fmt: skip


def mask_bytes(numel: int, offset: int) -> int:
    """Bytes of the packed mask of ``numel`` elements from logical index ``offset``."""
    return (offset + numel + 7 >> 3) - (offset >> 3) if numel else 0
