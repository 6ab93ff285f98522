"""Streaming on several devices: each of n ranks brings a slice of every block.

The slices are gathered on the devices.  A host link then carries 1 / n of each block, and the host memory of
a rank holds 1 / n of the blocks, or it reads 1 / n of each file.  The rest comes over the ranks' own
interconnect (NVLink), by one all-gather a block.  The idea: DistZO2 (2025, arXiv 2507.03211).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail
from ..distributed.ranks import all_gather_single
from .blocks import ALIGN, PAGE, Block, Entry, round_up
from .disk import Direct, Folder, Mark
from .memory import mapping
from .movers import FileStore, HostMemory, Region


def check_mesh(op: str, mesh: object, storage: str) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.get_coordinate() is None:
        got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        fail(op, "mesh", "a DeviceMesh of one dimension that has this rank", got)
    if storage == "device":
        expected = "'host' or 'disk' with a mesh, whose ranks each bring a slice of every block"
        fail(op, "storage", expected, repr(storage))


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
        # One for each thread: that of the caller or of writes, and that which encodes for a link.
        self._words, self._parts = (
            dist.new_group(ranks, use_local_synchronization=True, backend="gloo") for _ in range(2)
        )

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

    def collect(self, block: Block, mine: Mapping[int, Tensor], data: Tensor, first_alone: bool) -> None:
        """Fills ``data``, the bytes of a block, with the parts of all ranks (:meth:`Block.parts`).

        ``mine``: those of this rank, by id of the parameter.  ``first_alone``: only on the first rank.  The
        others' parts are then sent there by the thread that writes, else by the one that encodes.
        """
        parts = [block.parts(rank, self.count) for rank in range(self.count)]
        most = max(sum(_size(e, part) for e, part in of_rank) for of_rank in parts)
        packed = torch.zeros(most, dtype=torch.uint8)
        for there, (e, _) in zip(_cut(packed, parts[self.rank]), parts[self.rank], strict=True):
            there.copy_(mine[id(e.param)].view(-1).view(torch.uint8))
        if first_alone:
            received = [torch.empty_like(packed) for _ in parts] if self.is_first else None
            dist.gather(packed, received, dst=self._first, group=self._words)
        else:
            whole = torch.empty(most * self.count, dtype=torch.uint8)
            all_gather_single(whole, packed, group=self._parts)
            received = list(whole.split(most))
        for of_rank, bytes_of_rank in zip(parts, received or [], strict=bool(received)):
            for there, (e, part) in zip(_cut(bytes_of_rank, of_rank), of_rank, strict=True):
                e.of(data).view(-1)[part].view(torch.uint8).copy_(there)

    def from_first(self, value: object = None) -> Any:
        """``value`` of the first rank."""
        box = [value]
        dist.broadcast_object_list(box, src=self._first, group=self._words)
        return box[0]


def _size(e: Entry, part: slice) -> int:
    count: int = part.stop - part.start
    return count * e.dtype.itemsize


def _cut(data: Tensor, parts: Sequence[tuple[Entry, slice]]) -> list[Tensor]:
    """The bytes of the parts, which lie in ``data`` one after the other."""
    sizes = [_size(e, part) for e, part in parts]
    return list(data[: sum(sizes)].split(sizes))


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


class Parts(HostMemory):
    """This rank's parts of weights and states in host memory, where they are updated before they are encoded.

    What crosses the link are wire bytes of these parts, which are gathered on the devices.
    """

    def __init__(self, blocks: Sequence[Block], group: Group) -> None:
        self.group, self.parts = group, 1  # blocks are as large as without ranks
        self._views: list[dict[int, Tensor]] = [{} for _ in blocks]  # by block
        self._take(blocks)

    def _take(self, blocks: Sequence[Block]) -> None:
        """Makes room for the parts that have none."""
        parts = [(b, *one) for b in blocks for one in b.parts(self.group.rank, self.group.count)]
        parts = [(b, e, part) for b, e, part in parts if id(e.param) not in self._views[b.index]]
        ends = list(itertools.accumulate(round_up(_size(e, part), ALIGN) for _, e, part in parts))
        data = mapping(ends[-1] if ends else 0, torch.device("cpu"))
        for (b, e, part), begin in zip(parts, (0, *ends[:-1]), strict=True):
            self._views[b.index][id(e.param)] = data[begin : begin + _size(e, part)].view(e.dtype)

    def add_states(self, blocks: Sequence[Block]) -> None:
        self._take(blocks)
        for b in blocks:
            for state in b.states:
                if (view := self._views[b.index].get(id(state.entry.param))) is not None:
                    view.fill_(state.value)

    def write(self, block: Block, data: Tensor, updates: int) -> None:
        """Takes this rank's parts from ``data``, the bytes of the block."""
        for e, part in block.parts(self.group.rank, self.group.count):
            self._views[block.index][id(e.param)].copy_(e.of(data).view(-1)[part])

    def views(self, block: Block, data: Tensor | None = None) -> dict[int, Tensor]:
        return self._views[block.index]


class SharedFiles(FileStore):
    """Files that all ranks see: each reads its slice of a block, and the first one writes whole blocks.

    So the folder is that of a run of one process, and goes on with any number of ranks.
    """

    is_shared = True

    def __init__(self, folder: Folder | None, mark: Mark, threads: int, cache: int, group: Group) -> None:
        super().__init__(folder, mark, threads, cache)
        self._group = group

    def spans(self, block: Block) -> list[tuple[int, int]]:
        return [self._group.span(block.nbytes)]

    def gather(self, block: Block, data: Tensor, is_whole: bool) -> None:
        if is_whole:  # the first rank may not replace the file before
            mine = torch.zeros(1, dtype=torch.uint8, device=data.device)
            return self._group.exchange(mine.repeat(self._group.count), mine)
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


class PartFiles(SharedFiles):
    """Files that all ranks see, of whose blocks each reads the parts that it updates and encodes.

    The first rank gets the parts of the others, and writes whole blocks.
    """

    def spans(self, block: Block) -> list[tuple[int, int]]:
        """Whole pages that have the parts."""
        found: list[tuple[int, int]] = []
        ends = sorted(
            (e.begin + part.start * e.dtype.itemsize, _size(e, part))
            for e, part in block.parts(self._group.rank, self._group.count)
        )
        for at, size in ends:
            begin, end = at - at % PAGE, round_up(at + size, PAGE)
            if found and begin <= found[-1][1]:
                begin, _ = found.pop()
            found.append((begin, end))
        return found or [(0, 0)]

    def views(self, block: Block, data: Tensor) -> dict[int, Tensor]:
        parts = block.parts(self._group.rank, self._group.count)
        return {id(e.param): e.of(data).view(-1)[part] for e, part in parts}

    def gather(self, block: Block, data: Tensor, is_whole: bool) -> None:
        pass  # wire bytes are gathered, and who writes a block has the parts of all

    def _replace(self, block: Block, data: Tensor, updates: int) -> Direct:
        self._group.collect(block, self.views(block, data), data, first_alone=True)
        return super()._replace(block, data, updates)
