"""Run seed, step and skipped steps: as Python numbers, or as tensors that a replayed CUDA graph advances."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..contract import derive_seed_int, seed_to_int64
from ..functional import derive_seed
from ..transfer import CPU, to_device
from .scalars import YES
from .types import Seeds

_MASK64 = 2**64 - 1


@functools.cache
def _derive() -> Callable[[int, int, int], list[int]]:
    """The function of (seed & _MASK64, step, count) that lists ``derive_seed(seed, step, k)`` as int64, for k
    = 0 .. count - 1; compiled, where the host module is built.
    """
    try:
        compiled: Any = importlib.import_module(".._host", __package__).derive_seeds
    except ImportError:
        return lambda seed, step, count: [seed_to_int64(derive_seed_int(seed, step, k)) for k in range(count)]
    return compiled  # type: ignore[no-any-return]


def _seeds_on(device: torch.device, values: list[int]) -> Tensor:
    """int64 [q].  On a GPU by fills: a list would be copied from pageable memory, and waited for."""
    if device == CPU:
        return torch.tensor(values, dtype=torch.int64, device=device)
    fills = [torch.full((1,), v, dtype=torch.int64, device=device) for v in values]
    return torch.cat(fills) if len(fills) > 1 else fills[0]


class _State:
    """What both forms have: the count of skipped steps, and how many of them the user has been told of."""

    skipped: Tensor
    skips_told = 0

    def new_skips(self) -> int:
        """The skipped steps since this was last asked.  Waits for the device that :attr:`skipped` is on."""
        before, self.skips_told = self.skips_told, int(self.skipped)
        return max(0, self.skips_told - before)


class HostState(_State):
    """Seed and step are Python integers; only the count of skipped steps lies where the losses are."""

    capturable = False
    _told: Tensor | None = None  #: the count of which the user has been told

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0
        self.skipped = torch.zeros((), dtype=torch.int64)  # never written: another one takes its place

    def place(self, devices: Iterable[torch.device]) -> None:
        pass  # nothing lies on a device

    def seeds(self, devices: Iterable[torch.device], count: int, ahead: int = 0) -> Seeds:
        """derive_seed(seed, step + ahead, k) for k = 0 .. count - 1, as an int64 tensor on each device."""
        values = _derive()(self.seed & _MASK64, self.step + ahead, count)
        return {d: _seeds_on(d, values) for d in devices}

    def new_skips(self) -> int:
        if self.skipped is self._told:
            return 0
        self._told = self.skipped
        return super().new_skips()

    def advance(self, finite: Tensor) -> None:
        """A step has been taken; unless ``finite``, its update was skipped."""
        skipped = to_device(self.skipped, finite.device)
        self.skipped = skipped if finite is YES else skipped + ~finite
        self.step += 1

    def load(self, seed: int, step: int, skipped: int) -> None:
        self.seed, self.step, self.skips_told = seed, step, skipped
        self.skipped = torch.full_like(self.skipped, skipped)


class DeviceState(_State):
    """Seed, step and skipped steps as int64 tensors, one of each on every device of the parameters.

    They are only ever written in place, because a CUDA graph holds their addresses.  Reading :attr:`step`
    waits for the device.
    """

    capturable = True

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._steps: dict[torch.device, Tensor] = {}
        self._seeds: dict[torch.device, Tensor] = {}
        self.skipped = _filled(0, torch.device("cpu")).reshape(())

    @property
    def step(self) -> int:
        return int(next(iter(self._steps.values()))) if self._steps else 0

    def is_placed(self, devices: Iterable[torch.device]) -> bool:
        return self._steps.keys() == set(devices)

    def place(self, devices: Iterable[torch.device]) -> None:
        """Brings the counters to ``devices`` before a capture, because every replay resets what it
        creates.
        """
        devices = list(devices)
        if devices and not self.is_placed(devices):
            step, skipped = self.step, int(self.skipped)
            self._steps = {d: self._steps.get(d, _filled(step, d)) for d in devices}
            self._seeds = {d: self._seeds.get(d, _filled(seed_to_int64(self.seed), d)) for d in devices}
            if self.skipped.device != devices[0]:
                self.skipped = _filled(skipped, devices[0]).reshape(())

    def seeds(self, devices: Iterable[torch.device], count: int, ahead: int = 0) -> Seeds:
        return {
            d: derive_seed(self._seeds[d], self._steps[d] + ahead, torch.arange(count, device=d))
            for d in devices
        }

    def advance(self, finite: Tensor) -> None:
        self.skipped.add_(to_device(~finite, self.skipped.device))
        for step in self._steps.values():
            step.add_(1)

    def load(self, seed: int, step: int, skipped: int) -> None:
        self.seed, self.skips_told = seed, skipped
        for value, tensors in ((step, self._steps), (seed_to_int64(seed), self._seeds)):
            for tensor in tensors.values():
                tensor.fill_(value)
        self.skipped.fill_(skipped)


def check_seed(op: str, seed: object) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or isinstance(seed, Tensor):
        fail(op, "seed", "an integer", repr(seed), TypeError)
    seed_to_int64(operator.index(seed))  # raises outside the range
    return operator.index(seed)


def _filled(value: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be advanced in later, ordinary steps
        return torch.full((1,), value, dtype=torch.int64, device=device)
