"""Timing in turns: every candidate runs once in each round, so that what disturbs the machine disturbs all of
them.

On a GPU the times are those between two events of the device.  The time until a call returns on the host is
measured apart from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

#: The highest clock of a device in cycles per second, by which seconds become cycles for it to spin.
_CLOCK = 2e9

#: How many seconds the device spins before the first event: 1.5 times the host time of the call, within these
#: bounds. Meanwhile the host queues its launches, so that the times of many small kernels do not include the
#: host's work.  In training the forwards give the host that time.  A longer spin would change nothing,
#: because the driver queues about a thousand launches at most.
_SPIN = (0.5e-3, 20e-3)


@dataclass(frozen=True)
class Times:
    """Percentiles of the time of one call, in seconds, over ``rounds`` calls.

    ``host`` is the time until the call returns, which is measured on a GPU only.
    """

    p20: float
    p50: float
    p80: float
    rounds: int
    host: float | None = None

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        return cls(*quantiles(samples), len(samples))


def _time_cpu(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_host(call: Callable[[], None]) -> float:
    """The seconds until the call returns, on an idle device.

    It is the best of three, since what disturbs the host can only add time.
    """
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        best = min(best, _time_cpu(call))
    torch.cuda.synchronize()
    return best


def _time_cuda(call: Callable[[], None], spin: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(spin * _CLOCK))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile: always one of ``values``."""
    ordered = sorted(values)
    low, middle, high = (
        ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.5, 0.8)
    )
    return low, middle, high


def sample(
    candidates: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    spin: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, round by round: until ``seconds`` have passed.

    ``spin``: on a GPU, the seconds for which the device waits before each candidate.  Without it each
    candidate runs twice before the clock is looked at, to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    if spin is None:
        for call in (*candidates.values(), *candidates.values()):
            call()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < stop):
        for name, call in candidates.items():
            samples[name].append(
                _time_cuda(call, (spin or {})[name]) if device == "cuda" else _time_cpu(call)
            )
        rounds += 1
    return samples


def measure(
    candidates: dict[str, Callable[[], None]],
    device: str,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Times]:
    """Times of each candidate by name.  One round warms up; then rounds until ``seconds`` have passed."""
    for call in candidates.values():
        call()
    host = {name: _time_host(call) if device == "cuda" else None for name, call in candidates.items()}
    spin = {name: min(max(1.5 * (h or 0), _SPIN[0]), _SPIN[1]) for name, h in host.items()}
    samples = sample(candidates, device, seconds, min_rounds, max_rounds, spin)
    return {name: replace(Times.of(s), host=host[name]) for name, s in samples.items()}
