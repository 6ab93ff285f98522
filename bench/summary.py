"""The report of gpu-check: goals beside what was measured, every row, and a plot.  Nothing is measured here."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import offload
from .machine import title
from .registry import Row
from .stages import Context
from .table import LEGEND, markdown, short


@dataclass(frozen=True)
class Goal:
    """``measured`` is None where no row of the run says anything about it."""

    what: str
    asked: float
    measured: float | None
    unit: str = ""
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        """1 and more where the goal is reached."""
        if self.measured is None:
            return None
        return self.asked / self.measured if self.at_most else self.measured / self.asked

    @property
    def verdict(self) -> str:
        return "not measured" if self.ratio is None else "reached" if self.ratio >= 1 else "missed"


def _pick(rows: Sequence[Row], value: Callable[[Row], float], **wanted: Any) -> float | None:
    """The worst value of the rows that match."""
    found = [value(r) for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return min(found, default=None)


def goals(rows: Sequence[Row], backend: str) -> list[Goal]:
    """Issue 3's table.  A goal for several dtypes is judged by the worst of them."""
    fraction, noise = (lambda r: r["copy_fraction"]), (lambda r: r["noise_per_s"] / 1e12)
    inplace = {"op": "combine_", "backend": backend, "k": 1}
    nearest = {**inplace, "rounding": "nearest"}
    found = []
    for dist, dtype, asked in (
        ("normal", "bf16", 0.95),
        ("normal", "fp16", 0.95),
        ("normal", "fp32", 0.97),
        ("rademacher", "bf16", 0.97),
        ("rademacher", "fp16", 0.97),
        ("rademacher", "fp32", 0.97),
    ):
        measured = _pick(rows, fraction, **nearest, dist=dist, dtype=dtype)
        found.append(Goal(f"{dist} {dtype} in place, of the copy bandwidth", asked, measured))
    for dist in ("normal", "rademacher"):
        measured = _pick(rows, fraction, **inplace, rounding="stochastic", dist=dist, dtype="bf16")
        found.append(Goal(f"{dist} bf16, stochastic rounding, of the copy bandwidth", 0.90, measured))
    for form in ("exact", "inplace", "two-pass", "fan-out"):
        where = {"op": "step", "workload": "opt-1.3b", "backend": backend, "form": form, "dtype": "bf16"}
        measured = _pick([r for r in rows if "mezo" in r["ratio"]], lambda r: r["ratio"]["mezo"], **where)
        found.append(Goal(f"OPT-1.3B bf16, hot path of a step against MeZO's loop, {form}", 8.0, measured, "x"))
    found.append(Goal("Triton against CUDA C++, worst dtype and distribution", 0.95, _triton(rows)))
    for dist, asked in (("normal", 1.0), ("rademacher", 4.0)):
        measured = _pick(rows, noise, op="many", backend=backend, dist=dist, dtype="bf16")
        found.append(Goal(f"{dist} bf16, K = 64 in one pass, elements a second", asked, measured, "e12"))
    return found


def offload_goals(rows: Sequence[Row]) -> list[Goal]:
    """Of streamed models (docs/offload.md)."""
    found = [
        Goal("OPT-1.3B streamed, tokens a second, of those in memory", 0.97,
             _pick(rows, lambda r: r["of_in_memory"], shape="opt-1.3b")),
        Goal("streamed from host memory, copy-in, of the plain pinned copy", 0.95,
             _pick([r for r in rows if r["shape"] != "tiny"], lambda r: r["of_plain_copy"])),
    ]  # fmt: skip
    for shape, name, limit in (("opt-13b", "OPT-13B", 3.5), ("opt-30b", "OPT-30B", 5.0)):
        worst = lambda key, sign: _pick(rows, lambda r: sign * r[key], shape=shape)  # noqa: B023
        memory, ratio = worst("device_memory", -1e-9), worst("ratio", -1)
        found.append(Goal(f"{name} streamed, GPU memory", limit, None if memory is None else -memory, " GB", True))
        what = f"{name} streamed, step over the longer of transfers and computation"
        found.append(Goal(what, 1.05, None if ratio is None else -ratio, "", True))
    return found


