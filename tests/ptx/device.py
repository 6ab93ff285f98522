"""The CUDA library's host code with its launches executed as PTX.

``tests/cuda_on_host`` is that host code for CPU tensors.  What an operation launches there, table and number
of blocks included, goes to the kernel of the same mangled name in the PTX."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


class _Operation:
    """An operation of ``torch.ops``: its schema, and its call with launches executed as PTX."""

    def __init__(self, device: Device, operation: Any) -> None:
        self._schema, self._device, self._operation = operation._schema, device, operation
        self.default = self

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
        arguments = [
            Argument(parameter.name, arg, parameter.alias_info is not None and parameter.alias_info.is_write)
            for parameter, arg in zip(parameters, args, strict=True)
        ]
        self._error = None
        self._library.set_launcher(self._launcher)
        try:
            # Not through the dispatcher's first keys, where the mode of ``call`` would see this operation
            # alone and not what it calls.
            return self.call(functools.partial(operation.redispatch, _CPU), arguments)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._library.set_launcher(_Launcher())
