"""The parts of an optimizer as the header of a log describes them, and parts made of such a description."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..step import candidates
from ..step.directions import covariance, integers, low_rank, masks, sampled, scaling, spaces, summed
from ..step.directions.direction import Direction
from ..step.estimators import Estimator
from ..step.rules import cone, factors, feedback, sgd, stateful, window
from ..step.rules import covariance as covariance_rules
from ..step.rules import sampled as sampled_rules
from ..step.rules import spaces as spaces_rules
from ..step.rules.rule import Rule
from ..step.subset import LAYERS, Subset
from .digests import digest

#: A rank that a log may name whatever the sizes of the matrices.  A larger one is at most the smaller side of
#: one of them.
_RANK_OF_ANY = 16

#: Where the classes are defined that a log may name.  They are imported here because a process that only
#: replays (``zokernels replay``) imports no optimizer, and a class is found among the subclasses that exist
#: (:func:`_kinds`).
PART_MODULES = (
    *(candidates, covariance, integers, low_rank, masks, sampled, scaling, spaces, summed),
    *(cone, covariance_rules, factors, feedback, sampled_rules, sgd, spaces_rules, stateful, window),
)

PARTS = {"estimator": Estimator, "rule": Rule, "direction": Direction, "subset": Subset}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arguments(kind: type) -> list[str]:
    if kind.__init__ is object.__init__:  # type: ignore[misc]  # compared, not called
        return []
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(kind).parameters.items() if p.kind not in various]


def plain(value: object) -> Any:
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
    values = {name: plain(own[name] if name in own else defaults[name]) for name in _arguments(type(part))}
    return {"class": _label(type(part)), **values}


def _label(kind: type) -> str:
    """The name that a class has in a log.

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
    return {_label(kind): kind for kind in _kinds(PARTS[argument]) if not kind.__name__.startswith("_")}


def spoken(value: object) -> str:
    """A part as a log describes it, in the words of ``print(optimizer)``; any other value as it is."""
    if not isinstance(value, Mapping) or "class" not in value:
        return str(value)
    if value["class"] == Direction.__name__:
        return str(Direction())
    arguments = ", ".join(f"{name}={each!r}" for name, each in value.items() if name != "class")
    return f"{value['class']}({arguments})"


def completed(argument: str, described: dict[str, Any] | None) -> dict[str, Any] | None:
    """``described`` with the arguments that its class has got since the log was written, at their defaults.

    A part's defaults are what it did before it had the argument, so an old log keeps its meaning.
    """
    kind = _known(argument).get(described["class"]) if described else None
    if described is None or kind is None:
        return described
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    missing = [name for name in _arguments(kind) if name not in described]
    given = {name: plain(defaults[name]) for name in missing if defaults[name] is not inspect.Parameter.empty}
    return {**described, **given}


def rebuild(argument: str, described: dict[str, Any] | None, given: object) -> Any:
    """The part that :func:`describe` saw; or ``given``, where the caller has it."""
    described = completed(argument, described)
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
        expected = f"{argument}=... as in the run (the log has not all of it)"
        fail("replay_", argument, expected, str(described)[:200])
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    if "state_dtype" in values:
        values["state_dtype"] = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            values["state_dtype"]
        )
    try:
        return kinds[name](**values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        fail("replay_", argument, "valid settings", str(error)[:200])


def check_rank(direction: Direction, trained: Sequence[Tensor]) -> None:
    """Raises where factors of the rank that a log names could be much larger than the weights."""
    if isinstance(direction, low_rank.LowRank):
        sides = [min(shape) for t in trained if t.numel() and (shape := direction.matrix(t)) is not None]
        if direction.rank > (most := max([_RANK_OF_ANY, *sides])):
            expected = f"at most {most}, as the matrices are (or direction=... as in the run)"
            fail("replay_", "log: direction.rank", expected, direction.rank)
