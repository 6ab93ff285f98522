"""The SHA-256 of weights."""

from __future__ import annotations

import ctypes
import hashlib

import torch
from torch import Tensor

from ..step.roles import home_of
from ..step.shard import whole_of

#: How many bytes are hashed at a time.
_PIECE = 1 << 24


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """The SHA-256 of the elements' bytes, as ``dtype``, in the memory order of little-endian machines."""
    state = hashlib.sha256()
    flat = whole_of(home_of(tensor).value(tensor)).detach().contiguous().view(-1)
    step = max(1, _PIECE // flat.element_size())
    for piece in flat.split(step) if flat.numel() else ():
        piece = piece.to("cpu", dtype or piece.dtype)
        state.update((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr()))
    return state.hexdigest()
