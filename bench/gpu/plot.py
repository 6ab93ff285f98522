"""The picture of gpu-check's report."""

from __future__ import annotations

import pathlib
from typing import Any


def plot(path: pathlib.Path, result: dict[str, Any]) -> bool:
    """False where there is nothing to draw.

    Shares of the copy bandwidth in place, and whole steps against MeZO's loop, ours and the others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, header = result["rows"], result["machine"]
    name = header.get("gpu") or header["cpu"]
    nearest = [r for r in rows if r["rounding"] == "nearest"]
    passes = [r for r in nearest if r["op"] in ("combine_", "perturb_") and r["k"] == 1]
    steps = [r for r in nearest if r["op"] == "step" and "mezo" in r["ratio"]]
    names = ("workload", "form", "launch", "backend")
    panels = [
        (passes, lambda r: "{dtype} {dist}, {backend}".format(**r), lambda r: r["copy_fraction"], "{:.2f}"),
        (steps, lambda r: ", ".join(r[k] for k in names), lambda r: r["ratio"]["mezo"], "{:.1f}"),
    ]
    heads = (
        "one pass in place: share of the copy bandwidth",
        "hot path of a step: times faster than MeZO's loop",
    )
    if not passes and not steps:
        return False
    height = 1.2 + 0.22 * max(len(passes), len(steps))
    with plt.rc_context({"font.size": 8, "axes.edgecolor": "#999999"}):
        figure, axes = plt.subplots(1, 2, figsize=(13, height), constrained_layout=True)
        for axis, (chosen, label, value, form), head in zip(axes, panels, heads, strict=True):
            values = [value(r) for r in chosen]
            theirs = [r.get("form", r["op"]) in ("eager", "perturb_") for r in chosen]
            colours = ["#a8a8a8" if other else "#3b6ea5" for other in theirs]
            bars = axis.barh(range(len(chosen)), values, color=colours, height=0.75)
            axis.bar_label(bars, [form.format(v) for v in values], padding=3)
            axis.set_yticks(range(len(chosen)), [label(r) for r in chosen])
            axis.invert_yaxis()
            axis.set_title(head, fontsize=9)
            axis.margins(x=0.12, y=0.01)
            axis.axvline(1, color="#555555", linewidth=0.8, linestyle="--")
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{name} (grey: baselines)", fontsize=10)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return True
