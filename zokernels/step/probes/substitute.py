"""One forward of an exact step: every torch function gets perturbed copies in the place of parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.overrides import resolve_name

from ..noise import Members
from ..scratch import Arena, ScratchPool, arena_numel
from ..types import Bucket, Point, Seeds, terms
from .blocks import Block, Blocks
from .guard import CONTAINERS, Guard, is_held, plainly, release, running

_GETTERS = """shape dtype device layout requires_grad is_leaf grad grad_fn ndim itemsize nbytes name output_nr
    retains_grad is_cuda is_cpu is_sparse is_sparse_csr is_quantized is_meta is_mps is_xpu is_nested is_mkldnn is_mtia
    is_xla is_vulkan is_ipu is_maia names _version _backward_hooks _grad""".split()  # noqa: SIM905
_METHODS = """size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex
    is_signed is_inference is_conj is_neg is_pinned is_shared is_coalesced is_same_size element_size get_device
    requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad _is_view has_names
    __len__ __hash__""".split()  # noqa: SIM905


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__  # a descriptor, which torch's stubs call by the type of its value


def _metadata() -> frozenset[Any]:
    """Functions that read no element.  They see the parameter itself, and no copy is made for them."""
    functions: list[Any] = [getattr(Tensor, n).__get__ for n in _GETTERS if hasattr(Tensor, n)]
    functions += [getattr(Tensor, n) for n in _METHODS if hasattr(Tensor, n)]
    functions += [_setter("requires_grad"), _setter("grad"), torch.numel, torch.is_floating_point]
    functions += [torch.is_complex, torch.is_signed, torch.is_inference, torch.is_same_size, torch.result_type]
    functions += [torch.empty_like, torch.zeros_like, torch.ones_like]
    functions += [torch.rand_like, torch.randn_like, torch.full_like]
    functions += [Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor]
    return frozenset(functions)


#: Functions that give out an address without a reference to its memory.  The copy then lives to the end of
#: the forward.
_ADDRESS = frozenset((Tensor.data_ptr, Tensor.__cuda_array_interface__.__get__))
_SET_DATA = _setter("data")
#: ``p.data`` of a copy counts versions of its own, so that writes to it would go unnoticed; ``detach`` does not.
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

USE_INPLACE = "use restore='inplace', which perturbs the parameters themselves"


class HiddenParameters(RuntimeError):
    """The closure reads parameters where the exact probe cannot perturb them; they have not changed."""


def _members(value: Any) -> Iterable[Any] | None:
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, dict) else None


def _find(values: Iterable[Any], found: list[Tensor]) -> None:
    """Puts the guarded parameters into ``found`` that occur in ``values``, or in containers."""
    for value in values:
        if isinstance(value, Guard):
            found.append(value)  # type: ignore[arg-type]
        elif isinstance(value, CONTAINERS):
            _find(_members(value) or (), found)


def _swap(value: Any, copies: dict[int, Tensor]) -> Any:
    """``value`` with a copy in the place of each parameter.  Containers without one are left as they are."""
    if (copy := copies.get(id(value))) is not None:
        return copy
    if isinstance(value, dict):
        swapped = {k: _swap(v, copies) for k, v in value.items()}
        return swapped if any(swapped[k] is not value[k] for k in value) else value
    if isinstance(value, (list, tuple)):
        items = [_swap(v, copies) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


_LOOKED_INTO = (Guard, *CONTAINERS)
#: What is done with functions that are not simply given copies.
_METADATA, _GIVES_ADDRESS, _GIVES_DATA, _SETS_DATA = "metadata", "address", "data", "sets data"
_SPECIAL: dict[Any, str] = {
    **dict.fromkeys(_metadata(), _METADATA),
    **dict.fromkeys(_ADDRESS, _GIVES_ADDRESS),
    _GET_DATA: _GIVES_DATA,
    _SET_DATA: _SETS_DATA,
}


class Part(NamedTuple):
    """The parameters of a block that are in one bucket."""

    bucket: Bucket
    members: Members
    ids: tuple[int, ...]
    numel: int  #: elements of the arena that holds their copies


class Owners:
    """Which bucket each parameter of a step is in, and so which calls make the copies of a block."""

    def __init__(self, buckets: list[Bucket]) -> None:
        self.params = {id(p): p for b in buckets for p in b.params}
        self._places = {id(p): (b, s) for b in buckets for p, s in zip(b.params, b.streams, strict=True)}
        self._parts: dict[Block, list[Part]] = {}

    def parts(self, block: Block) -> list[Part]:
        if block not in self._parts:
            by_bucket: dict[int, tuple[Bucket, list[Tensor], list[int]]] = {}
            for p in block.params:
                if (place := self._places.get(id(p))) is not None:  # a subset of the parameters may take part
                    bucket, stream = place
                    _, params, streams = by_bucket.setdefault(id(bucket), (bucket, [], []))
                    params.append(p)
                    streams.append(stream)
            self._parts[block] = [
                Part(bucket, Members(params, streams, bucket.dist), tuple(map(id, params)), arena_numel(params))
                for bucket, params, streams in by_bucket.values()
            ]
        return self._parts[block]


class _Made:
    """A block whose copies are in scratch, and of which version they are."""

    __slots__ = ("arenas", "block", "stays", "versions")

    def __init__(self, block: Block, arenas: list[Arena]) -> None:
        self.block, self.arenas, self.stays = block, arenas, block.kept
        self.versions = [a.data._version for a in arenas]

    def is_written(self) -> bool:
        return any(a.data._version != v for a, v in zip(self.arenas, self.versions, strict=True))


class Substitution:
    """Inside, and in this thread, functions see the point theta + sum_k c_k z_k in place of a parameter theta.

    The copies of a block are written into scratch when a function takes one of its parameters, and stay there
    until another block needs the scratch.  A function that is written in Python, such as
    ``F.multi_head_attention_forward``, gets copies once and runs on them.

    ``seen``: the parameters that functions have taken, by id, in the order in which they did.
    """

    def __init__(
        self, op: str, owners: Owners, blocks: Blocks, seeds: Seeds, pool: ScratchPool, buckets: list[Bucket],
        points: list[Point],
    ) -> None:  # fmt: skip
        self.op, self.pool, self.owners, self.blocks = op, pool, owners, blocks
        self.seen: dict[int, None] = {}
        self._terms = {id(b): terms(point, seeds[b.device]) for b, point in zip(buckets, points, strict=True)}
        self._copies: dict[int, Tensor] = {}
        self._made: dict[Block, _Made] = {}
        self._new: dict[int, Block] = {}  # blocks of this forward alone, by id of the parameter
        self._past: set[Block] = set()  # blocks that others have taken the place of
        self._outer: Any = None  # the forward inside whose closure a step runs

    def __enter__(self) -> Substitution:
        self._outer = running.get(get_ident())
        running[get_ident()] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._outer is None:
            running.pop(get_ident(), None)
        else:
            running[get_ident()] = self._outer
        made = dict(self._made)
        written = any(m.is_written() for m in made.values())
        self._drop(list(made.values()))
        if kind is None:
            if written:
                self._refuse_write("an operation on a view of one")
            self._learn(made)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``func``, where some of the arguments are guarded parameters."""
        special = _SPECIAL.get(func)
        if special is _METADATA:
            return plainly(func, args, kwargs)
        if isinstance(func, HigherOrderOperator):
            name = getattr(func, "__name__", func)
            raise HiddenParameters(
                f"{self.op}: closure: expected plain torch functions, got the higher-order operator {name!r}, whose "
                f"inner functions can hold parameters; {USE_INPLACE}"
            )
        if special is not None or kwargs or torch.is_grad_enabled():
            return self._call(func, args, kwargs, special)
        copies, swapped = self._copies, []
        for a in args:
            if (copy := copies.get(id(a))) is not None:
                self.seen[id(a)] = None
                a = copy
            elif isinstance(a, _LOOKED_INTO):
                return self._call(func, args, kwargs, None)
            swapped.append(a)
        out = func(*swapped)
        for made in self._made.values():
            if made.is_written():
                self._refuse_write(func)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], special: str | None) -> Any:
        found: list[Tensor] = []
        _find(args, found)
        if kwargs:
            _find(kwargs.values(), found)
        mine = [p for p in found if id(p) in self.owners.params]
        if not mine:
            return self._call_others(func, args, kwargs, found)
        if special is _SETS_DATA and args[0] is mine[0]:
            self._refuse_write(func)
        copies = self._copies_of(mine)
        for p in mine:
            self.seen[id(p)] = None
        if special is _GIVES_ADDRESS:  # without a reference to its memory, which stays to the end of the forward
            for made in self._made.values():
                made.stays = True
        elif special is _GIVES_DATA:
            func = Tensor.detach
        args, kwargs = _swap(args, copies), _swap(kwargs, copies)
        if len(mine) < len(found):
            out = self._call_others(func, args, kwargs, [p for p in found if id(p) not in self.owners.params])
        else:
            out = func(*args, **kwargs)
        if any(made.is_written() for made in self._made.values()):
            self._refuse_write(func)
        return out

    def _call_others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Tensor]) -> Any:
        """``func`` for parameters of another step, in whose closure this one runs, or of none."""
        release(p for p in params if not is_held(p))
        if not any(isinstance(p, Guard) for p in params):
            return func(*args, **kwargs)
        return plainly(func, args, kwargs) if self._outer is None else self._outer.call(func, args, kwargs)

    # Copies -------------------------------------------------------------------------------------------------

    def _copies_of(self, params: Sequence[Tensor]) -> dict[int, Tensor]:
        """The copies of some parameters, by id, which one function is about to take."""
        if any(id(p) not in self._copies for p in params):
            self._make(params)
        copies = {id(p): self._copies[id(p)] for p in params}
        if torch.is_grad_enabled():
            # A graph saves a leaf itself, so it gets one of its own: then it holds the memory, and is noticed.
            copies = {id(p): copies[id(p)].detach().requires_grad_(p.requires_grad) for p in params}
        return copies

    def _make(self, params: Sequence[Tensor]) -> None:
        """Brings the blocks of ``params`` into scratch, in the place of others."""
        known, new = self.blocks.of, self._new
        if unknown := [p for p in dict.fromkeys(params) if id(p) not in known and id(p) not in new]:
            new.update(dict.fromkeys(map(id, unknown), Block(unknown)))
        wanted = dict.fromkeys(new.get(id(p)) or known[id(p)] for p in params)
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.inference_mode(False):
            for block in wanted:
                if block not in self._made:
                    if block in self._past:
                        self.blocks.keep(block)
                    self._make_room(block, wanted)
                    self._fill(block)

    def _make_room(self, block: Block, wanted: Collection[Block]) -> None:
        """Drops the oldest copies, until those that are not kept and ``block`` have the size of one block."""
        loose = [made for made in self._made.values() if not made.stays]
        size = 0 if block.kept else block.nbytes + sum(made.block.nbytes for made in loose)
        for made in loose:
            if size <= self.blocks.limit_for(block):
                return
            if made.block not in wanted:
                if made.is_written():
                    self._refuse_write("an operation on a view of one")
                size -= made.block.nbytes
                self._past.add(made.block)
                self._drop([made])

    def _fill(self, block: Block) -> None:
        arenas: list[Arena] = []
        last = block.arenas
        try:
            for i, part in enumerate(self.owners.parts(block)):
                arena = self._take(part, last[i] if i < len(last) else None)
                arenas.append(arena)
                self._copies.update(zip(part.ids, self._written(part, arena), strict=True))
        except BaseException:
            self._drop([_Made(block, arenas)])
            raise
        block.arenas = list(arenas)
        self._made[block] = _Made(block, arenas)

    def _take(self, part: Part, last: Arena | None) -> Arena:
        return self.pool.take(part.numel, part.members.params[0], last)

    def _written(self, part: Part, arena: Arena) -> list[Tensor]:
        """Writes the copies of a part into ``arena``; what functions get in the place of the parameters."""
        views = arena.views(part.ids, part.members.params)
        part.bucket.noise.perturb(views.out, part.members, *self._terms[id(part.bucket)])
        return views.copies

    def _drop(self, blocks: Sequence[_Made]) -> None:
        for made in blocks:
            self._made.pop(made.block, None)
            for part in self.owners.parts(made.block):
                for i in part.ids:
                    self._copies.pop(i, None)
            for arena in made.arenas:
                self.pool.give_back(arena)

    def _learn(self, made: Collection[Block]) -> None:
        """Lets the blocks of later forwards be what this one took."""
        if len(self.seen) < len(self.owners.params):
            for block in {*self._past, *made} - {*self._new.values()}:
                if vain := [p for p in block.params if id(p) in self.owners.params and id(p) not in self.seen]:
                    self.blocks.part(block, vain)
        if self._new:
            self.blocks.join(dict.fromkeys(self._new.values()))

    def _refuse_write(self, func: Any) -> NoReturn:
        name = func if isinstance(func, str) else resolve_name(func) or func
        raise RuntimeError(
            f"{self.op}: closure: expected a forward that does not write to its parameters, got {name}, whose effect "
            "would be lost with the perturbed copy; do it outside step()"
        )


class Tangents(Substitution):
    """Every torch function sees a dual tensor in place of each parameter.

    It is a copy of theta, with the point's sum_k c_k z_k as its tangent; both are scratch.  The tangent has
    the parameter's dtype, to which z, which is fp32, is rounded to nearest.
    """

    def _take(self, part: Part, last: Arena | None) -> Arena:
        return self.pool.take(2 * part.numel, part.members.params[0], last)

    def _written(self, part: Part, arena: Arena) -> list[Tensor]:
        (seeds, coeffs), members, count = self._terms[id(part.bucket)], part.members, len(part.ids)
        out = arena.views((*part.ids, "tangents"), (*members.params, *members.params)).out
        copies, tangents = out[:count], out[count:]
        part.bucket.noise.perturb(copies, members, seeds[:0], coeffs[:0])
        part.bucket.noise.perturb(tangents, members, seeds, coeffs, decay=0.0)
        return [forward_ad.make_dual(copy, t) for copy, t in zip(copies, tangents, strict=True)]
