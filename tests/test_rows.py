"""rows of combine and update_: a shard of a matrix's columns has the bits of the whole matrix, on every
backend.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DISTS,
    DTYPES,
    SENTINELS,
    STATE_DTYPES,
    assert_same_bits,
    check_backend,
    placed,
    random_values,
)
from test_update import random_hyper

import zokernels
from zokernels.contract import seed_to_int64
from zokernels.ops.update import RULES


def random_rows(rng, rule=None, *, aligned=None, **fixed):
    """Arguments of :func:`run`: rows of matrices, at any place or ``aligned`` to eight, and whole tensors.

    ``shapes``: (height, width, length) of each; ``first``: the row of its matrix with which each begins;
    ``plain``: one coefficient a direction, neither masks nor curvature."""
    shapes, first_row, plain = (fixed.pop(name, None) for name in ("shapes", "first", "plain"))
    dtype = fixed.pop("dtype", None) or rng.choice(DTYPES)
    count = fixed.pop("count", None)
    count = 1 if rule == "hizoo" else rng.choice([0, 1, 2, 3]) if count is None else count
    unit = 8 if (rng.random() < 0.5 if aligned is None else aligned) else 1
    buffers, parts, rows, offsets = [], [], [], []
    for shape in shapes or [None] * rng.randrange(1, 4):
        length = unit * rng.randrange(1, 400 // unit)
        width = unit * rng.randrange(1, length // unit + 1)
        height, width, length = shape or (rng.randrange(12), width, length)
        column = unit * rng.randrange((length - width) // unit + 1)
        first = rng.choice([0, rng.randrange(100), rng.randrange(2**30), 8 * 2**32 // length - height // 2])
        first = first if first_row is None else first_row
        begin = 0 if unit == 8 else rng.randrange(SENTINELS + 1)
        buffers.append(random_values(height * width + 2 * SENTINELS, dtype, rng))
        parts.append(slice(begin, begin + height * width))
        rows.append((width, length) if shape or rng.random() < 0.9 else None)
        offsets.append(max(0, first) * length + column)
    sizes = [p.stop - p.start for p in parts]
    kwargs = {
        "seeds": torch.tensor([seed_to_int64(rng.getrandbits(64)) for _ in range(count)], dtype=torch.int64),
        "coeffs": torch.tensor([rng.gauss(0, 1) * 10.0 ** rng.randrange(-4, 1) for _ in range(count)]),
        "streams": [rng.getrandbits(56) for _ in sizes],
        "offsets": offsets,
        "rows": rows,
        "dist": rng.choice(DISTS),
        "decay": rng.choice([None, 1.0, 0.97]),
        "rounding": rng.choice(["nearest", "stochastic"]),
        "rounding_seed": rng.getrandbits(64),
    }
    extras = lambda chance: not plain and rng.random() < chance
    if extras(0.3):
        kwargs["coeffs"] = torch.randn(len(sizes), count) * 0.1
    if extras(0.4):
        places = zip(sizes, offsets, rows, strict=True)
        kwargs["masks"] = [zokernels.pack_mask(torch.rand(n) < 0.5, offset, row) for n, offset, row in places]
    if extras(0.3):
        kwargs |= {"mask_seed": rng.getrandbits(64), "density": rng.random()}
    args = {"buffers": buffers, "parts": parts, "rule": rule, **kwargs, **fixed}
    if rule is None:
        if extras(0.3):
            args["curvature"] = [random_values(n, rng.choice(STATE_DTYPES[:1]), rng) for n in sizes]
        return args
    dtypes = [rng.choice(STATE_DTYPES) for _ in range(RULES[rule][0])] + [None, None]
    for name, kind in zip(("first", "second"), dtypes, strict=False):
        args[name] = [] if kind is None else [random_values(b.numel(), kind, rng) for b in buffers]
    return {**args, "hyper": random_hyper(rule, count, rng)}


def large_rows(rng, width, chunk, rule=None, **fixed):
    """Arguments of :func:`run` on rows of two or three chunks and a few more; aligned to eight where
    ``width`` is.

    The lower counter word wraps inside the first tensor or on its way from one row to the next.
    """
    unit = 1 if width % 8 else 8
    # of the width's length it would be one piece
    length = width + unit * rng.choice([1, 32, rng.randrange(1, 5000)])
    height = -(-9 * chunk // (4 * width))
    first = 8 * 2**32 // length - rng.randrange(height)
    shapes = [(height, width, length), (1 + 1000 // width, width, length)]
    return random_rows(rng, rule, aligned=unit == 8, shapes=shapes, first=first, **fixed)


#: Aligned to eight: less than a warp's vecs, parts of a Rademacher tile, a tile, about a chunk and more.
WIDTHS = (8, 40, 512, 1376, 4096, 24584, 40000)


def run(buffers, parts, rule, first=(), second=(), hyper=None, **kwargs):
    if rule is None:
        zokernels.combine_(placed(buffers, parts), **kwargs)
    else:
        states = {
            "first": placed(first, parts) if first else (),
            "second": placed(second, parts) if second else (),
        }
        zokernels.update_(placed(buffers, parts), rule, hyper, **states, **kwargs)
    return [*buffers, *first, *second]


@pytest.mark.parametrize("repeat", range(12))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_rows(rng), threads=(1, 3))
    check_backend(run, random_rows(rng, rng.choice(list(RULES))))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_a_matrix_has_the_bits_of_the_whole(cpu_backend, rng, dtype, dist):
    for _ in range(6):
        shape = rng.randrange(1, 9), rng.choice([8 * rng.randrange(1, 40), rng.randrange(1, 300)])
        top, left = rng.randrange(shape[0]), rng.randrange(shape[1])
        box = (
            slice(top, rng.randrange(top + 1, shape[0] + 1)),
            slice(left, rng.randrange(left + 1, shape[1] + 1)),
        )
        whole, keep, h = (
            random_values(shape[0] * shape[1], dtype, rng).view(shape),
            torch.rand(shape) < 0.5,
            None,
        )
        options = {"seeds": [1, 2], "coeffs": [0.1, -0.03], "streams": [rng.getrandbits(56)], "dist": dist}
        options |= {"decay": 0.9, "rounding": "stochastic", "rounding_seed": 5}
        h = torch.rand(shape) + 0.1
        part, offset, row = whole[box].contiguous(), top * shape[1] + left, (box[1].stop - left, shape[1])
        out = torch.full_like(part, 7.0)
        mask = zokernels.pack_mask(keep[box], offset, row)
        zokernels.combine(
            out, part, **options, offsets=[offset], rows=[row], masks=[mask], curvature=[h[box].contiguous()]
        )
        zokernels.combine_(whole, **options, masks=[zokernels.pack_mask(keep)], curvature=[h])
        assert_same_bits(out, whole[box].contiguous(), f"{shape} {box}")


BAD = {
    "one": ({"rows": [(4, 8)] * 2}, "rows: expected 1 pairs or None"),
    "wide": ({"rows": [(8, 4)]}, r"rows\[0\]: expected \(width, length\), width <= length"),
    "divisor": ({"rows": [(5, 8)]}, r"a divisor of 16, got \(5, 8\)"),
    "negative": ({"rows": [(-4, 8)]}, r"rows\[0\]"),
    "outside": (
        {"rows": [(4, 8)], "offsets": [5]},
        r"offsets\[0\]: expected a row of 4 inside one of 8, got 5",
    ),
    "far": ({"rows": [(4, 2**62)], "offsets": [0]}, r"offsets\[0\]: .*2\^63"),
    "mask": (
        {"rows": [(4, 9)], "masks": [torch.zeros(2, dtype=torch.uint8)]},
        r"masks\[0\]: expected 8 bytes for 16",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_errors_before_anything_is_written(options, message):
    theta = torch.ones(16)
    with pytest.raises(ValueError, match=message):
        zokernels.combine_([theta], 1, 0.1, streams=[0], **options)
    assert torch.equal(theta, torch.ones(16))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(12))
def test_gpu_equals_reference(backend, rng, repeat):
    with zokernels.backend(backend):
        for _ in range(4):
            check_backend(run, random_rows(rng), "cuda")
        check_backend(run, random_rows(rng, rng.choice(list(RULES))), "cuda")
