"""Compiles Triton kernels for AMD architectures: ``python triton_amd_worker.py gfx942 FOLDER ...``.

Leaves in each folder the assembly of every kernel, or the error.  torch is told that it is one for ROCm
before the kernels are imported: so a process can compile for AMD or for NVIDIA, never for both."""

import pathlib
import sys
import traceback

import torch

if __name__ == "__main__":
    torch.version.hip = "pretended"

from triton_kernels import EVERY

TARGETS = ("gfx942", "gfx1100")
#: Name and dtypes of what is counted, which both targets compile.
COUNTED = [("combine_kernel", "fp32"), ("combine_kernel", "bf16"), ("combine_table_kernel", "fp32")]


def kernels_of(target: str) -> list[tuple[str, str]]:
    """Name and dtypes: every other one of all, so that the targets have each kernel and dtype once
    between them.
    """
    every = [(name, dtypes) for name in EVERY for dtypes in EVERY[name]]
    own = [kernel for kernel in every[TARGETS.index(target) :: len(TARGETS)] if kernel not in COUNTED]
    return COUNTED + own


def main(target: str, folder: str) -> None:
    for name, dtypes in kernels_of(target):
        path = pathlib.Path(folder) / f"{name}, {dtypes}"
        try:
            path.with_suffix(".s").write_text(EVERY[name][dtypes](target).asm["amdgcn"])
        except Exception:  # its test shows it
            path.with_suffix(".error").write_text(traceback.format_exc())


if __name__ == "__main__":
    for target, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(target, folder)
