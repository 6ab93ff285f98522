"""Every operation's schema, fake and entry, in one file: ``torch.ops.zokernels.*``.

The schemas exist without any compiled library.  An entry checks its arguments and hands them to the selected backend;
the typed wrappers in ``functional`` are what users call.

Entries are registered through ``Library.impl``: ``torch.library.custom_op`` wraps each call in aliasing checks of its
own, which cost more than ours and the launch together (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backends import select
from .checks import check_combine, check_dist, check_offset, check_one, check_overlap, check_stream, fail

_LIBRARY = torch.library.Library("zokernels", "DEF")


def _register(schema: str, entry: Callable, fake: Callable) -> Callable:
    """Defines the operation and gives back the callable that goes through torch's dispatcher."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, entry, key)
    torch.library.register_fake(f"zokernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.zokernels, name).default


_COMBINE_ARGS = (
    "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, str dist, Tensor? decay, Tensor? rounding_seed"
)


def _check_combine_(params, *args) -> None:
    check_combine("combine_", {"params": params}, *args)


def _combine_(
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    _check_combine_(params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
    check_overlap("combine_", {"params": params}, {})
    if params:
        backend = select(params[0].device.type)
        backend.combine(params, params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
        torch.autograd.graph.increment_version(params)


combine_ = _register(f"combine_(Tensor(a!)[] params, {_COMBINE_ARGS}) -> ()", _combine_, _check_combine_)


def _check_combine(out, params, *args) -> None:
    check_combine("combine", {"params": params, "out": out}, *args)


def _combine(
    out: list[Tensor],
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    _check_combine(out, params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
    check_overlap("combine", {"out": out}, {"params": params})
    if params:
        backend = select(params[0].device.type)
        backend.combine(out, params, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
        torch.autograd.graph.increment_version(out)


combine = _register(f"combine(Tensor(a!)[] out, Tensor[] params, {_COMBINE_ARGS}) -> ()", _combine, _check_combine)


def _check_fan_out_(params, plus, minus, seed, coeff, *args) -> None:
    groups = {"params": params, "plus": plus, "minus": minus}
    check_combine("fan_out_", groups, *args)
    if params:
        check_one("fan_out_", "seed", seed, torch.int64, params[0].device)
        check_one("fan_out_", "coeff", coeff, torch.float32, params[0].device)


def _fan_out_(
    params: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    seed: Tensor,
    coeff: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    streams: list[int],
    offsets: list[int],
    dist: str,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    _check_fan_out_(params, plus, minus, seed, coeff, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
    check_overlap("fan_out_", {"params": params, "plus": plus, "minus": minus}, {})
    if params:
        fan_out = select(params[0].device.type).fan_out
        fan_out(params, plus, minus, seed, coeff, seeds, coeffs, streams, offsets, dist, decay, rounding_seed)
        pending = params if seeds.numel() or decay is not None else []
        torch.autograd.graph.increment_version([*pending, *plus, *minus])


fan_out_ = _register(
    "fan_out_(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor seed, Tensor coeff, "
    f"{_COMBINE_ARGS}) -> ()",
    _fan_out_,
    _check_fan_out_,
)


def _check_noise(shape: Sequence[int], seed: Tensor, stream: int, offset: int, dist: str) -> None:
    check_dist("noise", dist)
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.numel()} elements of {seed.dtype}"
        fail("noise", "seed", "an integer or an int64 tensor of one element", got, TypeError)
    if any(n < 0 for n in shape):
        fail("noise", "shape", "sizes >= 0", tuple(shape))
    numel = 1
    for n in shape:
        numel = numel * n
    check_stream("noise", "stream", stream)
    check_offset("noise", "offset", offset, numel)


def _noise(shape: list[int], seed: Tensor, stream: int, offset: int, dist: str) -> Tensor:
    _check_noise(shape, seed, stream, offset, dist)
    # z is combine over -0.0 with coefficient 1: -0.0, unlike 0.0, is the neutral element of addition.
    z = torch.full(tuple(shape), -0.0, dtype=torch.float32, device=seed.device)
    one = torch.ones(1, dtype=torch.float32, device=seed.device)
    select(z.device.type).combine([z], [z], seed.reshape(1), one, [stream], [offset], dist, None, None)
    return z


def _fake_noise(shape, seed, stream, offset, dist):
    _check_noise(shape, seed, stream, offset, dist)
    return torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)


noise = _register("noise(SymInt[] shape, Tensor seed, int stream, int offset, str dist) -> Tensor", _noise, _fake_noise)


def _check_derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> None:
    for argument, value in (("run_seed", run_seed), ("step", step), ("k", k)):
        if value.dtype is not torch.int64:
            fail("derive_seed", argument, "an integer or an int64 tensor", value.dtype, TypeError)
        if value.device != run_seed.device:
            fail("derive_seed", argument, f"device {run_seed.device}, as run_seed", value.device)


def _derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    run_seed, step, k = (t.expand(shape).contiguous() for t in (run_seed, step, k))
    return select(run_seed.device.type).derive_seed(run_seed, step, k)


def _fake_derive_seed(run_seed, step, k):
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    return torch.empty(shape, dtype=torch.int64, device=run_seed.device)


derive_seed = _register(
    "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor", _derive_seed, _fake_derive_seed
)
