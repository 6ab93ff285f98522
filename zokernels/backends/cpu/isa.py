"""Which instruction set the CPU kernels use.  ``ZOKERNELS_CPU_ISA`` sets it, for tests and measurements."""

from __future__ import annotations

import os

#: "auto" (the best that the processor has), "portable", "avx2", "avx512", "vnni", "amx" or "neon".  vnni and
#: amx are avx512 with more instructions for products of integers.
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


def current_isa() -> str:
    return isa
