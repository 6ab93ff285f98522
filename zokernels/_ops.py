"""Every operation's schema, fake and entry, in one file: ``torch.ops.zokernels.*``.

The schemas exist without any compiled library.  An entry checks its arguments and hands them to the selected backend;
the typed wrappers in ``functional`` are what users call.

Entries are registered through ``Library.impl``: ``torch.library.custom_op`` wraps each call in aliasing checks of its
own, which cost more than ours and the launch together (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .backends.terms import Terms
from .checks import (
    STATE_DTYPES,
    check_dist,
    check_offset,
    check_one,
    check_overlap,
    check_places,
    check_scalars,
    check_states,
    check_stream,
    check_tensors,
    check_terms,
    fail,
)
from .wire import format_of, wire_bytes

_LIBRARY = torch.library.Library("zokernels", "DEF")


def _register(schema: str, entry: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines the operation and gives back the callable that goes through torch's dispatcher."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, entry, key)
    torch.library.register_fake(f"zokernels::{name}", fake, lib=_LIBRARY)
    operation: Callable[..., Any] = getattr(torch.ops.zokernels, name).default
    return operation


def _written(*tensors: Sequence[Tensor]) -> None:
    torch.autograd.graph.increment_version([t for group in tensors for t in group])


def _read(terms: Terms) -> dict[str, Sequence[Tensor]]:
    return {"masks": terms.masks or (), "curvature": terms.curvature or ()}


# The fields of Terms, in its order; torch leaves out arguments that equal their defaults.
_NOISE = "Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, str dist, Tensor? decay, Tensor? rounding_seed"
_MASK = "Tensor[]? masks=None, Tensor? mask_seed=None, int mask_keep=65536"
_ROWS = "int[]? widths=None, int[]? lengths=None"
_TERMS = f"{_NOISE}, {_MASK}, Tensor[]? curvature=None, {_ROWS}"


# combine ----------------------------------------------------------------------------------------------------------


def _check_combine_(params: list[Tensor], *fields: Any) -> Terms:
    terms = Terms(*fields)
    if params:
        check_tensors("combine_", {"params": params})
    check_terms("combine_", "params", params, terms)
    return terms


def _combine_(params: list[Tensor], *fields: Any) -> None:
    terms = _check_combine_(params, *fields)
    check_overlap("combine_", {"params": params}, _read(terms))
    if params:
        select(params[0].device).combine(params, params, terms)
        _written(params)


def _check_combine(out: list[Tensor], params: list[Tensor], *fields: Any) -> Terms:
    terms = Terms(*fields)
    if params or out:
        check_tensors("combine", {"params": params, "out": out} if params else {"out": out, "params": params})
    check_terms("combine", "params", params, terms)
    return terms


def _combine(out: list[Tensor], params: list[Tensor], *fields: Any) -> None:
    terms = _check_combine(out, params, *fields)
    check_overlap("combine", {"out": out}, {"params": params, **_read(terms)})
    if params:
        select(params[0].device).combine(out, params, terms)
        _written(out)


def _fake(check: Callable[..., Any]) -> Callable[..., None]:
    def fake(*args: object) -> None:
        check(*args)

    return fake


combine_ = _register(f"combine_(Tensor(a!)[] params, {_TERMS}) -> ()", _combine_, _fake(_check_combine_))
combine = _register(f"combine(Tensor(a!)[] out, Tensor[] params, {_TERMS}) -> ()", _combine, _fake(_check_combine))


# fan_out, spread --------------------------------------------------------------------------------------------------


def _check_fan_out_(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, *fields: Any
) -> Terms:
    terms = Terms(*fields)
    if params or plus or minus:
        check_tensors("fan_out_", {"params": params, "plus": plus, "minus": minus})
    check_terms("fan_out_", "params", params, terms)
    if params:
        check_scalars("fan_out_", "coeffs", terms.coeffs, torch.float32, params[0].device)
        check_one("fan_out_", "seed", seed, torch.int64, params[0].device)
        check_one("fan_out_", "coeff", coeff, torch.float32, params[0].device)
    return terms


def _fan_out_(
    params: list[Tensor], plus: list[Tensor], minus: list[Tensor], seed: Tensor, coeff: Tensor, *fields: Any
) -> None:
    terms = _check_fan_out_(params, plus, minus, seed, coeff, *fields)
    check_overlap("fan_out_", {"params": params, "plus": plus, "minus": minus}, {})
    if params:
        select(params[0].device).fan_out(params, plus, minus, seed, coeff, terms)
        _written(params if terms.seeds.numel() or terms.decay is not None else [], plus, minus)


fan_out_ = _register(
    f"fan_out_(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor seed, Tensor coeff, {_NOISE}) -> ()",
    _fan_out_,
    _fake(_check_fan_out_),
)


def _check_spread(out: Tensor, x: Tensor, seeds: Tensor, coeffs: Tensor, stream: int, offset: int, dist: str) -> Terms:
    terms = Terms(seeds, coeffs, [stream], [offset], dist, None, None)
    check_tensors("spread", {"x": [x]})
    check_terms("spread", "x", [x], terms)
    check_scalars("spread", "coeffs", coeffs, torch.float32, x.device)
    if out.dtype is not x.dtype or out.device != x.device:
        fail("spread", "out", f"{x.dtype} on {x.device}, as x", f"{out.dtype} on {out.device}", TypeError)
    shape = (seeds.numel(), *x.shape)
    if tuple(out.shape) != shape or not out.is_contiguous():
        fail("spread", "out", f"a contiguous tensor of shape {shape}", f"{tuple(out.shape)}, strides {out.stride()}")
    return terms


def _spread(out: Tensor, x: Tensor, seeds: Tensor, coeffs: Tensor, stream: int, offset: int, dist: str) -> None:
    terms = _check_spread(out, x, seeds, coeffs, stream, offset, dist)
    check_overlap("spread", {"out": [out]}, {"x": [x]})
    if out.numel():
        select(x.device).spread(out, x, terms)
        _written([out])


spread = _register(
    "spread(Tensor(a!) out, Tensor x, Tensor seeds, Tensor coeffs, int stream, int offset, str dist) -> ()",
    _spread,
    _fake(_check_spread),
)


# update -----------------------------------------------------------------------------------------------------------

#: Rules of ``update_``: state tensors, values in hyper (of adam_window: those before one value for each seed).
RULES = {"momentum": (1, 4), "adam": (2, 8), "adam_window": (0, 2), "sign": (0, 2), "hizoo": (1, 2)}


def _check_update_(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, *fields: Any
) -> Terms:
    terms = Terms(*fields[:10])._replace(**dict(zip(("widths", "lengths"), fields[10:], strict=False)))
    if rule not in RULES:
        fail("update_", "rule", " or ".join(map(repr, RULES)), repr(rule))
    if params:
        check_tensors("update_", {"params": params})
    check_terms("update_", "params", params, terms)
    states, values = RULES[rule]
    for i, (argument, tensors) in enumerate((("first", first), ("second", second))):
        if i < states:
            check_states("update_", argument, tensors, params, STATE_DTYPES)
        elif tensors:
            fail("update_", argument, f"no state for rule {rule!r}", f"{len(tensors)} tensors")
    if params:
        seeds = terms.seeds.numel()
        check_scalars("update_", "hyper", hyper, torch.float32, params[0].device)
        values += seeds if rule == "adam_window" else 0
        if hyper.numel() != values:
            fail("update_", "hyper", f"{values} values for rule {rule!r}", hyper.numel())
        if rule == "hizoo" and seeds != 1:
            fail("update_", "seeds", "one seed for rule 'hizoo'", seeds)
    return terms


def _update_(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, *fields: Any
) -> None:
    terms = _check_update_(params, first, second, rule, hyper, *fields)
    check_overlap("update_", {"params": params, "first": first, "second": second}, _read(terms))
    if params:
        select(params[0].device).update(params, first, second, rule, hyper, terms)
        _written(params, first, second)


update_ = _register(
    "update_(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, str rule, Tensor hyper, "
    f"{_NOISE}, {_MASK}, {_ROWS}) -> ()",
    _update_,
    _fake(_check_update_),
)


# low_rank ---------------------------------------------------------------------------------------------------------


def _check_low_rank(
    op: str, groups: Mapping[str, list[Tensor]], left: list[Tensor], right: list[Tensor], coeffs: Tensor, *places: Any
) -> Terms:
    params = groups["params"]
    # The directions are the factors': no seed is drawn from, and K is the factors' first dimension.
    none = torch.empty(coeffs.shape[-1] if coeffs.dim() else 0, dtype=torch.int64, device=coeffs.device)
    streams, offsets, decay, rounding_seed = places
    terms = Terms(none, coeffs, streams, offsets, "normal", decay, rounding_seed)
    if any(groups.values()):
        check_tensors(op, groups)
    check_terms(op, "params", params, terms)
    count = none.numel()
    for argument, factors, at in (("left", left, 0), ("right", right, 1)):
        if len(factors) != len(params):
            fail(op, argument, f"{len(params)} tensors, as in params", len(factors))
        for i, (factor, param) in enumerate(zip(factors, params, strict=True)):
            name = f"{argument}[{i}]"
            if factor.dtype is not torch.float32 or factor.device != param.device:
                got = f"{factor.dtype} on {factor.device}"
                fail(op, name, f"torch.float32 on {param.device}", got, TypeError)
            if param.dim() < 2:
                fail(op, f"params[{i}]", "a matrix (two dimensions or more)", f"shape {tuple(param.shape)}")
            rows = param.shape[0] if at == 0 else param[0].numel() if param.shape[0] else 0
            rank = left[i].shape[-1]
            if tuple(factor.shape) != (count, rows, rank) or not factor.is_contiguous():
                fail(op, name, f"a contiguous tensor of shape {(count, rows, rank)}", tuple(factor.shape))
    return terms


def _low_rank_(params: list[Tensor], left: list[Tensor], right: list[Tensor], *fields: Any) -> None:
    terms = _check_low_rank("low_rank_", {"params": params}, left, right, *fields)
    check_overlap("low_rank_", {"params": params}, {"left": left, "right": right})
    if params:
        select(params[0].device).low_rank(params, params, left, right, terms)
        _written(params)


def _low_rank(out: list[Tensor], params: list[Tensor], left: list[Tensor], right: list[Tensor], *fields: Any) -> None:
    terms = _check_low_rank("low_rank", {"params": params, "out": out}, left, right, *fields)
    check_overlap("low_rank", {"out": out}, {"params": params, "left": left, "right": right})
    if params:
        select(params[0].device).low_rank(out, params, left, right, terms)
        _written(out)


_FACTORS = (
    "Tensor[] left, Tensor[] right, Tensor coeffs, int[] streams, int[] offsets, Tensor? decay, Tensor? rounding_seed"
)
low_rank_ = _register(
    f"low_rank_(Tensor(a!)[] params, {_FACTORS}) -> ()",
    _low_rank_,
    _fake(lambda params, *rest: _check_low_rank("low_rank_", {"params": params}, *rest)),
)
low_rank = _register(
    f"low_rank(Tensor(a!)[] out, Tensor[] params, {_FACTORS}) -> ()",
    _low_rank,
    _fake(lambda out, params, *rest: _check_low_rank("low_rank", {"params": params, "out": out}, *rest)),
)


# requantize -------------------------------------------------------------------------------------------------------


def _check_requantize(op: str, groups: Mapping[str, list[Tensor]], low: int, high: int, *fields: Any) -> Terms:
    terms = Terms(*fields)
    if any(groups.values()):
        check_tensors(op, groups, (torch.int8,))
    check_terms(op, "params", groups["params"], terms)
    if not -128 <= low < high <= 127:
        fail(op, "low, high", "-128 <= low < high <= 127", (low, high))
    return terms


def _requantize_(params: list[Tensor], low: int, high: int, *fields: Any) -> None:
    terms = _check_requantize("requantize_", {"params": params}, low, high, *fields)
    check_overlap("requantize_", {"params": params}, _read(terms))
    if params:
        select(params[0].device).requantize(params, params, low, high, terms)
        _written(params)


def _requantize(out: list[Tensor], params: list[Tensor], low: int, high: int, *fields: Any) -> None:
    terms = _check_requantize("requantize", {"params": params, "out": out}, low, high, *fields)
    check_overlap("requantize", {"out": out}, {"params": params, **_read(terms)})
    if params:
        select(params[0].device).requantize(out, params, low, high, terms)
        _written(out)


requantize_ = _register(
    f"requantize_(Tensor(a!)[] params, int low, int high, {_NOISE}, {_MASK}) -> ()",
    _requantize_,
    _fake(lambda params, *rest: _check_requantize("requantize_", {"params": params}, *rest)),
)
requantize = _register(
    f"requantize(Tensor(a!)[] out, Tensor[] params, int low, int high, {_NOISE}, {_MASK}) -> ()",
    _requantize,
    _fake(lambda out, params, *rest: _check_requantize("requantize", {"params": params, "out": out}, *rest)),
)


# wire formats -----------------------------------------------------------------------------------------------------


def _check_buffers(
    op: str, argument: str, buffers: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]
) -> None:
    """A wire buffer for each tensor of ``params``."""
    if len(buffers) != len(params):
        fail(op, argument, f"{len(params)} tensors, one for each parameter", len(buffers))
    form = format_of(op, wire)
    for i, (data, param) in enumerate(zip(buffers, params, strict=True)):
        size = wire_bytes(param.numel(), wire, offsets[i])
        good = data.dtype is torch.uint8 and data.dim() == 1 and data.numel() == size and data.is_contiguous()
        if not good or data.device != param.device or data.storage_offset() % form.size:
            expected = f"contiguous uint8 [{size}] on {param.device}, at a multiple of {form.size} bytes"
            fail(op, f"{argument}[{i}]", expected, f"{data.dtype} {tuple(data.shape)} on {data.device}")


def _check_encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    format_of("encode", wire)
    if params:
        check_tensors("encode", {"params": params})
    check_places("encode", [p.numel() for p in params], [0] * len(params), offsets, "params")
    _check_buffers("encode", "out", out, params, wire, offsets)


def _encode(out: list[Tensor], params: list[Tensor], wire: str, offsets: list[int]) -> None:
    _check_encode(out, params, wire, offsets)
    check_overlap("encode", {"out": out}, {"params": params})
    if params:
        select(params[0].device).encode(out, params, wire, offsets)
        _written(out)


encode = _register(
    "encode(Tensor(a!)[] out, Tensor[] params, str wire, int[] offsets) -> ()", _encode, _fake(_check_encode)
)


def _check_decode(out: list[Tensor], wires: list[Tensor], wire: str, *fields: Any) -> Terms:
    terms = Terms(*fields)
    format_of("decode", wire)
    if out:
        check_tensors("decode", {"out": out})
    check_terms("decode", "out", out, terms)
    _check_buffers("decode", "wires", wires, out, wire, terms.offsets)
    if out:
        check_scalars("decode", "coeffs", terms.coeffs, torch.float32, out[0].device)
    return terms


def _decode(out: list[Tensor], wires: list[Tensor], wire: str, *fields: Any) -> None:
    terms = _check_decode(out, wires, wire, *fields)
    check_overlap("decode", {"out": out}, {"wires": wires})
    if out:
        select(out[0].device).decode(out, wires, wire, terms)
        _written(out)


decode = _register(f"decode(Tensor(a!)[] out, Tensor[] wires, str wire, {_NOISE}) -> ()", _decode, _fake(_check_decode))


def _check_decode_fan_out(
    plus: list[Tensor],
    minus: list[Tensor],
    wires: list[Tensor],
    wire: str,
    seed: Tensor,
    coeff: Tensor,
    *fields: Any,
) -> Terms:
    op, terms = "decode_fan_out", Terms(*fields)
    format_of(op, wire)
    if plus or minus:
        check_tensors(op, {"plus": plus, "minus": minus} if plus else {"minus": minus, "plus": plus})
    check_terms(op, "plus", plus, terms)
    _check_buffers(op, "wires", wires, plus, wire, terms.offsets)
    if plus:
        check_scalars(op, "coeffs", terms.coeffs, torch.float32, plus[0].device)
        check_one(op, "seed", seed, torch.int64, plus[0].device)
        check_one(op, "coeff", coeff, torch.float32, plus[0].device)
    return terms


def _decode_fan_out(
    plus: list[Tensor],
    minus: list[Tensor],
    wires: list[Tensor],
    wire: str,
    seed: Tensor,
    coeff: Tensor,
    *fields: Any,
) -> None:
    terms = _check_decode_fan_out(plus, minus, wires, wire, seed, coeff, *fields)
    check_overlap("decode_fan_out", {"plus": plus, "minus": minus}, {"wires": wires})
    if plus:
        select(plus[0].device).decode_fan_out(plus, minus, wires, wire, seed, coeff, terms)
        _written(plus, minus)


decode_fan_out = _register(
    "decode_fan_out(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] wires, str wire, Tensor seed, Tensor coeff, "
    f"{_NOISE}) -> ()",
    _decode_fan_out,
    _fake(_check_decode_fan_out),
)


# noise ------------------------------------------------------------------------------------------------------------


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
    terms = Terms(seed.reshape(1), one, [stream], [offset], dist, None, None)
    select(z.device).combine([z], [z], terms)
    return z


def _fake_noise(shape: list[int], seed: Tensor, stream: int, offset: int, dist: str) -> Tensor:
    _check_noise(shape, seed, stream, offset, dist)
    return torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)


noise = _register("noise(SymInt[] shape, Tensor seed, int stream, int offset, str dist) -> Tensor", _noise, _fake_noise)


def check_noise_of(op: str, seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> None:
    """Arguments of what is computed of noise alone."""
    check_dist(op, dist)
    check_scalars(op, "seeds", seeds, torch.int64, seeds.device)
    if any(n < 0 for n in sizes):
        fail(op, "sizes", "integers >= 0", sizes)
    check_places(op, sizes, streams, offsets, "sizes")


def _squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    check_noise_of("squares", seeds, sizes, streams, offsets, dist)
    return select(seeds.device).squares(seeds, sizes, streams, offsets, dist)


def _fake_squares(seeds: Tensor, sizes: list[int], streams: list[int], offsets: list[int], dist: str) -> Tensor:
    check_noise_of("squares", seeds, sizes, streams, offsets, dist)
    return torch.empty_like(seeds)


squares = _register(
    "squares(Tensor seeds, int[] sizes, int[] streams, int[] offsets, str dist) -> Tensor", _squares, _fake_squares
)


def _check_project(tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str) -> None:
    check_dist("project", dist)
    check_scalars("project", "seeds", seeds, torch.int64, tensors[0].device if tensors else seeds.device)
    if tensors:
        check_tensors("project", {"tensors": tensors})
    check_places("project", [t.numel() for t in tensors], streams, offsets, "tensors")


def _project(tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str) -> Tensor:
    _check_project(tensors, seeds, streams, offsets, dist)
    return select(seeds.device).project(tensors, seeds, streams, offsets, dist)


def _fake_project(tensors: list[Tensor], seeds: Tensor, streams: list[int], offsets: list[int], dist: str) -> Tensor:
    _check_project(tensors, seeds, streams, offsets, dist)
    return seeds.new_empty(seeds.shape, dtype=torch.float64)


project = _register(
    "project(Tensor[] tensors, Tensor seeds, int[] streams, int[] offsets, str dist) -> Tensor", _project, _fake_project
)


# seeds ------------------------------------------------------------------------------------------------------------


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
    return select(run_seed.device).derive_seed(run_seed, step, k)


def _fake_derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    _check_derive_seed(run_seed, step, k)
    shape = torch.broadcast_shapes(run_seed.shape, step.shape, k.shape)
    return torch.empty(shape, dtype=torch.int64, device=run_seed.device)


derive_seed = _register(
    "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor", _derive_seed, _fake_derive_seed
)
