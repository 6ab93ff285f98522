"""Which elements of a parameter this process holds."""

from __future__ import annotations

from torch import Tensor

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = None


def is_sharded(tensor: Tensor) -> bool:
    return DTensor is not None and isinstance(tensor, DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The elements that lie here, without gradient history."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def places_of(tensor: Tensor) -> tuple:
    """The elements that lie here, to compare: equal for ranks that hold the same ones."""
    if not is_sharded(tensor):
        return ()
    raise NotImplementedError
