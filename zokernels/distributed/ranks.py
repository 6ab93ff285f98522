"""The ranks of a mesh: who holds which part of a run, and the collectives between them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail

# its name until 2.13
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: The same of a process group, and the wait for it: C++ alone, in which no exception of another thread
#: can be raised.  The function above has the same two calls, with Python between them.
_begin_gather: Any = (
    getattr(dist.ProcessGroup, "all_gather_single", None) or dist.ProcessGroup._allgather_base
)
_wait: Any = dist.Work.wait

#: What the dimensions of a mesh mean; ranks along any other hold parts of one model, or copies of it.
DATA, PERTURBATION, PIPELINE = "data", "perturbation", "pipeline"


class Gathers:
    """What gathers gave, so that code which runs again makes each of them once.

    All ranks must take part in a gather, and none knows when another thread's exception has ended the code
    of one rank: between a gather and a note of it, or in front of it.  So the interpreter's C code makes both
    (:meth:`Ranks.all_gather`), and the code begins again from :meth:`rewind`: what was gathered is not
    gathered again.
    """

    def __init__(self) -> None:
        self.done: list[tuple[Any, Tensor]] = []
        self.asked = 0  #: how many have been asked for, since the code last began

    def rewind(self) -> None:
        self.asked = 0


class Ranks:
    """The ranks of ``mesh``, by the names of its dimensions, and what they send each other."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            fail("Exchange", "mesh", "a torch.distributed DeviceMesh", type(mesh).__name__, TypeError)
        if not mesh.mesh_dim_names:
            fail("Exchange", "mesh", f"named dimensions ({DATA!r}, {PERTURBATION!r}, ...)", "none")
        if (here := mesh.get_coordinate()) is None:
            fail("Exchange", "mesh", "a mesh that has this rank", f"rank {dist.get_rank()} outside {mesh}")
        self.mesh, self.names = mesh, tuple(mesh.mesh_dim_names)
        at = dict(zip(self.names, here, strict=True))
        size = dict(zip(self.names, mesh.mesh.shape, strict=True))
        self.data, self.perturbation, self.stages = (size.get(n, 1) for n in (DATA, PERTURBATION, PIPELINE))
        self.stage = at.get(PIPELINE, 0)
        #: This rank's number along "perturbation".
        self.place = at.get(PERTURBATION, 0)
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.group = _group_of(mesh, self.ranks)
        #: Global ranks, in the group's order.
        self.members = dist.get_process_group_ranks(self.group)
        #: The stage of each of ``members``.
        self.stage_of: Sequence[int] = [self._stage(rank) for rank in self.members]
        #: Bytes that this rank gave to the collectives of the last step, and of all steps; checks included.
        self.bytes_sent = self.total_bytes_sent = 0

    def leaders(self) -> list[list[int]]:
        """[D][P]: the places in the group of the ranks whose losses count."""
        places = torch.tensor([self.members.index(rank) for rank in self.ranks]).view(self.mesh.mesh.shape)
        names = [n for n in (DATA, PERTURBATION, PIPELINE) if n in self.names]
        rest = [i for i, n in enumerate(self.names) if n not in names]
        places = places.permute(*(self.names.index(n) for n in names), *rest)
        return places.reshape(self.data, self.perturbation, self.stages, -1)[:, :, -1, 0].tolist()

    def _stage(self, rank: int) -> int:
        return (
            int((self.mesh.mesh == rank).nonzero()[0, self.names.index(PIPELINE)])
            if PIPELINE in self.names
            else 0
        )

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == self.ranks[0]

    def at_other_points(self) -> list[int]:
        """The ranks that evaluate other points of a step."""
        if PERTURBATION not in self.names:
            return []
        dim = self.names.index(PERTURBATION)
        places = self.mesh.mesh.unbind(dim)
        return [r for i, others in enumerate(places) if i != self.place for r in others.flatten().tolist()]

    def count(self, sent: int) -> None:
        self.bytes_sent += sent
        self.total_bytes_sent += sent

    def all_gather(self, mine: Tensor, gathers: Gathers | None = None) -> Tensor:
        """The tensors of all ranks, [ranks, ...], in the group's order.

        ``gathers``: those of which this is one."""
        gathers = Gathers() if gathers is None else gathers
        if gathers.asked == len(gathers.done):
            everyone = torch.empty((len(self.ranks), *mine.shape), dtype=mine.dtype, device=mine.device)
            begun = map(_begin_gather, [self.group], [everyone.view(-1)], [mine.reshape(-1)])
            gathers.done.extend(zip(map(_wait, begun), [everyone]))  # noqa: B905
            self.count(mine.nbytes)
        gathers.asked += 1
        return gathers.done[gathers.asked - 1][1]

    def all_gather_object(self, value: object, gathers: Gathers | None = None) -> list[Any]:
        """``value`` of all ranks, in the group's order.  It is for the start, not for steps."""
        device = torch.device(self.mesh.device_type)
        gathers = Gathers() if gathers is None else gathers
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([len(data)], device=device), gathers).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        everyone = self.all_gather(padded.to(device), gathers).cpu()
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(everyone, sizes, strict=True)]

    def from_first(self, value: object) -> Any:
        """The first rank's ``value``, on every rank."""
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self.group)
        return box[0]


def _group_of(mesh: DeviceMesh, ranks: list[int]) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if len(ranks) == dist.get_world_size() and (world := dist.group.WORLD) is not None:
        return world
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group
