"""Every operation on one small input, as a function of the stream, for streams that differ in their upper
bits.

``RUNS`` maps a name to a function of a stream that gives what the operation wrote.  Whatever the operation
draws (noise, masks, rounding of weights and of states) is drawn in some run from the stream alone, so that a
kernel that cuts a stream to 32 bits gives two of these streams the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import zokernels

#: Sizes and offsets that contain whole blocks of eight and whole tiles of 4096, and begin inside of one.
NUMEL, OFFSET = 5000, 8 * 2**32 - 3001
SEEDS, COEFFS = [2**63 + 12345, 77], [0.3, -0.02]

RUNS: dict[str, Callable[[int], list[Tensor]]] = {}


def _values(numel: int = NUMEL, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(5)).to(dtype)


def _run(name: str) -> Callable[[Callable[[int], list[Tensor]]], Callable[[int], list[Tensor]]]:
    def register(function: Callable[[int], list[Tensor]]) -> Callable[[int], list[Tensor]]:
        RUNS[name] = function
        return function

    return register


def _place(stream: int, dist: str = "normal") -> dict:
    return {"streams": stream, "offsets": OFFSET, "dist": dist}


def _combine_runs() -> None:
    stochastic = {"rounding": "stochastic", "rounding_seed": 9}
    for dist in ("normal", "rademacher"):

        @_run(f"noise {dist}")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            return [zokernels.noise(NUMEL, seed=SEEDS[0], stream=stream, offset=OFFSET, dist=dist)]

        for count in (1, 2):

            @_run(f"combine {dist}, K = {count}")
            def _(stream: int, dist: str = dist, count: int = count) -> list[Tensor]:
                theta = _values()
                zokernels.combine_(theta, SEEDS[:count], COEFFS[:count], **_place(stream, dist))
                return [theta]

        @_run(f"combine {dist}, rows")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            theta = _values(40 * 125)
            where = {"streams": stream, "offsets": 200 * 2**28 + 75, "rows": [(125, 200)]}
            zokernels.combine_(theta, SEEDS, COEFFS, dist=dist, **where)
            return [theta]

        @_run(f"combine {dist}, many tensors")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            tensors = [_values(n) for n in (3, 4100, 9)]
            streams, offsets = [stream, stream ^ 1, stream ^ 2], [0, 5, 8 * 2**32 - 4]
            zokernels.combine_(tensors, SEEDS, COEFFS, streams=streams, offsets=offsets, dist=dist)
            return tensors

        @_run(f"fan_out {dist}")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            theta = _values()
            plus, minus = torch.empty_like(theta), torch.empty_like(theta)
            zokernels.fan_out_(theta, plus, minus, SEEDS[0], 0.1, **_place(stream, dist))
            return [plus, minus]

        @_run(f"spread {dist}")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            x, out = _values(), torch.empty(2, NUMEL)
            zokernels.spread(out, x, SEEDS, COEFFS, stream=stream, offset=OFFSET, dist=dist)
            return [out]

        @_run(f"project {dist}")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            return [zokernels.project(_values(300), SEEDS, **_place(stream, dist))]

        @_run(f"requantize {dist}, to nearest")
        def _(stream: int, dist: str = dist) -> list[Tensor]:
            q = (30 * _values()).to(torch.int8)
            zokernels.requantize_(q, SEEDS, [9.0, 3.0], rounding="nearest", **_place(stream, dist))
            return [q]

    for dtype in (torch.bfloat16, torch.float16):

        @_run(f"rounding alone, {dtype}")
        def _(stream: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            theta = _values(dtype=dtype)
            zokernels.combine_(theta, [], [], decay=0.97, **_place(stream), **stochastic)
            return [theta]

    @_run("rounding alone, rows")
    def _(stream: int) -> list[Tensor]:
        theta = _values(40 * 128, torch.bfloat16)
        zokernels.combine_(
            theta, [], [], decay=0.97, streams=stream, offsets=64, rows=[(128, 256)], **stochastic
        )
        return [theta]

    @_run("rounding alone, int8")
    def _(stream: int) -> list[Tensor]:
        q = (30 * _values()).to(torch.int8)
        zokernels.requantize_(q, [], [], decay=0.7, rounding_seed=9, **_place(stream))
        return [q]

    @_run("mask alone")
    def _(stream: int) -> list[Tensor]:
        # The coefficient of a constant direction: a state's momentum, which a mask drops or keeps.
        theta, state = _values(), torch.ones(NUMEL)
        hyper = [0.1, 0.9, 0.7, 0.01]
        zokernels.update_(
            theta, "momentum", hyper, [], [], first=state, mask_seed=4, density=0.5, **_place(stream)
        )
        return [theta]


def _other_runs() -> None:
    stochastic = {"rounding": "stochastic", "rounding_seed": 9}

    @_run("rounding of states alone")
    def _(stream: int) -> list[Tensor]:
        # fp32 weights are not rounded and no noise is drawn: only the states can differ.
        theta, first, second = _values(), _values(dtype=torch.bfloat16), _values(dtype=torch.bfloat16).abs()
        hyper = [0.1, 0.9, 0.1, 0.99, 0.01, 0.02, 1.3, 1e-3]
        zokernels.update_(
            theta, "adam", hyper, [], [], first=first, second=second, **_place(stream), **stochastic
        )
        return [first, second]

    @_run("update adam, noise")
    def _(stream: int) -> list[Tensor]:
        theta, first, second = _values(), _values(), _values().abs()
        hyper = [0.1, 0.9, 0.1, 0.99, 0.01, 0.02, 1.3, 1e-3]
        zokernels.update_(theta, "adam", hyper, SEEDS, COEFFS, first=first, second=second, **_place(stream))
        return [theta, first, second]

    @_run("low_rank, rounding")
    def _(stream: int) -> list[Tensor]:
        theta = _values(40 * 72, torch.bfloat16).view(40, 72)
        left, right = _values(40 * 3).view(1, 40, 3), _values(72 * 3).view(1, 72, 3)
        zokernels.low_rank_(theta, left, right, 0.1, streams=stream, offsets=11, **stochastic)
        return [theta]

    @_run("squared_norm")
    def _(stream: int) -> list[Tensor]:
        return [zokernels.squared_norm(SEEDS, [NUMEL], streams=[stream], offsets=[OFFSET])]

    @_run("gram")
    def _(stream: int) -> list[Tensor]:
        return [zokernels.gram(SEEDS, [NUMEL], streams=[stream], offsets=[OFFSET])]

    for wire in ("bf16", "int8"):

        def encoded(wire: str) -> tuple[Tensor, Tensor]:
            theta = _values(dtype=torch.bfloat16)
            buffer = torch.zeros(zokernels.wire_bytes(NUMEL, wire, OFFSET), dtype=torch.uint8)
            zokernels.encode(buffer, theta, wire, offsets=OFFSET)
            return theta, buffer

        @_run(f"decode {wire}")
        def _(stream: int, wire: str = wire) -> list[Tensor]:
            theta, buffer = encoded(wire)
            zokernels.decode(theta, buffer, wire, SEEDS, COEFFS, **_place(stream))
            return [theta]

        @_run(f"decode_fan_out {wire}")
        def _(stream: int, wire: str = wire) -> list[Tensor]:
            theta, buffer = encoded(wire)
            plus, minus = torch.empty_like(theta), torch.empty_like(theta)
            zokernels.decode_fan_out(plus, minus, buffer, wire, SEEDS[0], 0.1, **_place(stream))
            return [plus, minus]


_combine_runs()
_other_runs()


_LOW = 0x9ABCDEF1
#: Streams, any two of which differ only in bits above the 32nd.
STREAMS = (_LOW, 1 << 32 | _LOW, 1 << 47 | _LOW, 1 << 55 | _LOW, 0xFFFFFF << 32 | _LOW)


def same(a: Tensor, b: Tensor) -> bool:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(a.view(kinds[a.element_size()]), b.view(kinds[b.element_size()]))


def check(name: str, streams: Sequence[int] = STREAMS) -> None:
    """Checks that each stream gives the bits of the reference, and that no two streams give the same."""
    run, seen = RUNS[name], []
    for stream in streams:
        got = [t.clone() for t in run(stream)]
        with zokernels.backend("reference"):
            want = run(stream)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert same(a, b), f"{name}: tensor {i} of stream {stream:#x} is not the reference's"
            for other in seen:
                assert not same(a, other[i]), f"{name}: tensor {i} is the same for streams that are not"
        seen.append(got)
