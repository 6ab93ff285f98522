"""``python -m bench quantized``: layers of integer weights against the bf16 layer of the same shape, and the
memory that their forwards take.

All forms of a layer run in turns, and a cell is the ratio of the lower quartiles of their times.  On the CPU
with one thread these are the thread's own processor time, which other work on the machine disturbs least."""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import pathlib
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from zokernels.quantize import QuantizedLinear

from . import machine
from .gpu.stage import replace

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bits, size of a group (0: a scale a row).
_WEIGHTS = ((8, 0), (8, 128), (8, 64), (4, 0), (4, 128), (4, 64))
_PRODUCTS = ("tiled", "int8")


def _clock(device: str, threads: int) -> Callable[[], float]:
    if device == "cpu":
        return time.thread_time if threads == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def _seconds(calls: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The lower quartile of the seconds of each call, one call each a round."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, times in zip(calls, found, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    return [sorted(times)[len(times) // 4] for times in found]


def _resident(field: str) -> int:
    """Bytes of VmRSS, what is resident, or VmHWM, the most that was since ``_forget_most``."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def _peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at most beyond what there was before; None where the system does not say."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that what earlier calls freed is counted, too
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the most so far
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _layer(plain: nn.Linear, bits: int, group: int, product: str) -> QuantizedLinear:
    layer = QuantizedLinear.from_linear(plain, bits, group or None)
    layer.product = product
    return layer


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    clock, found = _clock(args.device, args.threads), []
    header = "".join(f" {rows} |" for rows in args.rows)
    for inputs, outputs in args.sizes:
        print(f"\n{inputs} inputs, {outputs} outputs: time in units of the bf16 layer, by rows of x\n")
        print(f"| x | product | integers |{header} peak, MB |\n|---|---|---|{'--:|' * (len(args.rows) + 1)}")
        cells: dict[tuple[str, str, int, int], list[float]] = {}
        peaks: dict[tuple[str, str, int, int], int | None] = {}
        for rows in args.rows:
            plain = nn.Linear(inputs, outputs, bias=False, device=args.device)
            x = torch.randn(rows, inputs, device=args.device)
            weights = [w for w in _WEIGHTS if not w[1] or inputs % w[1] == 0]
            names = [(d, p, *w) for d in args.dtypes for p in args.products for w in weights]
            half = copy.deepcopy(plain).to(torch.bfloat16)
            calls: list[Callable[[], object]] = [partial(half, x.to(torch.bfloat16))]
            for dtype, product, bits, group in names:
                layer = _layer(copy.deepcopy(plain).to(_DTYPES[dtype]), bits, group, product)
                calls.append(partial(layer, x.to(_DTYPES[dtype])))
            base, *times = _seconds(calls, args.rounds, clock)
            for name, seconds, call in zip(names, times, calls[1:], strict=True):
                cells.setdefault(name, []).append(seconds / base)
                peaks[name] = _peak(call, args.device)  # of the most rows in the end
        for (dtype, product, bits, group), ratios in cells.items():
            peak, groups = (
                peaks[dtype, product, bits, group],
                f"groups of {group}" if group else "a scale a row",
            )
            shown = "".join(f" {'**' * (r > 1)}{r:.2f}{'**' * (r > 1)} |" for r in ratios)
            of_peak = "" if peak is None else f"{peak / 1e6:.2f}"
            print(f"| {dtype} | {product} | {bits} bits, {groups} |{shown} {of_peak} |", flush=True)
            found.append(
                {"inputs": inputs, "outputs": outputs, "dtype": dtype, "product": product, "bits": bits,
                 "group": group, "rows": args.rows, "ratios": ratios, "peak": peak}
            )  # fmt: skip
    return found


def _size(text: str) -> tuple[int, int]:
    inputs, _, outputs = text.partition("x")
    return int(inputs), int(outputs)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    sizes = [(1024, 2048), (2048, 2048), (4096, 4096)]
    sub.add_argument("--sizes", type=_size, nargs="+", default=sizes, help="inputs x outputs (1024x2048 ...)")
    sub.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64], help="of x (1 4 16 64)")
    sub.add_argument("--dtypes", nargs="+", choices=tuple(_DTYPES), default=list(_DTYPES), help="of x")
    sub.add_argument(
        "--products", nargs="+", choices=_PRODUCTS, default=list(_PRODUCTS), help="of the layers"
    )
    sub.add_argument("--rounds", type=int, default=15, help="calls of each form (15)")
    sub.add_argument("--threads", type=int, default=1, help="on the CPU (1)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--tiny", action="store_true", help="whether it runs, not how fast")
    sub.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    sub.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.rows, args.rounds = [1, 70], 1
        args.sizes = [(128, 64)]
    torch.set_num_threads(args.threads)
    header = machine.describe(args.device)
    print(f"`{args.command_line}` on {machine.title(header)}")
    rows = measure(args)
    if args.json is not None:
        result = {"kind": "quantized", "command": args.command_line, "machine": header, "rows": rows}
        replace(args.json, json.dumps(result, indent=1) + "\n")
    return 0
