"""The model as blocks: which parameters are streamed, and where each lies in the bytes of its block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import DTYPES, fail

#: Where blocks may live.
STORAGES = ("device", "host", "disk")
#: Bytes between the starts of two tensors: a cache line pair, and the alignment of cudaMalloc.
ALIGN = 256
#: What direct reads and writes of a file are multiples of.
PAGE = 4096
#: Elements of which parts of a weight are multiples, so that no wire format's scale is of two parts.
PART = 64
#: Bytes from which on a weight is worth a look at the memory that the C library has kept.
_LARGE = 1 << 20


def round_up(size: int, multiple: int) -> int:
    """The least number that is not below ``size`` and is a multiple of ``multiple``."""
    return -(-size // multiple) * multiple


#: Dtypes of buffers that are streamed as the weights that they are: the integers of quantised layers.
INTEGERS = frozenset((torch.int8, torch.uint8, torch.int16, torch.int32))


def is_weight(module: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether ``tensor``, which is ``key`` of ``module``, is streamed as a weight.

    Parameters are, and so are persistent buffers that are matrices of integers, as quantised layers have
    them.  Other buffers (counters, masks, running statistics, tables of positions) stay on the device.
    """
    if isinstance(tensor, nn.Parameter):
        return True
    persistent = key not in module._non_persistent_buffers_set
    return persistent and tensor.dtype in INTEGERS and tensor.dim() >= 2


def own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(attribute, tensor) of the weights that are the module's own, parameters first."""
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and is_weight(module, key, tensor):
            yield key, tensor


def attributes_of(module: nn.Module, tensor: Tensor) -> dict[str, Tensor | None]:
    """The attributes of ``module`` among which ``tensor`` is: its parameters or its buffers."""
    return module._parameters if isinstance(tensor, nn.Parameter) else module._buffers  # type: ignore[return-value]


class Entry(NamedTuple):
    """A weight of a block: a parameter, or a buffer of integers (:func:`is_weight`)."""

    name: str
    param: Tensor
    begin: int  #: byte in the block
    dtype: torch.dtype  #: of what is stored
    computed: torch.dtype  #: of what a forward computes with: ``dtype``, or a wider one

    @property
    def nbytes(self) -> int:
        return self.param.numel() * self.dtype.itemsize

    @property
    def is_widened(self) -> bool:
        """Whether a forward computes with another dtype than what is stored has."""
        return self.dtype is not self.computed

    def of(self, data: Tensor) -> Tensor:
        """What is stored, as a view of ``data``, the bytes of the block."""
        return self.bytes_of(data).view(self.dtype).view(self.param.shape)

    def bytes_of(self, data: Tensor) -> Tensor:
        """The bytes of what is stored among ``data``, those of the block."""
        return data[self.begin : self.begin + self.nbytes]

    def copy_at(self, data: Tensor, begin: int) -> Tensor:
        """A copy that a forward computes with, as a view of ``data`` from byte ``begin`` on."""
        size = self.param.numel() * self.computed.itemsize
        return data[begin : begin + size].view(self.computed).view(self.param.shape)


class State(NamedTuple):
    """A tensor that an optimizer keeps of a weight of a block, and that travels with it."""

    entry: Entry  #: ``entry.param`` is what stands in ``optimizer.state`` for the tensor
    weight: str  #: the name of the weight
    value: float  #: of all elements, before the first update


#: What is kept of a weight: the name, shape and dtype of each tensor, and its first value.
Kept = Sequence[tuple[str, tuple[int, ...], torch.dtype, float]]

#: How the names of states begin in files; the name of the state and that of the weight follow.
STATE = "_state."


def state_named(text: str, weights: Iterable[str]) -> tuple[str, str] | None:
    """(name of the state, name of the weight) of a tensor named ``text`` in a file; None: it is no state."""
    of = [name for name in weights if text.startswith(STATE) and text.endswith(f".{name}")]
    if not of:
        return None
    weight = max(of, key=len)
    return text[len(STATE) : -len(weight) - 1], weight


