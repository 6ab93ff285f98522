"""The registered operations: schemas, fakes, opcheck, torch.compile, and every error."""

from __future__ import annotations

import pytest
import torch

import zokernels

ops = torch.ops.zokernels


def combine_args(dtype=torch.float32, **changes):
    args = {
        "params": [torch.randn(5, 7).to(dtype), torch.randn(9).to(dtype)],
        "seeds": torch.tensor([1, 2]),
        "coeffs": torch.tensor([0.5, 0.25]),
        "streams": [3, 4],
        "offsets": [0, 8],
        "dist": "normal",
        "decay": torch.tensor([0.9]),
        "rounding_seed": torch.tensor([5]),
    }
    return {**args, **changes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_opcheck_combine(dtype, dist, cpu_backend):
    args = combine_args(dtype, dist=dist)
    torch.library.opcheck(ops.combine_, tuple(args.values()))
    out = [torch.empty_like(p) for p in args["params"]]
    torch.library.opcheck(ops.combine, (out, *args.values()))
    torch.library.opcheck(ops.combine_, tuple(combine_args(dtype, decay=None, rounding_seed=None).values()))


def test_opcheck_noise_and_derive_seed(cpu_backend):
    torch.library.opcheck(ops.noise, ((3, 5), torch.tensor([4]), 1, 2, "normal"))
    torch.library.opcheck(ops.derive_seed, (torch.tensor(4), torch.tensor([1, 2]), torch.tensor(0)))


def test_schemas_exist_without_a_library():
    assert str(ops.combine_.default._schema) == (
        "zokernels::combine_(Tensor(a!)[] params, Tensor seeds, Tensor coeffs, int[] streams, int[] offsets, str dist, "
        "Tensor? decay, Tensor? rounding_seed, Tensor[]? masks=None, Tensor? mask_seed=None, int mask_keep=65536, "
        "Tensor[]? curvature=None) -> ()"
    )


def test_compiled_function_gives_the_same_bits():
    theta, compiled = torch.randn(1000), None

    def step(x, seed, c):
        y = x * 2
        torch.ops.zokernels.combine_([y], seed, c, [1], [0], "normal", None, None)
        return y + 1

    seed, c = torch.tensor([3]), torch.tensor([0.1])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(theta, seed, c), step(theta, seed, c))


BASE = torch.randn(64)

BAD_COMBINE = {
    "integer dtype": (dict(params=[torch.arange(9)], streams=[1], offsets=[0]), TypeError, r"params\[0\]: .*int64"),
    "complex dtype": (
        dict(params=[torch.zeros(9, dtype=torch.complex64)], streams=[1], offsets=[0]),
        TypeError,
        r"params\[0\]: .*complex64",
    ),
    "float64": (dict(params=[torch.zeros(9).double()], streams=[1], offsets=[0]), TypeError, r"params\[0\]: .*float64"),
    "non-contiguous": (
        dict(params=[torch.zeros(4, 6).t()], streams=[1], offsets=[0]),
        ValueError,
        r"params\[0\]: expected a contiguous tensor, got shape \(6, 4\), strides \(1, 6\)",
    ),
    "expanded": (dict(params=[torch.zeros(1).expand(6)], streams=[1], offsets=[0]), ValueError, "contiguous"),
    "mixed dtypes": (dict(params=[torch.zeros(4), torch.zeros(4).half()]), TypeError, r"params\[1\]: expected dtype"),
    "mixed devices": (
        dict(params=[torch.zeros(4), torch.zeros(4, device="meta")]),
        ValueError,
        r"params\[1\]: expected device cpu.*got meta",
    ),
    "same tensor twice": (dict(params=[BASE, BASE]), ValueError, r"share no memory.*overlap with params"),
    "overlapping views": (dict(params=[BASE[:40], BASE[39:]]), ValueError, r"overlap with params\[0\]"),
    "contained view": (dict(params=[BASE[10:20], BASE]), ValueError, "overlap with"),
    "streams too short": (dict(streams=[1]), ValueError, r"streams: expected 2 integers.*got 1"),
    "offsets too long": (dict(offsets=[1, 2, 3]), ValueError, r"offsets: expected 2 integers.*got 3"),
    "negative offset": (dict(offsets=[0, -8]), ValueError, r"offsets\[1\]: .*got -8"),
    "offset too large": (dict(offsets=[2**63 - 1, 0]), ValueError, r"offsets\[0\]: .*< 2\^63"),
    "stream too large": (dict(streams=[2**32, 0]), ValueError, r"streams\[0\]: expected an integer in \[0, 2\^32\)"),
    "coeffs too short": (dict(coeffs=torch.tensor([0.5])), ValueError, r"coeffs: expected 2 values.*got 1"),
    "coeffs dtype": (dict(coeffs=torch.tensor([0.5, 1]).double()), TypeError, r"coeffs: expected dtype torch.float32"),
    "seeds dtype": (dict(seeds=torch.tensor([1, 2]).int()), TypeError, r"seeds: expected dtype torch.int64"),
    "seeds shape": (dict(seeds=torch.tensor([[1, 2]])), ValueError, r"seeds: expected a contiguous 1-D tensor"),
    "unknown dist": (dict(dist="cauchy"), ValueError, r"dist: expected 'normal' or 'rademacher', got 'cauchy'"),
    "two decays": (dict(decay=torch.tensor([1.0, 2.0])), ValueError, r"decay: expected one value, got 2"),
}


