"""How much memory of the device a streamed model takes, worked out beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_choice, fail
from ..step.probes.blocks import LIMIT, scratch_bytes
from ..wire import Wire
from .blocks import PAGE, STORAGES, Block, blocks_of, round_up
from .layout import WireLayout

#: (slots, scratch) from the fastest to the smallest.  A third slot lets one block leave while one computes
#: and one comes.  The second scratch saves drawing the noise again for the second side.  Without a second
#: slot nothing is copied during a computation, so it is given up last.
CHOICES = ((3, 2), (2, 2), (2, 1), (1, 1))
#: The part of the device's free memory that weights may take, where nothing else is asked for.  The rest is
#: for activations and what libraries hold for themselves.
_PART = 0.8


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
    states: Sequence[torch.dtype] = (),
    master: torch.dtype | None = None,
) -> Footprint:
    """How much memory of the device :func:`stream` with these arguments will take.

    Nothing is allocated, and the parameters of ``model`` may be on "meta" (:func:`empty_weights`).  Blocks
    that are read from a checkpoint in place take a few pages more.

    With storage="device" nothing is streamed, and the whole is what steps with ``restore="exact"`` take of
    any model.  A model that is compiled as one (``torch.compile(model)``, ``model.compile()``) reads all of
    its weights in one piece, and so takes a copy of all of them; compiled modules inside it, of theirs.

    Args:
        device: (device) on which the model will be: blocks on a GPU are larger (docs/optimizer.md).
        states: (host, disk) the dtypes of what the optimizer keeps of each weight: (torch.float32,) * 2 for
            Adam.  Without ``wire`` they come to the slots with the weights.
        master: (host, disk) as of :func:`stream`.
    """
    check_choice("footprint", "storage", storage, STORAGES)
    made = blocks_of("footprint", model, blocks, master)
    if storage == "device":
        return _of_steps(model, made, torch.device(device))
    for b in made:
        kept = [
            (e.name, [("state", tuple(e.param.shape), dtype, 0.0) for dtype in states]) for e in b.entries
        ]
        b.keep(kept, torch.device("meta"))
    layout = None if wire is None else WireLayout(wire, made)
    return footprint_of(model, made, slots, scratch, layout)


def footprint_of(
    model: nn.Module, made: Sequence[Block], slots: int, scratch: int, layout: WireLayout | None
) -> Footprint:
    streamed = {id(e.param) for b in made for e in b.entries}
    resident: list[Tensor] = [p for p in model.parameters() if id(p) not in streamed]
    buffers = [b for b in model.buffers() if id(b) not in streamed]
    largest, copy = max(b.nbytes for b in made), max(b.scratch for b in made)
    if layout is not None:
        largest = round_up(max(layout.nbytes), PAGE)
    return Footprint(
        slots=min(slots, len(made)) * largest,
        scratch=scratch * copy,
        decoded=0 if layout is None else copy,
        resident=sum(t.nbytes for t in (*resident, *buffers)),
        copy=max(_compiled(model, resident), *(p.nbytes for p in resident), 0),
    )


def _of_steps(model: nn.Module, made: Sequence[Block], device: torch.device) -> Footprint:
    """Of a model in memory: its weights, and the copies that steps take."""
    params = list(model.parameters())
    weights = {id(t): t for t in (*params, *model.buffers(), *(e.param for b in made for e in b.entries))}
    # A step keeps as much again of parameters between whose uses other blocks come.
    block = max(LIMIT[device.type], *(scratch_bytes([p]) for p in params))
    copy = min(scratch_bytes(params), max(2 * block, _compiled(model, params)))
    return Footprint(0, 0, 0, resident=sum(t.nbytes for t in weights.values()), copy=copy)


def _compiled(model: nn.Module, resident: Sequence[Tensor]) -> int:
    """The bytes of the copies that the compiled module with the most of ``resident`` takes."""
    ours = {id(p): p for p in resident}
    # module.compile(), and what torch.compile(module) returns
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None or hasattr(m, "_orig_mod")]
    own = ([ours[id(p)] for p in m.parameters() if id(p) in ours] for m in compiled)
    return max(map(scratch_bytes, own), default=0)


def fitting(
    op: str,
    model: nn.Module,
    made: Sequence[Block],
    device: torch.device,
    slots: int | None,
    scratch: int | None,
    layout: WireLayout | None,
    memory: int | None,
    held: int = 0,
) -> tuple[int, int]:
    """The first of :data:`CHOICES` whose footprint is at most ``memory``, with the numbers that were given.

    ``memory``: bytes of the device; None: :data:`_PART` of what a GPU has free, and no limit on the CPU,
    whose memory is that of the host.  A choice that is not the first is said in a warning.  ``held``: how
    many scratch buffers there are already, and resident weights with them.

    Raises: ValueError where nothing fits into the ``memory`` that was asked for.
    """
    asked = [(slots or s, scratch or c) for s, c in CHOICES]
    limit = memory
    if limit is None and device.type == "cuda":
        now = footprint_of(model, made, 0, held, layout)
        limit = int(_PART * (free_bytes(device) + (now.scratch + now.resident if held else 0)))
    if limit is None:
        return asked[0]
    sizes = [footprint_of(model, made, s, c, layout).total for s, c in asked]
    place = next((i for i, size in enumerate(sizes) if size <= limit), None)
    if place is None:
        if memory is not None:
            got = f"{memory}, where slots={asked[-1][0]} and scratch={asked[-1][1]} take {sizes[-1]} bytes"
            fail(op, "memory", "enough bytes for the weights, or smaller blocks", got)
        place = len(asked) - 1
    if sizes[place] < sizes[0]:
        gb = lambda size: f"{size / 1e9:.3g} GB"
        warnings.warn(
            f"{op}: slots={asked[place][0]} and scratch={asked[place][1]}, which take {gb(sizes[place])} of "
            f"{device}; slots={asked[0][0]} and scratch={asked[0][1]} would take {gb(sizes[0])}, "
            f"where {gb(limit)} are for the weights (slots=, scratch= and memory= say otherwise)",
            stacklevel=4,
        )
    return asked[place]


def free_bytes(device: torch.device) -> int:
    """What a GPU has free, and what torch's allocator holds of it without using it."""
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
