"""Every operation's schema, fake and entry, in one file: ``torch.ops.zokernels.*``.

The schemas exist without any compiled library.  An entry checks its arguments and hands them to the selected backend;
the typed wrappers in ``functional`` are what users call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import select
from .checks import check_combine, check_dist, check_offset, check_overlap, check_stream, fail

_COMBINE_ARGS = (
    "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, str dist, Tensor? decay, Tensor? rounding_seed"
)


@torch.library.custom_op(
    "zokernels::combine_", mutates_args=("params",), schema=f"(Tensor(a!)[] params, {_COMBINE_ARGS}) -> ()"
)
def combine_(
    params: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: Sequence[int],
    offsets: Sequence[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    check_combine("combine_", {"params": params}, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
    check_overlap("combine_", {"params": params}, {})
    if params:
        theta = list(params)
        select(theta[0].device.type).combine(
            theta, theta, seeds, coeffs, list(streams), list(offsets), dist, decay, rounding_seed
        )


@combine_.register_fake
def _(params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed):
    check_combine("combine_", {"params": params}, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)


@torch.library.custom_op(
    "zokernels::combine",
    mutates_args=("out",),
    schema=f"(Tensor(a!)[] out, Tensor[] params, {_COMBINE_ARGS}) -> ()",
)
def combine(
    out: Sequence[Tensor],
    params: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: Sequence[int],
    offsets: Sequence[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    groups = {"params": params, "out": out}
    check_combine("combine", groups, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
    check_overlap("combine", {"out": out}, {"params": params})
    if params:
        select(params[0].device.type).combine(
            list(out), list(params), seeds, coeffs, list(streams), list(offsets), dist, decay, rounding_seed
        )


@combine.register_fake
def _(out, params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed):
    groups = {"params": params, "out": out}
    check_combine("combine", groups, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)


def _check_noise(shape: Sequence[int], seed: Tensor, stream: int, offset: int, dist: str) -> None:
    check_dist("noise", dist)
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        fail(
            "noise", "seed", "an integer or an int64 tensor of one element", f"{seed.dtype} x {seed.numel()}", TypeError
        )
    if any(n < 0 for n in shape):
        fail("noise", "shape", "sizes >= 0", tuple(shape))
    numel = 1
    for n in shape:
        numel = numel * n
    check_stream("noise", "stream", stream)
    check_offset("noise", "offset", offset, numel)


@torch.library.custom_op(
    "zokernels::noise",
    mutates_args=(),
    schema="(SymInt[] shape, Tensor seed, int stream, int offset, str dist) -> Tensor",
)
def noise(shape: Sequence[int], seed: Tensor, stream: int, offset: int, dist: str) -> Tensor:
    _check_noise(shape, seed, stream, offset, dist)
    # z is combine over -0.0 with coefficient 1: -0.0, unlike 0.0, is the neutral element of addition.
    z = torch.full(tuple(shape), -0.0, dtype=torch.float32, device=seed.device)
    one = torch.ones(1, dtype=torch.float32, device=seed.device)
    select(z.device.type).combine([z], [z], seed.reshape(1), one, [stream], [offset], dist, None, None)
    return z


@noise.register_fake
def _(shape, seed, stream, offset, dist):
    _check_noise(shape, seed, stream, offset, dist)
    return torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)


def _check_derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> None:
    for argument, value in (("run_seed", run_seed), ("step", step), ("k", k)):
        if value.dtype is not torch.int64:
            fail("derive_seed", argument, "an integer or an int64 tensor", value.dtype, TypeError)
        if value.device != run_seed.device:
            fail("derive_seed", argument, f"device {run_seed.device}, as run_seed", value.device)


@torch.library.custom_op(
    "zokernels::derive_seed", mutates_args=(), schema="(Tensor run_seed, Tensor step, Tensor k) -> Tensor"
)
def derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    run_seed, step, k = (t.expand(shape).contiguous() for t in (run_seed, step, k))
    return select(run_seed.device.type).derive_seed(run_seed, step, k)


@derive_seed.register_fake
def _(run_seed, step, k):
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    return torch.empty(shape, dtype=torch.int64, device=run_seed.device)
