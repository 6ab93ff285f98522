"""What happened when: spans in lanes (copy-in, compute, copy-out, ...), for a picture of their overlap."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
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
    """Collects spans.  Until :meth:`start` is called nothing is measured, and nothing is allocated.

    ``device``: where the streams are whose work is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on, self._zero = False, 0.0
        self._spans: list[Span] = []
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self._first: torch.cuda.Event | None = None

    def start(self) -> None:
        self._on, self._zero, self._spans, self._events = True, time.perf_counter(), [], []
        if self._device.type == "cuda":  # times between events are those of one device
            torch.cuda.synchronize(self._device)
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record(torch.cuda.current_stream(self._device))

    def stop(self) -> list[Span]:
        """The spans since :meth:`start`, in the order of their beginning.  Waits for the GPU."""
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

    def add(self, lane: str, block: Block | None, begin: float) -> None:
        """Adds a span that ends now, by the host's clock; ``begin`` comes from :meth:`now`."""
        if self._on and begin:
            name, end = block.name if block else "", time.perf_counter()
            self._spans.append(Span(lane, name, begin - self._zero, end - self._zero))

    @contextmanager
    def span(self, lane: str, block: Block | None) -> Iterator[None]:
        """Adds a span of the host's clock around the ``with`` block."""
        begin = self.now()
        try:
            yield
        finally:
            self.add(lane, block, begin)

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


LANES = {"read": "#0f766e", "encode": "#65a30d", "copy-in": "#0891b2", "update": "#ea580c",
    "compute": "#4f46e5",
         "copy-out": "#be123c", "write": "#881337"}  # fmt: skip


def _short(block: str) -> str:
    """From the number on: "model.layers.12" is 12."""
    parts = block.split(".")
    return ".".join(parts[next((i for i, p in enumerate(parts) if p.isdecimal()), -1) :])


def busy(spans: Sequence[Span]) -> float:
    """The seconds in which at least one of ``spans`` is going on."""
    seconds, until = 0.0, 0.0
    for span in sorted(spans, key=lambda s: s.begin):
        seconds += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return seconds


def plot(spans: Sequence[Span], path: str | os.PathLike[str], title: str = "") -> None:
    """A PNG (or what the name says) with a row for each lane and a bar for each span.  Needs matplotlib.

    Beside a lane stands for how many seconds it was busy, and which share of the whole time that is.  Without
    ``title`` the title is the whole time and the busiest lane.
    """
    from matplotlib.figure import Figure

    lanes = [lane for lane in LANES if any(s.lane == lane for s in spans)]
    figure = Figure(figsize=(11, 0.9 + 0.55 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    total = max(s.end for s in spans) - min(s.begin for s in spans)
    took = {lane: busy([s for s in spans if s.lane == lane]) for lane in lanes}
    for row, lane in enumerate(lanes):
        mine = [s for s in spans if s.lane == lane]
        words = f" {took[lane]:.3g} s, {took[lane] / total:.0%}" if total else ""
        axes.text(1, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        bars = [(s.begin, s.end - s.begin) for s in mine]
        edges = [0.4 if width > 0.005 * total else 0 for _, width in bars]  # a thin bar would be all edge
        axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=LANES[lane], edgecolor="white", linewidth=edges)
        for s in mine:
            label = _short(s.block)
            if s.end - s.begin > (0.01 + 0.006 * len(label)) * total:
                axes.text(
                    (s.begin + s.end) / 2, row, label, ha="center", va="center", color="white", fontsize=7
                )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    most = max(took, key=took.__getitem__)
    said = f"Streamed blocks: {total:.3g} s in all, of which {most} takes {took[most]:.3g}"
    axes.set_title(title or said, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=130)
