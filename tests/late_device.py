"""A device of a machine without one, whose copies to the host arrive late.

Within ``with LateDevice():`` the device ``DEVICE`` can be computed on: each of its tensors stands for one of
the CPU, on which every operation runs.  A copy to the host that is asked not to wait (``non_blocking=True``)
returns memory that holds something else, NaN for floating point numbers, and is filled when something waits
for the device: a copy that does wait, ``item()``, or ``LateDevice.synchronize()``.  Code that computes on
such a copy before it waits computes on wrong numbers, as it would on a busy GPU.

As torch does, the stand-in refuses operations on tensors of two devices, but for numbers (0-dim tensors) of
the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

#: torch has tensors without memory on it, which serve as names of those that stand for them.
DEVICE = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten


class LateDevice(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        #: The memory of DEVICE: by its address, each storage there with the one of the CPU that has its
        #: values.
        self._memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._names: dict[int, torch.UntypedStorage] = {}  #: the other way round, by the CPU's
        self._coming: list[tuple[Tensor, Tensor]] = []
        self.late = 0  #: how many copies to the host did not wait

    def parameter(self, data: Tensor) -> nn.Parameter:
        """A parameter on DEVICE.  ``nn.Parameter`` itself would make a new tensor without asking the mode."""
        name = nn.Parameter(torch.empty_like(data, device=DEVICE))
        self._values(name).copy_(data)
        return name

    def synchronize(self) -> None:
        """Lets all copies arrive."""
        for host, data in self._coming:
            host.copy_(data)
        self._coming.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _aten._to_copy.default:
            return self._convert(args[0], kwargs)
        if func is _aten.copy_.default and args[0].device != args[1].device:
            return self._copy(*args, **kwargs)
        mine = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device == DEVICE]
        if not mine and torch.device(kwargs.get("device") or _CPU) != DEVICE:
            return func(*args, **kwargs)
        strangers = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device == _CPU and x.dim()
        ]
        if mine and strangers:
            raise RuntimeError(
                f"{func}: expected all tensors on one device, got some on {DEVICE} and some on cpu"
            )
        if func is _aten._local_scalar_dense.default:
            self.synchronize()
        if "device" in kwargs:
            kwargs["device"] = _CPU
        values = {id(x): self._values(x) for x in mine}
        owners = {id(values[id(x)]): x for x in mine}
        inner = lambda x: values.get(id(x), x)
        found = func(*tree_map_only(Tensor, inner, args), **tree_map_only(Tensor, inner, kwargs))
        return tree_map_only(Tensor, lambda x: owners[id(x)] if id(x) in owners else self._named(x), found)

    def _values(self, name: Tensor) -> Tensor:
        """The tensor of the CPU that has the values of one on DEVICE, whatever memory that has been given."""
        values = self._memory[name.untyped_storage()._cdata][1]
        return torch.empty(0, dtype=name.dtype).set_(
            values, name.storage_offset(), name.size(), name.stride()
        )

    def _named(self, values: Tensor) -> Tensor:
        memory = values.untyped_storage()
        if memory._cdata not in self._names:
            storage = torch.empty(memory.nbytes(), dtype=torch.uint8, device=DEVICE).untyped_storage()
            self._memory[storage._cdata] = storage, memory
            self._names[memory._cdata] = storage
        name = torch.empty(0, dtype=values.dtype, device=DEVICE)
        return name.set_(self._names[memory._cdata], values.storage_offset(), values.size(), values.stride())

    def _convert(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        device, waits = (
            torch.device(kwargs.pop("device", None) or source.device),
            not kwargs.pop("non_blocking", False),
        )
        inner = self._values(source) if source.device == DEVICE else source
        copy = _aten._to_copy.default(inner, **kwargs)
        if device == DEVICE:
            return self._named(copy)
        return copy if source.device == _CPU else self._to_host(copy, torch.empty_like(copy), waits)

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if to.device == DEVICE:
            self._values(to).copy_(source)
            return to
        return self._to_host(self._values(source).to(to.dtype).expand_as(to).clone(), to, not non_blocking)

    def _to_host(self, data: Tensor, host: Tensor, waits: bool) -> Tensor:
        self._coming.append((host, data))
        if waits:
            self.synchronize()
        else:
            host.copy_(torch.full_like(data, torch.nan) if data.is_floating_point() else ~data)
            self.late += 1
        return host
