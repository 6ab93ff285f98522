"""What products keep: from one forward to the next, and from the first forward of a run to all others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Bytes of factors that are kept for their next use: by a forward of several members those of parameters that
#: it uses more than once, as generation does for each token; of one point those of all, which the direction's
#: other side uses next.
KEPT_BYTES = 256 << 20


class Learned:
    """What the first forward of a run finds out, kept for all others.

    ``size``: members of a cohort; None: nothing is known yet.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        #: By function and parameter, the arguments that have rows of members: numbers and names.
        self.with_rows: dict[Any, frozenset[Any]] = {}
        #: The parameters (bucket and stream) whose factors a forward has needed, and those of which one has
        #: needed them more than once.
        self.used: dict[tuple[int, int], Tensor] = {}
        self.again: set[tuple[int, int]] = set()
        #: The weights whose ``F.linear`` without a bias a forward has taken as a product, by id and by
        #: whether all rows had one point.
        self.linears: dict[tuple[int, bool], Tensor] = {}
        #: Memory of factors, by what it is for: the whole of it, and tensors in it by their shape.  Only the
        #: CPU's is used again: other devices have allocators that do so, while fresh memory of the system
        #: costs more than the numbers that are drawn into it.
        self.memory: dict[Any, tuple[Tensor, dict[tuple[int, ...], Tensor]]] = {}

    def empty(self, what: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An fp32 tensor without values; on the CPU in the memory that ``what`` has had before."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        whole, parts = self.memory.get(what, (None, {}))
        if (found := parts.get(shape)) is not None:
            return found
        numel = math.prod(shape)
        if whole is None or whole.numel() < numel:
            whole, parts = self.memory[what] = torch.empty(numel, dtype=torch.float32, device=device), {}
        found = parts[shape] = whole[:numel].view(shape)
        return found


class Factors:
    """Factors that are kept, of one forward and of those that follow along the same directions."""

    def __init__(self) -> None:
        self.directions: Any = None
        self.pairs: dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor]] = {}
        self.room = KEPT_BYTES

    def begin(self, directions: Any) -> None:
        if directions != self.directions:
            self.__init__()  # type: ignore[misc]
            self.directions = directions

    def keep(self, key: tuple[tuple[int, int], int], pair: tuple[Tensor, Tensor]) -> None:
        size = sum(t.nbytes for t in pair)
        if size <= self.room:
            self.room -= size
            self.pairs[key] = pair
