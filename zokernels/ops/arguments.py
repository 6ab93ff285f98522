"""Arguments as users give them, plain Python numbers among them, as those of the operations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

from ..backends.terms import KEEP_ALL
from ..checks import check_call, check_stream, fail
from ..contract import seed_to_int64
from ..transfer import to_device

Dist = Literal["normal", "rademacher"]
Rounding = Literal["nearest", "stochastic"]
Tensors = Tensor | Sequence[Tensor]
Rows = Sequence[tuple[int, int] | None] | None
P = ParamSpec("P")
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


def as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, OneMemory):
        return value
    return [value] if isinstance(value, Tensor) else list(value)


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
        return None if masks is None else as_list(masks), None, KEEP_ALL
    if not 0 <= density <= 1:
        fail(op, "density", "a number in [0, 1]", density)
    device = params[0].device if params else torch.device("cpu")
    seed = device_values(op, "mask_seed", mask_seed, torch.int64, device)
    return None if masks is None else as_list(masks), seed, round(density * KEEP_ALL)


def row_args(
    op: str, params: list[Tensor], rows: Sequence[tuple[int, int] | None] | None
) -> tuple[list[int] | None, list[int] | None]:
    """Widths and lengths; 0 where the elements lie in one piece."""
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


def in_place(pair: Pair[P]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Makes an operation in place of ``pair`` and of a function that has only its name and docstring.

    The operation has the arguments of ``pair``, as help(), editors and type checkers show them.
    """

    def make(named: Callable[..., None]) -> Any:
        name = named.__name__

        def operation(*args: Any, **options: Any) -> None:
            try:
                if torch.is_grad_enabled():
                    with torch.no_grad():
                        pair(name, None, *args, **options)
                else:
                    pair(name, None, *args, **options)
            except TypeError:
                check_call(operation, args, options)
                raise

        return _take(operation, named, pair)

    return make


def out_of_place(pair: Pair[P]) -> Callable[[Callable[..., None]], Callable[Concatenate[Tensors, P], None]]:
    """The same behind a first argument ``out``, which ``named`` has."""

    def make(named: Callable[..., None]) -> Any:
        name = named.__name__

        def operation(out: Tensors, *args: Any, **options: Any) -> None:
            try:
                if torch.is_grad_enabled():
                    with torch.no_grad():
                        pair(name, as_list(out), *args, **options)
                else:
                    pair(name, as_list(out), *args, **options)
            except TypeError:
                check_call(operation, (out, *args), options)
                raise

        return _take(operation, named, pair)

    return make


def _take(operation: Any, named: Callable[..., None], pair: Callable[..., None]) -> Any:
    functools.wraps(named)(operation)
    del operation.__wrapped__
    own = [p for p in inspect.signature(named).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = inspect.signature(pair)
    operation.__signature__ = found.replace(parameters=[*own, *list(found.parameters.values())[2:]])
    return operation
