"""What happened when: spans of each lane (copy-in, compute, copy-out, ...), for a picture of the overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .blocks import Block


class Span(NamedTuple):
    lane: str
    block: str
    begin: float  #: seconds since the timeline began
    end: float


class Timeline:
    """Off unless :meth:`start` has been called: then nothing is measured, and nothing is allocated."""

    def __init__(self) -> None:
        self._on, self._zero = False, 0.0
        self._spans: list[Span] = []
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self._first: torch.cuda.Event | None = None

    def start(self) -> None:
        self._on, self._zero, self._spans, self._events = True, time.perf_counter(), [], []
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record()

    def stop(self) -> list[Span]:
        """The spans since :meth:`start`, by their beginning; waits for the GPU."""
        self._on = False
        for lane, block, begin, end in self._events:
            end.synchronize()
            assert self._first is not None
            at = [self._first.elapsed_time(e) / 1e3 for e in (begin, end)]
            self._spans.append(Span(lane, block, *at))
        self._events = []
        return sorted(self._spans, key=lambda s: s.begin)

    def now(self) -> float:
        return time.perf_counter() if self._on else 0.0

    def add(self, lane: str, block: Block, begin: float) -> None:
        """A span until now of the host's clock; ``begin``: from :meth:`now`."""
        if self._on and begin:
            self._spans.append(Span(lane, block.name, begin - self._zero, time.perf_counter() - self._zero))

    @contextmanager
    def span(self, lane: str, block: Block | None) -> Iterator[None]:
        """Of the host's clock."""
        if not self._on:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._spans.append(Span(lane, block.name if block else "", begin - self._zero, end - self._zero))

    @contextmanager
    def device_span(self, lane: str, block: Block, stream: torch.cuda.Stream) -> Iterator[None]:
        if not self._on:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((lane, block.name, begin, end))
