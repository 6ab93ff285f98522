"""Where each parameter of a block lies in the bytes that cross a link."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import DTYPES
from ..functional import encode
from ..wire import Wire, is_lossless, wire_bytes
from .blocks import ALIGN, Block, round_up


class WireLayout:
    """Where each parameter lies in the wire bytes of its block.

    Parameters of other dtypes than fp32, bf16 and fp16 travel as they are.
    """

    def __init__(self, wire: Wire, blocks: Sequence[Block]) -> None:
        self.wire = wire
        self.places: list[list[tuple[int, int]]] = []  #: (begin, size) by block
        for block in blocks:
            sizes = [
                wire_bytes(e.param.numel(), wire) if e.dtype in DTYPES else e.nbytes for e in block.entries
            ]
            begins = itertools.accumulate((round_up(n, ALIGN) for n in sizes), initial=0)
            self.places.append(list(zip(begins, sizes)))  # noqa: B905
        self.nbytes = [max(1, *(begin + size for begin, size in places)) for places in self.places]
        self.room = round_up(max(self.nbytes), ALIGN)  #: for any block
        dtypes = {e.dtype for b in blocks for e in b.entries} & set(DTYPES)
        self.lossless = all(is_lossless(wire, dtype) for dtype in dtypes)

    def buffers(self, block: Block, data: Tensor) -> list[Tensor]:
        return [data[begin : begin + size] for begin, size in self.places[block.index]]

    def encode(self, block: Block, weights: Sequence[Tensor], data: Tensor) -> None:
        """Encodes the weights of ``block`` to wire bytes in ``data``."""
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for value, buffer in zip(weights, self.buffers(block, data), strict=True):
            if value.dtype in DTYPES:
                out, params = alike.setdefault(value.dtype, ([], []))
                out.append(buffer)
                params.append(value)
            else:
                buffer.copy_(value.view(-1).view(torch.uint8))
        for out, params in alike.values():
            encode(out, params, self.wire)
