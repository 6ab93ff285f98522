"""The arguments that operations over parameters share: noise, coefficients, masks and rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..contract import DISTS

#: The value of ``mask_keep`` that keeps every element, because a field of 16 bits is always below it.
KEEP_ALL = 1 << 16


class Terms(NamedTuple):
    """acc = decay * theta + sum_k coeffs[k] * w_k, rounded once; w_k is z_k, or z_k / sqrt(curvature).

    K is the number of directions.  An element that a mask drops becomes decay * theta.  The operations'
    docstrings (:func:`zokernels.combine_`) say what each field means to users.
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
    #: int64 [1]: an element is kept where its 16-bit field of domain 3 is below mask_keep.
    mask_seed: Tensor | None = None
    mask_keep: int = KEEP_ALL
    curvature: Sequence[Tensor] | None = None  # > 0, fp32 or bf16, of the parameters' shapes
    #: For a shard that is a range of columns of a matrix: how many elements a row has here (width), and in
    #: the whole matrix (length).  Both are 0 for a tensor that lies in one piece.  None: all tensors do.
    widths: list[int] | None = None
    lengths: list[int] | None = None

    def logical(self, i: int, at: int) -> int:
        """The logical index of element ``at`` of tensor ``i``: its place in the unsharded parameter."""
        if not self.widths or not self.lengths or not self.widths[i]:
            return self.offsets[i] + at
        row, column = divmod(at, self.widths[i])
        return self.offsets[i] + row * self.lengths[i] + column

    @property
    def packed(self) -> tuple[Any, ...]:
        """The fields as compiled libraries take them: None becomes an empty list (csrc/op_args.h)."""
        noise = *self[:4], DISTS[self.dist], self.decay, self.rounding_seed
        masks = self.masks or [], self.mask_seed, self.mask_keep
        return *noise, *masks, self.curvature or [], self.widths or [], self.lengths or []


def mask_bytes(numel: int, offset: int, width: int = 0, length: int = 0) -> int:
    """How many bytes the packed mask of ``numel`` elements from logical index ``offset`` takes.

    ``width``, ``length``: the pair of a tensor that is rows (``Terms.widths``).
    """
    if width:
        return numel // width * row_blocks(offset, width, length)
    return (offset + numel + 7 >> 3) - (offset >> 3) if numel else 0


def row_blocks(offset: int, width: int, length: int) -> int:
    """How many aligned blocks of eight elements a row has room for: as many as the row that touches most."""
    return width // 8 if (offset | width | length) % 8 == 0 else width + 14 >> 3
