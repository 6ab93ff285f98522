"""Turns an optimizer into the header of its log, and a header into an optimizer."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from ..contract import CONTRACT, canonical_name
from ..step import candidates
from ..step.directions import covariance, integers, low_rank, masks, sampled, scaling, spaces, summed
from ..step.directions.direction import Direction
from ..step.estimators import Estimator
from ..step.groups import takes_part
from ..step.roles import OptimizerView, home_of
from ..step.rules import cone, factors, feedback, sgd, stateful, window
from ..step.rules import covariance as covariance_rules
from ..step.rules import sampled as sampled_rules
from ..step.rules import spaces as spaces_rules
from ..step.rules.rule import Rule
from ..step.shard import whole_of
from ..step.step import StepOptimizer
from ..step.subset import LAYERS, Subset
from ..version import __version__
from .format import canonical

#: A rank that a log may name whatever the sizes of the matrices.  A larger one is at most the smaller side of
#: one of them.
_RANK_OF_ANY = 16

#: How many bytes are hashed at a time.
_PIECE = 1 << 24

#: Where the classes are defined that a log may name.  They are imported here because a process that only
#: replays (``zokernels replay``) imports no optimizer, and a class is found among the subclasses that exist
#: (:func:`_kinds`).
PART_MODULES = (
    *(candidates, covariance, integers, low_rank, masks, sampled, scaling, spaces, summed),
    *(cone, covariance_rules, factors, feedback, sampled_rules, sgd, spaces_rules, stateful, window),
)

_PARTS = {"estimator": Estimator, "rule": Rule, "direction": Direction, "subset": Subset}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """The SHA-256 of the elements' bytes, as ``dtype``, in the memory order of little-endian machines."""
    state = hashlib.sha256()
    flat = whole_of(home_of(tensor).value(tensor)).detach().contiguous().view(-1)
    step = max(1, _PIECE // flat.element_size())
    for piece in flat.split(step) if flat.numel() else ():
        piece = piece.to("cpu", dtype or piece.dtype)
        state.update((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr()))
    return state.hexdigest()


# Parts ------------------------------------------------------------------------------------------------------


def _arguments(kind: type) -> list[str]:
    if kind.__init__ is object.__init__:  # type: ignore[misc]  # compared, not called
        return []
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(kind).parameters.items() if p.kind not in various]


def _plain(value: object) -> Any:
    """``value`` as JSON can hold it.  What it cannot hold is there by its digest."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Mapping):  # a mask or a size of the caller's own for each parameter
        state = hashlib.sha256()
        for key in sorted(value, key=str):
            if not isinstance(key, str):
                fail("trajectory", "direction", "masks by parameter name", f"a key of {type(key).__name__}")
            own = torch.as_tensor(value[key])
            state.update(f"{key} {own.dtype} {tuple(own.shape)} {digest(own)}\n".encode())
        return state.hexdigest()
    return list(value) if isinstance(value, tuple) else value


def describe(part: object) -> dict[str, Any] | None:
    """A part of an optimizer as its class and the arguments of its constructor."""
    if part is None:
        return None
    own, defaults = vars(part), getattr(part, "defaults", {})
    values = {name: _plain(own[name] if name in own else defaults[name]) for name in _arguments(type(part))}
    return {"class": _label(type(part)), **values}


def _label(kind: type) -> str:
    """The name of a class in a log.

    A caller's own class never stands for the package's class of the same name.
    """
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    name: str = vars(kind).get("log_name", kind.__name__)
    return name if own else f"custom:{name}"


def _kinds(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


def _known(argument: str) -> dict[str, type[Any]]:
    """The kinds of a part that a log may name, by the name that it has there."""
    return {_label(kind): kind for kind in _kinds(_PARTS[argument]) if not kind.__name__.startswith("_")}


def spoken(value: object) -> str:
    """A part as a log describes it, in the words of ``print(optimizer)``; any other value as it is."""
    if not isinstance(value, Mapping) or "class" not in value:
        return str(value)
    if value["class"] == Direction.__name__:
        return str(Direction())
    arguments = ", ".join(f"{name}={each!r}" for name, each in value.items() if name != "class")
    return f"{value['class']}({arguments})"


def _completed(argument: str, described: dict[str, Any] | None) -> dict[str, Any] | None:
    """``described`` with the arguments that its class has got since the log was written, at their defaults.

    A part's defaults are what it did before it had the argument, so an old log keeps its meaning.
    """
    kind = _known(argument).get(described["class"]) if described else None
    if described is None or kind is None:
        return described
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    missing = [name for name in _arguments(kind) if name not in described]
    given = {
        name: _plain(defaults[name]) for name in missing if defaults[name] is not inspect.Parameter.empty
    }
    return {**described, **given}


def _rebuild(argument: str, described: dict[str, Any] | None, given: object) -> Any:
    """The part that :func:`describe` saw; or ``given``, where the caller has it."""
    described = _completed(argument, described)
    if given is not None:
        if describe(given) != described:
            fail("replay_", argument, f"the one of the log, {spoken(described)}", spoken(describe(given)))
        return given
    if described is None:
        return None
    arguments = dict(described)
    name = arguments.pop("class")
    kinds = _known(argument)
    if name not in kinds or sorted(_arguments(kinds[name])) != sorted(arguments):
        fail("replay_", argument, f"a known kind of {argument} with its arguments", str(described)[:200])
    own = "masks" in arguments or arguments.get("sizes") is not None
    if own or arguments.get("layers", LAYERS) != LAYERS:
        # Masks and sizes are not in the log, and a regular expression from elsewhere could run for ever.
        fail(
            "replay_",
            argument,
            f"{argument}=... as in the run (the log has not all of it)",
            str(described)[:200],
        )
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    if "state_dtype" in values:
        values["state_dtype"] = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            values["state_dtype"]
        )
    try:
        return kinds[name](**values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        fail("replay_", argument, "valid settings", str(error)[:200])


# Optimizer to header ----------------------------------------------------------------------------------------


def _parameter(group: dict[str, Any], index: int) -> dict[str, Any]:
    p, names = group["params"][index], group.get("param_names")
    return {
        "name": canonical_name(names[index]) if names else None,
        "stream": group["streams"][index],
        "shape": list(p.shape),
        "dtype": dtype_name(p.dtype),
    }


def option_keys(optimizer: OptimizerView, group: dict[str, Any]) -> list[str]:
    """The keys of a group's own settings, without those that torch or a scheduler adds."""
    return [
        key for key in (*optimizer.defaults, "bits") if key in group and key not in ("lr", "differentiable")
    ]


