"""How much memory of the device a streamed model takes, worked out beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..wire import Wire
from .blocks import PAGE, blocks_of, round_up
from .layout import WireLayout


class Footprint(NamedTuple):
    """Bytes on the device.  Activations, and what libraries hold for themselves, are not included."""

    slots: int
    scratch: int
    decoded: int  #: the one block to which wire bytes are decoded
    resident: int  #: weights in no block, and other buffers
    copy: int  #: the perturbed copy of the largest resident parameter, while a function takes it

    @property
    def total(self) -> int:
        return sum(self)


def footprint(
    model: nn.Module,
    blocks: str | Sequence[nn.Module] | None = None,
    *,
    slots: int = 3,
    scratch: int = 2,
    wire: Wire | None = None,
) -> Footprint:
    """How much memory of the device :func:`stream` with these arguments, from host memory or disk, will take.

    Nothing is allocated, and the parameters of ``model`` may be on "meta" (:func:`empty_weights`).  Blocks
    that are read from a checkpoint in place take a few pages more.
    """
    made = blocks_of("footprint", model, blocks)
    streamed = {id(e.param) for b in made for e in b.entries}
    resident: list[Tensor] = [p for p in model.parameters() if id(p) not in streamed]
    buffers = [b for b in model.buffers() if id(b) not in streamed]
    largest, copy = max(b.nbytes for b in made), max(b.scratch for b in made)
    if wire is not None:
        largest = round_up(max(WireLayout(wire, made).nbytes), PAGE)
    return Footprint(
        slots=min(slots, len(made)) * largest,
        scratch=scratch * copy,
        decoded=0 if wire is None else copy,
        resident=sum(t.nbytes for t in (*resident, *buffers)),
        copy=max((p.nbytes for p in resident), default=0),
    )
