"""Compiles every Triton kernel for an AMD architecture: ``python triton_amd_worker.py gfx942 FOLDER``.

Leaves in FOLDER the assembly of each, or the error.  torch is told that it is one for ROCm before the kernels are
imported: so a process can compile for AMD or for NVIDIA, never for both.
"""

import pathlib
import sys
import traceback

import torch

if __name__ == "__main__":
    torch.version.hip = "pretended"

from triton_kernels import EVERY

#: Name and dtypes: each kernel, the first of its dtypes; LLVM takes ten times as long as for NVIDIA.
KERNELS = [*((name, next(iter(EVERY[name]))) for name in EVERY), ("combine_kernel", "bf16")]


def main(target: str, folder: str) -> None:
    for name, dtypes in KERNELS:
        path = pathlib.Path(folder) / f"{name}, {dtypes}"
        try:
            path.with_suffix(".s").write_text(EVERY[name][dtypes](target).asm["amdgcn"])
        except Exception:  # its test shows it
            path.with_suffix(".error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
