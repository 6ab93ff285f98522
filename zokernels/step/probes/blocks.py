"""Blocks: parameters that are perturbed together, because a forward takes them one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..scratch import ALIGN, Arena
from .compiled import Compiled

#: Bytes up to which parameters are joined to a block.  One call then perturbs many tensors: to change blocks
#: takes about 0.2 ms on the CPU, which a block must be large enough to hide (docs/performance.md).
LIMIT = {"cpu": 16 << 20, "cuda": 64 << 20}


def scratch_bytes(params: Iterable[Tensor]) -> int:
    return sum(-(-p.nbytes // ALIGN) * ALIGN for p in params)


#: In every step of this number the first forward looks at each function that takes a parameter.
LOOK = 32


class Block:
    """Parameters with one perturbed copy in scratch, made by one call for each of their buckets."""

    __slots__ = ("arenas", "kept", "looks", "nbytes", "opens", "params")

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self.nbytes = scratch_bytes(self.params)
        #: Whether it may be open: of others than ``nn.Parameter``, a write to ``data`` would not be noticed.
        self.opens = all(isinstance(p, nn.Parameter) for p in self.params)
        #: Whether the copy lives to the end of a forward, because other blocks come between its uses.
        self.kept = False
        self.arenas: list[Arena] = []  #: the last ones
        self.looks = 0  #: forwards that had the copy, and looked at which parameters functions take


class Blocks:
    """The blocks of a model, learned from its forwards.

    In the first forward each torch function is a block of its own, with the parameters that it takes.  What
    was then taken in a row is joined up to ``limit`` bytes.  Later forwards change that where they differ:

    * what they take for the first time becomes blocks in the same way;
    * what a block often perturbs in vain, such as an expert that is rarely used, leaves it;
    * a block that is wanted again after another one has taken its place is kept from then on, so that a tied
      head, or a layer in a loop, is perturbed once.  What is kept takes no more than a block may take.

    Blocks are only about time and memory: no bit depends on them.

    Args:
        limit: bytes of scratch up to which parameters are joined; None: :data:`LIMIT`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        #: Whether memory counts more than time, where there is no ``limit``: nothing is joined, nothing kept.
        self.least = False
        self.of: dict[int, Block] = {}  #: by id of the parameter, which a block refers to
        self._alone: dict[int, Tensor] = {}  #: parameters that have left a block
        self._in_vain: dict[int, int] = {}  #: by id of the parameter: looks that found it perturbed in vain
        self._steps = 0
        self._kept = self._largest = 0
        self.owners: Any = None  #: the Owners of the last step
        self.compiled = Compiled()
        self._whole: tuple[Any, list[Block]] = (None, [])

    def limit_for(self, block: Block) -> int:
        if self.limit is None and self.least:
            return 0
        kind = block.params[0].device.type
        return LIMIT.get(kind, LIMIT["cpu"]) if self.limit is None else self.limit

    def join(self, taken: Iterable[Block]) -> None:
        """Makes larger blocks of those of single functions, which a forward took one after another."""
        members: list[Tensor] = []
        size = 0
        for block in taken:
            params = [p for p in block.params if id(p) not in self.of and id(p) not in self._alone]
            if len(params) < len(block.params):
                self._release(block)
            if block.kept:
                self._add(block)
            elif params:
                more = scratch_bytes(params)
                if members and size + more > self.limit_for(block):
                    self._add(Block(members))
                    members, size = [], 0
                members += params
                size += more
        if members:
            self._add(Block(members))

    def _add(self, block: Block) -> None:
        self._whole = (None, [])
        self._largest = max(self._largest, block.nbytes)
        self.of.update(dict.fromkeys(map(id, block.params), block))

    def whole(self, params: dict[int, Tensor]) -> list[Block]:
        """The blocks of ``params`` (by id), if together they are no more than one may be; else none.

        ``params``: the same object means the same parameters.
        """
        if self._whole[0] is not params:
            found = dict.fromkeys(self.of[i] for i in params if i in self.of)
            fits = found and all(i in self.of for i in params) and all(b.opens for b in found)
            fits = fits and sum(b.nbytes for b in found) <= min(self.limit_for(b) for b in found)
            self._whole = params, list(found) if fits else []
        return self._whole[1]

    def begin(self) -> bool:
        """Called before the forwards of a step: whether its first one shall look at every function."""
        self._steps += 1
        return self._steps % LOOK == 1

    def looked(self, block: Block, in_vain: Sequence[Tensor]) -> None:
        """Called when a forward has looked, and found parameters that ``block`` perturbed in vain."""
        block.looks += 1
        leaving = []
        for p in in_vain:
            times = self._in_vain[id(p)] = self._in_vain.get(id(p), 0) + 1
            if times >= 4 and 2 * times > block.looks:
                leaving.append(p)
        if leaving:
            self._whole = (None, [])
            self._release(block)
            for p in leaving:
                self._alone[id(p)] = p
                self.of.pop(id(p), None)
            if left := [p for p in block.params if id(p) not in self._alone]:
                smaller = Block(left)
                smaller.looks = block.looks
                self._add(smaller)

    def keep(self, block: Block) -> None:
        """Lets the copy of ``block`` live to the end of each forward, if there is room for it."""
        if self.limit is None and self.least:
            return
        room = max(self._largest, self.limit_for(block))
        if not block.kept and self._kept + block.nbytes <= room:
            block.kept = True
            self._kept += block.nbytes

    def _release(self, block: Block) -> None:
        if block.kept:
            block.kept = False
            self._kept -= block.nbytes
