"""One forward of an exact step: every torch function gets perturbed copies in the place of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad

from ..noise import Noise
from ..scratch import ScratchPool, Views, alias
from ..types import Point, Seeds, terms
from .blocks import Block, Blocks
from .compiled import freezes
from .functions import (
    GIVES_ADDRESS,
    GIVES_DATA,
    METADATA,
    SETS_DATA,
    SPECIAL,
    USE_INPLACE,
    HiddenParameters,
    find,
    refuse_write,
    swap,
)
from .guard import Guard, is_held, plainly, release, running
from .made import Made, Opened, Owners, Part, close, untouched


class Substitution:
    """Inside, and in this thread, functions see the point theta + sum_k c_k z_k in place of a parameter
    theta.

    When a function takes a guarded parameter, the copies of its block are written into scratch, and stay
    there until another block needs it.  Meanwhile the block is open: its parameters have the memory of the
    copies, and no guard, so that nothing more is paid for their uses.

    Some functions get copies in the place of guarded parameters instead: those of a forward that ``looks``,
    of parameters that are in no block yet, and of a forward for a backward.  A function that is written in
    Python, such as ``F.multi_head_attention_forward``, then gets copies once and runs on them.

    Args:
        looks: whether the forward notes every function that takes a parameter.  Otherwise it knows the first
            one in a block alone.

        opened: the blocks that are open already, where no other forward needs their scratch.

        tell_unseen: called with :attr:`seen` after a forward that has not taken every parameter.

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
        tell_unseen: Callable[[dict[int, None]], None],
    ) -> None:
        self._tell_unseen = tell_unseen
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
        # autocast would keep a cast of every copy, which is a second model
        self._casts_are_kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
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
                if not self._past and 0 < self._opened.whole == len(made):  # all, open from the beginning
                    self.seen = self.owners.ids
                else:
                    self._learn(made)
                if not self._past:  # there was scratch for all of them
                    left = [m for m in made if m.is_open and self.blocks.of.get(m.parts[0].ids[0]) is m.block]
        finally:
            torch.set_autocast_cache_enabled(self._casts_are_kept)
            self._opened.blocks = left
            if len(left) < len(made):
                self._drop([m for m in made if m not in left], kind is not None)
        if any(map(Made.are_copies_written, left)):
            refuse_write(self.op)
        if kind is None and len(self.seen) < len(self.owners.params):
            self._tell_unseen(self.seen)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``func``, where some of the arguments are guarded parameters."""
        special = SPECIAL.get(func)
        if special is METADATA:
            return plainly(func, args, kwargs)
        if isinstance(func, HigherOrderOperator):
            name = getattr(func, "__name__", func)
            raise HiddenParameters(
                f"{self.op}: closure: expected plain torch functions, got the higher-order operator "
                f"{name!r}, whose "
                f"inner functions can hold parameters; {USE_INPLACE}"
            )
        found: list[Tensor] = []
        find(args, self.owners.params, found)
        if kwargs:
            find(kwargs.values(), self.owners.params, found)
        mine = [p for p in found if id(p) in self.owners.params]
        if not mine:
            return self._call_others(func, args, kwargs, found)
        if special is SETS_DATA and args[0] is mine[0]:
            refuse_write(self.op, func)
        if any(id(p) not in self._copies for p in mine):  # guarded, so none of them is open
            self._make(mine)
        for p in mine:
            self.seen[id(p)] = None
        # without a reference to its memory, which stays to the end of the forward
        if special is GIVES_ADDRESS:
            for made in self._made.values():
                made.stays = True
        elif special is GIVES_DATA:
            func = Tensor.detach
        targets = [self._copies[id(p)] if isinstance(p, Guard) else p for p in mine]
        versions = [t._version for t in targets]
        if copies := {id(p): self._copies[id(p)] for p in mine if isinstance(p, Guard)}:
            if torch.is_grad_enabled():
                # A graph saves a leaf itself, so it gets one of its own: then it holds the memory, and is
                # noticed.
                with untouched():
                    copies = {i: alias(c, c.requires_grad) for i, c in copies.items()}
            args, kwargs = swap(args, copies), swap(kwargs, copies)
        if len(mine) < len(found):
            out = self._call_others(func, args, kwargs, [p for p in found if id(p) not in self.owners.params])
        else:
            out = func(*args, **kwargs)
        if versions != [t._version for t in targets]:
            refuse_write(self.op, func)
        return out

    def enter_compiled(self, params: dict[int, Tensor]) -> Callable[[], None]:
        """Called before a compiled function that may take ``params`` (by id); what is returned, after it.

        Meanwhile their blocks are open.
        """
        if freezes():
            raise HiddenParameters(
                f"{self.op}: closure: expected graphs that take the parameters, got "
                "torch._inductor.config.freezing, "
                f"which makes constants of them; {USE_INPLACE}"
            )
        if not self.opens:
            return lambda: None
        blocks = self._make(params.values(), for_graph=True)
        self.seen.update(dict.fromkeys(params))
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
                    f"{self.op}: closure: expected torch functions that take the parameters, got a "
                    "transform of torch.func by them; transform a function of other tensors"
                )
            self._make([param], for_graph=True)
            self.seen[id(param)] = None
        elif self._outer is not None:
            self._outer.uncover(param)

    def _call_others(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Tensor]
    ) -> Any:
        """``func`` for parameters of another step, in whose closure this one runs, or of none."""
        release(p for p in params if not is_held(p))
        if not any(isinstance(p, Guard) for p in params):
            return func(*args, **kwargs)
        return plainly(func, args, kwargs) if self._outer is None else self._outer.call(func, args, kwargs)

    # Copies -------------------------------------------------------------------------------------------------

    def _make(self, params: Collection[Tensor], for_graph: bool = False) -> list[Made]:
        """Brings the blocks of ``params`` into scratch, in the place of others.

        ``for_graph``: opens them all.
        """
        known, new = self.blocks.of, self._new
        if unknown := {id(p): p for p in params if id(p) not in known and id(p) not in new}:
            new.update(dict.fromkeys(unknown, Block(unknown.values())))
        wanted = dict.fromkeys(new.get(id(p)) or known[id(p)] for p in params)
        opens = self.opens and not self.looks and not torch.is_grad_enabled()
        with untouched():
            for block in wanted:
                if (made := self._made.get(block)) is None:
                    if block in self._past:
                        self.blocks.keep(block)
                    self._make_room(block, wanted)
                    self._fill(block, for_graph or (opens and block.opens and id(block.params[0]) not in new))
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
        # A noise with a perturb of its own may know no plans.
        theta = part.plan if type(noise).perturb is Noise.perturb else part.thetas
        noise.perturb(views.out, part.members, *self._terms[part.bucket], theta=theta)

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
            blocks = dict.fromkeys((*self._past, *[m.block for m in made]))
            parts = [part for block in blocks for part in self.owners.parts(block)]
            if sum([len(part.ids) for part in parts]) == len(self.owners.params):  # blocks share no parameter
                self.seen = self.owners.ids
            else:
                for part in parts:
                    self.seen.update(part.seen)
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
