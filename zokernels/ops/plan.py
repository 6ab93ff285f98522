"""Plans: what a call works out of its tensors, kept for the calls that come after it with the same ones.

An operation over a list of tensors checks each of them, looks for memory that two of them share, and passes
them on one by one.  For hundreds of small tensors that takes longer than the arithmetic.  A :class:`Plan`
stands in the place of the list and remembers the outcome: a *table* of addresses, sizes and places, which a
compiled backend takes in one piece.

A table may be used as long as its tensors are what they were.  Each call therefore reads a *fingerprint* of
them, which is everything that the checks and the table depend on: class, address, dtype, device, shape and
strides.  An equal fingerprint means an equal outcome, however the tensors have come to have it.  With any
other the call is an ordinary one, which raises what it always raised.  A plan holds no tensor but the
parameters that it was made for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Backend, select
from ..backends.terms import Terms
from ..checks import check_values, fail, named_arguments, warn_of_one_noise
from ..contract import DISTS
from ..transfer import CPU
from .arguments import OneMemory, Rows, Tensors, as_list, places
from .define import written

#: Numbers of dtypes in a table (csrc/op_args.h).
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_AUTOGRAD_CPU = torch._C.DispatchKey.AutogradCPU
#: Outcomes that a plan keeps, the latest ones: in place, into scratch, with states, and two more.
_KEPT = 5

Group = Sequence[Tensor] | None


class Columns(NamedTuple):
    """The tensors of a call, as the rows of a table have them (``Row`` in csrc/op_args.h); None: there
    are none.
    """

    read: Sequence[Tensor]
    out: Group = None  #: None: the call writes where it reads
    first: Group = None
    second: Group = None
    masks: Group = None
    curvature: Group = None


@functools.cache
def _reader() -> Any:
    """The compiled reader of fingerprints; None where the host module is not built, or torch has no
    DLPack table.
    """
    try:
        host = importlib.import_module(".._host", __package__)
        return host.Fingerprints(Tensor.__dlpack_c_exchange_api__, (Tensor, nn.Parameter))
    except (ImportError, AttributeError, ValueError):
        return None


def fingerprint(groups: tuple[Group, ...], objects: bool = False) -> bytes | None:
    """Everything that a call depends on of the tensors of ``groups``, in about 40 ns a tensor.

    None where a plan cannot serve them: where one is of a class with rules of its own, or has no memory that
    an address tells of, and where nothing compiled can read them.

    ``objects``: and which tensors they are, which tells while they are alive.
    """
    reader = _reader()
    found: bytes | None = None if reader is None else reader.of(groups, objects)
    return found


def matches(kept: bytes, groups: tuple[Group, ...], objects: bool = False) -> bool:
    """Whether ``kept`` is the :func:`fingerprint` of ``groups``, which is not written down for that."""
    found: bool = _reader().matches(kept, groups, objects)
    return found


def is_watched(operation: Any, device: torch.device) -> bool:
    """Whether something between the caller and the kernels wants to see the calls of ``operation`` on
    ``device``.

    That is a compiler, a tracer or another mode of torch (fake tensors, vmap), or a kernel for autograd,
    which users may register.  All of them see tensors, and a table has none."""
    key = _AUTOGRAD_CPU if device == CPU else torch._C.DispatchKey.AutogradCUDA
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._is_torch_function_mode_enabled() and _modes_watch())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or key in operation.py_kernels
        or torch._C._dispatch_has_kernel_for_dispatch_key(operation._name, key)
    )


def _modes_watch() -> bool:
    """Whether a function mode is on besides that of ``torch.set_default_device``, which changes no call
    of ours.
    """
    from torch.utils._device import DeviceContext  # torch itself loads it when such a mode is made

    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What was found of the tensors of one call."""

    key: tuple[Any, ...]  #: what besides the tensors decides the outcome
    prints: bytes
    backend: Backend
    kernel: Callable[..., None]
    table: Tensor | None  #: what the kernel takes in the place of tensors; None: it takes the tensors


