"""The one collective of a step: every rank's losses, gathered, and averaged in an order that no mesh changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail
from ..optim.estimators import ForwardMode
from .agreement import Agreement

if TYPE_CHECKING:
    from ..optim.optimizer import ZerothOrder

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until 2.13

#: What the dimensions of a mesh mean; ranks along any other hold parts of one model, or copies of it.
DATA, PERTURBATION, PIPELINE = "data", "perturbation", "pipeline"


def mean_of(losses: Tensor | Sequence[Tensor | float]) -> Tensor:
    """The mean over the first dimension, float64: ((l0 + l1) + (l2 + l3) + ...) / n, summed as a balanced binary tree.

    ``Exchange`` takes the mean over the data ranks with it, so one process that returns ``mean_of`` of the same shards'
    losses from its closure makes the same weights.  One order on every device, and log2(n) additions.
    """
    if not len(losses):
        fail("mean_of", "losses", "at least one", 0)
    if not isinstance(losses, Tensor):
        losses = torch.stack([torch.as_tensor(x, dtype=torch.float64).detach().reshape(()) for x in losses])
    total, count = losses.double(), len(losses)
    while len(total) > 1:
        pairs = len(total) // 2 * 2
        total = torch.cat((total[:pairs:2] + total[1:pairs:2], total[pairs:]))
    return total[0] / count


class Exchange:
    """Who evaluates which of a step's points on which data, and the gathering of the losses.

    A ``mesh`` of D x P x ... ranks by the names of its dimensions: the points of a step are shared out along
    "perturbation", in runs of ceil(n / P) at most; along "data" every rank has batches of its own, and the loss of a
    point is :func:`mean_of` over them; ranks along "pipeline" hold parameters of their own, and the loss of the last
    of these stages is everyone's; ranks along any other dimension hold one model between them (tensor parallel) or
    twice, and the loss of the first of them is everyone's.

    One all-gather of float64 a step: 8 ceil(n / P) bytes a rank, 16 for plain data parallel with two sides.  All ranks
    then compute the same coefficients of the same numbers, so weights need no exchange.

    Args:
        mesh: a DeviceMesh with named dimensions; its ranks are those that call ``step``.
        check_every: steps between two comparisons of all ranks' weights (:class:`Agreement`); None: at the start alone.
    """

    def __init__(self, mesh: DeviceMesh, check_every: int | None = 100) -> None:
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
        self._place = at.get(PERTURBATION, 0)
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.group = _group_of(mesh, self.ranks)
        #: Global ranks, in the group's order.
        self.members = dist.get_process_group_ranks(self.group)
        self._order = self._leaders(self.members)
        #: Of each of ``members``.
        self.stage_of = [self._stage(rank) for rank in self.members]
        self._index: dict[tuple[Any, ...], Tensor] = {}
        self.agreement = Agreement(self, check_every)
        #: Bytes that this rank gave to the collectives of the last step, and of all steps; checks included.
        self.bytes_sent = self.total_bytes_sent = 0

    def _leaders(self, order: list[int]) -> list[list[int]]:
        """[D][P]: places in the group of the ranks whose losses count."""
        places = torch.tensor([order.index(rank) for rank in self.ranks]).view(self.mesh.mesh.shape)
        names = [n for n in (DATA, PERTURBATION, PIPELINE) if n in self.names]
        rest = [i for i, n in enumerate(self.names) if n not in names]
        places = places.permute(*(self.names.index(n) for n in names), *rest)
        return places.reshape(self.data, self.perturbation, self.stages, -1)[:, :, -1, 0].tolist()

    def _stage(self, rank: int) -> int:
        return int((self.mesh.mesh == rank).nonzero()[0, self.names.index(PIPELINE)]) if PIPELINE in self.names else 0

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
        return [r for i, others in enumerate(places) if i != self._place for r in others.flatten().tolist()]

    def share(self, count: int) -> range:
        """Which of ``count`` points this rank evaluates."""
        return _share(count, self._place, self.perturbation)

    def loss_of(self, result: object) -> object:
        """What counts of a closure's result: on the stages before the last nothing does."""
        return result if self.stage == self.stages - 1 else 0.0

    def begin(self, optimizer: ZerothOrder) -> None:
        """Before a step: whether all ranks are at one."""
        self.bytes_sent = 0
        self.agreement.begin(optimizer)

    def count(self, sent: int) -> None:
        self.bytes_sent += sent
        self.total_bytes_sent += sent

    def gather(self, own: Tensor | None, count: int, device: torch.device) -> Tensor:
        """The losses of all ``count`` points: float64 [count, ...], on ``device``; in ``own``'s dtype where it holds
        them exactly, which is where no mean was taken, and all stages know it, which is where there is one.

        ``own``: of the points of :meth:`share`, None where there are none.
        """
        most = -(-count // self.perturbation)
        shape = () if own is None else own.shape[1:]
        mine = torch.full((most, *shape), float("nan"), dtype=torch.float64, device=device)
        if own is not None:
            mine[: len(own)] = own.to(device, torch.float64)
        everyone = self.all_gather(mine)
        index = self._index_of(count, most, device)
        losses = mean_of(everyone.flatten(0, 1)[index])
        return losses.to(own.dtype) if own is not None and self.data == self.stages == 1 else losses

    def _index_of(self, count: int, most: int, device: torch.device) -> Tensor:
        """[D, count]: where each data rank's losses are among ``most`` of every rank."""
        if (key := (count, device)) not in self._index:
            shares = [len(_share(count, p, self.perturbation)) for p in range(self.perturbation)]
            places = [
                [place * most + i for place, share in zip(of_data, shares, strict=True) for i in range(share)]
                for of_data in self._order
            ]
            self._index[key] = torch.tensor(places, dtype=torch.int64).to(device)
        return self._index[key]

    def all_gather(self, mine: Tensor) -> Tensor:
        """[ranks, ...], in the group's order."""
        everyone = torch.empty((len(self.ranks), *mine.shape), dtype=mine.dtype, device=mine.device)
        all_gather_single(everyone.view(-1), mine.reshape(-1), group=self.group)
        self.count(mine.nbytes)
        return everyone

    def all_gather_object(self, value: object) -> list[Any]:
        """In the group's order; for the start, not for steps."""
        everyone: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def from_first(self, value: object) -> Any:
        """``value`` of the first rank."""
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self.group)
        return box[0]


