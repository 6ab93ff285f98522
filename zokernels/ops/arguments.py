"""Turns the arguments that users give, plain Python numbers among them, into those of the operations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..backends.terms import KEEP_ALL
from ..checks import check_call, check_stream, fail
from ..contract import seed_to_int64
from ..transfer import to_device

Dist = Literal["normal", "rademacher"]
Rounding = Literal["nearest", "stochastic"]
Tensors = Tensor | Sequence[Tensor]
Rows = Sequence[tuple[int, int] | None] | None
P = ParamSpec("P")
T = TypeVar("T")
#: The function behind an operation in place and its form out of place, so that their arguments are written
#: down once. It gets the name of the one that was called, ``out`` (None in place), and the arguments that
#: both have.
Pair = Callable[Concatenate[str, list[Tensor] | None, P], None]


def device_values(op: str, argument: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` (a tensor, number or sequence of numbers) as a 1-D tensor on ``device``, without waiting
    for it.
    """
    if isinstance(value, Tensor):
        return value.reshape(1) if value.dim() == 0 else value
    numbers: list[Any] = list(value) if isinstance(value, (list, tuple, range)) else [value]
    kind = int if dtype is torch.int64 else (int, float)
    for number in numbers:
        if not isinstance(number, kind) or isinstance(number, bool):
            expected = "integers" if dtype is torch.int64 else "numbers"
            fail(op, argument, f"{expected} or a {dtype} tensor", repr(number), TypeError)
    if dtype is torch.int64:
        numbers = [seed_to_int64(n) for n in numbers]
    if len(numbers) == 1:  # a fill kernel: no copy from pageable memory
        return torch.full((1,), numbers[0], dtype=dtype, device=device)
    return to_device(torch.tensor(numbers, dtype=dtype), device)


def seeds_of(op: str, argument: str, seeds: object, device: torch.device | str | None) -> Tensor:
    """``seeds`` as a tensor; numbers go to ``device``, by default to torch's default device."""
    if isinstance(seeds, Tensor):
        return seeds
    # A new tensor's device is torch's default, which torch.compile cannot ask for.
    target = torch.empty(0).device if device is None else torch.device(device)
    return device_values(op, argument, seeds, torch.int64, target)


class OneMemory(list[Tensor]):
    """Tensors that are parts of one memory and share its counter of versions, and that their maker alone has.

    What a call must look at in each of other tensors (address, counter) it then sees at the memory.

    Args:
        memory: all of it, as one tensor.
    """

    def __init__(self, tensors: Iterable[Tensor], memory: Tensor) -> None:
        super().__init__(tensors)
        self.memory = [memory]
        self.token = object()  #: of just these tensors


def as_list(op: str, argument: str, value: Tensors, check_all: bool = False) -> list[Tensor]:
    """``value``, a tensor or several, as a list.  An error says how to get the tensors of something else.

    ``check_all``: look at every element, which takes 10 us for 388 tensors, and not at the first one alone.
    """
    if isinstance(value, OneMemory):
        return value
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (Mapping, Set, nn.Module)) or not isinstance(value, Iterable):
        ways = {
            Mapping: "list(x.values())",
            Set: "a list, whose order is fixed",
            nn.Module: "list(x.parameters())",
        }
        way = next((f"; of such an x: {way}" for kind, way in ways.items() if isinstance(value, kind)), "")
        fail(op, argument, f"a tensor or a list of tensors{way}", type(value).__name__, TypeError)
    tensors = list(value)
    kinds = set(map(type, tensors if check_all else tensors[:1]))  # one or two, of any number of tensors
    if torch.compiler.is_compiling() or all(issubclass(kind, Tensor) for kind in kinds):
        return tensors
    i, wrong = next((i, t) for i, t in enumerate(tensors) if not isinstance(t, Tensor))
    expected = "a tensor"
    if isinstance(wrong, tuple):
        expected += " (parameters() gives tensors, named_parameters() pairs)"
    elif hasattr(wrong, "params"):
        expected += " (a plan is given alone, in the place of the list)"
    fail(op, f"{argument}[{i}]", expected, type(wrong).__name__, TypeError)


def places(
    op: str, streams: int | Sequence[int], offsets: int | Sequence[int] | None, count: int
) -> tuple[list[int], list[int]]:
    if isinstance(streams, str):
        check_stream(op, "streams", streams)
    if not isinstance(streams, list):
        streams = [streams] if isinstance(streams, int) else list(streams)
    if streams and isinstance(streams[0], str):
        check_stream(op, "streams[0]", streams[0])
    if offsets is None:
        offsets = [0] * count
    elif not isinstance(offsets, list):
        offsets = [offsets] if isinstance(offsets, int) else list(offsets)
    return streams, offsets


