"""Parameter groups: what a group may hold, the stream of each parameter, and the buckets one combine call takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_dist, check_overlap, check_stream, fail
from ..contract import canonical_name, streams_of
from ..functional import Dist
from .direction import DENSE, Dense, Point
from .shard import is_sharded, local_of, locals_of

if TYPE_CHECKING:
    from ..offload.engine import Engine

ROUNDINGS = ("stochastic", "nearest")
RESTORES = ("exact", "inplace")


@dataclass(eq=False)
class Bucket:
    """The trainable parameters of one group that share device and dtype: one combine call."""

    group: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    params: list[Tensor] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    #: As they were when the step began: what moved the weights must bring them back, whatever the group says by then.
    eps: float = 0.0
    dist: Dist = "normal"
    #: How a direction is applied to the parameters.
    direction: Dense = DENSE
    #: Where the weights now stand; only the in-place probe ever moves it from {}.
    at: Point = field(default_factory=dict)
    #: Seeds and coefficients that the update adds to its own (:class:`TwoPass`).
    ahead: tuple[Tensor, Tensor] | None = None

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
        return self.device, self.dtype, self.eps, self.dist, self.direction, self.streams, [id(p) for p in self.params]


def check_choice(op: str, argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(op, argument, " or ".join(map(repr, choices)), repr(value))


def check_number(op: str, argument: str, value: object, *, positive: bool = False) -> None:
    expected = "a finite number > 0" if positive else "a finite number >= 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(op, argument, expected, repr(value), TypeError)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        fail(op, argument, expected, repr(value))


def check_hyperparameters(op: str, group: dict[str, Any]) -> None:
    """Host values only: a learning rate that is a tensor is never read back."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            fail(op, "lr", "a number or a floating-point tensor of one element", f"{lr.dtype} x {lr.numel()}")
    else:
        check_number(op, "lr", lr)
    check_number(op, "eps", group["eps"], positive=True)
    check_number(op, "weight_decay", group["weight_decay"])
    if group["clip"] is not None:
        check_number(op, "clip", group["clip"], positive=True)
    check_dist(op, group["dist"])
    check_choice(op, "rounding", group["rounding"], ROUNDINGS)
    if "bits" in group and group["bits"] not in range(2, 9):
        fail(op, "bits", "an integer in [2, 8]", repr(group["bits"]))


def takes_part(group: dict[str, Any], param: Tensor) -> bool:
    """Not frozen.  Integers (a group with ``bits``) never require a gradient."""
    return param.requires_grad or "bits" in group


def engine_of(param: Tensor) -> Engine | None:
    """What streams ``param``, which then is a placeholder (:mod:`zokernels.offload`)."""
    return getattr(param, "_zo_engine", None)


def one_engine(op: str, groups: list[dict[str, Any]]) -> Engine | None:
    engines = {id(e): e for g in groups for p in g["params"] if (e := engine_of(p))}
    if len(engines) > 1:
        fail(op, "params", "parameters of one streamed model", f"those of {len(engines)}")
    return next(iter(engines.values()), None)


def devices_of(groups: list[dict[str, Any]]) -> list[torch.device]:
    return list(dict.fromkeys(p.device for g in groups for p in g["params"] if takes_part(g, p) and p.numel()))


