"""``python -m bench race``: a language model's loss against time, trained here and by MeZO's eager loop.

Both train all weights of SmolLM2-135M-Instruct in bf16 on movie reviews, as ``examples/llm_demo.py`` does,
with one method, one learning rate, one eps and the same batches: two forwards a step, at theta + eps z and
theta - eps z.  What differs is how the weights get there: ``ZOSGD`` with its kernels, or the loop of MeZO's
published trainer, which draws each z four times with eager torch (:class:`bench.methods.eager.Eager`).

The clock counts whole steps, with their forwards and everything that the host does.  It is the processor time
of this process on one thread, which other work on the machine hardly changes; on an idle machine it is the
time that passes.  The trainer that has used less of it takes the next step, so whatever disturbs one disturbs
both.  Each time that a trainer has used another share of ``--seconds``, its clock stands still while the loss
on held-out sentences is measured.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.optim import ZOSGD

from . import charts, machine
from .gpu.stage import replace
from .methods.eager import Eager
from .timing import quantiles

#: How often the held-out loss of a run is measured, besides before the first step.
POINTS = 12

Step = Callable[[Callable[[], Tensor]], object]


@dataclass
class Task:
    """A model, an endless iterator over batches, held-out batches, and the loss of one of either."""

    model: nn.Module
    batches: Iterator[Any]
    held_out: list[Any]
    loss: Callable[[Any], Tensor]

    @torch.inference_mode()
    def evaluate(self) -> float:
        losses = [(self.loss(batch).item(), len(batch.labels)) for batch in self.held_out]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def sentences(args: argparse.Namespace, seed: int) -> Task:
    """The task of the demo: after a review and "It was", the word "great" or "terrible"."""
    from examples import llm_demo, reviews

    if args.tiny:
        from .zollm import classification, tiny

        (model, _), words, tokenizer = tiny(), ("b", "g"), _Bytes()
        data = [reviews.Review(item.prompt, int(item.answer == " good")) for item in classification()]
        template, count = "{}", 16
    else:
        demo = argparse.Namespace(model=args.model, lora=0, seed=seed)
        (model, tokenizer), data, count = llm_demo.load(demo), reviews.load(), args.held_out
        template, words = llm_demo.PROMPTS["mezo"]
    judge = llm_demo.Judge(model, tokenizer, words)
    training, held_out = reviews.split(data, count)
    batches = llm_demo.Prompts(training, tokenizer, args.batch, template).forever(seed)
    ordered = llm_demo.Prompts(held_out, tokenizer, 32, template).ordered()
    loss = lambda batch: F.cross_entropy(judge(batch.ids, batch.mask), batch.labels)
    return Task(model, batches, ordered, loss)


class _Bytes:
    """The bytes of a text as its tokens, called as tokenizers of transformers are."""

    pad_token_id = 0

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        ids = list(text.encode()) if isinstance(text, str) else [list(one.encode()) for one in text]
        return {"input_ids": ids}


def ours(model: nn.Module, lr: float, eps: float, seed: int) -> Step:
    return ZOSGD(model.named_parameters(), lr=lr, eps=eps, seed=seed).step


def mezo(model: nn.Module, lr: float, eps: float, seed: int) -> Step:
    loop = Eager(list(model.named_parameters()), lr=lr, eps=eps)
    loop.step_count = 100_000 * seed  # from which it makes its seeds
    return loop.step


TRAINERS: dict[str, Callable[[nn.Module, float, float, int], Step]] = {
    "zokernels, ZOSGD": ours,
    "MeZO's eager loop": mezo,
}


@dataclass
class Runner:
    """One trainer with a model and batches of its own, and its clock."""

    name: str
    task: Task
    step: Step
    times: list[float] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)  #: (seconds, held-out loss)
    used: float = 0.0
    batch: Any = None

    def go(self) -> None:
        self.batch = next(self.task.batches)
        start = time.process_time()
        self.step(lambda: self.task.loss(self.batch))
        self.times.append(time.process_time() - start)
        self.used += self.times[-1]

    @torch.no_grad()
    def forward(self) -> float:
        """The seconds of a plain forward of the last step's batch, which no clock of the race counts."""
        start = time.process_time()
        self.task.loss(self.batch)
        return time.process_time() - start


