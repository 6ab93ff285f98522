"""Whether all ranks run the same program on the same weights: compared at the start, and weights again now and then."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import fail
from ..optim.groups import label_of, takes_part
from ..optim.shard import is_sharded, local_of, peers_of, shard_of

if TYPE_CHECKING:
    from ..optim.optimizer import ZerothOrder
    from .exchange import Exchange

#: Elements that are hashed at a time: 8 bytes each while they are.
_PIECE = 1 << 22
#: 2^64 over the golden ratio, odd.
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)


class RanksDiffer(RuntimeError):
    """Ranks of one run that do not agree; raised on all of them."""


def fingerprint(tensor: Tensor) -> Tensor:
    """sum_i bits_i (2 i + 1) c mod 2^64 over the elements' bits, c odd: int64, 0-dim, on the tensor's device.

    Odd multipliers lose nothing: a change of one element always shows.  One read of the tensor; SHA-256 would need its
    bytes on the host.
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
    """The start-up check, and the check of weights every ``every`` steps.

    The start compares version, contract, parts, hyper-parameters, seed, step, and every parameter's name, stream,
    shape, dtype, device type and weights; ranks may hold different shards.  A difference is an error on all ranks that
    names both sides.  Weights are compared by :func:`fingerprint`, between ranks that hold the same elements.
    """

    def __init__(self, exchange: Exchange, every: int | None) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            fail("Exchange", "check_every", "None or a number of steps >= 1", repr(every))
        self._exchange, self._every = exchange, every
        self._done, self._shards = False, []

    def expire(self) -> None:
        """What was agreed on may have changed."""
        self._done = False

    def begin(self, optimizer: ZerothOrder) -> None:
        if not self._done:
            self.start(optimizer)
        elif self._every and optimizer.step_count % self._every == 0:
            self.check_weights(optimizer)

    def start(self, optimizer: ZerothOrder) -> None:
        self._check_peers(optimizer)
        everyone = self._exchange.all_gather_object((summary(optimizer), _shards(optimizer)))
        summaries, self._shards = zip(*everyone, strict=True)
        first = summaries[0]
        for rank, other in zip(self._exchange.members, summaries, strict=True):
            for key in (*first, *(k for k in other if k not in first)):
                if (ours := first.get(key, "none")) != (theirs := other.get(key, "none")):
                    _differ(optimizer, key, self._exchange.members[0], ours, rank, theirs)
        self._done = True
        self.check_weights(optimizer)

    def _check_peers(self, optimizer: ZerothOrder) -> None:
        """Ranks between which a parameter is split take part in the same forwards."""
        ranks, others = set(self._exchange.ranks), set(self._exchange.at_other_points())
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if is_sharded(p) and (not (peers := peers_of(p)) <= ranks or peers & others):
                    expected = f"the ranks between which {label_of(group, i)} is split ({sorted(peers)}), at one point"
                    got = f"ranks {sorted(ranks)}, of which {sorted(others)} are at other points than rank "
                    fail(type(optimizer).__name__, "mesh", expected, got + str(self._exchange.rank))

    def check_weights(self, optimizer: ZerothOrder) -> None:
        named = [(label_of(group, i), p) for group in optimizer.param_groups for i, p in enumerate(group["params"])]
        home = next(local_of(p).device for _, p in named)
        mine = torch.stack([fingerprint(local_of(p)).to(home) for _, p in named])
        everyone = self._exchange.all_gather(mine).tolist()
        for i, (label, _) in enumerate(named):
            holders: dict[Any, tuple[int, int]] = {}  # by shard: the first rank that has it
            for rank, shards, prints in zip(self._exchange.members, self._shards, everyone, strict=True):
                first, expected = holders.setdefault(shards[i], (rank, prints[i]))
                if prints[i] != expected:
                    side = lambda value: f"weights {value & 0xFFFFFFFFFFFFFFFF:016x}"
                    what = f"{label} before step {optimizer.step_count}"
                    _differ(optimizer, what, first, side(expected), rank, side(prints[i]))


def _differ(optimizer: ZerothOrder, what: str, first: int, ours: object, rank: int, theirs: object) -> None:
    raise RanksDiffer(
        f"{type(optimizer).__name__}: mesh: {what}: expected the same on all ranks, got {ours} on rank {first} and "
        f"{theirs} on rank {rank}"
    )


def _shards(optimizer: ZerothOrder) -> list[Any]:
    """Of each parameter, which elements this rank holds."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [shard_of(p)[:2] if is_sharded(p) else () for p in params]


def summary(optimizer: ZerothOrder) -> dict[str, str]:
    """What ranks must have in common, by the name under which a difference is reported."""
    from ..trajectory.settings import header_of

    header = header_of(optimizer, base=False)
    found = {key: str(value) for key, value in header.items() if key not in ("groups", "created_by")}
    found = {"version": header["created_by"], "torch version": torch.__version__, **found}
    for i, (group, own) in enumerate(zip(optimizer.param_groups, header["groups"], strict=True)):
        for key, value in (*own["options"].items(), ("lr", _rate(group["lr"]))):
            found[f"param_groups[{i}][{key!r}]"] = repr(value)
        for j, (p, entry) in enumerate(zip(group["params"], own["params"], strict=True)):
            kind = f"{entry['dtype']} of shape {tuple(entry['shape'])} on {p.device.type}, stream {entry['stream']}"
            found[label_of(group, j)] = kind if takes_part(group, p) else f"{kind}, frozen"
    names = [label_of(g, i) for g in optimizer.param_groups for i in range(len(g["params"]))]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return {**found, "parameter list": f"{len(names)} parameters, {digest}"}


def _rate(lr: float | Tensor) -> float:
    return float(lr)
