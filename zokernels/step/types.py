"""What the parts of a step hand to each other: points, buckets and estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Dist
from .noise import DENSE, Members, Noise

#: {k: c, ...} is the point theta + sum_k c * z_k, and {} is theta itself.  c is a number or an fp32 tensor of one
#: element.
Point = dict[int, "float | Tensor"]

#: The step's seeds, int64 [q], on each device of the parameters.
Seeds = dict[torch.device, Tensor]

#: Runs the closure at each of some points, whose number comes with them, and gives the losses.
LossesAt = Callable[[Iterable[Any], int], Tensor]


def between(start: Point, end: Point) -> Point:
    """``end`` - ``start``, without the terms that the host knows to be 0."""
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


@dataclass(eq=False)
class Bucket:
    """The trainable parameters of one group that share device and dtype: one kernel call takes them all."""

    group: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    params: list[Tensor] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    #: The group's, as they were when the step began: what moved the weights must bring them back, whatever the group
    #: says by then.
    eps: float = 0.0
    dist: Dist = "normal"
    #: What applies the step's noise to the parameters; the direction sets it.
    noise: Noise = DENSE
    #: The point that the weights themselves are at.  {} unless a probe moves them in place.
    at: Point = field(default_factory=dict)
    #: Seeds and coefficients that the update adds to its own: the next step's perturbation (:class:`TwoPass`).
    ahead: tuple[Tensor, Tensor] | None = None

    @property
    def members(self) -> Members:
        return Members(self.params, self.streams, self.dist)

    def point(self, k: int, sign: int) -> Point:
        """theta + sign * eps * z_k."""
        return {k: sign * self.eps} if sign else {}

    def way_back(self, g: Tensor) -> Tensor:
        """Coefficients from :attr:`at` back to theta, float64, of the shape [q] and on the device of ``g``."""
        back = torch.zeros_like(g, dtype=torch.float64)
        for k, c in self.at.items():
            back[k].sub_(c)
        return back

    def layout(self) -> tuple[Any, ...]:
        """All that a perturbation depends on, besides its seed."""
        return self.device, self.dtype, self.eps, self.dist, self.noise, self.streams, [id(p) for p in self.params]


class Estimate(NamedTuple):
    """What the forwards of a step gave."""

    losses: Tensor  #: at the estimator's points
    gradients: list[Tensor]  #: g of each bucket, fp32 [q]; all 0 unless ``finite``
    finite: Tensor  #: bool, 0-dim: whether every g and every lr * g is finite
    skip: bool  #: True if the host knows that ``finite`` is false, so that the update need not run
    forwards: tuple[Tensor, ...] | Tensor = ()  #: the losses of all forwards, those of the rule's trials included
    #: A factor of the gradients, fp32 and 0-dim: the rule's choice among its trials.
    multiple: Tensor | None = None
    #: Groups whose parameters are on other stages of a pipeline alone, and their g.
    elsewhere: Sequence[tuple[dict[str, Any], Tensor]] = ()
