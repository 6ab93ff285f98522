"""Small tensors that go from device to device within a step."""

from __future__ import annotations

import torch
from torch import Tensor

#: The host, to compare devices with: ``device.type`` makes a text each time, which takes ten times as long.
CPU = torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, in ``dtype`` where one is given; itself where nothing changes.

    A copy that ends on a device is not waited for: everything that reads it there comes later on the same
        stream.  A
    copy that ends in host memory is: the host reads it at once, and would find what lay there before.  So
    what must not wait goes from the host to a device, never the other way."""
    dtype = dtype or tensor.dtype
    if tensor.dtype is dtype and tensor.device == device:
        return tensor
    if tensor.is_cpu and device != CPU and tensor.is_pinned():
        tensor = tensor.clone()  # its owner may write to pinned memory before the copy has read it
    return tensor.to(device, dtype, non_blocking=device != CPU)


def has_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory, and not only a shape, as those on torch's device "meta" have."""
    if not tensor.is_meta:
        return True
    try:
        tensor.detach().flatten()[:1].cpu()
    except NotImplementedError:
        return False
    return True


def known_on_host(value: Tensor) -> bool:
    """Whether the host can read ``value`` without waiting for a device."""
    return value.is_cpu