def race(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A row for each trainer: its curve, what its steps take, and which share of a step here two plain
    forwards of its batch would be.
    """
    runners = []
    for name, make in TRAINERS.items():
        task = sentences(args, seed)
        runners.append(Runner(name, task, make(task.model, args.lr, args.eps, seed)))
    forwards = []
    for runner in runners:
        runner.points.append((0.0, runner.task.evaluate()))
    while (runner := min(runners, key=lambda r: r.used)).used < args.seconds:
        runner.go()
        if runner.used >= args.seconds * len(runner.points) / POINTS:
            loss = runner.task.evaluate()
            runner.points.append((runner.used, loss))
            took = f"{runner.used:6.1f} s  step {len(runner.times):4}"
            print(f"{runner.name:20} {took}  loss {loss:.4f}", flush=True)
        if runner is runners[0] and len(runner.times) % 4 == 1:  # whoever asks, a forward costs the same
            forwards.append(2 * runner.forward() / runner.times[-1])
    return [
        {
            "trainer": r.name, "seed": seed, "steps": len(r.times), "points": r.points,
            "step_seconds": quantiles(r.times), "forwards_of_ours": quantiles(forwards),
            "weights": sum(p.numel() for p in r.task.model.parameters()),
        }
        for r in runners
    ]  # fmt: skip


def picture(result: dict[str, Any]) -> Any:
    """Held-out loss against seconds of whole steps.

    Runs of several seeds share the marks of the clock, and become a band.  A trainer is measured after the
    step that passes a mark.
    """
    lines = []
    for name in dict.fromkeys(row["trainer"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["trainer"] == name]
        marks = [k * result["seconds"] / POINTS for k in range(min(len(row["points"]) for row in rows))]
        band = [(mark, [row["points"][k][1] for row in rows]) for k, mark in enumerate(marks)]
        middle = sorted(row["step_seconds"][1] for row in rows)[len(rows) // 2]
        lines.append((f"{name}: {middle:.2f} s a step", band))
    first = result["rows"][0]
    title = f"{result['model']}, {first['weights'] / 1e6:.3g} M weights, all trained, bf16, one CPU thread"
    return charts.bands([(title, lines)], "seconds of whole steps", "loss on held-out sentences")


def line(row: dict[str, Any]) -> str:
    step = row["step_seconds"][1]
    (_, first), (used, last) = row["points"][0], row["points"][-1]
    return (
        f"{row['trainer']:20} seed {row['seed']}: {row['steps']:4} steps of {step:.3f} s, "
        f"loss {first:.4f} to {last:.4f} in {used:.0f} s"
    )


def run(args: argparse.Namespace) -> int:
    if args.draw:
        charts.png(args.png, picture(json.loads(args.draw.read_text())))
        return 0
    if args.tiny:
        args.seconds, args.batch, args.seeds = 0.3, 4, args.seeds[:1]
    rows: list[dict[str, Any]] = []
    result = {
        "command": args.command_line, "machine": machine.describe("cpu"), "seconds": args.seconds,
        "lr": args.lr, "eps": args.eps, "batch": args.batch, "rows": rows, "tiny": args.tiny,
        "model": "a tiny model" if args.tiny else "SmolLM2-135M",
    }  # fmt: skip
    print(machine.title(result["machine"]), flush=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for seed in args.seeds:
            rows += race(args, seed)
            print("\n".join(line(row) for row in rows[-len(TRAINERS) :]), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                replace(args.json, json.dumps(result, indent=1) + "\n")
    finally:
        torch.set_num_threads(threads)
    if args.png:
        charts.png(args.png, picture(result))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=120.0, help="of each trainer and seed (default 120)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16, help="sentences a step")
    parser.add_argument("--held-out", type=int, default=200, help="sentences that are never trained on")
    folder = pathlib.Path("build/smollm2")
    parser.add_argument("--model", type=pathlib.Path, default=folder, help="as examples/smollm2.py makes it")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.add_argument("--png", type=pathlib.Path, help="draw the picture to this file")
    parser.add_argument("--draw", type=pathlib.Path, help="measure nothing: draw --png from this file")
    parser.add_argument("--tiny", action="store_true", help="a small model, and short: whether it runs")
    parser.set_defaults(call=run)
