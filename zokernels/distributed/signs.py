"""What each rank sends along with its losses, so that ranks that come apart hear of it in that step."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..step.groups import takes_part
from ..step.roles import OptimizerView
from ..trajectory.settings import option_keys
from ..transfer import to_device
from .agreement import RanksDiffer, fingerprint

#: What the signs stand for, in their order.
MEANINGS = (
    "a step without an exception",
    "step (number, attempt and seed; groups added, states loaded)",
    "dtype of the losses",
    "hyper-parameters",
    "trainable parameters",
    "lr",
)
#: What an exception has left of a rank's step: nothing, or a part of an update.
FAILED, LOST = 1, 2
_FAILED, _DTYPE, _TRAINABLE = 0, 2, 4
#: float64 is what losses travel as; a loss of any other dtype is fp32.
_DTYPES = {torch.float64: 2, torch.float32: 1}


class _Sent(NamedTuple):
    """The signs of all ranks, on their way to the host."""

    step: int
    signs: Tensor
    arrived: torch.cuda.Event


class Signs:
    """64 bits for each of :data:`MEANINGS`; all ranks must send the same ones.

    On the CPU a difference is an error at once.  On a GPU nothing waits for it: the device itself turns the
    losses into NaN, so that all ranks skip the update, and the error comes when the signs have reached the
    host.

    Args:
        members: the ranks, in the order in which their signs are gathered.
        stage_of: the stage of a pipeline that each is of; stages have parameters of their own.
    """

    count = len(MEANINGS)

    def __init__(self, members: Sequence[int], stage_of: Sequence[int]) -> None:
        self._members = list(members)
        #: For each rank the place of the one with which its trainable parameters are compared.
        self._like = [list(stage_of).index(stage) for stage in stage_of]
        self._attempts = 0
        self._known: dict[int, tuple[object, int]] = {}  #: by the place of a sign: what it was made of
        self._own: list[int] = []
        self._lr = torch.zeros(1, dtype=torch.int64)
        self._sent: deque[_Sent] = deque()

    def begin(self, optimizer: OptimizerView, changes: int) -> None:
        """Reads the settings of the step that begins.

        ``changes``: how often groups were added or states loaded.

        Raises where those of an earlier step were different.
        """
        while self._sent and self._sent[0].arrived.query():
            sent = self._sent.popleft()
            self._compare(optimizer, sent.step, sent.signs.tolist())
        self._attempts += 1
        groups = optimizer.param_groups
        settings = tuple(tuple(group[key] for key in option_keys(optimizer, group)) for group in groups)
        trainable = tuple(takes_part(group, p) for group in groups for p in group["params"])
        step = optimizer.seed, optimizer.step_count, self._attempts, changes
        self._own = [0, self._sign(1, step), 0, self._sign(3, settings), self._sign(_TRAINABLE, trainable)]
        rates = [group["lr"] for group in groups]
        wide = [torch.as_tensor(r, dtype=torch.float64).detach().reshape(1) for r in rates]
        device = next((r.device for r in wide if r.device.type != "cpu"), torch.device("cpu"))
        self._lr = fingerprint(torch.cat([to_device(r, device) for r in wide])).reshape(1)

    def _sign(self, place: int, value: object) -> int:
        known, sign = self._known.get(place, (None, 0))
        if known != value or known is None:
            data = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
            self._known[place] = value, (sign := int.from_bytes(data, "little", signed=True))
        return sign

    def restart(self) -> None:
        """Called where all ranks have found that they differ: attempts are counted from here."""
        self._attempts = 0

    def of(self, dtype: torch.dtype | None, failed: int, device: torch.device) -> Tensor:
        """What this rank would do, in numbers that ranks compare: its signs, int64 [count].

        Args:
            dtype: of its losses, where all ranks must compute with the same one.
            failed: 0, or what an exception that has ended its step has left (:data:`FAILED`,
                :data:`LOST`).
        """
        own = [*self._own]
        own[_FAILED], own[_DTYPE] = failed, _DTYPES.get(dtype, 0) if dtype is not None else 0
        return torch.cat((to_device(torch.tensor(own), device), to_device(self._lr, device)))

    def check(self, optimizer: OptimizerView, losses: Tensor, signs: Tensor) -> Tensor:
        """``losses``, or NaN in their place where ranks differ and only the device knows.

        ``signs``: of all ranks, int64 [ranks, count].
        """
        if signs.device.type == "cpu":
            self._compare(optimizer, optimizer.step_count, signs.tolist())
            return losses
        expected = signs[:1].expand_as(signs).clone()
        expected[:, _TRAINABLE] = signs[torch.tensor(self._like, device=signs.device), _TRAINABLE]
        same = (signs == expected).all() & (signs[:, _FAILED] == 0).all()
        on_host = torch.empty_like(signs, device="cpu", pin_memory=True).copy_(signs, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(signs.device))
        self._sent.append(_Sent(optimizer.step_count, on_host, arrived))
        return torch.where(same, losses, torch.full_like(losses, float("nan")))

    def _compare(self, optimizer: OptimizerView, step: int, signs: list[list[int]]) -> None:
        def differ(what: str, got: str) -> None:
            raise RanksDiffer(f"{optimizer.op}: mesh: step {step}: expected {what} on all ranks, got {got}")

        for rank, own in zip(self._members, signs, strict=True):
            if own[_FAILED] == LOST:
                expected = "weights that no exception has left half updated (load a checkpoint on each)"
                differ(expected, f"those of rank {rank}")
            if own[_FAILED]:
                differ(MEANINGS[_FAILED], f"one on rank {rank}, which raised it")
        for place, meaning in enumerate(MEANINGS):
            for i, own in enumerate(signs):
                like = self._like[i] if place == _TRAINABLE else 0
                if own[place] != signs[like][place]:
                    differ(
                        f"the same {meaning}",
                        f"another on rank {self._members[i]} than on rank {self._members[like]}",
                    )
