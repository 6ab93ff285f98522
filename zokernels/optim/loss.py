"""What a closure may return."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ..checks import fail
from .groups import OP


def as_loss(value: object, device: torch.device, capturing: bool = False) -> Tensor:
    """The closure's result as a new 0-dim tensor: fp32, or float64 where it was float64 or a Python number.

    A copy, because a closure may return one buffer twice.
    """
    if capturing and not (isinstance(value, Tensor) and value.device.type == "cuda"):
        got = f"a tensor on {value.device}" if isinstance(value, Tensor) else repr(value)
        fail(OP, "closure", "a loss on the GPU where a CUDA graph is captured", got)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            fail(OP, "closure", "a real scalar loss", f"{value.dtype} of shape {tuple(value.shape)}")
        dtype = torch.float32 if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64
        return value.detach().reshape(()).to(dtype, copy=True)
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(OP, "closure", "a scalar loss (a tensor or a number)", repr(value), TypeError)
    return torch.full((), float(value), dtype=torch.float64, device=device)
