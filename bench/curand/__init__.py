"""The cuRAND-style kernel: compiled by nvcc when it is first asked for, called through ctypes.

nvcc and ctypes instead of torch's extension builder: that would need ninja, Python's headers and a CUDA toolkit of
torch's own version, and takes a minute.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile

import torch
from torch import Tensor

SOURCE = pathlib.Path(__file__).with_name("perturb.cu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compile_library(target: pathlib.Path, arch: str) -> None:
    """Builds the shared library for ``arch`` ("90"); RuntimeError with the reason where that fails.

    --use_fast_math, which our own kernels do without: the baseline gets every advantage that a flag can give.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc")
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-O3", "-std=c++17", "--use_fast_math", gencode, "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    done = subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stderr.strip()[-300:]}")


@functools.cache
def _function():
    major, minor = torch.cuda.get_device_capability()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="zokernels-bench-"))
    try:
        compile_library(folder / "libperturb.so", f"{major}{minor}")
        function = ctypes.CDLL(str(folder / "libperturb.so")).curand_perturb
    finally:
        shutil.rmtree(folder)  # loaded by now: the mapping outlives the file
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_uint64,
        ctypes.c_void_p,
    ]
    return function


def perturb_(theta: Tensor, c: float, seed: int) -> None:
    """theta += c z; theta is contiguous, on 16 bytes, and its number of elements a multiple of 8."""
    if theta.data_ptr() % 16 or theta.numel() % 8 or not theta.is_contiguous():
        raise ValueError("curand.perturb_: expected a contiguous tensor on 16 bytes with a multiple of 8 elements")
    stream = torch.cuda.current_stream(theta.device).cuda_stream
    error = _function()(theta.data_ptr(), theta.numel(), _DTYPES[theta.dtype], c, seed, stream)
    if error:
        raise RuntimeError(f"curand_perturb: CUDA error {error}")
