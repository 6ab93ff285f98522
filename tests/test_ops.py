"""The registered operations: schemas, fakes, opcheck, torch.compile, and every error."""

from __future__ import annotations

import inspect

import pytest
import torch

import zokernels
from zokernels.backends.terms import mask_bytes
from zokernels.ops.update import RULES

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


# One good call of every operation over parameters: what its arguments are called, in order.  Errors below
# change them.


def noise_args():
    return {
        "seeds": torch.tensor([1, 2]),
        "coeffs": torch.tensor([0.5, 0.25]),
        "streams": [3, 4],
        "offsets": [0, 13],
        "dist": "normal",
        "decay": torch.tensor([0.9]),
        "rounding_seed": torch.tensor([5]),
    }


def mask_args():
    masks = [torch.randint(256, (mask_bytes(n, at),), dtype=torch.uint8) for n, at in ((35, 0), (9, 13))]
    return {"masks": masks, "mask_seed": torch.tensor([7]), "mask_keep": 30000}


def tensors(dtype=torch.float32):
    return [torch.rand(5, 7).to(dtype), torch.rand(9).to(dtype)]


def matrices():
    return [torch.rand(5, 7), torch.rand(3, 2, 2)]


def factors():
    places = {k: v for k, v in noise_args().items() if k not in ("seeds", "dist")}
    return {
        "left": [torch.rand(2, 5, 4), torch.rand(2, 3, 1)],
        "right": [torch.rand(2, 7, 4), torch.rand(2, 4, 1)],
        **places,
    }


def update_args(rule):
    states, values = RULES[rule]
    noise = noise_args()
    if rule == "hizoo":
        noise |= {"seeds": torch.tensor([1]), "coeffs": torch.tensor([0.5])}
    first, second = tensors() if states else [], tensors(torch.bfloat16) if states > 1 else []
    hyper = torch.rand(values + (2 if rule == "adam_window" else 0))
    return {
        "params": tensors(),
        "first": first,
        "second": second,
        "rule": rule,
        "hyper": hyper,
        **noise,
        **mask_args(),
    }


CALLS = {
    "combine_": lambda: {"params": tensors(), **noise_args(), **mask_args(), "curvature": tensors()},
    "combine": lambda: {
        "out": tensors(),
        "params": tensors(),
        **noise_args(),
        **mask_args(),
        "curvature": tensors(),
    },
    "fan_out_": lambda: {
        "params": tensors(),
        "plus": tensors(),
        "minus": tensors(),
        "seed": torch.tensor([4]),
        "coeff": torch.tensor([0.1]),
        **noise_args(),
    },
    "spread": lambda: {
        "out": torch.rand(2, 5, 7),
        "x": torch.rand(5, 7),
        "seeds": torch.tensor([1, 2]),
        "coeffs": torch.tensor([0.5, 0.25]),
        "stream": 3,
        "offset": 8,
        "dist": "normal",
    },
    **{f"update_ {rule}": lambda rule=rule: update_args(rule) for rule in RULES},
    "low_rank_": lambda: {"params": matrices(), **factors()},
    "low_rank": lambda: {"out": matrices(), "params": matrices(), **factors()},
    "low_rank_linear_": lambda: {
        "y": torch.rand(5, 7),
        "x": torch.rand(5, 3),
        "left": torch.rand(2, 7, 4),
        "right": torch.rand(1, 3, 4),
        "coeffs": torch.tensor([0.5, 0.25]),
        "rows": [2, 3],
        "bias": torch.rand(2, 7),
    },
    "quantized_linear": lambda: {
        "x": torch.rand(3, 6),
        "weight": torch.randint(-127, 128, (5, 6), dtype=torch.int8),
        "scale": torch.rand(5, 2),
        "bias": torch.rand(5),
    },
    "requantize_": lambda: {
        "params": tensors(torch.int8),
        "low": -127,
        "high": 127,
        **noise_args(),
        **mask_args(),
    },
    "requantize": lambda: {
        "out": tensors(torch.int8),
        "params": tensors(torch.int8),
        "low": -127,
        "high": 127,
        **noise_args(),
        **mask_args(),
    },
    "project": lambda: {
        "tensors": tensors(),
        "seeds": torch.tensor([1, 2]),
        "streams": [3, 4],
        "offsets": [0, 13],
        "dist": "normal",
    },
    "squares": lambda: {
        "seeds": torch.tensor([1, 2]),
        "sizes": [30, 0],
        "streams": [3, 4],
        "offsets": [0, 13],
        "dist": "normal",
    },
}


