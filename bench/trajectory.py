"""``python -m bench trajectory``: replaying, recording and projecting on the weights of a 22 M encoder."""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import zokernels
from zokernels.optim import ZOSGD
from zokernels.step.deferred import _FUSED
from zokernels.trajectory import replay_
from zokernels.trajectory.format import Record, encode
from zokernels.trajectory.settings import header_of

from . import machine, timing
from .baselines import mezo_update
from .registry import Row

SCHEMA = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-6


def shapes(scale: float = 1.0) -> dict[str, tuple[int, ...]]:
    """The shapes of MiniLM-L6, the model of the demo, with every width times ``scale``.

    At scale 1 these are 22.6 M weights.
    """
    h, f = (8 * max(1, round(n * scale / 8)) for n in (384, 1536))
    found = {
        "embeddings.word": (max(64, round(30522 * scale)), h),
        "embeddings.position": (512, h),
        "embeddings.type": (2, h),
        "embeddings.norm.weight": (h,),
        "embeddings.norm.bias": (h,),
    }
    for i in range(6):
        for name, shape in (
            ("q", (h, h)),
            ("k", (h, h)),
            ("v", (h, h)),
            ("o", (h, h)),
            ("in", (f, h)),
            ("out", (h, f)),
        ):
            found[f"layer.{i}.{name}.weight"], found[f"layer.{i}.{name}.bias"] = shape, shape[:1]
        for name in ("norm1", "norm2"):
            found[f"layer.{i}.{name}.weight"], found[f"layer.{i}.{name}.bias"] = (h,), (h,)
    return found


def weights(dtype: torch.dtype, scale: float) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    return {name: torch.nn.Parameter(draw(shape)) for name, shape in shapes(scale).items()}


def write_log(
    path: pathlib.Path, base: dict[str, torch.nn.Parameter], dist: str, decay: float, steps: int
) -> None:
    """Writes the log of a run of MeZO from ``base``, with projected gradients of the usual size."""
    optimizer = ZOSGD(base.items(), lr=LR, dist=dist, weight_decay=decay, seed=0)
    head, layout = encode(header_of(optimizer))
    gradients = torch.randn(steps, generator=torch.Generator().manual_seed(1)).tolist()
    with open(path, "wb") as file:
        file.write(head)
        for step, g in enumerate(gradients):
            file.write(layout.pack(Record(step, True, False, False, 1, 0.5, (LR,), ((g,),), ())))


def once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def both(call: Callable[[], object]) -> tuple[float, float]:
    """The seconds by the clock, and those of all threads together, which say more on a machine that others
    use, too.
    """
    start = time.process_time()
    seconds = once(call)
    return seconds, time.process_time() - start


def replay_row(dtype: str, dist: str, decay: float, args: argparse.Namespace) -> Row:
    """Replays ``steps`` steps.

    Beside it stand the combine_ kernel alone, with as many directions in a call as replay takes, and the
    eager form."""
    base = weights(DTYPES[dtype], args.scale)
    params = [p.detach().clone() for p in base.values()]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.zk"
        write_log(path, base, dist, decay, args.steps)
        replay, cpu = both(lambda: replay_([(name, p.detach().clone()) for name, p in base.items()], path))
    directions = _FUSED if dtype == "fp32" and not decay else 1
    kwargs = {"streams": zokernels.streams_of(base), "dist": dist}
    if decay:
        kwargs["decay"] = 1 - LR * decay
    if dtype != "fp32":
        kwargs |= {"rounding": "stochastic", "rounding_seed": 3}
    seeds, coeffs = torch.arange(directions), torch.full((directions,), 1e-9)
    updates = iter(range(1 << 30))
    times = timing.measure(
        {
            "combine": lambda: zokernels.combine_(params, seeds, coeffs, **kwargs),
            "eager": lambda: mezo_update(list(base.values()), LR, 0.3, next(updates), decay, dist),
        },
        "cpu",
        args.seconds,
        min_rounds=2,
    )
    combine, eager = times["combine"].p20 / directions * args.steps, times["eager"].p20 * args.steps
    return {
        "what": "replay", "dtype": dtype, "dist": dist, "weight_decay": decay, "steps": args.steps,
        "weights": sum(p.numel() for p in params), "directions": directions,
        "seconds": replay, "cpu_seconds": cpu, "combine_seconds": combine, "eager_seconds": eager,
    }  # fmt: skip


def products(base: dict[str, torch.nn.Parameter], tokens: int) -> Callable[[], torch.Tensor]:
    """Computes the matrix products of a forward of ``tokens`` tokens."""
    x = torch.ones(tokens, base["embeddings.norm.bias"].numel(), dtype=base["embeddings.norm.bias"].dtype)

    def forward() -> torch.Tensor:
        y = x
        for i in range(6):
            linear = lambda name, y: F.linear(y, base[f"layer.{i}.{name}.weight"])  # noqa: B023
            y = y + linear("o", linear("q", y) * linear("k", y) + linear("v", y))
            y = F.layer_norm(y + linear("out", linear("in", y).relu()), y.shape[-1:])
        return y.float().square().mean()

    return forward


