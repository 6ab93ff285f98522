"""The arguments that optimizers share, by name and type, and how a wrong one is refused.

Each class names its own arguments, and says of the rest which of these tables they are from
(``**options: Unpack[Options]``).  A type checker reads the table.  :class:`Described` makes of it the
signature that ``help()`` and completion show, with the defaults of the base class that has them.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import TypedDict

from ..checks import fail, fail_unknown
from ..distributed.exchange import Exchange
from ..ops.arguments import Dist, Rounding
from ..step.directions.direction import Direction
from ..step.estimators import Estimator
from ..step.groups import Restore
from ..step.rules.rule import Rule
from ..step.subset import Subset

T = TypeVar("T")

#: How the losses of a step are compared.
Sides = Literal["two-sided", "one-sided"]


class Common(TypedDict, total=False):
    """What every optimizer takes; :class:`zokernels.optim.ZerothOrder` says what each means."""

    weight_decay: float
    seed: int
    rounding: Rounding
    restore: Restore
    capturable: bool
    scratch: int | None
    cohort: int | None
    trajectory: str | os.PathLike[str] | None
    resume: bool
    mesh: DeviceMesh | Exchange | None
    first_order: torch.optim.Optimizer | None
    first_order_closure: Callable[[], Tensor] | None


class WithDist(TypedDict, total=False):
    dist: Dist


class WithClip(TypedDict, total=False):
    clip: float | None


class WithDirection(TypedDict, total=False):
    direction: Direction | None


class WithSubset(TypedDict, total=False):
    subset: Subset | None


class Options(WithDirection, WithSubset, WithDist, WithClip, Common, total=False):
    """The arguments of most optimizers."""


class OptionsButDirection(WithSubset, WithDist, WithClip, Common, total=False):
    """The arguments of classes that choose the direction themselves."""


class OptionsButDist(WithDirection, WithSubset, WithClip, Common, total=False):
    """The arguments of classes that name ``dist`` themselves, because its default is another there."""


class OptionsButClip(WithDirection, WithSubset, WithDist, Common, total=False):
    """The arguments of classes that name ``clip`` themselves, because its default is another there."""


class OfSGD(TypedDict, total=False):
    """The arguments that :class:`zokernels.optim.ZOSGD` has and not all optimizers."""

    directions: int
    estimator: Sides
    momentum: float
    dampening: float
    l2: float
    window: int | None
    state_dtype: torch.dtype


class SGDButDirection(OfSGD, OptionsButDirection, total=False):
    """The arguments of a ZOSGD that chooses the direction itself."""


class SGDButSubset(OfSGD, WithDirection, WithDist, WithClip, Common, total=False):
    """The arguments of a ZOSGD that chooses the subset itself."""


#: Names that arguments have in other libraries, and ours for them.
_ELSEWHERE = {
    "learning_rate": "lr",
    "zo_eps": "eps",
    "mu": "eps",
    "sigma": "eps",
    "perturbation_scale": "eps",
    "epsilon": "eps",
    "wd": "weight_decay",
    "random_seed": "seed",
    "r": "rank",
}
#: Arguments of other libraries that mean something else than ours: what to give, in words.
_INSTEAD = {"sparsity": ("density", "density = 1 - sparsity")}
#: How many perturbations a step has, of which each class has one name ...
_COUNTS = ("directions", "population", "candidates", "probes")
#: ... and other libraries have many.
_OF_COUNTS = (
    *("n", "N", "k", "K", "q", "num_directions", "num_perturbations", "n_perturbations", "num_samples"),
    *("population_size", "pop_size", "popsize", "num_candidates"),
    *_COUNTS,
)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _whole_signature(kind: type) -> inspect.Signature:
    """The constructor's, with every argument by name in the place of ``**options``."""
    init: Any = next(vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base))
    _, *parameters = inspect.signature(init).parameters.values()  # without self
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        rest = parameters.pop()
        text = str(rest.annotation)
        if text.startswith("Unpack["):
            table = init.__globals__[text.removeprefix("Unpack[").removesuffix("]")]
            found = (next(_inherited(kind, name)) for name in table.__annotations__)
            parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]
        else:  # a class of the user's that takes anything
            parameters.append(rest)
    return inspect.Signature(parameters)


