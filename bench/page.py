"""Results as one self-contained HTML page: plots, tables, machine, versions.  Nothing is measured here."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from . import charts, offload, report, trajectory
from .learn import run as learn
from .registry import Row
from .table import LEGEND, columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent

_SCRIPT = """
document.querySelector("button").onclick = () => {
  const root = document.documentElement, dark = getComputedStyle(root).colorScheme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
};
"""

_META = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'

Result = dict[str, Any]


def kind_of(result: Result) -> str:
    """Which command wrote the file: run, methods, learn, trajectory, offload or gpu-check."""
    if result.get("kind") == "learn" and "runs" in result:
        return "learn"
    if result.get("schema") != 1 or "machine" not in result or "rows" not in result:
        raise SystemExit(
            "bench report: expected a file that `bench run`, `methods`, `learn`, `trajectory`, `offload` or "
            "`gpu-check` wrote, "
            "got another"
        )
    if any("what" in row for row in result["rows"]):
        return "trajectory"
    if result.get("kind") == "offload":
        return "offload"
    return "methods" if "budget" in result else "gpu-check" if "goals" in result else "run"


def is_tiny(result: Result) -> bool:
    """Whether the file is of a run that shows that everything works, at sizes whose times mean nothing."""
    return bool(result.get("rehearsal")) or "--tiny" in result.get("command", "").split()


#: What each card and headline of such a run says.
TINY = "TINY: it ran; no figure here means anything"


def _nearest(rows: Sequence[Row]) -> list[Row]:
    """The rows that the pictures compare: one pass in place with one direction, rounded to nearest."""
    return [r for r in rows if r["op"] == "combine_" and r["k"] == 1 and r["rounding"] == "nearest"]


def _where(row: Row) -> str:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return threads if row["device"] == "cpu" else row["backend"]


# --- parts ----------------------------------------------------------------------------------------


def _table(heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> str:
    """A table.  Each of ``heads`` is (text, whether the column is aligned to the right); cells are HTML."""
    side = lambda right: ' class="right"' if right else ""
    out = ['<div class="scroll"><table><thead><tr>']
    out += [f"<th{side(right)}>{escape(head)}</th>" for head, right in heads]
    out.append("</tr></thead><tbody>")
    for line in lines:
        cells = (f"<td{side(right)}>{cell}</td>" for cell, (_, right) in zip(line, heads, strict=True))
        out.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*out, "</tbody></table></div>"])


def _chips(header: dict[str, Any]) -> str:
    host = header.get("host_library") or {}
    pairs = [("GPU", header.get("gpu")), ("CPU", header["cpu"]), ("cores", header["cores"])]
    pairs += [("torch", header["torch"]), ("CUDA", header.get("cuda")), ("driver", header.get("driver"))]
    pairs += [
        ("zokernels", header["zokernels"]),
        ("commit", header.get("commit")),
        ("Python", header["python"]),
    ]
    pairs += [("instructions", ", ".join(host.get("instruction_sets", []))), ("date", header["date"][:10])]
    items = (f"<li><span>{name}</span>{escape(str(value))}</li>" for name, value in pairs if value)
    return f'<ul class="chips">{"".join(items)}</ul>'


def _tiles(pairs: Sequence[tuple[str, str]]) -> str:
    cells = (
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(words)}</span></div>'
        for figure, words in pairs
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _key(*names: tuple[str, str]) -> str:
    return (
        f'<div class="key">{"".join(f"<span><i class={k!r}></i>{escape(t)}</span>" for k, t in names)}</div>'
    )


_DISTS = (("normal", "normal"), ("rademacher", "Rademacher"))


def _card(heading: str, picture: Figure) -> str:
    drawn = f'<div class="scroll">{charts.svg(picture, heading)}</div>'
    return f'<div class="card"><h3>{escape(heading)}</h3>{drawn}</div>'


def _passes(rows: Sequence[Row]) -> list[str]:
    """Two cards of bars and one of dots about a single pass."""
    ours = _nearest(rows)
    if not ours:
        return []
    out = [_key(*_DISTS), '<div class="cards">']
    out += [
        _card(panel.title[:1].upper() + panel.title[1:], charts.bars([replace(panel, title="")]))
        for panel in report.panels(rows)
    ]
    points: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for row in [r for r in rows if r["op"] == "perturb_"] + ours:
        mine = row["op"] == "combine_"
        series = (f"zokernels {row['dist']}", row["dist"], "o") if mine else (row["backend"], "other", "")
        points.setdefault(series, []).append((f"{row['dtype']} {row['dist']}", row["ns_per_element"]))
    markers = itertools.cycle("svD^x+*")
    series = [
        charts.Dots(name, at, colour, marker or next(markers))
        for (name, colour, marker), at in points.items()
    ]
    labels = sorted(
        {label for at in points.values() for label, _ in at}, key=lambda label: label.split()[::-1]
    )
    return [*out, "</div>", _card("Time an element", charts.dots(series, labels, "ns an element"))]


def _rows_table(rows: Sequence[Row]) -> str:
    """A table of every row, in the columns that the terminal shows."""
    out = []
    for columns in {id(columns_of(r)): columns_of(r) for r in rows}.values():
        mine = [[escape(c.show(r)) for c in columns] for r in rows if columns_of(r) is columns]
        out.append(_table([(c.head, c.right) for c in columns], mine))
    return f'<p class="note">{escape(LEGEND)}</p>' + "".join(out)


def _details(summary: str, body: str) -> str:
    return f'<details><summary>{escape(summary)}</summary><div class="card">{body}</div></details>'


def _skipped(result: Result) -> str:
    lines = "".join(
        f"<li>{escape(what)}: {escape(why)}</li>" for what, why in (result.get("skipped") or {}).items()
    )
    return _details("What was left out, and why", f"<ul>{lines}</ul>") if lines else ""


# --- sections -------------------------------------------------------------------------------------


def _run(result: Result) -> list[str]:
    out = [
        "<h2>One pass</h2>",
        "<p>θ ← round(θ + c z), in place, noise included.</p>",
        *_passes(result["rows"]),
    ]
    if not _nearest(result["rows"]):
        out = ["<h2>Measured</h2>"]
    return [*out, _details(f"All {len(result['rows'])} rows", _rows_table(result["rows"])), _skipped(result)]


_LINK = re.compile(r"\[(.*?)\]\((https?://[^)]*)\)")


def _methods(result: Result) -> list[str]:
    rows = result["rows"]
    ratios = charts.Bars("", [(r["method"], r["ratio"], "normal") for r in rows], mark=1)
    curves = [(r["method"], r["curve"]) for r in rows]
    top = 1.1 * max(r["loss_first"] for r in rows if r["loss_first"] < 10)
    lines = []
    for r in rows:
        paper = _LINK.sub(r'<a href="\2">\1</a>', escape(r["paper"]))
        figures = (f"{r['seconds'] * 1e3:.2f}", f"{r['eager_seconds'] * 1e3:.2f}", str(r["forwards"]))
        figures += (f"{r['bytes']:.3g}", escape(r["memory"]))
        name = f"{escape(r['method'])}<br>{paper}"
        lines.append((name, f"{r['loss_last']:.3f}", *figures, f"<code>{escape(r['use'])}</code>"))
    heads = [("method", False), ("loss, equal forwards", True), ("ms", True), ("eager ms", True)]
    heads += [("forwards a step", True), ("B a weight", True), ("state B", True), ("use", False)]
    words = (
        f"A whole step without its forwards, {result['weights']:,} weights of {result['dtype']}, "
        "against the published "
        f"form in eager PyTorch; losses over {result['budget']:,} forwards."
    )
    pictures = [
        _card("Times faster than the published eager form (dashed: equal)", charts.bars([ratios], width=10)),
        _card(
            f"Loss after equal forwards (grey: {rows[0]['method']})", charts.curves(curves, top, "forwards")
        ),
    ]
    return [
        "<h2>Methods</h2>",
        f"<p>{words}</p>",
        *pictures,
        f'<div class="card">{_table(heads, lines)}</div>',
    ]


def _check(result: Result) -> list[str]:
    goals = []
    for g in result["goals"]:
        measured = "-" if g["measured"] is None else f"{g['measured']:.3g}{g['unit']}"
        goals.append((escape(g["what"]), f"{g['asked']:g}{g['unit']}", measured, escape(g["verdict"])))
    stages = [
        (escape(s["name"]), s["status"], f"{s['seconds']:.0f}", escape(s["note"])) for s in result["stages"]
    ]
    heads = [("goal", False), ("asked", True), ("measured", True), ("", False)]
    out = [f"<h2>GPU check: {'passed' if result['passed'] else 'not passed'}</h2>"]
    if result["rehearsal"]:
        out.append("<p>A rehearsal on the CPU.</p>")
    out.append(f'<div class="card">{_table(heads, goals)}</div>')
    out += _passes(result["rows"])
    if result.get("offload"):
        out += ["<h3>Streamed models</h3>", _offload_table(result["offload"])]
    stage_heads = [("stage", False), ("", False), ("seconds", True), ("", False)]
    out.append(_details(f"{len(stages)} stages", _table(stage_heads, stages)))
    return [*out, _details(f"All {len(result['rows'])} rows", _rows_table(result["rows"])), _skipped(result)]


def _trajectory(result: Result) -> list[str]:
    lines = "".join(f"<li>{escape(trajectory.line(row))}</li>" for row in result["rows"])
    words = (
        f"{result['threads']} threads; a run replayed from its log, recorded, and projected on directions."
    )
    return ["<h2>The run as a log</h2>", f"<p>{words}</p>", f'<div class="card"><ul>{lines}</ul></div>']


def _offload_table(rows: Sequence[Row]) -> str:
    heads = [("model", False), *((head, head != "storage") for head in offload.COLUMNS)]
    lines = [
        [escape(offload.heading(r)), *(escape(show(r)) for show in offload.COLUMNS.values())] for r in rows
    ]
    return f'<p class="note">{escape(offload.LEGEND)}</p><div class="card">{_table(heads, lines)}</div>'


def _offload(result: Result) -> list[str]:
    settings = result["settings"]
    tokens = f"{settings['batch']} x {settings['length']} tokens"
    words = f"Blocks come once a step; {tokens}, {settings['slots']} slots."
    return ["<h2>Streamed models</h2>", f"<p>{words}</p>", _offload_table(result["rows"])]


def _learn(result: Result) -> list[str]:
    heads = [("task", False), ("method", False), *((head, True) for head in ("lr", "loss", "+-", "accuracy"))]
    form = lambda r: [f"{r['lr']:.3g}", f"{r['loss']:.4f}", f"{r['half']:.4f}", f"{r['accuracy']:.3f}"]
    lines = [[escape(r["task"]), escape(r["method"]), *form(r)] for r in learn.rows_of(result["runs"])]
    words = "Held-out loss after equal forwards, each method at the step size of one search; +- is half of "
    words += "the 95 % interval over seeds."
    table = f'<div class="card">{_table(heads, lines)}</div>'
    return ["<h2>What methods learn</h2>", f"<p>{words}</p>", table]


_SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "run": _run,
    "methods": _methods,
    "learn": _learn,
    "gpu-check": _check,
    "trajectory": _trajectory,
    "offload": _offload,
}


def headlines(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The figures at the top of the page as (figure, what it is), each of the first result that has it.

    Of a tiny run the word stands in the place of the figure.
    """
    found = []
    rows = [
        (r, f"; {TINY}" * is_tiny(result))
        for result in results
        if kind_of(result) in ("run", "gpu-check")
        for r in _nearest(result["rows"])
    ]
    for dist, name in _DISTS:
        wanted = lambda r: r["dist"] == dist and r["dtype"] == "bf16" and "mezo" in r["ratio"]  # noqa: B023
        if mine := [pair for pair in rows if wanted(pair[0])]:
            r, mark = mine[0]
            words = f"faster than MeZO's loop: one bf16 pass, {name}, {_where(r)}{mark}"
            found.append(("TINY" if mark else f"{r['ratio']['mezo']:.1f}x", words))
            share = f"{100 * r['copy_fraction']:.0f} %"
            words = f"of the bandwidth of a plain pass over the same bytes: the same, {name}{mark}"
            found.append(("TINY" if mark else share, words))
    for result in results:
        if kind_of(result) == "methods":
            ratios = sorted(r["ratio"] for r in result["rows"])
            span = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
            words = f"median over {len(ratios)} methods, against their eager form; "
            words += TINY if is_tiny(result) else span
            found.append(("TINY" if is_tiny(result) else f"{ratios[len(ratios) // 2]:.1f}x", words))
    return found