class Extent(NamedTuple):
    """Bytes of a file that go into a block, so that whole pages can be read."""

    path: str
    at: int  #: the first byte in the file
    begin: int  #: the first byte in the block, equal to ``at`` modulo :data:`PAGE`
    size: int


class Block:
    """A module whose weights travel together."""

    def __init__(self, index: int, name: str, module: nn.Module, master: torch.dtype | None = None) -> None:
        """``master``: the dtype in which weights of fp32 are stored; None: their own."""
        self.index, self.name, self.module, self.master = index, name, module, master
        self.entries: list[Entry] = []
        self.states: list[State] = []  #: they lie behind the weights
        #: Their values before the first update, where these were loaded, by id of ``state.entry.param``.
        self.loaded: dict[int, Tensor] = {}
        self.extents: list[Extent] = []  #: of the checkpoint that its weights come from
        self.nbytes = 0  #: of weights and states
        self.weights = 0  #: of weights alone, in whole pages: where states begin
        self.scratch = 0  #: bytes of one perturbed copy
        self.stored = 0  #: updates the stored bytes contain now
        #: The try of a step (:attr:`History.tries`) whose measurement the stored states contain; -1: none.
        self.measured = -1
        self.scheduled = 0  #: updates the stored bytes will contain once queued writes finish

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.entries)} weights, {self.nbytes} bytes)"

    def place(self, params: Sequence[tuple[str, Tensor]], begins: Sequence[int] | None = None) -> None:
        """Lays the parameters out one after the other, or at the bytes ``begins``."""
        at, self.entries = 0, []
        for i, (name, p) in enumerate(params):
            begin = at if begins is None else begins[i]
            dtype = self.master if self.master and p.dtype is torch.float32 else p.dtype
            self.entries.append(entry := Entry(name, p, begin, dtype, p.dtype))
            at = max(at, round_up(begin + entry.nbytes, ALIGN))
        self.nbytes = self.weights = max(PAGE, round_up(at, PAGE))
        self.scratch = sum(round_up(p.nbytes, ALIGN) for _, p in params)

    def keep(self, kept: Sequence[tuple[str, Kept]], device: torch.device, pages: int = 1) -> None:
        """Lays out what is kept of weights, each given with its name, behind the weights of the block.

        On ``device`` a placeholder stands for each of them.  ``pages``: the block has a multiple of that.
        """
        at, self.states = self.weights, []
        for name, tensors in kept:
            for key, shape, dtype, value in tensors:
                away = placeholder(torch.empty(shape, dtype=dtype, device="meta"), device)
                self.states.append(State(Entry(f"{STATE}{key}.{name}", away, at, dtype, dtype), name, value))
                at += round_up(away.nbytes, ALIGN)
        self.nbytes = round_up(at, pages * PAGE)

    def part(self, weight: Entry, rank: int, ranks: int) -> slice:
        """The elements of a weight, and of its states, that are in slice ``rank`` of ``ranks`` of the block.

        Slices are divided where a page begins, and there at a multiple of :data:`PART` elements of the
        weight.  They are consecutive in the bytes of the block.
        """
        each = round_up(self.weights, PAGE * ranks) // ranks

        def first(rank: int) -> int:
            elements = -(-(rank * each - weight.begin) // weight.dtype.itemsize)
            return min(max(0, round_up(elements, PART)), weight.param.numel())

        return slice(first(rank), first(rank + 1))

    def parts(self, rank: int, ranks: int) -> list[tuple[Entry, slice]]:
        """What slice ``rank`` of ``ranks`` has of the weights and of their states (:meth:`part`)."""
        of = {e.name: self.part(e, rank, ranks) for e in self.entries}
        found = [(e, of[e.name]) for e in self.entries] + [(s.entry, of[s.weight]) for s in self.states]
        return [(e, part) for e, part in found if part.start < part.stop]

    def begin_states(self, data: Tensor) -> None:
        """Fills the states in ``data``, the bytes of the block, with their first values."""
        for state in self.states:
            loaded = self.loaded.get(id(state.entry.param))
            view = state.entry.of(data)
            view.fill_(state.value) if loaded is None else view.copy_(loaded)

    def views(self, data: Tensor) -> dict[int, Tensor]:
        """Weights and states as views of ``data``, by id of the parameter or of what stands for the state."""
        entries = (*self.entries, *(s.entry for s in self.states))
        return {id(e.param): e.of(data) for e in entries}

    def scratch_views(self, data: Tensor) -> list[Tensor]:
        views, at = [], 0
        for entry in self.entries:
            views.append(view := entry.copy_at(data, at))
            at += round_up(view.nbytes, ALIGN)
        return views


def find_blocks(
    op: str, model: nn.Module, blocks: str | Sequence[nn.Module] | None
) -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks.

    They are the modules that were given, or those of the container of that name, or, by default, those of the
    largest container of modules of one class.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if blocks is None:
        found = _largest_container(op, model)
    elif isinstance(blocks, str):
        try:
            container = model.get_submodule(blocks)
        except AttributeError:
            containers = [
                n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))
            ]
            known = ", ".join(repr(n) for n in containers[:4] if n)
            expected = "the name of a container of modules" + (f", such as {known}" if known else "")
            if "" in containers:
                expected += ", or none: the model itself is one (leave blocks out, or blocks=list(model))"
            fail(op, "blocks", expected, repr(blocks))
        found = list(container.children())
    else:
        found = list(blocks)
    if not found or not all(isinstance(b, nn.Module) for b in found):
        fail(op, "blocks", "a container with modules, or a list of modules", repr(blocks), TypeError)
    found = list(dict.fromkeys(found))  # one that occurs twice is one block
    if outside := [b for b in found if id(b) not in names]:
        fail(op, "blocks", "modules of the model", f"a {type(outside[0]).__name__} that is not in it")
    inner = {id(m) for b in found for m in b.modules() if m is not b}
    if nested := [names[id(b)] for b in found if id(b) in inner]:
        fail(op, "blocks", "modules none of which is in another", f"{nested[0]!r} inside another block")
    return [(names[id(b)], b) for b in found]