def _inherited(kind: type, name: str) -> Iterator[inspect.Parameter]:
    """The parameter ``name`` of every base that names it, the nearest first."""
    for base in kind.__mro__:
        if "__init__" in vars(base):
            found = inspect.signature(vars(base)["__init__"]).parameters.get(name)
            if found is not None and found.kind in _NAMED:
                yield found


#: An argument of a docstring and the first sentence that tells it.
_ARGUMENT = re.compile(r"^ {4}(\w[\w, ]*): (.+?(?:\.(?=\s)|(?=\n {0,4}\S)|\Z))", re.MULTILINE | re.DOTALL)


def _taken_over(kind: type) -> dict[str, str]:
    """The arguments that a class does not tell in its own docstring, in the first sentence of its base's."""
    own, *bases = [dict(_ARGUMENT.findall(inspect.cleandoc(base.__doc__ or ""))) for base in kind.__mro__]
    told = {name for names in own for name in names.split(", ")}
    found = {}
    for name in _whole_signature(kind).parameters:
        if name not in told:
            texts = (text for base in bases for names, text in base.items() if name in names.split(", "))
            if text := next(texts, None):
                found[name] = " ".join(text.split())
    return found


class Described(type):
    """The class of optimizer classes: arguments are refused under the name of the class that was called.

    An argument that a class does not have is refused with the nearest one that it has.  What a part refuses
    that the class makes of its arguments (``LOZO`` a :class:`KeptRight`) is told as the class's own.

    The docstring of a class ends with a sentence for each argument that it takes over from a base class and
    does not tell itself, so that help() and editors show all of them in one place.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        if cls.__doc__ and (shared := _taken_over(cls)):
            lay = functools.partial(
                textwrap.fill, width=110, initial_indent=" " * 4, subsequent_indent=" " * 8
            )
            more = "\n".join(lay(f"{argument}: {text}") for argument, text in shared.items())
            title = "The other arguments, of which ZerothOrder says more:"
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{title}\n{more}\n"

    @property
    def __signature__(cls) -> inspect.Signature:
        """What ``inspect.signature`` and ``help`` show of a class."""
        return _whole_signature(cls)

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        _refuse_unknown(cls, kwargs)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc, no-any-return]
        except (TypeError, ValueError) as error:
            _rename(error, cls)
            raise


def _refuse_unknown(kind: type, given: Iterable[str]) -> None:
    known = inspect.signature(kind).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    for name in given:
        if name in known:
            continue
        op = kind.__name__
        if any(True for _ in _inherited(kind, name)):
            fail(op, name, f"nothing, because {op} sets it itself", "a value", TypeError)
        own, instead = _INSTEAD.get(name, ("", ""))
        if own in known:
            fail(op, name, instead, "an argument that it does not have", TypeError)
        count = next((count for count in _COUNTS if count in known), None)
        elsewhere = _ELSEWHERE if count is None else {**dict.fromkeys(_OF_COUNTS, count), **_ELSEWHERE}
        fail_unknown(op, name, known, elsewhere)


def _parts(*kinds: type) -> Iterator[type]:
    for kind in kinds:
        yield kind
        yield from _parts(*kind.__subclasses__())


def _rename(error: Exception, kind: type) -> None:
    """Tells an error of a part that ``kind`` made of its arguments as one of ``kind``."""
    part, colon, rest = str(error).partition(": ")
    argument, second, text = rest.partition(": ")
    if not (colon and second) or part == kind.__name__:
        return
    if part in {k.__name__ for k in _parts(Estimator, Direction, Rule, Subset)}:
        spelled = getattr(kind, "spelled", {})
        name = ", ".join(spelled.get(word, word) for word in argument.split(", "))
        error.args = (f"{kind.__name__}: {name}: {text}", *error.args[1:])
