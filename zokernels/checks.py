"""Checks that run before anything is written.  One message shape: ``op: argument: expected ..., got ...``."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from .backends.terms import KEEP_ALL, Terms, mask_bytes
from .contract import DISTS, STREAM_BITS

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: What the states of an optimizer may be kept in.
STATE_DTYPES = (torch.float32, torch.bfloat16)


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


def fail_unknown(
    op: str, argument: str, known: Collection[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> NoReturn:
    """Refuses an argument that ``op`` does not have, with the nearest of those that it has.

    ``elsewhere``: what users of other libraries call an argument of ours.
    """
    near = elsewhere.get(argument)
    if near not in known:
        least = 0.6 if near is None else 0.75  # a name that means something else is no slip of the pen
        near = next(iter(difflib.get_close_matches(argument, known, 1, least)), None)
    hint = f"{near!r}, the nearest of its arguments" if near else "one of its arguments"
    fail(op, argument, f"{hint} (help({op}) lists them)", "an argument that it does not have", TypeError)


def accepts(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether ``function(*args)`` goes with the signature of ``function``; True where it shows none."""
    try:
        inspect.signature(function).bind(*args)
    except ValueError:
        return True
    except TypeError:
        return False
    return True


def check_call(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuses arguments that do not go with the signature of ``function``, under its own name."""
    signature, op = inspect.signature(function), function.__name__
    for name in options:
        if name not in signature.parameters:
            fail_unknown(op, name, signature.parameters)
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name != "self"]
        expected = f"all of them, and the rest by name (help({op}))"
        fail(op, ", ".join(needed) or "arguments", expected, f"a call: {error}", TypeError)


def named_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Lets a call with arguments that ``function`` does not have fail as :func:`check_call` says it.

    The signature is looked at only where the call has failed: ``inspect.signature`` takes as long as a small
    operation.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except TypeError:
            check_call(function, args, options)  # raises only where Python itself has refused the call
            raise

    return checked


def check_choice(op: str, argument: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        fail(op, argument, " or ".join(map(repr, choices)), repr(value))


def is_integer(value: object, low: int, high: float = float("inf")) -> bool:
    """Whether ``value`` is an int from ``low`` to ``high``, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_integer(op: str, argument: str, value: object, low: int = 1, high: float = float("inf")) -> None:
    if not is_integer(value, low, high):
        bounds = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
        fail(op, argument, f"an integer {bounds}", repr(value))


def check_number(
    op: str, argument: str, value: object, *, positive: bool = False, most: float = math.inf
) -> None:
    expected = "a finite number > 0" if positive else "a finite number >= 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(op, argument, expected, repr(value), TypeError)
    number: Any = value  # to a type checker Real has no order
    # An integer may be larger than any float, and torch takes none beyond int64.
    most = min(most, 2**63 - 1 if isinstance(value, int) else sys.float_info.max)
    if not 0 <= number <= most or (positive and number == 0):
        expected += f" and at most {most:.3g}" if most < number < math.inf else ""
        fail(op, argument, expected, repr(value)[:200])


def check_dist(op: str, dist: str) -> None:
    check_choice(op, "dist", dist, DISTS)


def check_stream(op: str, argument: str, stream: Any) -> None:
    if not hasattr(stream, "__index__"):
        way = f" (zokernels.stream_of({stream!r}) makes one of a name)" if isinstance(stream, str) else ""
        fail(op, argument, f"an integer{way}", repr(stream), TypeError)
    if not 0 <= stream < 2**STREAM_BITS:
        fail(op, argument, f"an integer in [0, 2^{STREAM_BITS})", stream)


def check_offset(op: str, argument: str, offset: int, numel: int) -> None:
    # torch.export makes a condition of each comparison with a size that varies (a SymInt, which is no int).
    # So such a size, which is far below 2^62, is compared only where it matters.
    compared = isinstance(numel, int) or offset >= 2**62
    if offset < 0 or (compared and offset > 2**63 - 1 - numel):
        fail(op, argument, f"0 <= offset and offset + {numel} elements < 2^63", offset)


def check_scalars(op: str, argument: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if value.dtype is not dtype:
        fail(op, argument, f"dtype {dtype}", value.dtype, TypeError)
    if value.dim() != 1 or not value.is_contiguous():
        fail(op, argument, "a contiguous 1-D tensor", f"shape {tuple(value.shape)}, strides {value.stride()}")
    if value.device != device:
        fail(op, argument, f"the parameters' device {device}", value.device)


def check_one(op: str, argument: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    check_scalars(op, argument, value, dtype, device)
    if value.numel() != 1:
        fail(op, argument, "one value", value.numel())


def _is_flat(t: Tensor) -> bool:
    return t.is_contiguous() and t.layout is torch.strided


def _find_fault(op: str, groups: Mapping[str, Sequence[Tensor]], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises for the first tensor that does not go with the first one of all."""
    (leader, params), *_ = groups.items()
    device, dtype = params[0].device, params[0].dtype
    names = " or ".join(", ".join(str(d).removeprefix("torch.") for d in dtypes).rsplit(", ", 1))
    for argument, tensors in groups.items():
        if len(tensors) != len(params):
            fail(op, argument, f"{len(params)} tensors, as in {leader}", len(tensors))
        for i, tensor in enumerate(tensors):
            name, shape = f"{argument}[{i}]", tuple(params[i].shape)
            if tensor.dtype not in dtypes:
                fail(op, name, f"dtype {names}", tensor.dtype, TypeError)
            if tensor.dtype is not dtype:
                fail(op, name, f"dtype {dtype}, as {leader}[0]", tensor.dtype, TypeError)
            _check_beside(op, name, tensor, device, leader)
            if tuple(tensor.shape) != shape:
                fail(op, name, f"shape {shape}, as {leader}[{i}]", tuple(tensor.shape))


def _check_beside(op: str, name: str, tensor: Tensor, device: torch.device, leader: str) -> None:
    if tensor.device != device:
        fail(op, name, f"device {device}, as {leader}[0]", tensor.device)
    if tensor.layout is not torch.strided:
        fail(op, name, "a contiguous tensor", tensor.layout)
    if not tensor.is_contiguous():
        fail(op, name, "a contiguous tensor", f"shape {tuple(tensor.shape)}, strides {tensor.stride()}")


def check_tensors(
    op: str, groups: Mapping[str, Sequence[Tensor]], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Tensor lists by argument name: one dtype of ``dtypes`` and one device, contiguous, element by
    element alike.
    """
    (_, params), *others = groups.items()
    device, dtype = params[0].device, params[0].dtype
    good = dtype in dtypes and all(len(tensors) == len(params) for tensors in groups.values())
    for tensors in groups.values():
        # One test a tensor where all is well: a list of 400 costs a quarter of what looking for the fault
        # would.
        good = good and all(t.dtype is dtype and t.device == device and _is_flat(t) for t in tensors)
    for _, tensors in others:
        good = good and all(t.shape == p.shape for t, p in zip(tensors, params, strict=True))
    if not good:
        _find_fault(op, groups, dtypes)


def check_states(
    op: str, argument: str, states: Sequence[Tensor], params: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> None:
    """Tensors beside the parameters, of a dtype of their own."""
    if len(states) != len(params):
        fail(op, argument, f"{len(params)} tensors, as in params", len(states))
    for i, (state, param) in enumerate(zip(states, params, strict=True)):
        if state.dtype not in dtypes or state.dtype is not states[0].dtype:
            fail(
                op, f"{argument}[{i}]", f"one dtype of {', '.join(map(str, dtypes))}", state.dtype, TypeError
            )
        _check_beside(op, f"{argument}[{i}]", state, params[0].device, "params")
        if state.shape != param.shape:
            fail(op, f"{argument}[{i}]", f"shape {tuple(param.shape)}, as params[{i}]", tuple(state.shape))


def check_places(
    op: str, sizes: Sequence[int], streams: Sequence[int], offsets: Sequence[int], leader: str
) -> None:
    for argument, values in (("streams", streams), ("offsets", offsets)):
        if len(values) != len(sizes):
            fail(op, argument, f"{len(sizes)} integers, one for each tensor of {leader}", len(values))
    if not all(0 <= s < 2**STREAM_BITS for s in streams):
        for i, stream in enumerate(streams):
            check_stream(op, f"streams[{i}]", stream)
    if any(offsets):  # 0 is right for every tensor
        for i, numel in enumerate(sizes):
            check_offset(op, f"offsets[{i}]", offsets[i], numel)


def warn_of_one_noise(
    op: str, tensors: Sequence[Tensor], streams: Sequence[int], offsets: Sequence[int], level: int
) -> None:
    """Warns where two tensors of a call share elements of a stream, and so have the same noise there.

    ``level``: how many calls above this function the line of the user's is.
    """
    if torch.compiler.is_compiling() or len(set(streams)) == len(streams):
        return
    spans = sorted(
        (stream, offset, offset + tensor.numel(), i)
        for i, (tensor, stream, offset) in enumerate(zip(tensors, streams, offsets, strict=False))
        if tensor.numel()
    )
    for (stream, _, end, i), (other, begin, _, j) in itertools.pairwise(spans):
        if stream == other and begin < end:
            two = f"tensors {min(i, j)} and {max(i, j)}"
            text = f"{two} have stream {stream} at the same indices, and so the same noise"
            warnings.warn(f"{op}: streams: {text} (zokernels.streams_of(names))", stacklevel=level)
            return


def check_terms(op: str, leader: str, params: Sequence[Tensor], terms: Terms) -> None:
    """Everything about ``terms`` that needs no data pointer; ``leader``: the argument whose tensors
    ``params`` are.
    """
    check_dist(op, terms.dist)
    if not params:
        return
    check_places(op, [p.numel() for p in params], terms.streams, terms.offsets, leader)
    if terms.widths:
        _check_rows(op, leader, params, terms)
    check_values(op, params, terms)
    if terms.masks:
        _check_masks(op, leader, params, terms)
    if terms.curvature:
        check_states(op, "curvature", terms.curvature, params, STATE_DTYPES)


def check_values(op: str, params: Sequence[Tensor], terms: Terms) -> None:
    """What of ``terms`` may differ between two calls with the same tensors: a plan checks this in each
    call.
    """
    if terms.dist not in DISTS:
        check_dist(op, terms.dist)
    device = params[0].device
    check_scalars(op, "seeds", terms.seeds, torch.int64, device)
    seeds, coeffs = terms.seeds.numel(), terms.coeffs
    if coeffs.dim() == 2:
        if coeffs.dtype is not torch.float32:
            fail(op, "coeffs", f"dtype {torch.float32}", coeffs.dtype, TypeError)
        if coeffs.device != device:
            fail(op, "coeffs", f"the parameters' device {device}", coeffs.device)
        if tuple(coeffs.shape) != (len(params), seeds) or not coeffs.is_contiguous():
            expected = f"[{seeds}] or a contiguous [{len(params)}, {seeds}] (a row for each tensor)"
            fail(op, "coeffs", expected, f"shape {tuple(coeffs.shape)}, strides {coeffs.stride()}")
    else:
        check_scalars(op, "coeffs", coeffs, torch.float32, device)
        if coeffs.numel() != seeds:
            fail(op, "coeffs", f"{seeds} values, one for each seed", coeffs.numel())
    one = (("decay", terms.decay, torch.float32), ("rounding_seed", terms.rounding_seed, torch.int64),
           ("mask_seed", terms.mask_seed, torch.int64))  # fmt: skip
    for argument, value, kind in one:
        if value is not None:
            check_one(op, argument, value, kind, device)
    if not 0 <= terms.mask_keep <= KEEP_ALL:
        fail(op, "mask_keep", f"an integer in [0, {KEEP_ALL}]", terms.mask_keep)


def _check_rows(op: str, leader: str, params: Sequence[Tensor], terms: Terms) -> None:
    widths, lengths = terms.widths or [], terms.lengths or []
    if not len(widths) == len(lengths) == len(params):
        fail(op, "rows", f"{len(params)} pairs, one for each tensor of {leader}", (len(widths), len(lengths)))
    for i, (param, width, length) in enumerate(zip(params, widths, lengths, strict=True)):
        if width == 0:
            continue
        if not 0 < width <= length or param.numel() % width:
            expected = f"(width, length), width <= length, width a divisor of {param.numel()}"
            fail(op, f"rows[{i}]", expected, (width, length))
        if terms.offsets[i] % length + width > length:
            fail(op, f"offsets[{i}]", f"a row of {width} inside one of {length}", terms.offsets[i])
        if param.numel():
            check_offset(op, f"offsets[{i}]", terms.offsets[i], (param.numel() // width - 1) * length + width)


def _check_masks(op: str, leader: str, params: Sequence[Tensor], terms: Terms) -> None:
    masks = terms.masks or ()
    if len(masks) != len(params):
        fail(op, "masks", f"{len(params)} tensors, as in {leader}", len(masks))
    for i, (mask, param) in enumerate(zip(masks, params, strict=True)):
        rows = (terms.widths[i], terms.lengths[i]) if terms.widths and terms.lengths else ()
        name, size = f"masks[{i}]", mask_bytes(param.numel(), terms.offsets[i], *rows)
        if mask.dtype is not torch.uint8:
            fail(op, name, "dtype torch.uint8, eight elements a byte", mask.dtype, TypeError)
        _check_beside(op, name, mask, params[0].device, leader)
        if mask.numel() != size:
            expected = f"{size} bytes for {param.numel()} elements from index {terms.offsets[i]}"
            fail(op, name, expected, mask.numel())


def check_overlap(
    op: str,
    written: Mapping[str, Sequence[Tensor]],
    read: Mapping[str, Sequence[Tensor]],
    label: Callable[[str, int], str] = "{}[{}]".format,
) -> None:
    """No written tensor shares memory with another tensor of the call (two read ones may).

    ``label``: what a message calls the tensor of an argument and a number in it.
    """
    spans = []
    for writes, groups in ((True, written), (False, read)):
        for argument, tensors in groups.items():
            for i, t in enumerate(tensors):
                if n := t.nbytes:
                    begin = t.data_ptr()
                    spans.append((begin, begin + n, argument, i, writes))
    spans.sort()
    # Sorted by begin, a span overlaps an earlier one iff it begins before the furthest end so far: of all
    # spans where it is written itself, of the written ones where it is only read.
    furthest = furthest_written = (0, 0, "", 0, False)
    for span in spans:
        begin, end, argument, i, writes = span
        other = furthest if writes else furthest_written
        if begin < other[1]:
            got = f"overlap with {label(other[2], other[3])}"
            fail(op, label(argument, i), "tensors that share no memory within one call", got)
        if end > furthest[1]:
            furthest = span
        if writes and end > furthest_written[1]:
            furthest_written = span


def check_noise_of(
    op: str, seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str
) -> None:
    """Arguments of what is computed of noise alone."""
    check_dist(op, dist)
    check_scalars(op, "seeds", seeds, torch.int64, seeds.device)
    if any(n < 0 for n in sizes):
        fail(op, "sizes", "integers >= 0", sizes)
    check_places(op, sizes, streams, offsets, "sizes")
