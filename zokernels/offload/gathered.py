"""Streaming on several devices: each of n ranks brings a slice of every block.

The slices are gathered on the devices.  A host link then carries 1 / n of each block, and the host memory of
a rank holds 1 / n of the blocks, or it reads 1 / n of each file.  The rest comes over the ranks' own
interconnect (NVLink), by one all-gather a block.  The idea: DistZO2 (2025, arXiv 2507.03211).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail
from ..distributed.ranks import all_gather_single
from .blocks import PAGE, Block, round_up
from .disk import Direct, Folder, Mark
from .movers import FileStore, HostMemory, Region


def check_mesh(op: str, mesh: object, storage: str, wire: str | None) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.get_coordinate() is None:
        got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        fail(op, "mesh", "a DeviceMesh of one dimension that has this rank", got)
    if storage == "device":
        expected = "'host' or 'disk' with a mesh, whose ranks each bring a slice of every block"
        fail(op, "storage", expected, repr(storage))
    if wire is not None:
        fail(op, "wire", "None with a mesh", repr(wire))


class Group:
    """The ranks that bring slices of the same blocks, and what they send one another.

    All of them must read the blocks in one order, as a step does.

    The process groups are of their own, because the threads that read and write exchange slices and words
    while the caller's thread gathers losses.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.count = mesh.get_local_rank(), mesh.size()
        ranks = mesh.mesh.tolist()
        self._first: int = ranks[0]
        self._slices = dist.new_group(ranks, use_local_synchronization=True)
        self._words = dist.new_group(ranks, use_local_synchronization=True, backend="gloo")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def span(self, size: int) -> tuple[int, int]:
        """Where this rank's slice of ``size`` bytes begins and ends, in whole pages.

        The last slices may lie behind these bytes.
        """
        each = round_up(size, PAGE * self.count) // self.count
        return self.rank * each, (self.rank + 1) * each

    def gather(self, data: Tensor, size: int) -> None:
        """Fills ``data``, of ``size`` bytes and up to whole pages of all ranks, with the slices of all."""
        begin, end = self.span(size)
        all_gather_single(data[: (end - begin) * self.count], data[begin:end], group=self._slices)

    def exchange(self, data: Tensor, mine: Tensor) -> None:
        """Fills ``data`` with ``mine`` of all ranks."""
        all_gather_single(data, mine, group=self._slices)

    def from_first(self, value: object = None) -> Any:
        """``value`` of the first rank."""
        box = [value]
        dist.broadcast_object_list(box, src=self._first, group=self._words)
        return box[0]


class Slices(HostMemory):
    """This rank's slice of each block, in host memory."""

    def __init__(self, blocks: Sequence[Block], device: torch.device, group: Group) -> None:
        self.group = group
        for b in blocks:
            b.nbytes = b.weights = round_up(b.nbytes, PAGE * group.count)
        super().__init__(blocks, device, group.count)

    def _mine(self, region: Region, data: Tensor) -> Tensor:
        """This rank's slice of a region, in ``data``, the bytes of the block."""
        size = region.size // self.parts
        return region.of(data)[self.group.rank * size : (self.group.rank + 1) * size]

    def get(self, region: Region, data: Tensor) -> None:
        """Gathers the slices; that of this rank first crosses the host link, where there is one."""
        mine = region.data
        if data.device != mine.device:
            mine = self._mine(region, data)
            mine.copy_(region.data, non_blocking=True)
        self.group.exchange(region.of(data), mine)

    def put(self, region: Region, data: Tensor) -> None:
        region.data.copy_(self._mine(region, data), non_blocking=True)  # all ranks have made the same bytes


class SharedFiles(FileStore):
    """Files that all ranks see: each reads its slice of a block, and the first one writes whole blocks.

    So the folder is that of a run of one process, and goes on with any number of ranks.
    """

    is_shared = True

    def __init__(self, folder: Folder | None, mark: Mark, threads: int, cache: int, group: Group) -> None:
        super().__init__(folder, mark, threads, cache)
        self._group = group

    def span(self, block: Block) -> tuple[int, int]:
        return self._group.span(block.nbytes)

    def gather(self, block: Block, data: Tensor) -> None:
        self._group.gather(data, block.nbytes)

    def _replace(self, block: Block, data: Tensor, updates: int) -> Direct:
        """Waits, on the other ranks, until the first one has written the block."""
        assert self._folder is not None
        if not self._group.is_first:
            if (error := self._group.from_first()) is not None:
                raise OSError(f"stream: {block.name}: the first rank could not write it: {error}")
            return self._folder.written(block)
        try:
            file = super()._replace(block, data, updates)
        except BaseException as error:
            self._group.from_first(str(error))
            raise
        self._group.from_first()
        return file
