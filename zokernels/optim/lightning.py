"""What a step must know of Lightning, which is not imported for it."""

from __future__ import annotations

from typing import Any

from ..checks import fail


def check_accumulation(op: str, closure: Any) -> None:
    """Raises ValueError where ``closure`` is Lightning's, of a Trainer that accumulates gradients.

    In automatic optimization Lightning runs all but the last of the batches by itself, for the sake of their
    gradients, and hands over a closure of the last one: a step from losses would never see the others.
    """
    for argument in getattr(closure, "args", ()):  # a functools.partial, whose first argument is the module
        trainer = getattr(argument, "_trainer", None)
        count = getattr(trainer, "accumulate_grad_batches", 1)
        if isinstance(count, int) and count > 1:
            expected = (
                "1 in automatic optimization (a closure of manual optimization may sum several batches)"
            )
            fail(op, "accumulate_grad_batches", expected, count)
