"""Directions of low rank for matrices: z = L R^T.

The factors are drawn when they are needed, and the product is never stored.  A tensor of more dimensions is
taken as the [m, n] matrix of its first dimension and the rest; vectors get dense noise.  Every element of z
has variance 1, so eps and lr mean what they mean for dense noise, unless ``scaled`` is False.

A rule with state (momentum, Adam, sign) takes sum_k g_k z_k of one matrix after the other, made dense in
fp32.

The drawn factors are scratch of (m + n) r numbers for the parameters of one call.  What is kept between steps
is drawn again from its seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends import select
from ...backends.terms import Terms
from ...checks import check_integer, fail
from ...functional import Rule as KernelRule
from ...functional import combine_, low_rank, low_rank_, update_
from ..noise import DENSE, Empty, Members, Noise, Tensors
from ..roles import OptimizerView
from ..scalars import scalars
from ..shard import is_sharded, local_of, locals_of, shard_of
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh, derived_seed

#: k of the seed of factors that are kept: far above any direction's.
_FACTOR_K = 0x80000001

#: (m, n) of each matrix.
Shapes = list[tuple[int, int]]


def draw(shapes: Shapes, seed: Tensor, streams: list[int], offsets: list[int], c: float) -> list[Tensor]:
    """c z [rows, columns] in fp32, of each stream from its offset on.

    It is one combine over -0.0, which is the neutral element of addition.
    """
    out = [torch.full(shape, -0.0, dtype=torch.float32, device=seed.device) for shape in shapes]
    combine_(out, seed, c, streams=streams, offsets=offsets)
    return out


@functools.lru_cache(maxsize=64)
def _constant(value: float, count: int, device: torch.device) -> Tensor:
    """``count`` times ``value``, fp32; it is only read."""
    return torch.full((count,), value, dtype=torch.float32, device=device)


def _draw_each(
    shape: tuple[int, int],
    seeds: Tensor,
    stream: int,
    offset: int,
    c: float,
    which: int = 0,
    empty: Empty | None = None,
) -> Tensor:
    """:func:`draw` for each of ``seeds``, [K, rows, columns], in one call.

    ``empty``, ``which``: what gives memory for it (:meth:`Noise.stacked`), and what it is told.
    """
    rows, columns = shape
    count, device = seeds.shape[0], seeds.device
    whole = (count, rows * columns)
    out = torch.empty(whole, dtype=torch.float32, device=device) if empty is None else empty(which, whole)
    # The backend itself: the arguments are right, and torch's dispatcher takes longer than a small factor.
    if out.numel():
        terms = Terms(seeds, _constant(c, count, device), [stream], [offset], "normal", None, None)
        select(device).spread(out, _zeros(rows * columns, device), terms)
    return out.view(count, rows, columns)


@functools.lru_cache(maxsize=256)
def _zeros(count: int, device: torch.device) -> Tensor:
    """``count`` times -0.0, fp32: a part of one of few constants; it is only read."""
    return _constant(-0.0, _round_up(count), device)[:count]


def _round_up(count: int) -> int:
    """The next power of two: so few constants are kept."""
    return 1 << (count - 1).bit_length() if count else 0


def near_square(count: int) -> tuple[int, int]:
    """(m, n), m <= n, with m n = ``count`` and n - m as small as it can be."""
    m = next(m for m in range(math.isqrt(count), 0, -1) if count % m == 0)
    return m, count // m


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns with the span of those of ``x``: a QR factorisation in float64, rounded to fp32."""
    q: Tensor = torch.linalg.qr(x.double()).Q
    return q.float().contiguous()


