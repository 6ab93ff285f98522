"""The CUDA C++ kernels of csrc/cuda.  One launch serves many tensors."""

from __future__ import annotations

import torch

from .. import library
from ..registry import Backend, BackendUnavailable
from .support import Build, Machine, device_problem, machine_problem


def load(build: Build | None = None, machine: Machine | None = None) -> Backend:
    """The backend, for those devices of this machine that the library was built for.

    Raises :class:`BackendUnavailable` where there is none.

    Args:
        build: what the library was built for; tests give another answer than the library's own.
        machine: what the driver and torch say of this machine; likewise.
    """
    library.load("cuda")
    build, machine = build or Build.read(), machine or Machine.here()
    problems = [device_problem(build, machine.driver, capability) for capability in machine.capabilities]
    if problem := machine_problem(build, machine) or (all(problems) and problems[0]):
        raise BackendUnavailable(f"backend 'cuda' {problem}")
    return Backend(
        "cuda",
        frozenset(("cuda",)),
        library.finder("cuda"),
        compiled=True,
        refused={torch.device("cuda", i): problem for i, problem in enumerate(problems) if problem},
    )
