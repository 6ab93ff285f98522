"""Operations whose launches are executed as PTX: their tensors lie in checked memory while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .machine import Machine
from .memory import Memory, Traffic

#: Arguments that an operation only writes, unless they are its inputs, too.
_OUTPUTS = {"out", "plus", "minus", "partial"}
#: Room for tensors that an operation makes.
_OWN_BYTES, _OWN_TENSORS = 1 << 23, 64


class Argument(NamedTuple):
    name: str
    value: Any
    writable: bool


class _Placing(TorchDispatchMode):
    """Every tensor that torch makes is in ``memory``; what ``torch.empty`` and its like give there is
    unwritten.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = "empty" not in function._schema.name

        def place(tensor: Tensor) -> Tensor:
            if not tensor.numel():
                return tensor
            if not self._memory.holds(tensor):
                return self._memory.place(tensor, written=written, writable=True)
            if function._schema.is_mutable:
                self._memory.note_written(tensor)
            return tensor

        return tree_map_only(Tensor, place, function(*args, **(kwargs or {})))


class Executor:
    """What the devices of both compilers share."""

    def __init__(self) -> None:
        self._machines: dict[tuple[str, int], Machine] = {}
        self._memory: Memory | None = None
        self.rsqrt_ulps = 0
        self.launches: Counter[str] = Counter()  #: by the kernel's name
        self.traffic: dict[str, Traffic] = {}  #: of the last operation, by "ld" and "st"

    def begin(self) -> None:
        """A test: nothing is launched, and no machine is kept of the one before."""
        self._machines.clear()
        self.launches.clear()
        self.rsqrt_ulps = 0

    def machine(self, key: str, make: Callable[[int], Machine]) -> Machine:
        """``make`` of how far ``rsqrt.approx`` errs, once for each ``key``."""
        if (key, self.rsqrt_ulps) not in self._machines:
            self._machines[key, self.rsqrt_ulps] = make(self.rsqrt_ulps)
        return self._machines[key, self.rsqrt_ulps]

    def launch(self, machine: Machine, grid: int | tuple[int, int], values: Sequence[bytes]) -> None:
        assert self._memory is not None, "a launch outside of an operation"
        machine.run(grid, values, self._memory)
        self.launches[machine.kernel.name] += 1

    def call(self, function: Callable[..., Any], arguments: Iterable[Argument]) -> Any:
        """``function`` of the arguments' copies in checked memory, which are copied back after."""
        arguments = list(arguments)
        inputs: dict[tuple[int, int], Tensor] = {}
        found: dict[tuple[int, int], dict[str, bool]] = {}

        def key(tensor: Tensor) -> tuple[int, int]:
            return tensor.data_ptr(), tensor.numel() * tensor.itemsize

        for argument in arguments:

            def note(tensor: Tensor, name: str = argument.name, writable: bool = argument.writable) -> Tensor:
                if tensor.numel():
                    inputs[key(tensor)] = tensor
                    state = found.setdefault(key(tensor), {"written": False, "writable": False})
                    state["written"] |= not (writable and name in _OUTPUTS)
                    state["writable"] |= writable
                return tensor

            tree_map_only(Tensor, note, argument.value)
        size = sum(size for _, size in inputs) + _OWN_BYTES
        memory = self._memory = Memory(size, len(inputs) + _OWN_TENSORS)
        copies = {k: memory.place(t, **found[k]) for k, t in inputs.items()}

        def own(tensor: Tensor) -> Tensor:
            # A tensor in two roles keeps its shape in each.
            return copies[key(tensor)].view(tensor.dtype).view(tensor.shape) if tensor.numel() else tensor

        moved = [tree_map_only(Tensor, own, argument.value) for argument in arguments]
        try:
            with _Placing(memory):
                result = function(*moved)
        finally:
            self.traffic, self._memory = memory.traffic, None
        for k, tensor in inputs.items():
            if found[k]["writable"]:
                tensor.copy_(copies[k].view(tensor.dtype).view(tensor.shape))
        return tree_map_only(Tensor, Tensor.clone, result)
