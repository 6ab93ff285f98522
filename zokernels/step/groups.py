"""Parameter groups: what a group may hold, the stream of each parameter, and the buckets of a step."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..checks import (
    DTYPES,
    check_choice,
    check_dist,
    check_number,
    check_overlap,
    check_stream,
    fail,
    is_integer,
)
from ..contract import STREAM_BITS, canonical_name, streams_of
from ..functional import Plan
from ..ops.plan import fingerprint, matches
from ..transfer import has_values
from .roles import Home, common_home, home_of, last_move
from .shard import is_sharded, local_of, locals_of
from .types import Bucket, Group

ROUNDINGS = ("stochastic", "nearest")
#: How the weights come back after the forwards of a step.
Restore = Literal["exact", "inplace", "products"]
RESTORES = get_args(Restore)
#: The largest number of fp32, in which kernels take the numbers of a step.
_LARGEST = torch.finfo(torch.float32).max


def check_hyperparameters(op: str, group: Group) -> None:
    """Checks values that are on the host.

    A learning rate that is a tensor is never read back from its device.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        check_number(op, "lr", lr)
    elif lr.numel() != 1 or not lr.is_floating_point():
        fail(op, "lr", "a number or a floating-point tensor of one element", f"{lr.dtype} x {lr.numel()}")
    check_number(op, "eps", group["eps"], positive=True, most=_LARGEST)
    check_number(op, "weight_decay", group["weight_decay"])
    if group["clip"] is not None:
        check_number(op, "clip", group["clip"], positive=True, most=_LARGEST)
    check_dist(op, group["dist"])
    check_choice(op, "rounding", group["rounding"], ROUNDINGS)
    if "bits" in group and group["bits"] not in range(2, 9):
        fail(op, "bits", "an integer in [2, 8]", repr(group["bits"]))


def takes_part(group: Group, param: Tensor) -> bool:
    """Whether a parameter is trained.  Integers, in a group with ``bits``, never require a gradient."""
    return param.requires_grad or "bits" in group


def devices_of(groups: list[Group]) -> list[torch.device]:
    """The devices of the trained parameters, each once, in the order of the parameters."""
    return list(
        dict.fromkeys(p.device for g in groups for p in g["params"] if takes_part(g, p) and p.numel())
    )


