"""How much memory of the device a streamed model takes, worked out beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..step.probes.blocks import LIMIT, scratch_bytes
from ..wire import Wire
from .blocks import PAGE, STORAGES, blocks_of, round_up
from .layout import WireLayout


class Footprint(NamedTuple):
    """Bytes on the device.  Activations, and what libraries hold for themselves, are not included."""

    slots: int
    scratch: int
    decoded: int  #: the one block to which wire bytes are decoded
    resident: int  #: weights in no block, and other buffers
    #: The perturbed copies of resident parameters, at most: those of the largest one, while a function takes
    #: it, or of all that a compiled module has; with storage="device" those of a block, and of what is kept.
    copy: int

    @property
    def total(self) -> int:
        return sum(self)


def footprint(
    model: nn.Module,
    blocks: str | Sequence[nn.Module] | None = None,
    *,
    storage: str = "host",
    device: torch.device | str = "cpu",
    slots: int = 3,
    scratch: int = 2,
    wire: Wire | None = None,
) -> Footprint:
    """How much memory of the device :func:`stream` with these arguments will take.

    Nothing is allocated, and the parameters of ``model`` may be on "meta" (:func:`empty_weights`).  Blocks
    that are read from a checkpoint in place take a few pages more.

    With storage="device" nothing is streamed, and the whole is what steps with ``restore="exact"`` take of
    any model.  A model that is compiled as one (``torch.compile(model)``, ``model.compile()``) reads all of
    its weights in one piece, and so takes a copy of all of them; compiled modules inside it, of theirs.

    Args:
        device: (device) on which the model will be: blocks on a GPU are larger (docs/optimizer.md).
    """
    check_choice("footprint", "storage", storage, STORAGES)
    made = blocks_of("footprint", model, blocks)
    streamed = {id(e.param) for b in made for e in b.entries}
    resident: list[Tensor] = [p for p in model.parameters() if id(p) not in streamed]
    buffers = [b for b in model.buffers() if id(b) not in streamed]
    held = sum(t.nbytes for t in (*resident, *buffers))
    if storage == "device":
        whole = list(model.parameters())
        total, compiled = scratch_bytes(whole), _compiled(model, whole)
        # As much again is kept of what other blocks come between.
        block = max(LIMIT[torch.device(device).type], *(scratch_bytes([p]) for p in whole))
        held += sum(e.param.nbytes for b in made for e in b.entries)
        return Footprint(0, 0, 0, resident=held, copy=min(total, max(2 * block, compiled)))
    largest, copy = max(b.nbytes for b in made), max(b.scratch for b in made)
    if wire is not None:
        largest = round_up(max(WireLayout(wire, made).nbytes), PAGE)
    return Footprint(
        slots=min(slots, len(made)) * largest,
        scratch=scratch * copy,
        decoded=0 if wire is None else copy,
        resident=held,
        copy=max(_compiled(model, resident), *(p.nbytes for p in resident), 0),
    )


def _compiled(model: nn.Module, resident: Sequence[Tensor]) -> int:
    """The bytes of the copies that the compiled module with the most of ``resident`` takes."""
    ours = {id(p): p for p in resident}
    # module.compile(), and what torch.compile(module) returns
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None or hasattr(m, "_orig_mod")]
    own = ([ours[id(p)] for p in m.parameters() if id(p) in ours] for m in compiled)
    return max(map(scratch_bytes, own), default=0)