class Plan:
    """Tensors that many calls take, and the places of their noise; :func:`plan` makes one."""

    def __init__(
        self,
        params: Tensors,
        streams: int | Sequence[int],
        *,
        offsets: int | Sequence[int] | None = None,
        rows: Rows = None,
    ) -> None:
        self.params = as_list("plan", "params", params, check_all=True)
        self.streams, self.offsets = map(list, places("plan", streams, offsets, len(self.params)))
        self.rows = rows
        self._outcomes: list[_Outcome] = []

    def __repr__(self) -> str:
        return f"a plan of {len(self.params)} tensors, {sum(p.numel() for p in self.params):,} elements"

    def run(
        self,
        op: str,
        operation: Callable[..., None],
        args: tuple[Any, ...],
        kernel: str,
        columns: Columns,
        terms: Terms,
        extras: Sequence[Any] = (),
        *,
        direct: Callable[[Callable[..., None]], None],
        changed: Sequence[Sequence[Tensor]],
        check: Callable[[], None] | None = None,
        key: tuple[Any, ...] = (),
    ) -> None:
        """``operation(*args)``: by the outcome of an earlier call where one holds, else an ordinary call.

        Args:
            op: its name in errors.
            kernel: of the backends.  Compiled ones have ``<kernel>_planned``, of (table, *extras, the call's
                terms).
            columns: every list of the call that is as long as the parameters.
            extras: what the call has besides tensors and terms.
            direct: calls the backend's kernel with tensors, for a backend that takes no table.
            changed: the lists of tensors that the call writes to.
            check: of the extras.
            key: what else the checks of the tensors depend on (a rule).
        """
        device = self.params[0].device if self.params else None
        if device is None or is_watched(operation, device):
            operation(*args)
            return
        backend, out, key = select(device), columns.out, (op, *key)
        seen: tuple[Group, ...] = columns
        if isinstance(out, OneMemory):
            key, seen = (*key, out.token), (columns.read, out.memory, *columns[2:])
        reader, outcome = _reader(), None
        for kept in self._outcomes:
            if kept.key == key and kept.backend is backend and reader.matches(kept.prints, seen, False):
                outcome = kept
                break
        if outcome is None:
            prints = fingerprint(seen)
            operation(*args)
            # A view that is negated when it is read lies in memory as the negatives.
            if prints is not None and not any(t.is_neg() for group in columns for t in group or ()):
                self._keep(_outcome(key, prints, backend, kernel, columns, terms))
            return
        if outcome is not self._outcomes[0]:
            self._outcomes.remove(outcome)
            self._keep(outcome)
        values = terms.seeds, terms.coeffs, terms.decay, terms.rounding_seed, terms.mask_seed
        if terms.dist not in DISTS or not reader.are_values(self.params[0], *values):
            check_values(op, self.params, terms)
        if check is not None:
            check()
        if outcome.table is None:
            direct(outcome.kernel)
        else:
            outcome.kernel(
                outcome.table, *extras, terms.seeds, terms.coeffs, terms.dist,
                terms.decay, terms.rounding_seed, terms.mask_seed, terms.mask_keep,
            )  # fmt: skip
        written(*changed)

    def _keep(self, outcome: _Outcome) -> None:
        self._outcomes.insert(0, outcome)
        del self._outcomes[_KEPT:]


def members(
    op: str,
    params: Tensors | Plan,
    streams: int | Sequence[int] | None,
    offsets: int | Sequence[int] | None,
    rows: Rows = None,
) -> tuple[Plan | None, list[Tensor], int | Sequence[int], int | Sequence[int] | None, Rows]:
    """The plan, if ``params`` is one, and the tensors of a call with their places."""
    if isinstance(params, Plan):
        if streams is not None or offsets is not None or rows is not None:
            fail(
                op, "streams, offsets, rows", "None with a plan, which has its own", (streams, offsets, rows)
            )
        return params, params.params, params.streams, params.offsets, params.rows
    tensors = as_list(op, "params", params, check_all=True)
    if streams is None:
        fail(
            op,
            "streams",
            "an integer for each tensor (zokernels.stream_of(name) makes one of a name), or a plan in the "
            "place of the tensors",
            None,
            TypeError,
        )
    return None, tensors, streams, offsets, rows


def _outcome(
    key: tuple[Any, ...], prints: bytes, backend: Backend, kernel: str, columns: Columns, terms: Terms
) -> _Outcome:
    planned = backend.find(f"{kernel}_planned")
    if planned is None:
        return _Outcome(key, prints, backend, getattr(backend, kernel), None)
    return _Outcome(key, prints, backend, planned, _table(columns, terms))


def _table(columns: Columns, terms: Terms) -> Tensor:
    """int64 [tensors, 14] on the CPU: a row for each tensor, in the layout of ``Row`` in csrc/op_args.h."""
    count = len(columns.read)
    dtype = lambda group: _DTYPES[group[0].dtype] if group else -1
    states = dtype(columns.curvature or columns.first), dtype(columns.second)
    dtypes = (_DTYPES[columns.read[0].dtype], *states)
    groups = columns if columns.out else columns._replace(out=columns.read)
    pointers = [[t.data_ptr() for t in group] if group else [0] * count for group in groups]
    rows = zip(
        *pointers,
        [t.numel() for t in columns.read],
        terms.offsets,
        terms.streams,
        terms.widths or [0] * count,
        terms.lengths or [0] * count,
        strict=True,
    )
    with torch.inference_mode(False):
        return torch.tensor([(*row, *dtypes) for row in rows], dtype=torch.int64)


@named_arguments
def plan(
    params: Tensors,
    streams: int | Sequence[int],
    *,
    offsets: int | Sequence[int] | None = None,
    rows: Rows = None,
) -> Plan:
    """Tensors that many calls take, to be given in the place of ``params``: ``combine_(plan, seeds,
    coeffs)``.

    An operation that gets a plan checks the tensors in its first call.  Each later call compares what they
    are now with what they were then, in a few microseconds for all of them together, and makes one call into
    C++. Nothing else differs.  The tensors may be others between calls (``p.data = ...``, ``resize_``,
    ``set_``): then they are checked again, and raise what they always raised.

    Args:
        params: as for :func:`combine_`.  The list is copied; its tensors are kept alive.
        streams, offsets, rows: as for :func:`combine_`.  The first call checks them.

    :func:`combine_`, :func:`combine`, :func:`fan_out_` and :func:`update_` take plans, and then no streams,
    offsets or rows.

    Example::

        weights = zokernels.plan(list(model.parameters()), range(len(list(model.parameters()))))
        zokernels.combine_(weights, seeds, coeffs)
    """
    made = Plan(params, streams, offsets=offsets, rows=rows)
    if rows is None:
        warn_of_one_noise("plan", made.params, made.streams, made.offsets, 4)
    return made
