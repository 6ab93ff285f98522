"""What a closure may return, and how a step reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import fail
from ..transfer import to_device
from .shard import is_sharded


def as_loss(op: str, value: object, device: torch.device, capturing: bool = False) -> Tensor:
    """The closure's result as a new 0-dim tensor: fp32, or float64 where it was float64 or a Python number.

    A copy, because a closure may return one buffer twice.
    """
    if capturing and not (isinstance(value, Tensor) and value.device.type == "cuda"):
        got = f"a tensor on {value.device}" if isinstance(value, Tensor) else repr(value)
        fail(op, "closure", "a loss on the GPU where a CUDA graph is captured", got)
    if isinstance(value, Tensor):
        if is_sharded(value):
            value = value.full_tensor()
        if value.numel() != 1 or value.is_complex():
            fail(op, "closure", "a real scalar loss", f"{value.dtype} of shape {tuple(value.shape)}")
        dtype = torch.float32 if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64
        return value.detach().reshape(()).to(dtype, copy=True)
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(op, "closure", "a scalar loss (a tensor or a number)", repr(value), TypeError)
    return torch.full((), float(value), dtype=torch.float64, device=device)


class Losses:
    """How a step reads what its closure returns: each result is a scalar loss."""

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Any:
        """What is kept of one result, at once, before the next forward."""
        return as_loss(op, result, device, capturing)

    def losses(self, results: list[Any]) -> Tensor:
        """[n]: one value for each of the estimator's points, of all that was kept."""
        return torch.stack([loss.to(results[0].device) for loss in results])


class Derivatives(Losses):
    """Each result is a dual tensor: [2], the loss and its derivative."""

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(result) if isinstance(result, Tensor) else (result, None)
        if tangent is None:
            got = f"a tensor of shape {tuple(result.shape)} without one" if isinstance(result, Tensor) else repr(result)
            fail(op, "closure", "a loss with a forward-mode derivative along the parameters", got, TypeError)
        return torch.stack([as_loss(op, value, device, capturing) for value in (primal, tangent)])


class Places(Losses):
    """Results are any objects, ordered by ``rank``; the losses are their places, 0 for the ``best``.

    ``rank``: takes the list of results, returns indices, best first, at least ``top`` of them.
    """

    def __init__(self, rank: Callable[[list[Any]], Iterable[int]], top: int) -> None:
        self.rank, self.top = rank, top

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Any:
        self.op, self.device = op, device
        return result

    def losses(self, results: list[Any]) -> Tensor:
        order, count = [operator.index(i) for i in self.rank(results)], len(results)
        if len(order) < self.top or len(set(order)) < len(order) or not set(order) <= set(range(count)):
            fail(self.op, "rank", f"{self.top} or more different indices in [0, {count}), best first", order)
        self.best, places = results[order[0]], [count] * count
        for place, index in enumerate(order):
            places[index] = place
        return to_device(torch.tensor(places, dtype=torch.float64), self.device)
