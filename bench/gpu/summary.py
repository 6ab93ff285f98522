"""The report of gpu-check: goals beside what was measured, and every row.  Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import offload
from ..machine import title
from ..registry import Row
from ..table import LEGEND, markdown, short
from ..workloads import PUBLISHED
from .ncu import PIPES


@dataclass(frozen=True)
class Goal:
    """A figure to reach.  ``measured`` is None if no row of the run says anything about it."""

    what: str
    asked: float
    measured: float | None
    unit: str = ""
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        """How far the goal is reached: 1 or more if it is."""
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
        where |= {"rounding": "nearest", "launch": "eager"}
        measured = _pick([r for r in rows if "mezo" in r["ratio"]], lambda r: r["ratio"]["mezo"], **where)
        what = f"OPT-1.3B bf16, hot path of a step against MeZO's loop, {form}"
        found.append(Goal(what, 8.0, measured, "x"))
    found.append(Goal("Triton against CUDA C++, worst dtype and distribution", 0.95, _triton(rows)))
    for dist, asked in (("normal", 1.0), ("rademacher", 4.0)):
        measured = _pick(rows, noise, op="many", backend=backend, dist=dist, dtype="bf16")
        found.append(Goal(f"{dist} bf16, K = 64 in one pass, elements a second", asked, measured, "e12"))
    for name, theirs in PUBLISHED.items():
        of_peak = [r for r in rows if r.get("of_peak") and r["rounding"] == "nearest"]
        measured = _pick(of_peak, lambda r: r["of_peak"], op="published", workload=name, backend=backend)
        what = f"{name}, of the bandwidth of the card (theirs: on {theirs.gpu})"
        found.append(Goal(what, theirs.of_peak, measured))
    return found


def offload_goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals of streamed models (docs/offload.md)."""
    found = [
        Goal("OPT-1.3B streamed, tokens a second, of those in memory", 0.97,
             _pick(rows, lambda r: r["of_in_memory"], shape="opt-1.3b")),
        Goal("streamed from host memory, copy-in, of the plain pinned copy", 0.95,
             _pick([r for r in rows if r["shape"] != "tiny"], lambda r: r["of_plain_copy"])),
    ]  # fmt: skip
    for shape, name, limit in (("opt-13b", "OPT-13B", 3.5), ("opt-30b", "OPT-30B", 5.0)):
        worst = lambda key, sign: _pick(rows, lambda r: sign * r[key], shape=shape)  # noqa: B023
        memory, ratio = worst("device_memory", -1e-9), worst("ratio", -1)
        memory, ratio = (None if value is None else -value for value in (memory, ratio))
        found.append(Goal(f"{name} streamed, GPU memory", limit, memory, " GB", True))
        what = f"{name} streamed, step over the longer of transfers and computation"
        found.append(Goal(what, 1.05, ratio, "", True))
    return found


def population_goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals of populations (docs/populations.md), each of which its row states."""
    if not rows:
        return [Goal("a population in one forward, of the tokens a second of plain inference", 0.91, None)]
    with_goal = (r for r in rows if r["goal"] is not None)
    return [Goal(r["row"], r["goal"], r["ratio"], "", not r["at_least"]) for r in with_goal]


def offload_table(rows: Sequence[Row]) -> str:
    heads = ["model", *offload.COLUMNS]
    lines = [f"| {' | '.join(heads)} |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
    cells = ([offload.heading(r), *(show(r) for show in offload.COLUMNS.values())] for r in rows)
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in cells)])


def _triton(rows: Sequence[Row]) -> float | None:
    """Smallest time of the CUDA row over time of the Triton row, K = 1 and in place."""
    times: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if r["op"] == "combine_" and r["k"] == 1 and r["rounding"] == "nearest":
            times.setdefault((r["dtype"], r["dist"]), {})[r["backend"]] = r["p50"]
    both = (t for t in times.values() if {"cuda", "triton"} <= set(t))
    return min((t["cuda"] / t["triton"] for t in both), default=None)


def goals_table(found: Sequence[Goal]) -> str:
    lines = ["| goal | asked | measured | ratio | |", "|---|--:|--:|--:|---|"]
    for g in found:
        measured = "-" if g.measured is None else f"{short(g.measured)}{g.unit}"
        ratio = "-" if g.ratio is None else f"{g.ratio:.2f}"
        lines.append(f"| {g.what} | {short(g.asked)}{g.unit} | {measured} | {ratio} | {g.verdict} |")
    return "\n".join(lines)


def all_goals(result: dict[str, Any]) -> list[Goal]:
    found = goals(result["rows"], "cpu" if result["rehearsal"] else "cuda")
    return found + offload_goals(result["offload"]) + population_goals(result.get("population", []))


def _stages_table(stages: Sequence[dict[str, Any]]) -> str:
    lines = ["| stage | decides | | seconds | |", "|---|---|---|--:|---|"]
    clean = lambda text: text.replace("|", "/").replace("\n", " ")
    for s in stages:
        cells = (s["name"], s["decides"], s["status"], f"{s['seconds']:.1f}", clean(s["note"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


#: The columns of the table of profiled kernels: for each head the key in a row, the format and a factor.
_PROFILED = {
    "us": ("seconds", ".0f", 1e6),
    "GHz": ("clock_ghz", ".2f", 1),
    **{f"{pipe} %": (pipe, ".0f", 1) for pipe in PIPES},
    "instr/el": ("instructions", ".1f", 1),
    "sect/ld": ("sectors_load", ".1f", 1),
    "sect/st": ("sectors_store", ".1f", 1),
    "read B/el": ("dram_read", ".2f", 1),
    "write B/el": ("dram_write", ".2f", 1),
    "DRAM %": ("dram", ".0f", 1),
    "warps %": ("warps", ".0f", 1),
    "regs": ("registers", ".0f", 1),
}


def profiled(rows: Sequence[Row]) -> list[list[str]]:
    """The table of the stage ncu, with its heads first, and "-" where this ncu does not know the metric."""
    cell = lambda row, key, form, factor: format(row[key] * factor, form) if key in row else "-"
    lines = [[row["kernel"], *(cell(row, *how) for how in _PROFILED.values())] for row in rows]
    return [["kernel", *_PROFILED], *lines]


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([head, "|---" + "|--:" * (len(table[0]) - 1) + "|", *lines])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        " ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in table
    ]


def shares(rows: Sequence[Row]) -> list[list[str]]:
    """A row for each pass in place: which share of a copy's bandwidth it reaches, by backend."""
    found: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["op"] == "combine_":
            what = f"{r['dtype']} {r['dist']} {r['rounding']} K = {r['k']}"
            found.setdefault(what, {})[r["backend"]] = f"{r['copy_fraction']:.2f}"
    backends = list(dict.fromkeys(b for cells in found.values() for b in cells))
    return [
        ["of copy", *backends],
        *([what, *(c.get(b, "-") for b in backends)] for what, c in found.items()),
    ]


