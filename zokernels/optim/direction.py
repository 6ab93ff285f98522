"""Directions: points of the weights along them, and the one place where they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contract import derive_seed_int, seed_to_int64
from ..functional import Rule, combine, combine_, update_
from ..transfer import to_device
from .shard import locals_of, placed

if TYPE_CHECKING:
    from .groups import Bucket
    from .optimizer import ZerothOrder

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
        to_device(c.reshape(1), seeds.device)
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

    Another kind of direction gives other arguments (:meth:`noise`), or applies itself.  ``seeds``: int64 [K],
    ``coeffs``: fp32 [K], on the bucket's device.
    """

    #: Whether a move by c z and an update by c z add the same; where not, weights are restored before the update.
    uniform = True

    def noise(
        self, bucket: Bucket, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor, coeffs: Tensor
    ) -> dict[str, Any]:
        """Arguments of a combine for some of the bucket's parameters; of sharded ones, for what lies here."""
        return {"seeds": seeds, "coeffs": coeffs, "streams": streams, "dist": bucket.dist, **placed(params)}

    def perturb(
        self,
        bucket: Bucket,
        out: Sequence[Tensor],
        params: Sequence[Tensor],
        streams: Sequence[int],
        seeds: Tensor,
        coeffs: Tensor,
        decay: float | None = None,
        theta: Sequence[Tensor] | None = None,
    ) -> None:
        """out = round(decay * theta + sum_k c_k z_k) to nearest, for some of the bucket's parameters.

        ``theta``: where their weights are read (default: where they are).
        """
        theta = locals_of(params) if theta is None else theta
        combine(locals_of(out), theta, **self.noise(bucket, params, streams, seeds, coeffs), decay=decay)

    def move(self, bucket: Bucket, seeds: Tensor, coeffs: Tensor) -> None:
        """theta = round(theta + sum_k c_k z_k) to nearest, for all of the bucket's parameters."""
        combine_(locals_of(bucket.params), **self.noise(bucket, bucket.params, bucket.streams, seeds, coeffs))

    def update(self, bucket: Bucket, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """theta = round(decay * theta + sum_k c_k z_k) for all of the bucket's parameters, in one pass.

        ``rounding``: decay, rounding, rounding_seed of :func:`combine_`.
        """
        noise = self.noise(bucket, bucket.params, bucket.streams, seeds, coeffs)
        combine_(locals_of(bucket.params), **noise, **rounding)

    def step(
        self, bucket: Bucket, rule: Rule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **states_and_rounding: Any
    ) -> None:
        """One :func:`update_` of all of the bucket's parameters, with G = sum_k c_k z_k.

        ``states_and_rounding``: first, second, decay, rounding, rounding_seed.
        """
        noise = self.noise(bucket, bucket.params, bucket.streams, seeds, coeffs)
        update_(locals_of(bucket.params), rule, hyper, **noise, **states_and_rounding)


DENSE = Dense()


class Direction:
    """What z is.  Once a step, before anything moves, it gives each bucket what applies it."""

    #: Host steps after which something is drawn or measured anew; None: never, and so within a CUDA graph.
    refresh: int | None = None
    #: Whether what z is in a parameter depends on no other parameter.
    separate = True

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        """Set ``bucket.direction``.  The weights are unperturbed; ``seeds``: int64 [q] of the step."""
        for bucket in buckets:
            bucket.direction = DENSE

    def window(self, optimizer: ZerothOrder) -> int:
        """How often :attr:`refresh` steps have passed."""
        return optimizer.step_count // self.refresh if self.refresh else 0

    def begins_window(self, optimizer: ZerothOrder) -> bool:
        return self.refresh is not None and optimizer.step_count % self.refresh == 0


def derived_seed(optimizer: ZerothOrder, window: int, k: int, device: torch.device) -> Tensor:
    """derive_seed(run seed, window, k) as an int64 tensor [1]; directions' own k stay far below those used here."""
    value = seed_to_int64(derive_seed_int(optimizer.seed, window, k))
    return torch.full((1,), value, dtype=torch.int64, device=device)
