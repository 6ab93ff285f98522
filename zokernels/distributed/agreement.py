"""Whether all ranks run the same program on the same weights.

This is compared at the start, and the weights again every so many steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail, is_integer
from ..step.groups import label_of, takes_part
from ..step.roles import OptimizerView
from ..step.shard import is_sharded, local_of, peers_of, shard_of
from ..trajectory.settings import header_of
from .ranks import Gathers, Ranks

#: How many elements are hashed at a time.  Each takes 8 bytes while it is.
_PIECE = 1 << 22
#: 2^64 over the golden ratio, which is odd, as an int64.
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)


class RanksDiffer(RuntimeError):
    """Raised on all ranks of a run when they do not agree."""


def fingerprint(tensor: Tensor) -> Tensor:
    """sum_i bits_i (2 i + 1) c mod 2^64 over the elements' bits, with an odd c.

    It is int64, 0-dim, on the tensor's device.  Odd multipliers lose nothing, so a change of one element
    always shows.  It costs one read of the tensor; SHA-256 would need the bytes on the host.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1).view(kinds[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for at in range(0, flat.numel(), _PIECE):
        piece = flat[at : at + _PIECE].to(torch.int64)
        index = torch.arange(at, at + len(piece), device=tensor.device)
        total += (piece * (2 * index + 1)).sum()
    return total * _SPREAD


class Agreement:
    """The check at the start, and the check of the weights every ``every`` steps.

    At the start ranks compare version, contract, parts, hyper-parameters, seed and step, and every
    parameter's name, stream, shape, dtype, device type and weights.  Ranks may hold different shards, and
    different stages of a pipeline different parameters; what two stages have in common (tied weights) must be
    the same.

    A difference is an error on all ranks that names both sides.  Weights are compared by :func:`fingerprint`,
    between ranks that hold the same elements.
    """

    def __init__(self, ranks: Ranks, every: int | None) -> None:
        if every is not None and not is_integer(every, 1):
            fail("Exchange", "check_every", "None or a number of steps >= 1", repr(every))
        self._ranks, self._every = ranks, every
        self._done = False
        self._gathers = Gathers()  #: of the check that runs, or ran last
        self._due: Callable[[OptimizerView], None] | None = None
        self._held: Sequence[list[tuple[str, int, Any]]] = ()  #: what each rank holds
        self._groups: set[int] = set()  #: the groups that take part on any rank

    def expire(self) -> None:
        """Called when what was agreed on may have changed."""
        self._done = False

    def choose(self, number: int) -> None:
        """Chooses what is compared before the step that begins.

        ``number``: of steps that all ranks have begun together.  It is not the step's own, which differs
        where an exception has left a rank behind.
        """
        self._gathers, self._due = Gathers(), None
        if not self._done:
            self._due = self._start
        elif self._every and number % self._every == 0:
            self._due = self._check_weights

    def begin(self, optimizer: OptimizerView) -> None:
        """Compares what was chosen.  After an exception this can be called again."""
        if self._due is not None:
            self._gathers.rewind()
            self._due(optimizer)

    def start(self, optimizer: OptimizerView, gathers: Gathers | None = None) -> None:
        """Compares all.  ``gathers``: those of a start that an exception has cut short."""
        self._gathers = Gathers() if gathers is None else gathers
        self._gathers.rewind()
        self._start(optimizer)

    def _start(self, optimizer: OptimizerView) -> None:
        self._check_peers(optimizer)
        mine = (summary(optimizer), *parameters(optimizer), _held(optimizer), _groups(optimizer))
        everyone = self._ranks.all_gather_object(mine, self._gathers)
        common, params, streams, self._held, groups = zip(*everyone, strict=True)
        self._groups = set().union(*groups)
        if self._ranks.stages > 1:
            self._check_names(optimizer, streams)
        stages: dict[int, tuple[int, dict[str, str]]] = {}  # the first rank of each, and its parameters
        known: dict[str, tuple[int, str]] = {}
        for i, (rank, stage) in enumerate(zip(self._ranks.members, self._ranks.stage_of, strict=True)):
            _compare(optimizer, self._ranks.members[0], common[0], rank, common[i])
            _compare(optimizer, *stages.setdefault(stage, (rank, params[i])), rank, params[i])
            for name in streams[i]:
                if (first := known.setdefault(name, (rank, params[i][name])))[1] != params[i][name]:
                    _differ(optimizer, name, *first, rank, params[i][name])
        self._check_weights(optimizer)
        self._done = True  # not before: an error that is caught must come again

    def _check_names(self, optimizer: OptimizerView, streams: Sequence[dict[str, int]]) -> None:
        """Checks that a stream is one parameter's in all stages, and does not depend on the stage."""
        op = optimizer.op
        owner: dict[int, str] = {}
        for i, group in enumerate(optimizer.param_groups):
            if group["params"] and "param_names" not in group:
                fail(op, f"param_groups[{i}]", "named parameters where stages have their own", "unnamed ones")
        for label, stream in (item for of_rank in streams for item in of_rank.items()):
            if owner.setdefault(stream, label) != label:
                expected = "one stream for each parameter"
                fail(op, "streams", expected, f"{stream} for both {owner[stream]} and {label}")

    def foreign(self, optimizer: OptimizerView, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups that take part only on other stages of a pipeline, where ``groups`` do here."""
        here = {id(group) for group in groups}
        return [g for i, g in enumerate(optimizer.param_groups) if i in self._groups and id(g) not in here]

    def _check_peers(self, optimizer: OptimizerView) -> None:
        """Checks that ranks between which a parameter is split take part in the same forwards."""
        ranks, others = set(self._ranks.ranks), set(self._ranks.at_other_points())
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if is_sharded(p) and (not (peers := peers_of(p)) <= ranks or peers & others):
                    split = f"the ranks between which {label_of(group, i)} is split ({sorted(peers)})"
                    got = f"ranks {sorted(ranks)}, of which {sorted(others)} are at other points than rank "
                    fail(optimizer.op, "mesh", f"{split}, at one point", got + str(self._ranks.rank))

    def check_weights(self, optimizer: OptimizerView) -> None:
        self._gathers = Gathers()
        self._check_weights(optimizer)

    def _check_weights(self, optimizer: OptimizerView) -> None:
        named = [
            (label_of(group, i), p) for group in optimizer.param_groups for i, p in enumerate(group["params"])
        ]
        home = next(local_of(p).device for _, p in named)
        mine = torch.zeros(max(map(len, self._held)), dtype=torch.int64, device=home)
        # Where groups were added since the start, all is compared again in this very step.
        prints = [fingerprint(local_of(p)).to(home) for _, p in named][: len(mine)]
        mine[: len(prints)] = torch.stack(prints)
        everyone = self._ranks.all_gather(mine, self._gathers).tolist()
        holders: dict[Any, tuple[int, int]] = {}  # by parameter and shard: the first rank that has it
        for rank, held, prints in zip(self._ranks.members, self._held, everyone, strict=True):
            for what, value in zip(held, prints, strict=False):
                first, expected = holders.setdefault(what, (rank, value))
                if value != expected:
                    side = lambda value: f"weights {value & 0xFFFFFFFFFFFFFFFF:016x}"
                    where = f"{what[0]} before step {optimizer.step_count}"
                    _differ(optimizer, where, first, side(expected), rank, side(value))


def _compare(
    optimizer: OptimizerView, first: int, ours: dict[str, str], rank: int, theirs: dict[str, str]
) -> None:
    for key in (*ours, *(k for k in theirs if k not in ours)):
        if (one := ours.get(key, "none")) != (other := theirs.get(key, "none")):
            _differ(optimizer, key, first, one, rank, other)


def _differ(optimizer: OptimizerView, what: str, first: int, ours: object, rank: int, theirs: object) -> None:
    advice = "; load a checkpoint on each" if what == "step" else ""
    raise RanksDiffer(
        f"{optimizer.op}: mesh: {what}: expected the same on all ranks, got {ours} on rank {first} and "
        f"{theirs} on rank {rank}{advice}"
    )


def _held(optimizer: OptimizerView) -> list[tuple[str, int, Any]]:
    """The label and the stream of each parameter, and which of its elements this rank holds."""
    held: list[tuple[str, int, Any]] = []
    for group in optimizer.param_groups:
        for i, (p, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            held.append((label_of(group, i), stream, shard_of(p)[:2] if is_sharded(p) else ()))
    return held


def _groups(optimizer: OptimizerView) -> set[int]:
    """The numbers of the groups that take part here."""
    groups = enumerate(optimizer.param_groups)
    return {i for i, group in groups if any(takes_part(group, p) and p.numel() for p in group["params"])}


def summary(optimizer: OptimizerView) -> dict[str, str]:
    """What all ranks must have in common, each under the name by which a difference is reported."""
    header = header_of(optimizer, base=False)
    found = {key: str(value) for key, value in header.items() if key not in ("groups", "created_by")}
    found["step"] = found.pop("start")
    half = "left half updated by an exception (load a checkpoint on each)"
    found = {"update": half if optimizer.is_half_updated else "whole", **found}
    found = {"version": header["created_by"], "torch version": torch.__version__, **found}
    for i, (group, own) in enumerate(zip(optimizer.param_groups, header["groups"], strict=True)):
        for key, value in (*own["options"].items(), ("lr", float(group["lr"]))):
            found[f"param_groups[{i}][{key!r}]"] = repr(value)
    return {**found, **{key: repr(value) for key, value in optimizer.own_settings.items()}}


def parameters(optimizer: OptimizerView) -> tuple[dict[str, str], dict[str, int]]:
    """What the ranks of one stage must have in common, as in :func:`summary`; and the streams by label."""
    found, streams = {}, {}
    for i, group in enumerate(optimizer.param_groups):
        for j, (p, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            label, dtype = label_of(group, j), str(p.dtype).removeprefix("torch.")
            kind = f"{dtype} of shape {tuple(p.shape)} on {p.device.type}, stream {stream}, group {i}"
            found[label] = kind if takes_part(group, p) else f"{kind}, frozen"
            streams[label] = stream
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
    return {**found, "parameter list": f"{len(found)} parameters, {digest}"}, streams
