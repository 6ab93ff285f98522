"""What an optimizer says of itself, and of parts that are none."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

import torch

from ..checks import fail
from .directions.direction import Direction
from .estimators import Estimator
from .roles import OptimizerView
from .rules.rule import Rule
from .subset import Subset
from .types import Group

_PARTS: dict[str, type] = {"estimator": Estimator, "direction": Direction, "rule": Rule, "subset": Subset}
#: Examples for who writes a name in the place of a part.
_EXAMPLES = {
    "estimator": "TwoSided(directions=4)",
    "direction": "KeptRight(rank=4) for low rank or MagnitudeMask(0.1)",
    "rule": "SGD()",
    "subset": "LayerSkip(skipped=0.75)",
}

#: What the names of this package's modules begin with, whatever it is called.
_PACKAGE = __name__.partition(".step.")[0] + "."


def check_parts(op: str, **parts: object) -> None:
    """Each part is an instance of its class; a subset may be None."""
    for argument, value in parts.items():
        kind = _PARTS[argument]
        if isinstance(value, kind) or (value is None and argument == "subset"):
            continue
        if isinstance(value, type) and issubclass(value, kind):
            expected, got = f"an instance: {value.__name__}(...)", f"the class {value.__name__}"
        else:
            expected, got = f"one such as {_example(argument, kind, value)} of zokernels.optim", repr(value)
        fail(op, argument, expected, got, TypeError)


def _example(argument: str, kind: type, value: object) -> str:
    """The class that a text seems to mean; else the usual example."""
    if isinstance(value, str):
        plain = {name.lower(): name for name in _names(kind)}
        if near := difflib.get_close_matches(value.lower().replace("-", "").replace("_", ""), plain, 1, 0.75):
            return f"{plain[near[0]]}(...)"
    return _EXAMPLES[argument]


def _names(kind: type) -> Iterator[str]:
    below: type
    for below in kind.__subclasses__():
        if below.__module__.startswith(_PACKAGE) and below.__name__[0] != "_" and not below.__subclasses__():
            yield below.__name__
        yield from _names(below)


def describe(optimizer: OptimizerView) -> str:
    """Parts, seed and groups, a line each; no line is longer for a larger model."""
    direction = optimizer.direction
    step = optimizer.step_count if not optimizer.run_state.capturable else "on the device"
    points = len(optimizer.estimator.points())  # members of a population, both sides of each direction
    lines = [
        f"{optimizer.op} (",
        f"  estimator: {brief(optimizer.estimator)}, {points} point{'s' * (points > 1)} a step",
        f"  direction: {brief(direction)}",
        f"  rule: {brief(optimizer.rule)}",
        *([f"  subset: {brief(optimizer.subset)}"] if optimizer.subset is not None else []),
        f"  restore: {optimizer.restore}",
        f"  seed: {optimizer.seed}, step: {step}",
    ]
    for number, group in enumerate(optimizer.param_groups):
        lines.append(f"Parameter group {number}: {_weights(group)}")
        own = ("params", "param_names", "streams")
        lines += [f"  {key}: {value}" for key, value in sorted(group.items()) if key not in own]
    return "\n".join([*lines, ")"])


def _weights(group: Group) -> str:
    params = group["params"]
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in params)
    frozen = sum(not p.requires_grad for p in params) if "bits" not in group else 0
    text = f"{len(params)} tensors, {sum(p.numel() for p in params):,} weights of {', '.join(dtypes)}"
    return f"{text}, {frozen} of them frozen" if frozen else text


def brief(part: object) -> str:
    """A part with its numbers; tensors, modules and tables of them by their type alone."""
    if not dataclasses.is_dataclass(part):
        own = type(part).__repr__ is not object.__repr__
        return repr(part) if own else f"{type(part).__name__}()"
    fields = [f for f in dataclasses.fields(part) if f.repr and not f.name.startswith("_")]
    values = [f"{f.name}={_value(getattr(part, f.name))}" for f in fields]
    return f"{type(part).__name__}({', '.join(values)})"


def _value(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    if plain or (isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)):
        return repr(value)
    return f"<{type(value).__name__}>"