def settings(optimizer: OptimizerView) -> tuple[Any, ...]:
    """What must stay as it is while a log is written.  It is quick to make and to compare."""
    return tuple(
        (
            tuple(group[key] for key in option_keys(optimizer, group)),
            isinstance(group["lr"], Tensor),
            tuple(group["streams"]),
            tuple(takes_part(group, p) for p in group["params"]),
        )
        for group in optimizer.param_groups
    )


def header_of(optimizer: OptimizerView, base: bool = True) -> dict[str, Any]:
    """The header of a log that begins now.  ``base``: include the digests of the weights."""
    groups = []
    for group in optimizer.param_groups:
        params = [_parameter(group, i) for i in range(len(group["params"]))]
        for entry, p in zip(params, group["params"], strict=True):
            entry["sha256"] = digest(p) if base and takes_part(group, p) else None
        options = {key: _plain(group[key]) for key in option_keys(optimizer, group)}
        groups.append({"options": options, "lr_is_tensor": isinstance(group["lr"], Tensor), "params": params})
    rule, estimator = optimizer.rule, optimizer.estimator
    devices = {p.device.type for g in optimizer.param_groups for p in g["params"] if takes_part(g, p)}
    return {
        "contract": CONTRACT,
        "created_by": f"zokernels {__version__}",
        "optimizer": optimizer.op,
        "seed": optimizer.seed,
        "start": optimizer.step_count,
        "restore": optimizer.restore,
        **({"cohort": optimizer.members_at_once} if optimizer.restore == "products" else {}),
        "gated": devices != {"cpu"},
        "losses": len(estimator.points()) if rule.reads_losses else 0,
        **{argument: describe(getattr(optimizer, argument)) for argument in _PARTS},
        **({"part": True} if optimizer.part else {}),
        "groups": groups,
    }


def whole_header(optimizer: OptimizerView, base: bool = True) -> dict[str, Any]:
    """:func:`header_of` all stages of a pipeline together.

    Each group has the parameters of the first stage, and then those that the next stages add.  All ranks call
    this together.
    """
    header, team = header_of(optimizer, base), optimizer.team
    if team.stages == 1:
        return header
    stages = dict(sorted(zip(team.stage_of, team.all_gather_object(header), strict=True), key=lambda s: s[0]))
    for i, group in enumerate(header["groups"]):
        params = {p["name"]: p for stage in reversed(stages.values()) for p in stage["groups"][i]["params"]}
        order = dict.fromkeys(p["name"] for stage in stages.values() for p in stage["groups"][i]["params"])
        group["params"] = [params[name] for name in order]
    return header