def label_of(group: Group, index: int) -> str:
    """The name of a parameter for messages: the quoted name, or its place in the group."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"params[{index}]"


def check_param(op: str, group: Group, param: Tensor, label: str) -> None:
    """A trained parameter must be dense memory that a kernel can walk in logical order."""
    if torch.nn.parameter.is_lazy(param):
        fail(op, label, "an initialized parameter", "a lazy one; run the model once before", TypeError)
    if is_sharded(param):
        if "bits" in group:
            fail(op, label, "a plain tensor of integers", "a DTensor", TypeError)
        param = local_of(param)
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        fail(op, label, "a plain dense tensor", f"the tensor subclass {type(param).__name__}", TypeError)
    if not has_values(param):
        where = "one on meta, as accelerate's offload leaves it (zokernels.offload.stream streams a model)"
        fail(op, label, "a parameter with memory", where)
    if "bits" in group:
        if param.dtype is not torch.int8 and (param.dtype is not torch.uint8 or group["bits"] != 4):
            expected = "dtype int8, or uint8 that packs two integers of 4 bits (bits=4)"
            fail(op, label, expected, param.dtype, TypeError)
    elif param.dtype not in DTYPES:
        fail(op, label, "dtype float32, bfloat16 or float16 (or requires_grad=False)", param.dtype, TypeError)
    if not home_of(param).in_memory:
        return  # what is here is a placeholder, whose strides say nothing
    if param.layout is not torch.strided or not param.is_contiguous():
        got = f"strides {param.stride()}" if param.layout is torch.strided else param.layout
        fail(op, label, "a contiguous tensor", f"shape {tuple(param.shape)}, {got}")


def listed(op: str, params: ParamsT) -> ParamsT:
    """``params``, a generator as a list.  Raises ValueError where nothing is in it, TypeError for a model."""
    is_model = isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList)
    if is_model or isinstance(params, dict):
        got = f"the whole {type(params).__name__}"
        fail(op, "params", "the model's parameters (model.named_parameters())", got, TypeError)
    if isinstance(params, (Tensor, set)):  # torch says what is wrong with them
        return params
    found: list[Any] = list(params)
    if not found:
        got = "a generator that gave none (it was used up before, or all parameters are frozen)"
        got = "none" if isinstance(params, (list, tuple)) else got
        fail(op, "params", "parameters (model.named_parameters())", got)
    return found


def check_keys(op: str, group: Group, known: Iterable[str]) -> None:
    """Raises TypeError for a key of a group that looks like one of the ``known`` hyper-parameters.

    torch lets groups have keys of the user's own, so others are taken.
    """
    for name in group:
        if name in known or name in ("params", "param_names", "streams", "bits"):
            continue
        if near := difflib.get_close_matches(name, known, 1, 0.65):
            expected = f"{near[0]!r}, the nearest of its hyper-parameters"
            fail(op, f"params: a group's {name!r}", expected, "one that it does not have", TypeError)


def name_empty_groups(groups: list[Group], added: Group) -> None:
    """Lets groups without parameters count as named where the other groups are named.

    A stage of a pipeline may have such groups, and torch refuses a mixture of named and unnamed ones.
    ``added`` is about to be added to ``groups``.
    """
    params = added["params"]
    if isinstance(params, (Tensor, set)):
        return
    added["params"] = params = list(params)
    if any("param_names" in group for group in groups) and not params:
        added["param_names"] = []
    elif params and isinstance(params[0], tuple):
        for group in groups:
            if not group["params"]:
                group["param_names"] = []


def check_new_group(op: str, groups: list[Group]) -> None:
    """Checks that the last of ``groups`` can join the others, and gives it its streams."""
    group = groups[-1]
    first: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        if (other := first.setdefault(id(param), i)) != i:
            expected = "each parameter once (tied ones are one parameter)"
            fail(op, "params", expected, f"one as {label_of(group, other)} and as {label_of(group, i)}")
    for i, param in enumerate(group["params"]):
        if takes_part(group, param):
            check_param(op, group, param, label_of(group, i))
    assign_streams(op, groups)


def assign_streams(op: str, groups: list[Group]) -> None:
    """Gives the last of ``groups`` its ``streams``, which no parameter of any group shares with another.

    Streams that the caller gave stay.  A named parameter gets the hash of its name, so that its noise does
    not depend on the order of the parameters; an unnamed one gets its number in the optimizer.
    """
    group = groups[-1]
    count, names, explicit = len(group["params"]), group.get("param_names"), group.get("streams")
    if explicit is not None:
        if len(explicit) != count:
            fail(op, "streams", f"{count} integers, one for each parameter of the group", len(explicit))
        for i, stream in enumerate(explicit):
            if isinstance(stream, bool):
                fail(op, f"streams[{i}]", "an integer", repr(stream), TypeError)
            check_stream(op, f"streams[{i}]", stream)
        group["streams"] = list(explicit)
    elif names is not None:
        group["streams"] = streams_of(names)
    else:
        first = sum(len(g["params"]) for g in groups[:-1])
        group["streams"] = list(range(first, first + count))
    check_streams(op, groups)


def check_streams(op: str, groups: list[Group]) -> None:
    owner: dict[int, str] = {}
    for at, group in enumerate(groups):
        count = len(group["params"])
        for key, what in (("streams", "integers"), ("param_names", "names")):
            if key in group and len(group[key]) != count:
                expected = f"{count} {what}, one for each of its 'params' (add_param_group makes them)"
                fail(op, f"param_groups[{at}][{key!r}]", expected, len(group[key]))
        for i, stream in enumerate(group["streams"]):
            label = f"{label_of(group, i)} of group {at}"
            if stream in owner:
                fail(
                    op,
                    "streams",
                    "one stream for each parameter",
                    f"{stream} for both {owner[stream]} and {label}",
                )
            owner[stream] = label


#: What a group of a ``state_dict`` has of each parameter.
_LISTS: dict[str, Callable[[Any], bool]] = {
    "params": lambda v: is_integer(v, 0) or isinstance(v, str),
    "streams": lambda v: is_integer(v, 0, 2**STREAM_BITS - 1),
    "param_names": lambda v: isinstance(v, str),
}


def check_groups(op: str, ours: list[Group], saved: list[Group]) -> None:
    """Checks that ``saved`` groups can take the place of ``ours``.  torch itself compares their numbers."""
    for at, (group, other) in enumerate(zip(ours, saved)):  # noqa: B905
        check_hyperparameters(op, other)
        for key, is_valid in _LISTS.items():
            found = other.get(key, ())
            if not isinstance(found, (list, tuple)) or not all(map(is_valid, found)):
                fail(op, f"state_dict: param_groups[{at}][{key!r}]", "a list of them", repr(found)[:200])
        for name, saved_name in zip(group.get("param_names", ()), other.get("param_names", ())):  # noqa: B905
            if canonical_name(name) != canonical_name(saved_name):
                fail(op, "state_dict", f"parameters in the same order ({name!r} here)", repr(saved_name))
    check_streams(op, saved)


@contextmanager
def without_strangers(state: dict[Any, Any], groups: list[Group]) -> Iterator[None]:
    """Inside, ``state`` lacks the parameters that no group has: torch's ``state_dict`` would fail on them.

    They have theirs again afterwards, for a group that comes back.
    """
    here = {id(p) for group in groups for p in group["params"]}
    strangers = {p: state.pop(p) for p in list(state) if isinstance(p, Tensor) and id(p) not in here}
    try:
        yield
    finally:
        state.update(strangers)


@contextmanager
def own_rates(groups: list[Group]) -> Iterator[None]:
    """Inside, the steps of a log may set the learning rates of ``groups``; afterwards they are as before."""
    rates = [group["lr"] for group in groups]
    try:
        yield
    finally:
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr


def plan(op: str, groups: list[Group]) -> list[Bucket]:
    """The buckets of a step.  Parameters with ``requires_grad=False`` are in none.

    Whatever would make a step fail half-way raises here.
    """
    return [bucket for _, bucket in _numbered(op, groups)]


def _numbered(op: str, groups: list[Group]) -> list[tuple[int, Bucket]]:
    """The buckets, each with the number of its group."""
    buckets: dict[tuple[Any, ...], Bucket] = {}
    check_streams(op, groups)  # groups may have been edited by hand
    for at, group in enumerate(groups):
        check_hyperparameters(op, group)
        for i, (param, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            if not takes_part(group, param):
                continue
            label = label_of(group, i)
            check_param(op, group, param, label)
            if not param.numel():
                continue
            key = (at, param.device, param.dtype, home_of(param).in_memory)
            if (bucket := buckets.get(key)) is None:
                bucket = Bucket(group, param.device, param.dtype, eps=group["eps"], dist=group["dist"])
                buckets[key] = bucket
            bucket.params.append(param)
            bucket.streams.append(stream)
            bucket.names.append(label)
    if not buckets:
        frozen = sum(p.numel() > 0 for group in groups for p in group["params"])
        got = (
            f"{frozen} frozen ones (peft loads an adapter so without is_trainable=True)" if frozen else "none"
        )
        fail(op, "params", "at least one parameter with requires_grad=True and an element", got)
    in_memory = [
        (p, name)
        for b in buckets.values()
        for p, name in zip(b.params, b.names, strict=True)
        if home_of(p).in_memory
    ]
    params, labels = [p for p, _ in in_memory], [name for _, name in in_memory]
    check_overlap(op, {"params": locals_of(params)}, {}, lambda _, i: labels[i])
    return [(key[0], bucket) for key, bucket in buckets.items()]


class Planner:
    """:func:`plan` for one step after the other: buckets are kept while nothing that they depend on changes.

    dtype, device, memory and requires_grad of a parameter may change between steps, and the groups, too.  All
    of that is compared at each step, for all parameters together in about a tenth of a microsecond each."""

    def __init__(self) -> None:
        self._prints: bytes | None = None
        self._facts: tuple[Any, ...] = ()
        self._kept: list[tuple[int, Bucket]] = []
        self._buckets: list[Bucket] = []  #: of the last step
        #: The groups of the last step, their keys and their values, where none of these can change by itself.
        self._marks: list[Any] = []
        self._streams: dict[int, int] = {}  #: by id of a parameter

    def plan(
        self, op: str, groups: list[Group], home: Home, check: Callable[[str, Group], object]
    ) -> list[Bucket]:
        """The buckets of a step: the same list as long as it may be.

        ``home``: where the parameters were when the optimizer was made, or its last group added.  ``check``:
        of what else a group has.
        """
        params = tuple([group["params"] for group in groups])
        values = [*itertools.chain.from_iterable(map(dict.values, groups))]
        marks = [*groups, *itertools.chain.from_iterable(groups), *values]
        same = len(marks) == len(self._marks) and all(map(operator.is_, marks, self._marks))
        if (
            self._prints is not None
            and matches(self._prints, params, objects=True)
            and self._facts == _facts(groups)
        ):
            if same:
                for bucket in self._buckets:
                    bucket.at, bucket.ahead = {}, None
                return self._buckets
            for group in groups:
                check_hyperparameters(op, group)
        else:
            if not (now := common_home(op, groups)).in_memory and now is not home:
                expected = "parameters that stay where they were: make the optimizer after stream(model)"
                fail(op, "params", expected, "some that have been streamed since it was made", RuntimeError)
            self._check_moved(op, groups)
            self._prints = None
            self._kept = _numbered(op, groups)
            self._keep(groups, fingerprint(params, objects=True))
        for group in groups:
            check(op, group)
        self._buckets = [bucket.of(groups[at]) for at, bucket in self._kept]
        lists = sum([len(_LISTS.keys() & group.keys()) for group in groups])  # those that _facts compares
        plain = sum(map(_PLAIN.__contains__, map(type, values))) + lists == len(values)
        self._marks = marks if plain else []
        return self._buckets

    def _check_moved(self, op: str, groups: list[Group]) -> None:
        """Raises where a parameter has the place of another one, whose stream and name it would have."""
        if self._prints is None or self._facts != _facts(groups):
            return
        for group in groups:
            for i, (p, stream) in enumerate(zip(group["params"], group["streams"], strict=False)):
                if (own := self._streams.get(id(p), stream)) != stream:
                    expected = f"stream {own}, as before (streams and names have the order of the parameters)"
                    fail(op, label_of(group, i), expected, stream)

    def _keep(self, groups: list[Group], prints: bytes | None) -> None:
        """``prints`` is None where some parameters cannot be compared (shards): nothing is kept then."""
        if prints is None:
            return
        *facts, lists = _facts(groups)
        copied = [tuple([list(one) if isinstance(one, list) else one for one in each]) for each in lists]
        self._prints, self._facts = prints, (*facts, copied)
        # no other object takes the place of one
        self._alive = [p for group in groups for p in group["params"]]
        self._streams = dict(
            zip(map(id, self._alive), (s for g in groups for s in g["streams"]), strict=True)
        )
        for _, bucket in self._kept:
            bucket.plan = Plan(bucket.params, bucket.streams)


def _facts(groups: list[Group]) -> tuple[Any, ...]:
    """What buckets depend on besides the tensors; streams and names are not copied, which would read each
    of them.
    """
    lists = [(len(g["params"]), "bits" in g, g["streams"], g.get("param_names")) for g in groups]
    params = itertools.chain.from_iterable([group["params"] for group in groups])
    return last_move(), [*map(_requires_grad, params)], lists


_requires_grad: Callable[[Tensor], bool] = operator.attrgetter("requires_grad")
#: Types of hyper-parameters that do not change by themselves.
_PLAIN = frozenset((float, int, bool, str, NoneType))
