"""The search of step sizes, the trainings of all seeds, the file of results, and what is written of them.

A method's step size is searched in the same way for all: from the catalogue's, in half decades, towards lower
loss on data held out for the search, until a neighbour on either side is worse.  Then each seed trains with
it, and is measured on other data.  Every training is written to the file when it ends; the next call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import time
import warnings
from typing import Any

import torch

from .. import charts, machine
from ..gpu.stage import replace
from ..methods.catalog import METHODS, Method
from ..registry import Row
from .tasks import TASKS, Task

SCHEMA = 1
BEGIN, END = "<!-- bench learn: begin -->", "<!-- bench learn: end -->"
#: The step sizes of a search are the catalogue's times these powers of the root of 10.
STEP = math.sqrt(10)
#: How far from the catalogue's a search goes, in half decades.
FURTHEST = 6
#: Of the search: none of them is a seed of the end.  The worse of two counts, because a step size at the edge
#: of divergence may do well once.
SEARCH_SEEDS = (1000, 1001)
#: Two-sided 95 % points of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def suited(method: Method) -> bool:
    """Whether a method trains the weights of any model: not its scales, its integers or a black box."""
    return method.task in ("weights", "forward", "activations", "space")


def train(task: Task, method: Method, lr: float, seed: int, search: bool, budget: int) -> Row:
    """One training: loss and accuracy on held-out data, and with seeds of the end a curve of the loss."""
    begin, run = time.perf_counter(), task.start(seed, search)
    optimizer = method.make(run.named, lr, run.model, eps=task.eps, seed=seed)
    steps = max(1, int(budget // method.forwards))
    every = max(1, steps // task.points)
    loss, accuracy = run.held_out()
    curve, best = [(0, loss)], loss
    for i in range(1, steps + 1):
        optimizer.step(next(run.closures))
        if i == steps or (not search and i % every == 0):
            loss, accuracy = run.held_out()
            curve.append((round(i * method.forwards), loss))
            best = min(best, loss)
    finite = lambda value: value if math.isfinite(value) else None
    return {
        "task": task.name, "method": method.name, "use": method.use, "lr": lr, "seed": seed,
        "budget": budget, "phase": "search" if search else "seed", "forwards": curve[-1][0],
        "loss": finite(loss), "accuracy": accuracy, "seconds": time.perf_counter() - begin,
        **({} if search else {"curve": [(x, finite(y)) for x, y in curve]}),
    }  # fmt: skip


class Results:
    """The trainings that are done, in a file that is replaced after each of them."""

    def __init__(self, path: pathlib.Path | None, command: str, budgets: dict[str, int]) -> None:
        self.path, self.runs = path, list[Row]()
        self.head: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "learn",
            "command": command,
            "budgets": budgets,
        }
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found.get("schema") != SCHEMA:
                raise SystemExit(f"{path}: expected schema {SCHEMA}, got {found.get('schema')!r}")
            self.runs = found["runs"]
        self.head["machine"] = machine.describe("cpu")

    def get(self, task: Task, method: Method, lr: float, seed: int, search: bool, budget: int) -> Row:
        """The training with these settings, which is run unless the file has it."""
        wanted = {
            "task": task.name, "method": method.name, "use": method.use, "lr": lr, "seed": seed,
            "budget": budget, "phase": "search" if search else "seed",
        }  # fmt: skip
        for run in self.runs:
            if all(run[key] == value for key, value in wanted.items()):
                return run
        run = train(task, method, lr, seed, search, budget)
        self.runs.append(run)
        self.save()
        return run

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace(self.path, json.dumps({**self.head, "runs": self.runs}, indent=1) + "\n")


def search(results: Results, task: Task, method: Method, budget: int, seeds: int = 2) -> float:
    """The step size with the lowest loss on data of the search, between two that are worse."""
    first = task.first.get(method.name, method.lr)
    size = lambda power: float(f"{first * STEP**power:.3g}")
    own = SEARCH_SEEDS[:seeds]

    def loss(power: int) -> float:
        found = (results.get(task, method, size(power), seed, True, budget)["loss"] for seed in own)
        return max(math.inf if one is None else one for one in found)

    here = 0
    while abs(here) < FURTHEST:
        better = min((here - 1, here + 1), key=loss)
        if loss(better) >= loss(here):
            break
        here = better
    return size(here)


def summary(runs: list[Row]) -> Row:
    """Mean and half of the 95 % interval over the seeds of one method on one task."""
    losses = [math.inf if r["loss"] is None else r["loss"] for r in runs]
    mean = statistics.fmean(losses)
    half = math.nan
    if len(losses) > 1 and math.isfinite(mean):
        half = STUDENT.get(len(losses) - 1, 1.96) * statistics.stdev(losses) / math.sqrt(len(losses))
    first = runs[0]
    keys = ("task", "method", "use", "lr", "budget")
    accuracy = statistics.fmean(r["accuracy"] for r in runs)
    return {
        **{k: first[k] for k in keys},
        "seeds": len(runs),
        "loss": mean,
        "half": half,
        "accuracy": accuracy,
    }


def rows_of(runs: list[Row]) -> list[Row]:
    """A summary for each task and method, the best first.

    Where a file has seeds at several step sizes or budgets, those that were trained last count.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for run in runs:
        if run["phase"] == "seed":
            found.setdefault((run["task"], run["method"]), []).append(run)
    same = lambda runs: [r for r in runs if all(r[k] == runs[-1][k] for k in ("use", "lr", "budget"))]
    rows = [summary(same(runs)) for runs in found.values()]
    order = list(TASKS)
    return sorted(rows, key=lambda r: (order.index(r["task"]), r["loss"]))


