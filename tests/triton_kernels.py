"""Every Triton kernel compiled without a GPU, by name and dtype: for the tests that read what comes of it.

A ``target`` is an architecture: 90 is NVIDIA's sm_90, "gfx942" AMD's, for which the process pretends
that its torch is one for ROCm (triton_amd_worker.py).  Triton's interpreter must be off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zokernels.backends.triton import (
    combine,
    fan_out,
    launch,
    low_rank,
    low_rank_linear,
    project,
    quantized_linear,
    seeds,
    spread,
    squares,
    tile,
    update,
    wire,
)
from zokernels.contract import DISTS

MODULES = (
    combine, fan_out, low_rank, low_rank_linear, project, quantized_linear, seeds, spread, squares, update,
    wire,
)  # fmt: skip
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "i8": tl.int8, "u8": tl.uint8}
ELEMENTS = tile.PROGRAM // (32 * tile.NUM_WARPS)  # of one thread

#: Arguments of every kernel that are not pointers to tensors.
KINDS = {
    **dict.fromkeys(("numel", "offset", "stream", "m", "n", "rank", "columns"), "i64"),
    **dict.fromkeys(("width", "length", "blocks", "magic", "rows"), "i64"),
    **dict.fromkeys(("outputs", "groups"), "i64"),
    **dict.fromkeys(("left_members", "right_members", "bias_members"), "i64"),
    **dict.fromkeys(("seeds", "seed", "rounding_seed", "mask_seed", "table", "total"), "*i64"),
    **dict.fromkeys(("out_ptr", "run_seed_ptr", "step_ptr", "k_ptr"), "*i64"),
    "partial": "*fp64",
    "q": "*i32",
    "steps": "*fp32",
    **dict.fromkeys(("coeffs", "coeff", "decay", "hyper"), "*fp32"),
    **dict.fromkeys(("num_k", "mask_keep", "each", "shift"), "i32"),
    "owner": "*i32",
}
#: Optional arguments: what is not asked for is None.
OPTIONAL = ("decay", "rounding_seed", "mask_seed")


class FakeDriver:
    """Enough of a driver for Triton to compile what a launch asks for, without launching it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """One for each architecture: Triton keeps what it compiled by device, not by target."""
        return self._target.arch if isinstance(self._target.arch, int) else 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def active(cls, target: GPUTarget) -> property:
        """Stands for ``triton.runtime.driver.active``, which kernels ask what they are compiled for."""
        return property(lambda self: cls(target))


def build(function, target, tensors, present=(), **constants):
    """Compiles ``function``: ``tensors`` are the types of its tensors by name, None where there is none."""
    kinds = {**KINDS, **{name: kind and f"*{kind}" for name, kind in tensors.items()}}
    constants = {**dict.fromkeys(set(OPTIONAL) - set(present)), **constants}
    constants.update({name: None for name, kind in tensors.items() if kind is None})
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in function.arg_names}
    source = ASTSource(function, signature=signature, constexprs=constants)
    warp_size = 64 if str(target).startswith("gfx9") else 32
    gpu = GPUTarget("hip" if isinstance(target, str) else "cuda", target, warp_size)
    with mock.patch.object(type(triton.runtime.driver), "active", FakeDriver.active(gpu)):
        return triton.compile(source, target=gpu, options=launch.compile_options(warp_size))


def build_table(function, target, tensors, present=(), *, columns=5, **constants):
    """As ``build``, of a kernel that reads its tensors' addresses behind ``columns`` others in a table."""
    dtypes = tuple(DTYPES.get(kind) for kind in tensors.values())
    return build(function, target, {}, present, DTYPES=dtypes, WIDTH=columns + len(dtypes), **constants)


@cache
def combine_kernel(
    target, dtype, dist="normal", k=1, *, rounding=False, decay=False, table=False, aligned=True, mask=None,
    random=False, curvature=None, bounds=(None, None), each=False,
):  # fmt: skip
    asked = {"decay": decay, "rounding_seed": rounding, "mask_seed": random}
    present = [name for name in OPTIONAL if asked[name]]
    tensors = {"out": dtype, "theta": dtype, "mask": mask, "curvature": curvature}
    constants = {"DOMAIN": DISTS[dist], "K": k, "ALIGNED": aligned, "LOW": bounds[0], "HIGH": bounds[1]}
    if table:
        return build_table(combine.combine_table_kernel, target, tensors, present, EACH=each, **constants)
    return build(combine.combine_kernel, target, tensors, present, **constants)


