"""Random calls of every operation, of the sizes at which compiled kernels take their different paths."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import test_combine
import test_project
import test_requantize
import test_squares
import test_update
import test_wire
import torch
from helpers import add_extras, random_call
from torch import Tensor

import zokernels
from zokernels.contract import seed_to_int64
from zokernels.ops.update import RULES

#: Logical indices of a program of Triton's kernels.
PROGRAM = 16384


def chunk_of(dist: str) -> int:
    """Logical indices of a block of the CUDA kernels, of two programs of Triton's."""
    return 32768


def places(rng: random.Random, dist: str) -> dict:
    """Sizes and offsets of four tensors: one with edges before and after whole chunks, of which one is
    crossed by 8 * 2^32, where the counter's lower word wraps; one that is a chunk, no element more; a small
    one; and one element.

    A program of Triton's takes 1024 elements of an edge at a time, an eighth of them by each access: the
    edges have more, and each eighth is once outside of the tensor."""
    chunk = chunk_of(dist)
    before, after = 1024 + 8 * rng.randrange(1, 32), 1024 + rng.randrange(1, 128)
    return {
        "sizes": [2 * chunk + before + after, chunk, 1 + rng.randrange(700), 1],
        "offsets": [
            8 * 2**32 - chunk - before,
            chunk * rng.randrange(2**30),
            rng.randrange(2**62),
            rng.randrange(2**40),
        ],
        "dist": dist,
        "aligned": True,
    }


def arguments(
    make: Callable[..., dict],
    rng: random.Random,
    dist: str,
    tensors: Sequence[int] = range(4),
    **fixed: object,
) -> dict:
    """``make(rng, ...)`` at those of ``places``, the third of which and what belongs to it lie off 16
    bytes.
    """
    where = places(rng, dist)
    where |= {name: [where[name][i] for i in tensors] for name in ("sizes", "offsets")}
    args = make(rng, **where, **fixed)
    if "parts" in args and 2 in tensors:
        # Not four: that many elements of fp32 are 16 bytes.
        i, begin = list(tensors).index(2), rng.choice((1, 2, 3, 5, 6, 7))
        args["parts"][i] = slice(begin, begin + where["sizes"][i])
    return args


def random_combine(rng: random.Random, *, extras: object = (), **fixed: object) -> dict:
    buffers, parts, kwargs = random_call(rng, **fixed)
    return {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs, extras=extras)}


def derive_seeds(rng: int) -> list[Tensor]:
    """Of more seeds than a block has threads."""
    draw = random.Random(rng)
    run_seed, step = (
        torch.tensor([seed_to_int64(draw.getrandbits(64)) for _ in range(300)]) for _ in range(2)
    )
    return [zokernels.derive_seed(run_seed, step, torch.tensor([draw.getrandbits(32) for _ in range(300)]))]


#: What each operation runs, and what makes its random arguments.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "combine": (test_combine.run, random_combine),
    "requantize": (test_requantize.run, test_requantize.random_requantize),
    "project": (test_project.run, test_project.random_project),
    "squares": (test_squares.run, test_squares.random_squares),
    **test_wire.CASES,
    **{
        f"update {rule}": (test_update.run, functools.partial(test_update.random_update, rule=rule))
        for rule in RULES
    },
}

_PLAIN = {"count": 1, "rounding": "nearest"}
#: What combine is given where a fault is put into its PTX: by name the distribution and options, and kinds of
#: faults.
FAULTY: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "a product and a sum": (
        "rademacher",
        {"dtype": torch.float32, "decay": 0.97, **_PLAIN},
        ("comparison", "bound", "predicate", "offset", "fused", "rounding"),
    ),
    "fmas": (
        "normal",
        {"dtype": torch.float32, "decay": None, **_PLAIN},
        ("comparison", "bound", "predicate", "offset", "rounding"),
    ),
    "bf16": ("normal", {"dtype": torch.bfloat16, "decay": None, **_PLAIN}, ("conversion",)),
}
FAULTS = [(name, kind) for name, (_, _, kinds) in FAULTY.items() for kind in kinds]


def faulty_arguments(rng: random.Random, name: str, tensors: Sequence[int] = range(4)) -> dict:
    """Values and noise of one magnitude, so that a last bit of either is one of the result's."""
    dist, fixed, _ = FAULTY[name]
    args = arguments(random_combine, rng, dist, tensors, **fixed)
    buffers = [0.02 * torch.randn(b.shape) for b in args["buffers"]]
    return {**args, "buffers": [b.to(fixed["dtype"]) for b in buffers], "coeffs": torch.tensor([0.03])}