def run(args: argparse.Namespace) -> int:
    tasks = [TASKS[name] for name in args.task]
    methods = [m for m in METHODS if suited(m)]
    if args.only:
        names = {m.name.lower() for m in methods}
        chosen = lambda part, name: part == name if part in names else part in name
        methods = [m for m in methods if any(chosen(part.lower(), m.name.lower()) for part in args.only)]
    if not methods:
        raise SystemExit(f"--only: expected part of a method's name, got {' '.join(args.only)}")
    budgets = {task.name: 40 if args.tiny else args.budget or task.budget for task in tasks}
    if args.write:
        charts.matplotlib()  # ends the program before anything is trained if the picture cannot be drawn
    torch.set_num_threads(args.threads)
    results = Results(args.json, args.command_line, budgets)
    print(f"{machine.title(results.head['machine'])}\n")
    print(f"{'task':16} {'method':32} {'lr':>9} {'loss':>8} {'+-':>7} {'accuracy':>9}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*skipped: loss not finite.*")
        for task in tasks:
            for method in methods:
                budget = budgets[task.name]
                seeds = 2 if args.tiny else args.seeds or task.seeds
                lr = task.first.get(method.name, method.lr)
                if not args.tiny:
                    lr = search(results, task, method, budget, args.search_seeds)
                runs = [results.get(task, method, lr, seed, False, budget) for seed in range(seeds)]
                row = summary(runs)
                print(
                    f"{task.name:16} {method.name:32} {lr:9.3g} {row['loss']:8.4f} {row['half']:7.4f} "
                    f"{row['accuracy']:9.3f}",
                    flush=True,
                )
    if args.json:
        results.save()
        print(f"wrote {args.json}")
    if args.write:
        for path in write(results, args.write):
            print(f"wrote {path}")
    return 0


