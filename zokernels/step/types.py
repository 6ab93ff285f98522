"""What the parts of a step hand to each other: points, buckets and estimates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Dist, Plan
from ..transfer import CPU, to_device
from .noise import DENSE, Members, Noise
from .shard import any_sharded

#: A parameter group, as ``optimizer.param_groups`` has them.
Group = dict[str, Any]

#: A point of the weights: {k: c, ...} is theta + sum_k c * z_k, and {} is theta itself.
#: Each c is a number, or an fp32 tensor of one element.
Point = dict[int, "float | Tensor"]

#: The seeds of a step, int64 [q], on each device of the parameters.
Seeds = dict[torch.device, Tensor]

#: Runs the closure at some points and returns the losses; called with the points and their number.
LossesAt = Callable[[Iterable[Any], int], Tensor]


def between(start: Point, end: Point) -> Point:
    """``end`` - ``start``, without the terms that the host knows to be 0."""
    way = {k: end.get(k, 0.0) - start.get(k, 0.0) for k in dict.fromkeys((*start, *end))}
    return {k: c for k, c in way.items() if isinstance(c, Tensor) or c != 0}


def terms(point: Point, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds (int64 [K]) and coefficients (fp32 [K]) that make ``point`` of theta, on the device of ``seeds``.

    Only slices and fills are used.  An index list or a list of numbers would be copied from the host, and no
    CUDA graph can capture such a copy.
    """
    if not point:
        return seeds[:0], torch.empty(0, dtype=torch.float32, device=seeds.device)
    if len(point) == 1:
        ((k, c),) = point.items()
        return seeds if seeds.numel() == 1 else seeds[k : k + 1], _coefficient(c, seeds)
    coeffs = [_coefficient(c, seeds) for c in point.values()]
    return torch.cat([seeds[k : k + 1] for k in point]), torch.cat(coeffs)


#: On the CPU: coefficients that steps use again and again.  Nobody writes to them.
_kept: dict[float, Tensor] = {}


def _coefficient(c: float | Tensor, seeds: Tensor) -> Tensor:
    """``c`` as fp32 [1] on the device of ``seeds``."""
    if isinstance(c, Tensor):
        return to_device(c.reshape(1), seeds.device)
    c = float(c)
    if (found := _kept.get(c)) is not None and c and seeds.is_cpu:  # 0.0 and -0.0 would be one
        return found
    with torch.inference_mode(False):
        made = torch.full((1,), c, dtype=torch.float32, device=seeds.device)
    if type(made) is Tensor and made.is_cpu:
        if len(_kept) >= 256:
            _kept.clear()
        _kept[c] = made
    return made


@dataclass(eq=False)
class Bucket:
    """The trainable parameters of one group that share device and dtype: one kernel call takes them all."""

    group: Group
    device: torch.device
    dtype: torch.dtype
    params: list[Tensor] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    #: ``eps`` and ``dist`` are copies of the group's from the beginning of the step.  Whoever moved the
    #: weights must bring them back by the same values, even if the group has others by then.
    eps: float = 0.0
    dist: Dist = "normal"
    #: Applies the step's noise to the parameters.  The direction sets it.
    noise: Noise = DENSE
    #: The point at which the weights themselves are.  It is {} unless a probe moves them in place.
    at: Point = field(default_factory=dict)
    #: Seeds and coefficients that the update adds to its own: the next step's perturbation
    #: (:class:`TwoPass`).
    ahead: tuple[Tensor, Tensor] | None = None
    #: The plan of :attr:`params`, which is kept from step to step.  None where nothing can be kept.
    plan: Plan | None = field(default=None, init=False)

    @property
    def is_sharded(self) -> bool:
        return self.plan is None and any_sharded(self.params)  # a plan has no shards

    @functools.cached_property
    def members(self) -> Members:
        return Members(self.params, self.streams, self.dist, self.plan)

    def following(self) -> Bucket:
        """This bucket, with its eps and noise, for weights that are at theta."""
        bucket = replace(self, at={}, ahead=None)
        bucket.plan = self.plan
        return bucket

    def of(self, group: Group) -> Bucket:
        """A bucket of the same parameters for a step with ``group``, whose hyper-parameters may be others."""
        bucket = Bucket(
            group,
            self.device,
            self.dtype,
            self.params,
            self.streams,
            self.names,
            eps=group["eps"],
            dist=group["dist"],
        )
        bucket.plan = self.plan
        return bucket

    def point(self, k: int, sign: int) -> Point:
        """The point theta + sign * eps * z_k."""
        return {k: sign * self.eps} if sign else {}

    @property
    def has_numbers(self) -> bool:
        """Whether the host knows :attr:`at` and the group's learning rate, and the weights are on the CPU."""
        if isinstance(self.group["lr"], Tensor) or self.device != CPU:
            return False
        return not self.at or not any([isinstance(c, Tensor) for c in self.at.values()])

    def way_back(self, g: Tensor) -> Tensor:
        """The coefficients that lead from :attr:`at` back to theta: float64 [q], on the device of ``g``."""
        back = torch.zeros_like(g, dtype=torch.float64)
        for k, c in self.at.items():
            if len(back) == 1 and not isinstance(c, Tensor):
                return back.fill_(-c)
            back[k].sub_(c)
        return back

    def layout(self) -> tuple[Any, ...]:
        """Everything that a perturbation depends on, besides its seed."""
        ids = [id(p) for p in self.params]
        return self.device, self.dtype, self.eps, self.dist, self.noise, self.streams, ids


class Estimate(NamedTuple):
    """What the forwards of a step gave."""

    losses: Tensor  #: at the estimator's points
    gradients: list[Tensor]  #: g of each bucket, fp32 [q]; all 0 unless ``finite``
    finite: Tensor  #: bool, 0-dim: whether every g and every lr * g is finite
    skip: bool  #: True if the host knows that ``finite`` is false, so that the update need not run
    forwards: tuple[Tensor, ...] | Tensor = ()  #: the losses of all forwards, the rule's trials included
    multiple: Tensor | None = None  #: the rule's choice among its trials, a factor of g (fp32, 0-dim)
    #: Groups whose parameters are on other stages of a pipeline alone, each with its g.
    elsewhere: Sequence[tuple[Group, Tensor]] = ()
    #: g of each (eps, clip) that some group has, whether finite or not.
    raw: Mapping[tuple[float, float | None], Tensor] = MappingProxyType({})
