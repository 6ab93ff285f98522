"""The stages of gpu-check that measure: parts of ``python -m bench``, whose rows are left in
``<stage>.json``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator

from ..curand import CARRIED
from . import prebuilt
from .stage import Context, Skip, must, python, replace


@contextlib.contextmanager
def clocks(ctx: Context) -> Iterator[list[int]]:
    """The clock of the multiprocessors in MHz, asked of nvidia-smi once a second; empty if it cannot tell."""
    found: list[int] = []
    if ctx.rehearse:
        yield found
        return
    watch = ["nvidia-smi", "--id=0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--loop=1"]
    with tempfile.TemporaryFile("w+") as out:
        try:
            process = subprocess.Popen(watch, stdout=out, stderr=subprocess.DEVNULL)
        except OSError:
            yield found
            return
        try:
            yield found
        finally:
            process.kill()
            process.wait()
            out.seek(0)
            found += [int(line) for line in out.read().split() if line.isdigit()]


def _measure(ctx: Context, name: str, command: list[str]) -> str:
    path = ctx.output / f"{name}.json"
    carried = prebuilt.carried(ctx)
    with clocks(ctx) as seen:
        must([*command, "--json", str(path)], **({CARRIED: str(carried)} if carried else {}))
    result = json.loads(path.read_text())
    note = f"{len(result['rows'])} rows"
    if seen:
        result["clock_mhz"] = {"least": min(seen), "median": statistics.median(seen), "most": max(seen)}
        replace(path, json.dumps(result, indent=1) + "\n")
        note += f", at {statistics.median(seen):.0f} MHz (median)"
    return note


def bench(name: str, *arguments: str) -> Callable[[Context], str]:
    """Runs ``bench run``.  A rehearsal is tiny, and takes bf16 alone unless another dtype is asked for."""

    def stage(ctx: Context) -> str:
        command = python("-m", "bench", "run", "--device", ctx.device, *arguments)
        if ctx.rehearse:
            command += ["--tiny", "--threads", "1", "--numel", str(1 << 14)]
            command += [] if "--dtype" in arguments else ["--dtype", "bf16"]
        return _measure(ctx, name, command)

    return stage


def offload(name: str, *arguments: str) -> Callable[[Context], str]:
    """Runs ``bench offload`` with weights in host memory.

    A rehearsal takes a tiny model, and a GPU as many layers as the host's memory holds.
    """

    def stage(ctx: Context) -> str:
        command = python("-m", "bench", "offload", "--device", ctx.device, "--dtype", "bf16", *arguments)
        return _measure(ctx, name, command + (["--tiny"] if ctx.rehearse else []))

    return stage


def population(ctx: Context) -> str:
    """Runs ``bench population``, for whose model it needs transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise Skip("needs the package transformers")
    command = python("-m", "bench", "population", "--device", ctx.device)
    return _measure(ctx, "population", command + (["--tiny", "--rounds", "1"] if ctx.rehearse else []))
