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
    """Logical indices of a block of the CUDA kernels, of one or two programs of Triton's."""
    return 16384 if dist == "normal" else 32768


def places(rng: random.Random, dist: str) -> dict:
    """Sizes and offsets of four tensors: one with edges before and after whole chunks, of which one is crossed by
    8 * 2^32, where the counter's lower word wraps; one that is a chunk, no element more; a small one; and one element.

    The edges are longer than 1024 elements: all that a program of Triton's takes at a time.
    """
    chunk = chunk_of(dist)
    before, after = 8 * rng.randrange(129, 250), rng.randrange(1025, 2000)
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


def derive_seeds(rng: int) -> list[Tensor]:
    """Of more seeds than a block has threads."""
    draw = random.Random(rng)
    run_seed, step = (torch.tensor([seed_to_int64(draw.getrandbits(64)) for _ in range(300)]) for _ in range(2))
    return [zokernels.derive_seed(run_seed, step, torch.tensor([draw.getrandbits(32) for _ in range(300)]))]


#: What each operation runs, and what makes its random arguments.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "combine": (test_combine.run, random_combine),
    "requantize": (test_requantize.run, test_requantize.random_requantize),
    "project": (test_project.run, test_project.random_project),
    "squares": (test_squares.run, test_squares.random_squares),
    **test_wire.CASES,
    **{f"update {rule}": (test_update.run, functools.partial(test_update.random_update, rule=rule)) for rule in RULES},
}
