"""Steps that are captured in a CUDA graph: their random numbers, and what a capture would freeze or lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checks import fail
from .state import DeviceState, HostState
from .types import Bucket


class GraphRng:
    """Equal generators of each CUDA device, one for each of the ``forwards`` in a graph.

    Nobody else draws from them.

    A graph cannot set a generator back, as :class:`RngState` does.  But a generator that it captured moves by
    the same amount at each replay, so generators that begin equal stay equal, whatever the default one does
    between replays.
    """

    def __init__(self, op: str, devices: Iterable[torch.device], forwards: int) -> None:
        default = [torch.cuda.default_generators[d.index] for d in devices if d.type == "cuda"]
        self._op, self._owned = op, [(g, [g.clone_state() for _ in range(forwards)]) for g in default]

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        for default, owned in self._owned:
            with torch.cuda.device(default.device):  # where torch allocates what the graph reads
                for generator in owned:
                    graph.register_generator_state(generator)

    _cpu: Tensor

    @contextmanager
    def forward(self, index: int) -> Iterator[None]:
        """Around the forward of that number, 0 the first, while a graph is captured.

        Inside, the default generators draw from the forward's own.  Where those are not part of the graph,
        torch refuses the draw, and the error says what to do.
        """
        if index:  # numbers drawn on the CPU are constants of the graph, and must be the same in all forwards
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
                    f"{self._op}: closure: expected no random numbers in a captured step, or "
                    "register_graph(graph) "
                    "before the capture, got a draw (dropout?) that the forwards could not share"
                ) from error
            raise
        finally:
            for default, state, _ in held:
                default.graphsafe_set_state(state)


def check_capturable(op: str, state: HostState | DeviceState) -> None:
    if not state.capturable:
        fail(op, "capturable", "True where a CUDA graph is captured", False, RuntimeError)


def check_capture(
    op: str,
    state: HostState | DeviceState,
    rng: GraphRng | None,
    buckets: Sequence[Bucket],
    devices: Sequence[torch.device],
) -> GraphRng:
    """Raises where a capture would freeze or lose something without a word; else returns ``rng``."""
    check_capturable(op, state)
    if rng is None or not isinstance(state, DeviceState) or not state.is_placed(devices):
        fail(op, "step", "one step before the capture", "none on the parameters' devices", RuntimeError)
    for b in buckets:
        lr = b.group["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            fail(
                op, "lr", f"a number or a tensor on {b.device} where a CUDA graph is captured", "a CPU tensor"
            )
    return rng