def rows_kernel(target, dist="normal", dtype="bf16", *, aligned=True, present=()):
    tensors = {"out": dtype, "theta": dtype, "mask": None, "curvature": None}
    constants = {"DOMAIN": DISTS[dist], "K": 1, "ALIGNED": aligned}
    return build(combine.combine_rows_kernel, target, tensors, present, **constants)


def update_kernel(target, rule, states, *, k=1, present=(), table=False):
    """``states``: the types of theta, the first and second state, and the mask."""
    tensors = dict(zip(("theta", "first", "second", "mask"), states, strict=True))
    constants = {
        "RULE": rule,
        "VALUES": update.VALUES[rule],
        "DOMAIN": DISTS["normal"],
        "K": k,
        "ALIGNED": True,
    }
    if table:
        return build_table(update.update_table_kernel, target, tensors, present, EACH=False, **constants)
    return build(update.update_kernel, target, tensors, present, **constants)


def update_rows_kernel(target, dtype="bf16"):
    tensors = {"theta": dtype, "first": "fp32", "second": "fp32", "mask": None}
    constants = {
        "RULE": "adam",
        "VALUES": update.VALUES["adam"],
        "DOMAIN": DISTS["normal"],
        "K": 1,
        "ALIGNED": True,
    }
    return build(update.update_rows_kernel, target, tensors, **constants)


def fan_out_kernel(target, dtype="bf16", *, pending=False, table=False):
    tensors = dict.fromkeys(("theta", "plus", "minus"), dtype)
    constants = {"DOMAIN": DISTS["normal"], "K": int(pending), "PENDING": pending, "ALIGNED": True}
    if table:
        return build_table(fan_out.fan_out_table_kernel, target, tensors, **constants)
    return build(fan_out.fan_out_kernel, target, tensors, **constants)


def decode_kernel(target, codes, emax, dist="normal", minus="bf16", *, plus="bf16", table=False):
    """Wire bytes ``codes`` with the largest exponent ``emax``; without ``minus`` no fan-out."""
    tensors = {"plus": plus, "minus": minus, "wire": codes}
    constants = {"EMAX": emax, "DOMAIN": DISTS[dist], "K": 0, "ALIGNED": True}
    if table:
        return build_table(wire.decode_table_kernel, target, tensors, **constants)
    return build(wire.decode_kernel, target, tensors, **constants)


def encode_kernel(target, codes, emax, dtype="bf16"):
    return build(wire.encode_kernel, target, {"out": codes, "theta": dtype}, EMAX=emax, BLOCKS=wire._BLOCKS)


def spread_kernel(target, dist="normal", dtype="bf16"):
    return build(spread.spread_kernel, target, {"out": dtype, "x": dtype}, DOMAIN=DISTS[dist], ALIGNED=True)


def low_rank_kernel(target, *present, dtype="bf16", table=False):
    tensors = {"out": dtype, "theta": dtype, "left": "fp32", "right": "fp32"}
    if table:
        table_kernel = low_rank.low_rank_table_kernel
        return build_table(table_kernel, target, tensors, present, columns=7, EACH=False, ALIGNED=True)
    return build(low_rank.low_rank_kernel, target, tensors, present, ALIGNED=True)


def low_rank_linear_kernel(target, dtype="bf16", *, ranks=1, bias="fp32", add=True):
    tensors = {"out": dtype, "x": dtype, "left": "fp32", "right": "fp32", "bias": bias}
    return build(low_rank_linear.low_rank_linear_kernel, target, tensors, ADD=add, WIDTH=4, RANKS=ranks)


def quantize_kernel(target, dtype="bf16", limbs=3):
    return build(quantized_linear.quantize_kernel, target, {"x": dtype}, LIMBS=limbs)


def quantized_linear_kernel(target, dtype="bf16", *, packed=False, bias="fp32", limbs=3):
    tensors = {"out": dtype, "weight": "u8" if packed else "i8", "scale": dtype, "bias": bias}
    return build(quantized_linear.quantized_linear_kernel, target, tensors, PACKED=packed, LIMBS=limbs)


def squares_kernel(target, *, table=False):
    if table:
        return build(squares.squares_table_kernel, target, {}, WIDTH=5)
    return build(squares.squares_kernel, target, {})


