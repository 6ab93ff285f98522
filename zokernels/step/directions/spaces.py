"""Directions of low rank whose kept factors are measured: from activations (AGZO), from gradients (P-GAP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_integer, check_number, fail
from ...functional import combine_, low_rank_
from ..noise import DENSE
from ..roles import OptimizerView
from ..shard import any_sharded
from ..types import Bucket, Seeds
from .direction import derived_seed
from .low_rank import Factored, LowRank, Shapes, draw, orthonormal

#: k of the seed of what is drawn beside a step's directions: far above any direction's.
_SPACE_K = 0x80000002


def check_whole(name: str, buckets: Sequence[Bucket]) -> None:
    if any_sharded(p for b in buckets for p in b.params):
        fail(name, "params", "plain tensors: factors are measured of whole matrices", "a DTensor", TypeError)


def leading_inputs(inputs: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """A [n, r], orthonormal, near the span of the leading right singular vectors of ``inputs`` H [t, n].

    By block power iterations, A <- orthonormal(H^T H A) from ``start`` [n, r] on, in fp32; and H A.
    """
    basis = orthonormal(start)
    for _ in range(iterations):
        basis = orthonormal(inputs.t() @ (inputs @ basis))
    return basis, inputs @ basis


@dataclass(frozen=True)
class ActivationSpace(LowRank):
    """z = R A^T for the weights [m, n] of linear layers: A [n, r] spans their inputs; R [m, r] is fresh.

    The gradient of a linear layer's weight is a sum of outer products with its inputs H [t, n], so its rows
    lie in their span.  A are the leading r right singular vectors of H, by ``iterations`` of a block power
    iteration, measured in the forward of the step at theta.  It has orthonormal columns, and no more of them
    than H has rows or columns.  All other weights have dense noise, and so have layers that the forward does
    not call.

    The elements of z have variance r / n, as the authors' have; with ``scaled``, variance 1.

    Its factors depend on the batches, so no log can hold them.

    Source: AGZO (Lin et al., 2026, arXiv 2601.17261).
    """

    model: nn.Module | None = None
    rank: int = 16
    iterations: int = 3
    scaled: bool = False
    #: What the step has drawn: streams by id of the parameter, and by stream A, with the size of each column.
    streams: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    bases: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    separate = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("ActivationSpace", "iterations", self.iterations, 1)
        if not isinstance(self.model, nn.Module):
            got = type(self.model).__name__
            fail("ActivationSpace", "model", "the module whose linear layers are watched", got, TypeError)

    def matrix(self, param: Tensor) -> tuple[int, int] | None:
        return super().matrix(param) if self.streams.get(id(param)) in self.bases else None

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        check_whole("ActivationSpace", buckets)
        self.streams.clear()
        self.bases.clear()
        for bucket in buckets:
            self.streams.update(zip(map(id, bucket.params), bucket.streams, strict=True))
            bucket.noise = Factored(self, seeds[bucket.device][:0], {})

    @contextmanager
    def watching(self, optimizer: OptimizerView) -> Iterator[None]:
        """Inside, forwards of the model's linear layers measure A."""
        hooks = []
        assert self.model is not None  # __post_init__
        try:
            for module in self.model.modules():
                if isinstance(module, nn.Linear) and id(module.weight) in self.streams:
                    stream = self.streams[id(module.weight)]
                    hooks.append(module.register_forward_pre_hook(self._measuring(optimizer, stream)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _measuring(self, optimizer: OptimizerView, stream: int) -> Callable[..., None]:
        def measure(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            if stream in self.bases:  # a layer in a loop: what came before counts with its weight
                basis, image = self.bases[stream]
                rows = torch.cat((image.norm(dim=0)[:, None] * basis.t(), rows))
            seed = derived_seed(optimizer, optimizer.step_count, _SPACE_K, rows.device)
            (start,) = draw([(rows.shape[1], min(self.rank, *rows.shape))], seed, [stream], [0], 1.0)
            with torch.autocast(rows.device.type, enabled=False):
                self.bases[stream] = leading_inputs(rows, start, self.iterations)

        return measure

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        return [self.bases[stream][0] for stream in streams]

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        left = []
        for (m, n), stream, basis in zip(shapes, streams, kept, strict=True):
            r = basis.shape[1]
            left += draw([(m, r)], seed, [stream], [0], math.sqrt(n / r) if self.scaled else 1.0)
        return left, kept


@dataclass(frozen=True)
class GradientSpace(LowRank):
    """z = U Z V^T for matrices: the leading singular vectors of an estimated gradient, kept; Z [r, r] fresh.

    Every ``refresh`` steps the gradient is estimated along dense noise.  Its singular value decomposition
    gives U [m, r], the r numbers s, and V [n, r].  Z is drawn, and then moved along diag(s), so that its part
    along the gradient is known:

        Z <- Z - ((<diag(s), Z> - xi sqrt(delta) |s|) / |s|^2) diag(s),   xi = 1 or -1 by chance

    delta goes from ``delta`` to ``last_delta`` in ``decay_steps`` steps, in equal parts.  Elements of z have
    variance near r^2 / (m n); with ``scaled``, near 1.  Vectors have dense noise.  The factorisation is in
    float64, and its last bits may depend on the machine.

    Source: P-GAP (Mi et al., 2025, arXiv 2510.18228), by summaries of the paper and a reproduction of others:
    its own code is not public, and the schedule of delta is that of the reproduction.
    """

    rank: int = 8
    refresh: int | None = 100
    delta: float = 1.0
    last_delta: float | None = None
    decay_steps: int = 1000
    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("GradientSpace", "decay_steps", self.decay_steps, 1)
        check_number("GradientSpace", "delta", self.delta)
        if self.last_delta is not None:
            check_number("GradientSpace", "last_delta", self.last_delta)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        check_whole("GradientSpace", buckets)
        for p in (p for b in buckets for p in b.params):
            if (shape := self.matrix(p)) is not None and min(shape) < self.rank:
                expected = f"at most the smaller side of every matrix, {tuple(p.shape)} taken as {shape}"
                fail("GradientSpace", "rank", expected, self.rank)
        optimizer.cache.pop("spaces", None)  # of a step that raised
        for bucket in buckets:
            bucket.noise = DENSE
            if not self.renews(optimizer, buckets):
                self.use(optimizer, bucket, self._stored(optimizer, bucket))

    def renews(self, optimizer: OptimizerView, buckets: Sequence[Bucket]) -> bool:
        """Whether the gradient is estimated in this step: a window begins, or there is no basis yet."""
        matrices = [p for b in buckets for p in b.params if self.matrix(p) is not None]
        return self.begins_window(optimizer) or any("right" not in optimizer.state[p] for p in matrices)

    def use(self, optimizer: OptimizerView, bucket: Bucket, bases: dict[Any, Any]) -> None:
        """Lets the noise of ``bucket`` have ``bases``: (U, s, V) by stream."""
        seed = derived_seed(optimizer, optimizer.step_count, _SPACE_K, bucket.device)
        share = min(optimizer.step_count / self.decay_steps, 1.0)
        last = self.delta if self.last_delta is None else self.last_delta
        delta = self.delta + share * (last - self.delta)
        own: dict[Any, Any] = {**bases, "delta": delta}
        bucket.noise = Factored(self, seed, own)

    def _stored(self, optimizer: OptimizerView, bucket: Bucket) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for p, stream in zip(bucket.params, bucket.streams, strict=True):
            if self.matrix(p) is not None:
                found[stream] = tuple(optimizer.state[p][key] for key in ("left", "sizes", "right"))
        return found

    def store(self, optimizer: OptimizerView, bucket: Bucket, bases: dict[Any, Any]) -> None:
        for p, stream in zip(bucket.params, bucket.streams, strict=True):
            if stream in bases:
                optimizer.state[p].update(zip(("left", "sizes", "right"), bases[stream], strict=True))

    def measured(self, bucket: Bucket, seeds: Tensor, coeffs: Tensor) -> dict[Any, Any]:
        """(U, s, V) by stream, of the gradients sum_k c_k z_k along dense noise.  It waits for the device."""
        found: dict[Any, Any] = {}
        for i, (p, stream) in enumerate(zip(bucket.params, bucket.streams, strict=True)):
            if (shape := self.matrix(p)) is None:
                continue
            gradient = torch.full(shape, -0.0, dtype=torch.float32, device=p.device)
            args = DENSE.kernel_args(bucket.members, seeds, coeffs)
            combine_([gradient], **args, **bucket.members.picked([i]).places)
            left, sizes, right = torch.linalg.svd(gradient.double(), full_matrices=False)
            r = self.rank
            parts = left[:, :r], sizes[:r], right[:r].t()
            found[stream] = tuple(t.float().contiguous() for t in parts)
        return found

    def kept(
        self, shapes: Shapes, streams: list[int], seed: Tensor, cache: dict[tuple[Any, ...], Any]
    ) -> Any:
        own: dict[Any, Any] = cache
        own.setdefault("side", seed)
        return own

    def drawn(
        self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Made once in a step, for its one direction, and kept with the bases."""
        new = [i for i, stream in enumerate(streams) if ("left", stream) not in kept]
        if new:
            some = [shapes[i] for i in new], [streams[i] for i in new]
            for stream, left in zip(some[1], self._left_factors(*some, seed, kept), strict=True):
                kept["left", stream] = left
        return [kept["left", stream] for stream in streams], [kept[stream][2] for stream in streams]

    def _left_factors(self, shapes: Shapes, streams: list[int], seed: Tensor, kept: Any) -> list[Tensor]:
        """U Z of each matrix, fp32 [m, r]."""
        r, count = self.rank, len(shapes)
        z = torch.stack(draw([(r, r)] * count, seed, streams, [0] * count, 1.0)).double()
        signs = [torch.full((1,), -0.0, device=seed.device) for _ in streams]
        combine_(signs, kept["side"], 1.0, streams=streams, dist="rademacher")
        s = torch.stack([kept[stream][1] for stream in streams]).double()
        square, inner = s[:, 0] * 0, s[:, 0] * 0
        for j in range(r):  # in this order, however many matrices are worked on together
            square = square + s[:, j] * s[:, j]
            inner = inner + z[:, j, j] * s[:, j]
        along = inner - torch.cat(signs) * math.sqrt(kept["delta"]) * square.sqrt()
        shift = torch.where(square > 0, along / square, torch.zeros_like(along))
        z = (z - torch.diag_embed(shift[:, None] * s)).float().transpose(1, 2).contiguous()
        scale = lambda m, n: (m * n) ** 0.5 / r if self.scaled else 1.0
        scales = torch.cat([torch.full((1, 1), scale(m, n), device=seed.device) for m, n in shapes])
        outs = [torch.full((m, r), -0.0, device=seed.device) for m, _ in shapes]
        lefts = [kept[stream][0][None] for stream in streams]
        low_rank_(outs, lefts, list(z[:, None].unbind()), scales, streams=streams)
        return outs