def own_part(optimizer: OptimizerView, header: dict[str, Any]) -> dict[str, Any]:
    """``header`` with the parameters that are here: in a pipeline's log, those of this stage."""
    if optimizer.team.stages == 1:
        return header
    groups = []
    for group, ours in zip(header["groups"], optimizer.param_groups, strict=True):
        params = {p["name"]: p for p in group["params"]}
        groups.append(
            {**group, "params": [params[canonical_name(name)] for name in ours.get("param_names", ())]}
        )
    return {**header, "groups": groups}


def check_same_run(optimizer: OptimizerView, header: dict[str, Any]) -> None:
    """Raises where ``optimizer`` differs from the log's in more than step, learning rates and weights."""
    ours = json.loads(canonical(whole_header(optimizer, base=False)))
    parts = {argument: _completed(argument, header[argument]) for argument in _PARTS}
    theirs = {
        **header,
        **parts,
        "groups": [dict(g, params=[dict(p) for p in g["params"]]) for g in header["groups"]],
    }
    for group in theirs["groups"]:
        for p in group["params"]:
            p["sha256"] = None
    has_names = lambda each: any(p["name"] is not None for g in each["groups"] for p in g["params"])
    if has_names(theirs) and not has_names(ours):
        expected = "model.named_parameters(), because the log has names"
        fail("trajectory", "resume: params", expected, "parameters without names")
    streams = [[[p["stream"] for p in g["params"]] for g in each["groups"]] for each in (ours, theirs)]
    if streams[0] != streams[1] and list(map(len, streams[0])) == list(map(len, streams[1])):
        where = "'stream' of each parameter in read(path).header['groups'], as 'streams' of each group"
        fail("trajectory", "resume: streams", f"those of the log ({where})", "others, which draw other noise")
    for key in sorted(
        theirs, key=lambda key: key == "groups"
    ):  # first what groups depend on, such as the rule
        if key not in ("created_by", "start", "gated", "cohort") and ours.get(key) != theirs[key]:
            where, their, our = key, theirs[key], ours.get(key)
            if key == "groups":
                where, their, our = _first_difference(key, their, our)
            expected = f"that of the log, {spoken(their)[:200]}"
            fail("trajectory", f"resume: {where}", expected, spoken(our)[:200])
    for recorded, group in zip(own_part(optimizer, header)["groups"], optimizer.param_groups, strict=True):
        for i, (p, param) in enumerate(zip(recorded["params"], group["params"], strict=True)):
            if (trained := p["sha256"] is not None) != takes_part(group, param):
                which = f"resume: params: {p['name'] or i}"
                if trained:
                    expected = (
                        "requires_grad=True, as in the log (peft: from_pretrained(..., is_trainable=True))"
                    )
                    fail("trajectory", which, expected, "a frozen parameter")
                fail("trajectory", which, "a frozen parameter, as in the log", "one that is trained")


def _first_difference(where: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first place at which two values of JSON differ, and what they have there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) != b.get(key):
                return _first_difference(f"{where}: {key}", a.get(key), b.get(key))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            if one != other:
                return _first_difference(f"{where}[{i}]", one, other)
    return where, a, b


def check_base(header: dict[str, Any], tensors: Sequence[Sequence[Tensor | None]]) -> None:
    """Raises where ``tensors`` (of each group) do not hold the weights that the run began with."""
    for group, ours in zip(header["groups"], tensors, strict=True):
        for i, (p, tensor) in enumerate(zip(group["params"], ours, strict=True)):
            if p["sha256"] is None:
                continue
            assert tensor is not None  # match() found it
            if digest(tensor, getattr(torch, p["dtype"])) != p["sha256"]:
                label = p["name"] or f"parameter {i}"
                fail("trajectory", label, "the base weights of the run (SHA-256)", "other values")


# Header to optimizer ----------------------------------------------------------------------------------------


def _labels(header: dict[str, Any]) -> list[list[str | int]]:
    """The names of the parameters of each group, or their numbers where the run had no names."""
    count, labels = 0, []
    for group in header["groups"]:
        labels.append(
            [p["name"] if p["name"] is not None else count + i for i, p in enumerate(group["params"])]
        )
        count += len(group["params"])
    return labels