def project_kernel(target, dist="normal", dtype="bf16"):
    constants = {"DOMAIN": DISTS[dist], "DTYPE": DTYPES[dtype], "ALIGNED": True, "WIDTH": 6}
    return build(project.project_table_kernel, target, {}, **constants)


def derive_seed_kernel(target):
    return build(seeds.derive_seed_kernel, target, {}, BLOCK=seeds._BLOCK)


def _each_dtype(make: Callable, *dtypes: str) -> dict[str, Callable]:
    return {dtype: partial(make, dtype=dtype) for dtype in dtypes or ("fp32", "bf16", "fp16")}


def _stochastic(make: Callable, **options: object) -> dict[str, Callable]:
    """``make`` of each dtype of weights, with stochastic rounding where there is one."""
    return {
        "fp32": partial(make, dtype="fp32", **options),
        "bf16": partial(make, dtype="bf16", rounding=True, **options),
        "fp16": partial(make, dtype="fp16", rounding=True, **options),
        "i8": partial(make, dtype="i8", rounding=True, bounds=(-127, 127), **options),
    }


def _rules(**options: object) -> dict[str, Callable]:
    """Every rule, and every dtype of weights and states."""
    states = {
        "momentum": ("bf16", "fp32", None, None),
        "adam": ("fp16", "bf16", "bf16", "u8"),
        "sign": ("fp32", None, None, None),
        "hizoo": ("bf16", "bf16", None, None),
        "adam_window": ("fp32", None, None, None),
    }
    k = {"adam_window": None, "sign": 2}
    return {
        f"{rule}, {types[0]}": partial(update_kernel, rule=rule, states=types, k=k.get(rule, 1), **options)
        for rule, types in states.items()
    }


def _decodes(**options: object) -> dict[str, Callable]:
    wires = {"bf16": ("bf16", None), "fp16": ("fp16", None), "fp8": ("i8", 8), "int8": ("i8", 0)}
    outputs = dict(zip(wires, ("bf16", "fp16", "fp32", "bf16"), strict=True))
    return {
        f"{name} to {outputs[name]}": partial(
            decode_kernel, codes=codes, emax=emax, plus=outputs[name], minus=outputs[name], **options
        )
        for name, (codes, emax) in wires.items()
    }


#: Kernel by name, and by its dtypes how to compile it for a target.
EVERY: dict[str, dict[str, Callable]] = {
    "combine_kernel": _stochastic(combine_kernel),
    "combine_table_kernel": _stochastic(combine_kernel, dist="rademacher", table=True, mask="u8"),
    "combine_rows_kernel": _each_dtype(rows_kernel),
    "update_kernel": _rules(),
    "update_table_kernel": _rules(table=True),
    "update_rows_kernel": _each_dtype(update_rows_kernel),
    "fan_out_kernel": _each_dtype(fan_out_kernel),
    "fan_out_table_kernel": _each_dtype(partial(fan_out_kernel, pending=True, table=True)),
    "decode_kernel": _decodes(),
    "decode_table_kernel": _decodes(table=True),
    "encode_kernel": {
        "bf16 from fp32": partial(encode_kernel, codes="bf16", emax=None, dtype="fp32"),
        "fp16 from fp32": partial(encode_kernel, codes="fp16", emax=None, dtype="fp32"),
        "fp8 from bf16": partial(encode_kernel, codes="i8", emax=8, dtype="bf16"),
        "int8 from fp16": partial(encode_kernel, codes="i8", emax=0, dtype="fp16"),
    },
    "spread_kernel": _each_dtype(spread_kernel),
    "low_rank_kernel": _each_dtype(low_rank_kernel),
    "low_rank_table_kernel": _each_dtype(partial(low_rank_kernel, table=True)),
    "low_rank_linear_kernel": _each_dtype(partial(low_rank_linear_kernel, ranks=4)),
    "quantize_kernel": _each_dtype(quantize_kernel),
    "quantized_linear_kernel": _each_dtype(partial(quantized_linear_kernel, packed=True)),
    "project_table_kernel": _each_dtype(project_kernel),
    "squares_kernel": {"": squares_kernel},
    "squares_table_kernel": {"": partial(squares_kernel, table=True)},
    "derive_seed_kernel": {"": derive_seed_kernel},
}


def kernel_names() -> set[str]:
    """Every kernel that the backend has."""
    return {
        name
        for module in MODULES
        for name, function in vars(module).items()
        if name.endswith("_kernel") and isinstance(function, triton.JITFunction)
    }
