"""Four kernels under Nsight Compute: which pipe is busy, issue slots, sectors a request, bytes of DRAM.

``python -m bench.gpu.ncu --device cuda`` is the program that is profiled: it launches each of ``KERNELS``
once between cudaProfilerStart and cudaProfilerStop, after a launch of each that warms up.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import machine
from .stage import Context, Failure, Skip, must, python, replace, run


@dataclass(frozen=True)
class Kernel:
    """One call of combine_ on one tensor."""

    dtype: str
    rounding: str
    k: int = 1
    dist: str = "normal"

    @property
    def label(self) -> str:
        return f"{self.dtype} {self.dist}, {self.rounding}, K = {self.k}"


#: The kernels on which it depends whether a pass costs what a copy costs.
KERNELS = (
    Kernel("bf16", "nearest"),
    Kernel("bf16", "stochastic"),
    Kernel("bf16", "stochastic", k=2),
    Kernel("fp32", "nearest"),
)

#: How many elements the tensor has: 256 MiB of bf16, more than any L2 cache.  The profiler saves and restores
#: them in each pass.
NUMEL = 1 << 27

_PIPE = "sm__inst_executed_pipe_{}.avg.pct_of_peak_sustained_active"
_SECTORS = "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_{}.ratio"

#: Names of Nsight Compute, the same on sm_80 to sm_100 (tests/test_bench_ncu.py asks NVIDIA's own library).
METRICS = {
    "seconds": "gpu__time_duration.sum",  # ns
    "cycles": "sm__cycles_elapsed.max",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": _PIPE.format("alu"),
    "fma": _PIPE.format("fma"),
    "xu": _PIPE.format("xu"),
    "lsu": _PIPE.format("lsu"),
    "instructions": "smsp__inst_executed.sum",
    "sectors_load": _SECTORS.format("ld"),
    "sectors_store": _SECTORS.format("st"),
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
PIPES = ("issue", "alu", "fma", "xu", "lsu")


def launch_all(device: str, numel: int) -> None:
    """Launches every kernel once, in order, on a GPU by the backend cuda and elsewhere by the one for the
    CPU.
    """
    import torch

    import zokernels

    from ..combine import DTYPES

    cuda = device == "cuda"
    seeds = torch.arange(7, 9, dtype=torch.int64, device=device)
    coeffs = torch.full((2,), 1e-3, device=device)
    thetas = {dtype: torch.randn(numel, device=device).to(DTYPES[dtype]) for dtype in ("bf16", "fp32")}

    def launch(kernel: Kernel) -> None:
        options: dict[str, Any] = {"streams": [7], "dist": kernel.dist, "rounding": kernel.rounding}
        if kernel.rounding == "stochastic":
            options["rounding_seed"] = seeds[:1]
        with zokernels.backend("cuda" if cuda else None):
            zokernels.combine_(thetas[kernel.dtype], seeds[: kernel.k], coeffs[: kernel.k], **options)

    for kernel in KERNELS:
        launch(kernel)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for kernel in KERNELS:
        launch(kernel)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    for dtype, theta in thetas.items():
        if not bool(theta.isfinite().all()):
            raise SystemExit(f"bench.gpu.ncu: {dtype}: a result is not finite")
    print(f"{len(KERNELS)} kernels over {numel:,} elements")


# --- reading what ncu writes ------------------------------------------------------------------------------


def read(text: str) -> list[dict[str, float]]:
    """The metrics of each profiled kernel, in the order of the launches, from ``ncu --csv --print-units
    base``.

    One line for each kernel and metric; what is not CSV (``==PROF== ...``) is passed over, and so is a value
    that is not a number ("n/a").
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[int, dict[str, float]] = {}
    names = {name: key for key, name in METRICS.items()}
    for row in csv.DictReader(lines):
        values = found.setdefault(int(row["ID"]), {})
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue
        if (key := names.get(row["Metric Name"])) is not None:
            values[key] = value
    return [found[i] for i in sorted(found)]


