"""The probe of perturbed products: the weights stay, no perturbed weight is made, and one forward may serve
many members.

With z = A B^T of low rank, x (W + c z)^T is x W^T + c (x B) A^T.  While forwards run, every parameter is
guarded (``guard.py``).  A product with one is computed as it is, by whichever library torch calls, and
:func:`zokernels.low_rank_linear_` adds what the perturbation of each row's member makes of it.  Factors are
drawn when a product needs them, for all members of a cohort, and are gone after it.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator

from ...backends import Backend, select
from ...backends.terms import Terms
from ...checks import fail
from ...functional import Dist, low_rank, low_rank_
from ...transfer import to_device
from ..cohort import Cohort, CohortReader, Look
from ..noise import Members, Noise
from ..types import Bucket, Point, Seeds
from .blocks import Blocks
from .functions import METADATA, SETS_DATA, SPECIAL, HiddenParameters, find, refuse_write, swap
from .guard import Guard, plainly, running
from .hidden import guarded, leave
from .made import Owners
from .probe import Probe

#: Bytes of factors that are kept for their next use: by a forward of several members those of parameters that
#: it uses more than once, as generation does for each token; of one point those of all, which the direction's
#: other side uses next.
KEPT_BYTES = 256 << 20


class NotInOneForward(Exception):
    """A function takes a parameter in a way that has no form for many members at once."""


class Varied(Tensor):
    """A function of parameters alone: a value for each member, :attr:`stacked` [P, ...].

    As a tensor it is the value at theta itself.
    """

    stacked: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        forward = running.get(get_ident())
        if not isinstance(forward, Products):
            raise RuntimeError("a value for each member was used outside of the forward that made it")
        return forward.call(func, args, kwargs or {})


class Learned:
    """What the first forward of a run finds out, kept for all others.

    ``size``: members of a cohort; None: nothing is known yet.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        #: By function and parameter, the arguments that have rows of members: numbers and names.
        self.with_rows: dict[Any, frozenset[Any]] = {}
        #: The parameters (bucket and stream) whose factors a forward has needed, and those of which one has
        #: needed them more than once.
        self.used: dict[tuple[int, int], Tensor] = {}
        self.again: set[tuple[int, int]] = set()
        #: The weights whose ``F.linear`` without a bias a forward has taken as a product, by id and by
        #: whether all rows had one point.
        self.linears: dict[tuple[int, bool], Tensor] = {}
        #: Memory of factors, by what it is for: the whole of it, and tensors in it by their shape.  Only the
        #: CPU's is used again: other devices have allocators that do so, while fresh memory of the system
        #: costs more than the numbers that are drawn into it.
        self.memory: dict[Any, tuple[Tensor, dict[tuple[int, ...], Tensor]]] = {}

    def empty(self, what: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An fp32 tensor without values; on the CPU in the memory that ``what`` has had before."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        whole, parts = self.memory.get(what, (None, {}))
        if (found := parts.get(shape)) is not None:
            return found
        numel = math.prod(shape)
        if whole is None or whole.numel() < numel:
            whole, parts = self.memory[what] = torch.empty(numel, dtype=torch.float32, device=device), {}
        found = parts[shape] = whole[:numel].view(shape)
        return found


class MemberTerms(NamedTuple):
    """One direction of each of P members: seeds int64 [P], coefficients fp32 [P].

    ``own``: the seeds of groups of as many neighbouring members, which have one seed, [G].  So the two sides
    of an antithetic pair share what is drawn.
    """

    seeds: Tensor
    coeffs: Tensor
    own: Tensor


class Factors:
    """Factors that are kept, of one forward and of those that follow along the same directions."""

    def __init__(self) -> None:
        self.directions: Any = None
        self.pairs: dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor]] = {}
        self.room = KEPT_BYTES

    def begin(self, directions: Any) -> None:
        if directions != self.directions:
            self.__init__()  # type: ignore[misc]
            self.directions = directions

    def keep(self, key: tuple[tuple[int, int], int], pair: tuple[Tensor, Tensor]) -> None:
        size = sum(t.nbytes for t in pair)
        if size <= self.room:
            self.room -= size
            self.pairs[key] = pair


