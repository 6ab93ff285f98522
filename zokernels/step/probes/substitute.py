"""One forward of an exact step: every torch function gets perturbed copies in the place of parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.overrides import resolve_name

from ..guards import uninterrupted
from ..noise import Members
from ..scratch import Arena, ScratchPool, arena_numel
from ..types import Bucket, Point, Seeds, terms
from .blocks import Block, Blocks
from .guard import CONTAINERS, Guard, guard, is_held, plainly, release, running

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


#: What is done with functions that are not simply given copies.
_METADATA, _GIVES_ADDRESS, _GIVES_DATA, _SETS_DATA = "metadata", "address", "data", "sets data"
_SPECIAL: dict[Any, str] = {
    **dict.fromkeys(_metadata(), _METADATA),
    **dict.fromkeys(_ADDRESS, _GIVES_ADDRESS),
    _GET_DATA: _GIVES_DATA,
    _SET_DATA: _SETS_DATA,
}


class Part:
    """The parameters of a block that are in one bucket.

    ``thetas`` are their own values, as other tensors over the same memory: with them a parameter gets its
    memory back that has had a copy's.
    """

    __slots__ = ("_known", "_step", "bucket", "ids", "members", "numel", "thetas")

    def __init__(self, bucket: int, members: Members) -> None:
        self.bucket, self.members = bucket, members
        self.ids, self.numel = tuple(map(id, members.params)), arena_numel(members.params)
        self.thetas: list[Tensor] = []
        self._known: tuple[list[int], list[torch.Size]] | None = None
        self._step = -1

    def renew(self, step: int) -> None:
        """Looks, once a step, whether the parameters have other memory than before."""
        if self._step != step:
            params = self.members.params
            found = [p.data_ptr() for p in params], [p.shape for p in params]
            if found != self._known:
                self.thetas, self._known = [p.detach() for p in params], found
                self.numel = arena_numel(params)
            self._step = step


class Owners:
    """Which bucket each parameter of a step is in, and so which calls make the copies of a block.

    It is kept from step to step, and made anew for other buckets.
    """

    def __init__(self, buckets: list[Bucket]) -> None:
        self.of, self.buckets, self.step = self._known(buckets), buckets, 0
        self.params = {id(p): p for b in buckets for p in b.params}
        self._places = {id(p): (i, s) for i, b in enumerate(buckets) for p, s in zip(b.params, b.streams, strict=True)}
        self._parts: dict[Block, list[Part]] = {}

    @staticmethod
    def _known(buckets: list[Bucket]) -> list[Any]:
        return [(b.device, b.dtype, b.dist, b.streams, list(map(id, b.params))) for b in buckets]

    @classmethod
    def renewed(cls, last: Owners | None, buckets: list[Bucket]) -> Owners:
        """``last``, if it is of buckets like these."""
        if last is None or last.of != cls._known(buckets):
            return cls(buckets)
        last.buckets = buckets
        last.step += 1
        return last

    def parts(self, block: Block) -> list[Part]:
        if block not in self._parts:
            by_bucket: dict[int, tuple[list[Tensor], list[int]]] = {}
            for p in block.params:
                if (place := self._places.get(id(p))) is not None:  # a subset of the parameters may take part
                    at, stream = place
                    params, streams = by_bucket.setdefault(at, ([], []))
                    params.append(p)
                    streams.append(stream)
            made = [Part(at, Members(*found, self.buckets[at].dist)) for at, found in by_bucket.items()]
            if len(self._parts) >= 4096:  # of blocks of one forward each
                self._parts.clear()
            self._parts[block] = made
        return self._parts[block]


class Made:
    """A block whose copies are in scratch.

    If it is open, the memory of its parameters is that of the copies, and they are not guarded.
    """

    __slots__ = ("_count", "_versions", "arenas", "block", "is_open", "parts", "stays")

    def __init__(self, block: Block, parts: list[Part]) -> None:
        self.block, self.parts, self.stays, self.is_open = block, parts, block.kept, False
        self.arenas: list[Arena] = []
        self._versions: list[int] = []

    def made(self) -> None:
        """Called when the copies have their values."""
        self._versions = [a.data._version for a in self.arenas]

    def open(self) -> None:
        self.is_open = True
        for part, arena in zip(self.parts, self.arenas, strict=True):
            release(part.members.params)
            for p, view in zip(part.members.params, arena.views(part.ids, part.members.params).out, strict=True):
                p.data = view
        self._versions += [p._version for part in self.parts for p in part.members.params]
        self._count = [p._use_count() for part in self.parts for p in part.members.params]

    def close(self) -> None:
        if self.is_open:
            for part in self.parts:
                for p, theta in zip(part.members.params, part.thetas, strict=True):
                    p.data = theta
                guard(part.members.params)
            self.is_open = False

    def is_written(self) -> bool:
        """Whether something else has written to the copies, or put other memory in their place."""
        now = [a.data._version for a in self.arenas]
        if not self.is_open:
            return now != self._versions
        params = [p for part in self.parts for p in part.members.params]
        if now + [p._version for p in params] != self._versions:
            return True
        views = [v for part, a in zip(self.parts, self.arenas, strict=True) for v in a.views(part.ids, ()).out]
        return [p.data_ptr() for p in params] != [v.data_ptr() for v in views]

    def is_in_a_graph(self) -> bool:
        """Whether an autograd graph may need the values that open parameters have now."""
        return self.is_open and self._count != [p._use_count() for part in self.parts for p in part.members.params]


class Substitution:
    """Inside, and in this thread, functions see the point theta + sum_k c_k z_k in place of a parameter theta.

    When a function takes a guarded parameter, the copies of its block are written into scratch, and stay there
    until another block needs it.  Meanwhile the block is open: its parameters have the memory of the copies,
    and no guard, so that nothing more is paid for their uses.

    Some functions get copies in the place of guarded parameters instead: those of a forward that ``looks``, of
    parameters that are in no block yet, and of a forward for a backward.  A function that is written in
    Python, such as ``F.multi_head_attention_forward``, then gets copies once and runs on them.

    Args:
        looks: whether the forward notes every function that takes a parameter.  Otherwise it knows the first
            one in a block alone.

    ``seen``: parameters that functions have taken, by id.
    """

    #: Whether blocks may be opened.
    opens = True

    def __init__(
        self, op: str, owners: Owners, blocks: Blocks, seeds: Seeds, pool: ScratchPool, points: list[Point], looks: bool
    ) -> None:
        self.op, self.pool, self.owners, self.blocks, self.looks = op, pool, owners, blocks, looks
        self.seen: dict[int, None] = {}
        self._terms = [terms(point, seeds[b.device]) for b, point in zip(owners.buckets, points, strict=True)]
        self._copies: dict[int, Tensor] = {}
        self._made: dict[Block, Made] = {}
        self._new: dict[int, Block] = {}  # blocks of this forward alone, by id of the parameter
        self._past: dict[Block, None] = {}  # blocks that others have taken the place of
        self._outer: Any = None  # the forward inside whose closure a step runs

    def __enter__(self) -> Substitution:
        self._outer = running.get(get_ident())
        running[get_ident()] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        made = list(self._made.values())
        with uninterrupted():
            if self._outer is None:
                running.pop(get_ident(), None)
            else:
                running[get_ident()] = self._outer
            written, graph = any(m.is_written() for m in made), [m for m in made if m.is_in_a_graph()]
            self._drop(made)
        for m in graph:  # a backward after the forward, which would see theta, is an error
            torch.autograd.graph.increment_version([p for part in m.parts for p in part.members.params])
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
        found: list[Tensor] = []
        _find(args, found)
        if kwargs:
            _find(kwargs.values(), found)
        mine = [p for p in found if id(p) in self.owners.params]
        if not mine:
            return self._call_others(func, args, kwargs, found)
        if special is _SETS_DATA and args[0] is mine[0]:
            self._refuse_write(func)
        if any(id(p) not in self._copies for p in mine):
            self._make(mine)
        for p in mine:
            self.seen[id(p)] = None
        if special is _GIVES_ADDRESS:  # without a reference to its memory, which stays to the end of the forward
            for made in self._made.values():
                made.stays = True
        elif special is _GIVES_DATA:
            func = Tensor.detach
        if copies := {id(p): self._copies[id(p)] for p in mine if isinstance(p, Guard)}:
            if torch.is_grad_enabled():
                # A graph saves a leaf itself, so it gets one of its own: then it holds the memory, and is noticed.
                copies = {i: c.detach().requires_grad_(c.requires_grad) for i, c in copies.items()}
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

    def _make(self, params: Sequence[Tensor]) -> None:
        """Brings the blocks of ``params`` into scratch, in the place of others."""
        known, new = self.blocks.of, self._new
        if unknown := [p for p in dict.fromkeys(params) if id(p) not in known and id(p) not in new]:
            new.update(dict.fromkeys(map(id, unknown), Block(unknown)))
        wanted = dict.fromkeys(new.get(id(p)) or known[id(p)] for p in params)
        opens = self.opens and not self.looks and not torch.is_grad_enabled()
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.inference_mode(False):
            for block in wanted:
                if block not in self._made:
                    if block in self._past:
                        self.blocks.keep(block)
                    self._make_room(block, wanted)
                    made = self._fill(block)
                    if opens and id(block.params[0]) not in new:
                        made.open()

    def _make_room(self, block: Block, wanted: Collection[Block]) -> None:
        """Drops the oldest copies, until those that are not kept and ``block`` have the size of one block."""
        loose = [made for made in self._made.values() if not made.stays]
        size = 0 if block.kept else block.nbytes + sum(made.block.nbytes for made in loose)
        for made in loose:
            if size <= self.blocks.limit_for(block):
                return
            if made.is_in_a_graph():
                made.stays = True
            elif made.block not in wanted:
                if made.is_written():
                    self._refuse_write("an operation on a view of one")
                size -= made.block.nbytes
                self._past[made.block] = None
                self._drop([made])

    def _fill(self, block: Block) -> Made:
        """Writes the copies of a block into scratch."""
        made = self._made[block] = Made(block, self.owners.parts(block))
        for i, part in enumerate(made.parts):
            part.renew(self.owners.step)
            arena = self._take(part, block.arenas[i] if i < len(block.arenas) else None)
            made.arenas.append(arena)
            self._copies.update(zip(part.ids, self._written(part, arena), strict=True))
        made.made()
        block.arenas = list(made.arenas)
        return made

    def _take(self, part: Part, last: Arena | None) -> Arena:
        return self.pool.take(part.numel, part.members.params[0], last)

    def _written(self, part: Part, arena: Arena) -> list[Tensor]:
        """Writes the copies of a part into ``arena``; what functions get in the place of the parameters."""
        views = arena.views(part.ids, part.members.params)
        self.owners.buckets[part.bucket].noise.perturb(views.out, part.members, *self._terms[part.bucket])
        return views.copies

    def _drop(self, blocks: Sequence[Made]) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.inference_mode(False):
            for made in blocks:
                made.close()
                self._made.pop(made.block, None)
                for part in made.parts:
                    for i in part.ids:
                        self._copies.pop(i, None)
                for arena in made.arenas:
                    self.pool.give_back(arena)

    def _learn(self, made: Sequence[Made]) -> None:
        """Lets the blocks of later forwards be what this one took."""
        new = dict.fromkeys(self._new.values())
        if self.looks:
            for block in dict.fromkeys((*self._past, *(m.block for m in made))):
                if block not in new:
                    ours = (p for p in block.params if id(p) in self.owners.params)
                    self.blocks.looked(block, [p for p in ours if id(p) not in self.seen])
        else:
            for block in (*self._past, *(m.block for m in made)):
                self.seen.update(dict.fromkeys(map(id, block.params)))
        if new:
            self.blocks.join(new)

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

    opens = False  # what functions get is not the memory alone

    def _take(self, part: Part, last: Arena | None) -> Arena:
        return self.pool.take(2 * part.numel, part.members.params[0], last)

    def _written(self, part: Part, arena: Arena) -> list[Tensor]:
        (seeds, coeffs), members, count = self._terms[part.bucket], part.members, len(part.ids)
        out = arena.views((*part.ids, "tangents"), (*members.params, *members.params)).out
        copies, tangents, noise = out[:count], out[count:], self.owners.buckets[part.bucket].noise
        noise.perturb(copies, members, seeds[:0], coeffs[:0])
        noise.perturb(tangents, members, seeds, coeffs, decay=0.0)
        return [forward_ad.make_dual(copy, t) for copy, t in zip(copies, tangents, strict=True)]
