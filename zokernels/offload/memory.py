"""Host memory of exactly the size that was asked for, pinned and placed beside the GPU where there is one."""

from __future__ import annotations

import mmap
import os
import pathlib
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from .blocks import PAGE, round_up


def mapping(nbytes: int, device: torch.device) -> Tensor:
    """A private mapping, which begins at a page; for a CUDA device it is pinned.

    torch's own pinned allocator would take the next power of two, up to twice the memory (pytorch #95823).
    """
    size = max(PAGE, round_up(nbytes, PAGE))
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        fail("stream", "slots, storage", f"{size} bytes of host memory", error.strerror, MemoryError)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes]
    if device.type == "cuda":
        pin(data, size, device)
    return data


def pin(data: Tensor, size: int, device: torch.device) -> None:
    """Touches the pages from the GPU's NUMA node, so that they lie there, and registers them with CUDA."""
    cpus = cpus_beside(device)

    def touch() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)  # of this thread alone
        data.view(-1)[::PAGE].zero_()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(touch).result()
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = int(runtime.cudaHostRegister(data.data_ptr(), size, 0))
    if error:
        limit = "ulimit -l" if error == 801 else "free memory"
        fail(
            "offload",
            "storage",
            f"{size} bytes of memory that can be pinned ({limit})",
            f"CUDA error {error}",
            MemoryError,
        )
    weakref.finalize(data.untyped_storage(), runtime.cudaHostUnregister, data.data_ptr())


def cpus_beside(device: torch.device, root: pathlib.Path = pathlib.Path("/")) -> set[int]:
    """The CPUs of the NUMA node that the GPU is attached to, as far as this process may use them.

    ``root``: the folder in which the system's ``sys`` is mounted.
    """
    try:
        properties: Any = torch.cuda.get_device_properties(device)  # its stub has no PCI numbers
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        node = int((root / "sys/bus/pci/devices" / bus / "numa_node").read_text())
        ranges = (root / f"sys/devices/system/node/node{node}/cpulist").read_text().strip().split(",")
    except (OSError, ValueError, AttributeError):
        return set()
    found: set[int] = set()
    for one in ranges:
        first, _, last = one.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found & os.sched_getaffinity(0)
