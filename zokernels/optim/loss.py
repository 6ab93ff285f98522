"""What a closure may return, and how a step reads it."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import fail


def as_loss(op: str, value: object, device: torch.device, capturing: bool = False) -> Tensor:
    """The closure's result as a new 0-dim tensor: fp32, or float64 where it was float64 or a Python number.

    A copy, because a closure may return one buffer twice.
    """
    if capturing and not (isinstance(value, Tensor) and value.device.type == "cuda"):
        got = f"a tensor on {value.device}" if isinstance(value, Tensor) else repr(value)
        fail(op, "closure", "a loss on the GPU where a CUDA graph is captured", got)
    if isinstance(value, Tensor):
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
