"""What is built and what is present: ``zokernels info``, made to be pasted into a bug report."""

from __future__ import annotations

import importlib
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import torch

from .backends import BackendUnavailable, library, registry
from .contract import CONTRACT
from .version import __version__

#: What changes how the package, its build or torch behaves.
_VARIABLES = (
    "ZOKERNELS_BACKEND", "ZOKERNELS_CPU_ISA", "ZOKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS",
)  # fmt: skip
_PACKAGES = ("triton", "numpy", "safetensors", "transformers", "peft", "accelerate")


def _host() -> dict[str, Any]:
    """Build and instruction sets, as the host module knows them; or why there is none."""
    try:
        host = importlib.import_module("zokernels._host")
    except ImportError as error:
        return {"missing": str(error)}
    return {"instruction_sets": host.instruction_sets(), **host.build_info()}


def _cuda_library() -> str | None:
    """What the CUDA library was built for; None where there is none that loads."""
    from .backends.cuda.support import Build

    try:
        library.load("cuda")
        return str(Build.read())
    except BackendUnavailable:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "sm": f"{p.major}{p.minor}", "memory": p.total_memory})
    return found


def _backends() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in registry.NAMES:
        try:
            backend = registry.get(name)
            found[name] = {"ready": True, "devices": sorted(backend.devices)}
            if backend.refused:
                found[name]["refused"] = {str(device): why for device, why in backend.refused.items()}
            if backend.note:
                found[name]["note"] = backend.note
        except BackendUnavailable as error:
            found[name] = {"ready": False, "why": str(error).removeprefix(f"backend {name!r} ")}
    return found


def _installed() -> dict[str, str]:
    """Versions of packages that the integrations use, read without importing them."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, Any]:
    """Everything, as plain values: what ``zokernels info --json`` prints."""
    gpus = _gpus()
    devices = ["cpu", *(f"cuda:{i}" for i in range(len(gpus)))]
    return {
        "zokernels": __version__,
        "contract": CONTRACT,
        "folder": str(pathlib.Path(__file__).parent),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "packages": _installed(),
        "gpus": gpus,
        "host": _host(),
        "cuda_library": _cuda_library(),
        "backends": _backends(),
        "chosen": {device: registry.select(device).name for device in devices},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def text(found: dict[str, Any]) -> str:
    """What :func:`facts` has found, as aligned lines for people."""
    host = found["host"]
    rows = [
        ("zokernels", f"{found['zokernels']}, contract {found['contract']}, in {found['folder']}"),
        ("Python", f"{found['python']} on {found['system']}"),
        ("torch", f"{found['torch']}, CUDA {found['cuda'] or 'none'}, {found['threads']} threads"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items()) or "none"),
    ]
    rows += [
        (f"GPU {i}", f"{gpu['name']}, sm_{gpu['sm']}, {gpu['memory'] / 2**30:.0f} GiB")
        for i, gpu in enumerate(found["gpus"])
    ] or [("GPU", "none visible")]
    if "missing" in host:
        rows.append(("host module", f"not built ({host['missing']})"))
    else:
        rows.append(("host module", f"{host['compiler']}, {host['build_type']}"))
        rows.append(("instruction sets", ", ".join(host["instruction_sets"])))
    rows.append(("CUDA library", found["cuda_library"] or "not built"))
    for name, backend in found["backends"].items():
        ready = (
            f"ready for {' and '.join(backend['devices'])} tensors" if backend["ready"] else backend["why"]
        )
        rows.append((f"backend {name}", f"{ready} ({backend['note']})" if "note" in backend else ready))
        rows += [
            (f"backend {name}", f"not for {device}: {why}")
            for device, why in backend.get("refused", {}).items()
        ]
    rows += [(f"chosen for {device}", name) for device, name in found["chosen"].items()]
    rows += found["environment"].items()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {words}" for name, words in rows)