def _largest_container(op: str, model: nn.Module) -> list[nn.Module]:
    def weight(module: nn.Module) -> int:
        alike = len({type(c) for c in module.children()}) == 1 and len(list(module.children())) > 1
        return sum(p.numel() for m in module.modules() for _, p in own_weights(m)) if alike else 0

    containers = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    best = max(containers, key=weight, default=None)
    if best is None or not weight(best):
        fail(
            op,
            "blocks",
            "a list of the model's repeated modules",
            "a model without a container of equal ones",
        )
    return list(best.children())


def streamed_weights(
    op: str, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]
) -> list[list[tuple[str, Tensor]]]:
    """The weights of each block, in the order of its modules.

    A weight that another part of the model has, too (a tied one), is in none, and stays on the device.
    """
    owners: dict[int, set[int]] = {}
    within = {id(m): i for i, (_, block) in enumerate(blocks) for m in block.modules()}
    for module in model.modules():
        for _, p in own_weights(module):
            owners.setdefault(id(p), set()).add(within.get(id(module), -1))
    result = []
    for name, block in blocks:
        found: dict[int, tuple[str, Tensor]] = {}
        for inner, _, _, p in aliases(block):
            if len(owners[id(p)]) == 1 and p.numel():
                if p.dtype not in DTYPES and p.requires_grad:
                    fail(op, f"{name}.{inner}", "dtype float32, bfloat16 or float16", p.dtype, TypeError)
                found.setdefault(id(p), (f"{name}.{inner}", p))
        result.append(list(found.values()))
    if not any(result):
        fail(op, "blocks", "modules with weights of their own", "none")
    return result


#: Dtypes in which weights of fp32 may be stored.
MASTERS = (torch.bfloat16, torch.float16)


