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
from helpers import add_extras, random_call

from zokernels.ops.update import RULES

#: Logical indices of a program of Triton's kernels.
PROGRAM = 16384


def chunk_of(dist: str) -> int:
    """Logical indices of a block of the CUDA kernels, of one or two programs of Triton's."""
    return 16384 if dist == "normal" else 32768


def places(rng: random.Random, dist: str) -> dict:
    """Sizes and offsets of four tensors: one of whole chunks and a tail, of which one is crossed by 8 * 2^32, where the
    counter's lower word wraps; one that is a chunk, no element more; a small one; and one element."""
    chunk = chunk_of(dist)
    before = 8 * rng.randrange(1, 64)
    return {
        "sizes": [2 * chunk + 8 * rng.randrange(64, 128), chunk, 1 + rng.randrange(700), 1],
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
    make: Callable[..., dict], rng: random.Random, dist: str, tensors: Sequence[int] = range(4), **fixed: object
) -> dict:
    """``make(rng, ...)`` at those of ``places``, the third of which and what belongs to it lie off 16 bytes."""
    where = places(rng, dist)
    where |= {name: [where[name][i] for i in tensors] for name in ("sizes", "offsets")}
    args = make(rng, **where, **fixed)
    if "parts" in args and 2 in tensors:
        i, begin = list(tensors).index(2), 1 + rng.randrange(7)
        args["parts"][i] = slice(begin, begin + where["sizes"][i])
    return args


def random_combine(rng: random.Random, *, extras: object = (), **fixed: object) -> dict:
    buffers, parts, kwargs = random_call(rng, **fixed)
    return {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs, extras=extras)}


#: What each operation runs, and what makes its random arguments.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "combine": (test_combine.run, random_combine),
    "requantize": (test_requantize.run, test_requantize.random_requantize),
    "project": (test_project.run, test_project.random_project),
    "squares": (test_squares.run, test_squares.random_squares),
    **test_wire.CASES,
    **{f"update {rule}": (test_update.run, functools.partial(test_update.random_update, rule=rule)) for rule in RULES},
}
