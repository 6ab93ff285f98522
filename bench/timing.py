"""Timing in turns: every candidate runs once a round, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Cycles that the GPU spins before an event pair: the host queues all of a candidate's launches in this time
#: (about 0.5 ms), so that an eager loop of many small kernels is not charged for the host.
_SPIN = 1_000_000


@dataclass(frozen=True)
class Times:
    """Percentiles of one call, in seconds, over ``rounds`` calls."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        ordered = sorted(samples)
        at = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]
        return cls(at(0.2), at(0.5), at(0.8), len(ordered))


def _time_cpu(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SPIN)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def measure(
    candidates: dict[str, Callable[[], None]], device: str, seconds: float, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, Times]:
    """Times of each candidate by name.  One round warms up; then rounds until ``seconds`` have passed."""
    clock = _time_cuda if device == "cuda" else _time_cpu
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < stop):
        for name, call in candidates.items():
            samples[name].append(clock(call))
        rounds += 1
    return {name: Times.of(s) for name, s in samples.items()}