def call(op, args):
    return getattr(ops, op.split()[0])(*args.values())


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op, cpu_backend):
    torch.library.opcheck(getattr(ops, op.split()[0]), tuple(CALLS[op]().values()))


def test_opcheck_noise_and_derive_seed(cpu_backend):
    torch.library.opcheck(ops.noise, ((3, 5), torch.tensor([4]), 1, 2, "normal"))
    torch.library.opcheck(ops.derive_seed, (torch.tensor(4), torch.tensor([1, 2]), torch.tensor(0)))


def test_schemas_exist_without_a_library():
    assert str(ops.combine_.default._schema) == (
        "zokernels::combine_(Tensor(a!)[] params, Tensor seeds, Tensor coeffs, int[] streams, int[] "
        "offsets, str dist, "
        "Tensor? decay, Tensor? rounding_seed, Tensor[]? masks=None, Tensor? mask_seed=None, int "
        "mask_keep=65536, "
        "Tensor[]? curvature=None, int[]? widths=None, int[]? lengths=None) -> ()"
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


def test_plain_numbers_and_names_inside_a_compiled_function():
    """Seeds as numbers, the default device and streams by name: one graph, and the bits of eager mode."""

    def step(x):
        y = x * 2
        zokernels.combine_(y, 3, 0.1, streams=zokernels.stream_of("layer.weight"))
        return y + zokernels.noise(x.shape, seed=4, stream=zokernels.stream_of("layer.bias"))

    x = torch.randn(1000)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x))


def test_exported_with_sizes_that_vary():
    class Noisy(torch.nn.Module):
        def forward(self, x, seed):
            y = x.clone()
            zokernels.combine_(y, seed, 0.1, streams=zokernels.stream_of("x"))
            return y + zokernels.noise(x.shape, seed=7)

    size, seed = torch.export.Dim("size", min=2), torch.tensor([3])
    program = torch.export.export(
        Noisy(), (torch.randn(64), seed), dynamic_shapes={"x": {0: size}, "seed": None}
    )
    x = torch.randn(1001)
    assert torch.equal(program.module()(x, seed), Noisy()(x, seed))


def test_vmap_is_one_call_for_each_member():
    seeds, coeffs, x = torch.tensor([5, 6, 7]), torch.randn(3), torch.randn(3, 40)
    noise = lambda seed: zokernels.noise((2, 20), seed=seed, stream=9)
    assert torch.equal(torch.vmap(noise)(seeds), torch.stack([noise(seed) for seed in seeds]))
    derived = torch.vmap(lambda seed: zokernels.derive_seed(seed, 4, torch.arange(2)))(seeds)
    assert torch.equal(derived, zokernels.derive_seed(seeds[:, None], 4, torch.arange(2)))

    def moved(x, seed, c):
        x = x.clone()
        zokernels.combine_(x, seed, c, streams=1, offsets=8)
        y = torch.empty_like(x)
        zokernels.combine([y], [x], seed, c, streams=2)
        return x, y

    members = [moved(*args) for args in zip(x, seeds, coeffs, strict=True)]
    for ours, theirs in zip(torch.vmap(moved)(x, seeds, coeffs), zip(*members, strict=True), strict=True):
        assert torch.equal(ours, torch.stack(theirs))
    twice = torch.vmap(torch.vmap(noise))(seeds.expand(2, 3))
    assert torch.equal(twice, torch.stack([noise(seed) for seed in seeds]).expand(2, 3, 2, 20))


def test_vmap_over_seeds_alone_cannot_write_to_one_tensor():
    x = torch.randn(8)
    before = x.clone()
    with pytest.raises(ValueError, match="combine_: params: expected tensors over whose dimension vmap runs"):
        torch.vmap(lambda seed: zokernels.combine_(x, seed, 1.0, streams=0), out_dims=None)(torch.arange(3))
    assert torch.equal(x, before)


