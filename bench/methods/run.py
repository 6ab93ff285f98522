"""``python -m bench methods``: the table of methods from live runs, its JSON, and docs/methods.md with a
plot.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings
from typing import Any

import torch

from .. import charts, machine
from ..registry import Row
from . import hotpath, tasks
from .catalog import METHODS, Method
from .train import train

SCHEMA = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEGIN, END = "<!-- bench methods: begin -->", "<!-- bench methods: end -->"


def row_of(method: Method, args: argparse.Namespace) -> Row:
    """Measures and trains one method."""
    dtype = DTYPES[args.dtype]
    row: Row = {
        "method": method.name,
        "paper": method.paper,
        "formula": method.formula,
        "use": method.use,
        "forwards": method.forwards,
        "bytes": method.bytes(dtype.itemsize),
        "memory": method.memory,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*skipped: loss not finite.*")
        task = tasks.TASKS.get(method.task)
        if task is None:
            row |= hotpath.measure(method, dtype, args.device, args.scale, args.seconds)
            row["curve"] = train(method, args.budget)
        else:
            row |= task.measure(method, args.seconds)
            row["curve"] = task.train(method, args.budget)
    row["loss_first"], row["loss_last"] = row["curve"][0][1], row["curve"][-1][1]
    return row


def line(row: Row) -> str:
    return (
        f"{row['method']:32} {row['forwards']:8} {row['bytes']:8.3g} {row['memory']:>11} "
        f"{row['seconds'] * 1e3:9.2f} "
        f"{row['eager_seconds'] * 1e3:9.2f} {row['ratio']:6.1f} {row['loss_first']:7.3f} "
        f"{row['loss_last']:7.3f}"
    )


HEAD = (
    f"{'method':32} {'forwards':>8} {'B/weight':>8} {'extra B':>11} {'ms':>9} {'eager ms':>9} {'times':>6} "
    f"{'loss 0':>7} {'loss':>7}"
)


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.scale, args.seconds, args.budget = 0.05, 0.0, 150
    methods = [
        m for m in METHODS if not args.only or any(part.lower() in m.name.lower() for part in args.only)
    ]
    if not methods:
        raise SystemExit(f"--only: expected part of a method's name, got {' '.join(args.only)}")
    if args.write:
        charts.matplotlib()  # ends the program before anything is measured if the picture cannot be drawn
    torch.set_num_threads(args.threads)
    header, rows, start = machine.describe(args.device), [], time.perf_counter()
    print(
        f"{machine.title(header)}\n{args.dtype}, {hotpath.weights(args.scale):,} weights, "
        f"{args.threads} thread(s)\n"
    )
    print(HEAD)
    for method in methods:
        rows.append(row_of(method, args))
        print(line(rows[-1]), flush=True)
    slower = [row["method"] for row in rows if row["ratio"] < 1]
    print(f"\n{LEGEND}\n{len(rows)} methods in {time.perf_counter() - start:.0f} s")
    result = {"schema": SCHEMA, "command": args.command_line, "machine": header}
    result |= {
        "dtype": args.dtype,
        "weights": hotpath.weights(args.scale),
        "budget": args.budget,
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.write:
        for path in write(result, args.write):
            print(f"wrote {path}")
    if slower and not args.tiny:
        print(f"slower than eager: {', '.join(slower)}")
        return 1
    return 0


LEGEND = (
    "ms, eager ms: a step without its forwards, ours and the published form in eager torch, in "
    "turns, p20; times: the "
    "ratio.\nloss 0, loss: on scikit-learn's digits before the first and after the last of an equal "
    "number of forwards."
)


def markdown(rows: list[Row]) -> str:
    out = [
        "| method | formula | use | forwards a step | B a weight and step | extra B a weight | ms | "
        "eager ms | times "
        "faster | loss |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        link = f"{r['method']} {r['paper']}"
        formula, use = (f"`{r[key]}`".replace("|", "\\|") for key in ("formula", "use"))
        out.append(
            f"| {link} | {formula} | {use} | {r['forwards']} | {r['bytes']:.3g} | {r['memory']} | "
            f"{r['seconds'] * 1e3:.2f} | {r['eager_seconds'] * 1e3:.2f} | **{r['ratio']:.1f}** | "
            f"{r['loss_first']:.2f} to {r['loss_last']:.3f} |"
        )
    return "\n".join(out)


def write(result: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table between the markers of ``path``, and the picture beside it."""
    text = path.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    header = result["machine"]
    where = (
        f"`{result['command']}` on {machine.title(header)}; {header['date'][:10]}; {result['dtype']}, "
        f"{result['weights']:,} weights; {result['budget']:,} forwards of training for the last column."
    )
    path.write_text(f"{head}{BEGIN}\n\n{where}\n\n{markdown(result['rows'])}\n\n{END}{tail}")
    picture, rows = path.with_suffix(".png"), result["rows"]
    title = f"Cross entropy on digits after equal forwards (grey: {rows[0]['method']})"
    found = [(row["method"], row["curve"]) for row in rows]
    charts.png(picture, charts.curves(found, 2.6, "forwards", title))
    return [path, picture]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the timed steps")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the timed steps")
    parser.add_argument("--only", nargs="+", help="methods whose name has one of these parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="width of the timed model, 1 is 28 M weights"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each method")
    parser.add_argument("--budget", type=int, default=6000, help="forwards of training for each method")
    parser.add_argument("--tiny", action="store_true", help="small and short: whether it runs, not how fast")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.add_argument("--write", type=pathlib.Path, help="put table and plot into this document")
    parser.set_defaults(call=run)