def match(
    header: dict[str, Any], weights: object, dtype: torch.dtype | None = None
) -> list[list[Tensor | None]]:
    """The tensors of ``weights`` that belong to each group of a log; None for an untrained parameter.

    ``weights`` are a module, a mapping or pairs by name, or tensors in the optimizer's order.  They must have
    the log's names and shapes, and its dtypes, or ``dtype``.
    """
    by_name = any(p["name"] is not None for g in header["groups"] for p in g["params"])
    items: Any
    if isinstance(weights, nn.Module):
        named = (*weights.named_parameters(), *weights.named_buffers())
        items = named if by_name else enumerate(weights.parameters())
    elif isinstance(weights, Mapping):
        items = weights.items()
    else:
        listed = list(weights)  # type: ignore[call-overload]
        items = enumerate(listed) if all(isinstance(w, Tensor) for w in listed) else listed
    found = {canonical_name(key) if isinstance(key, str) else key: tensor for key, tensor in items}
    groups, missing = [], []
    for group, labels in zip(header["groups"], _labels(header), strict=True):
        tensors: list[Tensor | None] = []
        for p, label in zip(group["params"], labels, strict=True):
            tensor = found.get(label) if p["sha256"] is not None else None
            if p["sha256"] is not None and tensor is None:
                missing.append(repr(label))
            elif tensor is not None:
                _check_tensor(label, tensor, p["shape"], p["dtype"] if dtype is None else dtype_name(dtype))
            tensors.append(tensor)
        groups.append(tensors)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        got = "none"
        if found and not by_name and not any(isinstance(key, int) for key in found):
            got = "names, which the log has not: give the tensors in the optimizer's order"
        elif len(missing) == sum(p["sha256"] is not None for g in header["groups"] for p in g["params"]):
            got = "not one of them: they are probably another model's"
        expected = f"every trained parameter of the log, {', '.join(missing[:5])}{more}"
        fail("replay_", "weights", expected, got)
    return groups


def _check_tensor(label: str | int, tensor: Tensor, shape: list[int], dtype: str) -> None:
    if list(tensor.shape) != shape:
        fail("replay_", str(label), f"shape {tuple(shape)}", tuple(tensor.shape))
    if dtype_name(tensor.dtype) != dtype:
        fail("replay_", str(label), f"dtype {dtype}", dtype_name(tensor.dtype))


def optimizer_of(
    header: dict[str, Any], tensors: Sequence[Sequence[Tensor | None]], restore: str, **given: object
) -> StepOptimizer:
    """The optimizer of the run, over ``tensors``.  Parameters that were not trained are empty ones.

    ``given``: parts (direction, subset) that a log cannot hold.
    """
    parts = {argument: _rebuild(argument, header[argument], given.get(argument)) for argument in _PARTS}
    groups = []
    for group, ours, labels in zip(header["groups"], tensors, _labels(header), strict=True):
        alias = lambda t: t.detach().requires_grad_(t.is_floating_point())
        params = [torch.empty(0, dtype=torch.uint8) if t is None else alias(t) for t in ours]
        lr = torch.zeros((), dtype=torch.float64) if group["lr_is_tensor"] else 0.0
        streams = [p["stream"] for p in group["params"]]
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in group["options"].items()}
        named = all(isinstance(label, str) for label in labels)
        groups.append({**options, "params": list(zip(labels, params, strict=True)) if named else params,
                       "lr": lr, "streams": streams})  # fmt: skip
    try:
        # A replay runs no forwards, and of "products" nothing but those is different.
        restore = "exact" if restore == "products" else restore
        optimizer = StepOptimizer(groups, {"lr": 0.0}, seed=header["seed"], restore=restore, **parts)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        fail("replay_", "log", "valid settings", str(error)[:200])
    for i, (group, made) in enumerate(zip(header["groups"], optimizer.param_groups, strict=True)):
        if (expected := sorted(option_keys(optimizer, made))) != sorted(group["options"]):
            fail(
                "replay_",
                f"log: groups[{i}]",
                f"the settings {expected}",
                str(sorted(group["options"]))[:200],
            )
    if given.get("direction") is None:
        _check_rank(optimizer.direction, [t for ours in tensors for t in ours if t is not None])
    optimizer.run_state.load(header["seed"], header["start"], 0)
    return optimizer


def _check_rank(direction: Direction, trained: Sequence[Tensor]) -> None:
    """Raises where factors of the rank that a log names could be much larger than the weights."""
    if isinstance(direction, low_rank.LowRank):
        sides = [min(shape) for t in trained if t.numel() and (shape := direction.matrix(t)) is not None]
        if direction.rank > (most := max([_RANK_OF_ANY, *sides])):
            expected = f"at most {most}, as the matrices are (or direction=... as in the run)"
            fail("replay_", "log: direction.rank", expected, direction.rank)


def is_sgd(header: dict[str, Any]) -> bool:
    """Whether the run is a sum of dense noise: theta <- decay theta + sum_k c_k z_k."""
    return header["rule"]["class"] in ("SGD", "Conservative") and header["direction"]["class"] == "Direction"
