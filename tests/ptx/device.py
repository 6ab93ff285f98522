"""The CUDA library's host code with its launches executed as PTX.

``tests/cuda_on_host`` is that host code for CPU tensors.  What an operation launches there, table and number of blocks
included, goes to the kernel of the same mangled name in the PTX, and the operation's tensors are copied into checked
memory before and back after.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .machine import Machine
from .memory import Memory, Traffic
from .parser import Kernel

_Launcher = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int32,
)

#: Arguments that an operation only writes, unless they are its inputs, too.
_OUTPUTS = {"out", "plus", "minus"}


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
        return self._device.call(self._operation, args)


class Device:
    """Stands for ``torch.ops.zokernels_cuda``.

    ``path``: of the library that ``cuda_on_host`` built; ``kernels``: a kernel of the PTX by its mangled name.
    """

    def __init__(self, path: Path, kernels: Callable[[str], Kernel]) -> None:
        library = ctypes.CDLL(str(path))
        self._library, self._kernels = library, kernels
        self._names = _symbols(path)
        known = next(address for address, name in self._names.items() if name == "launches_on_host")
        library.set_launcher.restype = None
        self._base = ctypes.cast(library.launches_on_host, ctypes.c_void_p).value - known
        self._machines: dict[tuple[str, int], Machine] = {}
        self._launcher = _Launcher(self._launch)
        self._memory: Memory | None = None
        self._error: BaseException | None = None
        self.rsqrt_ulps = 0
        self.launches: Counter[str] = Counter()  #: by the kernel's name
        self.traffic: dict[str, Traffic] = {}  #: of the last operation, by "ld" and "st"

    def __getattr__(self, name: str) -> _Operation:
        return _Operation(self, getattr(torch.ops.zokernels_cuda_on_host, name).default)

    def _launch(self, address: int, blocks: int, arguments: Any, sizes: Any, count: int) -> int:
        try:
            name = self._names[address - self._base]
            key = name, self.rsqrt_ulps
            if key not in self._machines:
                self._machines[key] = Machine(self._kernels(name), rsqrt_ulps=self.rsqrt_ulps)
            assert self._memory is not None
            values = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
            self._machines[key].run(blocks, values, self._memory)
            self.launches[name] += 1
        except BaseException as error:  # ctypes would drop it
            self._error = error
            return 1
        return 0

    def call(self, operation: Any, args: tuple[Any, ...]) -> Any:
        inputs: dict[tuple[int, int], Tensor] = {}
        found: dict[tuple[int, int], dict[str, bool]] = {}

        def key(tensor: Tensor) -> tuple[int, int]:
            return tensor.data_ptr(), tensor.numel() * tensor.itemsize

        def note(name: str, writable: bool) -> Callable[[Tensor], Tensor]:
            def inner(tensor: Tensor) -> Tensor:
                if tensor.numel():
                    inputs[key(tensor)] = tensor
                    state = found.setdefault(key(tensor), {"written": False, "writable": False})
                    state["written"] |= not (writable and name in _OUTPUTS)
                    state["writable"] |= writable
                return tensor

            return inner

        for parameter, arg in zip(operation._schema.arguments, args, strict=True):
            writable = parameter.alias_info is not None and parameter.alias_info.is_write
            tree_map_only(Tensor, note(parameter.name, writable), arg)
        size = sum(size for _, size in inputs)
        memory = self._memory = Memory(2 * size + (1 << 16), 2 * len(inputs) + 2)
        copies = {k: memory.place(t, **found[k]) for k, t in inputs.items()}

        def own(tensor: Tensor) -> Tensor:
            # A tensor in two roles keeps its shape in each.
            return copies[key(tensor)].view(tensor.dtype).view(tensor.shape) if tensor.numel() else tensor

        moved = tree_map_only(Tensor, own, args)
        self._error = None
        self._library.set_launcher(self._launcher)
        try:
            result = operation(*moved)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._library.set_launcher(_Launcher())
            self.traffic = dict(memory.traffic)
        for k, tensor in inputs.items():
            if found[k]["writable"]:
                tensor.copy_(copies[k].view(tensor.dtype).view(tensor.shape))
        return tree_map_only(Tensor, Tensor.clone, result)