class Products:
    """One forward, whose rows belong to the members of ``cohort``; None: all to one point.

    Args:
        points: for each member a point of each bucket.
        look: of the first forward, which decides what later ones rely on.
    """

    def __init__(
        self,
        op: str,
        owners: Owners,
        seeds: Seeds,
        points: Sequence[list[Point]],
        cohort: Cohort | None,
        learned: Learned,
        kept: Factors,
        say: Callable[[str, str], None],
        look: Look | None = None,
    ) -> None:
        kept.begin([[list(bucket) for bucket in point] for point in points])
        self._kept = kept
        self.op, self.owners, self.seeds, self.points = op, owners, seeds, points
        self.cohort, self.learned, self.say, self.look = cohort, learned, say, look
        self.count = len(points)
        #: Whether all rows have one point.  A first forward of one member is treated as one of several.
        self.is_one = self.count == 1 and look is None
        if look is not None:  # what is found out now decides anew
            learned.linears.clear()
        self.seen: dict[int, None] = {}
        self._terms: dict[int, list[MemberTerms]] = {}
        self._drawn: set[tuple[tuple[int, int], int]] = set()
        self._together: set[tuple[int, int]] = set()
        self._outer: Any = None
        self._backends: dict[torch.device, Backend] = {}

    def __enter__(self) -> Products:
        self._outer = running.get(get_ident())
        running[get_ident()] = self
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer is None:
            running.pop(get_ident(), None)
        else:
            running[get_ident()] = self._outer

    # What torch tells of functions -------------------------------------------------------------------------

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear and not kwargs and (out := self._linear_again(*args)) is not None:
            return out
        special = SPECIAL.get(func)
        if special is METADATA:
            return plainly(func, args, kwargs)
        params = self.owners.params
        found: list[Tensor] = []
        find(args, params, found)
        if kwargs:
            find(kwargs.values(), params, found)
        mine = {i: None for p in found if (i := id(p)) in params}
        if len(mine) < len(found) and any(isinstance(p, Guard) and id(p) not in params for p in found):
            raise HiddenParameters(
                f"{self.op}: closure: expected no other step inside one with restore='products', got one"
            )
        if isinstance(func, HigherOrderOperator) or special is not None:
            if special is SETS_DATA:
                refuse_write(self.op, func)
            raise HiddenParameters(
                f"{self.op}: closure: expected functions that take parameters as they are, got "
                f"{_name(func)!r}; use restore='exact', which makes perturbed copies"
            )
        self.seen.update(mine)
        with torch._C.DisableTorchFunctionSubclass():
            handler = _HANDLERS.get(func) or _HANDLERS.get(_name(func))
            if handler is not None and not torch.is_grad_enabled():
                out = handler(self, func, args, kwargs)
                if out is not NotImplemented:
                    return out
            return self._dense(func, args, kwargs, [self.owners.params[p] for p in mine])

    def _linear_again(self, x: Any, weight: Any, bias: Any = None) -> Tensor | None:
        """``F.linear`` where a forward of the run has had it with this weight: nothing is decided again.

        None: something is not as it was then.
        """
        at = id(weight)
        known = self.learned.linears.get((at, self.is_one))
        if known is None or known is not weight or at not in self.owners.params or bias is not None:
            return None
        if type(x) is not Tensor or x.dim() < 2 or self.look is not None or torch.is_grad_enabled():
            return None
        with torch._C.DisableTorchFunctionSubclass():
            if x.dtype is not weight.dtype or torch.is_autocast_enabled(x.device.type):
                return None
            if self.is_one:
                counts: list[int] | None = [x.shape[0]]
            else:
                counts = None if self.cohort is None else self.cohort.counts_of(x.shape[0])
            if counts is None:
                return None
            self.seen[at] = None
            return self.product(x, weight, None, counts, swapped=False, noisy=False)

    def uncover(self, param: Tensor) -> None:
        raise HiddenParameters(
            f"{self.op}: closure: expected torch functions that take the parameters, got a transform of "
            "torch.func by them; use restore='exact'"
        )

    def enter_compiled(self, params: dict[int, Tensor]) -> Callable[[], None]:
        return lambda: None

    # Members and their noise -------------------------------------------------------------------------------

    def place(self, param: Tensor) -> tuple[int, int]:
        """The number of a parameter's bucket, and its stream."""
        return self.owners.place(param)

    def terms(self, bucket: int) -> list[MemberTerms]:
        """The members' seeds and coefficients; several where a point has several directions."""
        if bucket not in self._terms:
            device = self.owners.buckets[bucket].device
            lists = [list(point[bucket].items()) for point in self.points]
            self._terms[bucket] = []
            for t in range(max(map(len, lists))):
                each = [terms[t] if t < len(terms) else (0, 0.0) for terms in lists]
                seeds = torch.cat([self.seeds[device][k : k + 1] for k, _ in each])
                if any(isinstance(c, Tensor) for _, c in each):
                    values = [c if isinstance(c, Tensor) else torch.tensor(c) for _, c in each]
                    coeffs = torch.cat([to_device(c.float().reshape(1), device) for c in values])
                else:
                    coeffs = to_device(torch.tensor([c for _, c in each], dtype=torch.float32), device)
                shared = neighbours([k for k, _ in each])
                self._terms[bucket].append(MemberTerms(seeds, coeffs, seeds[::shared].contiguous()))
        return self._terms[bucket]

    def _backend(self, device: torch.device) -> Backend:
        """That of this forward, which is looked for once."""
        if (found := self._backends.get(device)) is None:
            found = self._backends[device] = select(device)
        return found

    def has_factors(self, param: Any, *, flat: bool = False) -> bool:
        """Whether ``param`` is one of the step's, and its noise a product of factors of its own shape, or
        (``flat``) of that of the matrix whose rows are its first dimension.
        """
        if id(param) not in self.owners.params:
            return False
        return self._noise(param).is_plain_matrix(param.flatten(1) if flat and param.dim() > 2 else param)

    def _noise(self, param: Tensor) -> Noise:
        return self.owners.buckets[self.place(param)[0]].noise

    def factors(self, param: Tensor, term: int) -> tuple[Tensor, Tensor]:
        """The left [G, m, r] and right [G, n, r] factors of groups of members, or [1, ...] for all."""
        place = self.place(param)
        key = (place, term)
        if (kept := self._kept.pairs.get(key)) is not None:
            return kept
        if key in self._drawn:
            self.learned.again.add(place)
        self._drawn.add(key)
        own = self.terms(place[0])[term].own
        if self.is_one and self._draw_together(place, term, own):
            return self._kept.pairs[key]
        kept_here = self.is_one or place in self.learned.again
        # What is not kept is gone before the next is drawn, so all of it has one memory.
        what = place if kept_here else "next"
        again = lambda i, shape: self.learned.empty((what, i), shape, own.device)
        pair = self._noise(param).stacked(param, place[1], own, None if self.is_one else again)
        if kept_here:
            self._kept.keep(key, pair)
        self.learned.used[place] = param
        return pair

    def _draw_together(self, place: tuple[int, int], term: int, own: Tensor) -> bool:
        """Of one point: draws the factors of all parameters of a bucket that a forward of the run has needed
        and that have not been drawn, in one call, if they may all be kept.

        Returns whether those of ``place`` are among them.
        """
        at = place[0]
        if place not in self.learned.used or (at, term) in self._together:
            return False
        self._together.add((at, term))
        kept, owners = self._kept.pairs, self.owners
        params = {
            p: t
            for p, t in self.learned.used.items()
            if p[0] == at and (p, term) not in kept and id(t) in owners.params and owners.place(t) == p
        }
        noise = owners.buckets[at].noise
        if noise.factor_bytes(list(params.values())) * len(own) > self._kept.room:
            return False
        lefts, rights = noise.factors(list(params.values()), [stream for _, stream in params], own)
        for p, *pair in zip(params, lefts, rights, strict=True):
            self._kept.keep((p, term), (pair[0], pair[1]))
        return (place, term) in self._kept.pairs

    def dense_noise(self, param: Tensor, term: int) -> Tensor:
        """z of a parameter with dense noise, fp32 [G, *shape]."""
        bucket, stream = self.place(param)
        seeds = self.terms(bucket)[term].own
        zero = torch.full(param.shape, -0.0, dtype=torch.float32, device=param.device)
        out = torch.empty((len(seeds), *param.shape), dtype=torch.float32, device=param.device)
        one = torch.ones(len(seeds), dtype=torch.float32, device=param.device)
        self._spread(out, zero, seeds, one, stream, self.owners.buckets[bucket].dist)
        return out

    def _spread(self, out: Tensor, x: Tensor, seeds: Tensor, coeffs: Tensor, stream: int, dist: Dist) -> None:
        """:func:`zokernels.spread` by the backend itself, for arguments that are right."""
        if out.numel():
            terms = Terms(seeds, coeffs, [stream], [0], dist, None, None)
            self._backend(out.device).spread(out, x, terms)

    def copies(self, param: Tensor) -> Tensor:
        """The perturbed parameter of each member, as the dense form has it, [P, *shape]."""
        index, stream = self.place(param)
        bucket, theta = self.owners.buckets[index], param.detach().contiguous()
        terms, noise = self.terms(index), self._noise(param)
        out = torch.empty((self.count, *theta.shape), dtype=theta.dtype, device=theta.device)
        if len(terms) == 1 and noise.is_dense(param):
            self._spread(out, theta, terms[0].seeds, terms[0].coeffs, stream, bucket.dist)
            return out
        one = Members([theta], [stream], bucket.dist)
        for p in range(self.count):
            seeds = torch.stack([t.seeds[p] for t in terms]) if terms else self.seeds[bucket.device][:0]
            coeffs = torch.stack([t.coeffs[p] for t in terms]) if terms else seeds.float()
            noise.perturb([out[p]], one, seeds, coeffs, theta=[theta])
        return out

    def same_bucket(self, param: Tensor, other: Tensor) -> bool:
        return self.place(param)[0] == self.place(other)[0]

    # Rows --------------------------------------------------------------------------------------------------

    def rows(self, x: Any, key: Any) -> list[int] | None:
        """The rows of each member along the first dimension of ``x``; None: these are no rows of members.

        ``key``: of the function's argument.  The first forward knows the answer from what ``x`` was computed
        of, later ones from the first.
        """
        if not isinstance(x, Tensor) or x.dim() == 0:
            return None
        if self.is_one:
            return [x.shape[0]]
        assert self.cohort is not None
        if self.look is not None:
            have = self.look.has_marked(x)
            known = self.learned.with_rows.get(key, frozenset())
            self.learned.with_rows[key] = known | {have}
            if have and self.look.has_mixed(x):
                raise NotInOneForward("rows in an order that the data decides (experts)")
            if have:
                total = self.count if self.cohort.counts is None else sum(self.cohort.counts)
                from fractions import Fraction  # which no other part of the package needs

                self.look.sizes.setdefault(key, []).append(Fraction(x.shape[0], max(1, total)))
        else:
            answers = self.learned.with_rows.get(key)
            if answers is None or len(answers) > 1:
                raise HiddenParameters(
                    f"{self.op}: closure: expected the functions of the run's first forward, got another one "
                    f"that takes a parameter: {key}"
                )
            (have,) = answers
        counts = self.cohort.counts_of(x.shape[0]) if have else None
        if have and counts is None:
            raise NotInOneForward("rows in another dimension than the first")
        return counts

    def key(self, func: Any, param: Tensor | None, argument: Any) -> Any:
        return (_name(func), None if param is None else self.place(param), argument)

    def by_rows(
        self, function: Callable[..., Tensor], x: Tensor, stacked: Tensor, counts: list[int]
    ) -> Tensor:
        """``function(x, w)`` with w the own ``stacked`` [P, ...] of each row's member, broadcast as it would
        be for one.
        """
        each, missing = stacked.shape[1:], x.dim() - stacked.dim() + 1
        if missing < 0 or (missing == 0 and each[:1] != (1,)):
            raise NotInOneForward("a parameter with as many dimensions as its rows")
        if missing == 0:
            each = each[1:]
        shape = (self.count, *[1] * (x.dim() - 1 - len(each)), *each)
        values = stacked.reshape(shape)
        if len(set(counts)) == 1:
            return function(x.unflatten(0, (self.count, counts[0])), values.unsqueeze(1)).flatten(0, 1)
        member = torch.repeat_interleave(torch.tensor(counts)).to(x.device)
        return function(x, values.index_select(0, member))

    # Functions ---------------------------------------------------------------------------------------------

    def product(
        self, x: Tensor, param: Tensor, bias: Tensor | None, counts: list[int], *, swapped: bool, noisy: bool
    ) -> Tensor:
        """x (W + c z)^T + bias of each row's member, [..., m]; ``swapped``: x (W + c z).

        What the perturbations add comes first, and the library's product on top of it.  Libraries sum both in
        fp32, so that half precision is rounded once: there is no second rounding of a product, nor one of a
        perturbed weight.

        ``noisy``: the bias has dense noise of its own.
        """
        device, weight = x.device, param.detach()
        if weight.dim() > 2:
            weight = weight.flatten(1)  # a convolution's
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        columns = weight if swapped else weight.t()
        n, m = columns.shape
        flat = x.reshape(-1, n).contiguous()
        shape = (total := flat.shape[0], m)
        terms = self.terms(self.place(param)[0])
        if bias is not None:
            out = bias.detach().to(x.dtype).expand(shape).contiguous()
        elif terms:
            out = torch.empty(shape, dtype=x.dtype, device=device)
        else:
            out = torch.zeros(shape, dtype=x.dtype, device=device)
        each = total // max(1, x.shape[0])
        rows = counts if each == 1 else [each * n for n in counts]
        for t, (_, coeffs, _) in enumerate(terms):
            left, right = self.factors(param, t)
            if swapped:
                left, right = right, left
            noise = self.dense_noise(bias, t) if noisy and bias is not None else None
            add = bias is not None or t > 0
            if total and m:  # the backend itself: the arguments are right, and torch's dispatcher takes long
                self._backend(device).low_rank_linear(out, flat, left, right, coeffs, rows, noise, add)
        return out.addmm_(flat, columns).view(*x.shape[:-1], m)

    def _dense(self, func: Any, args: Any, kwargs: Any, params: list[Tensor]) -> Any:
        """``func`` with perturbed copies: of one point, or for each member on its own rows."""
        if self.is_one:  # then only a transpose waits for its product
            flipped = [a for a in (*args, *kwargs.values()) if isinstance(a, _Transposed)]
            params = [*params, *(a.param for a in flipped)]
            args, kwargs = swap((args, kwargs), {id(a): self.copies(a.param)[0].t() for a in flipped})
        elif any(isinstance(a, Varied) for a in (*args, *kwargs.values())):
            raise NotInOneForward(f"{_name(func)} of a function of parameters")
        if wide := [p for p in params if not self._noise(p).is_dense(p)]:
            self.say(
                f"dense {_name(func)}",
                f"{_name(func)} takes {self._named(wide[0])} in another way than a product or an index: it "
                "gets perturbed copies (the dense form)",
            )
        copies = {id(p): self.copies(p) for p in params}
        if self.is_one:
            one = {i: c[0].requires_grad_(self.owners.params[i].requires_grad) for i, c in copies.items()}
            return func(*swap(args, one), **swap(kwargs, one))
        known = dict(enumerate(args)) | kwargs
        counts = {
            name: found
            for name, value in known.items()
            if isinstance(value, Tensor) and id(value) not in copies
            and (found := self.rows(value, self.key(func, params[0], name))) is not None
        }  # fmt: skip
        if not counts:
            raise NotInOneForward(f"{_name(func)} of {self._named(params[0])} alone")
        pieces = {name: known[name].split(found) for name, found in counts.items()}
        outputs = []
        for p in range(self.count):
            given = {n: pieces[n][p] if n in pieces else value for n, value in known.items()}
            given = swap(given, {i: c[p] for i, c in copies.items()})
            out = func(*[given[i] for i in range(len(args))], **{n: given[n] for n in kwargs})
            first = next(iter(counts))
            if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != len(pieces[first][p]):
                raise NotInOneForward(f"{_name(func)}, whose result has no rows of members")
            outputs.append(out)
        return torch.cat(outputs)

    def _named(self, param: Tensor) -> str:
        for bucket in self.owners.buckets:
            for p, name in zip(bucket.params, bucket.names, strict=True):
                if p is param:
                    return name
        return "a parameter"


