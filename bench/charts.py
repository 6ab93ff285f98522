"""The pictures of the benchmarks, drawn with matplotlib: as PNG files, and as SVG within the page of results.

Nothing is measured here.  A colour is named by what it stands for, so that the page's style can replace it.
"""

from __future__ import annotations

import io
import pathlib
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The colours of a PNG.  In the page they are the variables of page.css with these names, light or dark.
COLOURS = {
    "normal": "#2b6cb0",
    "rademacher": "#d0672b",
    "other": "#9aa4ad",
    "ink": "#1d2329",
    "soft": "#5b6670",
    "line": "#e4e1d9",
}


def matplotlib() -> ModuleType:
    """The library; where it is not installed, the program ends with a message that says so."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise SystemExit(
            "bench: expected matplotlib for the pictures, got none; pip install matplotlib"
        ) from error
    return matplotlib


@contextmanager
def style() -> Iterator[None]:
    """What all pictures have in common, while one is drawn and written."""
    settings = {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 10,
        "grid.color": COLOURS["line"],
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "zokernels",  # the same ids in every run
        **dict.fromkeys(("text.color", "axes.labelcolor", "ytick.labelcolor"), COLOURS["ink"]),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), COLOURS["soft"]),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    }
    with matplotlib().rc_context(settings):
        yield


def figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches, and its [rows, columns] axes; ``options`` of
    ``subplots``.
    """
    drawn = matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, from the top: a label, a length and a colour each, and a dashed line at ``mark``."""

    title: str
    rows: Sequence[tuple[str, float, str]]
    form: str = "{:.1f}x"  #: of the number at a bar's end
    mark: float | None = None


@style()
def bars(panels: Sequence[Bars], title: str = "", width: float = 6.0) -> Figure:
    """``panels`` side by side, each ``width`` inches wide."""
    most = max(len(panel.rows) for panel in panels)
    drawn, axes = figure(1, len(panels), width * len(panels), 0.6 + 0.23 * most)
    for axis, panel in zip(axes.flat, panels, strict=True):
        labels, lengths, colours = zip(*panel.rows, strict=True)
        places = range(len(labels))
        bar = axis.barh(places, lengths, color=[COLOURS[name] for name in colours], height=0.72)
        axis.bar_label(bar, [panel.form.format(length) for length in lengths], padding=3)
        axis.set_yticks(places, labels)
        axis.margins(x=0.12)
        axis.set_ylim(most - 0.5, -0.5)  # a bar is as high in each panel
        axis.set_title(panel.title)
        if panel.mark is not None:
            axis.axvline(panel.mark, color=COLOURS["soft"], linewidth=0.8, linestyle="--")
    drawn.suptitle(title or None)
    return drawn


@dataclass(frozen=True)
class Dots:
    """Dots of one name, colour and marker: (label of a row, value) each."""

    name: str
    points: Sequence[tuple[str, float]]
    colour: str
    marker: str


@style()
def dots(series: Sequence[Dots], labels: Sequence[str], unit: str) -> Figure:
    """A row for each of ``labels``, from the top, on one logarithmic axis; a legend names the series."""
    drawn, axes = figure(1, 1, 10, 1.2 + 0.3 * len(labels))
    axis = axes.flat[0]
    for one in series:
        values, rows = [value for _, value in one.points], [labels.index(label) for label, _ in one.points]
        axis.plot(values, rows, one.marker, color=COLOURS[one.colour], label=one.name, markersize=6)
    axis.set(xscale="log", xlabel=unit)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.grid(axis="both")
    axis.set_axisbelow(True)
    drawn.legend(loc="outside upper left", ncols=6, frameon=False)
    return drawn


@style()
def curves(
    rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], top: float, unit: str, title: str = ""
) -> Figure:
    """Small multiples of (x, y) with y up to ``top``: each row has a field, and the first stands behind it in
    grey.
    """
    columns = 5
    height = -(-len(rows) // columns)
    drawn, axes = figure(height, columns, 13, 1.7 * height, sharex=True, sharey=True)
    for axis, (name, points) in zip(axes.flat, rows, strict=False):
        axis.plot(*zip(*rows[0][1], strict=True), color=COLOURS["other"], linewidth=1.5)
        axis.plot(*zip(*points, strict=True), color=COLOURS["normal"], linewidth=1.5)
        axis.set_title(name, fontsize=8)
        axis.set_ylim(0, top)
        axis.grid()
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel(unit)
    drawn.suptitle(title or None)
    return drawn


#: A line that is several at a time: (x, values at x).
Band = Sequence[tuple[float, Sequence[float]]]


@style()
def bands(panels: Sequence[tuple[str, Sequence[tuple[str, Band]]]], x: str, y: str) -> Figure:
    """``panels`` side by side, each a title and named lines: the mean, and from the least to the most."""
    drawn, axes = figure(1, max(1, len(panels)), 5.2 * max(1, len(panels)), 3.6)
    colours = ["#2b6cb0", "#d0672b", "#3d8b5f", "#8a5aa8", "#a8324a", "#5b6670"]
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for (name, points), colour in zip(lines, colours, strict=False):
            at = [place for place, _ in points]
            least, mean, most = ([f(v) for _, v in points] for f in (min, statistics.fmean, max))
            axis.plot(at, mean, color=colour, linewidth=1.5, label=name)
            axis.fill_between(at, least, most, color=colour, alpha=0.15)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid()
        axis.legend(fontsize=7, frameon=False)
    return drawn


@style()
def png(path: pathlib.Path, drawn: Figure) -> None:
    drawn.savefig(path, dpi=130)


@style()
def svg(drawn: Figure, words: str) -> str:
    """An SVG element in the colours of the page, with ``words`` for those who do not see it.

    Two pictures have the same ids only where these name the same shape.
    """
    drawn.savefig(out := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="\w+_\d+"', "", text)  # of groups, which nothing refers to
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)