def label_of(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return repr(names[index]) if names else f"params[{index}]"


def check_param(op: str, group: dict[str, Any], param: Tensor, label: str) -> None:
    """A trainable parameter is dense memory that a kernel can walk in logical order."""
    if torch.nn.parameter.is_lazy(param):
        fail(op, label, "an initialized parameter", "a lazy one; run the model once before", TypeError)
    if is_sharded(param):
        if "bits" in group:
            fail(op, label, "a plain tensor of integers", "a DTensor", TypeError)
        param = local_of(param)
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        fail(op, label, "a plain dense tensor", f"the tensor subclass {type(param).__name__}", TypeError)
    if "bits" in group:
        if param.dtype is not torch.int8:
            fail(op, label, "dtype int8", param.dtype, TypeError)
    elif param.dtype not in DTYPES:
        fail(op, label, "dtype float32, bfloat16 or float16 (or requires_grad=False)", param.dtype, TypeError)
    if engine_of(param):
        return
    if param.layout is not torch.strided or not param.is_contiguous():
        got = f"strides {param.stride()}" if param.layout is torch.strided else param.layout
        fail(op, label, "a contiguous tensor", f"shape {tuple(param.shape)}, {got}")


def assign_streams(op: str, groups: list[dict[str, Any]]) -> None:
    """Give the last of ``groups`` its ``streams``, unique among all groups.

    Explicit ones stay; a named parameter gets the hash of its name; an unnamed one its ordinal in the optimizer.
    """
    group = groups[-1]
    count, names, explicit = len(group["params"]), group.get("param_names"), group.get("streams")
    if explicit is not None:
        if len(explicit) != count:
            fail(op, "streams", f"{count} integers, one for each parameter of the group", len(explicit))
        for i, stream in enumerate(explicit):
            if not isinstance(stream, int) or isinstance(stream, bool):
                fail(op, f"streams[{i}]", "an integer", repr(stream), TypeError)
            check_stream(op, f"streams[{i}]", stream)
        group["streams"] = list(explicit)
    elif names is not None:
        group["streams"] = streams_of(names)
    else:
        first = sum(len(g["params"]) for g in groups[:-1])
        group["streams"] = list(range(first, first + count))
    check_streams(op, groups)


def check_streams(op: str, groups: list[dict[str, Any]]) -> None:
    owner: dict[int, str] = {}
    for at, group in enumerate(groups):
        if len(group["streams"]) != len(group["params"]):
            fail(op, f"param_groups[{at}]['streams']", f"{len(group['params'])} integers", len(group["streams"]))
        for i, stream in enumerate(group["streams"]):
            label = f"{label_of(group, i)} of group {at}"
            if stream in owner:
                fail(op, "streams", "one stream for each parameter", f"{stream} for both {owner[stream]} and {label}")
            owner[stream] = label


def check_groups(op: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Whether the saved groups ``theirs`` can take the place of ``ours``; torch itself compares their numbers."""
    for mine, saved in zip(ours, theirs):  # noqa: B905
        check_hyperparameters(op, saved)
        for name, saved_name in zip(mine.get("param_names", ()), saved.get("param_names", ())):  # noqa: B905
            if canonical_name(name) != canonical_name(saved_name):
                fail(op, "state_dict", f"parameters in the same order ({name!r} here)", repr(saved_name))
    check_streams(op, theirs)


def plan(op: str, groups: list[dict[str, Any]]) -> list[Bucket]:
    """The buckets of a step.  Parameters with ``requires_grad=False`` are in none.

    Built anew at each step (about a microsecond a parameter), because dtype, device, requires_grad and the groups may
    all change between steps; everything that would make a step fail half-way is checked here.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    for at, group in enumerate(groups):
        check_hyperparameters(op, group)
        for i, (param, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            if not takes_part(group, param):
                continue
            label = label_of(group, i)
            check_param(op, group, param, label)
            if param.numel():
                key = (at, param.device, param.dtype, engine_of(param) is None)
                if (bucket := buckets.get(key)) is None:
                    bucket = Bucket(group, param.device, param.dtype, eps=group["eps"], dist=group["dist"])
                    buckets[key] = bucket
                bucket.params.append(param)
                bucket.streams.append(stream)
                bucket.names.append(label)
    if not buckets:
        fail(op, "params", "at least one parameter with requires_grad=True and an element", "none")
    held = [p for b in buckets.values() for p in b.params if engine_of(p) is None]
    check_overlap(op, {"params": locals_of(held)}, {})
    return list(buckets.values())
