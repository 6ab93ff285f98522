"""What surrounds a step: other processes, a log, and the place where the weights are.

Each is a role, whose default does nothing.  A step calls its roles, and never asks whether there is one.

Team   who evaluates which points, and where the losses meet    zokernels.distributed.Exchange
Log    is told of a step before it begins and after its update  zokernels.trajectory.Recorder
Home   where the parameters' values are                         zokernels.offload.Engine
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import fail
from .estimators import Estimator
from .probes.probe import Probe
from .state import DeviceState, HostState
from .types import Bucket, Estimate, Group, Seeds


class Team:
    """The processes of a run: here, one process alone.

    In a team of several, each process evaluates its share of a step's points.  All of them then get all
    losses, and take the same update.
    """

    alone = True
    stages = 1  #: of a pipeline
    stage_of: Sequence[int] = (0,)  #: the stage of each process
    bytes_sent = 0  #: by this process, in the last step

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return True

    def join(self, optimizer: OptimizerView) -> None:
        """Called when the optimizer is complete: compares it with those of the other processes."""

    def enter(self, optimizer: OptimizerView) -> None:
        """Called first in a step: from here on the other processes wait for this one."""

    def begin(self, optimizer: OptimizerView, buckets: Sequence[Bucket]) -> None:
        """Called before the forwards of a step."""
        if any([b.is_sharded for b in buckets]):
            fail(optimizer.op, "mesh", "a mesh with all ranks that share the weights", None)

    def changed(self) -> None:
        """Called when groups, weights or hyper-parameters may have changed."""

    def loss_of(self, result: Any) -> Any:
        """The part of a closure's result that counts as this process's loss."""
        return result

    def failed(self, optimizer: OptimizerView, error: BaseException) -> None:
        """Called when a step has raised: the other processes may wait for this one's losses."""

    def share(self, count: int) -> range:
        """Which of ``count`` points this process evaluates."""
        return range(count)

    def gather(self, own: Tensor | None, count: int, device: torch.device) -> Tensor:
        """The losses of all ``count`` points.

        ``own``: the losses of this process's share; None where it is empty.
        """
        assert own is not None  # alone, the share is everything
        return own

    @property
    def is_decided(self) -> bool:
        """Whether all processes have all losses of the step, so that the others take it, whatever happens
        here.
        """
        return False

    def rewind(self) -> None:
        """From here on :meth:`gather` gives again what it gave before in this step."""

    def foreign(self, optimizer: OptimizerView, groups: list[Group]) -> list[Group]:
        """The groups that take part in the step on other processes alone, where ``groups`` do here."""
        return []

    def all_gather_object(self, value: object) -> list[Any]:
        """``value`` of every process."""
        return [value]

    def from_first(self, value: Any) -> Any:
        """``value`` of the first process."""
        return value


class Log:
    """The log of a run: here, none."""

    recording = False
    closed = True
    #: :meth:`mark` of the log with which the ``state_dict`` was written that was loaded last.
    expected: dict[str, Any] | None = None

    def mark(self) -> dict[str, Any] | None:
        """What tells this log from others, for a checkpoint; None where there is none."""
        return None

    def begin(self, optimizer: OptimizerView) -> None:
        """Called before the forwards of a step, which a log may refuse."""

    def append(self, optimizer: OptimizerView, buckets: list[Bucket], estimate: Estimate) -> None:
        """Called before the update of a step, with interrupts held back.

        If it raises, there is no update.
        """

    def retract(self, optimizer: OptimizerView) -> None:
        """Called when the update of the step that was appended last has raised."""

    def flush(self) -> None:
        """Brings all steps taken so far to the disk."""

    def close(self) -> None:
        """Called after the last step."""


class Home:
    """The place where parameters' values are: here, their own memory."""

    in_memory = True

    def attach(self, optimizer: Any, trajectory: object) -> None:
        """Called when the optimizer is complete: refuses what cannot be done with parameters here."""

    def probe(self, optimizer: Any, buckets: list[Bucket], seeds: Seeds) -> Probe:
        """How the closure sees the parameters at the points of a step."""
        own: Probe = optimizer.own_probe(buckets, seeds)
        return own

    def value(self, param: Tensor) -> Tensor:
        """The values of a parameter, on its device."""
        return param

    def state(self, optimizer: Any, param: Tensor, name: str) -> Tensor | None:
        """What stands for a tensor that is kept of a parameter and that is here, too; None: nothing does, and
        the tensor itself is to be made.
        """
        return None

    def find_measured(self, optimizer: Any, measured: Collection[str]) -> None:
        """Called when a run is continued.  ``measured``: the names of the tensors that are here and that the
        direction need not measure again.
        """

    def fill_states(self, state_dict: dict[str, Any]) -> None:
        """Puts the tensors that are here into a state_dict, in the place of what stands for them."""

    def check_load(self, op: str, state_dict: dict[str, Any]) -> None:
        """Called before a state_dict is loaded, which may be impossible here."""

    def without_states(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict without the tensors that :meth:`load_states` loads."""
        return state_dict

    def load_states(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Brings the tensors of a state_dict that are kept here to where they are kept."""


MEMORY = Home()


def home_of(param: Tensor) -> Home:
    home: Home = getattr(param, "_zo_home", MEMORY)
    return home


_moves = itertools.count(1)
_last_move = 0


def move_home(param: Tensor, home: Home) -> None:
    """From now on the values of ``param`` are in ``home``."""
    global _last_move
    param._zo_home = home  # type: ignore[attr-defined]
    _last_move = next(_moves)


def last_move() -> int:
    """The number of the last :func:`move_home` in this process: while it stays, so do the homes of all
    parameters.
    """
    return _last_move


def common_home(op: str, groups: list[Group]) -> Home:
    """The home of a step's parameters: memory, unless some are in another home, of which one is allowed."""
    homes = {id(h): h for g in groups for p in g["params"] if not (h := home_of(p)).in_memory}
    if len(homes) > 1:
        fail(op, "params", "parameters of one streamed model", f"those of {len(homes)}")
    return next(iter(homes.values()), MEMORY)


class OptimizerView(Protocol):
    """What roles, directions, subsets and rules may read of the optimizer whose step they serve."""

    log: Log

    param_groups: list[Group]
    #: What rules and directions keep of each parameter, saved by ``state_dict``.
    state: Any
    defaults: dict[str, Any]
    restore: str  #: "exact", "inplace" or "products"
    estimator: Estimator
    rule: Any
    direction: Any
    subset: Any
    run_state: HostState | DeviceState
    team: Team
    part: bool  #: whether the run also trains weights that no log of this optimizer holds
    carried: bool  #: whether the step began with a perturbation of the two-pass form
    #: What a direction has made that is dear to make again: never saved.
    cache: dict[Any, Any]

    @property
    def op(self) -> str:
        """The name of the optimizer's class, for error messages."""

    @property
    def seed(self) -> int: ...

    @property
    def step_count(self) -> int: ...

    @property
    def own_settings(self) -> dict[str, Any]:
        """What the class keeps beside its parts and groups."""

    @property
    def in_two_pass(self) -> bool:
        """Whether updates add the next step's perturbation."""

    @property
    def is_half_updated(self) -> bool:
        """Whether an exception has left a part of an update, of which it is not known how it is finished."""

    @property
    def members_at_once(self) -> int:
        """How many members of a population a forward has; 0 unless steps are batched."""
