"""What must hold around the forwards of a step: one RNG state for all, and no interrupt inside an update."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

#: What signal's functions call: they also make an enum of each number and handler, which takes longer than the rest.
_signal: Any = importlib.import_module("_signal")
_SIGINT = int(signal.SIGINT)


def is_capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured.  Where no parameter is on a GPU, CUDA is not even asked."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


class RngState:
    """torch's RNG state on the CPU and on each CUDA device of the parameters, from which all forwards start.

    On CUDA it is the (seed, offset) that the host keeps of the generator, so nothing waits for the device.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)

    def forward(self, index: int) -> AbstractContextManager[None]:
        """Around the forward of that number; 0 is the first, and finds the state as it is."""
        if index:
            self.restore()
        return nullcontext()


class uninterrupted:
    """Holds SIGINT back until the block ends: Ctrl-C cannot fall between a weight write and its record.

    Only the main thread receives signals; in any other this does nothing.
    """

    def __enter__(self) -> None:
        self._pending: list[Any] = []
        main = threading.current_thread() is threading.main_thread()
        self._previous = _signal.getsignal(_SIGINT) if main else None
        if self._previous is not None:
            _signal.signal(_SIGINT, lambda number, frame: self._pending.append(number))

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            _signal.signal(_SIGINT, self._previous)
            if self._pending:
                signal.raise_signal(signal.SIGINT)
