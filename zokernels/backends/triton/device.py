"""Where kernels run: on the device of the tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .arithmetic import INTERPRET

#: The types of device whose tensors kernels take.  The interpreter works on host memory, and on copies of
#: CUDA tensors there.
DEVICES = frozenset(("cpu", "cuda")) if INTERPRET.value else frozenset(("cuda",))


def on_device(device: torch.device):
    """A context in which ``device`` is torch's current one, which is where Triton launches kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
