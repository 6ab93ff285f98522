"""The header of a result: which machine, which software, which commit.

Importing this imports neither torch nor zokernels: those who only look for a tool need not wait for them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_tool(name: str) -> str | None:
    """The path of one of NVIDIA's programs, or None.

    It is looked for on PATH, beside nvcc, and in the folders where CUDA is usually installed.
    """
    beside = pathlib.Path(shutil.which("nvcc") or "nvcc").resolve().parent
    folders = [
        str(beside),
        "/usr/local/cuda/bin",
        *sorted(map(str, pathlib.Path("/opt/nvidia").glob("nsight-*/*"))),
    ]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(reversed(folders)))


def cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _host_library() -> dict[str, Any]:
    """The instruction sets and the build of the host module; nothing if it is not built."""
    try:
        host = importlib.import_module("zokernels._host")
    except ImportError:
        return {}
    return {"instruction_sets": host.instruction_sets(), "build_info": host.build_info()}


def commit() -> str | None:
    """The short hash of the commit, with a ``+`` at its end if tracked files were changed.

    ``ZOKERNELS_COMMIT`` says what it is for a copy of the tree that has no git directory.
    """
    if named := os.environ.get("ZOKERNELS_COMMIT"):
        return named
    if not (_ROOT / ".git").exists():
        return None  # the package is installed, and a repository around it is the user's own
    found = _run("git", "rev-parse", "--short=12", "HEAD")
    return f"{found}+" if found and _run("git", "status", "--porcelain", "--untracked-files=no") else found


def free_memory(device: str) -> int:
    """The bytes that can be allocated on ``device`` now.

    On a GPU the blocks that torch keeps cached count as free.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # it is unknown, and any machine of today has this much


def peak_bandwidth() -> float | None:
    """The bytes that the GPU's memory can move in a second: clock times width of the bus, two transfers a
    cycle.

    None if torch does not tell these.  Those of an H100 SXM are 2,619 MHz and 5,120 bits, which gives 3.35
    TB/s."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * kilohertz * 1e3 * bits / 8 or None


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge the figures."""
    import torch

    import zokernels

    header: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": cores(),
        "system": platform.system() + " " + platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "zokernels": zokernels.__version__,
        "contract": zokernels.CONTRACT,
        "commit": commit(),
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "host_library": _host_library(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        header |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "gpu_l2": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "peak_bandwidth": peak_bandwidth(),
            "driver": (_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split(
                "\n"
            )[0],
        }
    return header


def title(header: dict[str, Any]) -> str:
    """One line: the machine and the software."""
    where = header.get("gpu") or header["cpu"]
    what = f"torch {header['torch']}, zokernels {header['zokernels']} ({header['commit'] or 'no commit'})"
    return f"{where}, {header['cores']} cores; {what}"
