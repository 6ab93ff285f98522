"""Plots for the page of results, as HTML and SVG in the colours of the page's style: nothing is measured here.

Bars are HTML, so that their text keeps its size on a phone; dots and curves are SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    kind: str  # a class of the style sheet: normal, rademacher, other
    title: str = ""


def bars(rows: Sequence[Bar], *, mark: float | None = None, mark_text: str = "") -> str:
    """Horizontal bars from 0 to the largest value, with a line at ``mark``."""
    top = max([*(row.value for row in rows), mark or 0.0]) or 1.0
    out = ['<div class="bars">']
    for row in rows:
        at = f'<i class="mark" style="left:{100 * mark / top:.2f}%"></i>' if mark else ""
        out.append(
            f'<div class="bar" title="{escape(row.title)}"><span class="name">{escape(row.label)}</span>'
            f'<span class="track">{at}<b class="{row.kind}" style="width:{100 * row.value / top:.2f}%"></b></span>'
            f'<span class="value">{escape(row.text)}</span></div>'
        )
    if mark:
        out.append(f'<p class="note">Dashed: {escape(mark_text)}.</p>')
    return "\n".join([*out, "</div>"])


@dataclass(frozen=True)
class Dot:
    value: float
    kind: str
    title: str


def dots(rows: Sequence[tuple[str, Sequence[Dot]]], unit: str) -> str:
    """A row of dots for each label on one logarithmic axis; the line joins the least and the greatest."""
    values = [dot.value for _, points in rows for dot in points]
    low, high = (f(math.log10(v)) for f, v in ((math.floor, min(values)), (math.ceil, max(values))))
    high += high == low
    left, width, step, top = 128, 720, 30, 34
    x = lambda v: left + (width - left - 24) * (math.log10(v) - low) / (high - low)
    height = top + step * len(rows) + 10
    out = [
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(unit)}, logarithmic">'
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{height - 8}"/>')
        words = f"{10.0**power:g} {escape(unit)}"
        out.append(f'<text class="tick" x="{at:.1f}" y="{top - 16}" text-anchor="middle">{words}</text>')
    for i, (label, points) in enumerate(rows):
        y = top + step * i + step / 2
        ends = sorted(x(dot.value) for dot in points)
        out.append(f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        out.append(f'<line class="span" x1="{ends[0]:.1f}" x2="{ends[-1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for dot in points:
            place = f'cx="{x(dot.value):.1f}" cy="{y:.1f}" r="6"'
            out.append(f'<circle class="{dot.kind}" {place}><title>{escape(dot.title)}</title></circle>')
    return "\n".join([*out, "</svg></div>"])


def spark(curve: Sequence[tuple[float, float]], behind: Sequence[tuple[float, float]], top: float) -> str:
    """A small line of (x, y) from 0 to ``top``, over the same of ``behind``."""
    width, height = 132, 40
    end = max(x for x, _ in (*curve, *behind)) or 1

    def path(points: Sequence[tuple[float, float]]) -> str:
        places = (f"{width * x / end:.1f},{height - 2 - (height - 4) * min(y, top) / top:.1f}" for x, y in points)
        return "M" + "L".join(places)

    words = f"from {curve[0][1]:.2f} to {curve[-1][1]:.3f}"
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{words}">'
        f'<path class="behind" d="{path(behind)}"/><path class="line" d="{path(curve)}"/></svg>'
    )
