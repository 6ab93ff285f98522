"""CUDA C++ kernels: many tensors in one launch."""

from __future__ import annotations

import torch

from .. import library
from ..registry import Backend, BackendUnavailable
from .combine import combine
from .fan_out import fan_out
from .low_rank import low_rank
from .project import project
from .requantize import requantize
from .spread import spread
from .squares import squares
from .support import Build, Machine, device_problem, machine_problem
from .update import update
from .wire import decode, decode_fan_out, encode


def load(build: Build | None = None, machine: Machine | None = None) -> Backend:
    """The backend, for the devices of this machine that the library's code runs on.

    Raises :class:`BackendUnavailable` where there is none.  ``build``, ``machine``: instead of what the library, and
    the driver and torch, say.
    """
    library.load("cuda")
    build, machine = build or Build.read(), machine or Machine.here()
    problems = [device_problem(build, machine.driver, capability) for capability in machine.capabilities]
    if problem := machine_problem(build, machine) or (all(problems) and problems[0]):
        raise BackendUnavailable(f"backend 'cuda' {problem}")
    return Backend(
        "cuda",
        frozenset(("cuda",)),
        refused={torch.device("cuda", i): problem for i, problem in enumerate(problems) if problem},
        derive_seed=torch.ops.zokernels_cuda.derive_seed,
        combine=combine,
        fan_out=fan_out,
        spread=spread,
        update=update,
        low_rank=low_rank,
        requantize=requantize,
        squares=squares,
        project=project,
        encode=encode,
        decode=decode,
        decode_fan_out=decode_fan_out,
    )
