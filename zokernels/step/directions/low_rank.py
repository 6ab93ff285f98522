"""Directions of low rank for matrices: z = L R^T.

The factors are drawn when they are needed, and the product is never stored.  A tensor of more dimensions is
taken as the [m, n] matrix of its first dimension and the rest; vectors get dense noise.  Every element of z
has variance 1, so eps and lr mean what they mean for dense noise.

The drawn factors are scratch of (m + n) r numbers for the parameters of one call.  What is kept between steps
is drawn again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...checks import check_integer, fail
from ...functional import combine_, low_rank, low_rank_
from ..noise import DENSE, Members, Noise, Tensors
from ..roles import OptimizerView
from ..shard import is_sharded, local_of, locals_of, shard_of
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh, derived_seed

#: k of the seed of factors that are kept: far above any direction's.
_FACTOR_K = 0x80000001

#: (m, n) of each matrix.
Shapes = list[tuple[int, int]]


def _draw(shapes: Shapes, seed: Tensor, streams: list[int], offsets: list[int], c: float) -> list[Tensor]:
    """c z [rows, columns] in fp32, of each stream from its offset on.

    It is one combine over -0.0, which is the neutral element of addition.
    """
    out = [torch.full(shape, -0.0, dtype=torch.float32, device=seed.device) for shape in shapes]
    combine_(out, seed, c, streams=streams, offsets=offsets)
    return out


def _orthonormal(x: Tensor) -> Tensor:
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
            left[i], right[i] = left[i][:, : local_of(p).shape[0]].contiguous(), right[i][:, :0].contiguous()
            continue
        shard = shard_of(p)
        if shard.width != shard.length and shard.width != local_of(p).numel():
            if rounding.get("rounding") == "stochastic" and p.dtype is not torch.float32:
                fail(name, "rounding", "'nearest' for matrices of half precision split by columns", "'stochastic'")
        else:
            offsets[i] = shard.offset
        columns = torch.arange(right[i].shape[1], device=left[i].device).view(p.shape[1:])
        for dim, (start, size) in enumerate(zip(shard.start[1:], shard.shape[1:], strict=True)):
            columns = columns.narrow(dim, start, size)
        left[i] = left[i][:, shard.start[0] : shard.start[0] + shard.shape[0]].contiguous()
        right[i] = right[i][:, columns.flatten()].contiguous()
    return left, right, offsets


class _Factored(Noise):
    """Noise of ``kind`` in matrices, and dense noise in the rest."""

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
        of = lambda at: Members(pick(members.params, at), pick(members.streams, at), members.dist)
        wide = [i for i, p in enumerate(members.params) if p.dim() >= 2]
        if flat := [i for i, p in enumerate(members.params) if p.dim() < 2]:
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
            if out is None:
                low_rank_(pick(theta, wide), left, right, coeffs, **where, **rounding)
            else:
                low_rank(locals_of(pick(out, wide)), pick(theta, wide), left, right, coeffs, **where, **rounding)

    def factors(
        self, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The left [K, m, r] and right [K, n, r] factors of each parameter, for K seeds."""
        shapes = [(p.shape[0], p.numel() // p.shape[0]) for p in params]
        kept = self._kind.kept(shapes, list(streams), self._kept_seed, self._cache)
        pairs = [self._kind.drawn(shapes, list(streams), seeds[k : k + 1], kept) for k in range(len(seeds))]
        if not pairs:
            empty = lambda rows: torch.empty(0, rows, self._kind.rank, device=seeds.device)
            return [empty(m) for m, _ in shapes], [empty(n) for _, n in shapes]
        lefts, rights = zip(*pairs, strict=True)
        together = lambda factors: [torch.stack(of_tensor) for of_tensor in zip(*factors, strict=True)]
        return together(lefts), together(rights)

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        self._apply(out, members, seeds, coeffs, **options)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self._apply(None, members, seeds, coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._apply(None, members, seeds, coeffs, **rounding)

    def step(self, members: Members, rule: str, *args: Any, **options: Any) -> NoReturn:
        fail(type(self._kind).__name__, "rule", "SGD: a rule with state needs every element of z", repr(rule))


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

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        window = self.window(optimizer)
        for bucket in buckets:
            seed = derived_seed(optimizer, window, _FACTOR_K, bucket.device)
            bucket.noise = _Factored(self, seed, self._cache(optimizer, window))

    def _cache(self, optimizer: OptimizerView, window: int) -> dict[tuple[Any, ...], Any]:
        """Holds what would be too slow to draw again in every call.  It lasts as long as the window."""
        return {}

    def kept(self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]) -> Any:
        """What stays for a window, for the matrices of one call."""
        return None

    def drawn(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The left [m, r] and right [n, r] factors of one direction."""
        raise NotImplementedError

    def _left(self, shapes: Shapes, streams: list[int], seed: Tensor, c: float) -> list[Tensor]:
        return _draw([(m, self.rank) for m, _ in shapes], seed, streams, [0] * len(shapes), c)

    def _right(self, shapes: Shapes, streams: list[int], seed: Tensor) -> list[Tensor]:
        """They have the seed and stream of the left factors, and the elements behind theirs."""
        return _draw([(n, self.rank) for _, n in shapes], seed, streams, [m * self.rank for m, _ in shapes], 1.0)


@dataclass(frozen=True)
class KeptRight(LowRank):
    """z = U V^T / sqrt(r): U fresh in every direction, V kept (LOZO)."""

    refresh: int | None = 50

    def kept(self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]) -> Any:
        return self._right(shapes, streams, seed)

    def drawn(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> tuple[list[Tensor], list[Tensor]]:
        return self._left(shapes, streams, seed, self.rank**-0.5), kept


@dataclass(frozen=True)
class FreshFactors(LowRank):
    """z = A B^T / sqrt(r), both fresh in every direction (EGGROLL)."""

    def drawn(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> tuple[list[Tensor], list[Tensor]]:
        return self._left(shapes, streams, seed, self.rank**-0.5), self._right(shapes, streams, seed)


@dataclass(frozen=True)
class TemporalFactor(LowRank):
    """z = sum_s tau_s u_s v_s^T / sqrt(r): u and v kept, tau [r] fresh in every direction (TeZO)."""

    def kept(self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]) -> Any:
        return self._left(shapes, streams, seed, self.rank**-0.5), self._right(shapes, streams, seed)

    def drawn(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> tuple[list[Tensor], list[Tensor]]:
        tau = _draw([(1, self.rank)] * len(shapes), seed, streams, [0] * len(shapes), 1.0)
        left, right = kept
        return [u * t for u, t in zip(left, tau, strict=True)], right


@dataclass(frozen=True)
class Subspace(LowRank):
    """z = sqrt(m n) / r * U G V^T: U and V kept; G [r, r] fresh in every direction (SubZero).

    The columns of U and V are orthonormal.  They come from a QR factorisation in float64, whose last bits may
    depend on the machine and the device.  Alone among the directions, this one has the same bits only where
    LAPACK is the same.
    """

    refresh: int | None = 500

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            for p in bucket.params:
                if p.dim() >= 2 and min(p.shape[0], p.numel() // p.shape[0]) < self.rank:
                    fail("Subspace", "rank", f"at most the size of every matrix, {tuple(p.shape)}", self.rank)
        super().prepare(optimizer, buckets, seeds)

    def _cache(self, optimizer: OptimizerView, window: int) -> dict[tuple[Any, ...], Any]:
        key = (optimizer.seed, window)
        if key not in optimizer.cache:
            optimizer.cache.clear()
            optimizer.cache[key] = {}
        factors: dict[tuple[Any, ...], Any] = optimizer.cache[key]
        return factors

    def kept(self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]) -> Any:
        found = []
        for shape, stream in zip(shapes, streams, strict=True):
            key = (shape, stream, seed.device)
            if key not in cache:
                (left,), (right,) = self._left([shape], [stream], seed, 1.0), self._right([shape], [stream], seed)
                cache[key] = _orthonormal(left), _orthonormal(right)
            found.append(cache[key])
        return found

    def drawn(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> tuple[list[Tensor], list[Tensor]]:
        mixed = _draw([(self.rank, self.rank)] * len(shapes), seed, streams, [0] * len(shapes), 1.0)
        left = [torch.full((m, self.rank), -0.0, device=seed.device) for m, _ in shapes]
        scales = torch.cat([torch.full((1, 1), (m * n) ** 0.5 / self.rank, device=seed.device) for m, n in shapes])
        low_rank_(left, [u[None] for u, _ in kept], [g[None] for g in mixed], scales, streams=streams)
        return left, [v for _, v in kept]
