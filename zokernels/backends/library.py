"""Finding and loading the compiled libraries."""

from __future__ import annotations

import pathlib

import torch

from .registry import BackendUnavailable

FOLDER = pathlib.Path(__file__).parent.parent / "lib"

#: What builds each library.
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
            f"backend {name!r} does not load with torch {torch.__version__} ({error}); rebuild it with: {BUILD[name]}"
        ) from error
