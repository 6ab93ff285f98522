"""Where kernels run: on the tensors' own device, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .arithmetic import INTERPRET

#: The interpreter works on host memory and reads CUDA tensors through a copy.
DEVICES = frozenset(("cpu", "cuda")) if INTERPRET.value else frozenset(("cuda",))


def on_device(device: torch.device):
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
