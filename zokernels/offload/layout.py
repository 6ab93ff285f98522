"""Where each parameter of a block lies in the bytes that cross a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import DTYPES
from ..functional import encode
from ..wire import Wire, is_lossless, wire_bytes
from .blocks import ALIGN, Block, round_up


class Place(NamedTuple):
    """Elements of a weight, and where their wire bytes lie."""

    entry: int  #: the number of the weight in its block
    part: slice  #: of its elements
    begin: int
    size: int

    def of(self, data: Tensor) -> Tensor:
        """The wire bytes in ``data``, those of the block."""
        return data[self.begin : self.begin + self.size]


class WireLayout:
    """Where each parameter lies in the wire bytes of its block.

    These are one section for each of ``ranks``, of equal size, with the parameters of its slice.  Parameters
    of other dtypes than fp32, bf16 and fp16 travel as they are.
    """

    def __init__(self, wire: Wire, blocks: Sequence[Block], ranks: int = 1) -> None:
        self.wire, self.ranks = wire, ranks
        self.places: list[list[list[Place]]] = []  #: by block and rank
        self.sections: list[int] = []  #: the bytes of a section, by block
        for block in blocks:
            places = [self._places(block, rank) for rank in range(ranks)]
            size = max(1, *(p.begin + p.size for of_rank in places for p in of_rank))
            self.sections.append(section := round_up(size, ALIGN) if ranks > 1 else size)
            self.places.append(
                [[p._replace(begin=p.begin + r * section) for p in of] for r, of in enumerate(places)]
            )
        self.nbytes = [ranks * section for section in self.sections]
        self.room = round_up(max(self.nbytes), ALIGN)  #: for any block
        dtypes = {e.dtype for b in blocks for e in b.entries} & set(DTYPES)
        self.lossless = all(is_lossless(wire, dtype) for dtype in dtypes)

    def _places(self, block: Block, rank: int) -> list[Place]:
        """Those of a rank, in its section."""
        places, at = [], 0
        for i, e in enumerate(block.entries):
            part = block.part(e, rank, self.ranks)
            count = part.stop - part.start
            size = wire_bytes(count, self.wire) if e.dtype in DTYPES else count * e.dtype.itemsize
            if count:
                places.append(Place(i, part, at, size))
                at += round_up(size, ALIGN)
        return places

    def section(self, block: Block, rank: int) -> slice:
        """The bytes of a rank among those of the block."""
        size = self.sections[block.index]
        return slice(rank * size, (rank + 1) * size)

    def encode(self, block: Block, weights: Mapping[int, Tensor], data: Tensor, rank: int = 0) -> None:
        """Encodes the slice of ``rank`` to its place in ``data``, the wire bytes of the block.

        ``weights``: by id of the parameter, what of it is in that slice.
        """
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor], list[int]]] = {}
        for place in self.places[block.index][rank]:
            value, buffer = weights[id(block.entries[place.entry].param)], place.of(data)
            if value.dtype in DTYPES:
                out, params, offsets = alike.setdefault(value.dtype, ([], [], []))
                out.append(buffer)
                params.append(value)
                offsets.append(place.part.start)
            else:
                buffer.copy_(value.view(-1).view(torch.uint8))
        for out, params, offsets in alike.values():
            encode(out, params, self.wire, offsets=offsets)
