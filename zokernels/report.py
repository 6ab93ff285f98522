"""What is built and what is present: ``python -m zokernels``, made to be pasted into a bug report."""

from __future__ import annotations

import os
import platform

import torch

from .backends import BackendUnavailable, registry
from .contract import CONTRACT
from .version import __version__


def _host_rows() -> list[tuple[str, str]]:
    try:
        from . import _host
    except ImportError as error:
        return [("host module", f"not built ({error})")]
    info = _host.build_info()
    cuda = f"{info['cuda_compiler']} for {info['cuda_architectures']}" if "cuda_compiler" in info else "not built"
    return [
        ("host module", f"{info['compiler']}, {info['build_type']}"),
        ("instruction sets", ", ".join(_host.instruction_sets())),
        ("CUDA library", cuda),
    ]


def _device_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none visible")]
    rows = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    return rows


def report() -> str:
    """The report as text."""
    rows = [
        ("zokernels", f"{__version__}, contract {CONTRACT}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"),
        *_device_rows(),
        *_host_rows(),
    ]
    for name in registry.NAMES:
        try:
            backend = registry.get(name)
            rows.append((f"backend {name}", f"ready for {' and '.join(sorted(backend.devices))} tensors"))
        except BackendUnavailable as error:
            rows.append((f"backend {name}", str(error).removeprefix(f"backend {name!r} ")))
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            rows.append((f"chosen for {device}", registry.select(device).name))
    for variable in ("ZOKERNELS_BACKEND", "ZOKERNELS_CPU_ISA", "TRITON_INTERPRET"):
        if variable in os.environ:
            rows.append((variable, os.environ[variable]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