BASE = torch.linspace(-1, 1, 64)

BAD_COMBINE = {
    "integer dtype": (
        dict(params=[torch.arange(9)], streams=[1], offsets=[0]),
        TypeError,
        r"params\[0\]: .*int64",
    ),
    "complex dtype": (
        dict(params=[torch.zeros(9, dtype=torch.complex64)], streams=[1], offsets=[0]),
        TypeError,
        r"params\[0\]: .*complex64",
    ),
    "float64": (
        dict(params=[torch.zeros(9).double()], streams=[1], offsets=[0]),
        TypeError,
        r"params\[0\]: .*float64",
    ),
    "non-contiguous": (
        dict(params=[torch.zeros(4, 6).t()], streams=[1], offsets=[0]),
        ValueError,
        r"params\[0\]: expected a contiguous tensor, got shape \(6, 4\), strides \(1, 6\)",
    ),
    "expanded": (dict(params=[torch.zeros(1).expand(6)], streams=[1], offsets=[0]), ValueError, "contiguous"),
    "mixed dtypes": (
        dict(params=[torch.zeros(4), torch.zeros(4).half()]),
        TypeError,
        r"params\[1\]: expected dtype",
    ),
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
    "stream too large": (
        dict(streams=[2**56, 0]),
        ValueError,
        r"streams\[0\]: expected an integer in \[0, 2\^56\)",
    ),
    "coeffs too short": (dict(coeffs=torch.tensor([0.5])), ValueError, r"coeffs: expected 2 values.*got 1"),
    "coeffs dtype": (
        dict(coeffs=torch.tensor([0.5, 1]).double()),
        TypeError,
        r"coeffs: expected dtype torch.float32",
    ),
    "seeds dtype": (dict(seeds=torch.tensor([1, 2]).int()), TypeError, r"seeds: expected dtype torch.int64"),
    "seeds shape": (
        dict(seeds=torch.tensor([[1, 2]])),
        ValueError,
        r"seeds: expected a contiguous 1-D tensor",
    ),
    "unknown dist": (
        dict(dist="cauchy"),
        ValueError,
        r"dist: expected 'normal' or 'rademacher', got 'cauchy'",
    ),
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


V, T = ValueError, TypeError
ONE_MASK = torch.zeros(5, dtype=torch.uint8)
LEFT, RIGHT = torch.rand(2, 5, 4), torch.rand(2, 4, 1)

#: (operation, argument changed, its bad value, error, message)
BAD = [
    ("combine_", "coeffs", torch.rand(2, 3), V, r"coeffs: expected \[2\] or a contiguous \[2, 2\] "
                                                r".*shape \(2, 3\)"),
    ("combine_", "coeffs", torch.rand(2, 2).t(), V, r"coeffs: .*strides \(1, 2\)"),
    ("combine_", "coeffs", torch.rand(2, 2).double(), T, r"coeffs: expected dtype torch.float32"),
    ("combine_", "coeffs", torch.rand(2, 2, device="meta"), V, "coeffs: expected the parameters' device cpu"),
    ("combine_", "masks", [ONE_MASK], V, "masks: expected 2 tensors, as in params, got 1"),
    ("combine_", "masks", [ONE_MASK, ONE_MASK], V, r"masks\[1\]: expected 2 bytes for 9 elements "
                                                   r"from index 13"),
    ("combine_", "masks", [ONE_MASK.bool(), ONE_MASK], T, r"masks\[0\]: expected dtype "
                                                          r"torch.uint8.*got torch.bool"),
    ("combine_", "masks", [ONE_MASK.to("meta"), ONE_MASK], V, r"masks\[0\]: expected device cpu.*got meta"),
    ("combine_", "masks", [torch.zeros(10, dtype=torch.uint8)[::2], ONE_MASK], V, r"masks\[0\]: "
                                                                                  r"expected a contiguous"),
    ("combine_", "mask_seed", torch.tensor([1, 2]), V, "mask_seed: expected one value, got 2"),
    ("combine_", "mask_seed", torch.tensor([1.0]), T, "mask_seed: expected dtype torch.int64"),
    ("combine_", "mask_keep", 65537, V, r"mask_keep: expected an integer in \[0, 65536\], got 65537"),
    ("combine_", "mask_keep", -1, V, "mask_keep: .*got -1"),
    ("combine_", "curvature", [torch.rand(5, 7)], V, "curvature: expected 2 tensors, as in params, got 1"),
    ("combine_", "curvature", tensors(torch.float16), T, r"curvature\[0\]: expected one dtype of "
                                                         r".*got torch.float16"),
    ("combine_", "curvature", [torch.rand(5, 7), torch.rand(8)], V, r"curvature\[1\]: expected shape \(9,\)"),
    ("combine_", "curvature", [torch.rand(7, 5).t(), torch.rand(9)], V, r"curvature\[0\]: expected a "
                                                                        r"contiguous"),
    ("combine", "out", tensors(torch.bfloat16), T, r"out\[0\]: expected dtype torch.float32, as params\[0\]"),
    ("fan_out_", "coeff", torch.tensor([0.1, 0.2]), V, "coeff: expected one value, got 2"),
    ("fan_out_", "coeffs", torch.rand(2, 2), V, r"coeffs: expected a contiguous 1-D tensor, got "
                                                r"shape \(2, 2\)"),
    ("fan_out_", "minus", tensors()[:1], V, "minus: expected 2 tensors, as in params, got 1"),
    ("spread", "out", torch.rand(3, 5, 7), V, r"out: expected a contiguous tensor of shape \(2, 5, 7\), got"),
    ("spread", "out", torch.rand(2, 5, 7).bfloat16(), T, "out: expected torch.float32 on cpu, as x"),
    ("spread", "out", torch.rand(2, 7, 5).transpose(1, 2), V, "out: expected a contiguous tensor"),
    ("spread", "x", torch.arange(35).view(5, 7), T, r"x\[0\]: expected dtype float32.*got torch.int64"),
    ("spread", "stream", 2**56, V, r"streams\[0\]: expected an integer in \[0, 2\^56\)"),
    ("spread", "offset", -1, V, r"offsets\[0\]: .*got -1"),
    ("spread", "coeffs", torch.rand(1), V, "coeffs: expected 2 values, one for each seed, got 1"),
    ("spread", "coeffs", torch.rand(1, 2), V, r"coeffs: expected a contiguous 1-D tensor, got shape "
                                              r"\(1, 2\)"),
    ("spread", "dist", "cauchy", V, "dist: expected 'normal' or 'rademacher', got 'cauchy'"),
    ("update_ adam", "rule", "lion", V, "rule: expected 'momentum' or .*got 'lion'"),
    ("update_ adam", "first", [], V, "first: expected 2 tensors, as in params, got 0"),
    ("update_ adam", "second", [], V, "second: expected 2 tensors, as in params, got 0"),
    ("update_ momentum", "second", tensors(), V, "second: expected no state for rule 'momentum', got "
                                                 "2 tensors"),
    ("update_ sign", "first", tensors(), V, "first: expected no state for rule 'sign', got 2 tensors"),
    ("update_ adam", "first", tensors(torch.float16), T, r"first\[0\]: expected one dtype of .*got "
                                                         r"torch.float16"),
    ("update_ adam", "first", [torch.rand(5, 7), torch.rand(9).bfloat16()], T, r"first\[1\]: .*got "
                                                                               r"torch.bfloat16"),
    ("update_ adam", "first", [torch.rand(7, 5), torch.rand(9)], V, r"first\[0\]: expected shape \(5, 7\)"),
    ("update_ adam", "hyper", torch.rand(7), V, "hyper: expected 8 values for rule 'adam', got 7"),
    ("update_ adam", "hyper", torch.rand(8).double(), T, "hyper: expected dtype torch.float32"),
    ("update_ adam_window", "hyper", torch.rand(2), V, "hyper: expected 4 values for rule "
                                                       "'adam_window', got 2"),
    ("update_ adam", "masks", [ONE_MASK], V, "masks: expected 2 tensors"),
    ("low_rank_", "left", [LEFT], V, "left: expected 2 tensors, as in params, got 1"),
    ("low_rank_", "left", [LEFT, torch.rand(2, 4, 1)], V, r"left\[1\]: expected .*\(2, 3, 1\), got "
                                                          r"\(2, 4, 1\)"),
    ("low_rank_", "right", [torch.rand(2, 7, 3), RIGHT], V, r"right\[0\]: expected .*\(2, 7, 4\), "
                                                            r"got \(2, 7, 3\)"),
    ("low_rank_", "right", [torch.rand(2, 7, 4).half(), RIGHT], T, r"right\[0\]: expected "
                                                                   r"torch.float32 on cpu"),
    ("low_rank_", "params", tensors(), V, r"params\[1\]: expected a matrix"),
    ("low_rank_", "coeffs", torch.rand(3), V, r"left\[0\]: expected a contiguous tensor of shape "
                                              r"\(3, 5, 4\)"),
    ("low_rank", "out", matrices()[:1], V, "out: expected 2 tensors, as in params, got 1"),
    ("low_rank_linear_", "y", torch.rand(7, 5).t(), V, "y: expected a contiguous matrix"),
    ("low_rank_linear_", "y", torch.rand(5, 7).double(), T, "y: expected dtype float32, bfloat16 or"),
    ("low_rank_linear_", "x", torch.rand(5, 3).half(), T, "x: expected dtype .*, got torch.float16"),
    ("low_rank_linear_", "x", torch.rand(4, 3), V, "x: expected 5 rows, as y, got 4"),
    ("low_rank_linear_", "left", torch.rand(2, 7, 65), V, r"left: expected factors of a rank in \[1, 64\]"),
    ("low_rank_linear_", "left", torch.rand(3, 7, 4), V, r"left: expected .* shape \(2, 7, 4\), or of"),
    ("low_rank_linear_", "right", torch.rand(2, 4, 4), V, r"right: expected .* shape \(2, 3, 4\), or of"),
    ("low_rank_linear_", "right", torch.rand(2, 3, 4).half(), T, "right: expected torch.float32 on cpu"),
    ("low_rank_linear_", "coeffs", torch.rand(2).half(), T, "coeffs: expected dtype torch.float32"),
    ("low_rank_linear_", "rows", [2, 2], V, "rows: expected 2 integers >= 0 with the sum 5"),
    ("low_rank_linear_", "rows", [6, -1], V, "rows: expected 2 integers >= 0 with the sum 5"),
    ("low_rank_linear_", "bias", torch.rand(2, 6), V, r"bias: expected .* shape \(2, 7\), or of"),
    ("requantize_", "params", tensors(), T, r"params\[0\]: expected dtype int8, got torch.float32"),
    ("requantize_", "low", 127, V, r"low, high: expected -128 <= low < high <= 127, got \(127, 127\)"),
    ("requantize_", "high", 128, V, r"low, high: .*got \(-127, 128\)"),
    ("requantize", "out", tensors(), T, r"out\[0\]: expected dtype int8, got torch.float32"),
    ("project", "tensors", [torch.arange(35), torch.rand(9)], T, r"tensors\[0\]: expected dtype "
                                                                 r".*got torch.int64"),
    ("project", "tensors", [torch.rand(7, 5).t(), torch.rand(9)], V, r"tensors\[0\]: expected a "
                                                                     r"contiguous tensor"),
    ("project", "streams", [3], V, "streams: expected 2 integers, one for each tensor of tensors, got 1"),
    ("project", "offsets", [0, -13], V, r"offsets\[1\]: .*got -13"),
    ("project", "seeds", torch.tensor([1.0]), T, "seeds: expected dtype torch.int64"),
    ("project", "dist", "cauchy", V, "dist: expected"),
    ("squares", "sizes", [30, -1], V, r"sizes: expected integers >= 0, got \[30, -1\]"),
    ("squares", "sizes", [30], V, "streams: expected 1 integers, one for each tensor of sizes, got 2"),
    ("squares", "offsets", [0, -13], V, r"offsets\[1\]: .*got -13"),
    ("squares", "seeds", torch.tensor([1.0]), T, "seeds: expected dtype torch.int64"),
    ("squares", "dist", "cauchy", V, "dist: expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "argument", "value", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_operation_refuses_bad_input(op, argument, value, error, message):
    args = CALLS[op]()
    assert argument in args
    args[argument] = value
    written = [
        args[name] for name in ("params", "out", "y", "plus", "minus", "first", "second") if name in args
    ]
    written = [t for group in written for t in ([group] if isinstance(group, torch.Tensor) else group)]
    before = [t.clone() for t in written]
    with pytest.raises(error, match=f"^{op.split()[0]}: {message}"):
        call(op, args)
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))


#: (operation, the argument written, the argument that it overlaps with)
OVERLAPS = [
    ("combine_", "params", "curvature"),
    ("combine", "out", "params"),
    ("combine", "out", "curvature"),
    ("fan_out_", "plus", "params"),
    ("fan_out_", "minus", "plus"),
    ("spread", "out", "x"),
    ("update_ momentum", "first", "params"),
    ("update_ adam", "second", "first"),
    ("low_rank_", "params", "left"),
    ("low_rank_", "params", "right"),
    ("low_rank", "out", "params"),
    ("low_rank_linear_", "y", "x"),
    ("requantize", "out", "params"),
]


@pytest.mark.parametrize(("op", "written", "other"), OVERLAPS)
def test_written_tensors_share_no_memory(op, written, other):
    args, memory = CALLS[op](), torch.zeros(80)
    for name in (written, other):
        value = args[name]
        first = value if isinstance(value, torch.Tensor) else value[0]
        view = memory.view(first.dtype)[: first.numel()].view(first.shape)
        args[name] = view if isinstance(value, torch.Tensor) else [view, *value[1:]]
    with pytest.raises(
        ValueError, match=f"^{op.split()[0]}: .*share no memory within one call, got overlap with"
    ):
        call(op, args)


def test_masks_may_be_shared_but_not_written(cpu_backend):
    """One mask for two parameters is fine; a mask that is a part of what is written is not."""
    theta, mask = [torch.rand(40), torch.rand(40)], torch.randint(256, (5,), dtype=torch.uint8)
    zokernels.combine_(theta, 1, 0.5, streams=[0, 1], masks=[mask, mask])
    q = torch.zeros(40, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"requantize_: .*share no memory"):
        zokernels.requantize_(q, 1, 0.5, streams=0, rounding="nearest", masks=q.view(torch.uint8)[:5])


def test_density_errors():
    theta = torch.rand(4)
    for kwargs, message in [
        (dict(density=0.5), r"combine_: mask_seed, density: expected both or none, got \(None, 0.5\)"),
        (dict(mask_seed=1), r"combine_: mask_seed, density: expected both or none, got \(1, None\)"),
        (dict(mask_seed=1, density=1.5), r"combine_: density: expected a number in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            zokernels.combine_(theta, 1, 0.5, streams=0, **kwargs)


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


@pytest.mark.parametrize("name", ["combine", "requantize", "low_rank"])
def test_out_without_params(name):
    """As many tensors are read as are written: an empty list is an error like any other of the wrong
    length.
    """
    out, factors = [torch.zeros(2, 2, dtype=torch.int8 if name == "requantize" else torch.float32)], ([], [])
    fields = factors if name == "low_rank" else ([1],)
    with pytest.raises(ValueError, match=f"^{name}: params: expected 1 tensors, as in out, got 0$"):
        getattr(zokernels, name)(out, [], *fields, [1.0], streams=[0], rounding="nearest")
    with pytest.raises(TypeError):
        getattr(zokernels, name)(None, out, *fields, [1.0], streams=[0])  # not in place, in silence


@pytest.mark.parametrize("name", ["combine", "requantize", "low_rank"])
def test_a_pair_shows_its_arguments(name):
    """help() and completion: those of the operation in place, and ``out`` in front of them."""
    inside, apart = (inspect.signature(getattr(zokernels, n)).parameters for n in (f"{name}_", name))
    assert list(apart) == ["out", *inside]
    assert all(apart[argument] == inside[argument] for argument in inside)
    assert {"params", "coeffs", "streams", "decay", "rounding_seed"} <= {*inside}
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in apart.values())
