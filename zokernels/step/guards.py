"""What must hold around the forwards of a step: one RNG state for all, and no interrupt inside an update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


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

    @contextmanager
    def forward(self, index: int) -> Iterator[None]:
        """Around the forward of that number; 0 is the first, and finds the state as it is."""
        if index:
            self.restore()
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT back until the block ends: Ctrl-C cannot fall between a weight write and its record.

    Only the main thread receives signals; in any other this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    pending = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            signal.raise_signal(signal.SIGINT)
