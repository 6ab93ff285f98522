"""The picture of gpu-check's report."""

from __future__ import annotations

import pathlib
from typing import Any

from .. import charts
from ..registry import Row


def plot(path: pathlib.Path, result: dict[str, Any]) -> bool:
    """Shares of the copy bandwidth in place, and whole steps against MeZO's loop: ours in blue, the others'
    in grey.

    False where there is nothing to draw.
    """
    rows, header = [row for row in result["rows"] if row["rounding"] == "nearest"], result["machine"]
    colour = lambda row: "other" if row.get("form", row["op"]) in ("eager", "perturb_") else "normal"
    passes = [
        ("{dtype} {dist}, {backend}".format(**row), row["copy_fraction"], colour(row))
        for row in rows
        if row["op"] in ("combine_", "perturb_") and row["k"] == 1
    ]
    steps = [
        (step_label(row), row["ratio"]["mezo"], colour(row))
        for row in rows
        if row["op"] == "step" and "mezo" in row["ratio"]
    ]
    panels = [
        charts.Bars("one pass in place: share of the copy bandwidth", passes, "{:.2f}", mark=1),
        charts.Bars("hot path of a step: times faster than MeZO's loop", steps, mark=1),
    ]
    panels = [panel for panel in panels if panel.rows]
    if panels:
        charts.png(path, charts.bars(panels, f"{header.get('gpu') or header['cpu']} (grey: baselines)"))
    return bool(panels)


def step_label(row: Row) -> str:
    return ", ".join(row[key] for key in ("workload", "form", "launch", "backend"))