@pytest.mark.parametrize("case", BAD_COMBINE, ids=str)
def test_bad_input_is_refused_before_anything_is_written(case, cpu_backend):
    changes, error, message = BAD_COMBINE[case]
    args = combine_args(**changes)
    before = [p.clone() for p in args["params"]]
    with pytest.raises(error, match=f"^combine_: .*{message}"):
        ops.combine_(*args.values())
    for p, b in zip(args["params"], before, strict=True):
        assert p.device.type == "meta" or torch.equal(p, b)


def test_out_of_place_errors(cpu_backend):
    args = combine_args()
    params = args["params"]
    for out, message in [
        ([torch.empty(5, 7)], r"combine: out: expected 2 tensors, as in params, got 1"),
        (
            [torch.empty(7, 5), torch.empty(9)],
            r"combine: out\[0\]: expected shape \(5, 7\), as params\[0\], got \(7, 5\)",
        ),
        (params, r"combine: .*share no memory"),
        ([torch.empty(5, 7), params[1]], r"combine: .*share no memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.combine(out, *args.values())
    # Two read tensors may be one: only written memory must be its own.
    shared = torch.randn(9)
    zokernels.combine([torch.empty(9), torch.empty(9)], [shared, shared], 1, 0.1, streams=[0, 1])


def test_wrapper_errors():
    theta = torch.randn(4)
    for kwargs, error, message in [
        (dict(rounding="up"), ValueError, "combine_: rounding: expected 'nearest' or 'stochastic', got 'up'"),
        (dict(rounding="stochastic"), ValueError, "combine_: rounding_seed: expected a seed"),
        (dict(decay="0.9"), TypeError, "combine_: decay: expected numbers"),
    ]:
        with pytest.raises(error, match=message):
            zokernels.combine_(theta, 1, 0.5, streams=0, **kwargs)
    with pytest.raises(TypeError, match="combine_: seeds: expected integers"):
        zokernels.combine_(theta, 1.5, 0.5, streams=0)
    with pytest.raises(TypeError, match="combine_: coeffs: expected numbers"):
        zokernels.combine_(theta, 1, None, streams=0)


def test_noise_errors():
    for kwargs, message in [
        (dict(stream=-1), "noise: stream"),
        (dict(offset=-1), "noise: offset"),
        (dict(dist="uniform"), "noise: dist"),
    ]:
        with pytest.raises(ValueError, match=message):
            zokernels.noise(4, seed=1, **kwargs)
    with pytest.raises(ValueError, match="noise: shape"):
        zokernels.noise((-1,), seed=1)
    with pytest.raises(TypeError, match="noise: seed"):
        zokernels.noise(4, seed=torch.tensor([1, 2]))


def test_derive_seed_errors():
    with pytest.raises(ValueError, match="derive_seed: step"):
        zokernels.derive_seed(1, -1)
    with pytest.raises(ValueError, match="derive_seed: k"):
        zokernels.derive_seed(1, 1, 2**32)
    with pytest.raises(TypeError, match=r"derive_seed: step: .*float32"):
        zokernels.derive_seed(torch.tensor(1), torch.tensor(1.0))