def noise_args(
    op: str,
    params: Sequence[Tensor],
    seeds: object,
    coeffs: object,
    streams: int | Sequence[int],
    offsets: int | Sequence[int] | None,
    dist: str,
    decay: object,
    rounding: str,
    rounding_seed: object,
) -> tuple[Any, ...]:
    if rounding not in ("nearest", "stochastic"):
        fail(op, "rounding", "'nearest' or 'stochastic'", repr(rounding))
    if rounding == "stochastic" and rounding_seed is None:
        fail(op, "rounding_seed", "a seed where rounding is 'stochastic'", None)
    device = params[0].device if params else torch.device("cpu")
    return (
        device_values(op, "seeds", seeds, torch.int64, device),
        device_values(op, "coeffs", coeffs, torch.float32, device),
        *places(op, streams, offsets, len(params)),
        dist,
        None if decay is None else device_values(op, "decay", decay, torch.float32, device),
        None
        if rounding == "nearest"
        else device_values(op, "rounding_seed", rounding_seed, torch.int64, device),
    )


#: What :func:`mask_args` makes of no masks.
NO_MASKS = (None, None, KEEP_ALL)


def mask_args(
    op: str,
    params: list[Tensor],
    masks: Tensor | Sequence[Tensor] | None,
    mask_seed: object,
    density: float | None,
) -> tuple[Any, ...]:
    if (mask_seed is None) != (density is None):
        fail(op, "mask_seed, density", "both or none", (mask_seed, density))
    if density is None:
        return None if masks is None else as_list(op, "masks", masks), None, KEEP_ALL
    if not 0 <= density <= 1:
        fail(op, "density", "a number in [0, 1]", density)
    device = params[0].device if params else torch.device("cpu")
    seed = device_values(op, "mask_seed", mask_seed, torch.int64, device)
    return None if masks is None else as_list(op, "masks", masks), seed, round(density * KEEP_ALL)


def row_args(
    op: str, params: list[Tensor], rows: Sequence[tuple[int, int] | None] | None
) -> tuple[list[int] | None, list[int] | None]:
    """The widths and lengths of ``rows``, 0 for a tensor that lies in one piece; None where all do."""
    if rows is None:
        return None, None
    if len(rows) != len(params):
        fail(op, "rows", f"{len(params)} pairs or None, one for each tensor", len(rows))
    pairs = []
    for param, pair in zip(params, rows, strict=True):
        width, length = pair or (0, 0)
        whole = width in (length, param.numel())
        pairs.append((0, 0) if whole else (width, length))
    widths, lengths = ([pair[i] for pair in pairs] for i in (0, 1))
    return (widths, lengths) if any(widths) else (None, None)


def user_operation(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` as users call it: no graph for backward is built, and errors name wrong arguments."""

    @functools.wraps(function)
    def operation(*args: P.args, **options: P.kwargs) -> T:
        try:
            if not torch.is_grad_enabled():  # to switch it off takes as long as a small call does
                return function(*args, **options)
            with torch.no_grad():
                return function(*args, **options)
        except TypeError:
            check_call(operation, args, options)
            raise

    return operation


def in_place(pair: Pair[P]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Makes an operation in place of ``pair`` and of a function that has only its name and docstring.

    The operation has the arguments of ``pair``, as help(), editors and type checkers show them.
    """
    return lambda named: _take(functools.partial(pair, named.__name__, None), named, pair)


def out_of_place(pair: Pair[P]) -> Callable[[Callable[..., None]], Callable[Concatenate[Tensors, P], None]]:
    """Makes the form out of place: ``named`` has a first argument ``out``, and so has the operation."""

    def make(named: Callable[..., None]) -> Any:
        def call(out: Tensors, *args: Any, **options: Any) -> None:
            pair(named.__name__, as_list(named.__name__, "out", out), *args, **options)

        return _take(call, named, pair)

    return make


def _take(call: Callable[..., None], named: Callable[..., None], pair: Callable[..., None]) -> Any:
    """``call`` as an operation with the name and docstring of ``named``, and the arguments of both."""
    operation: Any = user_operation(functools.wraps(named)(call))
    del operation.__wrapped__  # inspect.signature would show the arguments of ``named`` alone
    own = [p for p in inspect.signature(named).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = inspect.signature(pair)
    operation.__signature__ = found.replace(parameters=[*own, *list(found.parameters.values())[2:]])
    return operation
