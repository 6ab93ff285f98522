"""Which instruction set the CPU kernels use.  ``ZOKERNELS_CPU_ISA`` sets it, for tests and measurements."""

from __future__ import annotations

import os

#: "auto" (the best that the processor has), "portable", "avx2", "avx512" or "neon".
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


def current_isa() -> str:
    return isa
