"""Cohorts: the members of a population whose rows one forward has, and how their losses are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..checks import fail
from .loss import LossReader, as_loss, call

if TYPE_CHECKING:
    from fractions import Fraction


class Look(TorchDispatchMode):
    """Around the first forward of a run: notes which tensors have rows of members, and how much memory there
    is.

    Rows of members are what :meth:`Cohort.repeat` and :meth:`Cohort.rows` give, and all that is computed of
    such.  They are known by their memory, which views share: an operation's result in new memory is one of
    them, or is not, by its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marked: set[int] = set()
        #: The most bytes that results of torch's operations took at a time.
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._mixed: set[int] = set()
        self.members = 1  #: whose rows the forward has
        #: By function and argument, the sizes of first dimensions, in units of all rows.
        self.sizes: dict[Any, list[Fraction]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {_memory(t) for t in given} - {0}
        marked = not known.isdisjoint(self._marked)
        mixed = not known.isdisjoint(self._mixed) or (marked and self._mixes(func, args))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                if _memory(t) not in known:
                    self._count(t)
                    (self._mixed.add if mixed else self._mixed.discard)(_memory(t))
                if marked:
                    self._marked.add(_memory(t))
                elif _memory(t) not in known:  # where the memory of a tensor was that is gone
                    self._marked.discard(_memory(t))
        return out

    def _mixes(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a function of rows of members gives rows whose order or number the data decides.

        So experts pick their tokens.
        """
        if func in _PICKING:
            return True
        if func is torch.ops.aten.index.Tensor:
            index = args[1][0]
        elif func is torch.ops.aten.index_select.default and args[1] == 0:
            index = args[2]
        else:
            return False
        if index is None or index.dim() == 0 or not self.has_marked(args[0]):
            return False
        each, count = args[0].shape[0] // self.members, index.shape[0] // self.members
        if index.dtype in (torch.bool, torch.uint8) or index.shape[0] % self.members or each == 0:
            return True
        own = torch.arange(self.members, device=index.device).repeat_interleave(count)
        return not bool((index.reshape(len(own), -1) // each == own[:, None]).all())

    def has_mixed(self, tensor: Tensor) -> bool:
        """Whether the rows of ``tensor`` may lie in another order than the members'."""
        return _memory(tensor) in self._mixed

    def _count(self, tensor: Tensor) -> None:
        """Adds the memory of a new tensor; what is gone meanwhile counts no more."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self._held[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))

    def mark(self, tensor: Tensor) -> None:
        self._marked.add(_memory(tensor))

    def has_marked(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._marked


#: Functions whose results have as many rows as the data decides, members' or not.
_PICKING = frozenset(
    (
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten._unique2.default,
        torch.ops.aten.unique_dim.default,
    )
)


def members_within(limit: int, one: int, two: int, members: int, step: int) -> int:
    """How many of ``members`` fit into ``limit`` bytes, where one takes ``one`` bytes and two take ``two``; 1
    where not even one does.

    What each further member takes is taken to be the same.  The members are then shared out evenly, in
    multiples of ``step`` if it is not 1 of them alone.
    """
    each = max(1, two - one)
    fit = max(1, min(members, 1 + (limit - one) // each))
    forwards = -(-members // fit)
    even = -(-members // forwards)
    if even > 1 and even % step:
        even = even // step * step if even > step else 1
    return even


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Cohort:
    """The members of a population whose rows one forward has: what the closure of a batched step gets.

    Rows lie along the first dimension, one member behind the other, and all members of a cohort have as many
    of them, unless :meth:`rows` says otherwise.  ``len(cohort)`` is the number of members.
    """

    def __init__(self, members: Sequence[int], look: Look | None = None) -> None:
        #: The numbers of the members in their population, from 0 on.
        self.members = members
        if look is not None:
            look.members = len(members)
        #: The number of rows of each member; None until :meth:`repeat` or :meth:`rows` was called.
        self.counts: list[int] | None = None
        self._look = look

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Cohort(members={list(self.members)})"

    def repeat(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [b, ...] once for every member, [P b, ...]: a batch that all members share."""
        self._declare([x.shape[0]] * len(self))
        return self._marked(x.repeat(len(self), *[1] * (x.dim() - 1)))

    def rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``x`` [sum of counts, ...], of whose rows counts[p] are member p's own, one member behind the
        other.
        """
        counts = list(counts)
        if len(counts) != len(self) or sum(counts) != x.shape[0]:
            expected = f"{len(self)} numbers of rows with the sum {x.shape[0]}"
            fail("Cohort", "counts", expected, counts)
        self._declare(counts)
        return self._marked(x)

    def split(self, values: Tensor) -> list[Tensor]:
        """``values`` [R, ...], taken apart into each member's: R is the sum of rows, or a multiple of it."""
        counts = self.counts_of(values.shape[0])
        if counts is None:
            fail("Cohort", "values", "a multiple of the members' rows", values.shape[0])
        return list(values.split(counts))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each member's ``values`` [R, ...], fp32 or wider, [P]: its loss."""
        wide = values if values.dtype is torch.float64 else values.float()
        return torch.stack([own.mean() for own in self.split(wide)])

    def counts_of(self, size: int) -> list[int] | None:
        """The rows of each member in a first dimension of ``size``; None: it is no multiple of theirs."""
        if self.counts is None:
            return None if size % len(self) else [size // len(self)] * len(self)
        total = sum(self.counts)
        return None if total == 0 or size % total else [size // total * count for count in self.counts]

    def _declare(self, counts: list[int]) -> None:
        if self.counts not in (None, counts):
            fail("Cohort", "rows", f"the same rows in each call, {self.counts}", counts)
        self.counts = counts

    def _marked(self, x: Tensor) -> Tensor:
        if self._look is not None:
            x = x.clone()  # the caller's own memory may be read elsewhere, too
            self._look.mark(x)
        return x


class CohortReader(LossReader):
    """Each result is the losses of a cohort, [P]: a tensor, or a sequence of numbers."""

    def __init__(self, op: str, closure: Callable[[Cohort], Any]) -> None:
        self._op, self._closure = op, closure
        self.cohort: Cohort | None = None  #: that of the running forward

    def run(self) -> Any:
        expected = "a function of the step's Cohort with batched=True"
        return call(self._op, self._closure, (self.cohort,), expected)

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Tensor:
        assert self.cohort is not None
        count = len(self.cohort)
        is_tensor = isinstance(result, Tensor)
        if is_tensor and tuple(result.shape) != (count,):
            fail(op, "closure", f"a loss of each member, shape {(count,)}", f"shape {tuple(result.shape)}")
        if not is_tensor and (not isinstance(result, Sequence) or len(result) != count):
            fail(op, "closure", f"{count} losses, one of each member", repr(result)[:200], TypeError)
        values = result.unbind() if is_tensor else result
        return torch.stack([as_loss(op, value, device) for value in values])

    def losses(self, results: list[Any]) -> Tensor:
        return torch.cat([loss.to(results[0].device) for loss in results])
