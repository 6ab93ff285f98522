"""Calls of every operation with nothing: no tensors, empty ones alone, and empty ones beside another.

Each case makes the calls on the chosen backend, and raises where an answer is wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import zokernels
from zokernels.ops.update import RULES
from zokernels.wire import wire_bytes

#: Shapes of what is beside each other in a call: without elements, but for the last.
SHAPES = [(0,), (0, 5), (5, 0), (0, 2, 3), (4, 3)]
#: Which of them are in a call.
CALLS: list[list[int]] = [[], [0], [1, 2], [0, 1, 2, 3, 4], [4, 0], [0, 4, 2]]
MATRICES: list[list[int]] = [[], [1], [2], [1, 2, 3], [1, 4, 2], [4, 3]]
NOISE = {"decay": 0.9, "rounding": "stochastic", "rounding_seed": 3}
SEEDS, COEFFS = [1, 2], [0.5, 0.25]


def _values(which: list[int], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.arange(12.0).sin().reshape(4, 3) if i == 4 else torch.zeros(SHAPES[i]) for i in which]
    return [t.to(device=device, dtype=dtype) for t in made]


def _places(which: list[int]) -> dict[str, list[int]]:
    return {"streams": [10 + i for i in which], "offsets": [8 * i for i in which]}


def _check(call: Callable[[list[int]], list[Tensor]], calls: list[list[int]] = CALLS) -> None:
    """``call(which)`` gives the tensors that it wrote, those of each of ``which`` in turn.

    What is empty is still empty, and the tensor beside it has the values that it has alone.
    """
    (alone,) = call([4])
    assert torch.isfinite(alone.double()).all()
    for which in calls:
        for i, got in zip(which, call(which), strict=True):
            assert got.numel() == 0 if i != 4 else torch.equal(got, alone), (which, i)


def _combine_(which, device):
    zokernels.combine_(made := _values(which, device), SEEDS, COEFFS, **_places(which), **NOISE)
    return made


def _combine(which, device):
    params = _values(which, device, torch.bfloat16)
    zokernels.combine(
        out := [torch.empty_like(p) for p in params], params, SEEDS, COEFFS, **_places(which), **NOISE
    )
    return out


def _masked(which, device):
    params, offsets = _values(which, device), _places(which)["offsets"]
    masks = [
        zokernels.pack_mask(torch.ones(p.numel(), dtype=torch.bool), at).to(device)
        for p, at in zip(params, offsets, strict=True)
    ]
    curvature = [torch.ones_like(p) for p in params]
    extras = {"masks": masks, "mask_seed": 1, "density": 0.5, "curvature": curvature}
    zokernels.combine_(params, SEEDS, COEFFS, **_places(which), **NOISE, **extras)
    return params


def _fan_out_(which, device):
    params = _values(which, device)
    plus, minus = ([torch.empty_like(p) for p in params] for _ in range(2))
    zokernels.fan_out_(params, plus, minus, 5, 0.1, seeds=SEEDS, coeffs=COEFFS, **_places(which))
    return [torch.cat([p.flatten(), a.flatten(), b.flatten()]) for p, a, b in zip(params, plus, minus)]  # noqa: B905


def _update_(rule):
    def call(which, device):
        states, values = RULES[rule]
        made = [_values(which, device) for _ in range(1 + states)]
        made[1:] = [[1 + s.abs() for s in of] for of in made[1:]]
        seeds, coeffs = (SEEDS[:1], COEFFS[:1]) if rule == "hizoo" else (SEEDS, COEFFS)
        hyper = torch.full((values + (2 if rule == "adam_window" else 0),), 0.5, device=device)
        options = dict(zip(("first", "second"), made[1:], strict=False))
        zokernels.update_(made[0], rule, hyper, seeds, coeffs, **options, **_places(which), **NOISE)
        return [torch.cat([t.flatten() for t in of]) for of in zip(*made, strict=True)]

    return call


def _low_rank(out_of_place):
    def call(which, device):
        params = _values(which, device)
        factor = lambda rows: torch.arange(float(2 * rows * 3), device=device).cos().reshape(2, rows, 3)
        left = [factor(p.shape[0]) for p in params]
        right = [factor(p.shape[1:].numel()) for p in params]
        args = params, left, right, COEFFS
        if not out_of_place:
            zokernels.low_rank_(*args, **_places(which), **NOISE)
            return params
        zokernels.low_rank(out := [torch.empty_like(p) for p in params], *args, **_places(which), **NOISE)
        return out

    return call


def _requantize(out_of_place):
    def call(which, device):
        params = [(100 * p).to(torch.int8) for p in _values(which, device)]
        options = {**_places(which), "decay": 0.9, "rounding": "stochastic", "rounding_seed": 3}
        if not out_of_place:
            zokernels.requantize_(params, SEEDS, COEFFS, **options)
            return params
        zokernels.requantize(out := [torch.empty_like(p) for p in params], params, SEEDS, COEFFS, **options)
        return out

    return call


def _wire(name, fan_out):
    def call(which, device):
        params, offsets = _values(which, device), _places(which)["offsets"]
        wires = [
            torch.empty(wire_bytes(p.numel(), name, at), dtype=torch.uint8, device=device)
            for p, at in zip(params, offsets, strict=True)
        ]
        zokernels.encode(wires, params, name, offsets=offsets)
        out, other = ([torch.empty_like(p) for p in params] for _ in range(2))
        if fan_out:
            zokernels.decode_fan_out(
                out, other, wires, name, 5, 0.1, seeds=SEEDS, coeffs=COEFFS, **_places(which)
            )
            return [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(out, other, strict=True)]
        zokernels.decode(out, wires, name, SEEDS, COEFFS, **_places(which))
        return out

    return call


def _spread(device):
    for shape in SHAPES[:-1]:
        x = torch.zeros(shape, device=device)
        out = torch.empty((2, *shape), device=device)
        zokernels.spread(out, x, SEEDS, COEFFS, stream=1)
        zokernels.spread(torch.empty((0, *shape), device=device), x, [], [], stream=1)
    zokernels.spread(torch.empty((0, 4, 3), device=device), torch.ones(4, 3, device=device), [], [], stream=1)


def _sums(device):
    """project and squared_norm: the sums of nothing are 0, and nothing adds to another."""
    seeds = torch.tensor(SEEDS, device=device)
    places = lambda which: {"streams": [10 + i for i in which], "offsets": [8 * i for i in which]}
    alone = zokernels.project(_values([4], device), seeds, **places([4]))
    for which in CALLS:
        want = alone if 4 in which else torch.zeros_like(alone)
        assert torch.equal(zokernels.project(_values(which, device), seeds, **places(which)), want)
    assert zokernels.project(_values([4], device), seeds[:0], streams=1).shape == (0,)
    norm = zokernels.squared_norm(seeds, [12], streams=[14])
    both = zokernels.squared_norm(seeds, [0, 12, 0], streams=[10, 14, 11])
    assert torch.equal(both, norm)
    assert torch.equal(zokernels.squared_norm(seeds, [0], streams=[10]), torch.zeros_like(norm))
    assert torch.equal(zokernels.squared_norm(seeds, [], streams=[]), torch.zeros_like(norm))
    assert zokernels.squared_norm(seeds[:0], [12], streams=[14]).shape == (0,)


def _low_rank_linear(device):
    """No rows, no columns of y or of x, no members, and a member without rows beside others."""
    values = lambda *shape: (
        torch.arange(1.0, 1 + torch.Size(shape).numel(), device=device).sin().reshape(shape)
    )

    def call(rows, m, n):
        y, left, right = values(sum(rows), m), values(len(rows), m, 2), values(len(rows), n, 2)
        zokernels.low_rank_linear_(y, values(sum(rows), n), left, right, values(len(rows)), rows=rows)
        return y

    for rows, m, n in (([], 3, 2), ([0, 0], 3, 2), ([2, 1], 0, 2), ([0], 0, 0)):
        assert call(rows, m, n).shape == (sum(rows), m)
    assert torch.equal(call([2, 1], 3, 0), values(3, 3))
    y, x = values(3, 4), values(3, 5)
    left, right, coeffs = values(3, 4, 2), values(3, 5, 2), values(3)
    zokernels.low_rank_linear_(y, x, left, right, coeffs, rows=[2, 0, 1])
    others = [0, 2]
    want = values(3, 4)
    factors = left[others].contiguous(), right[others].contiguous(), coeffs[others].contiguous()
    zokernels.low_rank_linear_(want, x, *factors, rows=[2, 1])
    assert torch.equal(y, want)


def _quantized_linear(device):
    """No rows, no outputs, and no inputs, of which a sum is 0."""
    ones = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype, device=device)
    for rows, outputs, inputs in ((0, 3, 2), (3, 0, 2), (0, 0, 0), (2, 3, 0)):
        for kind in (torch.int8, torch.uint8):
            weight = ones(outputs, (inputs + 1) // 2 if kind is torch.uint8 else inputs, dtype=kind)
            args = ones(rows, inputs), weight, ones(outputs, 1), ones(outputs)
            assert torch.equal(zokernels.quantized_linear(*args), ones(rows, outputs))


def _draws(device):
    """noise and derive_seed of no elements."""
    for dist in ("normal", "rademacher"):
        assert zokernels.noise(0, seed=1, stream=2, dist=dist, device=device).shape == (0,)
        assert zokernels.noise((3, 0), seed=1, stream=2, dist=dist, device=device).shape == (3, 0)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert zokernels.derive_seed(none, none, none).shape == (0,)


def _lists(call, calls=CALLS):
    return lambda device: _check(lambda which: call(which, device), calls)


#: By operation: what makes its calls on a device.
CASES: dict[str, Callable[[str], None]] = {
    "combine_": _lists(_combine_),
    "combine": _lists(_combine),
    "combine_ with masks": _lists(_masked),
    "fan_out_": _lists(_fan_out_),
    **{f"update_ {rule}": _lists(_update_(rule)) for rule in RULES},
    "low_rank_": _lists(_low_rank(False), MATRICES),
    "low_rank": _lists(_low_rank(True), MATRICES),
    "requantize_": _lists(_requantize(False)),
    "requantize": _lists(_requantize(True)),
    **{f"encode, decode {wire}": _lists(_wire(wire, False)) for wire in ("bf16", "fp16", "fp8", "int8")},
    **{f"decode_fan_out {wire}": _lists(_wire(wire, True)) for wire in ("bf16", "int8")},
    "low_rank_linear_": _low_rank_linear,
    "quantized_linear": _quantized_linear,
    "spread": _spread,
    "project, squares": _sums,
    "noise, derive_seed": _draws,
}
