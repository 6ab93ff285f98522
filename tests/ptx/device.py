"""The CUDA library's host code with its launches executed as PTX.

``tests/cuda_on_host`` is that host code for CPU tensors.  What an operation launches there, table and number
of blocks included, goes to the kernel of the same mangled name in the PTX."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .call import Argument, Executor
from .machine import Machine
from .parser import Kernel

_Launcher = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int32,
)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _symbols(library: Path) -> dict[int, str]:
    done = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True)
    fields = (line.split() for line in done.stdout.splitlines())
    return {int(f[0], 16): f[2] for f in fields if len(f) == 3}


#: Columns of a plan's table (``Row`` in csrc/op_args.h), the first six of which are addresses.  A fan-out's
#: outputs stand in the places of an update's states.
_READ, _OUT, _FIRST, _SECOND, _MASK, _CURVATURE, _NUMEL, _OFFSET, _STREAM, _WIDTH, _LENGTH = range(11)
_DTYPE, _STATE = 11, 12
_ITEMSIZES = {0: 4, 1: 2, 2: 2}


def _memory_at(address: int, size: int) -> Tensor:
    """The bytes that lie there, as a tensor."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _mask_bytes(row: list[int]) -> int:
    """A packed mask has a bit for each logical index, from a multiple of eight on; each row of a tensor that
    is rows has its own.
    """
    numel, offset, width, length = row[_NUMEL], row[_OFFSET], row[_WIDTH], row[_LENGTH]
    if width == 0:
        return (offset % 8 + numel + 7) // 8
    return numel // width * (width // 8 if (offset | width | length) % 8 == 0 else (width + 14) // 8)


def _columns(operation: str, table: Tensor) -> dict[int, Argument]:
    """By the column of its addresses, the memory that each row of a plan's table names."""
    rows = table.tolist()
    dtypes = {_READ: _DTYPE, _OUT: _DTYPE, _FIRST: _STATE, _SECOND: _STATE + 1, _CURVATURE: _STATE}
    sizes = {
        column: [row[_NUMEL] * _ITEMSIZES.get(row[dtype], 0) for row in rows]
        for column, dtype in dtypes.items()
    }
    sizes[_MASK] = list(map(_mask_bytes, rows))
    names = {_OUT: "out", _FIRST: "plus", _SECOND: "minus"} if operation == "fan_out" else {_OUT: "out"}
    return {
        column: Argument(
            names.get(column, ""),
            [
                _memory_at(row[column], size * bool(row[column]))
                for row, size in zip(rows, of_rows, strict=True)
            ],
            column in (_OUT, _FIRST, _SECOND),
        )
        for column, of_rows in sizes.items()
    }


class _Operation:
    """An operation of ``torch.ops``: its schema, and its call with launches executed as PTX."""

    def __init__(self, device: Device, operation: Any) -> None:
        self._schema, self._device, self._operation = operation._schema, device, operation
        self.default = self._op = self  # by the names of torch's own

    def __call__(self, *args: Any) -> Any:
        return self._device.call_operation(self._operation, args)


class Device(Executor):
    """Stands for ``torch.ops.zokernels_cuda``.

    ``path``: of the library that ``cuda_on_host`` built; ``kernels``: a kernel of the PTX by its mangled
    name."""

    def __init__(self, path: Path, kernels: Callable[[str], Kernel]) -> None:
        super().__init__()
        library = ctypes.CDLL(str(path))
        self._library, self._kernels = library, kernels
        self._names = _symbols(path)
        known = next(address for address, name in self._names.items() if name == "launches_on_host")
        library.set_launcher.restype = None
        self._base = ctypes.cast(library.launches_on_host, ctypes.c_void_p).value - known
        self._launcher = _Launcher(self._launched)
        self.operations: Counter[str] = Counter()  #: how often each was called
        self._error: BaseException | None = None

    def __getattr__(self, name: str) -> _Operation:
        return _Operation(self, getattr(torch.ops.zokernels_cuda_on_host, name).default)

    def _launched(self, address: int, blocks: int, arguments: Any, sizes: Any, count: int) -> int:
        try:
            name = self._names[address - self._base]
            machine = self.machine(name, lambda ulps: Machine(self._kernels(name), rsqrt_ulps=ulps))
            self.launch(machine, blocks, [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)])
        except BaseException as error:  # ctypes would drop it
            self._error = error
            return 1
        return 0

    def call_operation(self, operation: Any, args: tuple[Any, ...]) -> Any:
        parameters = operation._schema.arguments
        if not parameters:
            return operation()
        name = operation._schema.name.split("::")[1]
        self.operations[name] += 1
        arguments = [
            Argument(parameter.name, arg, parameter.alias_info is not None and parameter.alias_info.is_write)
            for parameter, arg in zip(parameters, args, strict=True)
        ]
        # Not through the dispatcher's first keys, where the mode of ``call`` would see this operation
        # alone and not what it calls.
        function: Callable[..., Any] = functools.partial(operation.redispatch, _CPU)
        if name.endswith("_planned"):
            function, arguments = self._planned(name.removesuffix("_planned"), function, arguments)
        self._error = None
        self._library.set_launcher(self._launcher)
        try:
            return self.call(function, arguments)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._library.set_launcher(_Launcher())

    @staticmethod
    def _planned(
        operation: str, function: Callable[..., Any], arguments: list[Argument]
    ) -> tuple[Callable[..., Any], list[Argument]]:
        """The tensors whose addresses are in a table, as arguments; and ``function`` with a new one."""
        (_, table, _), *others = arguments
        columns = _columns(operation, table)

        def call(*values: Any) -> Any:
            rows = table.numpy().copy()
            for column, tensors in zip(columns, values[: len(columns)], strict=True):
                for row, tensor in zip(rows, tensors, strict=True):
                    if tensor.numel():
                        row[column] = tensor.data_ptr()
            return function(torch.from_numpy(rows), *values[len(columns) :])

        return call, [*columns.values(), *others]