def record_row(dtype: str, tokens: int, args: argparse.Namespace) -> Row:
    """Times a step that is recorded, and how much of it the recorder takes.

    If ``tokens`` is 0 the forwards are empty.
    """
    base = weights(DTYPES[dtype], args.scale)
    closure = products(base, tokens) if tokens else lambda: 0.5
    spent: list[float] = []

    def timed(call: Callable) -> Callable:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            call(*arguments)
            spent.append(time.perf_counter() - start)

        return run

    with tempfile.TemporaryDirectory() as folder:
        optimizer = ZOSGD(base.items(), lr=LR, restore="inplace", trajectory=f"{folder}/run.zk")
        optimizer.step(closure)  # this step writes the header, with its digests
        recorder, steps = optimizer.trajectory, []
        recorder.begin, recorder.append = timed(recorder.begin), timed(recorder.append)
        for _ in range(3 if args.tiny else 30):
            steps.append(once(lambda: optimizer.step(closure)))
        recorder.close()
    recording = statistics.median(spent[::2]) + statistics.median(spent[1::2])
    return {
        "what": "record", "dtype": dtype, "tokens": tokens, "weights": sum(p.numel() for p in base.values()),
        "seconds": statistics.median(steps), "recorder_seconds": recording,
    }  # fmt: skip


def project_row(dtype: str, dist: str, count: int, args: argparse.Namespace) -> Row:
    """Times project beside combine_ of the same tensors and directions."""
    tensors = [p.detach() for p in weights(DTYPES[dtype], args.scale).values()]
    kwargs = {"streams": range(len(tensors)), "dist": dist}
    seeds, coeffs = torch.arange(count), torch.full((count,), 1e-9)
    times = timing.measure(
        {
            "project": lambda: zokernels.project(tensors, seeds, **kwargs),
            "combine": lambda: zokernels.combine_(tensors, seeds, coeffs, **kwargs),
        },
        "cpu",
        args.seconds,
        min_rounds=2,
    )
    return {
        "what": "project", "dtype": dtype, "dist": dist, "directions": count,
        "seconds": times["project"].p20, "combine_seconds": times["combine"].p20,
    }  # fmt: skip


def gram_row(dist: str, count: int, args: argparse.Namespace) -> Row:
    sizes = [p.numel() for p in weights(torch.float32, args.scale).values()]
    seconds = once(lambda: zokernels.gram(torch.arange(count), sizes, streams=range(len(sizes)), dist=dist))
    return {"what": "gram", "dist": dist, "directions": count, "weights": sum(sizes), "seconds": seconds}


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for dtype in DTYPES:
        for dist in ("normal", "rademacher"):
            for decay in (0.0, 0.1):
                yield replay_row(dtype, dist, decay, args)
    for dtype in DTYPES:
        for tokens in (0, 16 if args.tiny else 256):
            yield record_row(dtype, tokens, args)
    for dtype in DTYPES:
        for dist in ("normal", "rademacher"):
            for count in (1, 8, 64):
                yield project_row(dtype, dist, count, args)
    for dist in ("normal", "rademacher"):
        yield gram_row(dist, 64, args)


def line(row: Row) -> str:
    name = " ".join(str(row[key]) for key in ("what", "dtype", "dist") if key in row)
    if row["what"] == "replay":
        decay = f", decay {row['weight_decay']}" if row["weight_decay"] else ""
        return (
            f"{name}{decay}: {row['steps']} steps of {row['weights'] / 1e6:.1f} M weights in "
            f"{row['seconds']:.1f} s "
            f"({row['cpu_seconds']:.1f} s of the cores); "
            f"combine_ K={row['directions']} {row['combine_seconds']:.1f} s "
            f"(x{row['seconds'] / row['combine_seconds']:.2f}); eager updates {row['eager_seconds']:.0f} s "
            f"(x{row['eager_seconds'] / row['seconds']:.1f})"
        )
    if row["what"] == "record":
        share = 100 * row["recorder_seconds"] / row["seconds"]
        forwards = f"with two forwards of {row['tokens']} tokens" if row["tokens"] else "without forwards"
        return (
            f"{name}: {1e6 * row['recorder_seconds']:.0f} us of a step of {1e3 * row['seconds']:.1f} "
            f"ms {forwards}: "
            f"{share:.2f} %"
        )
    if row["what"] == "gram":
        return (
            f"{name} K={row['directions']}: {row['seconds']:.1f} s for {row['weights'] / 1e6:.1f} M weights"
        )
    return (
        f"{name} K={row['directions']}: {1e3 * row['seconds']:.1f} ms, combine_ "
        f"{1e3 * row['combine_seconds']:.1f} ms "
        f"(x{row['seconds'] / row['combine_seconds']:.2f})"
    )


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.scale, args.steps, args.seconds = 0.05, 20, 0.0
    if args.threads:
        torch.set_num_threads(args.threads)
    header, found = machine.describe(args.device), []
    print(f"{machine.title(header)}\n{torch.get_num_threads()} thread(s)\n")
    for row in rows(args):
        found.append(row)
        print(line(row), flush=True)
        if args.json:
            result = {
                "schema": SCHEMA,
                "command": args.command_line,
                "machine": header,
                "threads": torch.get_num_threads(),
            }
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**result, "rows": found}, indent=1) + "\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model, 1 is 22.6 M weights")
    parser.add_argument("--steps", type=int, default=1000, help="of the replayed run")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each comparison")
    parser.add_argument("--tiny", action="store_true", help="small and short: whether it runs, not how fast")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.set_defaults(call=run)