def terminal(result: dict[str, Any]) -> list[str]:
    """What a person reads first: what went wrong, the figures that decide, and the goals that were
    measured.
    """
    lines: list[str] = []
    for stage in result["stages"]:
        if "tail" in stage:
            lines += [f"{stage['name']}: {stage['status']}: {stage['note']}"]
            lines += [f"    {line[:160]}" for line in stage["tail"][-6:]]  # all of it: README.md and log.txt
    if len(table := shares(result["rows"])) > 1:
        lines += ["", *_aligned(table)]
    if result["ncu"]:
        lines += ["", *_aligned(profiled(result["ncu"]))]
    measured = [g for g in all_goals(result) if g.measured is not None]
    if measured:
        value = lambda goal, number: f"{short(number)}{goal.unit}"
        cells = [[g.what, value(g, g.asked), value(g, g.measured), g.verdict] for g in measured]
        lines += ["", *_aligned([["goal", "asked", "measured", ""], *cells])]
    left_out = [f"{s['name']}: {s['note']}" for s in result["stages"] if s["status"] == "skipped"]
    if left_out:
        lines += ["", "Left out:", *(f"    {line}" for line in left_out)]
    return lines


def readme(result: dict[str, Any], found: Sequence[Goal], picture: bool) -> str:
    """README.md: everything that is known, also of a check that goes on or was cut off."""
    header, rows = result["machine"], result["rows"]
    software = f"{title(header)}, contract {header['contract']}"
    software += f", Python {header['python']}, Triton {header['triton']}"
    if "driver" in header:
        software += f"; CUDA {header['cuda']}, driver {header['driver']}, capability {header['capability']}"
        software += f", nvcc {header['nvcc'] or 'not there'}"
    state = f"Passed: **{'yes' if result['passed'] else 'no'}**."
    if result["stopped_by"]:
        state += f" Ended early by {result['stopped_by']}."
    elif not result["finished"]:
        running = ", ".join(result["running"]) or "nothing"
        state = f"**Not finished: when this was written, {running} was running.**"
    body = [
        f"# {header.get('gpu') or header['cpu']}",
        f"`python -m bench gpu-check`, {header['date']}. {software}.",
    ]
    if result["rehearsal"]:
        body.append("**A rehearsal on the CPU at tiny sizes: no figure below means anything.**")
    body += [state, _stages_table(result["stages"])]
    for stage in result["stages"]:
        if "tail" in stage:
            body.append(f"### {stage['name']}\n\n```\n" + "\n".join(stage["tail"]) + "\n```")
    body += [
        "## Goals",
        goals_table(found),
        *(["![Rows of the tables below](result.png)"] if picture else []),
    ]
    body += ["## Rows", LEGEND.replace("\n", " "), markdown(rows) or "None."]
    for name, clock in result["clock_mhz"].items():
        span = f"{clock['least']} to {clock['most']} MHz, median {clock['median']:g}"
        body.append(f"Clock of the multiprocessors during {name}: {span}.")
    if result["ncu"]:
        words = "us: duration; instr/el: instructions of a warp for 32 elements; sect: sectors a request."
        body += ["## Kernels under Nsight Compute", words, _markdown(profiled(result["ncu"]))]
    if result["offload"]:
        body += ["## Streamed models", offload.LEGEND, offload_table(result["offload"])]
    if result.get("population"):
        heads = ["row", "ratio", "20th percentile", "80th"]
        cells = (
            [r["row"], *(f"{r[key]:.3f}" for key in ("ratio", "p20", "p80"))] for r in result["population"]
        )
        body += ["## Populations", _markdown([heads, *cells])]
    body += ["## Left out", "\n".join(f"* {k}: {v}" for k, v in result["skipped"].items()) or "Nothing."]
    return "\n\n".join(body) + "\n"
