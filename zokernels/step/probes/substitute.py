"""One forward of an exact step: every torch function gets perturbed copies in the place of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.overrides import resolve_name

from ..guards import uninterrupted
from ..noise import Members
from ..scratch import Arena, ScratchPool, Views, alias, arena_numel
from ..types import Bucket, Point, Seeds, terms
from .blocks import Block, Blocks
from .compiled import check_freezing
from .guard import CONTAINERS, Guard, guarded_kind, is_held, own_kind, plainly, release, running

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


def _find(values: Iterable[Any], params: dict[int, Tensor], found: list[Tensor]) -> None:
    """Puts those of ``params`` (by id) and all guarded parameters into ``found`` that occur in ``values``."""
    for value in values:
        if isinstance(value, CONTAINERS):
            _find(_members(value) or (), params, found)
        elif isinstance(value, Guard) or id(value) in params:
            found.append(value)  # type: ignore[arg-type]


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


class untouched:  # noqa: N801
    """Inside, torch runs as it does without what a closure may be in: modes, transforms, guards, a graph."""

    __slots__ = ("_contexts",)

    def __enter__(self) -> None:
        self._contexts: list[Any] = [torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch()]
        if torch.is_grad_enabled():
            self._contexts.append(torch.no_grad())
        if torch.is_inference_mode_enabled():
            self._contexts.append(torch.inference_mode(False))
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


class Part:
    """The parameters of a block that are in one bucket.

    ``thetas`` are their own values, as other tensors over the same memory: with them a parameter gets its
    memory back that has had a copy's.
    """

    __slots__ = ("_found", "_step", "bucket", "guards", "ids", "key", "kinds", "members", "numel", "thetas")

    def __init__(self, bucket: int, members: Members) -> None:
        self.bucket, self.members, self.ids = bucket, members, tuple(map(id, members.params))
        self.thetas: list[Tensor] = []
        self.kinds: list[type[Tensor]] = []
        self.guards: list[type[Tensor]] = []
        self.key: Any = self.ids  #: of the views of an arena
        self.numel = 0
        self._found: Any = None
        self._step = -1

    def renew(self, step: int) -> None:
        """Looks, once a step, whether the parameters have other memory than before."""
        if self._step == step:
            return
        params = self.members.params
        found = [p.data_ptr() for p in params], [p.shape for p in params]
        if found != self._found:
            self.key = (self.ids, tuple(found[1]))
            self.thetas, self._found, self.numel = [p.detach() for p in params], found, arena_numel(params)
            self.kinds = [own_kind(p) for p in params]
            self.guards = list(map(guarded_kind, self.kinds))
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

    __slots__ = ("_params", "_versions", "arenas", "block", "is_open", "parts", "stays", "users", "views")

    def __init__(self, block: Block, owners: Owners, pool: ScratchPool, copies: int = 1) -> None:
        """``copies``: of each parameter, one behind the other."""
        self.block, self.parts, self.stays, self.is_open = block, owners.parts(block), block.kept, False
        self.users = 0  #: compiled functions that run now
        self.arenas: list[Arena] = []
        self.views: list[Views] = []
        self._versions: list[int] = []
        self._params: list[tuple[list[int], list[int]]] = []
        try:
            for i, part in enumerate(self.parts):
                part.renew(owners.step)
                params = part.members.params
                last = block.arenas[i] if i < len(block.arenas) else None
                self.arenas.append(pool.take(copies * part.numel, params[0], last))
                self.views.append(self.arenas[-1].views((part.key, copies), [*params] * copies))
        except BaseException:
            for arena in self.arenas:
                pool.give_back(arena)
            raise
        block.arenas = list(self.arenas)

    def written(self) -> None:
        """Called when the copies have their values."""
        self._versions = [a.data._version for a in self.arenas]

    def open(self) -> None:
        """Gives the parameters the memory of the copies, and no guard."""
        # What should not change, besides the memory: versions, and references from outside of Python.
        all_params = [part.members.params for part in self.parts]
        self._params = [([p._version for p in params], [p._use_count() for p in params]) for params in all_params]
        self.is_open = True
        for part, params, views in zip(self.parts, all_params, self.views, strict=True):
            for p, kind, view in zip(params, part.kinds, views.out, strict=True):
                p.__class__ = kind
                p.data = view

    def close(self, guarded: bool) -> None:
        """Gives the parameters their own memory back, and perhaps their guard."""
        if self.is_open:
            for part in self.parts:
                kinds = part.guards if guarded else part.kinds
                for p, kind, theta in zip(part.members.params, kinds, part.thetas, strict=True):
                    p.data = theta
                    p.__class__ = kind
            self.is_open = False

    def are_copies_written(self) -> bool:
        return self._versions != [a.data._version for a in self.arenas]

    def check(self) -> tuple[bool, bool]:
        """Whether the forward has written to the parameters, and whether an autograd graph refers to them.

        A write may also be other memory in the place of the copies.
        """
        written, graph = self.are_copies_written(), False
        if self.is_open:
            for part, views, (versions, counts) in zip(self.parts, self.views, self._params, strict=True):
                params = part.members.params
                written |= versions != [p._version for p in params]
                written |= views.pointers != [p.data_ptr() for p in params]
                graph |= counts != [p._use_count() for p in params]
        return written, graph

    def is_idle(self) -> bool:
        """Whether nothing else refers to the copies, so that there can be others in their place."""
        opened = [len(part.ids) if self.is_open else 0 for part in self.parts]
        return all(a.idle(n) for a, n in zip(self.arenas, opened, strict=True))


class Opened:
    """The open blocks that one forward of a step leaves to the next one, so that they are opened once."""

    def __init__(self, op: str, pool: ScratchPool) -> None:
        self.op, self.pool = op, pool
        self.blocks: list[Made] = []

    def leave(self, guarded: bool, error: bool) -> None:
        """Closes the blocks.  ``error``: whether there is one already."""
        blocks, self.blocks = self.blocks, []
        close(self.op, blocks, self.pool, guarded, error)


def refuse_write(op: str, func: Any = "an operation on a view of one") -> NoReturn:
    name = func if isinstance(func, str) else resolve_name(func) or func
    raise RuntimeError(
        f"{op}: closure: expected a forward that does not write to its parameters, got {name}, whose effect "
        "would be lost with the perturbed copy; do it outside step()"
    )


def close(op: str, blocks: Sequence[Made], pool: ScratchPool, guarded: bool, error: bool = False) -> None:
    """Gives the parameters of blocks their own memory back, and refuses what has been done to the copies.

    ``error``: whether there is one already, so that none is raised here.
    """
    written = False
    if not blocks:
        return
    with uninterrupted(), untouched():
        for made in blocks:
            of_this, graph = made.check()
            written |= of_this
            made.close(guarded)
            if graph:  # a backward from here on, which would see theta, is an error
                torch.autograd.graph.increment_version([p for part in made.parts for p in part.members.params])
            for arena in made.arenas:
                pool.give_back(arena)
    if written and not error:
        refuse_write(op)


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

        opened: the blocks that are open already, where no other forward needs their scratch.

    ``seen``: parameters that functions have taken, by id.
    """

    #: Whether blocks may be opened.
    opens = True
    #: How many tensors of its size take the place of a parameter.
    copies = 1

    def __init__(
        self,
        op: str,
        owners: Owners,
        blocks: Blocks,
        seeds: Seeds,
        pool: ScratchPool,
        points: list[Point],
        looks: bool,
        opened: Opened,
    ) -> None:
        self.op, self.pool, self.owners, self.blocks, self.looks = op, pool, owners, blocks, looks
        self.seen: dict[int, None] = {}
        self._terms = [terms(point, seeds[b.device]) for b, point in zip(owners.buckets, points, strict=True)]
        self._copies: dict[int, Tensor] = {}
        self._made: dict[Block, Made] = {made.block: made for made in opened.blocks}
        self._opened = opened
        self._new: dict[int, Block] = {}  # blocks of this forward alone, by id of the parameter
        self._past: dict[Block, None] = {}  # blocks that others have taken the place of
        self._outer: Any = None  # the forward inside whose closure a step runs

    def __enter__(self) -> Substitution:
        self._outer = running.get(get_ident())
        running[get_ident()] = self
        try:
            if self._made:
                with untouched():
                    for made in list(self._made.values()):
                        if made.is_idle():
                            self._write(made)
                        else:
                            self._drop([made])
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        made = list(self._made.values())
        left: list[Made] = []
        try:
            if self._outer is None:
                running.pop(get_ident(), None)
            else:
                running[get_ident()] = self._outer
            if kind is None:
                self._learn(made)
                if not self._past:  # there was scratch for all of them
                    left = [m for m in made if m.is_open and self.blocks.of.get(m.parts[0].ids[0]) is m.block]
        finally:
            self._opened.blocks = left
            self._drop([m for m in made if m not in left], kind is not None)
        if any(m.are_copies_written() for m in self._opened.blocks):
            refuse_write(self.op)

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
        _find(args, self.owners.params, found)
        if kwargs:
            _find(kwargs.values(), self.owners.params, found)
        mine = [p for p in found if id(p) in self.owners.params]
        if not mine:
            return self._call_others(func, args, kwargs, found)
        if special is _SETS_DATA and args[0] is mine[0]:
            refuse_write(self.op, func)
        if any(id(p) not in self._copies for p in mine):  # guarded, so none of them is open
            self._make(mine)
        for p in mine:
            self.seen[id(p)] = None
        if special is _GIVES_ADDRESS:  # without a reference to its memory, which stays to the end of the forward
            for made in self._made.values():
                made.stays = True
        elif special is _GIVES_DATA:
            func = Tensor.detach
        targets = [self._copies[id(p)] if isinstance(p, Guard) else p for p in mine]
        versions = [t._version for t in targets]
        if copies := {id(p): self._copies[id(p)] for p in mine if isinstance(p, Guard)}:
            if torch.is_grad_enabled():
                # A graph saves a leaf itself, so it gets one of its own: then it holds the memory, and is noticed.
                with untouched():
                    copies = {i: alias(c, c.requires_grad) for i, c in copies.items()}
            args, kwargs = _swap(args, copies), _swap(kwargs, copies)
        if len(mine) < len(found):
            out = self._call_others(func, args, kwargs, [p for p in found if id(p) not in self.owners.params])
        else:
            out = func(*args, **kwargs)
        if versions != [t._version for t in targets]:
            refuse_write(self.op, func)
        return out

    def enter_compiled(self, params: list[Tensor]) -> Callable[[], None]:
        """Called before a compiled function that may take ``params``; what is returned, after it.

        Meanwhile their blocks are open.
        """
        check_freezing(self.op, HiddenParameters, USE_INPLACE)
        if not self.opens:
            return lambda: None
        blocks = self._make(params, for_graph=True)
        self.seen.update(dict.fromkeys(map(id, params)))
        for made in blocks:
            made.users += 1

        def leave() -> None:
            for made in blocks:
                made.users -= 1

        return leave

    def uncover(self, param: Tensor) -> None:
        """Opens the block of a parameter, which something is about to hold as it is."""
        if id(param) in self.owners.params:
            if not self.opens:
                raise HiddenParameters(
                    f"{self.op}: closure: expected torch functions that take the parameters, got a transform of torch.func "
                    "by them; transform a function of other tensors"
                )
            self._make([param], for_graph=True)
            self.seen[id(param)] = None
        elif self._outer is not None:
            self._outer.uncover(param)

    def _call_others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Tensor]) -> Any:
        """``func`` for parameters of another step, in whose closure this one runs, or of none."""
        release(p for p in params if not is_held(p))
        if not any(isinstance(p, Guard) for p in params):
            return func(*args, **kwargs)
        return plainly(func, args, kwargs) if self._outer is None else self._outer.call(func, args, kwargs)

    # Copies -------------------------------------------------------------------------------------------------

    def _make(self, params: Sequence[Tensor], for_graph: bool = False) -> list[Made]:
        """Brings the blocks of ``params`` into scratch, in the place of others.

        ``for_graph``: opens them all.
        """
        known, new = self.blocks.of, self._new
        if unknown := [p for p in dict.fromkeys(params) if id(p) not in known and id(p) not in new]:
            new.update(dict.fromkeys(map(id, unknown), Block(unknown)))
        wanted = dict.fromkeys(new.get(id(p)) or known[id(p)] for p in params)
        opens = self.opens and not self.looks and not torch.is_grad_enabled()
        with untouched():
            for block in wanted:
                if (made := self._made.get(block)) is None:
                    if block in self._past:
                        self.blocks.keep(block)
                    self._make_room(block, wanted)
                    self._fill(block, for_graph or (opens and id(block.params[0]) not in new))
                elif for_graph and not made.is_open:
                    self._forget(made)
                    made.open()
        return [self._made[block] for block in wanted]

    def _make_room(self, block: Block, wanted: Collection[Block]) -> None:
        """Drops the oldest copies, until those that are not kept and ``block`` have the size of one block."""
        loose = [made for made in self._made.values() if not made.stays and not made.users]
        size = 0 if block.kept else block.nbytes + sum(made.block.nbytes for made in loose)
        for made in loose:
            if size <= self.blocks.limit_for(block):
                return
            if made.block not in wanted:
                if made.check()[1]:
                    made.stays = True  # for a backward inside the forward
                    continue
                size -= made.block.nbytes
                self._past[made.block] = None
                self._drop([made])

    def _fill(self, block: Block, opens: bool) -> None:
        """Writes the copies of a block into scratch."""
        made = self._made[block] = Made(block, self.owners, self.pool, self.copies)
        self._write(made)
        if opens:
            made.open()
        else:
            for part, views in zip(made.parts, made.views, strict=True):
                self._copies.update(zip(part.ids, self._given(part, views), strict=True))

    def _write(self, made: Made) -> None:
        """Writes the values of this forward's point."""
        for part, views in zip(made.parts, made.views, strict=True):
            self._perturb(part, views)
        made.written()

    def _perturb(self, part: Part, views: Views) -> None:
        noise = self.owners.buckets[part.bucket].noise
        noise.perturb(views.out, part.members, *self._terms[part.bucket], theta=part.thetas)

    def _given(self, part: Part, views: Views) -> list[Tensor]:
        """What functions get in the place of guarded parameters."""
        return views.copies

    def _drop(self, blocks: Sequence[Made], error: bool = False) -> None:
        for made in blocks:
            self._made.pop(made.block, None)
            self._forget(made)
        close(self.op, blocks, self.pool, True, error)

    def _forget(self, made: Made) -> None:
        for part in made.parts if self._copies else ():
            for i in part.ids:
                self._copies.pop(i, None)

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


class Tangents(Substitution):
    """Every torch function sees a dual tensor in place of each parameter.

    It is a copy of theta, with the point's sum_k c_k z_k as its tangent; both are scratch.  The tangent has
    the parameter's dtype, to which z, which is fp32, is rounded to nearest.
    """

    opens = False  # what functions get is not the memory alone
    copies = 2

    def _perturb(self, part: Part, views: Views) -> None:
        count, (seeds, coeffs) = len(part.ids), self._terms[part.bucket]
        noise, options = self.owners.buckets[part.bucket].noise, {"theta": part.thetas}
        noise.perturb(views.out[:count], part.members, seeds[:0], coeffs[:0], **options)
        noise.perturb(views.out[count:], part.members, seeds, coeffs, decay=0.0, **options)

    def _given(self, part: Part, views: Views) -> list[Tensor]:
        count = len(part.ids)
        return [forward_ad.make_dual(c, t) for c, t in zip(views.out[:count], views.out[count:], strict=True)]
