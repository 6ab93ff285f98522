"""Calls the cuRAND-style kernel: the library that was carried, or one compiled when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import shutil
import tempfile

import torch
from torch import Tensor

from . import CARRIED, LIBRARY, compile_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def load(path: pathlib.Path):
    """The function ``curand_perturb`` of a compiled library."""
    function = ctypes.CDLL(str(path)).curand_perturb
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_uint64,
        ctypes.c_void_p,
    ]
    return function


@functools.cache
def _function():
    carried = os.environ.get(CARRIED)
    if carried and (pathlib.Path(carried) / LIBRARY).exists():
        return load(pathlib.Path(carried) / LIBRARY)
    major, minor = torch.cuda.get_device_capability()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="zokernels-bench-"))
    try:
        compile_library(folder / LIBRARY, f"{major}{minor}")
        return load(folder / LIBRARY)
    finally:
        shutil.rmtree(folder)  # the library is loaded, and stays mapped without the file


def perturb_(theta: Tensor, c: float, seed: int) -> None:
    """theta += c z, where theta is contiguous, aligned to 16 bytes, and has a multiple of 8 elements."""
    if theta.data_ptr() % 16 or theta.numel() % 8 or not theta.is_contiguous():
        raise ValueError(
            "curand.perturb_: expected a contiguous tensor on 16 bytes with a multiple of 8 elements"
        )
    stream = torch.cuda.current_stream(theta.device).cuda_stream
    error = _function()(theta.data_ptr(), theta.numel(), _DTYPES[theta.dtype], c, seed, stream)
    if error:
        raise RuntimeError(f"curand_perturb: CUDA error {error}")