def advice(rows: list[Row]) -> str:
    """Which method to take, by the results alone: the best of each task, and the best without more memory."""
    plain = {m.name for m in METHODS if m.memory == "0"}
    out = []
    for name, task in TASKS.items():
        ours = [r for r in rows if r["task"] == name]
        if not ours:
            out.append(f"* {task.title}: not run.")
            continue
        best = ours[0]
        # Those whose intervals meet that of the best cannot be told from it.
        level = best["loss"] + best["half"]
        equal = [r for r in ours[1:] if r["loss"] - r["half"] <= level]
        text = f"* {task.title}, {best['budget']:,} forwards: the lowest loss has {_said(best)}"
        if equal:
            text += f"; not to be told from it: {', '.join(r['method'] for r in equal)}"
        light = next((r for r in ours if r["method"] in plain), None)
        if light is not None and light is not best:
            text += f".  Without memory beside the weights: {_said(light)}"
        base = next((r for r in ours if r["use"] == "ZOSGD(named, lr)"), None)
        if base is not None and base is not best:
            text += f".  MeZO: {base['loss']:.3f}"
        out.append(f"{text}.")
    return "\n".join(out)


def _said(row: Row) -> str:
    return f"**{row['method']}** (`{row['use']}`, {row['loss']:.3f} +- {row['half']:.3f})"


def markdown(rows: list[Row]) -> str:
    out = ["| task | method | lr | loss | +- | accuracy | seeds |", "|---|---|--:|--:|--:|--:|--:|"]
    for r in rows:
        out.append(
            f"| {r['task']} | {r['method']} | {r['lr']:.3g} | {r['loss']:.4f} | {r['half']:.4f} | "
            f"{r['accuracy']:.3f} | {r['seeds']} |"
        )
    return "\n".join(out)


def write(results: Results, path: pathlib.Path) -> list[pathlib.Path]:
    """Advice and table between the markers of ``path``, and the picture beside it."""
    text, rows, header = path.read_text(), rows_of(results.runs), results.head["machine"]
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path}: expected the markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    picture = path.with_name("learn.png")
    where = f"`{results.head['command']}`, {machine.title(header)}; {header['date'][:10]}."
    note = "+- is half of the 95 % interval of the mean over seeds (Student's t)."
    body = [
        BEGIN,
        advice(rows),
        f"![Held-out loss against forwards]({picture.name})",
        markdown(rows),
        where,
        note,
    ]
    path.write_text(head + "\n\n".join([*body, END]) + rest.split(END)[1])
    charts.png(picture, picture_of(results))
    return [path, picture]


def picture_of(results: Results) -> Any:
    """A picture for each task: the mean losses of its best methods against forwards, with bands of seeds."""
    rows = rows_of(results.runs)
    bands = []
    for name, task in TASKS.items():
        ours = [r for r in rows if r["task"] == name]
        shown = ours[:5] + [r for r in ours[5:] if r["use"] == "ZOSGD(named, lr)"]
        lines = []
        for row in shown:
            same = ("task", "method", "lr", "budget")
            runs = [r for r in results.runs if r["phase"] == "seed" and all(r[k] == row[k] for k in same)]
            points = [(x, [y for y in values if y is not None]) for x, *values in _joined(runs)]
            lines.append((row["method"], [(x, v) for x, v in points if v]))
        if lines:
            bands.append((task.title, lines))
    return charts.bands(bands, "forwards", "loss on held-out data")


def _joined(runs: list[Row]) -> list[tuple[Any, ...]]:
    """(forwards, loss of each seed) at the points that all curves have."""
    return [
        (column[0][0], *(y for _, y in column)) for column in zip(*(r["curve"] for r in runs), strict=False)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=["digits"])
    parser.add_argument("--only", nargs="+", help="names of methods, or parts of names")
    parser.add_argument("--seeds", type=int, help="trainings of each method (default: the task's)")
    parser.add_argument("--search-seeds", type=int, choices=(1, 2), default=2, help="of each step size tried")
    parser.add_argument("--budget", type=int, help="forwards of each training (default: the task's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="short and without search: whether it runs")
    parser.add_argument("--json", type=pathlib.Path, help="the file of results, which is gone on with")
    parser.add_argument("--write", type=pathlib.Path, help="put advice, table and plot into this document")
    parser.set_defaults(call=run)