def _parts(
    name: str, params: Sequence[Tensor], left: list[Tensor], right: list[Tensor], rounding: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The rows of the factors that belong to the local shards of ``params``, and the shards' offsets."""
    offsets = [0] * len(params)
    for i, p in enumerate(params):
        if not is_sharded(p):
            continue
        if not local_of(p).numel():
            rows, *rest = local_of(p).shape
            left[i] = left[i][:, :rows].contiguous()
            right[i] = right[i][:, : math.prod(rest)].contiguous()
            continue
        shard = shard_of(p)
        if shard.width != shard.length and shard.width != local_of(p).numel():
            if rounding.get("rounding") == "stochastic" and p.dtype is not torch.float32:
                fail(
                    name,
                    "rounding",
                    "'nearest' for matrices of half precision split by columns",
                    "'stochastic'",
                )
        else:
            offsets[i] = shard.offset
        columns = torch.arange(right[i].shape[1], device=left[i].device).view(p.shape[1:])
        for dim, (start, size) in enumerate(zip(shard.start[1:], shard.shape[1:], strict=True)):
            columns = columns.narrow(dim, start, size)
        left[i] = left[i][:, shard.start[0] : shard.start[0] + shard.shape[0]].contiguous()
        right[i] = right[i][:, columns.flatten()].contiguous()
    return left, right, offsets


class Factored(Noise):
    """Noise of ``kind`` in matrices, and dense noise in the rest."""

    has_factors = True

    def __init__(self, kind: LowRank, kept_seed: Tensor, cache: dict[tuple[Any, ...], Any]) -> None:
        self._kind, self._kept_seed, self._cache = kind, kept_seed, cache

    def _apply(
        self,
        out: Tensors | None,
        members: Members,
        seeds: Tensor,
        coeffs: Tensor,
        theta: Tensors | None = None,
        **rounding: Any,
    ) -> None:
        """Adds the noise to ``theta``, into ``out``, or in place where that is None."""
        theta = locals_of(members.params) if theta is None else theta
        pick = lambda values, at: [values[i] for i in at]
        of = members.picked
        shapes = [self._kind.matrix(p) for p in members.params]
        wide = [i for i, shape in enumerate(shapes) if shape is not None]
        if flat := [i for i, shape in enumerate(shapes) if shape is None]:
            if out is None:
                vectors = of(flat)
                args = self.kernel_args(vectors, seeds, coeffs) | vectors.places
                combine_(pick(theta, flat), **args, **rounding)
            else:
                DENSE.perturb(pick(out, flat), of(flat), seeds, coeffs, theta=pick(theta, flat), **rounding)
        if wide:
            matrices = of(wide)
            left, right = self.factors(matrices.params, matrices.streams, seeds)
            left, right, offsets = _parts(type(self._kind).__name__, matrices.params, left, right, rounding)
            where: dict[str, Any] = {"streams": matrices.streams, "offsets": offsets}
            shaped = lambda tensors: [
                self._kind.shaped(t, shapes[i]) for t, i in zip(tensors, wide, strict=True)
            ]
            if out is None:
                low_rank_(shaped(pick(theta, wide)), left, right, coeffs, **where, **rounding)
            else:
                into = shaped(locals_of(pick(out, wide)))
                low_rank(into, shaped(pick(theta, wide)), left, right, coeffs, **where, **rounding)

    def factors(
        self, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The left [K, m, r] and right [K, n, r] factors of each parameter, for K seeds."""
        shapes = [shape for p in params if (shape := self._kind.matrix(p)) is not None]
        kept = self._kind.kept(shapes, list(streams), self._kept_seed, self._cache)
        pairs = [self._kind.drawn(shapes, list(streams), seeds[k : k + 1], kept) for k in range(len(seeds))]
        if not pairs:
            empty = lambda rows: torch.empty(0, rows, self._kind.rank, device=seeds.device)
            return [empty(m) for m, _ in shapes], [empty(n) for _, n in shapes]
        lefts, rights = zip(*pairs, strict=True)
        if len(pairs) == 1:
            return [left[None] for left in lefts[0]], [right[None] for right in rights[0]]
        together = lambda factors: [torch.stack(of_tensor) for of_tensor in zip(*factors, strict=True)]
        return together(lefts), together(rights)

    def factor_bytes(self, params: Sequence[Tensor]) -> int:
        shapes = [shape for p in params if (shape := self._kind.matrix(p)) is not None]
        return sum(4 * self._kind.rank * (m + n) for m, n in shapes)

    def is_dense(self, param: Tensor) -> bool:
        return self._kind.matrix(param) is None

    def is_plain_matrix(self, param: Tensor) -> bool:
        return param.dim() == 2 and self._kind.matrix(param) == tuple(param.shape)

    def stacked(
        self, param: Tensor, stream: int, seeds: Tensor, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        shape = self._kind.matrix(param)
        assert shape is not None
        kept = self._kind.kept([shape], [stream], self._kept_seed, self._cache)
        return self._kind.stacked(shape, stream, seeds, kept, empty)

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        self._apply(out, members, seeds, coeffs, **options)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self._apply(None, members, seeds, coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._apply(None, members, seeds, coeffs, **rounding)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        """A rule with state: G of one matrix after the other is made dense, in fp32, and is gone after it.

        The states take G in plain fp32 operations, none of them fused, which have the same bits on every
        device.  Then the rule's kernel moves theta by them, with no direction and with hyper-parameters that
        leave the states as they are.
        """
        name = type(self._kind).__name__
        if rule not in _DENSE_RULES:
            fail(name, "rule", f"SGD or a rule of {sorted(_DENSE_RULES)}, which need no z apart", repr(rule))
        states: dict[str, Any] = {key: options.pop(key) for key in ("first", "second") if key in options}
        if any(t.dtype is not torch.float32 for tensors in states.values() for t in tensors):
            fail(name, "state_dtype", "torch.float32 in matrices of low rank", "torch.bfloat16")
        flat = [i for i, p in enumerate(members.params) if self._kind.matrix(p) is None]
        if flat:
            of_flat = {key: [tensors[i] for i in flat] for key, tensors in states.items()}
            DENSE.step(members.picked(flat), rule, hyper, seeds, coeffs, **of_flat, **options)
        for i in sorted({*range(len(members.params))} - {*flat}):
            one = members.picked([i])
            (theta,) = locals_of(one.params)
            g = torch.full(theta.shape, -0.0, dtype=torch.float32, device=theta.device)
            left, right = self.factors(one.params, one.streams, seeds)
            left, right, offsets = _parts(name, one.params, left, right, {})
            into = self._kind.shaped(g, self._kind.matrix(one.params[0]))
            low_rank_([into], left, right, coeffs, streams=one.streams, offsets=offsets)
            then, still = _DENSE_RULES[rule](
                g, theta.float(), hyper, *(tensors[i] for tensors in states.values())
            )
            own: dict[str, Any] = {
                key: [tensor] for key, tensor in zip(("first", "second"), then, strict=False)
            }
            kernel: KernelRule = "momentum" if rule == "sign" else rule
            args = self.kernel_args(one, seeds[:0], coeffs[:0]) | one.places
            update_([theta], kernel, still, **args, **own, **options)

    def fresh_shapes(self, members: Members) -> list[tuple[int, ...]]:
        """The shape of each parameter's fresh factor; of one with dense noise, the shape of its local
        part.
        """
        shapes = [self._kind.matrix(p) for p in members.params]
        dense = [tuple(t.shape) for t in locals_of(members.params)]
        return [
            d if shape is None else self._kind.fresh_shape(shape)
            for shape, d in zip(shapes, dense, strict=True)
        ]

    def carry_over(self, members: Members, states: Tensors, optimizer: OptimizerView) -> None:
        """Momenta of fresh factors, from the kept factors of the window before to those of this one."""
        for p, stream, state in zip(members.params, members.streams, states, strict=True):
            if (shape := self._kind.matrix(p)) is not None:
                before = derived_seed(optimizer, self._kind.window(optimizer) - 1, _FACTOR_K, p.device)
                self._kind.carry_over(shape, stream, state, before, self._kept_seed)

    def descend(
        self,
        members: Members,
        states: Tensors,
        seeds: Tensor,
        coeffs: Tensor,
        keep: Tensor,
        lr: Tensor,
        **rounding: Any,
    ) -> None:
        """state <- keep state + sum_k c_k F_k, F_k the fresh factor; then theta moves by -lr times its
        product.
        """
        for i, state in enumerate(states):
            one = members.picked([i])
            (param,), (theta,) = one.params, locals_of(one.params)
            if (shape := self._kind.matrix(param)) is None:
                args = self.kernel_args(one, seeds, coeffs) | one.places
                combine_([state], **args, decay=keep)
                hyper = scalars((0.0, 1.0, 0.0, lr), lr.device).float()
                none = self.kernel_args(one, seeds[:0], coeffs[:0]) | one.places
                update_([theta], "momentum", hyper, **none, first=[state], **rounding)
                continue
            combine_([state], seeds, coeffs * self._kind.scale, streams=one.streams, decay=keep)
            kept = self._kind.kept([shape], list(one.streams), self._kept_seed, self._cache)
            left, right = self._kind.product(state, kept)
            lefts, rights, offsets = _parts(
                type(self._kind).__name__, one.params, [left[None]], [right[None]], rounding
            )
            low_rank_([theta], lefts, rights, -lr, streams=one.streams, offsets=offsets, **rounding)

    def fresh(self, one: Members, seeds: Tensor, coeffs: Tensor) -> Tensor:
        """sum_k c_k F_k of one parameter, F_k the fresh factor; of one with dense noise, sum_k c_k z_k."""
        (param,) = one.params
        if (shape := self._kind.matrix(param)) is None:
            total = torch.full(local_of(param).shape, -0.0, dtype=torch.float32, device=param.device)
            combine_([total], **self.kernel_args(one, seeds, coeffs), **one.places)
        else:
            total = torch.full(self._kind.fresh_shape(shape), -0.0, dtype=torch.float32, device=param.device)
            combine_([total], seeds, coeffs, streams=one.streams)
        return total

    def descend_adam(
        self,
        one: Members,
        moments: tuple[Tensor, Tensor],
        left: Tensor,
        lr: Tensor,
        eps: float,
        **rounding: Any,
    ) -> None:
        """theta <- decay theta - lr m / (sqrt(v) + eps), with m and v the products of the two ``moments``.

        ``left``: 1 - b1^n and 1 - b2^n, float64.  Divisions and roots are in float64, rounded once.
        """
        (param,), (theta,) = one.params, locals_of(one.params)
        m, v = moments
        if (shape := self._kind.matrix(param)) is not None:
            kept = self._kind.kept([shape], list(one.streams), self._kept_seed, self._cache)
            made = []
            for moment, power in zip(moments, (1, 2), strict=True):
                left_, right = self._kind.product(moment, [[t**power for t in part] for part in kept])
                lefts, rights, offsets = _parts(
                    type(self._kind).__name__, one.params, [left_[None]], [right[None]], {}
                )
                total = torch.full(theta.shape, -0.0, dtype=torch.float32, device=theta.device)
                low_rank_([total], lefts, rights, 1.0, streams=one.streams, offsets=offsets)
                made.append(total)
            m, v = made
        moved = ((m.double() / left[0]) / ((v.double() / left[1]).sqrt() + eps)).float()
        hyper = scalars((0.0, 1.0, 0.0, lr), lr.device).float()
        none = self.kernel_args(one, lr.new_zeros(0, dtype=torch.int64), lr.new_zeros(0).float())
        update_([theta], "momentum", hyper, first=[moved], **none, **one.places, **rounding)

    def orthogonal(
        self, members: Members, seeds: Tensor, coeffs: Tensor, lr: Tensor, **rounding: Any
    ) -> None:
        """theta <- decay theta - lr P msign(sum_k c_k U_k)^T for matrices, - lr sum_k c_k z_k for the
        rest.
        """
        name = type(self._kind).__name__
        for i in range(len(members.params)):
            one = members.picked([i])
            (param,), (theta,) = one.params, locals_of(one.params)
            if (shape := self._kind.matrix(param)) is None:
                args = self.kernel_args(one, seeds, -lr * coeffs) | one.places
                combine_([theta], **args, **rounding)
                continue
            total = torch.full(self._kind.fresh_shape(shape), -0.0, dtype=torch.float32, device=theta.device)
            combine_([total], seeds, coeffs, streams=one.streams)
            kept = self._kind.kept([shape], list(one.streams), self._kept_seed, self._cache)
            left, right = self._kind.product(_msign(total), kept)
            lefts, rights, offsets = _parts(name, one.params, [left[None]], [right[None]], rounding)
            low_rank_([theta], lefts, rights, -lr, streams=one.streams, offsets=offsets, **rounding)


def _msign(x: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T of ``x``, fp32; 0 where ``x`` is 0.

    It is computed in float64.  Its last bits may depend on the machine.
    """
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    found: Tensor = ((u * (s > 0)) @ v).float().contiguous()
    return found


def _momentum(g: Tensor, theta: Tensor, hyper: Tensor, m: Tensor) -> tuple[list[Tensor], Tensor]:
    l2, beta, gain, lr = hyper.unbind()
    m.copy_(beta * m + gain * (l2 * theta + g))
    return [m], scalars((0.0, 1.0, 0.0, lr), hyper.device).float()


def _adam(g: Tensor, theta: Tensor, hyper: Tensor, m: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor]:
    l2, beta1, gain1, beta2, gain2, *rest = hyper.unbind()
    g = l2 * theta + g
    m.copy_(beta1 * m + gain1 * g)
    v.copy_(beta2 * v + gain2 * g * g)
    return [m, v], scalars((0.0, 1.0, 0.0, 1.0, 0.0, *rest), hyper.device).float()


def _sign(g: Tensor, theta: Tensor, hyper: Tensor) -> tuple[list[Tensor], Tensor]:
    l2, lr = hyper.unbind()
    return [(l2 * theta + g).sign()], scalars((0.0, 1.0, 0.0, lr), hyper.device).float()


#: What the kernels of :func:`zokernels.update_` do with G before they move theta: G, theta, hyper and the
#: states, which are written, give the states by which theta moves, and the hyper-parameters for that.  The
#: sign is one of them: theta moves by it as by a momentum.
_DENSE_RULES: dict[str, Callable[..., tuple[list[Tensor], Tensor]]] = {
    "momentum": _momentum,
    "adam": _adam,
    "sign": _sign,
}


@dataclass(frozen=True)
class LowRank(Direction):
    """What the kinds of low rank share.

    ``refresh``: the number of steps for which kept factors stay; None: the whole run.
    """

    rank: int = 4
    refresh: int | None = None

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "rank", self.rank)
        check_refresh(type(self).__name__, self.refresh)

    def matrix(self, param: Tensor) -> tuple[int, int] | None:
        """(m, n) of the matrix as which ``param`` is taken; None: its noise is dense."""
        return (param.shape[0], param.numel() // param.shape[0]) if param.dim() >= 2 else None

    def shaped(self, tensor: Tensor, shape: tuple[int, int] | None) -> Tensor:
        """``tensor``, the local part of a parameter of ``shape``, as the kernels take it."""
        return tensor

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        window = self.window(optimizer)
        for bucket in buckets:
            seed = derived_seed(optimizer, window, _FACTOR_K, bucket.device)
            bucket.noise = Factored(self, seed, self._cache(optimizer, window))

    def _cache(self, optimizer: OptimizerView, window: int) -> dict[tuple[Any, ...], Any]:
        """Holds what would be too slow to draw again in every call.  It lasts as long as the window."""
        return {}

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        """What stays for a window, for the matrices of one call."""
        return None

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The left [m, r] and right [n, r] factors of one direction."""
        raise NotImplementedError

    def stacked(
        self, shape: tuple[int, int], stream: int, seeds: Tensor, kept: Any, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        """The factors of K directions of one matrix, [K, m, r] and [K, n, r], each as :meth:`drawn` gives it.

        What all directions share has a first dimension of 1.  ``empty``: as :meth:`Noise.stacked` has it.
        """
        pairs = [self.drawn([shape], [stream], seeds[k : k + 1], kept) for k in range(len(seeds))]
        return torch.stack([left for (left,), _ in pairs]), torch.stack([right for _, (right,) in pairs])

    @property
    def scale(self) -> float:
        """The factor of the fresh numbers in z, where a momentum of them is kept
        (:class:`FactorMomentum`).
        """
        return 1.0

    def fresh_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of what is drawn for each direction of an [m, n] matrix, from the first element on."""
        raise NotImplementedError

    def product(self, fresh: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
        """The left [m, r] and right [n, r] factors of a matrix whose fresh numbers are ``fresh``."""
        raise NotImplementedError

    def carry_over(
        self, shape: tuple[int, int], stream: int, state: Tensor, before: Tensor, now: Tensor
    ) -> None:
        """``state``, a sum of fresh numbers, in place from the kept factors of seed ``before`` to those
        of ``now``.
        """

    def _left(self, shapes: Shapes, streams: list[int], seed: Tensor, c: float) -> list[Tensor]:
        return draw([(m, self.rank) for m, _ in shapes], seed, streams, [0] * len(shapes), c)

    def _right(self, shapes: Shapes, streams: list[int], seed: Tensor) -> list[Tensor]:
        """They have the seed and stream of the left factors, and the elements behind theirs."""
        return draw(
            [(n, self.rank) for _, n in shapes], seed, streams, [m * self.rank for m, _ in shapes], 1.0
        )


@dataclass(frozen=True)
class KeptRight(LowRank):
    """z = U V^T / sqrt(r): U fresh in every direction, V kept (LOZO).

    ``scaled=False``: z = U V^T for matrices, whose elements have variance r, as the authors' code has it.
    This is the scaled z with sqrt(r) times its eps and r times its lr, for matrices alone: vectors have the
    same dense noise in both.
    """

    refresh: int | None = 50
    scaled: bool = True

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        return self._right(shapes, streams, seed)

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self._left(shapes, streams, seed, self.scale), kept

    def stacked(
        self, shape: tuple[int, int], stream: int, seeds: Tensor, kept: Any, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        return _draw_each((shape[0], self.rank), seeds, stream, 0, self.scale, 0, empty), kept[0][None]

    @property
    def scale(self) -> float:
        return self.rank**-0.5 if self.scaled else 1.0

    def fresh_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], self.rank

    def product(self, fresh: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
        return fresh, kept[0]

    def carry_over(
        self, shape: tuple[int, int], stream: int, state: Tensor, before: Tensor, now: Tensor
    ) -> None:
        (old,), (new,) = self._right([shape], [stream], before), self._right([shape], [stream], now)
        between = (old.double().t() @ new.double() / shape[1]).float()
        out = torch.full_like(state, -0.0)
        low_rank_([out], [state[None]], [between.t().contiguous()[None]], 1.0, streams=[stream])
        state.copy_(out)


@dataclass(frozen=True)
class KeptLeft(LowRank):
    """z = sqrt(m / r) P U^T: P kept, its r columns orthonormal; U [n, r] fresh in every direction (ZO-Muon).

    ``scaled=False``: z = P U^T, whose elements have variance r / m, as the authors' code has it.  P comes
    from a QR factorisation, as in :class:`Subspace`, and with the same caveat about its last bits.
    """

    refresh: int | None = 100
    scaled: bool = True

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for p in (p for b in buckets for p in b.params):
            if (shape := self.matrix(p)) is not None and shape[0] < self.rank:
                fail("KeptLeft", "rank", f"at most the rows of every matrix, {tuple(p.shape)}", self.rank)
        super().prepare(optimizer, buckets, seeds)

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        return [orthonormal(left) for left in self._left(shapes, streams, seed, 1.0)]

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        fresh = draw([(n, self.rank) for _, n in shapes], seed, streams, [0] * len(shapes), 1.0)
        by = lambda m: (m / self.rank) ** 0.5 if self.scaled else 1.0
        return [p * by(m) for p, (m, _) in zip(kept, shapes, strict=True)], fresh

    def fresh_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[1], self.rank

    def product(self, fresh: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
        return kept[0], fresh


class _Signed(Factored):
    """Perturbs by the factors of ``kind``, and updates by their signs."""

    same_scale = False

    def __init__(self, kind: LowRank, *kept: Any) -> None:
        super().__init__(kind, *kept)
        self._signs = Factored(_SignFactors(kind.rank), *kept)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._signs.update(members, seeds, coeffs, **rounding)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        self._signs.step(members, rule, hyper, seeds, coeffs, **options)


class LastingNoise(Noise):
    """The noise of another, of which ``now``, the seeds of this step, stand for ``then``, those of an earlier
    one.

    It has no factors to speak of: who takes them for products of a population draws vectors' noise from the
    step's own seeds.
    """

    def __init__(self, noise: Factored, now: Tensor, then: Tensor) -> None:
        self._noise, self._now, self._then = noise, now, then
        self.same_scale = noise.same_scale

    def _seeds(self, seeds: Tensor) -> Tensor:
        return self._then[(seeds[:, None] == self._now).int().argmax(1)]

    def is_dense(self, param: Tensor) -> bool:
        return self._noise.is_dense(param)

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        self._noise.perturb(out, members, self._seeds(seeds), coeffs, **options)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self._noise.move(members, self._seeds(seeds), coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._noise.update(members, self._seeds(seeds), coeffs, **rounding)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        self._noise.step(members, rule, hyper, self._seeds(seeds), coeffs, **options)


@dataclass(frozen=True)
class FreshFactors(LowRank):
    """z = A B^T / sqrt(r), both fresh in every direction (EGGROLL).

    ``refresh``: after how many steps other factors (and vectors' noise) are drawn: z_k of step t is that of
    the seeds of step floor(t / refresh).  None: in every step.

    ``signs``: the weights are perturbed by z, and updated by sign(A) sign(B)^T / sqrt(r) in its place.
    Vectors keep their dense noise.
    """

    signs: bool = False

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        super().prepare(optimizer, buckets, seeds)
        window = self.window(optimizer)
        for bucket in buckets:
            noise: Noise = bucket.noise
            if self.signs:
                seed = derived_seed(optimizer, window, _FACTOR_K, bucket.device)
                bucket.noise = noise = _Signed(self, seed, {})
            if self.refresh is not None:
                assert isinstance(noise, Factored)
                now = seeds[bucket.device]
                then = [derived_seed(optimizer, window, k, bucket.device) for k in range(len(now))]
                bucket.noise = LastingNoise(noise, now, torch.cat(then))

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self._left(shapes, streams, seed, self.rank**-0.5), self._right(shapes, streams, seed)

    def stacked(
        self, shape: tuple[int, int], stream: int, seeds: Tensor, kept: Any, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        (m, n), r = shape, self.rank
        # The right factors' elements follow the left ones'.
        right = _draw_each((n, r), seeds, stream, m * r, 1.0, 1, empty)
        return _draw_each((m, r), seeds, stream, 0, r**-0.5, 0, empty), right


@dataclass(frozen=True)
class _SignFactors(FreshFactors):
    """sign(A) / sqrt(r) and sign(B) of :class:`FreshFactors`."""

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        left, right = super().drawn(shapes, streams, seed, kept)
        return [t.sign() * self.rank**-0.5 for t in left], [t.sign() for t in right]


@dataclass(frozen=True)
class TemporalFactor(LowRank):
    """z = sum_s tau_s u_s v_s^T / sqrt(r): u and v kept, tau [r] fresh in every direction (TeZO).

    ``scaled=False``: without the factor 1 / sqrt(r) for matrices, as the paper has it.  This is the scaled z
    with sqrt(r) times its eps and r times its lr, for matrices alone.
    """

    scaled: bool = True

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        c = self.rank**-0.5 if self.scaled else 1.0
        return self._left(shapes, streams, seed, c), self._right(shapes, streams, seed)

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        tau = draw([(1, self.rank)] * len(shapes), seed, streams, [0] * len(shapes), 1.0)
        left, right = kept
        return [u * t for u, t in zip(left, tau, strict=True)], right

    def stacked(
        self, shape: tuple[int, int], stream: int, seeds: Tensor, kept: Any, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        (left,), (right,) = kept
        return left * _draw_each((1, self.rank), seeds, stream, 0, 1.0), right[None]

    def fresh_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.rank

    def product(self, fresh: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
        (left,), (right,) = kept
        return (left * fresh).contiguous(), right


@dataclass(frozen=True)
class Subspace(LowRank):
    """z = sqrt(m n) / r * U G V^T: U and V kept; G [r, r] fresh in every direction (SubZero).

    The columns of U and V are orthonormal.  They come from a QR factorisation in float64, whose last bits may
    depend on the machine and the device.  Alone among the directions, this one has the same bits only where
    LAPACK is the same.  The factor sqrt(m n) / r, which makes the variance 1, is the authors'.

    ``near_square``: each matrix is taken as one of m' rows and n' columns, m' n' = m n, as near to a square
    as its number of elements allows (8 x 4096 as 128 x 256).  The authors do so where LoRA, prefixes or
    prompts are trained, whose matrices are too thin for the rank.  A matrix with a side of 1 has dense noise,
    as theirs.  (Their code has dense noise for tensors of three dimensions and more, too; here those are
    matrices as everywhere.)"""

    refresh: int | None = 500
    near_square: bool = False

    def matrix(self, param: Tensor) -> tuple[int, int] | None:
        shape = super().matrix(param)
        if shape is None or min(shape) == 1:
            return None
        return near_square(param.numel()) if self.near_square else shape

    def shaped(self, tensor: Tensor, shape: tuple[int, int] | None) -> Tensor:
        return tensor.view(shape) if self.near_square and shape is not None else tensor

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            for p in bucket.params:
                if (shape := self.matrix(p)) is None:
                    continue
                if min(shape) < self.rank:
                    other = "" if self.near_square else " (or near_square=True)"
                    expected = (
                        f"at most the smaller side of every matrix, {tuple(p.shape)} taken as {shape}{other}"
                    )
                    fail("Subspace", "rank", expected, self.rank)
                if self.near_square and is_sharded(p):
                    fail(
                        "Subspace",
                        "near_square",
                        "False for sharded parameters, whose rows it would mix",
                        True,
                    )
        super().prepare(optimizer, buckets, seeds)

    def _cache(self, optimizer: OptimizerView, window: int) -> dict[tuple[Any, ...], Any]:
        key = (optimizer.seed, window)
        if key not in optimizer.cache:
            optimizer.cache.clear()
            optimizer.cache[key] = {}
        factors: dict[tuple[Any, ...], Any] = optimizer.cache[key]
        return factors

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        found = []
        for shape, stream in zip(shapes, streams, strict=True):
            key = (shape, stream, seed.device)
            if key not in cache:
                (left,), (right,) = (
                    self._left([shape], [stream], seed, 1.0),
                    self._right([shape], [stream], seed),
                )
                cache[key] = orthonormal(left), orthonormal(right)
            found.append(cache[key])
        return found

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        mixed = draw([(self.rank, self.rank)] * len(shapes), seed, streams, [0] * len(shapes), 1.0)
        left = [torch.full((m, self.rank), -0.0, device=seed.device) for m, _ in shapes]
        scales = torch.cat(
            [torch.full((1, 1), (m * n) ** 0.5 / self.rank, device=seed.device) for m, n in shapes]
        )
        low_rank_(left, [u[None] for u, _ in kept], [g[None] for g in mixed], scales, streams=streams)
        return left, [v for _, v in kept]

    def stacked(
        self, shape: tuple[int, int], stream: int, seeds: Tensor, kept: Any, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        ((u, v),), (m, n), count = kept, shape, len(seeds)
        mixed = _draw_each((self.rank, self.rank), seeds, stream, 0, 1.0)
        left = torch.full((count, m, self.rank), -0.0, device=seeds.device)
        scales = torch.full((count, 1), (m * n) ** 0.5 / self.rank, device=seeds.device)
        low_rank_(list(left), [u[None]] * count, [g[None] for g in mixed], scales, streams=[stream] * count)
        return left, v[None]
