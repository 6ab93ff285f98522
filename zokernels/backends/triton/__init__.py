"""The Triton kernels: for NVIDIA GPUs without a CUDA toolkit, AMD GPUs, and an interpreter on the CPU."""

from __future__ import annotations

import re

import torch

from ..registry import Backend, BackendUnavailable, kernels_of

#: The oldest and the newest version of Triton with which the tests compile every kernel.
OLDEST, NEWEST = (3, 6), (3, 9)


def load(version: str | None = None) -> Backend:
    """The backend.

    Raises :class:`BackendUnavailable` without Triton, or with one older than ``OLDEST``.  One newer than
    ``NEWEST`` is used, and the backend's note says so.

    ``version``: what tests give in the place of Triton's own version.
    """
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(
            f"triton: cannot import triton ({error}); `pip install triton` installs it"
        ) from error
    version = version or str(getattr(triton, "__version__", "unknown"))
    number = re.match(r"(\d+)\.(\d+)", version)
    found = (int(number[1]), int(number[2])) if number else (0, 0)
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    if found < OLDEST:
        raise BackendUnavailable(
            f"triton: expected version {oldest} or later, got {version}; `pip install "
            f"'triton>={oldest}'` installs one "
            f"({oldest} to {newest} are tested)"
        )
    from .device import DEVICES

    notes = [] if torch.version.hip is None else ["on AMD GPUs: compiled, never run"]
    if found > NEWEST:
        notes.append(f"Triton {version}: newer than {newest}, the newest that is tested")
    return Backend("triton", DEVICES, kernels_of(__name__).get, note="; ".join(notes))
