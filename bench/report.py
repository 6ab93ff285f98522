"""Turns results (JSON) into docs/performance.md and a PNG.  Nothing is measured here.

Only what stands between the two markers of the document is replaced.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from . import charts
from .machine import title
from .registry import Row
from .table import LEGEND, markdown

BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"


def load(path: pathlib.Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if result.get("schema") != 1:
        raise SystemExit(f"{path}: expected schema 1, got {result.get('schema')!r}")
    return result


def section(result: dict[str, Any]) -> str:
    """A heading, the machine, the command, and the table of one result."""
    header, settings = result["machine"], result["settings"]
    where = header.get("gpu") or header["cpu"]
    software = f"{title(header).split('; ')[1]}, Python {header['python']}"
    if "driver" in header:
        software += f", CUDA {header['cuda']}, driver {header['driver']}"
    return "\n\n".join(
        [
            f"### {where}, {header['cores']} cores",
            f"`{result['command']}`, {header['date'][:10]}, {software}; {settings['numel']:,} elements.",
            markdown(result["rows"]),
        ]
    )


def panels(rows: Sequence[Row]) -> list[charts.Bars]:
    """Our passes in place with one direction, to nearest: times faster than MeZO's loop, and share of the
    bandwidth.
    """
    ours = [row for row in rows if row["op"] == "combine_" and row["k"] == 1 and row["rounding"] == "nearest"]
    if not ours:
        return []
    times = [(label(row), row["ratio"]["mezo"], row["dist"]) for row in ours if "mezo" in row["ratio"]]
    shares = [(label(row), row["copy_fraction"], row["dist"]) for row in ours]
    return [
        *([charts.Bars("times faster than MeZO's eager loop", times)] if times else []),
        charts.Bars("share of the bandwidth of a plain pass over the same bytes", shares, "{:.2f}", mark=1),
    ]


def label(row: Row) -> str:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['dtype']} {row['dist']}, {threads if row['device'] == 'cpu' else row['backend']}"


def write(files: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
    """Writes the document and the plot beside it; returns their paths."""
    results = [load(path) for path in files]
    picture = output.with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    found = panels([row for result in results for row in result["rows"]])
    if found:
        machines = dict.fromkeys(
            result["machine"].get("gpu") or result["machine"]["cpu"] for result in results
        )
        charts.png(picture, charts.bars(found, f"combine_, one tensor, in place:  {', '.join(machines)}"))
    image = [f"![Bars of the tables below]({picture.name})"] if found else []
    body = [BEGIN, *image, LEGEND.replace("\n", " ")]
    body += [*(section(result) for result in results), END]
    text = output.read_text() if output.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{output}: expected the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    output.write_text(before + "\n\n".join(body) + rest.split(END, 1)[1])
    return [output, picture] if found else [output]
