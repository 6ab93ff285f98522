"""JSON results into docs/performance.md and a PNG: nothing is measured here.

The document's own text stays; what stands between the two markers is replaced.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

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


def plot(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> bool:
    """False where nothing is to be drawn.

    Share of the copy's bandwidth and ratio to MeZO's loop: in place, nearest, K = 1, by dtype, dist and threads.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        (result["machine"], row)
        for result in results
        for row in result["rows"]
        if row["op"] == "combine_" and row["k"] == 1 and row["rounding"] == "nearest"
    ]
    if not rows:
        return False
    labels = [_label(row) for _, row in rows]
    colour = {"normal": "#3b6ea5", "rademacher": "#d1662a"}
    with plt.rc_context({"font.size": 9, "axes.edgecolor": "#999999"}):
        figure, panels = plt.subplots(1, 2, figsize=(10, 0.32 * len(rows) + 1.6), sharey=True, constrained_layout=True)
        values = ([r["copy_fraction"] for _, r in rows], [r["ratio"]["mezo"] for _, r in rows])
        heads = ("share of the bandwidth of a plain pass in place", "times faster than MeZO's eager loop")
        for panel, value, head, form in zip(panels, values, heads, ("{:.2f}", "{:.1f}"), strict=True):
            bars = panel.barh(range(len(rows)), value, color=[colour[r["dist"]] for _, r in rows], height=0.7)
            panel.bar_label(bars, [form.format(v) for v in value], padding=3)
            panel.set_xlabel(head)
            panel.margins(x=0.12)
            panel.grid(axis="x", color="#e6e6e6")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].axvline(1, color="#555555", linewidth=0.8, linestyle="--")
        panels[0].set_yticks(range(len(rows)), labels)
        panels[0].invert_yaxis()
        machines = dict.fromkeys(m.get("gpu") or m["cpu"] for m, _ in rows)
        figure.suptitle("combine_, one tensor, in place:  " + ", ".join(machines), fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return True


def _label(row: Row) -> str:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['dtype']} {row['dist']}, {threads if row['device'] == 'cpu' else row['backend']}"


def write(files: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
    """Writes the document and the plot beside it; returns their paths."""
    results = [load(path) for path in files]
    picture = output.with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = plot(picture, results)
    image = [f"![Bars of the tables below]({picture.name})"] if drawn else []
    body = [BEGIN, *image, LEGEND.replace("\n", " ")]
    body += [*(section(result) for result in results), END]
    text = output.read_text() if output.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{output}: expected the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    output.write_text(before + "\n\n".join(body) + rest.split(END, 1)[1])
    return [output, picture] if drawn else [output]
