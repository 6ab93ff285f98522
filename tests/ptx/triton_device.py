"""The Triton backend with its launches executed as PTX: compiled without a GPU."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton_kernels import FakeDriver

from zokernels.backends import registry
from zokernels.backends.triton import table

from .call import Argument, Executor
from .machine import Machine
from .parser import parse

#: What kernels write; ``params`` where no argument ``out`` is.
_WRITTEN = {"out", "plus", "minus", "partial", "first", "second", "y"}
_IN_PLACE = {"update", "fan_out"}
_BYTES = {"i32": 4, "u32": 4, "i64": 8, "u64": 8}


def _argument(value: Any, kind: str) -> bytes:
    if isinstance(value, Tensor):
        value, kind = value.data_ptr(), "u64"
    return int(value).to_bytes(_BYTES[kind], "little", signed=kind[0] == "i")


class TritonDevice(Executor):
    """The kernels of the backend, for CPU tensors while ``use`` is in force; ``edit``: what their PTX
    becomes first.
    """

    def __init__(self, edit: Callable[[str], str] = str, architecture: int = 90) -> None:
        super().__init__()
        self._edit, self._architecture = edit, architecture
        self.texts: dict[str, str] = {}  #: the PTX of all that was launched, by Triton's hash of it

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Operations on CPU tensors go through the Triton backend."""
        run = triton.JITFunction.run

        def launched(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            defaults = {p.name: p.default for p in kernel.params}
            values = {**defaults, **options, **dict(zip(kernel.arg_names, args, strict=False))}
            kinds = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
            arguments = [_argument(values[name], kind) for name, kind in kinds.items()]
            arguments += [bytes(8)] * 2  # memory for Triton's own use, of which these kernels need none
            self._run(compiled, (*grid, 1)[:2], arguments)

        target = GPUTarget("cuda", self._architecture, 32)
        monkeypatch.setattr(type(triton.runtime.driver), "active", FakeDriver.active(target))
        monkeypatch.setattr(triton.JITFunction, "run", launched)
        backend = registry.get("triton")
        backend = dataclasses.replace(backend, devices=frozenset(("cpu",)), find=self._finder(backend))
        monkeypatch.setitem(registry.PREFERENCE, "cpu", ("triton",))
        monkeypatch.setitem(registry.LOADED, "triton", backend)

    def _run(self, compiled: Any, grid: tuple[int, int], arguments: list[bytes]) -> None:
        text = self.texts.setdefault(compiled.hash, compiled.asm["ptx"])

        def make(ulps: int) -> Machine:
            (kernel,) = parse(self._edit(text)).values()
            return Machine(kernel, rsqrt_ulps=ulps, shared=compiled.metadata.shared)

        self.launch(self.machine(compiled.hash, make), grid, arguments)

    def _finder(self, backend: registry.Backend) -> Any:
        def find(name: str) -> Any:
            function = backend.find(name)
            if function is None:
                return None
            names = list(inspect.signature(function).parameters)

            def called(*args: Any) -> Any:
                written = _WRITTEN | ({"params"} if name in _IN_PLACE else set())
                try:
                    table._tables.clear()  # which hold addresses of other calls
                    return self.call(
                        function, [Argument(n, a, n in written) for n, a in zip(names, args, strict=True)]
                    )
                finally:
                    table._tables.clear()

            return called if names else function

        return find
