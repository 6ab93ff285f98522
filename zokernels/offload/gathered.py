"""Streaming on several devices: each of n ranks keeps and uploads a slice of every block.

The slices are gathered on the devices.  A host link then carries 1 / n of each block, and the host memory of
a rank holds 1 / n of the blocks.  The rest comes over the ranks' own interconnect (NVLink), by one all-gather
a block.  The idea: DistZO2 (2025, arXiv 2507.03211).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail
from ..distributed.ranks import all_gather_single
from .blocks import PAGE, Block, round_up
from .movers import HostMemory, Region


def check_mesh(op: str, mesh: object, storage: str, wire: str | None) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.get_coordinate() is None:
        got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        fail(op, "mesh", "a DeviceMesh of one dimension that has this rank", got)
    if storage != "host":
        fail(op, "storage", "'host' with a mesh, whose ranks each hold a slice of every block", repr(storage))
    if wire is not None:
        fail(op, "wire", "None with a mesh", repr(wire))


class Slices(HostMemory):
    """This rank's slice of each block, in host memory.

    All ranks must read the blocks in one order, as a step does.

    The process group is one of its own, because the thread that reads gathers blocks while the caller's
    thread gathers losses.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, mesh: DeviceMesh) -> None:
        self.rank, count = mesh.get_local_rank(), mesh.size()
        for b in blocks:
            b.nbytes = b.weights = round_up(b.nbytes, PAGE * count)
        super().__init__(blocks, device, count)
        self.group = dist.new_group(mesh.mesh.tolist(), use_local_synchronization=True)

    def _mine(self, region: Region, data: Tensor) -> Tensor:
        """This rank's slice of a region, in ``data``, the bytes of the block."""
        size = region.size // self.parts
        return region.of(data)[self.rank * size : (self.rank + 1) * size]

    def get(self, region: Region, data: Tensor) -> None:
        """Gathers the slices; that of this rank first crosses the host link, where there is one."""
        mine = region.data
        if data.device != mine.device:
            mine = self._mine(region, data)
            mine.copy_(region.data, non_blocking=True)
        all_gather_single(region.of(data), mine, group=self.group)

    def put(self, region: Region, data: Tensor) -> None:
        region.data.copy_(self._mine(region, data), non_blocking=True)  # all ranks have made the same bytes
