"""How an operation becomes ``torch.ops.zokernels.*``: its schema, its fake and its entry.

The schemas exist without any compiled library.  An entry checks its arguments and hands them to the selected
backend; the typed wrapper beside it is what users call.

Entries are registered through ``Library.impl``: ``torch.library.custom_op`` wraps each call in aliasing
checks of its own, which cost more than ours and the launch together (docs/design.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import select
from ..backends.terms import Terms
from ..checks import check_overlap, fail
from .arguments import OneMemory

_LIBRARY = torch.library.Library("zokernels", "DEF")

#: The operations, each with the module that defines it.
OPERATIONS: dict[str, str] = {}

# The fields of Terms in a schema, in its order; torch leaves out arguments that equal their defaults.
NOISE = (
    "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, str dist, "
    "Tensor? decay, Tensor? rounding_seed"
)
MASK = "Tensor[]? masks=None, Tensor? mask_seed=None, int mask_keep=65536"
ROWS = "int[]? widths=None, int[]? lengths=None"
TERMS = f"{NOISE}, {MASK}, Tensor[]? curvature=None, {ROWS}"


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the function below it the entry of an operation; its name then calls it through torch's
    dispatcher.

    ``fake``: what the entry does for tensors without data; it checks the same arguments.
    """

    def register(entry: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        OPERATIONS[name] = entry.__module__
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, entry, key)
        whole_name = f"{_LIBRARY.ns}::{name}"
        torch.library.register_fake(whole_name, fake, lib=_LIBRARY)
        operation: torch._ops.OpOverload = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
        torch.library.register_vmap(whole_name, _batched(operation), lib=_LIBRARY)
        return operation

    return register


def _batched(operation: torch._ops.OpOverload) -> Callable[..., tuple[Any, Any]]:
    """What ``torch.vmap`` does with an operation: one call for each member of the batch, in order.

    z is a function of seed, stream and index, so members that share these have the same noise, whatever
    ``randomness`` says.
    """
    name, arguments = operation._schema.name.partition("::")[2], operation._schema.arguments

    def member(b: int, value: Any, dims: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [member(b, v, dim) for v, dim in zip(value, dims, strict=True)]
        return value if dims is None else value.select(dims, b)

    def run(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        for argument, dims in zip(arguments, in_dims, strict=False):  # some end before their defaults
            if argument.is_write and None in (dims if isinstance(dims, (list, tuple)) else (dims,)):
                expected = "tensors over whose dimension vmap runs, because other arguments have it"
                fail(name, argument.name, expected, "one tensor for all members")
        found = [operation(*member(b, args, in_dims)) for b in range(info.batch_size)]
        return (torch.stack(found), 0) if operation._schema.returns else (None, None)

    return run


def checked(check: Callable[..., Any]) -> Callable[..., None]:
    """The fake of an operation that returns nothing: its check."""

    def fake(*args: object) -> None:
        check(*args)

    return fake


class Call(NamedTuple):
    """What the check of an operation that writes to tensors makes of its arguments."""

    args: tuple[Any, ...]  #: what the backend's kernel takes
    #: The lists of tensors to which the kernel may write, by argument.  Without any it is not called.
    written: Mapping[str, Sequence[Tensor]]
    read: Mapping[str, Sequence[Tensor]]  #: the lists that may share no memory with these, by argument
    #: The lists to which this call writes, where they are not all of ``written``.
    changed: Sequence[Sequence[Tensor]] | None = None


def define_writing(schema: str, check: Callable[..., Call]) -> Callable[..., None]:
    """Defines an operation that returns nothing and writes to its arguments.

    ``check`` gets the arguments of the operation, and is its fake, too.  The kernel in the backends has the
    operation's name, without the "_" at its end.
    """
    name = schema.partition("(")[0]

    def entry(*args: Any) -> None:
        call = check(*args)
        check_overlap(name, call.written, call.read)
        tensors = next((tensors for tensors in call.written.values() if tensors), None)
        if tensors is not None:
            getattr(select(tensors[0].device), name.rstrip("_"))(*call.args)
            written(*(call.written.values() if call.changed is None else call.changed))

    entry.__module__ = check.__module__
    return define(schema, checked(check))(entry)


#: The check of a pair of operations.  It gets the name of the operation, its lists of tensors by argument,
#: and the other arguments.  It returns the other lists that the kernel reads, by argument, and all that the
#: kernel takes after ``out`` and ``params``.
Check = Callable[..., tuple[Mapping[str, Sequence[Tensor]], tuple[Any, ...]]]


def define_pair(kernel: str, schema: str, check: Check) -> tuple[Callable[..., None], Callable[..., None]]:
    """Defines ``<kernel>_``, which writes to ``params``, and ``<kernel>``, which reads them and writes to
    ``out``.

    ``schema`` lists the arguments that follow these lists of tensors.
    """
    in_place = f"{kernel}_"

    def on_params(params: list[Tensor], *rest: Any) -> Call:
        read, extras = check(in_place, {"params": params}, *rest)
        return Call((params, params, *extras), {"params": params}, read)

    def into_out(out: list[Tensor], params: list[Tensor], *rest: Any) -> Call:
        lists = {"params": params, "out": out} if params else {"out": out, "params": params}
        read, extras = check(kernel, lists, *rest)
        return Call((out, params, *extras), {"out": out}, {"params": params, **read})

    on_params.__module__ = into_out.__module__ = check.__module__
    return (
        define_writing(f"{in_place}(Tensor(a!)[] params, {schema}) -> ()", on_params),
        define_writing(f"{kernel}(Tensor(a!)[] out, Tensor[] params, {schema}) -> ()", into_out),
    )


def written(*tensors: Sequence[Tensor]) -> None:
    """Tells autograd that an operation has changed the tensors of these groups."""
    for group in tensors:
        torch._C._increment_version(group.memory if isinstance(group, OneMemory) else group)


def read_by(terms: Terms) -> dict[str, Sequence[Tensor]]:
    """The tensors of ``terms`` that may not share memory with what is written."""
    return {"masks": terms.masks or (), "curvature": terms.curvature or ()}