def neighbours(directions: list[int]) -> int:
    """The largest size of groups of neighbours, all of one size, that have one direction each."""
    runs = [len(list(own)) for _, own in itertools.groupby(directions)]
    return math.gcd(*runs) if runs else 1


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


# Each handler gets the forward, the function and its arguments, and gives NotImplemented where the function
# gets perturbed copies.
Handler = Callable[[Products, Any, tuple[Any, ...], dict[str, Any]], Any]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_handles(Tensor.__getitem__)
def _entry(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One entry of the first dimension, as a forward takes experts that lie in one tensor: a perturbed copy
    of that entry, and of no other.

    The factors are those of the [E, m n] matrix of all entries.  So what an entry gets is a row of that,
    which is no [m, n] matrix of low rank: it has no form as a product of factors.
    """
    param, at = args
    if isinstance(at, Tensor) and at.dim() == 0 and at.dtype in (torch.int32, torch.int64):
        at = int(at)
    if not forward.is_one or type(at) is not int or not forward.has_factors(param, flat=True):
        return NotImplemented
    if not -param.shape[0] <= at < param.shape[0] or param.numel() == 0:
        return NotImplemented  # torch says what is wrong
    forward.say(
        "entry",
        f"entries of {forward._named(param)} are taken by their numbers: each gets a perturbed copy (the "
        "dense form)",
    )
    bucket, stream = forward.place(param)
    at %= param.shape[0]
    theta = param.detach()[at].reshape(1, -1)
    if not (terms := forward.terms(bucket)):
        return theta.view(param.shape[1:])
    lefts, rights = zip(*(forward.factors(param, t) for t in range(len(terms))), strict=True)
    left = torch.cat([each[:, at : at + 1] for each in lefts])
    right = rights[0] if len(rights) == 1 else torch.cat(rights)
    out = torch.empty_like(theta)
    low_rank([out], [theta], [left], [right], torch.cat([t.coeffs for t in terms]), streams=[stream])
    return out.view(param.shape[1:])


_CONVOLUTIONS = frozenset((F.conv1d, F.conv2d, F.conv3d))


def _product(forward: Products, func: Any, x: Any, weight: Any, bias: Any, swapped: bool) -> Any:
    """A product of ``x`` with ``weight``, W^T or (``swapped``) W, and a bias."""
    if isinstance(x, (Guard, Varied)) or isinstance(bias, Varied):
        return NotImplemented
    if not forward.has_factors(weight, flat=func in _CONVOLUTIONS):
        return NotImplemented
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        return NotImplemented
    if x.dtype is not weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return NotImplemented  # torch says what is wrong
    counts = forward.rows(x, forward.key(func, weight, 0))
    if counts is None:
        return NotImplemented
    own = id(bias) in forward.owners.params
    apart = own and (not forward.same_bucket(bias, weight) or not forward._noise(bias).is_dense(bias))
    plain = None if apart else bias
    y = forward.product(x, weight, plain, counts, swapped=swapped, noisy=own)
    if not apart:
        return y
    copies = forward.copies(bias)
    return y + copies[0] if forward.is_one else forward.by_rows(torch.add, y, copies, counts)


@_handles(F.linear)
def _linear(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        args = tuple(inspect.getcallargs(_linear_arguments, *args, **kwargs).values())
    x, weight, bias = args if len(args) > 2 else (*args, None)
    out = _product(forward, func, x, weight, bias, False)
    if bias is None and forward.look is None and out is not NotImplemented:
        forward.learned.linears[id(weight), forward.is_one] = weight
    return out


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> None: ...


@_handles(torch.addmm, Tensor.addmm)
def _addmm(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3:  # scaled by alpha or beta
        return NotImplemented
    bias, x, weight = args
    if bias.dim() != 1:
        return NotImplemented
    return _product(forward, func, x, weight, bias, True)


@_handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    x, weight = args
    if isinstance(weight, _Transposed):
        return _product(forward, func, x, weight.param, None, False)
    return _product(forward, func, x, weight, None, True)


class _Transposed(Varied):
    """A weight's transpose, for a product."""

    param: Tensor


@_handles(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (weight,) = args
    if not forward.has_factors(weight):
        return NotImplemented
    out = weight.detach().t().as_subclass(_Transposed)
    out.param = weight
    return out


@_handles(*_CONVOLUTIONS)
def _convolution(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution whose windows lie side by side, as those of patches and of 1 x 1: a product of each."""
    given = inspect.getcallargs(_convolution_arguments, *args, **kwargs)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not forward.has_factors(weight, flat=True) or isinstance(x, (Guard, Varied)):
        return NotImplemented
    size = weight.shape[2:]
    each = lambda value: (value,) * len(size) if isinstance(value, int) else tuple(value)
    padding = given["padding"]
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(each(padding)))
    side_by_side = each(given["stride"]) == tuple(size) and given["groups"] == 1 and unpadded
    if not side_by_side or x.dim() != 2 + len(size) or any(d != 1 for d in each(given["dilation"])):
        return NotImplemented
    if x.shape[1] != weight.shape[1] or x.dtype is not weight.dtype:
        return NotImplemented  # torch says what is wrong, or casts
    places = [n // k for n, k in zip(x.shape[2:], size, strict=True)]
    if 0 in places:
        return NotImplemented
    for i, (n, k) in enumerate(zip(places, size, strict=True)):
        x = x.narrow(2 + i, 0, n * k)
    windows = x.reshape(*x.shape[:2], *(s for pair in zip(places, size, strict=True) for s in pair))
    count = len(size)
    order = (0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2))
    rows = windows.permute(order).reshape(x.shape[0], *places, -1)
    out = _product(forward, func, rows, weight, bias, False)
    return out if out is NotImplemented else out.movedim(-1, 1).contiguous()


def _convolution_arguments(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> None: ...


@_handles(F.embedding)
def _embedding(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = inspect.getcallargs(_embedding_arguments, *args, **kwargs)
    index, weight = given["input"], given["weight"]
    if (
        given["max_norm"] is not None
        or given["sparse"]
        or not forward.has_factors(weight)
        or index.dim() == 0
    ):
        return NotImplemented
    counts = forward.rows(index, forward.key(func, weight, 0))
    if counts is None and index.shape[0] == 1 and forward.cohort is not None and forward.cohort.counts:
        counts = forward.cohort.counts  # positions, which are the same for all rows
        index = index.expand(sum(counts), *index.shape[1:])
    if counts is None:
        return NotImplemented
    y = F.embedding(index, weight.detach(), given["padding_idx"]).contiguous()
    each = index.numel() // max(1, index.shape[0])
    sizes = [each * n for n in counts]
    flat = index.reshape(-1)
    for t, (_, coeffs, _) in enumerate(forward.terms(forward.place(weight)[0])):
        left, right = forward.factors(weight, t)
        if len(left) > 1:
            members = torch.arange(len(sizes), device=flat.device)
            begins = members * len(left) // len(sizes) * left.shape[1]
            flat_left = flat + begins.repeat_interleave(torch.tensor(sizes, device=flat.device))
        else:
            flat_left = flat
        rows = left.view(-1, left.shape[-1]).index_select(0, flat_left).split(sizes)
        pieces = y.view(-1, y.shape[-1]).split(sizes)
        picked = [p for p, n in enumerate(sizes) if n]
        low_rank_(
            [pieces[p] for p in picked],
            [rows[p][None] for p in picked],
            [right[p * len(right) // len(sizes)][None] for p in picked],
            coeffs[picked].view(-1, 1) if len(picked) < len(sizes) else coeffs.view(-1, 1),
            streams=[0] * len(picked),
        )
    return y


def _embedding_arguments(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> None: ...


@_handles(F.layer_norm, F.rms_norm)
def _norm(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if forward.is_one:
        return NotImplemented
    layer = func is F.layer_norm
    given = inspect.getcallargs(_layer_norm_arguments if layer else _rms_norm_arguments, *args, **kwargs)
    x, shape, eps, scale, shift = (
        given[key] for key in ("input", "normalized_shape", "eps", "weight", "bias")
    )
    if len(shape) != 1 or any(isinstance(w, Varied) for w in (scale, shift)):
        return NotImplemented
    param = scale if id(scale) in forward.owners.params else shift
    counts = forward.rows(x, forward.key(func, param, 0))
    if counts is None:
        return NotImplemented
    # As the library does it, in fp32 up to the end.
    wide = x.float()
    if layer:
        y = F.layer_norm(wide, shape, None, None, eps)
    else:
        y = F.rms_norm(wide, shape, None, torch.finfo(x.dtype).eps if eps is None else eps)
    for function, value in ((torch.mul, scale), (torch.add, shift)):
        if value is None:
            continue
        if id(value) in forward.owners.params:
            y = forward.by_rows(function, y, forward.copies(value).float(), counts)
        else:
            y = function(y, value.float())
    return y if torch.is_autocast_enabled(x.device.type) and layer else y.to(x.dtype)


def _layer_norm_arguments(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> None: ...


def _rms_norm_arguments(
    input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None, bias: Any = None
) -> None: ...


_BINARY = "add sub mul div rsub true_divide multiply subtract maximum minimum"
_DUNDERS = "add sub mul truediv radd rsub rmul rtruediv"
_UNARY = """
    float half bfloat16 to type_as clone contiguous neg exp log abs sqrt rsqrt square sigmoid tanh relu silu
    softplus pow
"""


@_handles(*_BINARY.split(), *(f"__{name}__" for name in _DUNDERS.split()))
def _elementwise(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions of two values, element by element: a parameter's own value goes with each member's rows."""
    if forward.is_one or kwargs or len(args) != 2:
        return NotImplemented
    own = [forward.owners.params.get(id(a), a if isinstance(a, Varied) else None) for a in args]
    if any(isinstance(a, _Transposed) for a in args):
        return NotImplemented
    stacked = [
        _stacked(forward, func, a) if mine is not None else None for a, mine in zip(args, own, strict=True)
    ]
    plain = [a for a, mine in zip(args, own, strict=True) if mine is None]
    if not plain or not isinstance(plain[0], Tensor) or plain[0].dim() == 0:
        given = [a if s is None else s for a, s in zip(args, stacked, strict=True)]
        if not plain and args[0].shape != args[1].shape:
            return NotImplemented
        return _varied(func(*map(_plain, args)), func(*given))
    (x,), place = plain, 0 if own[0] is None else 1
    (mine,) = (o for o in own if o is not None)
    key = forward.key(func, mine if id(mine) in forward.owners.params else None, place)
    if (counts := forward.rows(x, key)) is None:
        return NotImplemented
    (values,) = (s for s in stacked if s is not None)
    return forward.by_rows(
        (lambda x, w: func(x, w)) if place == 0 else (lambda x, w: func(w, x)), x, values, counts
    )


@_handles(*_UNARY.split(), "__neg__", "__pow__")
def _unary(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions of one value, element by element, the rest of whose arguments are no tensors but types."""
    first, *rest = args
    if forward.is_one or isinstance(first, _Transposed):
        return NotImplemented
    if not isinstance(first, (Guard, Varied)) or any(isinstance(a, (Guard, Varied)) for a in rest):
        return NotImplemented
    return _varied(
        func(_plain(first), *rest, **kwargs), func(_stacked(forward, func, first), *rest, **kwargs)
    )


@_handles(Tensor.expand)
def _expand(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter [1, ...] as the same rows for every member's batch, as vision models take their tokens."""
    param, *sizes = args
    sizes = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if forward.is_one or id(param) not in forward.owners.params or kwargs or param.shape[0] != 1:
        return NotImplemented
    if forward.cohort is None or forward.cohort.counts is None or len(sizes) != param.dim():
        return NotImplemented
    counts = forward.cohort.counts_of(sizes[0])
    if counts is None:
        return NotImplemented
    forward.say(
        f"dense {_name(func)}", f"{forward._named(param)} is taken row by row: it gets perturbed copies"
    )
    member = torch.repeat_interleave(torch.tensor(counts)).to(param.device)
    out = forward.copies(param)[:, 0].index_select(0, member)
    out = out.expand(sizes[0], *sizes[1:])
    if forward.look is not None:
        forward.look.mark(out)
    return out


def _plain(value: Any) -> Any:
    own = isinstance(value, (Guard, Varied))
    return Tensor.detach(value).as_subclass(Tensor) if own else value


def _stacked(forward: Products, func: Any, value: Any) -> Tensor:
    if isinstance(value, Varied):
        return value.stacked
    if not forward._noise(value).is_dense(value):
        forward.say(
            f"dense {_name(func)}",
            f"{_name(func)} takes {forward._named(value)} in another way than a product or an index: it gets "
            "perturbed copies (the dense form)",
        )
    return forward.copies(value)


def _varied(value: Tensor, stacked: Tensor) -> Tensor:
    if stacked.shape[1:] != value.shape:
        raise NotInOneForward("a function that mixes members")
    out = value.as_subclass(Varied)
    out.stacked = stacked
    return out


class ProductProbe(Probe):
    """Products are perturbed, and weights are not.

    Args:
        reader: of a batched step, whose closure has the rows of many members in one forward.
    """

    def __init__(
        self,
        op: str,
        buckets: list[Bucket],
        seeds: Seeds,
        blocks: Blocks,
        warned: set[str],
        learned: Learned,
        reader: CohortReader | None = None,
    ) -> None:
        super().__init__(buckets, seeds)
        for bucket in buckets:
            if bucket.is_sharded:
                fail(op, "restore", "'exact' or 'inplace' for sharded parameters", "'products'")
            if not bucket.noise.has_factors:
                expected = "a direction of low rank with 'products' (FreshFactors, KeptRight, ...)"
                fail(op, "restore", expected, type(bucket.noise).__name__)
        self.op, self.blocks, self.warned, self.learned, self.reader = op, blocks, warned, learned, reader
        self._owners = blocks.owners = Owners.renewed(blocks.owners, buckets)
        self._kept = Factors()

    def forwards(
        self, points: Iterable[Any], share: range, same_rng: Iterator[AbstractContextManager[None]], run: Any
    ) -> list[Any]:
        with self._watching():
            if self.reader is None:
                return super().forwards(points, share, same_rng, run)
            mine = [(i, point) for i, point in enumerate(points) if i in share]
            size, results = self.learned.size or len(mine), []
            for begin in range(0, len(mine), size):
                numbers, own = zip(*mine[begin : begin + size], strict=True)
                try:
                    with next(same_rng), self._at(own, Cohort(numbers)):
                        results.append(run())
                except NotInOneForward as error:
                    raise HiddenParameters(
                        f"{self.op}: closure: expected the functions of the run's first forward, got another "
                        f"one: {error}; use cohort=1"
                    ) from error
            return results

    def look(
        self, points: Sequence[Any], same_rng: Iterator[AbstractContextManager[None]]
    ) -> tuple[str | None, int, int]:
        """The first forwards of a run: one of one member and one of two, of whose losses nothing comes.

        What later forwards rely on is that rows of members are where they are in both: along the first
        dimension, which has twice the size in the second.  Returns why a forward cannot have several members,
        None where it can, and the bytes that the two took.
        """
        assert self.reader is not None
        looks = []
        try:
            with self._watching():
                for count in range(1, min(2, len(points)) + 1):
                    looks.append(look := Look())
                    cohort = Cohort(range(count), look)
                    with next(same_rng), self._at(points[:count], cohort, look), look:
                        self.reader.run()
        except NotInOneForward as error:
            return str(error), 0, 0
        for key, sizes in looks[0].sizes.items():
            others = looks[-1].sizes.get(key, sizes)
            if any(one != two for one, two in zip(sizes, others, strict=False)):
                return f"{key[0]} takes rows in another dimension than the first", 0, 0
        return None, looks[0].peak, looks[-1].peak

    @contextmanager
    def at(self, points: list[Point]) -> Iterator[None]:
        with self._at([points], None):
            yield

    @contextmanager
    def _at(
        self, points: Sequence[list[Point]], cohort: Cohort | None, look: Look | None = None
    ) -> Iterator[None]:
        if self.reader is not None:
            self.reader.cohort = cohort
        with Products(
            self.op, self._owners, self.seeds, points, cohort, self.learned, self._kept, self._say, look
        ) as forward:
            yield
        if not forward.seen:
            raise HiddenParameters(
                f"{self.op}: closure: expected torch functions that take the parameters, got none (another "
                "model, or a graph that holds them: TorchScript, CUDA graph, C++ extension)"
            )

    @contextmanager
    def _watching(self) -> Iterator[None]:
        params, compiled = self._owners.params, self.blocks.compiled
        compiled.renew(params)
        with ExitStack() as stack:
            if compiled.regions:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                self._say("compiled", "products run torch.compile'd functions uncompiled")
            stack.enter_context(guarded(self.op, params))
            yield

    def mend(self) -> None:
        leave(self._owners.params)

    def _say(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"{self.op}: {message}", stacklevel=2)
