"""Which backend runs an operation: loading, selection, and the report of what is built and present.

A backend is a folder with a ``load()`` that returns a :class:`Backend` or raises :class:`BackendUnavailable`.
Nothing is imported, loaded or probed before an operation, or the report, needs it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from .terms import Terms

#: Automatic choice for a device, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

NAMES = ("reference", "cpu", "triton", "cuda")


class BackendUnavailable(RuntimeError):
    """A backend that cannot be used here; the message says why and what mends it."""


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend.  Arguments arrive checked; ``out`` may equal ``params``.  Formulas: ``reference``."""

    name: str
    devices: frozenset[str]
    #: (run_seed, step, k), int64 tensors of one shape
    derive_seed: Callable[[Tensor, Tensor, Tensor], Tensor]
    #: (out, params, terms)
    combine: Callable[[list[Tensor], list[Tensor], Terms], None]
    #: (params, plus, minus, seed, coeff, plain terms)
    fan_out: Callable[[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Terms], None]
    #: (out [K, *shape], x, plain terms of one tensor)
    spread: Callable[[Tensor, Tensor, Terms], None]
    #: (params, first states, second states, rule, hyper, terms without curvature)
    update: Callable[[list[Tensor], list[Tensor], list[Tensor], str, Tensor, Terms], None]
    #: (out, params, left, right, terms without seeds, masks and curvature)
    low_rank: Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Terms], None]
    #: (out, params, low, high, terms without curvature), int8
    requantize: Callable[[list[Tensor], list[Tensor], int, int, Terms], None]
    #: (seeds, sizes, plain terms' streams, offsets, dist)
    squares: Callable[[Tensor, list[int], list[int], list[int], str], Tensor]
    #: (tensors, seeds, plain terms' streams, offsets, dist)
    project: Callable[[list[Tensor], Tensor, list[int], list[int], str], Tensor]
    #: (wire buffers, params, wire, offsets)
    encode: Callable[[list[Tensor], list[Tensor], str, list[int]], None]
    #: (out, wire buffers, wire, plain terms)
    decode: Callable[[list[Tensor], list[Tensor], str, Terms], None]
    #: (plus, minus, wire buffers, wire, seed, coeff, plain terms)
    decode_fan_out: Callable[[list[Tensor], list[Tensor], list[Tensor], str, Tensor, Tensor, Terms], None]
    #: Devices of those types that it cannot run on, each with the reason: the rest of a sentence about the backend.
    refused: Mapping[torch.device, str] = field(default_factory=dict)
    #: What a user should know of it besides; empty where all is ordinary.
    note: str = ""


_forced: ContextVar[str | None] = ContextVar("zokernels_backend", default=None)


@functools.cache
def _load(name: str) -> Backend | BackendUnavailable:
    module = importlib.import_module(f".{name}", __package__)
    try:
        backend: Backend = module.load()
    except BackendUnavailable as error:
        return error
    return backend


def _unknown(name: str, where: str) -> NoReturn:
    raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")


def get(name: str) -> Backend:
    """The backend ``name``; raises :class:`BackendUnavailable` with the reason and the command that mends it."""
    if name not in NAMES:
        _unknown(name, "backend")
    loaded = _load(name)
    if isinstance(loaded, BackendUnavailable):
        raise loaded
    return loaded


def forced() -> str | None:
    """The backend asked for by :func:`backend` or ``ZOKERNELS_BACKEND``, if any."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("ZOKERNELS_BACKEND") or "auto"
        if name not in (*NAMES, "auto"):
            _unknown(name, "ZOKERNELS_BACKEND")
    return None if name == "auto" else name


def select(device: torch.device | str) -> Backend:
    """The backend for tensors on ``device``: the forced one, else the first of ``PREFERENCE`` that runs there."""
    device = torch.device(device) if isinstance(device, str) else device
    name = forced()
    if name is not None:
        chosen = get(name)
        if device.type not in chosen.devices:
            raise BackendUnavailable(
                f"backend {name!r}: expected tensors on {' or '.join(sorted(chosen.devices))}, got {device.type}"
                + ("; set TRITON_INTERPRET=1 before Python starts to run Triton on CPU" if name == "triton" else "")
            )
        if device in chosen.refused:
            raise BackendUnavailable(f"backend {name!r} {chosen.refused[device]}")
        return chosen
    for name in PREFERENCE.get(device.type, ("reference",)):
        loaded = _load(name)
        if isinstance(loaded, Backend) and device.type in loaded.devices and device not in loaded.refused:
            return loaded
    raise BackendUnavailable(f"no backend for device type {device.type!r}: expected cpu or cuda")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, run every operation on backend ``name`` (``None`` or ``"auto"``: choose automatically).

    Raises :class:`BackendUnavailable` at once where that backend cannot be used.
    """
    if name not in (None, "auto"):
        get(name)
    token = _forced.set(name or "auto")
    try:
        yield
    finally:
        _forced.reset(token)