def _share(count: int, place: int, places: int) -> range:
    """Of ``count`` things, the run of ``place`` among ``places``: sizes differ by one at most, longer ones first."""
    size, longer = divmod(count, places)
    begin = place * size + min(place, longer)
    return range(begin, begin + size + (place < longer))


def _group_of(mesh: DeviceMesh, ranks: list[int]) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if len(ranks) == dist.get_world_size() and (world := dist.group.WORLD) is not None:
        return world
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group


def exchange_of(optimizer: ZerothOrder, mesh: DeviceMesh | Exchange) -> Exchange:
    """The exchange of an optimizer, whose parts are checked."""
    op = type(optimizer).__name__
    if optimizer._state.capturable:
        fail(op, "capturable", "False with a mesh: its checks are on the host", True)
    if isinstance(mesh, DeviceMesh):
        mesh = Exchange(mesh)
    if not isinstance(mesh, Exchange):
        fail(op, "mesh", "a DeviceMesh or an Exchange", type(mesh).__name__, TypeError)
    if mesh.perturbation > (count := len(optimizer.estimator.points())):
        fail(op, "mesh", f"at most {count} ranks along {PERTURBATION!r}, one for each point", mesh.perturbation)
    if mesh.stages > 1:  # which know no parameters but their own
        if optimizer.subset is not None or not optimizer.direction.separate:
            got = f"{type(optimizer.direction).__name__}, {type(optimizer.subset).__name__}"
            fail(op, "mesh", f"no subset, and a direction of each parameter by itself, with {PIPELINE!r}", got)
        if isinstance(optimizer.estimator, ForwardMode):
            fail(op, "mesh", f"no {PIPELINE!r} with forward-mode derivatives", f"{mesh.stages} stages")
    return mesh