def rows_of(measured: Sequence[dict[str, float]], numel: int) -> list[dict[str, Any]]:
    """What the kernels' metrics say, by kernel: times in seconds, shares in percent, bytes and instructions
    an element.

    instructions: of a warp for 32 elements, so that it compares with a count in the disassembly.
    """
    if len(measured) != len(KERNELS):
        raise Failure(f"expected {len(KERNELS)} profiled kernels, got {len(measured)}")
    rows = []
    for kernel, values in zip(KERNELS, measured, strict=True):
        row: dict[str, Any] = {"kernel": kernel.label, "numel": numel, **values}
        if "seconds" in row:
            row["seconds"] *= 1e-9
            if "cycles" in row:
                row["clock_ghz"] = row["cycles"] / row["seconds"] * 1e-9
        if "instructions" in row:
            row["instructions"] *= 32 / numel
        for key in ("dram_read", "dram_write"):
            if key in row:
                row[key] /= numel
        busy = {pipe: row[pipe] for pipe in PIPES if pipe in row}
        if busy:
            row["busiest"] = max(busy, key=lambda pipe: busy[pipe])
        rows.append(row)
    return rows


def why_not(log: str) -> str:
    """The reason that ncu gives if it has measured nothing."""
    if "ERR_NVGPUCTRPERM" in log:
        return "no permission to read the GPU's performance counters (ERR_NVGPUCTRPERM)"
    said = [line.split("==ERROR==", 1)[1].strip() for line in log.splitlines() if "==ERROR==" in line]
    return f"ncu: {said[0][:200]}" if said else "ncu measured nothing and did not say why"


def unknown(log: str) -> set[str]:
    """The metrics that this ncu does not know for this GPU."""
    complaints = ("Failed to find metric", "could not be found")
    lines = "\n".join(line for line in log.splitlines() if any(words in line for words in complaints))
    return {name for name in METRICS.values() if re.search(rf"(?<![\w.]){re.escape(name)}", lines)}


def profile(tool: str, ctx: Context, target: list[str]) -> list[dict[str, float]]:
    """The metrics of each kernel of ``target``; those that this ncu does not know are left out at a second
    attempt.
    """
    wanted, log = dict(METRICS), ctx.scratch / "ncu.csv"
    for _ in range(2):
        log.unlink(missing_ok=True)
        command = [
            tool,
            "--csv",
            "--print-units",
            "base",
            "--log-file",
            str(log),
            "--profile-from-start",
            "off",
        ]
        # The card is measured as it is found: its clocks are not changed
        command += ["--clock-control", "none", "--metrics", ",".join(wanted.values())]
        code, said = run([*command, *target])
        text = log.read_text(errors="replace") if log.exists() else ""
        print(text, flush=True)
        measured = read(text)
        if any(measured):
            return measured
        missing = unknown(said + text)
        if not missing:
            break
        wanted = {key: name for key, name in wanted.items() if name not in missing}
    raise Skip(why_not(said + text) + (f" (exit status {code})" if code else ""))


def stage(ctx: Context) -> str:
    numel = 1 << 14 if ctx.rehearse else NUMEL
    target = python("-m", "bench.gpu.ncu", "--device", ctx.device, "--numel", str(numel))
    tool = machine.find_tool("ncu")
    if ctx.rehearse:
        must(target)
    if tool is None:
        raise Skip("no ncu" + ("; its kernels ran on the CPU" if ctx.rehearse else ""))
    if ctx.rehearse:
        raise Skip("its kernels ran on the CPU; ncu needs an NVIDIA GPU")
    rows = rows_of(profile(tool, ctx, target), numel)
    replace(ctx.output / "ncu.json", json.dumps({"kind": "ncu", "rows": rows}, indent=1) + "\n")
    return "; ".join(f"{r['kernel']}: busiest {r.get('busiest', 'unknown')}" for r in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--numel", type=int, default=NUMEL)
    found = parser.parse_args()
    launch_all(found.device, found.numel)
