"""low_rank_linear: the reference against products in float64, and every kernel against the reference, bit for
bit.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_same_bits, check_backend, random_values, rounding_bound

import zokernels


def run(y, x, left, right, coeffs, **kwargs):
    zokernels.low_rank_linear_(y, x, left, right, coeffs, **kwargs)
    return [y, x]


def random_linear(rng, dtype=None, shape=None, rank=None, rows=None, specials=True):
    """Arguments of run; y and x, at any alignment, are views into buffers."""
    dtype = dtype or rng.choice(DTYPES)
    m, n = shape or (
        rng.choice([1, 8, 64, rng.randrange(1, 300)]),
        rng.choice([0, 1, 64, rng.randrange(300)]),
    )
    rank = rank or rng.choice([1, 2, 3, 8, 19, 64])
    if rows is None:
        rows = [rng.choice([0, 1, 2, rng.randrange(9)]) for _ in range(rng.randrange(1, 5))]
    members, total = len(rows), sum(rows)

    def values(count, kind):
        return random_values(count, kind, rng) if specials else torch.randn(count).to(kind)

    def view(columns):
        begin = rng.choice([0, 8, rng.randrange(9)])
        buffer = values(total * columns + 9, dtype)
        return buffer[begin : begin + total * columns].view(total, columns)

    def factor(*shape):
        count = rng.choice([g for g in range(1, members + 1) if members % g == 0])
        return values(count * torch.Size(shape).numel(), torch.float32).view(count, *shape)

    return {
        "y": view(m),
        "x": view(n),
        "left": factor(m, rank),
        "right": factor(n, rank),
        "coeffs": torch.randn(members),
        "rows": rows,
        "bias": rng.choice([None, factor(m)]),
        "add": rng.choice([True, False]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("add", [True, False])
def test_reference_follows_the_formula(dtype, with_bias, add, rng):
    """Members 0 and 1 share a left factor, as do 2 and 3; a bias they share all."""
    rows, m, n, rank = [3, 0, 4, 1], 70, 200, 4
    out, x = torch.randn(8, m).to(dtype), torch.randn(8, n).to(dtype)
    left, right = torch.randn(2, m, rank), torch.randn(4, n, rank)
    coeffs, bias = torch.randn(4), torch.randn(1, m) if with_bias else None
    member = torch.repeat_interleave(torch.arange(4), torch.tensor(rows))

    def linear(out, x, left, right, coeffs, bias):
        inner = torch.einsum("in,inr->ir", x, right[member])
        added = torch.einsum("ir,imr->im", inner, left[member // 2])
        product = coeffs[member, None] * (added if bias is None else added + bias)
        return out + product if add else product

    exact = [None if t is None else t.double() for t in (out, x, left, right, coeffs, bias)]
    want = linear(*exact)
    magnitude = linear(*(None if t is None else t.abs() for t in exact))
    # A chain of 4 fmas, 6 additions of neighbours, an fma for each of 4 ranks, the bias, the fma into out.
    bound = rounding_bound(want, dtype, magnitude, 4 + 6 + 4 + 2)
    with zokernels.backend("reference"):
        zokernels.low_rank_linear_(out, x, left, right, coeffs, rows=rows, bias=bias, add=add)
    assert ((out.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("repeat", range(10))
def test_kernels_equal_reference(cpu_kernel, rng, repeat):
    for _ in range(4):
        check_backend(run, random_linear(rng))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_every_number(cpu_kernel, dtype, rng):
    """So that the last columns end anywhere in a vector, a group of chains and a tile."""
    for size in (1, 7, 8, 9, 31, 63, 64, 65, 127, 128, 129, 200):
        shape = rng.choice([(size, 70), (70, size)])
        check_backend(run, random_linear(rng, dtype, shape, rank=rng.choice([1, 2, 5]), rows=[3, 2]))


def test_threads(cpu_kernel, rng):
    rows = [rng.randrange(60) for _ in range(9)]
    check_backend(run, random_linear(rng, shape=(576, 300), rank=3, rows=rows), threads=(1, 3))


def test_a_member_has_the_bits_it_has_alone(cpu_backend, rng):
    """No row's result depends on the rows beside it, nor on the members of its call."""
    args = random_linear(rng, shape=(130, 200), rank=5, rows=[4, 7, 2, 3], specials=False)
    together = args["y"].clone()
    zokernels.low_rank_linear_(together, **{k: v for k, v in args.items() if k != "y"})
    begin = 0
    for p, count in enumerate(args["rows"]):
        alone = args["y"][begin : begin + count].clone()
        own = lambda t, p=p: None if t is None else t[p * len(t) // 4 :][:1]
        zokernels.low_rank_linear_(
            alone, args["x"][begin : begin + count], own(args["left"]), own(args["right"]),
            args["coeffs"][p : p + 1], rows=[count], bias=own(args["bias"]), add=args["add"],
        )  # fmt: skip
        assert_same_bits(alone, together[begin : begin + count], f"member {p}")
        begin += count


def test_no_rows_and_no_columns(cpu_backend):
    factors = torch.randn(1, 5, 2), torch.randn(1, 0, 2), 1.0
    out = torch.ones(3, 5)
    zokernels.low_rank_linear_(out, torch.empty(3, 0), *factors, rows=[3])
    assert torch.equal(out, torch.ones(3, 5))
    zokernels.low_rank_linear_(torch.empty(0, 5), torch.empty(0, 0), *factors, rows=[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("repeat", range(10))
def test_gpu_equals_reference(backend, rng, repeat):
    for _ in range(4):
        with zokernels.backend(backend):
            check_backend(run, random_linear(rng), "cuda")
            check_backend(run, random_linear(rng, shape=(304, 576), rows=[16] * 4), "cuda")
