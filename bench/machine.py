"""The header of a result: which machine, which software, which commit."""

from __future__ import annotations

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
        from zokernels import host
    except ImportError:
        return {}
    found = {}
    for name in ("instruction_sets", "build_info"):
        if callable(member := getattr(host, name, None)):
            found[name] = member()
    return found


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge the figures.  ``commit`` ends in ``+`` where tracked files were changed."""
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    if commit and _run("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "+"
    header: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": cores(),
        "system": platform.system() + " " + platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zokernels": zokernels.__version__,
        "contract": zokernels.CONTRACT,
        "commit": commit,
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "host_library": _host_library(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        header |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return header


def title(header: dict[str, Any]) -> str:
    """One line: the machine and the software."""
    where = header.get("gpu") or header["cpu"]
    what = f"torch {header['torch']}, zokernels {header['zokernels']} ({header['commit'] or 'no commit'})"
    return f"{where}, {header['cores']} cores; {what}"
