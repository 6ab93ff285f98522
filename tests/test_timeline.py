"""The picture of a streamed run: its title and the numbers beside its lanes are those of the spans."""

from __future__ import annotations

import re

import pytest

from zokernels.offload import Span, plot
from zokernels.offload.timeline import busy


def test_busy_counts_a_moment_once(rng):
    """Against a clock of a thousand ticks, each of which is covered or not."""
    spans = []
    for _ in range(30):
        begin, end = sorted(rng.sample(range(1000), 2))
        spans.append(Span("compute", "model.layers.1", float(begin), float(end)))
    covered = sum(any(s.begin <= tick < s.end for s in spans) for tick in range(1000))
    assert busy(spans) == covered
    assert busy([]) == 0


@pytest.mark.parametrize("title", ["", "Two steps"])
def test_title_and_numbers(title, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    spans = [
        Span("copy-in", "model.layers.12", 1.0, 1.5),
        Span("compute", "model.layers.12", 1.25, 2.75),
        Span("compute", "model.layers.13", 2.75, 3.0),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot(spans, tmp_path / "timeline.svg", title)
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "timeline.svg").read_text())
    assert (title or "Streamed blocks: 2 s in all, of which compute takes 1.75") in words
    assert {"0.5 s, 25%", "1.75 s, 88%"} <= {word.strip() for word in words}
    assert {"copy-in", "compute", "seconds", "12", "13"} <= set(words)
