"""Triton kernels: contract ``zk1`` on NVIDIA GPUs without a CUDA toolkit, on AMD GPUs, and in an interpreter on CPU."""

from __future__ import annotations

import re

import torch

from ..registry import Backend, BackendUnavailable

#: Versions of Triton between which the tests compile every kernel.
OLDEST, NEWEST = (3, 6), (3, 9)


def load(version: str | None = None) -> Backend:
    """The backend; ``version``: instead of what Triton itself says.

    Raises :class:`BackendUnavailable` without Triton or with one older than ``OLDEST``.  One newer than ``NEWEST`` is
    used, and the backend's note says so.
    """
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"triton: cannot import triton ({error}); `pip install triton` installs it") from error
    version = version or str(getattr(triton, "__version__", "unknown"))
    number = re.match(r"(\d+)\.(\d+)", version)
    found = (int(number[1]), int(number[2])) if number else (0, 0)
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    if found < OLDEST:
        raise BackendUnavailable(
            f"triton: expected version {oldest} or later, got {version}; `pip install 'triton>={oldest}'` installs one "
            f"({oldest} to {newest} are tested)"
        )
    notes = [] if torch.version.hip is None else ["on AMD GPUs: compiled, never run"]
    if found > NEWEST:
        notes.append(f"Triton {version}: newer than {newest}, the newest that is tested")
    from .combine import combine, requantize
    from .device import DEVICES
    from .fan_out import fan_out
    from .low_rank import low_rank
    from .project import project
    from .seeds import derive_seed
    from .spread import spread
    from .squares import squares
    from .update import update
    from .wire import decode, decode_fan_out, encode

    return Backend(
        "triton",
        DEVICES,
        derive_seed=derive_seed,
        combine=combine,
        requantize=requantize,
        fan_out=fan_out,
        update=update,
        low_rank=low_rank,
        spread=spread,
        squares=squares,
        project=project,
        encode=encode,
        decode=decode,
        decode_fan_out=decode_fan_out,
        note="; ".join(notes),
    )
