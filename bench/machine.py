"""The header of a result: which machine, which software, which commit."""

from __future__ import annotations

import importlib
import os
import pathlib
import platform
import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

import zokernels

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _host_library() -> dict[str, Any]:
    """Instruction sets and build of the compiled host library, where it is built."""
    try:
        host = importlib.import_module("zokernels._host")
    except ImportError:
        return {}
    return {"instruction_sets": host.instruction_sets(), "build_info": host.build_info()}


def commit() -> str | None:
    """The short hash, ending in ``+`` where tracked files were changed; ``ZOKERNELS_COMMIT`` names it where a copy of
    the tree came without its git directory.
    """
    if named := os.environ.get("ZOKERNELS_COMMIT"):
        return named
    if not (_ROOT / ".git").exists():
        return None  # an installed package: a repository around it is the user's
    found = _run("git", "rev-parse", "--short=12", "HEAD")
    return f"{found}+" if found and _run("git", "status", "--porcelain", "--untracked-files=no") else found


def free_memory(device: str) -> int:
    """Bytes that can be allocated on ``device`` now; on a GPU torch's own cached blocks count as free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # unknown: a size that any machine of today has


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge the figures."""
    header: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": cores(),
        "system": platform.system() + " " + platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
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
            "driver": (_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0],
        }
    return header


def title(header: dict[str, Any]) -> str:
    """One line: the machine and the software."""
    where = header.get("gpu") or header["cpu"]
    what = f"torch {header['torch']}, zokernels {header['zokernels']} ({header['commit'] or 'no commit'})"
    return f"{where}, {header['cores']} cores; {what}"
