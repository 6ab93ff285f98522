"""Points of the weights, and the one place where a direction is applied: out of place, in place, with an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional import Rounding, combine, combine_

if TYPE_CHECKING:
    from .groups import Bucket

#: {k: c, ...} is theta + sum_k c * z_k, and {} is theta; c is a number, or a fp32 tensor of one element.
Point = dict[int, "float | Tensor"]


def between(start: Point, end: Point) -> Point:
    """``end`` - ``start``, without the zeros that the host knows of."""
    way = {k: end.get(k, 0.0) - start.get(k, 0.0) for k in dict.fromkeys((*start, *end))}
    return {k: c for k, c in way.items() if isinstance(c, Tensor) or c != 0}


def terms(point: Point, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds (int64 [K]) and coefficients (fp32 [K]) of a combine to ``point``, on the device of ``seeds`` ([q]).

    By slices and fills alone: an index list or a list of numbers would be copied from the host, which no CUDA graph
    takes.
    """
    if not point:
        return seeds[:0], torch.empty(0, dtype=torch.float32, device=seeds.device)
    coeffs = [
        c.reshape(1).to(seeds.device, non_blocking=True)
        if isinstance(c, Tensor)
        else torch.full((1,), c, dtype=torch.float32, device=seeds.device)
        for c in point.values()
    ]
    if len(coeffs) == 1:
        (k,) = point
        return seeds[k : k + 1], coeffs[0]
    return torch.cat([seeds[k : k + 1] for k in point]), torch.cat(coeffs)


class Dense:
    """z_k is the noise of seed k in every weight: fp32, of the parameter's stream and the group's dist.

    Another kind of direction (masked, low-rank) has the same methods.  ``seeds``: int64 [K], ``coeffs``: fp32 [K], on
    the bucket's device.
    """

    def perturb(
        self,
        bucket: Bucket,
        out: Sequence[Tensor],
        params: Sequence[Tensor],
        streams: Sequence[int],
        seeds: Tensor,
        coeffs: Tensor,
    ) -> None:
        """out = round(theta + sum_k c_k z_k) to nearest, for some of the bucket's parameters."""
        combine(out, params, seeds, coeffs, streams=streams, dist=bucket.dist)

    def tangent(
        self,
        bucket: Bucket,
        out: Sequence[Tensor],
        params: Sequence[Tensor],
        streams: Sequence[int],
        seeds: Tensor,
        coeffs: Tensor,
    ) -> None:
        """out = round(sum_k c_k z_k) to nearest, for some of the bucket's parameters."""
        combine(out, params, seeds, coeffs, streams=streams, dist=bucket.dist, decay=0.0)

    def update(
        self,
        bucket: Bucket,
        seeds: Tensor,
        coeffs: Tensor,
        *,
        decay: Tensor | None = None,
        rounding: Rounding = "nearest",
        rounding_seed: Tensor | None = None,
    ) -> None:
        """theta = round(decay * theta + sum_k c_k z_k) for all of the bucket's parameters, in one pass."""
        combine_(
            bucket.params,
            seeds,
            coeffs,
            streams=bucket.streams,
            dist=bucket.dist,
            decay=decay,
            rounding=rounding,
            rounding_seed=rounding_seed,
        )


DENSE = Dense()
