"""What must hold around the forwards of a step: one RNG state for all, and no interrupt inside a weight update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured.  Never asks where no parameter is on a GPU."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


class RngState:
    """torch's RNG state on the CPU and on each CUDA device of the parameters; all forwards start from it.

    On CUDA it is the host-side (seed, offset) of the generator: nothing waits for the device.
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
        """Around the forward ``index`` (0 is the first)."""
        if index:
            self.restore()
        yield


class GraphRng:
    """For each CUDA device equal generators, drawn from by nobody else: one for each of the ``forwards`` in a graph.

    A graph cannot set a generator back, as :class:`RngState` does.  But a generator that it captured moves by the same
    amount at each replay, so those that begin equal stay equal, whatever the default generator does between replays.
    """

    def __init__(self, op: str, devices: Iterable[torch.device], forwards: int) -> None:
        default = torch.cuda.default_generators
        self._op = op
        self._owned = [
            (default[d.index], [default[d.index].clone_state() for _ in range(forwards)])
            for d in devices
            if d.type == "cuda"
        ]

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        for default, owned in self._owned:
            with torch.cuda.device(default.device):  # where torch allocates what the graph reads
                for generator in owned:
                    graph.register_generator_state(generator)

    _cpu: Tensor

    @contextmanager
    def forward(self, index: int) -> Iterator[None]:
        """Around the forward ``index`` (0 is the first) while a graph is captured: the default generators draw from
        its own.  Where those are not part of the graph, torch refuses the draw, and the error says what to do."""
        if index:  # numbers drawn on the CPU are constants of the graph; the same ones in all forwards
            torch.set_rng_state(self._cpu)
        else:
            self._cpu = torch.get_rng_state()
        held = [(default, default.graphsafe_get_state(), owned[index]) for default, owned in self._owned]
        try:
            for default, _, own in held:
                default.graphsafe_set_state(own)
            yield
        except RuntimeError as error:
            if "generator" in str(error) and "captur" in str(error):
                raise RuntimeError(
                    f"{self._op}: closure: expected no random numbers in a captured step, or register_graph(graph) "
                    "before the capture, got a draw (dropout?) that the forwards could not share"
                ) from error
            raise
        finally:
            for default, state, _ in held:
                default.graphsafe_set_state(state)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the block ends, so that Ctrl-C cannot fall between a weight write and its record.

    Only the main thread receives signals; elsewhere this does nothing.
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
