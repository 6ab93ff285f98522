"""The cuRAND-style kernel: how it is compiled, which needs neither torch nor a GPU.  ``call`` runs it.

nvcc and ctypes instead of torch's extension builder: that would need ninja, Python's headers and a CUDA
toolkit of torch's own version, and takes a minute.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess

SOURCE = pathlib.Path(__file__).with_name("perturb.cu")
LIBRARY = "libcurand_perturb.so"

#: Environment variable: a folder that holds ``LIBRARY``, compiled elsewhere (``make gpu-prebuilt``).
CARRIED = "ZOKERNELS_PREBUILT"


def gencodes(*sms: str) -> list[str]:
    """nvcc's options for machine code of each of ``sms`` ("90")."""
    return [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sms]


def compile_library(target: pathlib.Path, *sms: str) -> None:
    """Builds the shared library for the architectures ``sms`` ("90"); RuntimeError with the reason where that
    fails.

    --use_fast_math, which our own kernels do without: the baseline gets every advantage that a flag can give.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc")
    flags = ["-O3", "-std=c++17", "--use_fast_math", *gencodes(*sms), "-shared", "-Xcompiler", "-fPIC"]
    command = [nvcc, *flags, "-cudart", "static", str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stderr.strip()[-300:]}")