def offload_table(rows: Sequence[Row]) -> str:
    heads = ["model", *offload.COLUMNS]
    lines = [f"| {' | '.join(heads)} |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
    lines += [f"| {' | '.join([offload.heading(r), *(show(r) for show in offload.COLUMNS.values())])} |" for r in rows]
    return "\n".join(lines)


def _triton(rows: Sequence[Row]) -> float | None:
    """Smallest time of the CUDA row over time of the Triton row, K = 1 and in place."""
    times: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if r["op"] == "combine_" and r["k"] == 1 and r["rounding"] == "nearest":
            times.setdefault((r["dtype"], r["dist"]), {})[r["backend"]] = r["p50"]
    return min((t["cuda"] / t["triton"] for t in times.values() if {"cuda", "triton"} <= set(t)), default=None)


def goals_table(found: Sequence[Goal]) -> str:
    lines = ["| goal | asked | measured | ratio | |", "|---|--:|--:|--:|---|"]
    for g in found:
        measured = "-" if g.measured is None else f"{short(g.measured)}{g.unit}"
        ratio = "-" if g.ratio is None else f"{g.ratio:.2f}"
        lines.append(f"| {g.what} | {short(g.asked)}{g.unit} | {measured} | {ratio} | {g.verdict} |")
    return "\n".join(lines)


def _stages_table(stages: Sequence[dict[str, Any]]) -> str:
    lines = ["| stage | | seconds | |", "|---|---|--:|---|"]
    clean = lambda text: text.replace("|", "/").replace("\n", " ")
    lines += [f"| {s['name']} | {s['status']} | {s['seconds']:.1f} | {clean(s['note'])} |" for s in stages]
    return "\n".join(lines)


def plot(path: pathlib.Path, rows: Sequence[Row], name: str) -> bool:
    """Shares of the copy bandwidth in place, and whole steps against MeZO's loop, ours and the others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = [r for r in rows if r["op"] in ("combine_", "perturb_") and r["k"] == 1 and r["rounding"] == "nearest"]
    steps = [r for r in rows if r["op"] == "step" and "mezo" in r["ratio"]]
    panels = [
        (passes, lambda r: f"{r['dtype']} {r['dist']}, {r['backend']}", lambda r: r["copy_fraction"], "{:.2f}"),
        (steps, lambda r: f"{r['workload']}, {r['form']}, {r['backend']}", lambda r: r["ratio"]["mezo"], "{:.1f}"),
    ]
    heads = ("one pass in place: share of the copy bandwidth", "hot path of a step: times faster than MeZO's loop")
    if not passes and not steps:
        return False
    height = 1.2 + 0.22 * max(len(passes), len(steps))
    with plt.rc_context({"font.size": 8, "axes.edgecolor": "#999999"}):
        figure, axes = plt.subplots(1, 2, figsize=(13, height), constrained_layout=True)
        for axis, (chosen, label, value, form), head in zip(axes, panels, heads, strict=True):
            values = [value(r) for r in chosen]
            ours = ["#a8a8a8" if r["op"] == "perturb_" or r.get("form") == "eager" else "#3b6ea5" for r in chosen]
            bars = axis.barh(range(len(chosen)), values, color=ours, height=0.75)
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


def write(result: dict[str, Any], ctx: Context) -> list[pathlib.Path]:
    """README.md, result.json and result.png in the folder of the check; returns what was written."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for path in (ctx.output / f"{s['name']}.json" for s in result["stages"] if s["name"].startswith("bench-")):
        if path.exists():
            run = json.loads(path.read_text())
            rows += run["rows"]
            skipped |= run["skipped"]
    streamed: list[Row] = []
    for path in (ctx.output / f"{s['name']}.json" for s in result["stages"] if s["name"].startswith("offload-")):
        if path.exists():
            streamed += json.loads(path.read_text())["rows"]
    header = result["machine"]
    name = header.get("gpu") or header["cpu"]
    found = goals(rows, "cpu" if ctx.rehearse else "cuda") + offload_goals(streamed)
    result = {**result, "goals": [{**asdict(g), "ratio": g.ratio, "verdict": g.verdict} for g in found]}
    result |= {"skipped": skipped, "rows": rows, "offload": streamed}
    files = [ctx.output / "result.json", ctx.output / "README.md"]
    picture = ctx.output / "result.png"
    picture.unlink(missing_ok=True)
    try:
        drawn = plot(picture, rows, name)
    except Exception as error:  # the figures must not be lost with their plot: matplotlib may be absent
        drawn, skipped["plot"] = False, f"{type(error).__name__}: {error}"
    files += [picture] if drawn else []
    software = f"{title(header)}, contract {header['contract']}, Python {header['python']}"
    if "driver" in header:
        software += f"; CUDA {header['cuda']}, driver {header['driver']}, capability {header['capability']}"
    body = [f"# {name}", f"`python -m bench gpu-check`, {header['date']}. {software}."]
    if result["rehearsal"]:
        body.append("**A rehearsal on the CPU at tiny sizes: no figure below means anything.**")
    body += [f"Passed: **{'yes' if result['passed'] else 'no'}**.", _stages_table(result["stages"])]
    body += ["## Goals", goals_table(found), *([f"![Rows of the tables below]({picture.name})"] if drawn else [])]
    body += ["## Rows", LEGEND.replace("\n", " "), markdown(rows) or "None."]
    body += ["## Streamed models", offload.LEGEND, offload_table(streamed)] if streamed else []
    body += ["## Left out", "\n".join(f"* {k}: {v}" for k, v in skipped.items()) or "Nothing."]
    files[1].write_text("\n\n".join(body) + "\n")
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    return files
