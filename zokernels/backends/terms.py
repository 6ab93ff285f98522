"""What every operation over parameters shares: which noise, with which coefficients, rounded how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    #: Of a shard that is rows of a matrix's columns: elements of a row, and logical indices from a row's
    #: first to the next one's; 0 for a tensor that lies in one piece.  None: all do.
    widths: list[int] | None = None
    lengths: list[int] | None = None

    def logical(self, i: int, at: int) -> int:
        """Logical index of element ``at`` of tensor i."""
        if not self.widths or not self.lengths or not self.widths[i]:
            return self.offsets[i] + at
        row, column = divmod(at, self.widths[i])
        return self.offsets[i] + row * self.lengths[i] + column

    @property
    def packed(self) -> tuple[Any, ...]:
        """The fields as the compiled libraries take them (csrc/op_args.h)."""
        noise = (
            self.seeds,
            self.coeffs,
            self.streams,
            self.offsets,
            DISTS[self.dist],
            self.decay,
            self.rounding_seed,
        )
        masks = self.masks or [], self.mask_seed, self.mask_keep
        return *noise, *masks, self.curvature or [], self.widths or [], self.lengths or []


def mask_bytes(numel: int, offset: int, width: int = 0, length: int = 0) -> int:
    """Bytes of the packed mask of ``numel`` elements from logical index ``offset``."""
    if width:
        return numel // width * row_blocks(offset, width, length)
    return (offset + numel + 7 >> 3) - (offset >> 3) if numel else 0


def row_blocks(offset: int, width: int, length: int) -> int:
    """Blocks of eight that are kept of a row: those of the row that touches most."""
    return width // 8 if (offset | width | length) % 8 == 0 else width + 14 >> 3
