"""Which backend runs an operation: loading, selection, and the report of what is built and present.

A backend is a folder with a ``load()`` that returns a :class:`Backend` or raises :class:`BackendUnavailable`.
Nothing is imported, loaded or probed before an operation, or the report, needs it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch

from .journal import in_python

#: Automatic choice for a device, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

NAMES = ("reference", "cpu", "triton", "cuda")


class BackendUnavailable(RuntimeError):
    """A backend that cannot be used here; the message says why and what mends it."""


#: A backend's part of an operation.  Arguments arrive checked; ``out`` may equal ``params``.  What it
#: computes is what the function of the same name in ``reference`` says.
Kernel = Callable[..., Any]
_AnyKernel = TypeVar("_AnyKernel", bound=Kernel)

#: By the package of a backend: the kernels that its modules have marked.
_MARKED: dict[str, dict[str, Kernel]] = defaultdict(dict)


def implements(function: _AnyKernel) -> _AnyKernel:
    """Marks a function in a module of a backend as its kernel of that name."""
    _MARKED[function.__module__.rpartition(".")[0]][function.__name__] = function
    return function


def kernels_of(package: str) -> dict[str, Kernel]:
    """What the modules of a backend implement, by name.  Imports all of them, so only ``load()`` calls it."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return _MARKED[package]


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend: ``select(device).combine(out, params, terms)``."""

    name: str
    devices: frozenset[str]
    #: The kernel of a name; None where there is none.
    find: Callable[[str], Kernel | None]
    #: Devices of those types that it cannot run on, each with the reason: the rest of a sentence about the
    #: backend.
    refused: Mapping[torch.device, str] = field(default_factory=dict)
    #: Whether a kernel is one call of a compiled function.
    compiled: bool = False
    #: What a user should know of it besides; empty where all is ordinary.
    note: str = ""

    def __getattr__(self, name: str) -> Kernel:
        """A kernel as an attribute.

        It is found once and then stands in the instance, where nothing is called.
        """
        kernel = None if name.startswith("_") else self.find(name)
        if kernel is None:
            raise AttributeError(f"backend {self.name!r} has no kernel {name!r}", name=name, obj=self)
        kernel = kernel if self.compiled else in_python(kernel)
        object.__setattr__(self, name, kernel)
        return kernel


#: What stands behind ``os.environ``, by encoded names.  Its ``get`` takes four calls of Python, of which each
#: call of an operation would make one.
_environment: Mapping[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_BACKEND = os.environ.encodekey("ZOKERNELS_BACKEND")

_forced: ContextVar[str | None] = ContextVar("zokernels_backend", default=None)


#: What has been loaded, and what cannot be, by name.
LOADED: dict[str, Backend | BackendUnavailable] = {}


def _load(name: str) -> Backend | BackendUnavailable:
    """Called for a name that is not in ``LOADED`` yet."""
    module = importlib.import_module(f".{name}", __package__)
    try:
        LOADED[name] = module.load()
    except BackendUnavailable as error:
        LOADED[name] = error
    return LOADED[name]


def _unknown(name: str, where: str) -> NoReturn:
    raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")


def get(name: str) -> Backend:
    """The backend ``name``; raises :class:`BackendUnavailable` with the reason and the command that mends
    it.
    """
    if name not in NAMES:
        _unknown(name, "backend")
    loaded = LOADED.get(name) or _load(name)
    if isinstance(loaded, BackendUnavailable):
        raise loaded
    return loaded


def forced() -> str | None:
    """The backend asked for by :func:`backend` or ``ZOKERNELS_BACKEND``, if any."""
    name = _forced.get()
    if name is None:
        if _environment.get(_BACKEND) is None:
            return None
        name = os.environ.get("ZOKERNELS_BACKEND") or "auto"
        if name not in (*NAMES, "auto"):
            _unknown(name, "ZOKERNELS_BACKEND")
    return None if name == "auto" else name


def select(device: torch.device | str) -> Backend:
    """The backend for tensors on ``device``: the forced one, else the first of ``PREFERENCE`` that runs
    there.
    """
    device = torch.device(device) if isinstance(device, str) else device
    name = forced()
    if name is not None:
        chosen = get(name)
        if device.type not in chosen.devices:
            raise BackendUnavailable(
                f"backend {name!r}: expected tensors on {' or '.join(sorted(chosen.devices))}, got "
                f"{device.type}"
                + (
                    "; set TRITON_INTERPRET=1 before Python starts to run Triton on CPU"
                    if name == "triton"
                    else ""
                )
            )
        if device in chosen.refused:
            raise BackendUnavailable(f"backend {name!r} {chosen.refused[device]}")
        return chosen
    kind = device.type
    for name in PREFERENCE.get(kind, ("reference",)):
        loaded = LOADED.get(name) or _load(name)
        if isinstance(loaded, Backend) and kind in loaded.devices and device not in loaded.refused:
            return loaded
    raise BackendUnavailable(f"no backend for device type {kind!r}: expected cpu or cuda")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, run every operation on backend ``name`` (``None`` or ``"auto"``: choose
    automatically).

    Raises :class:`BackendUnavailable` at once where that backend cannot be used.
    """
    if name not in (None, "auto"):
        get(name)
    token = _forced.set(name or "auto")
    try:
        yield
    finally:
        _forced.reset(token)