def html(results: Sequence[Result]) -> str:
    """The whole page.  Consecutive results of one machine stand under one description of it."""
    body = ['<header><h1>zokernels, measured</h1><button type="button">light / dark</button></header>']
    body.append(
        '<p class="lead">Kernels for zeroth-order training: noise from a seed, applied in one pass.</p>'
    )
    if found := headlines(results):
        body.append(_tiles(found))
    before = None
    for result in results:
        header = result["machine"]
        machine = (header.get("gpu") or header["cpu"], header["cores"], header["torch"], header["date"][:10])
        if machine != before:
            body.append(_chips(header))
            before = machine
        section = _SECTIONS[kind_of(result)](result)
        if is_tiny(result):
            card = '<div class="card">'
            section = [text.replace(card, f'{card}<p class="tiny">{TINY}</p>') for text in section]
        body += section
        if result.get("command"):
            body.append(
                f'<p class="note">Measured by <code>{escape(result["command"])}</code>, {header["date"]}.</p>'
            )
    body.append(
        "<footer>Every figure comes from the results named above; ratios are of times taken in "
        "turns.</footer>"
    )
    style = (HERE / "page.css").read_text()
    head = f"{_META}<title>zokernels, measured</title><style>\n{style}</style>"
    text = "\n".join([*body, f"<script>{_SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{text}</body></html>\n'


def write(files: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
    results = [json.loads(path.read_text()) for path in files]
    text = html(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    return [output]
