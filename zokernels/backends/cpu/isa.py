"""Which instruction set the host kernels use: ``ZOKERNELS_CPU_ISA``, for tests and measurements."""

from __future__ import annotations

import os

#: auto, portable, avx2, avx512 or neon.
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


def current_isa() -> str:
    return isa
