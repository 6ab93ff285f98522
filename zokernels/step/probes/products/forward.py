"""One forward of members' rows: what it knows of the members, their noise and rows, and how a product is
perturbed.

Which functions it knows stands in ``handlers.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator

from ....backends import Backend, select
from ....backends.terms import Terms
from ....functional import Dist
from ....transfer import to_device
from ...cohort import Cohort, Look
from ...noise import Members, Noise
from ...types import Point, Seeds
from ..functions import METADATA, SETS_DATA, SPECIAL, HiddenParameters, find, refuse_write, swap
from ..guard import Guard, plainly, running
from ..made import Owners
from .kept import Factors, Learned


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


class Transposed(Varied):
    """A weight's transpose, for a product."""

    param: Tensor


class MemberTerms(NamedTuple):
    """One direction of each of P members: seeds int64 [P], coefficients fp32 [P].

    ``own``: the seeds of groups of as many neighbouring members, which have one seed, [G].  So the two sides
    of an antithetic pair share what is drawn.
    """

    seeds: Tensor
    coeffs: Tensor
    own: Tensor


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
                f"{name_of(func)!r}; use restore='exact', which makes perturbed copies"
            )
        self.seen.update(mine)
        with torch._C.DisableTorchFunctionSubclass():
            handler = HANDLERS.get(func) or HANDLERS.get(name_of(func))
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
        return self.noise_of(param).is_plain_matrix(param.flatten(1) if flat and param.dim() > 2 else param)

    def noise_of(self, param: Tensor) -> Noise:
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
        pair = self.noise_of(param).stacked(param, place[1], own, None if self.is_one else again)
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
        terms, noise = self.terms(index), self.noise_of(param)
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
        return (name_of(func), None if param is None else self.place(param), argument)

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
            flipped = [a for a in (*args, *kwargs.values()) if isinstance(a, Transposed)]
            params = [*params, *(a.param for a in flipped)]
            args, kwargs = swap((args, kwargs), {id(a): self.copies(a.param)[0].t() for a in flipped})
        elif any(isinstance(a, Varied) for a in (*args, *kwargs.values())):
            raise NotInOneForward(f"{name_of(func)} of a function of parameters")
        if wide := [p for p in params if not self.noise_of(p).is_dense(p)]:
            self.say_dense(func, wide[0])
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
            raise NotInOneForward(f"{name_of(func)} of {self.named(params[0])} alone")
        pieces = {name: known[name].split(found) for name, found in counts.items()}
        outputs = []
        for p in range(self.count):
            given = {n: pieces[n][p] if n in pieces else value for n, value in known.items()}
            given = swap(given, {i: c[p] for i, c in copies.items()})
            out = func(*[given[i] for i in range(len(args))], **{n: given[n] for n in kwargs})
            first = next(iter(counts))
            if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != len(pieces[first][p]):
                raise NotInOneForward(f"{name_of(func)}, whose result has no rows of members")
            outputs.append(out)
        return torch.cat(outputs)

    def say_dense(self, func: Any, param: Tensor) -> None:
        self.say(
            f"dense {name_of(func)}",
            f"{name_of(func)} takes {self.named(param)} in another way than a product or an index: it gets "
            "perturbed copies (the dense form)",
        )

    def named(self, param: Tensor) -> str:
        for bucket in self.owners.buckets:
            for p, name in zip(bucket.params, bucket.names, strict=True):
                if p is param:
                    return name
        return "a parameter"


def neighbours(directions: list[int]) -> int:
    """The largest size of groups of neighbours, all of one size, that have one direction each."""
    runs = [len(list(own)) for _, own in itertools.groupby(directions)]
    return math.gcd(*runs) if runs else 1


def name_of(func: Any) -> str:
    return str(getattr(func, "__name__", func))


#: Handlers get the forward, the function and its arguments, and give NotImplemented where the function gets
#: perturbed copies.
Handler = Callable[[Products, Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register