def blocks_of(
    op: str,
    model: nn.Module,
    blocks: str | Sequence[nn.Module] | None,
    master: torch.dtype | None = None,
) -> list[Block]:
    """The blocks of the model, each with its weights laid out one after the other.

    ``master``: the dtype in which those of fp32 are stored.
    """
    if master is not None and master not in MASTERS:
        fail(op, "master", "torch.bfloat16, torch.float16 or None", repr(master))
    found = find_blocks(op, model, blocks)
    made = [Block(i, name, module, master) for i, (name, module) in enumerate(found)]
    for block, params in zip(made, streamed_weights(op, model, found), strict=True):
        block.place(params)
    return made


def aliases(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, attribute, weight) for every place where a weight is."""
    for prefix, module in model.named_modules():
        for key, p in own_weights(module):
            yield (f"{prefix}.{key}" if prefix else key), module, key, p


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of those that a state_dict has."""
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{key}" if prefix else key), buffer


def _trim(weight: Tensor) -> None:
    """Gives the memory of the large weights before this one back to the system.

    The C library (glibc) may keep what is freed between two smaller pieces, and then not find it again for
    the next weight of the same size: a model "without memory" would fill it while it is made.
    """
    if weight.nbytes >= _LARGE and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules that are made inside have weights without memory (device "meta"); other buffers are real.

    With it a model that is larger than memory is built at no cost, for :func:`stream` with ``weights``.
    """
    register, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            _trim(param)
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            self._parameters[name] = meta

    def buffer_without_memory(
        self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True
    ) -> None:
        register_buffer(self, name, tensor, persistent)
        if tensor is not None and is_weight(self, name, tensor):
            _trim(tensor)
            self._buffers[name] = tensor.to("meta")

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    nn.Module.register_buffer = buffer_without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def materialise(model: nn.Module, streamed: set[int]) -> list[tuple[str, Tensor]]:
    """Puts ordinary weights in the place of those on "meta", which cannot change their device.

    Tied weights stay tied.  The ids of new streamed weights are added to ``streamed``.  Returns the new
    resident ones, whose values are still to come.
    """
    made: dict[int, Tensor] = {}
    resident = []
    for name, module, key, p in list(aliases(model)):
        if not p.is_meta:
            continue
        if id(p) not in made:
            data = (
                placeholder(p, torch.device("cpu"))
                if id(p) in streamed
                else torch.empty(p.shape, dtype=p.dtype)
            )
            is_parameter = isinstance(p, nn.Parameter)
            made[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad) if is_parameter else data
            if id(p) in streamed:
                streamed.add(id(made[id(p)]))
            else:
                resident.append((name, made[id(p)]))
        attributes_of(module, p)[key] = made[id(p)]
    return resident


def placeholder(p: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """What a streamed weight is while its block is away: one NaN, in its shape, of ``dtype`` or its own.

    A computation that reads it is NaN, and torch refuses to write to it.  Integers, which have no NaN, are
    the least of their dtype.
    """
    dtype = p.dtype if dtype is None else dtype
    value = torch.iinfo(dtype).min if dtype in INTEGERS else float("nan")
    return torch.full((), value, dtype=dtype, device=device).expand(p.shape)


def runs(extents: Sequence[tuple[str, int, int]]) -> list[list[tuple[str, int, int]]]:
    """(path, begin, size) of tensors, in runs without a gap of a page between them."""
    ordered = sorted(extents)
    found: list[list[tuple[str, int, int]]] = []
    for one in ordered:
        if found and found[-1][-1][0] == one[0] and one[1] - sum(found[-1][-1][1:]) < PAGE:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def place_extents(block: Block, where: Sequence[tuple[str, int, int]]) -> None:
    """Lays a block out anew, so that each run of a file is one read of whole pages.

    ``where``: (path, begin, size) of each of its parameters.

    A byte's place in the block and its place in the file are then equal modulo :data:`PAGE`.
    """
    begins, at = {}, 0
    for run in runs(where):
        path, first, _ = run[0]
        end = sum(run[-1][1:])
        begin = at + first % PAGE
        block.extents.append(Extent(path, first, begin, end - first))
        for one in run:
            begins[one] = begin + one[1] - first
        at = round_up(begin + end - first, PAGE)
    block.place([(e.name, e.param) for e in block.entries], [begins[one] for one in where])
    block.nbytes = block.weights = max(block.nbytes, at)
