"""Parameter groups: what a group may hold, the stream of each parameter, and the buckets one combine call takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_dist, check_overlap, check_stream, fail
from ..contract import canonical_name, streams_of
from .roles import home_of
from .shard import is_sharded, local_of, locals_of
from .types import Bucket

ROUNDINGS = ("stochastic", "nearest")
RESTORES = ("exact", "inplace")


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
    if not home_of(param).in_memory:
        return  # a placeholder
    if param.layout is not torch.strided or not param.is_contiguous():
        got = f"strides {param.stride()}" if param.layout is torch.strided else param.layout
        fail(op, label, "a contiguous tensor", f"shape {tuple(param.shape)}, {got}")


def check_new_group(op: str, groups: list[dict[str, Any]]) -> None:
    """Whether the last of ``groups`` can join the others; gives it its streams."""
    group = groups[-1]
    if len({id(p) for p in group["params"]}) != len(group["params"]):
        fail(op, "params", "each parameter once (tied ones are one parameter)", "a duplicate")
    for i, param in enumerate(group["params"]):
        if takes_part(group, param):
            check_param(op, group, param, label_of(group, i))
    assign_streams(op, groups)


def name_empty_groups(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """Let groups without parameters (a pipeline's stage may have some) count as named where the others are.

    torch refuses a mixture.  ``group``: the one that is about to be added to ``groups``.
    """
    params = group["params"]
    if isinstance(params, (Tensor, set)):
        return
    group["params"] = params = list(params)
    if any("param_names" in other for other in groups) and not params:
        group["param_names"] = []
    elif params and isinstance(params[0], tuple):
        for other in groups:
            if not other["params"]:
                other["param_names"] = []


@contextmanager
def own_rates(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, the steps of a log may set the learning rates of ``groups``; afterwards they are what they were."""
    rates = [group["lr"] for group in groups]
    try:
        yield
    finally:
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr


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
    for group, saved in zip(ours, theirs):  # noqa: B905
        check_hyperparameters(op, saved)
        for name, saved_name in zip(group.get("param_names", ()), saved.get("param_names", ())):  # noqa: B905
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
                key = (at, param.device, param.dtype, home_of(param).in_memory)
                if (bucket := buckets.get(key)) is None:
                    bucket = Bucket(group, param.device, param.dtype, eps=group["eps"], dist=group["dist"])
                    buckets[key] = bucket
                bucket.params.append(param)
                bucket.streams.append(stream)
                bucket.names.append(label)
    if not buckets:
        fail(op, "params", "at least one parameter with requires_grad=True and an element", "none")
    held = [p for b in buckets.values() for p in b.params if home_of(p).in_memory]
    check_overlap(op, {"params": locals_of(held)}, {})
    return list(buckets.values())
