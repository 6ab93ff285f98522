"""The compiled libraries: how they are found and loaded, and how their kernels are called.

A library registers its kernels as ``torch.ops.zokernels_<name>.*``, each with a schema.  The schema alone
decides how the arguments of a kernel (``registry.Kernel``) are passed, so no code here names a kernel:

* If the schema ends with the fields of ``Terms``, the last argument is a ``Terms``: its fields are passed.
* If it has an argument ``dist`` or ``wire``, which is a name in Python, the number of that name is passed.
* If it ends with ``isa``, the backend adds the instruction set.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..contract import DISTS
from ..wire import FORMATS
from .journal import call
from .registry import BackendUnavailable, Kernel
from .terms import Terms

FOLDER = pathlib.Path(__file__).parent.parent / "lib"

#: The command that builds each library, for error messages.
BUILD = {
    "cpu": "pip install --no-build-isolation .",
    "cuda": "ZOKERNELS_CUDA=1 pip install --no-build-isolation . (needs nvcc)",
}


def path_of(name: str) -> pathlib.Path:
    return FOLDER / f"libzokernels_{name}.so"


def load(name: str) -> None:
    """Loads ``libzokernels_<name>.so``, which registers ``torch.ops.zokernels_<name>``."""
    path = path_of(name)
    if not path.exists():
        raise BackendUnavailable(f"backend {name!r} is not built; build it with: {BUILD[name]}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BackendUnavailable(
            f"backend {name!r} does not load with torch {torch.__version__} ({error}); rebuild it "
            f"with: {BUILD[name]}"
        ) from error


#: Arguments that are names in Python and numbers in C++ (csrc/op_args.h).
CODES: Mapping[str, Mapping[str, int]] = {"dist": DISTS, "wire": {wire: i for i, wire in enumerate(FORMATS)}}


def finder(name: str, isa: Callable[[], str] | None = None) -> Callable[[str], Kernel | None]:
    """``Backend.find`` for a library that is loaded.

    ``isa`` returns the instruction set, which tests change while a process runs; it is asked at each call.
    """
    namespace = getattr(torch.ops, f"zokernels_{name}")

    def find(kernel: str) -> Kernel | None:
        packet = getattr(namespace, kernel, None)
        return None if packet is None else _bind(packet.default, isa)

    return find


def _bind(operation: Any, isa: Callable[[], str] | None) -> Kernel:
    """Makes a kernel of an operation of a library: it passes its arguments on in the form of the schema."""
    names = [argument.name for argument in operation._schema.arguments]
    takes_isa = names[-1:] == ["isa"]
    if takes_isa:
        names.pop()
    fields = len(Terms._fields)
    takes_terms = tuple(names[-fields:]) == Terms._fields
    if takes_terms:
        names = names[:-fields]
    coded = [(i, CODES[name]) for i, name in enumerate(names) if name in CODES]

    def kernel(*given: Any) -> Any:
        args = list(given)
        for i, numbers in coded:
            args[i] = numbers[args[i]]
        if takes_terms:
            args += args.pop().packed
        if takes_isa and isa is not None:
            args.append(isa())
        return call(operation, args)

    def kernel_of_terms(*given: Any) -> Any:  # the same without the loop, for the calls of every step
        *args, terms = given
        return call(operation, (*args, *terms.packed, *(() if isa is None else (isa(),))))

    return kernel_of_terms if takes_terms and not coded and takes_isa == (isa is not None) else kernel
